--[[
Forget what was taken out of a Celery queue, now that it is accepted.

KEYS[1]  list, what was taken: the time, then the messages
ARGV[1]  the time of the taking: a consumer that slept meanwhile must not finish its successor's
Returns  1, or 0 if that taking is finished already
]]
local taken = KEYS[1]
local time = ARGV[1]

if redis.call('LINDEX', taken, 0) ~= time then
  return 0
end
return redis.call('DEL', taken)

--[[
Note when messages were taken out of a queue of Celery's, once: that is the version of what is in them.

Each taking has a time of its own, later than the one before.

KEYS[1]  list, what was taken: the mark, then the messages
KEYS[2]  string, the time of the last taking
ARGV[1]  the mark
ARGV[2]  now in ms, on the state's clock, read after the taking
Returns  the time, or "" if that is not what is taken any more: another consumer has noted a time, or finished it
]]
local taken, last = KEYS[1], KEYS[2]
local mark, now = ARGV[1], tonumber(ARGV[2])

if redis.call('LINDEX', taken, 0) ~= mark then
  return ''
end
local time = whole(math.max(now, (tonumber(redis.call('GET', last)) or 0) + 1))
-- First, because it needs no memory: a full server would refuse the others as a script's first write.
redis.call('LPOP', taken)
redis.call('SET', last, time)
redis.call('LPUSH', taken, time)
return time

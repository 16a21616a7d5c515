--[[
Open the line because a person says so, whatever kept it.

What the line was stopped for because of the data itself is let pass from now on, for a while: the person
has seen it, and would otherwise be asked again and again. What was wrong in the settings may have been the key: signatures made until now are not used
any more.

KEYS[1]  hash, line
KEYS[2]  hash, health
ARGV[1]  now in ms, empty = the server's clock
ARGV[2]  how long the reason is let pass, ms
Returns  the state that the line was in, and the kind of its stop, if any; {} when it was open
]]
local now, let_for = tonumber(ARGV[1]), tonumber(ARGV[2])
local time = not now and redis.call('TIME')
now = now or time[1] * 1000 + math.floor(time[2] / 1000)

local line = redis.call('HMGET', KEYS[1], 'state', 'kind', 'code')
if not line[1] then
  return {}
end
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[2], 'failures', 0, 'calm_at', now)
if line[2] == 'data' then
  redis.call('HSET', KEYS[2], 'let_code', line[3], 'let_until', now + let_for)
elseif line[2] == 'error' then
  redis.call('HSET', KEYS[2], 'signed_at', math.floor(now / 1000) + 1)
end
return { line[1], line[2] or '' }

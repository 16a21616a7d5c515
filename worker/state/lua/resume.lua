--[[
Open the line because a person says so, whatever stopped it.

If the data stopped it, that code is ignored for a while: the person has seen it, and would otherwise be asked again and
again. If the settings did, the key may have been wrong: signatures made until now are not used any more.

KEYS[1]  hash, line
KEYS[2]  hash, health
ARGV[1]  now in ms, empty = the server's clock
ARGV[2]  how long the code is ignored, ms
Returns  the state that the line was in, and the kind of its stop, if any; {} if it was open
]]
local line, health = KEYS[1], KEYS[2]
local now, ignored_for = now_ms(ARGV[1]), tonumber(ARGV[2])

local state, kind, code = unpack(redis.call('HMGET', line, 'state', 'kind', 'code'))
if not state then
  return {}
end
redis.call('DEL', line)
redis.call('HSET', health, 'failures', 0, 'calm_at', now)
if kind == 'data' then
  redis.call('HSET', health, 'let_code', code, 'let_until', now + ignored_for)
elseif kind == 'error' then
  redis.call('HSET', health, 'signed_at', math.floor(now / 1000) + 1)
end
return { state, kind or '' }

--[[
Open the line at a person's request, whatever stopped it.

If the data stopped it, that code is ignored for a while: the person has seen it, and would otherwise be asked again and
again. If the settings did, the key may have been wrong: signatures made until now are no longer used.

KEYS[1]  hash, line
KEYS[2]  hash, health
KEYS[3]  stream, history
ARGV[1]  now in ms, empty = the server's clock
ARGV[2]  how long the code is ignored, ms
ARGV[3]  who opens it
Returns  the state that the line was in, and the kind of its stop, if any; {} if it was open
]]
local line, health, history = KEYS[1], KEYS[2], KEYS[3]
local now, ignored_for, by = now_ms(ARGV[1]), tonumber(ARGV[2]), ARGV[3]

local state, kind, code, since = unpack(redis.call('HMGET', line, 'state', 'kind', 'code', 'since'))
if not state then
  return {}
end
redis.call('DEL', line)
local lasted = math.max(0, now - (tonumber(since or nil) or now))
note('resumed', 'by', by, 'was', state, 'kind', kind or '', 'code', code or '', 'stopped_for_ms', whole(lasted))
redis.call('HSET', health, 'failures', 0, 'calm_at', now)
if kind == 'data' then
  redis.call('HSET', health, 'let_code', code, 'let_until', now + ignored_for)
elseif kind == 'error' then
  redis.call('HSET', health, 'signed_at', math.floor(now / 1000) + 1)
end
return { state, kind or '' }

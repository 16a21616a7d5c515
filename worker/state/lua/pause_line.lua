--[[
Stop sending at a person's request, unless the line is paused already: who was first, and when, stays.

KEYS[1]  hash, line
KEYS[2]  stream, history
ARGV[1]  now in ms, empty = the server's clock
ARGV[2]  reason, for people
ARGV[3]  who pauses it
Returns  1, or 0 if the line was paused already
]]
local line, history = KEYS[1], KEYS[2]
local now, reason, by = now_ms(ARGV[1]), ARGV[2], ARGV[3]

if redis.call('HGET', line, 'state') == 'paused' then
  return 0
end
redis.call('DEL', line)
redis.call('HSET', line, 'state', 'paused', 'reason', reason, 'by', by, 'since', now)
note('paused', 'by', by, 'reason', reason)
return 1

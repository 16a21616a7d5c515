--[[
Stop sending because a person says so, unless one has said so already: who was first, and when, stays.

KEYS[1]  hash, line
ARGV[1]  now in ms, empty = the server's clock
ARGV[2]  reason, for people
Returns  1, or 0 if the line was paused already
]]
local line = KEYS[1]
local now, reason = now_ms(ARGV[1]), ARGV[2]

if redis.call('HGET', line, 'state') == 'paused' then
  return 0
end
redis.call('DEL', line)
redis.call('HSET', line, 'state', 'paused', 'reason', reason, 'since', now)
return 1

--[[
Let nobody reserve a slot for a while. The longer of two pauses stands.

KEYS[1]  hash, rate: "paused_at" us, "paused_until" us, "reason", "code"
ARGV[1]  now in us, empty = the server's clock
ARGV[2]  how long, us
ARGV[3]  reason, for people
ARGV[4]  error code behind it, empty = none
Returns  1 when this pause stands, 0 when a longer one does
]]
local now, length, reason, code = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3], ARGV[4]
local time = not now and redis.call('TIME')
now = now or time[1] * 1000000 + time[2]

local rate = redis.call('HMGET', KEYS[1], 'paused_at', 'paused_until')
local paused_at, paused_until = tonumber(rate[1]) or 0, tonumber(rate[2]) or 0
if paused_at <= now and paused_until >= now + length then
  return 0
end
local starts, ends = string.format('%.0f', now), string.format('%.0f', now + length)
redis.call('HSET', KEYS[1], 'paused_at', starts, 'paused_until', ends, 'reason', reason, 'code', code)
return 1

--[[
Open the line again, because its probe has passed. The rate climbs from a tenth of the quota, so that a service that has
just recovered is not overrun.

KEYS[1]  hash, line
KEYS[2]  hash, health
KEYS[3]  hash, rate
KEYS[4]  stream, history
ARGV[1]  now in us, empty = the server's clock
ARGV[2]  batch id of the probe
ARGV[3]  the quota configured, calls a second
ARGV[4]  how long a limit is tried before the next one, us
ARGV[5]  when the probe was signed, s: older signatures may be bad
Returns  1, or 0 if this is not (or no longer) the probe of a stopped line
]]
local line, health, rate, history = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local now, batch, quota, dwell, signed_at = now_us(ARGV[1]), ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5]

local state, probe = unpack(redis.call('HMGET', line, 'state', 'probe'))
if not state or state == 'paused' or probe ~= batch then
  return 0
end
local since = numbers(redis.call('HMGET', line, 'since'))
redis.call('DEL', line)
note('reopened', 'by', 'worker', 'batch', batch, 'stopped_for_ms', whole(math.max(0, now / 1000 - since)))
redis.call('HSET', health, 'signed_at', signed_at, 'failures', 0, 'calm_at', whole(now / 1000))
local limit, bad = unpack(redis.call('HMGET', rate, 'limit', 'bad'))
local lower, step = math.max(1, math.floor(quota / 10)), math.max(1, math.floor(quota / 10))
if lower < (tonumber(limit) or quota) then
  -- A ceiling met earlier is still the best guess.
  redis.call('HSET', rate, 'limit', lower, 'good', 0, 'bad', bad or 0, 'step', step)
  redis.call('HSET', rate, 'granted', 0, 'climb_at', whole(now + dwell))
end
return 1

--[[
Open the line again, because its probe has passed. The rate climbs from a tenth, so that a service that
has just come back is not run over.

KEYS[1]  hash, line
KEYS[2]  hash, health
KEYS[3]  hash, rate
ARGV[1]  now in us, empty = the server's clock
ARGV[2]  batch id of the probe
ARGV[3]  the quota configured, calls a second
ARGV[4]  how long a limit is tried before the next one, us
ARGV[5]  time at which the probe's signature was made, s: older ones may be bad
Returns  1, or 0 when this is not the probe of a stopped line (any more)
]]
local now, batch, quota, dwell = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local signed_at = ARGV[5]
local time = not now and redis.call('TIME')
now = now or time[1] * 1000000 + time[2]

local line = redis.call('HMGET', KEYS[1], 'state', 'probe')
if line[1] ~= 'stopped' or line[2] ~= batch then
  return 0
end
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[2], 'signed_at', signed_at, 'failures', 0, 'calm_at', string.format('%.0f', now / 1000))
local rate = redis.call('HMGET', KEYS[3], 'limit', 'bad')
local limit, step = math.max(1, math.floor(quota / 10)), math.max(1, math.floor(quota / 10))
if limit < (tonumber(rate[1]) or quota) then
  -- A ceiling that was met before is still the best guess.
  local climb_at = string.format('%.0f', now + dwell)
  redis.call('HSET', KEYS[3], 'limit', limit, 'good', 0, 'bad', rate[2] or 0, 'step', step)
  redis.call('HSET', KEYS[3], 'granted', 0, 'climb_at', climb_at)
end
return 1

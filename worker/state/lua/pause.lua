--[[
Let nobody reserve a slot for a while; slots reserved before lapse. The longer of two pauses stands.

When the API refused a call for its frequency, the limit drops, too: to the last one that was good, or by
a quarter. Only the first refusal counts: the others were sent before anybody knew, in an older epoch.

KEYS[1]  hash, rate: "next", "epoch"; "paused_at" us, "paused_until" us, "reason", "code"; and, below the
         quota, "limit", "good", "bad", "step", "granted", "climb_at" us, "hold" us
ARGV[1]  now in us, empty = the server's clock
ARGV[2]  how long, us
ARGV[3]  reason, for people
ARGV[4]  error code behind it, empty = none
ARGV[5]  epoch of the permit that was refused, empty = this is about no permit
ARGV[6]  the limit that the permit was made for, 0 = leave the limit as it is
ARGV[7]  how long a limit is tried, us
ARGV[8]  shortest and
ARGV[9]  longest hold below a ceiling that was met, us
Returns  1 when this pause stands, 0 when it is an echo of an earlier one, or a longer one stands
]]
local now, length, reason, code = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3], ARGV[4]
local epoch, refused, dwell = ARGV[5], tonumber(ARGV[6]), tonumber(ARGV[7])
local shortest, longest = tonumber(ARGV[8]), tonumber(ARGV[9])
local time = not now and redis.call('TIME')
now = now or time[1] * 1000000 + time[2]

local function us(value)
  return string.format('%.0f', value)
end

local rate = redis.call('HMGET', KEYS[1], 'paused_at', 'paused_until', 'epoch', 'good', 'hold', 'limit')
if epoch ~= '' and epoch ~= (rate[3] or '0') then
  return 0
end
if refused > 0 then
  local good, hold = tonumber(rate[4]) or 0, tonumber(rate[5])
  -- The step above the last good limit fails again and again: try it ever more rarely.
  hold = hold and refused == good + 1 and math.min(2 * hold, longest) or hold or shortest
  good = good < refused and good or 0
  local limit = good > 0 and good or math.max(1, math.floor(refused * 3 / 4))
  limit = math.min(limit, tonumber(rate[6]) or limit)
  redis.call('HSET', KEYS[1], 'limit', limit, 'good', good, 'bad', refused, 'step', 1, 'granted', 0)
  redis.call('HSET', KEYS[1], 'climb_at', us(now + length + dwell), 'hold', us(hold))
end
local paused_at, paused_until = tonumber(rate[1]) or 0, tonumber(rate[2]) or 0
redis.call('HINCRBY', KEYS[1], 'epoch', 1)
if paused_at <= now and paused_until >= now + length then
  return 0
end
redis.call('HSET', KEYS[1], 'paused_at', us(now), 'paused_until', us(now + length), 'reason', reason, 'code', code)
redis.call('HSET', KEYS[1], 'next', us(now + length))
return 1

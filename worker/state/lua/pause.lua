--[[
Let nobody reserve a slot for a while; slots reserved before lapse. The longer of two pauses wins.

If the API refused a call for its frequency, the limit drops, too: to the last one that was good, or by a quarter. Only
the first refusal counts: the others were sent before anybody knew, in an older epoch.

KEYS[1]  hash, rate: "next", "epoch"; "paused_at" us, "paused_until" us, "reason", "code"; and, below the quota,
         "limit", "good", "bad", "step", "granted", "climb_at" us, "hold" us
ARGV[1]  now in us, empty = the server's clock
ARGV[2]  how long, us
ARGV[3]  reason, for people
ARGV[4]  error code behind it, empty = none
ARGV[5]  epoch of the permit that was refused, empty = this is about no permit
ARGV[6]  the limit that the permit was made for, 0 = leave the limit as it is
ARGV[7]  how long a limit is tried, us
ARGV[8]  shortest hold below a ceiling that was met, us
ARGV[9]  longest hold, us
Returns  1 if this pause took effect, 0 if it echoes an earlier one, or a longer one is in force
]]
local rate = KEYS[1]
local now, length, reason, code = now_us(ARGV[1]), tonumber(ARGV[2]), ARGV[3], ARGV[4]
local epoch, refused, dwell = ARGV[5], tonumber(ARGV[6]), tonumber(ARGV[7])
local shortest, longest = tonumber(ARGV[8]), tonumber(ARGV[9])

if has_lapsed(rate, epoch) then
  return 0
end
local paused_at, paused_until, good, hold, limit =
  numbers(rate, 'paused_at', 'paused_until', 'good', 'hold', 'limit')
if refused > 0 then
  -- The step above the last good limit fails again and again: try it ever more rarely.
  local again = hold > 0 and refused == good + 1
  hold = again and math.min(2 * hold, longest) or (hold > 0 and hold or shortest)
  good = good < refused and good or 0
  local lower = good > 0 and good or math.max(1, math.floor(refused * 3 / 4))
  lower = limit > 0 and math.min(lower, limit) or lower
  redis.call('HSET', rate, 'limit', lower, 'good', good, 'bad', refused, 'step', 1, 'granted', 0)
  redis.call('HSET', rate, 'climb_at', whole(now + length + dwell), 'hold', whole(hold))
end
redis.call('HINCRBY', rate, 'epoch', 1)
if paused_at <= now and paused_until >= now + length then
  return 0
end
redis.call('HSET', rate, 'paused_at', whole(now), 'paused_until', whole(now + length), 'reason', reason, 'code', code)
redis.call('HSET', rate, 'next', whole(now + length))
return 1

--[[
Let nobody reserve a slot for a while; slots reserved earlier lapse. The longer of two pauses wins.

If the API refused a call for its frequency, it depends on how many it refused within a second. A few are the network's
doing, or a stall's, unless the API names a longer pause: slots move one percent apart, two stay empty, and everything
goes on. More, or any below a known ceiling, mean that less is granted: everyone pauses, and the limit drops to the last
good one, or by a quarter. Then only the first refusal counts: the others were sent before anybody knew, in an older
epoch.

KEYS[1]  hash, rate: "next", "epoch"; "paused_at" us, "paused_until" us, "reason", "code"; and, below the quota,
         "limit", "good", "bad", "step", "granted", "climb_at" us, "hold" us; "apart", "jitter", "stretch",
         "stretch_at", "stretch_hold", "stretch_jitter" us; "refusals" in the second that began at "refused_at" us
ARGV[1]  now in us, empty = the server's clock
ARGV[2]  how long, us
ARGV[3]  reason, for people
ARGV[4]  error code behind it, empty = none
ARGV[5]  epoch of the permit that was refused, empty = this is about no permit
ARGV[6]  the limit that the permit was made for, 0 = leave the limit as it is
ARGV[7]  how long a limit is tried, us
ARGV[8]  shortest hold below a ceiling that was met, us
ARGV[9]  longest hold, us
Returns  {1 if this pause, or the step, took effect, 0 if it echoes an earlier one, or a longer one is in force; the epoch}
]]
local rate = KEYS[1]
local now, length, reason, code = now_us(ARGV[1]), tonumber(ARGV[2]), ARGV[3], ARGV[4]
local epoch, refused, dwell = ARGV[5], tonumber(ARGV[6]), tonumber(ARGV[7])
local shortest, longest = tonumber(ARGV[8]), tonumber(ARGV[9])

-- First a write that needs no memory: a full server then accepts the others.
redis.call('HDEL', rate, '')
local current = numbers(redis.call('HMGET', rate, 'epoch'))
if has_lapsed(epoch) then
  return { 0, current }
end
local paused_at, paused_until, good, hold, limit =
  numbers(redis.call('HMGET', rate, 'paused_at', 'paused_until', 'good', 'hold', 'limit'))
if refused > 0 and limit == 0 and length <= 1e6 then
  local SECOND, STEP, MOST = 1e6, 1e4, 3e5
  local since, refusals, slot, apart, jitter, stretch, quiet =
    numbers(redis.call('HMGET', rate, 'refused_at', 'refusals', 'next', 'apart', 'jitter', 'stretch', 'stretch_hold'))
  local first = now < since or now >= since + SECOND
  refusals = first and 1 or refusals + 1
  redis.call('HSET', rate, 'refused_at', whole(first and now or since), 'refusals', refusals)
  if refusals < math.max(4, refused / 10) then
    if first then
      -- The attempt after the quiet failed again: try it ever more rarely.
      local again = quiet > 0 and now >= since + quiet and now < since + 2 * quiet + shortest
      quiet = again and math.min(2 * quiet, longest) or (now < since + quiet and quiet or shortest)
      redis.call('HSET', rate, 'stretch', whole(math.min(stretch + STEP, MOST)), 'stretch_at', whole(now + quiet))
      redis.call('HSET', rate, 'stretch_hold', whole(quiet), 'stretch_jitter', whole(jitter))
      redis.call('HSET', rate, 'next', whole(math.max(slot, now) + 2 * apart))
    end
    return { first and 1 or 0, current }
  end
end
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
current = current + 1
redis.call('HSET', rate, 'epoch', current)
if paused_at <= now and paused_until >= now + length then
  return { 0, current }
end
redis.call('HSET', rate, 'paused_at', whole(now), 'paused_until', whole(now + length), 'reason', reason, 'code', code)
redis.call('HSET', rate, 'next', whole(now + length))
return { 1, current }

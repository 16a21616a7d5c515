--[[
Reserve the next free slot of the shared clock, first come, first served.

A slot further away than the caller's patience is not reserved. So the next slot is never further away than patience plus
one interval, unless the server's clock was set back; then it is at the end of the caller's patience, when every slot
granted before has passed. A pause that began in the future is from before the clock was set back, and void.

The API may allow less than the quota that was configured. Then "limit" is the number of calls a second that is tried
now, and it climbs whenever a full second's calls at it have passed: by doubling steps as long as no ceiling is known,
then by halving the way to the ceiling ("bad", the lowest limit refused), and once there only after a long hold, which
doubles each time the next step is refused again.

Calls that isolate bad users get at most every tenth slot while others wait for slots, too.

KEYS[1]  hash, rate: "next" free slot us, "next_isolating" us, "paused_at" us, "paused_until" us, "epoch"; "limit", "good",
         "bad", "step" calls a second, "granted" since "limit" was set, "climb_at" us, "hold" us
ARGV[1]  now in us, empty = the server's clock
ARGV[2]  the quota configured, calls a second
ARGV[3]  interval between slots at that quota, us
ARGV[4]  patience, us
ARGV[5]  1 for a call that isolates, else 0
ARGV[6]  how long a limit is tried before the next one, us
Returns  {1, us until the slot, now in us, epoch, limit} or {0, us until asking again is worthwhile, now in us}
]]
local rate = KEYS[1]
local now, quota, interval, patience = now_us(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local isolating, dwell = ARGV[5] == '1', tonumber(ARGV[6])

local slot, paused_at, paused_until, epoch, limit, isolate_from =
  numbers(rate, 'next', 'paused_at', 'paused_until', 'epoch', 'limit', 'next_isolating')
limit = limit > 0 and math.min(limit, quota) or quota

local function climb()
  local granted, climb_at, bad, step, hold = numbers(rate, 'granted', 'climb_at', 'bad', 'step', 'hold')
  -- A climb further away than any wait is from before the clock was set back.
  if granted < limit or (now < climb_at and climb_at - now < 4e9) then
    redis.call('HINCRBY', rate, 'granted', 1)
    return
  end
  local wait = dwell
  redis.call('HSET', rate, 'good', limit)
  if bad == 0 then
    limit, step = math.min(quota, limit + math.max(step, 1)), 2 * math.max(step, 1)
  elseif limit + 1 < bad then
    limit = math.floor((limit + bad) / 2)
  else
    bad, step, wait = 0, 1, hold > 0 and hold or dwell
  end
  if limit >= quota then
    limit = quota
    redis.call('HDEL', rate, 'limit', 'good', 'bad', 'step', 'granted', 'climb_at', 'hold')
    return
  end
  local climb_next = whole(now + wait)
  redis.call('HSET', rate, 'limit', limit, 'bad', bad, 'step', step, 'granted', 1, 'climb_at', climb_next)
end

if slot > now + patience + interval * quota / limit then
  slot = now + patience
end
slot = math.max(slot, now, paused_at <= now and paused_until or 0)
if slot - now > patience then
  return { 0, slot - now - patience, now }
end
if isolating and slot > now and slot < isolate_from and isolate_from <= slot + 10 * interval * quota / limit then
  return { 0, isolate_from - slot, now }
end
if limit < quota then
  climb()
end
local width = math.ceil(interval * quota / limit)
redis.call('HSET', rate, 'next', whole(slot + width))
if isolating then
  redis.call('HSET', rate, 'next_isolating', whole(slot + 10 * width))
end
return { 1, slot - now, now, epoch, limit }

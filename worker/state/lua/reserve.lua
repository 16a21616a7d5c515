--[[
Reserve the next free slot of the shared clock, first come, first served.

A slot further away than the caller's patience is not reserved. So the next slot is never further away
than patience plus one interval, unless the server's clock was set back; then it starts at the end of
the caller's patience, when every slot granted before has passed. A pause that began in the future is one
from before the clock was set back, and is void.

The API may allow less than the quota that was configured. Then "limit" is the number of calls a second
that is tried now, and it climbs whenever a full second's calls at it have passed: by doubling steps as
long as no ceiling is known, then by halving the way to the ceiling ("bad", the lowest limit refused),
and once there only after a long hold, which doubles each time that the next step is refused again.

Calls that isolate bad users get at most every tenth slot while others wait for slots, too.

KEYS[1]  hash, rate: "next" free slot us, "next_isolating" us, "paused_at" us, "paused_until" us, "epoch";
         "limit", "good", "bad", "step" calls a second, "granted" since "limit" was set, "climb_at" us, "hold" us
ARGV[1]  now in us, empty = the server's clock
ARGV[2]  the quota configured, calls a second
ARGV[3]  interval between slots at that quota, us
ARGV[4]  patience, us
ARGV[5]  1 for a call that isolates, else 0
ARGV[6]  how long a limit is tried before the next one, us
Returns  {1, us until the slot, now in us, epoch, limit} or {0, us until asking again is worth while, now in us}
]]
local now, quota, interval, patience = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local isolating, dwell = ARGV[5] == '1', tonumber(ARGV[6])
local time = not now and redis.call('TIME')
now = now or time[1] * 1000000 + time[2]

local rate = redis.call('HMGET', KEYS[1], 'next', 'paused_at', 'paused_until', 'epoch', 'limit', 'next_isolating')
local slot, paused_at, paused_until = tonumber(rate[1]) or 0, tonumber(rate[2]) or 0, tonumber(rate[3]) or 0
local limit = math.min(tonumber(rate[5]) or quota, quota)

local function climb()
  local tried = redis.call('HMGET', KEYS[1], 'granted', 'climb_at', 'bad', 'step', 'hold')
  local granted, climb_at = tonumber(tried[1]) or 0, tonumber(tried[2]) or 0
  -- A climb further away than any wait is one from before the clock was set back.
  if granted < limit or (now < climb_at and climb_at - now < 4e9) then
    redis.call('HINCRBY', KEYS[1], 'granted', 1)
    return
  end
  local bad, step, wait = tonumber(tried[3]) or 0, tonumber(tried[4]) or 1, dwell
  redis.call('HSET', KEYS[1], 'good', limit)
  if bad == 0 then
    limit, step = math.min(quota, limit + step), 2 * step
  elseif limit + 1 < bad then
    limit = math.floor((limit + bad) / 2)
  else
    bad, step, wait = 0, 1, tonumber(tried[5]) or dwell
  end
  if limit >= quota then
    limit = quota
    redis.call('HDEL', KEYS[1], 'limit', 'good', 'bad', 'step', 'granted', 'climb_at', 'hold')
    return
  end
  local next_climb = string.format('%.0f', now + wait)
  redis.call('HSET', KEYS[1], 'limit', limit, 'bad', bad, 'step', step, 'granted', 1, 'climb_at', next_climb)
end

if slot > now + patience + interval * quota / limit then
  slot = now + patience
end
slot = math.max(slot, now, paused_at <= now and paused_until or 0)
if slot - now > patience then
  return { 0, slot - now - patience, now }
end
local isolate_from = tonumber(rate[6]) or 0
if isolating and slot > now and slot < isolate_from and isolate_from <= slot + 10 * interval * quota / limit then
  return { 0, isolate_from - slot, now }
end
if limit < quota then
  climb()
end
local width = math.ceil(interval * quota / limit)
redis.call('HSET', KEYS[1], 'next', string.format('%.0f', slot + width))
if isolating then
  redis.call('HSET', KEYS[1], 'next_isolating', string.format('%.0f', slot + 10 * width))
end
return { 1, slot - now, now, tonumber(rate[4]) or 0, limit }

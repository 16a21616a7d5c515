--[[
Reserve the next free slot of the shared clock, first come, first served.

Fleet-wide values are the fleet's, whatever one caller asks for. The quota is the lowest that anybody has named within a
minute of slots, which no jumping clock can shorten; when it falls, permits for faster slots lapse, and a second passes
first, since their calls may just have been made. No slot is further away than the horizon: a caller with less patience
gets none, one with more asks again. A next slot beyond the horizon dates from before the server's clock was set back. It
is then set at the horizon, when every slot granted earlier has passed. A pause that began in the future is void for the
same reason.

The API counts arrivals, and the network delays some calls more than others. If it does so by up to J seconds, slots
(1 + J) / quota apart keep every second. J is the average of what callers see in the times of answers; refusals correct
it upwards ("stretch"), and quiet downwards again, below what is seen only after a long hold.

The API may allow less than the configured quota. Then "limit" is the number of calls a second being tried, and it climbs
whenever a full second's calls at it have passed: by doubling steps as long as no ceiling is known, then by halving the
way to the ceiling ("bad", the lowest limit refused), and once there only after a long hold, which doubles each time the
next step is refused again.

Where updates count as accepted only once replicas have them, nobody sends while none is in step: a primary cut off from
all of them may already have a successor. A server that does not list its replicas is trusted.

Some kinds of calls, those that isolate bad users or read, get at most one slot in a given number while other calls wait.

KEYS[1]  hash, rate: "next" free slot us, "next_isolating" and "next_reading" us, "paused_at" us, "paused_until" us, "epoch";
         "limit", "good", "bad", "step" calls a second, "granted" since "limit" was set, "climb_at" us, "hold" us; "apart" us
         between slots, "jitter" us, "stretch" us, "stretch_at" us, "stretch_hold" us, "stretch_jitter" us;
         "busy" us, the slots granted so far, end to end
KEYS[2]  zset, quotas: calls a second -> "busy" when somebody last named it
KEYS[3]  hash, server
KEYS[4]  zset, tickets
KEYS[5]  hash, ledger
ARGV[1]  now in us, empty = the server's clock
ARGV[2]  the quota that the caller was configured with, calls a second
ARGV[3]  patience, us
ARGV[4]  one in how many slots this kind of call may take while others wait; 0 = every slot, -1 = none
ARGV[5]  how long a limit is tried before the next one, us
ARGV[6]  by how much the times of the caller's answers differ, us; empty = unknown
ARGV[7]  the number of the server that the caller knows, 0 = none
ARGV[8]  1 if a replica must be in step, else 0
ARGV[9]  the least time, us, that the caller needs from now to its slot
ARGV[10] the field of `rate` that says when the next slot of this kind is, "next_isolating" or "next_reading"
Returns  {1, us until the slot, now in us, number of this server, epoch, limit}, or {0, us until asking again is
         worthwhile, now in us, number of this server}
]]
local rate, quotas, server, tickets, ledger = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local now, named, patience = now_us(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local one_in, dwell, seen = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local server_seen, needs_replica, notice, turn = tonumber(ARGV[7]), ARGV[8] == '1', tonumber(ARGV[9]), ARGV[10]

-- How long a quota counts as named, us. At most this much of J is taken from answers, us: a service that slows down looks
-- like a network that does.
local SECOND, LATELY, MOST_SEEN = 1e6, 60e6, 1e5
-- Slots are never closer than this, to allow for slightly late threads; how much J is rounded up by.
local CLOSEST, MARGIN = 1.02, 0.005
-- The stretch falls by one percent this often, and below what is seen only after this long.
local STEP, EVERY, HELD = 1e4, 2.5e6, 300e6

despite_full_memory()
local number = arrive(now, server_seen)
if needs_replica then
  local _, about = replication()
  local in_step = not string.find(about, 'connected_slaves')
  for state, lag in string.gmatch(about, 'state=(%w+),offset=%d+,lag=(%d+)') do
    in_step = in_step or state == 'online' and tonumber(lag) <= 1
  end
  if not in_step then
    hold_all(now, SECOND, 'no replica of Redis is in step')
    return { 0, SECOND, now, number }
  end
end
local slot, paused_at, paused_until, epoch, limit, turn_at, busy =
  numbers(redis.call('HMGET', rate, 'next', 'paused_at', 'paused_until', 'epoch', 'limit', turn, 'busy'))

local others = math.huge
for _, quota in ipairs(redis.call('ZRANGEBYSCORE', quotas, whole(busy - LATELY), '+inf')) do
  local number = tonumber(quota)
  others = finite(number) and number >= 1 and math.min(others, number) or others
end
redis.call('ZADD', quotas, whole(busy), named)
redis.call('ZREMRANGEBYSCORE', quotas, '-inf', '(' .. whole(busy - LATELY))
local quota = math.min(others, named)
local horizon = now + math.max(SECOND, 2 * CLOSEST * SECOND / quota)
if named < others and others < math.huge then
  slot = math.max(math.min(slot, horizon), now + SECOND)
  epoch = epoch + 1
  redis.call('HSET', rate, 'next', whole(slot), 'epoch', epoch)
end
limit = limit > 0 and math.min(limit, quota) or quota

-- How far apart slots are at the limit, us.
local function width()
  local jitter, stretch, at, hold, jitter_then =
    numbers(redis.call('HMGET', rate, 'jitter', 'stretch', 'stretch_at', 'stretch_hold', 'stretch_jitter'))
  if seen then
    jitter = jitter + (math.min(seen, MOST_SEEN) - jitter) / 20
  end
  if at == 0 or at > now + math.max(hold, HELD) then
    at = now + HELD
  elseif stretch > 0 and jitter + STEP < jitter_then then
    -- The network is calmer than when slots were stretched.
    at = math.min(at, now + EVERY)
  end
  if now >= at and (stretch > 0 or jitter + stretch > (CLOSEST - 1 - MARGIN) * SECOND) then
    at = now + (stretch > STEP and EVERY or math.max(hold, HELD))
    stretch = stretch - STEP
  end
  stretch = math.max(stretch, -jitter)
  local apart = math.ceil(SECOND / limit * math.max(CLOSEST, 1 + MARGIN + (jitter + stretch) / SECOND))
  redis.call('HSET', rate, 'apart', apart, 'jitter', whole(jitter), 'stretch', whole(stretch), 'stretch_at', whole(at))
  return apart
end

local function climb()
  local granted, climb_at, bad, step, hold = numbers(redis.call('HMGET', rate, 'granted', 'climb_at', 'bad', 'step', 'hold'))
  -- A climb further away than any wait dates from before the clock was set back.
  if granted < limit or (now < climb_at and climb_at - now < 4e9) then
    redis.call('HSET', rate, 'granted', granted + 1)
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

local paused = paused_at <= now and paused_until or 0
if slot > math.max(paused, horizon + 2 * SECOND / limit) then
  slot = horizon
  redis.call('HSET', rate, 'next', whole(slot))
end
patience = math.min(patience, horizon - now)
local others_wait = slot > now
slot = math.max(slot, now + math.min(notice, patience), paused)
if slot - now > patience then
  return { 0, slot - now - patience, now, number }
end
-- A turn further away than any possible one dates from before the clock was set back.
if others_wait and one_in < 0 then
  return { 0, slot - now, now, number }
elseif others_wait and one_in > 0 and slot < turn_at and turn_at <= slot + 3 * one_in * SECOND / limit then
  return { 0, math.min(turn_at - slot, slot - now), now, number }
end
if limit < quota then
  climb()
end
local apart = width()
redis.call('HSET', rate, 'next', whole(slot + apart), 'busy', whole(busy + apart))
if one_in > 0 then
  redis.call('HSET', rate, turn, whole(slot + one_in * apart))
end
return { 1, slot - now, now, number, epoch, limit }

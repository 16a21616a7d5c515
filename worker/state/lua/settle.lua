--[[
End a claim, user by user; users without an outcome of their own get the one for the rest, or stay.

Only users that the batch still holds are touched, so a batch whose lease was reclaimed, or a user
settled before, changes nothing: the batch id is the fencing token. What comes back from flight is
merged under anything newer that arrived meanwhile, and keeps the time of its first update.

A failure that may be the service's costs an attempt only once a call claimed after it has succeeded, and
not when it belongs to an outage: until then the record has its time ("f").

Outcomes: ["ack"], ["retry", delay ms, 1 = costs an attempt at once, else 0],
["snooze", delay ms, 1 = must not share a call with others from now on, else 0], ["dead_letter", code, message].

KEYS[1]  hash, pending: user -> record
KEYS[2]  zset, lane `live`
KEYS[3]  zset, lane `backfill`
KEYS[4]  zset, lane `delayed`
KEYS[5]  hash, flight: user -> record
KEYS[6]  hash, batches: batch id -> JSON array of users
KEYS[7]  zset, leases: batch id -> end in ms
KEYS[8]  hash, dead: user -> dead letter
KEYS[9]  zset, dead_at
KEYS[10] hash, shadow: user -> record last delivered
KEYS[11] zset, shadow_at
KEYS[12] hash, ledger
KEYS[13] hash, health
ARGV[1]  now in ms, empty = the server's clock
ARGV[2]  batch id
ARGV[3]  JSON object: user -> outcome
ARGV[4]  JSON outcome for the rest, or null to leave them in flight
ARGV[5]  how long delivered values are remembered, ms; 0 = not at all
ARGV[6]  how many users are remembered at most
ARGV[7]  ms at which the batch was claimed, 0 = unknown
Returns  the number of users settled, or -1 when the batch is not held any more
]]
local now, batch, outcomes, rest = tonumber(ARGV[1]), ARGV[2], cjson.decode(ARGV[3]), cjson.decode(ARGV[4])
local shadow_ttl, shadow_max, claimed = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local time = not now and redis.call('TIME')
now = now or time[1] * 1000 + math.floor(time[2] / 1000)

local held = redis.call('HGET', KEYS[6], batch)
if not held then
  return -1
end
local users, left = {}, {}
for _, user in ipairs(cjson.decode(held)) do
  local list = (outcomes[user] or rest ~= cjson.null) and users or left
  list[#list + 1] = user
end
if #users == 0 then
  return 0
end

local flight = redis.call('HMGET', KEYS[5], unpack(users))
local pending = redis.call('HMGET', KEYS[1], unpack(users))
local shadow = shadow_ttl > 0 and redis.call('HMGET', KEYS[10], unpack(users)) or {}
redis.call('HDEL', KEYS[5], unpack(users))
local health = redis.call('HMGET', KEYS[13], 'ok_at', 'calm_at')
local ok_at, calm_at = tonumber(health[1]) or 0, tonumber(health[2]) or 0
local counts = { delivered = 0, coalesced = 0, dead_lettered = 0 }

local function count(counter)
  counts[counter] = counts[counter] + 1
end

local function enter_lane(user, record)
  redis.call('ZADD', record.b and KEYS[3] or KEYS[2], record.t, user)
end

-- What the API now has: the values sent, or null where nobody knows. Versions stay a floor either way.
local function remember(i, user, raw, known)
  if shadow_ttl == 0 then
    return
  end
  if shadow[i] or not known then
    local seen = shadow[i] and cjson.decode(shadow[i]) or { a = {} }
    for name, pair in pairs(cjson.decode(raw).a) do
      seen.a[name] = { known and pair[1] or cjson.null, pair[2] }
    end
    raw = cjson.encode(seen)
  end
  redis.call('HSET', KEYS[10], user, raw)
  redis.call('ZADD', KEYS[11], now, user)
end

local function put_back(user, record, newer, delay)
  if newer then
    for name, pair in pairs(newer.a) do
      record.a[name] = pair
    end
    record.b = record.b and newer.b
    count('coalesced')
  end
  redis.call('HSET', KEYS[1], user, cjson.encode(record))
  if delay > 0 then
    redis.call('ZADD', KEYS[4], now + delay, user)
  else
    enter_lane(user, record)
  end
end

local function bury(user, record, newer, code, message)
  local letter = { a = {}, code = code, message = message, attempts = (record.n or 0) + 1, t = record.t, at = now }
  local superseded = newer and newer.a or {}
  for name, pair in pairs(record.a) do
    letter.a[name] = not superseded[name] and pair or nil
  end
  if not next(letter.a) then
    return count('coalesced')
  end
  local before = redis.call('HGET', KEYS[8], user)
  for name, pair in pairs(before and cjson.decode(before).a or {}) do
    if not record.a[name] and not superseded[name] then
      letter.a[name] = pair
    end
  end
  redis.call('HSET', KEYS[8], user, cjson.encode(letter))
  redis.call('ZADD', KEYS[9], now, user)
  count('dead_lettered')
end

for i, user in ipairs(users) do
  local outcome = outcomes[user] or rest
  local verb = outcome[1]
  local newer = pending[i] and cjson.decode(pending[i])
  if verb == 'ack' then
    remember(i, user, flight[i], true)
    count('delivered')
  elseif verb == 'dead_letter' then
    remember(i, user, flight[i], false)
    bury(user, cjson.decode(flight[i]), newer, outcome[2], outcome[3])
  else
    local record = cjson.decode(flight[i])
    if verb == 'retry' then
      local cost = outcome[3] + (record.f and calm_at < record.f and record.f < ok_at and 1 or 0)
      record.n = (record.n or cost > 0) and (record.n or 0) + cost or nil
      record.f = outcome[3] == 0 and now or nil
    elseif outcome[3] == 1 then
      record.s = 1
    end
    put_back(user, record, newer, outcome[2])
    newer = nil
  end
  if newer then
    enter_lane(user, newer)
  end
end

if #left > 0 then
  redis.call('HSET', KEYS[6], batch, cjson.encode(left))
else
  redis.call('HDEL', KEYS[6], batch)
  redis.call('ZREM', KEYS[7], batch)
end
if counts.delivered > 0 and claimed > 0 then
  redis.call('HSET', KEYS[13], 'ok_at', claimed, 'failures', 0)
end
for counter, number in pairs(counts) do
  if number > 0 then
    redis.call('HINCRBY', KEYS[12], counter, number)
  end
end

-- The oldest memories go first: those past their time, and those beyond the number of users kept.
local excess = shadow_ttl > 0 and redis.call('ZCARD', KEYS[11]) - shadow_max or 0
local forget = excess > 0 and redis.call('ZRANGE', KEYS[11], 0, math.min(excess, 2 * #users) - 1)
  or redis.call('ZRANGEBYSCORE', KEYS[11], '-inf', '(' .. now - shadow_ttl, 'LIMIT', 0, 2 * #users)
if #forget > 0 then
  redis.call('ZREM', KEYS[11], unpack(forget))
  redis.call('HDEL', KEYS[10], unpack(forget))
end
return #users

--[[
End a claim, user by user; users without an outcome of their own get the one for the rest, or stay in flight.

Only users that the batch still holds are touched, so a batch whose lease was reclaimed, or a user settled before,
changes nothing: the batch id is the fencing token. What comes back from flight is merged under anything newer that
arrived meanwhile, and keeps the time of its first update.

A failure that may be the service's costs an attempt only once a call claimed after it has succeeded, and not if it
belongs to an outage: until then the record keeps its time ("f").

Delivered values are remembered until `forget.lua` forgets them; while an import is unfinished, even with memory turned
off. Values that an import delivered are remembered as of its own time.

Outcomes: ["ack"], ["retry", delay ms, 1 = costs an attempt at once, else 0, 1 = the call may have been applied, else 0],
["snooze", delay ms, 1 = must not share a call with others from now on, else 0], ["dead_letter", code, message],
["quarantine"]. Records that cannot be read are set aside, whatever their outcome.

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
KEYS[14] zset, tickets
KEYS[15] hash, quarantine
KEYS[16] zset, imports: unfinished import -> ms as of which it is true
KEYS[17] string, forgotten_at ms
KEYS[18] hash, server
KEYS[19] hash, rate
ARGV[1]  now in ms, empty = the server's clock
ARGV[2]  batch id
ARGV[3]  JSON object: user -> outcome
ARGV[4]  JSON outcome for the rest, or null to leave them in flight
ARGV[5]  how long delivered values are remembered, ms; 0 = not at all
ARGV[6]  ms at which the batch was claimed, 0 = unknown
ARGV[7]  id of a ticket to issue if there is another full batch for it, empty = none
ARGV[8]  users in a full batch
ARGV[9]  number of the claim, 0 = unknown
ARGV[10] how long its last call may be under way, ms
ARGV[11] calls made for these users
ARGV[12] how long those took together, ms
Returns  {the number of users settled, or -1 if the batch is no longer held; 1 if the ticket was issued, else 0}
]]
local pending, live, backfill, delayed, flight = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local batches, leases, dead, dead_at = KEYS[6], KEYS[7], KEYS[8], KEYS[9]
local shadow, shadow_at, ledger, health, tickets = KEYS[10], KEYS[11], KEYS[12], KEYS[13], KEYS[14]
local quarantine, imports, forgotten_at, server, rate = KEYS[15], KEYS[16], KEYS[17], KEYS[18], KEYS[19]
local now, batch, outcomes, rest = now_ms(ARGV[1]), ARGV[2], cjson.decode(ARGV[3]), cjson.decode(ARGV[4])
local shadow_ttl, claimed, successor, size = tonumber(ARGV[5]), tonumber(ARGV[6]), ARGV[7], tonumber(ARGV[8])
local claim, under_way, calls, call_ms = tonumber(ARGV[9]), tonumber(ARGV[10]), tonumber(ARGV[11]), tonumber(ARGV[12])

despite_full_memory()
local holds = users_of(redis.call('HGET', batches, batch))
if not holds then
  arrive(now * 1000, 0)
  miss_claim(now * 1000, claim, under_way * 1000)
  return { -1, 0 }
end
local users, left = {}, {}
for _, user in ipairs(holds) do
  local list = (outcomes[user] or rest ~= cjson.null) and users or left
  list[#list + 1] = user
end
if #users == 0 then
  return { 0, 0 }
end
local is_importing = redis.call('EXISTS', imports) == 1
local remembers = shadow_ttl > 0 or is_importing
local sent, waiting = redis.call('HMGET', flight, unpack(users)), redis.call('HMGET', pending, unpack(users))
local delivered = remembers and redis.call('HMGET', shadow, unpack(users)) or {}
redis.call('HDEL', flight, unpack(users))
local ok_at, outage_ended_at = numbers(redis.call('HMGET', health, 'ok_at', 'calm_at'))
local counts = { delivered = 0, coalesced = 0, dead_lettered = 0, quarantined = 0, calls = calls, call_ms = call_ms }
local memories, times, since = {}, {}, trusted_since()
-- What the API now has: the values sent, or null where unknown. Versions stay a floor either way.
local function remember(i, user, packed, unknown)
  local at = now
  if delivered[i] or unknown or is_importing then
    local memory = delivered[i] and readable(delivered[i], true) or { a = {} }
    local record = readable(packed)
    -- Of a record that was damaged in flight, nobody knows which values it replaced.
    for _, pair in pairs(record and is_trusted(user, since) and none or memory.a) do
      pair[1] = cjson.null
    end
    record = record or { a = {} }
    at = record.b and 0 or now
    for name, pair in pairs(record.a) do
      at = record.b and math.max(at, pair[2]) or at
      memory.a[name] = { unknown or pair[1], pair[2] }
    end
    memory.c = not unknown and claim or memory.c
    packed = cjson.encode(memory)
  elseif claim > 0 then
    packed = string.sub(packed, 1, -2) .. ',"c":' .. whole(claim) .. '}'
  end
  memories[#memories + 1], memories[#memories + 2] = user, packed
  times[#times + 1], times[#times + 2] = at, user
end

-- A dead letter has what is not superseded, including what is left of the user's earlier one.
local function dead_letter(user, record, newer, code, message)
  local letter = { a = {}, code = code, message = message, attempts = (record.n or 0) + 1, t = record.t, at = now }
  local superseded = newer and newer.a or {}
  for name, pair in pairs(record.a) do
    letter.a[name] = not superseded[name] and pair or nil
  end
  if not next(letter.a) then
    counts.coalesced = counts.coalesced + 1
    return
  end
  for name, pair in pairs(attributes(redis.call('HGET', dead, user))) do
    if not record.a[name] and not superseded[name] then
      letter.a[name] = pair
    end
  end
  redis.call('HSET', dead, user, cjson.encode(letter))
  redis.call('ZADD', dead_at, now, user)
  counts.dead_lettered = counts.dead_lettered + 1
end

for i, user in ipairs(users) do
  local verb, first, second, unknown = unpack(outcomes[user] or rest)
  local newer = waiting[i] and readable(waiting[i])
  if waiting[i] and not newer then
    withdraw(now, user, waiting[i])
    counts.quarantined = counts.quarantined + 1
  end
  local record = verb ~= 'ack' and verb ~= 'quarantine' and sent[i] and readable(sent[i])
  if verb == 'ack' and sent[i] then
    remember(i, user, sent[i])
    counts.delivered = counts.delivered + 1
  elseif sent[i] and not record then
    set_aside('flight', now, user, sent[i])
    counts.quarantined = counts.quarantined + 1
  elseif record and verb == 'dead_letter' then
    remember(i, user, sent[i], cjson.null)
    dead_letter(user, record, newer, first, second)
  elseif record then
    if verb == 'retry' then
      local failed_at = record.f
      local cost = second + (failed_at and outage_ended_at < failed_at and failed_at < ok_at and 1 or 0)
      record.n = (record.n or cost > 0) and (record.n or 0) + cost or nil
      record.f, record.u = second == 0 and now or nil, unknown == 1 and 1 or nil
    elseif second == 1 then
      record.s = 1
    end
    if newer then
      for name, pair in pairs(newer.a) do
        record.a[name] = pair
      end
      record.b = record.b and newer.b
      counts.coalesced = counts.coalesced + 1
      newer = nil
    end
    redis.call('HSET', pending, user, cjson.encode(record))
    if first > 0 then
      redis.call('ZADD', delayed, now + first, user)
    else
      enter_lane(user, record)
    end
  end
  if newer then
    enter_lane(user, newer)
  end
end

if not remembers then
  redis.call('SET', forgotten_at, now)
elseif #memories > 0 then
  redis.call('HSET', shadow, unpack(memories))
  redis.call('ZADD', shadow_at, unpack(times))
end
if #left > 0 then
  redis.call('HSET', batches, batch, cjson.encode(left))
else
  redis.call('HDEL', batches, batch)
  redis.call('ZREM', leases, batch)
end
if counts.delivered > 0 and claimed > 0 then
  redis.call('HSET', health, 'ok_at', claimed, 'failures', 0)
end
count(counts)
local ready = redis.call('ZCARD', live) + redis.call('ZCARD', backfill)
local goes_on = successor ~= '' and ready >= size * (redis.call('ZCARD', tickets) + 1)
if goes_on then
  redis.call('ZADD', tickets, now, successor)
end
return { #users, goes_on and 1 or 0 }

--[[
Take up to one batch of users out of the lanes, for a limited time, in exchange for a ticket.

Users whose delay is over join their own lane again first, at the place of their first update. `live` goes before
`backfill`, which fills the seats that are left. A ticket is good for one claim, so a message that the broker delivers
twice claims nothing the second time, and a batch id is never reused. While the line is stopped, only its probe claims
anything; after an outage, ever fewer users, so that a user who makes the service fail cannot keep the line stopped. A
permit that has lapsed claims nothing either.

A user without a record leaves the lanes. So does one whose record is known to be unreadable, which is set aside; records
in the lanes are not read here, but by the worker.

KEYS[1]  hash, pending: user -> record
KEYS[2]  zset, lane `live`
KEYS[3]  zset, lane `backfill`
KEYS[4]  zset, lane `delayed`
KEYS[5]  hash, flight: user -> record
KEYS[6]  hash, batches: batch id -> JSON array of users
KEYS[7]  zset, leases: batch id -> end in ms
KEYS[8]  zset, tickets
KEYS[9]  hash, line
KEYS[10] hash, rate
KEYS[11] hash, health
KEYS[12] hash, quarantine
KEYS[13] hash, ledger
KEYS[14] hash, server
ARGV[1]  now in ms, empty = the server's clock
ARGV[2]  batch id, which is the ticket's id
ARGV[3]  most users to take, at most 1000
ARGV[4]  lease in ms
ARGV[5]  epoch of the permit, empty = any
Returns  {now in ms, kind of the stop if this is its probe else "", signing time that the fleet shares in s, ms of the
         last success, ms of the end of the last outage, number of the claim, user, record, user, record, ...}, or {} if
         the ticket is spent or unknown, the line is stopped, or the permit has lapsed
]]
local pending, live, backfill, delayed, flight = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local batches, leases, tickets, line, rate, health = KEYS[6], KEYS[7], KEYS[8], KEYS[9], KEYS[10], KEYS[11]
local quarantine, ledger, server = KEYS[12], KEYS[13], KEYS[14]
local now, batch, limit, lease, epoch = now_ms(ARGV[1]), ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5]

despite_full_memory()
arrive(now * 1000, 0)
if redis.call('ZREM', tickets, batch) == 0 then
  return {}
end
local state, out, kind = unpack(redis.call('HMGET', line, 'state', 'probe', 'kind'))
local probe = state and out == batch and kind or ''
if probe == '' and (state or has_lapsed(epoch)) then
  return {}
end
if probe == 'outage' then
  limit = math.max(1, math.floor(limit / 2 ^ numbers(redis.call('HMGET', line, 'failed'))))
end
local reply = { now, probe, numbers(redis.call('HMGET', health, 'signed_at', 'ok_at', 'calm_at')) }

local due = redis.call('ZRANGEBYSCORE', delayed, '-inf', now, 'LIMIT', 0, limit)
for i, packed in ipairs(#due > 0 and redis.call('HMGET', pending, unpack(due)) or due) do
  local record = packed and readable(packed)
  if record then
    enter_lane(due[i], record)
  elseif packed then
    set_aside('pending', now, due[i], packed)
    redis.call('HDEL', pending, due[i])
    count({ quarantined = 1 })
  end
end
if #due > 0 then
  redis.call('ZREM', delayed, unpack(due))
end

local users = redis.call('ZRANGE', live, 0, limit - 1)
if #users > 0 then
  redis.call('ZREMRANGEBYRANK', live, 0, #users - 1)
end
if #users < limit then
  local spare = redis.call('ZRANGE', backfill, 0, limit - #users - 1)
  if #spare > 0 then
    redis.call('ZREMRANGEBYRANK', backfill, 0, #spare - 1)
  end
  for _, user in ipairs(spare) do
    users[#users + 1] = user
  end
end
reply[#reply + 1] = redis.call('HINCRBY', server, 'claims', 1)
if #users == 0 then
  return reply
end

local records, claimed, fields = redis.call('HMGET', pending, unpack(users)), {}, {}
for i, user in ipairs(users) do
  local packed = records[i]
  -- No user id has other bytes, and no worker could name such a user.
  if packed and string.find(user, '[^ -~]') then
    set_aside('pending', now, user, packed)
    count({ quarantined = 1 })
  elseif packed then
    claimed[#claimed + 1] = user
    fields[#fields + 1], fields[#fields + 2] = user, packed
    reply[#reply + 1], reply[#reply + 2] = user, packed
  end
end
redis.call('HDEL', pending, unpack(users))
if #claimed > 0 then
  redis.call('HSET', flight, unpack(fields))
  redis.call('HSET', batches, batch, cjson.encode(claimed))
  redis.call('ZADD', leases, now + lease, batch)
end
return reply

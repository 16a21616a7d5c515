--[[
Take up to one batch of users out of the lanes, for a limited time, in exchange for a ticket.

Users whose delay is over join their own lane again first, at the place of their first update. `live`
goes before `backfill`, which fills the seats that are left. A ticket is good for one claim, so a
message that the broker delivers twice claims nothing the second time, and a batch id is never reused.
While the line is stopped only its probe claims anything; after an outage, ever fewer users, so that one
who makes the service fail cannot keep the line stopped. A permit that lapsed claims nothing either.

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
ARGV[1]  now in ms, empty = the server's clock
ARGV[2]  batch id, which is the ticket's id
ARGV[3]  most users to take, at most 1000
ARGV[4]  lease in ms
ARGV[5]  epoch of the permit, empty = any
Returns  {now in ms, kind of the stop when this is its probe else "", time of signing that the fleet shares, s,
         ms of the last success, ms of the end of the last outage, user, record, user, record, ...}, or {} when the ticket is spent or unknown, the line is stopped, or the permit has lapsed
]]
local now, batch, limit, lease, epoch = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5]
local time = not now and redis.call('TIME')
now = now or time[1] * 1000 + math.floor(time[2] / 1000)

if redis.call('ZREM', KEYS[8], batch) == 0 then
  return {}
end
local line = redis.call('HMGET', KEYS[9], 'state', 'probe', 'kind', 'failed')
local probe = line[1] and line[2] == batch and line[3] or ''
local lapsed = epoch ~= '' and epoch ~= (redis.call('HGET', KEYS[10], 'epoch') or '0')
if probe == '' and (line[1] or lapsed) then
  return {}
end
if probe == 'outage' then
  limit = math.max(1, math.floor(limit / 2 ^ tonumber(line[4] or 0)))
end
local reply = { now, probe }
for i, value in ipairs(redis.call('HMGET', KEYS[11], 'signed_at', 'ok_at', 'calm_at')) do
  reply[i + 2] = tonumber(value) or 0
end

local due = redis.call('ZRANGEBYSCORE', KEYS[4], '-inf', now, 'LIMIT', 0, limit)
for _, user in ipairs(due) do
  local record = cjson.decode(redis.call('HGET', KEYS[1], user))
  redis.call('ZADD', record.b and KEYS[3] or KEYS[2], record.t, user)
end
if #due > 0 then
  redis.call('ZREM', KEYS[4], unpack(due))
end

local users = redis.call('ZRANGE', KEYS[2], 0, limit - 1)
if #users > 0 then
  redis.call('ZREM', KEYS[2], unpack(users))
end
if #users < limit then
  local spare = redis.call('ZRANGE', KEYS[3], 0, limit - #users - 1)
  if #spare > 0 then
    redis.call('ZREM', KEYS[3], unpack(spare))
  end
  for _, user in ipairs(spare) do
    users[#users + 1] = user
  end
end
if #users == 0 then
  return reply
end

local records = redis.call('HMGET', KEYS[1], unpack(users))
local fields = { KEYS[5] }
for i, user in ipairs(users) do
  fields[2 * i], fields[2 * i + 1] = user, records[i]
  reply[2 * i + 4], reply[2 * i + 5] = user, records[i]
end
redis.call('HDEL', KEYS[1], unpack(users))
redis.call('HSET', unpack(fields))
redis.call('HSET', KEYS[6], batch, cjson.encode(users))
redis.call('ZADD', KEYS[7], now + lease, batch)
return reply

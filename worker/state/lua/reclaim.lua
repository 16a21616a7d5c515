--[[
Take over the batch whose lease ended first, under a new batch id, so that its old owner can neither settle nor extend it.
The new owner then settles it like any other.

A lease that ends later than any can dates from before the server's clock was set back, and has ended. A batch without a
lease gets one. If it is no longer known which users a batch holds, it is those in flight that no other batch holds.

KEYS[1]  hash, batches: batch id -> JSON array of users
KEYS[2]  zset, leases: batch id -> end in ms
KEYS[3]  hash, flight: user -> record
KEYS[4]  hash, quarantine
KEYS[5]  stream, history
ARGV[1]  now in ms, empty = the server's clock
ARGV[2]  new batch id
ARGV[3]  lease in ms
Returns  the old batch id, or false if no lease has ended
]]
local batches, leases, flight, quarantine, history = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local now, batch, lease = now_ms(ARGV[1]), ARGV[2], tonumber(ARGV[3])

-- Users in flight that no batch holds.
local function strays()
  local held, found = {}, {}
  for _, packed in ipairs(redis.call('HVALS', batches)) do
    for _, user in ipairs(users_of(packed) or {}) do
      held[user] = true
    end
  end
  for _, user in ipairs(redis.call('HKEYS', flight)) do
    if not held[user] then
      found[#found + 1] = user
    end
  end
  return found
end

-- First a write that needs no memory: a full server then accepts the others.
redis.call('HDEL', batches, '')
if redis.call('HLEN', batches) == 0 and redis.call('HLEN', flight) > 0 then
  -- Somebody deleted the batches: their users may still be in flight.
  redis.call('HSET', batches, batch, cjson.encode(redis.call('HKEYS', flight)))
end
if redis.call('HLEN', batches) > redis.call('ZCARD', leases) then
  for _, id in ipairs(redis.call('HKEYS', batches)) do
    redis.call('ZADD', leases, 'NX', now + lease, id)
  end
end
local expired = redis.call('ZRANGEBYSCORE', leases, '-inf', '(' .. now, 'LIMIT', 0, 1)[1]
  or redis.call('ZRANGEBYSCORE', leases, '(' .. now + 2 * lease, '+inf', 'LIMIT', 0, 1)[1]
if not expired then
  return false
end
local packed = redis.call('HGET', batches, expired)
local users, known = users_of(packed), true
for _, record in ipairs(users and redis.call('HMGET', flight, unpack(users)) or {}) do
  known = known and record
end
if not (users and known) then
  if packed then
    set_aside('batches', now, expired, packed)
  end
  redis.call('HDEL', batches, expired)
  local found = strays()
  packed = #found > 0 and cjson.encode(found)
end
redis.call('ZREM', leases, expired)
redis.call('HDEL', batches, expired)
note('reclaimed', 'by', 'dispatcher', 'batch', expired, 'users', packed and #users_of(packed) or 0)
if packed then
  redis.call('HSET', batches, batch, packed)
  redis.call('ZADD', leases, now + lease, batch)
end
return expired

--[[
Take over the batch whose lease expired first, under a new batch id, so that its old owner can neither settle nor extend
it. The new owner then settles it like any other.

KEYS[1]  hash, batches: batch id -> JSON array of users
KEYS[2]  zset, leases: batch id -> end in ms
ARGV[1]  now in ms, empty = the server's clock
ARGV[2]  new batch id
ARGV[3]  lease in ms
Returns  the old batch id, or false if no lease has expired
]]
local batches, leases = KEYS[1], KEYS[2]
local now, batch, lease = now_ms(ARGV[1]), ARGV[2], tonumber(ARGV[3])

local expired = redis.call('ZRANGEBYSCORE', leases, '-inf', '(' .. now, 'LIMIT', 0, 1)[1]
if not expired then
  return false
end
redis.call('HSET', batches, batch, redis.call('HGET', batches, expired))
redis.call('HDEL', batches, expired)
redis.call('ZREM', leases, expired)
redis.call('ZADD', leases, now + lease, batch)
return expired

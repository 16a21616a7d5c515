--[[
Take over the batch whose lease expired first, under a new batch id, so that its old owner can no
longer settle or extend it. The new owner then settles it like any other.

KEYS[1]  hash, batches: batch id -> JSON array of users
KEYS[2]  zset, leases: batch id -> end in ms
ARGV[1]  now in ms, empty = the server's clock
ARGV[2]  new batch id
ARGV[3]  lease in ms
Returns  the old batch id, or false when no lease has expired
]]
local now, batch, lease = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[3])
local time = not now and redis.call('TIME')
now = now or time[1] * 1000 + math.floor(time[2] / 1000)

local expired = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', '(' .. now, 'LIMIT', 0, 1)[1]
if not expired then
  return false
end
redis.call('HSET', KEYS[1], batch, redis.call('HGET', KEYS[1], expired))
redis.call('HDEL', KEYS[1], expired)
redis.call('ZREM', KEYS[2], expired)
redis.call('ZADD', KEYS[2], now + lease, batch)
return expired

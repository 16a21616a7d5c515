--[[
Renew the lease of a batch that is still held.

KEYS[1]  hash, batches: batch id -> JSON array of users
KEYS[2]  zset, leases: batch id -> end in ms
ARGV[1]  now in ms, empty = the server's clock
ARGV[2]  batch id
ARGV[3]  lease in ms
Returns  1, or 0 when the batch is not held any more
]]
local now, batch, lease = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[3])
local time = not now and redis.call('TIME')
now = now or time[1] * 1000 + math.floor(time[2] / 1000)

if redis.call('HEXISTS', KEYS[1], batch) == 0 then
  return 0
end
redis.call('ZADD', KEYS[2], now + lease, batch)
return 1

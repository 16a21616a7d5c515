--[[
Renew the lease of a batch that is still held, shortly before it sends again.

KEYS[1]  hash, batches: batch id -> JSON array of users
KEYS[2]  zset, leases: batch id -> end in ms
KEYS[3]  hash, rate
KEYS[4]  hash, line
ARGV[1]  now in ms, empty = the server's clock
ARGV[2]  batch id
ARGV[3]  lease in ms
ARGV[4]  epoch of the permit it will use, empty = none yet
Returns  1, 0 when the batch is not held any more, or -1 when it is, but must not send: the line is stopped,
         or the permit has lapsed
]]
local now, batch, lease, epoch = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[3]), ARGV[4]
local time = not now and redis.call('TIME')
now = now or time[1] * 1000 + math.floor(time[2] / 1000)

if redis.call('HEXISTS', KEYS[1], batch) == 0 then
  return 0
end
redis.call('ZADD', KEYS[2], now + lease, batch)
local line = redis.call('HMGET', KEYS[4], 'state', 'probe')
local lapsed = epoch ~= '' and epoch ~= (redis.call('HGET', KEYS[3], 'epoch') or '0')
if lapsed or (line[1] and line[2] ~= batch) then
  return -1
end
return 1

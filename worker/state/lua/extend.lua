--[[
Renew the lease of a batch that is still held, shortly before it sends again.

KEYS[1]  hash, batches: batch id -> JSON array of users
KEYS[2]  zset, leases: batch id -> end in ms
KEYS[3]  hash, rate
KEYS[4]  hash, line
KEYS[5]  hash, server
KEYS[6]  zset, tickets
KEYS[7]  hash, ledger
ARGV[1]  now in ms, empty = the server's clock
ARGV[2]  batch id
ARGV[3]  lease in ms
ARGV[4]  epoch of the permit it will use, empty = none yet
ARGV[5]  number of the claim
ARGV[6]  how long its last call may be under way, ms
Returns  1; 0 if the batch is no longer held; -1 if it is, but must not be sent: the line is stopped, or the permit has
         lapsed
]]
local batches, leases, rate, line, server, tickets, ledger = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6], KEYS[7]
local now, batch, lease, epoch = now_ms(ARGV[1]), ARGV[2], tonumber(ARGV[3]), ARGV[4]
local claim, under_way = tonumber(ARGV[5]), tonumber(ARGV[6])

despite_full_memory()
arrive(now * 1000, 0)
if redis.call('HEXISTS', batches, batch) == 0 then
  miss_claim(now * 1000, claim, under_way * 1000)
  return 0
end
redis.call('ZADD', leases, now + lease, batch)
local state, probe = unpack(redis.call('HMGET', line, 'state', 'probe'))
if has_lapsed(epoch) or (state and probe ~= batch) then
  return -1
end
return 1

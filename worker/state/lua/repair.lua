--[[
Bring the ledger and the lanes back into agreement with the records, after keys were deleted or evicted. Users whose
record waits in no lane join theirs, and those without a record leave it. What the ledger cannot explain is counted as
lost; a negative number if there are more records than it knew of.

KEYS[1]  hash, pending: user -> record
KEYS[2]  zset, lane `live`
KEYS[3]  zset, lane `backfill`
KEYS[4]  zset, lane `delayed`
KEYS[5]  hash, flight: user -> record
KEYS[6]  hash, ledger
KEYS[7]  hash, server
ARGV[1]  JSON array of users to look at, at most 500
Returns  {by how much the ledger was off, how many users joined a lane}
]]
local pending, live, backfill, delayed, flight = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local ledger, server = KEYS[6], KEYS[7]
local users = cjson.decode(ARGV[1])

despite_full_memory()
local joined = 0
for _, user in ipairs(users) do
  local packed = redis.call('HGET', pending, user)
  local waits = redis.call('HEXISTS', flight, user) == 1
    or redis.call('ZSCORE', live, user)
    or redis.call('ZSCORE', backfill, user)
    or redis.call('ZSCORE', delayed, user)
  local record = packed and not waits and readable(packed)
  if not packed then
    redis.call('ZREM', live, user)
    redis.call('ZREM', backfill, user)
    redis.call('ZREM', delayed, user)
  elseif record then
    enter_lane(user, record)
    joined = joined + 1
  end
end
local accepted, redriven = numbers(redis.call('HMGET', ledger, 'accepted', 'redriven'))
local coalesced, unchanged, stale = numbers(redis.call('HMGET', ledger, 'coalesced', 'unchanged', 'stale'))
local delivered, dead, quarantined, lost =
  numbers(redis.call('HMGET', ledger, 'delivered', 'dead_lettered', 'quarantined', 'lost'))
local explained = coalesced + unchanged + stale + delivered + dead + quarantined + lost
local off = accepted + redriven - explained - redis.call('HLEN', pending) - redis.call('HLEN', flight)
if off ~= 0 then
  redis.call('HSET', ledger, 'lost', whole(lost + off))
end
return { off, joined }

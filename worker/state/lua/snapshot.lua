--[[
Count everything at one instant. Writes nothing.

KEYS[1]  hash, pending: user -> record
KEYS[2]  zset, lane `live`
KEYS[3]  zset, lane `backfill`
KEYS[4]  zset, lane `delayed`
KEYS[5]  hash, flight: user -> record
KEYS[6]  hash, dead
KEYS[7]  hash, quarantine
KEYS[8]  hash, ledger
KEYS[9]  hash, server
ARGV[1]  now in ms, empty = the server's clock
Returns  {now in ms; users in pending, live, backfill, delayed, flight, dead and quarantine; ms of the oldest first update
         in live and in backfill, or false; the fields of the ledger; how many servers there were, updates lost with the
         last one before this, and with all before that}
]]
local pending, live, backfill, delayed, flight = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local dead, quarantine, ledger, server = KEYS[6], KEYS[7], KEYS[8], KEYS[9]
local now = now_ms(ARGV[1])

local oldest, spare = redis.call('ZRANGE', live, 0, 0, 'WITHSCORES'), redis.call('ZRANGE', backfill, 0, 0, 'WITHSCORES')
return {
  now,
  redis.call('HLEN', pending),
  redis.call('ZCARD', live),
  redis.call('ZCARD', backfill),
  redis.call('ZCARD', delayed),
  redis.call('HLEN', flight),
  redis.call('HLEN', dead),
  redis.call('HLEN', quarantine),
  oldest[2] or false,
  spare[2] or false,
  redis.call('HGETALL', ledger),
  redis.call('HMGET', server, 'servers', 'lost', 'lost_before'),
}

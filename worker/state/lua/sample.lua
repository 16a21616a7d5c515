--[[
Take a sample of what the fleet has done so far, from which its pace is measured. Changes in Redis itself and in the rate
since the last sample go into the history here: those steps are too many, or too deep in other scripts, to record there.
The first sample of each minute is kept for longer.

KEYS[1]  stream, samples
KEYS[2]  stream, history
KEYS[3]  hash, pending
KEYS[4]  hash, flight
KEYS[5]  hash, ledger
KEYS[6]  hash, server
KEYS[7]  hash, rate
KEYS[8]  stream, samples_by_minute
KEYS[9]  zset, lane `live`
KEYS[10] zset, lane `backfill`
ARGV[1]  how many samples are kept, about
ARGV[2]  how many of those of a minute, about
Returns  the number of users pending and in flight
]]
local samples, history, pending, flight = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local ledger, server, rate = KEYS[5], KEYS[6], KEYS[7]
local by_minute, live, backfill = KEYS[8], KEYS[9], KEYS[10]
local most, most_by_minute = ARGV[1], ARGV[2]

despite_full_memory()
local last = {}
for _, entry in ipairs(redis.call('XREVRANGE', samples, '+', '-', 'COUNT', 1)) do
  for i = 1, #entry[2], 2 do
    last[entry[2][i]] = entry[2][i + 1]
  end
end
local calls, call_ms, delivered, accepted =
  numbers(redis.call('HMGET', ledger, 'calls', 'call_ms', 'delivered', 'accepted'))
local number, lost, behind, emptied = numbers(redis.call('HMGET', server, 'number', 'lost', 'behind', 'emptied'))
local limit = numbers(redis.call('HMGET', rate, 'limit'))
local waiting, sent = redis.call('HLEN', pending), redis.call('HLEN', flight)

if last.server and last.server ~= whole(number) then
  local how = emptied == 1 and 'emptied' or behind == 1 and 'behind' or 'in step'
  note('failover', 'by', 'redis', 'how', how, 'lost', whole(lost))
end
if last.limit and last.limit ~= whole(limit) then
  note('limit', 'by', 'api', 'from', last.limit, 'to', whole(limit))
end
local so_far = { 'calls', whole(calls), 'call_ms', whole(call_ms), 'delivered', whole(delivered), 'accepted', whole(accepted) }
local now = now_ms('')
local oldest = math.min(
  tonumber(redis.call('ZRANGE', live, 0, 0, 'WITHSCORES')[2] or now),
  tonumber(redis.call('ZRANGE', backfill, 0, 0, 'WITHSCORES')[2] or now)
)
local fields = { 'pending', waiting, 'in_flight', sent, 'server', whole(number), 'limit', whole(limit),
  'oldest_ms', whole(now - oldest), unpack(so_far) }
redis.call('XADD', samples, 'MAXLEN', '~', most, '*', unpack(fields))
local minute = redis.call('XREVRANGE', by_minute, '+', '-', 'COUNT', 1)[1]
if not minute or math.floor(string.match(minute[1], '%d+') / 60000) < math.floor(now / 60000) then
  redis.call('XADD', by_minute, 'MAXLEN', '~', most_by_minute, '*', unpack(fields))
end
return waiting + sent

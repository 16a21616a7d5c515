--[[
Stay or become the acting dispatcher, and issue as many tickets as there are batches to send.

Wanted are the full batches, plus one for the rest once its oldest user has lingered or a delayed user
is due; of those, the tickets still outstanding are subtracted. Nothing is issued during a pause, no more
than the calls of a second while the rate is below the quota, and while the line is stopped only one
ticket when a probe is due.

KEYS[1]  string, dispatcher: the acting worker's name
KEYS[2]  zset, tickets
KEYS[3]  zset, lane `live`
KEYS[4]  zset, lane `backfill`
KEYS[5]  zset, lane `delayed`
KEYS[6]  hash, rate
KEYS[7]  hash, line
ARGV[1]  now in ms, empty = the server's clock
ARGV[2]  this worker's name
ARGV[3]  how long this worker stays elected, ms
ARGV[4]  users a batch
ARGV[5]  linger, ms
ARGV[6]  age at which an outstanding ticket counts as lost, ms
ARGV[7]  most tickets outstanding
ARGV[8]  JSON array of fresh ticket ids
Returns  {1, tickets issued (the first ids of the array), ms until something may become due, or -1}
         or {0, 0, ms until the acting dispatcher's term ends} when another worker acts
]]
local now, me, term, size = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local linger, ticket_ttl, most, ids = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7]), cjson.decode(ARGV[8])
local time = not now and redis.call('TIME')
now = now or time[1] * 1000 + math.floor(time[2] / 1000)

local acting = redis.call('GET', KEYS[1])
if acting and acting ~= me then
  return { 0, 0, redis.call('PTTL', KEYS[1]) }
end
redis.call('SET', KEYS[1], me, 'PX', term)

local rate = redis.call('HMGET', KEYS[6], 'paused_at', 'paused_until', 'limit')
local paused_at, paused_until = (tonumber(rate[1]) or 0) / 1000, (tonumber(rate[2]) or 0) / 1000
if paused_at <= now + 1 and paused_until > now then
  return { 1, 0, math.ceil(paused_until - now) }
end
most = math.min(most, math.max(2, tonumber(rate[3]) or most))

redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now - ticket_ttl)
-- A ticket from the future is one from before the clock was set back: it would never grow old.
redis.call('ZREMRANGEBYSCORE', KEYS[2], '(' .. now + ticket_ttl, '+inf')
local outstanding = redis.call('ZCARD', KEYS[2])
local due = redis.call('ZCOUNT', KEYS[5], '-inf', now)
local ready = due + redis.call('ZCARD', KEYS[3]) + redis.call('ZCARD', KEYS[4])
local oldest = math.huge
for _, lane in ipairs({ KEYS[3], KEYS[4] }) do
  oldest = math.min(oldest, tonumber(redis.call('ZRANGE', lane, 0, 0, 'WITHSCORES')[2]) or math.huge)
end

local wanted = math.floor(ready / size)
if ready % size > 0 and (due > 0 or oldest + linger <= now) then
  wanted = wanted + 1
end

local line = redis.call('HMGET', KEYS[7], 'state', 'next_probe', 'wait')
if line[1] then
  local next_probe, wait = tonumber(line[2]) or math.huge, tonumber(line[3]) or 0
  -- A probe further away than the wait was set before the clock was set back.
  local is_due = line[1] == 'stopped' and (next_probe <= now or next_probe > now + wait)
  if is_due and wanted > 0 then
    redis.call('ZADD', KEYS[2], now, ids[1])
    redis.call('HSET', KEYS[7], 'probe', ids[1], 'next_probe', now + wait)
    return { 1, 1, wait }
  end
  return { 1, 0, -1 }
end

local issued = math.max(0, math.min(wanted - outstanding, most - outstanding, #ids))
for i = 1, issued do
  redis.call('ZADD', KEYS[2], now, ids[i])
end

local next_due = tonumber(redis.call('ZRANGEBYSCORE', KEYS[5], '(' .. now, '+inf', 'WITHSCORES', 'LIMIT', 0, 1)[2])
local lingered = oldest + linger
local soonest = math.min(next_due or math.huge, lingered > now and lingered or math.huge)
return { 1, issued, soonest < math.huge and math.ceil(soonest - now) or -1 }

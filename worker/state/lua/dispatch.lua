--[[
Issue as many tickets as there are batches to send.

Wanted are the full batches, plus one for the rest once its oldest user has lingered or a delayed user is due; the
tickets still outstanding are subtracted. So two workers that both believe they lead issue no more than one would. During
a pause nothing is issued; below the quota, no more than the calls of a second; while the line is stopped, one ticket
when a probe is due.

KEYS[1]  zset, tickets
KEYS[2]  zset, lane `live`
KEYS[3]  zset, lane `backfill`
KEYS[4]  zset, lane `delayed`
KEYS[5]  hash, rate
KEYS[6]  hash, line
ARGV[1]  now in ms, empty = the server's clock
ARGV[2]  users a batch
ARGV[3]  linger, ms
ARGV[4]  age at which an outstanding ticket counts as lost, ms
ARGV[5]  most tickets outstanding
ARGV[6]  JSON array of fresh ticket ids
Returns  {tickets issued (the first ids of the array), ms until something may become due, or -1}
]]
local tickets, live, backfill, delayed, rate, line = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local now, size, linger, ticket_ttl = now_ms(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local most, ids = tonumber(ARGV[5]), cjson.decode(ARGV[6])

local paused_at, paused_until, limit = numbers(rate, 'paused_at', 'paused_until', 'limit')
if paused_at / 1000 <= now + 1 and paused_until / 1000 > now then
  return { 0, math.ceil(paused_until / 1000 - now) }
end
if limit > 0 then
  most = math.min(most, math.max(2, limit))
end

redis.call('ZREMRANGEBYSCORE', tickets, '-inf', now - ticket_ttl)
-- A ticket from the future is from before the clock was set back: it would never grow old.
redis.call('ZREMRANGEBYSCORE', tickets, '(' .. now + ticket_ttl, '+inf')
local outstanding = redis.call('ZCARD', tickets)
local due = redis.call('ZCOUNT', delayed, '-inf', now)
local ready = due + redis.call('ZCARD', live) + redis.call('ZCARD', backfill)
local oldest = math.huge
for _, lane in ipairs({ live, backfill }) do
  oldest = math.min(oldest, tonumber(redis.call('ZRANGE', lane, 0, 0, 'WITHSCORES')[2]) or math.huge)
end

local wanted = math.floor(ready / size)
if ready % size > 0 and (due > 0 or oldest + linger <= now) then
  wanted = wanted + 1
end

local state, next_probe, wait = unpack(redis.call('HMGET', line, 'state', 'next_probe', 'wait'))
if state then
  next_probe, wait = tonumber(next_probe) or math.huge, tonumber(wait) or 0
  -- A probe further away than the wait was set before the clock was set back.
  local is_due = state == 'stopped' and (next_probe <= now or next_probe > now + wait)
  if is_due and wanted > 0 then
    redis.call('ZADD', tickets, now, ids[1])
    redis.call('HSET', line, 'probe', ids[1], 'next_probe', now + wait)
    return { 1, wait }
  end
  return { 0, -1 }
end

local issued = math.max(0, math.min(wanted - outstanding, most - outstanding, #ids))
for i = 1, issued do
  redis.call('ZADD', tickets, now, ids[i])
end

local next_due = redis.call('ZRANGEBYSCORE', delayed, '(' .. now, '+inf', 'WITHSCORES', 'LIMIT', 0, 1)[2]
local lingered = oldest + linger
local soonest = math.min(tonumber(next_due) or math.huge, lingered > now and lingered or math.huge)
return { issued, soonest < math.huge and math.ceil(soonest - now) or -1 }

--[[
Issue as many tickets as there are batches to send.

That is the number of full batches, plus one for the rest if a delayed user is due, if its oldest user has lingered, or if
that user came after a quiet time: only users that come within the linger of the last partial batch wait for company.
Outstanding tickets are subtracted, so two workers that both believe they lead issue no more than one would.

No more are issued than there are free slots soon: workers that carry on with batch after batch take slots without a
ticket from here. During a pause nothing is issued; while the line is stopped, one ticket when a probe is due.

An impossible time dates from before the server's clock was set back: an update from the future has lingered, and a delay
longer than any possible one is over.

KEYS[1]  zset, tickets
KEYS[2]  zset, lane `live`
KEYS[3]  zset, lane `backfill`
KEYS[4]  zset, lane `delayed`
KEYS[5]  hash, rate
KEYS[6]  hash, line
KEYS[7]  string, partial_at: ms of the last partial batch
KEYS[8]  hash, server
KEYS[9]  hash, ledger
KEYS[10] stream, history
ARGV[1]  now in ms, empty = the server's clock
ARGV[2]  users a batch
ARGV[3]  linger, ms
ARGV[4]  age at which an outstanding ticket counts as lost, ms
ARGV[5]  calls a second at the quota
ARGV[6]  how far ahead slots are looked at, ms
ARGV[7]  the longest delay, ms
ARGV[8]  what the ids of the tickets begin with, used by nobody else; the number of each follows, four hex digits
Returns  {tickets issued, numbered from 1; ms until something may become due, or -1}
]]
local tickets, live, backfill, delayed = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local rate, line, partial_at, server, ledger, history = KEYS[5], KEYS[6], KEYS[7], KEYS[8], KEYS[9], KEYS[10]
local now, size, linger, ticket_ttl = now_ms(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local quota, horizon, longest, prefix = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7]), ARGV[8]

despite_full_memory()
arrive(now * 1000, 0)
local paused_at, paused_until, limit, slot = numbers(redis.call('HMGET', rate, 'paused_at', 'paused_until', 'limit', 'next'))
if paused_at / 1000 <= now + 1 and paused_until / 1000 > now then
  return { 0, math.ceil(paused_until / 1000 - now) }
end
-- A slot further away than any wait for one dates from before the clock was set back.
local ahead = math.max(0, slot / 1000 - now)
local free = horizon - (ahead <= ticket_ttl and ahead or 0)
local most = math.max(2, math.ceil(free / 1000 * (limit > 0 and math.min(limit, quota) or quota)))

redis.call('ZREMRANGEBYSCORE', tickets, '-inf', now - ticket_ttl)
-- A ticket from the future dates from before the clock was set back: it would never grow old.
redis.call('ZREMRANGEBYSCORE', tickets, '(' .. now + ticket_ttl, '+inf')
local outstanding = redis.call('ZCARD', tickets)
for _, user in ipairs(redis.call('ZRANGEBYSCORE', delayed, '(' .. now + longest, '+inf', 'LIMIT', 0, 1000)) do
  redis.call('ZADD', delayed, now, user)
end
local due = redis.call('ZCOUNT', delayed, '-inf', now)
local ready = due + redis.call('ZCARD', live) + redis.call('ZCARD', backfill)
local first, spare = redis.call('ZRANGE', live, 0, 0, 'WITHSCORES'), redis.call('ZRANGE', backfill, 0, 0, 'WITHSCORES')
local oldest = math.min(tonumber(first[2]) or math.huge, tonumber(spare[2]) or math.huge)

local wanted, partial = math.floor(ready / size), false
if ready % size > 0 then
  local last = tonumber(redis.call('GET', partial_at)) or 0
  partial = due > 0 or oldest + linger <= now or oldest >= last + linger or last > now
  wanted = wanted + (partial and 1 or 0)
end

local state, next_probe, wait = unpack(redis.call('HMGET', line, 'state', 'next_probe', 'wait'))
if state then
  next_probe, wait = tonumber(next_probe or nil), numbers(redis.call('HMGET', line, 'wait'))
  next_probe = finite(next_probe) and next_probe or math.huge
  -- A probe further away than the wait dates from before the clock was set back.
  local is_due = state ~= 'paused' and (next_probe <= now or next_probe > now + wait)
  if is_due and wanted > 0 then
    redis.call('ZADD', tickets, now, prefix .. '0001')
    redis.call('HSET', line, 'probe', prefix .. '0001', 'next_probe', now + wait)
    note('probe', 'by', 'dispatcher', 'batch', prefix .. '0001')
    return { 1, wait }
  end
  return { 0, -1 }
end

local issued = math.max(0, math.min(wanted - outstanding, most - outstanding, 65535))
for i = 1, issued do
  redis.call('ZADD', tickets, now, string.format('%s%04x', prefix, i))
end
if partial and issued > 0 and issued == wanted - outstanding then
  redis.call('SET', partial_at, now)
end

local next_due = redis.call('ZRANGEBYSCORE', delayed, '(' .. now, '+inf', 'WITHSCORES', 'LIMIT', 0, 1)[2]
local lingered = oldest + linger
local soonest = math.min(tonumber(next_due) or math.huge, lingered > now and lingered or math.huge)
return { issued, soonest < math.huge and math.ceil(soonest - now) or -1 }

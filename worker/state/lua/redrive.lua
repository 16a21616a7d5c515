--[[
Put dead letters back to pending, merged under anything newer: an old value never comes back.

Only letters that have not changed since somebody looked at them. An attribute returns unless something newer is pending,
in flight or delivered. Redriven users join the lane `backfill`: live updates go first.

KEYS[1]  hash, pending: user -> record
KEYS[2]  zset, lane `backfill`
KEYS[3]  hash, flight: user -> record
KEYS[4]  hash, shadow: user -> record last delivered
KEYS[5]  hash, dead: user -> dead letter
KEYS[6]  zset, dead_at
KEYS[7]  hash, ledger
KEYS[8]  zset, lane `live`
KEYS[9]  zset, lane `delayed`
KEYS[10] hash, quarantine
KEYS[11] stream, history
ARGV[1]  now in ms, empty = the server's clock
ARGV[2]  JSON array of [user, ms at which it became a letter], at most 500
ARGV[3]  who puts them back
Returns  {dead letters put back, those of them that were outdated altogether}
]]
local pending, backfill, flight, shadow, dead = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local dead_at, ledger, live, delayed, quarantine, history = KEYS[6], KEYS[7], KEYS[8], KEYS[9], KEYS[10], KEYS[11]
local now, letters, by = now_ms(ARGV[1]), cjson.decode(ARGV[2]), ARGV[3]

local counts = { redriven = 0, stale = 0, coalesced = 0, quarantined = 0 }
for _, chosen in ipairs(letters) do
  local user, at = chosen[1], chosen[2]
  local packed = tonumber(redis.call('ZSCORE', dead_at, user) or nil) == at and redis.call('HGET', dead, user)
  local letter = packed and readable(packed)
  if packed and not letter then
    set_aside('dead', now, user, packed)
    redis.call('HDEL', dead, user)
    redis.call('ZREM', dead_at, user)
  elseif letter then
    local waiting, sent = redis.call('HGET', pending, user), redis.call('HGET', flight, user)
    local record = waiting and readable(waiting)
    if waiting and not record then
      withdraw(now, user, waiting)
      counts.quarantined, waiting = counts.quarantined + 1, false
    end
    record = record or { t = letter.t, a = {}, b = 1 }
    local in_flight, delivered = attributes(sent), attributes(redis.call('HGET', shadow, user))
    local any = false
    for name, pair in pairs(letter.a) do
      -- Each place was checked against the next when its value was accepted: the first one found is the newest.
      local known = record.a[name] or in_flight[name] or delivered[name]
      -- The shadow has the version of the dead letter itself, with an unknown value.
      if not known or pair[2] > known[2] or (known[1] == cjson.null and pair[2] == known[2]) then
        any, record.a[name] = true, pair
      end
    end

    counts.redriven = counts.redriven + 1
    redis.call('HDEL', dead, user)
    redis.call('ZREM', dead_at, user)
    if not any then
      counts.stale = counts.stale + 1
    else
      counts.coalesced = counts.coalesced + (waiting and 1 or 0)
      redis.call('HSET', pending, user, cjson.encode(record))
      if not waiting and not sent then
        redis.call('ZADD', backfill, record.t, user)
      end
    end
  end
end
count(counts)
if counts.redriven > 0 then
  note('redriven', 'by', by, 'users', counts.redriven, 'outdated', counts.stale)
end
return { counts.redriven, counts.stale }

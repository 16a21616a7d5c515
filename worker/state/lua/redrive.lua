--[[
Put dead letters back to pending, merged under anything newer: an old value never comes back.

An attribute returns unless something newer is pending, in flight or delivered. Redriven users join the
lane `backfill`: live updates go first.

KEYS[1]  hash, pending: user -> record
KEYS[2]  zset, lane `backfill`
KEYS[3]  hash, flight: user -> record
KEYS[4]  hash, shadow: user -> record last delivered
KEYS[5]  hash, dead: user -> dead letter
KEYS[6]  zset, dead_at
KEYS[7]  hash, ledger
ARGV[1]  JSON array of users, at most 500
Returns  {dead letters put back, those of them that were outdated altogether}
]]
local users = cjson.decode(ARGV[1])

local redriven, outdated, coalesced = 0, 0, 0
for _, user in ipairs(users) do
  local packed = redis.call('HGET', KEYS[5], user)
  if packed then
    local letter = cjson.decode(packed)
    local pending, flight = redis.call('HGET', KEYS[1], user), redis.call('HGET', KEYS[3], user)
    local shadow = redis.call('HGET', KEYS[4], user)
    local record = pending and cjson.decode(pending) or { t = letter.t, a = {}, b = 1 }
    local sent = flight and cjson.decode(flight).a or {}
    local seen = shadow and cjson.decode(shadow).a or {}
    local any = false
    for name, pair in pairs(letter.a) do
      local known = record.a[name] or sent[name] or seen[name]
      -- The shadow has the version of what was buried itself, with an unknown value.
      if not known or pair[2] > known[2] or (known[1] == cjson.null and pair[2] == known[2]) then
        any, record.a[name] = true, pair
      end
    end

    redriven = redriven + 1
    redis.call('HDEL', KEYS[5], user)
    redis.call('ZREM', KEYS[6], user)
    if not any then
      outdated = outdated + 1
    else
      coalesced = coalesced + (pending and 1 or 0)
      redis.call('HSET', KEYS[1], user, cjson.encode(record))
      if not pending and not flight then
        redis.call('ZADD', KEYS[2], record.t, user)
      end
    end
  end
end

local counts = { redriven = redriven, stale = outdated, coalesced = coalesced }
for counter, count in pairs(counts) do
  if count > 0 then
    redis.call('HINCRBY', KEYS[7], counter, count)
  end
end
return { redriven, outdated }

--[[
Merge updates into what is pending; of each attribute, the newest version wins.

An update without an event time is newer than everything known: the order of arrival rules. A newer value takes the old
one out of the user's dead letter, since redriving it could only be wrong. If the clock was set back and nothing else is
remembered, the dead letter alone knows how new an update without an event time must be.

KEYS[1]  hash, pending: user -> record
KEYS[2]  zset, lane `live`
KEYS[3]  zset, lane `backfill`
KEYS[4]  hash, flight: user -> record
KEYS[5]  hash, shadow: user -> record last delivered
KEYS[6]  zset, shadow_at
KEYS[7]  hash, ledger
KEYS[8]  hash, dead: user -> dead letter
KEYS[9]  zset, dead_at
ARGV[1]  now in ms, empty = the server's clock
ARGV[2]  lane for users who are not pending yet: live or backfill
ARGV[3]  most users that may be pending, 0 = no limit, -1 = nobody who is not pending yet
ARGV[4]  JSON array of [user, {name: value, or null to remove it}, event time in ms or 0], at most 200
Returns  {accepted, coalesced, unchanged, stale, index of a refused update from 0, ...}
]]
local pending, live, backfill, flight = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local shadow, shadow_at, ledger, dead, dead_at = KEYS[5], KEYS[6], KEYS[7], KEYS[8], KEYS[9]
local now, lane, max_pending, updates = now_ms(ARGV[1]), ARGV[2], tonumber(ARGV[3]), cjson.decode(ARGV[4])

local users = {}
for i, update in ipairs(updates) do
  users[i] = update[1]
end
local was_pending = redis.call('HMGET', pending, unpack(users))
local in_flight = redis.call('HMGET', flight, unpack(users))
local delivered = redis.call('HMGET', shadow, unpack(users))
local given_up = redis.call('HMGET', dead, unpack(users))
local pending_count = max_pending > 0 and redis.call('HLEN', pending) or 0

-- A user may be in the array twice: what the first update changed is what the second one finds.
local records, memories, letters = {}, {}, {}
local entries = { lane == 'live' and live or backfill }
local accepted, coalesced, unchanged, stale, refused = 0, 0, 0, 0, {}

-- One loop without functions of its own: creating them would cost a single update a tenth of its time.
for i, update in ipairs(updates) do
  local user, attrs, occurred = update[1], update[2], update[3]
  local record = records[user] or (was_pending[i] and cjson.decode(was_pending[i]))
  if max_pending ~= 0 and not record and not in_flight[i] and pending_count >= max_pending then
    refused[#refused + 1] = i - 1
  else
    local memory = memories[user] or (delivered[i] and cjson.decode(delivered[i]))
    local letter = letters[user] or (given_up[i] and cjson.decode(given_up[i]))
    local waiting, sent = record and record.a or none, attributes(in_flight[i])
    local remembered, undelivered = memory and memory.a or none, letter and letter.a or none

    -- Values that are newer than what is known; what repeats a delivered value makes that as new as itself. Each place
    -- was checked against the next when its value was accepted, so the first one found is the newest.
    local fresh, repeated = {}, false
    for name, value in pairs(attrs) do
      value = value ~= cjson.null and value
      local known, version = waiting[name] or sent[name] or remembered[name], occurred
      if occurred == 0 then
        local lost = undelivered[name]
        version = math.max(now, known and known[2] or 0, lost and lost[2] or 0)
      end
      if not known or version >= known[2] then
        if known and known == remembered[name] and known[1] == value then
          repeated, known[2] = true, version
        else
          fresh[name] = { value, version }
        end
      end
    end

    accepted = accepted + 1
    if repeated then
      memories[user] = memory
    end
    if not next(fresh) then
      if repeated then
        unchanged = unchanged + 1
      else
        stale = stale + 1
      end
    else
      if record then
        coalesced = coalesced + 1
        for name, pair in pairs(fresh) do
          record.a[name] = pair
        end
      else
        record = { t = now, a = fresh, b = lane == 'backfill' and 1 or nil }
        pending_count = pending_count + 1
        -- A user in flight waits outside the lanes until its batch is settled.
        if not in_flight[i] then
          entries[#entries + 1] = now
          entries[#entries + 1] = user
        end
      end
      if letter then
        for name, pair in pairs(fresh) do
          if letter.a[name] and letter.a[name][2] <= pair[2] then
            letter.a[name], letters[user] = nil, letter
          end
        end
      end
      if record.b and lane == 'live' then
        record.b = nil
        if redis.call('ZREM', backfill, user) == 1 then
          redis.call('ZADD', live, record.t, user)
        end
      end
      records[user] = record
    end
  end
end

local fields = { pending }
for user, record in pairs(records) do
  fields[#fields + 1] = user
  fields[#fields + 1] = cjson.encode(record)
end
if #fields > 1 then
  redis.call('HSET', unpack(fields))
end
if #entries > 1 then
  redis.call('ZADD', unpack(entries))
end
for user, memory in pairs(memories) do
  redis.call('HSET', shadow, user, cjson.encode(memory))
  redis.call('ZADD', shadow_at, now, user)
end
for user, letter in pairs(letters) do
  if next(letter.a) then
    redis.call('HSET', dead, user, cjson.encode(letter))
  else
    redis.call('HDEL', dead, user)
    redis.call('ZREM', dead_at, user)
  end
end
count(ledger, { accepted = accepted, coalesced = coalesced, unchanged = unchanged, stale = stale })
return { accepted, coalesced, unchanged, stale, unpack(refused) }

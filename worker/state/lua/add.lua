--[[
Merge updates into what is pending; of each attribute the newest version wins.

An update without an event time is newer than everything known: order of arrival rules. The known
version of an attribute is that of the pending value, else of the value in flight, else of the shadow:
each was checked against the next when it was accepted, so the first one found is the highest. A newer value
takes the old one out of the user's dead letter: redriving it could only be wrong. Where nothing else is remembered,
and the clock was set back, the letter alone knows how new an update without an event time must be.

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
local now, lane, max_pending, updates = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[3]), cjson.decode(ARGV[4])
local time = not now and redis.call('TIME')
now = now or time[1] * 1000 + math.floor(time[2] / 1000)

local users = {}
for i, update in ipairs(updates) do
  users[i] = update[1]
end
local pending = redis.call('HMGET', KEYS[1], unpack(users))
local flight = redis.call('HMGET', KEYS[4], unpack(users))
local shadow = redis.call('HMGET', KEYS[5], unpack(users))
local dead = redis.call('HMGET', KEYS[8], unpack(users))
local pending_count = max_pending > 0 and redis.call('HLEN', KEYS[1]) or 0

-- A user may stand in the array twice: what the first update changed is what the second one finds.
local records, shadows, letters = {}, {}, {}
local entries = { lane == 'live' and KEYS[2] or KEYS[3] }
local accepted, coalesced, unchanged, stale, refused = 0, 0, 0, 0, {}

for i, update in ipairs(updates) do
  local user, attrs, occurred = update[1], update[2], update[3]
  local record = records[user] or (pending[i] and cjson.decode(pending[i]))
  if max_pending ~= 0 and not record and not flight[i] and pending_count >= max_pending then
    refused[#refused + 1] = i - 1
  else
    local sent = flight[i] and cjson.decode(flight[i]).a or {}
    local seen = shadows[user] or (shadow[i] and cjson.decode(shadow[i]))
    local waiting = record and record.a or {}
    local letter = letters[user] or (dead[i] and cjson.decode(dead[i]))
    local given_up = letter and letter.a or {}
    local fresh, any_fresh, any_same = {}, false, false
    for name, value in pairs(attrs) do
      value = value ~= cjson.null and value
      local delivered = seen and seen.a[name]
      local known = waiting[name] or sent[name] or delivered
      local floor = math.max(known and known[2] or 0, given_up[name] and given_up[name][2] or 0)
      local version = occurred > 0 and occurred or math.max(now, floor)
      if not known or version >= known[2] then
        if known and known == delivered and known[1] == value then
          any_same, delivered[2], shadows[user] = true, version, seen
        else
          any_fresh, fresh[name] = true, { value, version }
        end
      end
    end

    accepted = accepted + 1
    if any_fresh then
      if record then
        coalesced = coalesced + 1
      else
        record = { t = now, a = {}, b = lane == 'backfill' and 1 or nil }
        pending_count = pending_count + 1
        -- A user in flight waits outside the lanes until the batch is settled.
        if not flight[i] then
          entries[#entries + 1] = now
          entries[#entries + 1] = user
        end
      end
      for name, pair in pairs(fresh) do
        record.a[name] = pair
        if letter and letter.a[name] and letter.a[name][2] <= pair[2] then
          letter.a[name], letters[user] = nil, letter
        end
      end
      if record.b and lane == 'live' then
        record.b = nil
        if redis.call('ZREM', KEYS[3], user) == 1 then
          redis.call('ZADD', KEYS[2], record.t, user)
        end
      end
      records[user] = record
    elseif any_same then
      unchanged = unchanged + 1
    else
      stale = stale + 1
    end
  end
end

local fields = { KEYS[1] }
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
for user, seen in pairs(shadows) do
  redis.call('HSET', KEYS[5], user, cjson.encode(seen))
  redis.call('ZADD', KEYS[6], now, user)
end
for user, letter in pairs(letters) do
  if next(letter.a) then
    redis.call('HSET', KEYS[8], user, cjson.encode(letter))
  else
    redis.call('HDEL', KEYS[8], user)
    redis.call('ZREM', KEYS[9], user)
  end
end
local function count(counter, by)
  if by > 0 then
    redis.call('HINCRBY', KEYS[7], counter, by)
  end
end
count('accepted', accepted)
count('coalesced', coalesced)
count('unchanged', unchanged)
count('stale', stale)
return { accepted, coalesced, unchanged, stale, unpack(refused) }

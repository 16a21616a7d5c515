--[[
Merge updates into what is pending; the newest version of each attribute wins.

An update without an event time is newer than everything known: arrival order counts. One from further in the future than
a clock may be wrong is refused: it would make everything that follows stale. A newer value removes the old one from the
user's dead letter, since redriving it could only be wrong. If the clock was set back and nothing else is remembered, only
the dead letter tells how new an update without an event time must be.

An import was true at one time ("as of"). Its update for a user of whom nothing is known is refused if a value delivered
after that time has been forgotten: it could be this user's.

A consumer of a stream or a queue adds only while it leads. One that was suspended and has lost the lead adds nothing: its
successor has added the same updates, and newer ones.

KEYS[1]  hash, pending: user -> record
KEYS[2]  zset, lane `live`
KEYS[3]  zset, lane `backfill`
KEYS[4]  hash, flight: user -> record
KEYS[5]  hash, shadow: user -> record last delivered
KEYS[6]  zset, shadow_at
KEYS[7]  hash, ledger
KEYS[8]  hash, dead: user -> dead letter
KEYS[9]  zset, dead_at
KEYS[10] zset, lane `delayed`
KEYS[11] hash, quarantine
KEYS[12] string, forgotten_at ms
KEYS[13] string with expiry: name of the leader
KEYS[14] hash, server
KEYS[15] hash, rate
KEYS[16] zset, tickets
KEYS[17] hash, intake
ARGV[1]  now in ms, empty = the server's clock
ARGV[2]  lane for users who are not pending yet: live or backfill
ARGV[3]  most users that may be pending, 0 = no limit, -1 = nobody who is not pending yet
ARGV[4]  JSON array of [user, {name: value, or null to remove it}, event time in ms or 0], at most 200
ARGV[5]  how far ahead of the server's clock an event time may be, ms
ARGV[6]  the time in ms as of which an import is true, 0 = this is none
ARGV[7]  who must lead, empty = nobody
ARGV[8]  the number of the server that the caller added to last, 0 = none
ARGV[9]  how many updates had been accepted there by then
ARGV[10] 1 if what is added makes room elsewhere, so that a full server takes it, else 0
ARGV[11] the field of `intake` that counts what is accepted
ARGV[12] 1 if values are sent although they are remembered as delivered, else 0
Returns  {number of this server, updates accepted so far, accepted, coalesced, unchanged, stale, for each refused update:
         its index from 0, and "full", "ahead" or "forgotten", ...}, or {} if another worker leads
]]
local pending, live, backfill, flight = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local shadow, shadow_at, ledger, dead, dead_at = KEYS[5], KEYS[6], KEYS[7], KEYS[8], KEYS[9]
local delayed, quarantine, forgotten_at, leader = KEYS[10], KEYS[11], KEYS[12], KEYS[13]
local server, rate, tickets, intake = KEYS[14], KEYS[15], KEYS[16], KEYS[17]
local now, lane, max_pending, updates = now_ms(ARGV[1]), ARGV[2], tonumber(ARGV[3]), cjson.decode(ARGV[4])
local latest, as_of, leads = now + tonumber(ARGV[5]), tonumber(ARGV[6]), ARGV[7]
local seen, seen_accepted, makes_room, way = tonumber(ARGV[8]), tonumber(ARGV[9]), ARGV[10] == '1', ARGV[11]
local again = ARGV[12] == '1'

if leads ~= '' and redis.call('GET', leader) ~= leads then
  return {}
end
if makes_room then
  despite_full_memory()
end
local number = arrive(now * 1000, seen)
if seen > 0 and seen == number - 1 then
  -- Updates that the caller knows were accepted there, and this server does not have.
  local accepted, lost, emptied = numbers(redis.call('HMGET', server, 'accepted', 'lost', 'emptied'))
  if emptied == 0 and seen_accepted - accepted > lost then
    redis.call('HSET', server, 'lost', whole(seen_accepted - accepted))
  end
end
local since = trusted_since()
local is_forgotten = as_of > 0 and (tonumber(redis.call('GET', forgotten_at) or 0) or 0) > as_of

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
local records, memories, letters, unreadable = {}, {}, {}, {}
local entries = {}
local accepted, coalesced, unchanged, stale, refused = 0, 0, 0, 0, {}
-- One loop without functions of its own: creating them would cost a single update a tenth of its time.
for i, update in ipairs(updates) do
  local user, attrs, occurred = update[1], update[2], update[3]
  local record = records[user] or (was_pending[i] and readable(was_pending[i]))
  local is_known = record or in_flight[i] or delivered[i] or given_up[i]
  local reason = occurred > latest and 'ahead'
    or max_pending ~= 0 and not record and not in_flight[i] and pending_count >= max_pending and 'full'
    or is_forgotten and not is_known and 'forgotten'
  if reason then
    refused[#refused + 1], refused[#refused + 2] = i - 1, reason
  else
    local memory = memories[user] or (delivered[i] and readable(delivered[i], true))
    local letter = letters[user] or (given_up[i] and readable(given_up[i]))
    if was_pending[i] and not record then
      unreadable[user] = was_pending[i]
    end
    local waiting, sent = record and record.a or none, attributes(in_flight[i])
    local remembered, undelivered = memory and memory.a or none, letter and letter.a or none

    -- Values newer than what is known; repeating a delivered value makes that value as new as the repetition. Each place was
    -- checked against the next when its value was accepted, so the first one found is the newest.
    local fresh, repeated = {}, false
    for name, value in pairs(attrs) do
      value = value ~= cjson.null and value
      local known, version = waiting[name] or sent[name] or remembered[name], occurred
      if occurred == 0 then
        local lost = undelivered[name]
        version = math.max(now, known and known[2] or 0, lost and lost[2] or 0)
      end
      if not known or version >= known[2] then
        if known and known == remembered[name] and known[1] == value and not again and is_trusted(user, since) then
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
      unchanged, stale = unchanged + (repeated and 1 or 0), stale + (repeated and 0 or 1)
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
          entries[#entries + 1], entries[#entries + 2] = now, user
        end
      end
      for name, pair in pairs(letter and fresh or none) do
        if letter.a[name] and letter.a[name][2] <= pair[2] then
          letter.a[name], letters[user] = nil, letter
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

-- A record that cannot be read makes room for the new one.
local quarantined = 0
for user, packed in pairs(unreadable) do
  withdraw(now, user, packed)
  quarantined = quarantined + 1
end
local fields = {}
for user, record in pairs(records) do
  fields[#fields + 1], fields[#fields + 2] = user, cjson.encode(record)
end
if #fields > 0 then
  redis.call('HSET', pending, unpack(fields))
end
if #entries > 0 and lane == 'live' then
  redis.call('ZADD', live, unpack(entries))
elseif #entries > 0 then
  redis.call('ZADD', backfill, unpack(entries))
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
count({ accepted = accepted, coalesced = coalesced, unchanged = unchanged, stale = stale, quarantined = quarantined })
redis.pcall('HINCRBY', intake, way, accepted)
local so_far = numbers(redis.call('HMGET', ledger, 'accepted'))
return { number, so_far, accepted, coalesced, unchanged, stale, unpack(refused) }

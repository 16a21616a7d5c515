--[[
Read what is remembered about some users, at one instant: whether anything is under way, and what was delivered last.
Writes nothing.

KEYS[1]  hash, pending: user -> record
KEYS[2]  hash, flight: user -> record
KEYS[3]  hash, shadow: user -> record last delivered
KEYS[4]  zset, shadow_at
KEYS[5]  hash, server
ARGV[1]  JSON array of users, at most 1000
Returns  {now in ms, for each user: 1 if something is pending or in flight, else 0; the packed memory, or false; 1 if the API
         can be trusted to have it, else 0, ...}
]]
local pending, flight, shadow, shadow_at, server = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local users = cjson.decode(ARGV[1])

local waiting, sent = redis.call('HMGET', pending, unpack(users)), redis.call('HMGET', flight, unpack(users))
local memories, since = redis.call('HMGET', shadow, unpack(users)), trusted_since()
local reply = { now_ms('') }
for i, user in ipairs(users) do
  reply[#reply + 1] = (waiting[i] or sent[i]) and 1 or 0
  reply[#reply + 1] = memories[i]
  reply[#reply + 1] = is_trusted(user, since) and 1 or 0
end
return reply

--[[
Remember what the API was found to have, instead of what was delivered. Versions stay: nothing older is accepted later.

A user who has something under way, or something delivered since it was looked at, is left alone. A user with nothing
remembered needs no correction.

KEYS[1]  hash, pending: user -> record
KEYS[2]  hash, flight: user -> record
KEYS[3]  hash, shadow: user -> record last delivered
KEYS[4]  zset, shadow_at
KEYS[5]  hash, server
ARGV[1]  now in ms, empty = the server's clock
ARGV[2]  JSON array of [user, the packed memory that was looked at, or "", {name: value found, or false for none}], at most 1000
Returns  the indexes, from 1, of the users whose memory is now right
]]
local pending, flight, shadow, shadow_at, server = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local now, found = now_ms(ARGV[1]), cjson.decode(ARGV[2])

despite_full_memory()
local since, right = trusted_since(), {}
for i, entry in ipairs(found) do
  local user, seen, values = entry[1], entry[2], entry[3]
  local packed = redis.call('HGET', shadow, user)
  local is_moving = redis.call('HEXISTS', pending, user) == 1 or redis.call('HEXISTS', flight, user) == 1
  if not is_moving and (packed or '') == seen then
    local memory = packed and readable(packed, true)
    if memory then
      local is_known = is_trusted(user, since)
      for name, pair in pairs(memory.a) do
        if values[name] ~= nil then
          pair[1] = values[name]
        elseif not is_known then
          pair[1] = cjson.null
        end
      end
      redis.call('HSET', shadow, user, cjson.encode(memory))
      redis.call('ZADD', shadow_at, now, user)
    end
    right[#right + 1] = i
  end
end
return right

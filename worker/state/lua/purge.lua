--[[
Delete dead letters for good, if they are still those that somebody has looked at.

KEYS[1]  hash, dead: user -> dead letter
KEYS[2]  zset, dead_at
ARGV[1]  JSON array of [user, ms at which it became a letter], at most 500
Returns  how many were deleted
]]
local dead, dead_at = KEYS[1], KEYS[2]
local letters = cjson.decode(ARGV[1])

local purged = 0
for _, letter in ipairs(letters) do
  local user, at = letter[1], letter[2]
  if tonumber(redis.call('ZSCORE', dead_at, user) or nil) == at then
    purged = purged + redis.call('HDEL', dead, user)
    redis.call('ZREM', dead_at, user)
  end
end
return purged

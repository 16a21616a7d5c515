--[[
Delete dead letters for good, if they have not changed since somebody looked at them.

KEYS[1]  hash, dead: user -> dead letter
KEYS[2]  zset, dead_at
KEYS[3]  stream, history
ARGV[1]  JSON array of [user, ms at which it became a letter], at most 500
ARGV[2]  who deletes them
Returns  how many were deleted
]]
local dead, dead_at, history = KEYS[1], KEYS[2], KEYS[3]
local letters, by = cjson.decode(ARGV[1]), ARGV[2]

local purged = 0
for _, letter in ipairs(letters) do
  local user, at = letter[1], letter[2]
  if tonumber(redis.call('ZSCORE', dead_at, user) or nil) == at then
    purged = purged + redis.call('HDEL', dead, user)
    redis.call('ZREM', dead_at, user)
  end
end
if purged > 0 then
  note('purged', 'by', by, 'users', purged)
end
return purged

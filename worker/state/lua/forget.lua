--[[
Forget what was delivered long ago: values past their time, and users beyond the number kept, oldest first.

While an import is unfinished, everything delivered after the time as of which it is true stays: the import would
otherwise overwrite it. The number of users kept bounds that, too; "forgotten_at" says what had to go then, or went before
an import began.

KEYS[1]  hash, shadow: user -> record last delivered
KEYS[2]  zset, shadow_at
KEYS[3]  zset, imports: unfinished import -> ms as of which it is true
KEYS[4]  string, forgotten_at: ms of the newest value that was forgotten
ARGV[1]  now in ms, empty = the server's clock
ARGV[2]  how long values are remembered, ms
ARGV[3]  how many users are remembered at most
ARGV[4]  how many are forgotten at most
Returns  the number of users forgotten
]]
local shadow, shadow_at, imports, forgotten_at = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local now, ttl, kept, most = now_ms(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])

local as_of = tonumber(redis.call('ZRANGE', imports, 0, 0, 'WITHSCORES')[2]) or math.huge
local old = math.min(now - ttl, as_of)
local excess = redis.call('ZCARD', shadow_at) - kept
local found = excess > 0 and redis.call('ZRANGE', shadow_at, 0, math.min(excess, most) - 1, 'WITHSCORES')
  or redis.call('ZRANGEBYSCORE', shadow_at, '-inf', '(' .. whole(old), 'WITHSCORES', 'LIMIT', 0, most)
if #found == 0 then
  return 0
end
local users = {}
for i = 1, #found, 2 do
  users[#users + 1] = found[i]
end
redis.call('ZREM', shadow_at, unpack(users))
redis.call('HDEL', shadow, unpack(users))
local newest = tonumber(found[#found])
if newest > (tonumber(redis.call('GET', forgotten_at) or 0) or 0) then
  redis.call('SET', forgotten_at, whole(newest))
end
return #users

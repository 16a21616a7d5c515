--[[
Keep what came by a queue or a stream and is not accepted now: refused updates for a person, scheduled ones for later.

KEYS[1]  stream, refused
KEYS[2]  zset, scheduled: JSON of updates -> ms before which they must wait
KEYS[3]  hash, intake
ARGV[1]  JSON array of refused updates: [source, user, rule, payload]
ARGV[2]  JSON array of scheduled ones: [member, ms]
ARGV[3]  how many refused updates are kept, about
Returns  how many were kept
]]
local refused, scheduled, intake = KEYS[1], KEYS[2], KEYS[3]
local updates, later, most = cjson.decode(ARGV[1]), cjson.decode(ARGV[2]), ARGV[3]

-- First a write that needs no memory: a full server then accepts the others. What is kept here leaves its queue.
redis.call('ZREM', scheduled, '')
for _, update in ipairs(updates) do
  local source, user, rule, payload = unpack(update)
  redis.call('XADD', refused, 'MAXLEN', '~', most, '*', 'source', source, 'user', user, 'rule', rule, 'payload', payload)
  redis.pcall('HINCRBY', intake, 'refused_' .. source, 1)
end
for _, one in ipairs(later) do
  redis.call('ZADD', scheduled, one[2], one[1])
end
return #updates + #later

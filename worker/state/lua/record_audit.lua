--[[
Count users whose attributes were read back, by the verdict.

KEYS[1]  hash, audit: verdict -> users; "since", "at" ms
ARGV[1]  now in ms, empty = the server's clock
ARGV[2]  users as delivered
ARGV[3]  users lost
ARGV[4]  users changed by somebody else
ARGV[5]  users gone
ARGV[6]  users skipped
Returns  1
]]
local audit = KEYS[1]
local now = now_ms(ARGV[1])
local counts = { as_delivered = ARGV[2], lost = ARGV[3], changed = ARGV[4], gone = ARGV[5], skipped = ARGV[6] }

-- One that is not a number starts over.
for verdict, users in pairs(counts) do
  if type(redis.pcall('HINCRBY', audit, verdict, users)) == 'table' then
    redis.call('HSET', audit, verdict, users)
  end
end
if redis.call('HEXISTS', audit, 'since') == 0 then
  redis.call('HSET', audit, 'since', whole(now))
end
redis.call('HSET', audit, 'at', whole(now))
return 1

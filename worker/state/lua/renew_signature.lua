--[[
Decide what to do about a signature that the API refused: renew it once, for the whole fleet.

All workers sign with the same key, so the signing time is all they need to share. A worker whose signature is older than
the shared time just adopts that time. If the shared one itself is refused, and no call has succeeded since it was made,
renewing it again cannot help.

KEYS[1]  hash, health: "signed_at" s, "ok_at" ms
ARGV[1]  now in ms, empty = the server's clock
ARGV[2]  signing time of the refused signature, s
Returns  the time to sign with, s, or 0 if the line should stop
]]
local health = KEYS[1]
local now, refused = now_ms(ARGV[1]), tonumber(ARGV[2])

-- First a write that needs no memory: a full server then accepts the others.
redis.call('HDEL', health, '')
local signed_at, ok_at = numbers(redis.call('HMGET', health, 'signed_at', 'ok_at'))
-- A success in the future dates from before the clock was set back.
ok_at = ok_at <= now and ok_at or 0
if refused < signed_at then
  return signed_at
end
if refused == signed_at and ok_at < signed_at * 1000 then
  return 0
end
signed_at = math.max(math.floor(now / 1000), refused + 1)
redis.call('HSET', health, 'signed_at', signed_at)
return signed_at

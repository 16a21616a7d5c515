--[[
Decide what to do about a signature that the API refused: sign again once, for the whole fleet.

All workers sign with the same key, so the time of signing is all they need to share. A worker whose
signature is older than the shared time only adopts it. When the shared one itself is refused, and no
call has succeeded since it was made, signing again cannot help.

KEYS[1]  hash, health: "signed_at" s, "ok_at" ms
ARGV[1]  now in ms, empty = the server's clock
ARGV[2]  time of the refused signature, s
Returns  the time to sign with, s, or 0 when the line should stop
]]
local now, refused = tonumber(ARGV[1]), tonumber(ARGV[2])
local time = not now and redis.call('TIME')
now = now or time[1] * 1000 + math.floor(time[2] / 1000)

local health = redis.call('HMGET', KEYS[1], 'signed_at', 'ok_at')
local signed_at, ok_at = tonumber(health[1]) or 0, tonumber(health[2]) or 0
if refused < signed_at then
  return signed_at
end
if refused == signed_at and ok_at < signed_at * 1000 then
  return 0
end
signed_at = math.max(math.floor(now / 1000), refused + 1)
redis.call('HSET', KEYS[1], 'signed_at', signed_at)
return signed_at

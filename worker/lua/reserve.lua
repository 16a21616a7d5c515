--[[
Reserve the next free slot of the shared clock, first come, first served.

A slot further away than the caller's patience is not reserved. So the next slot is never further away
than patience plus one interval, unless the server's clock was set back; then it starts at the end of
the caller's patience, when every slot granted before has passed.

A pause that began in the future is one from before the clock was set back, and is void.

KEYS[1]  hash, rate: "next" free slot us, "paused_at" us, "paused_until" us
ARGV[1]  now in us, empty = the server's clock
ARGV[2]  interval between slots, us
ARGV[3]  patience, us
Returns  {1, us until the slot, now in us} or {0, us until a slot comes within patience, now in us}
]]
local now, interval, patience = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local time = not now and redis.call('TIME')
now = now or time[1] * 1000000 + time[2]

local rate = redis.call('HMGET', KEYS[1], 'next', 'paused_at', 'paused_until')
local slot, paused_at, paused_until = tonumber(rate[1]) or 0, tonumber(rate[2]) or 0, tonumber(rate[3]) or 0
if slot > now + patience + interval then
  slot = now + patience
end
slot = math.max(slot, now, paused_at <= now and paused_until or 0)
if slot - now > patience then
  return { 0, slot - now - patience, now }
end
redis.call('HSET', KEYS[1], 'next', string.format('%.0f', slot + interval))
return { 1, slot - now, now }

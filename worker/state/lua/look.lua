--[[
Read everything known about one user, at one instant. Writes nothing.

KEYS[1]  hash, pending: user -> record
KEYS[2]  zset, lane `live`
KEYS[3]  zset, lane `backfill`
KEYS[4]  zset, lane `delayed`
KEYS[5]  hash, flight: user -> record
KEYS[6]  hash, batches: batch id -> JSON array of users
KEYS[7]  zset, leases: batch id -> end in ms
KEYS[8]  hash, shadow: user -> record last delivered
KEYS[9]  zset, shadow_at
KEYS[10] hash, dead: user -> dead letter
ARGV[1]  user
Returns  {now in ms; the packed record that is pending, that is in flight, last delivered, and dead letter; the place in the lane
         `live` and in `backfill`, from 0; ms until which it is delayed; ms of the last delivery; the batch that it is in, and
         ms at which its lease ends}, each false if there is none
]]
local pending, live, backfill, delayed, flight = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local batches, leases, shadow, shadow_at, dead = KEYS[6], KEYS[7], KEYS[8], KEYS[9], KEYS[10]
local user = ARGV[1]

local sent = redis.call('HGET', flight, user)
local holder = false
local held = sent and redis.call('HGETALL', batches) or {}
for i = 1, #held, 2 do
  for _, one in ipairs(users_of(held[i + 1]) or {}) do
    holder = one == user and held[i] or holder
  end
end
return {
  now_ms(''),
  redis.call('HGET', pending, user),
  sent,
  redis.call('HGET', shadow, user),
  redis.call('HGET', dead, user),
  redis.call('ZRANK', live, user),
  redis.call('ZRANK', backfill, user),
  redis.call('ZSCORE', delayed, user),
  redis.call('ZSCORE', shadow_at, user),
  holder,
  holder and redis.call('ZSCORE', leases, holder),
}

--[[
Count a call that failed through the service's fault. Settling users as delivered starts the row over.

KEYS[1]  hash, health: "failures" in a row
Returns  how many have failed in a row
]]
local health = KEYS[1]

local failures = numbers(redis.call('HMGET', health, 'failures')) + 1
-- First a write that needs no memory: a full server then accepts the other.
redis.call('HDEL', health, '')
redis.call('HSET', health, 'failures', failures)
return failures

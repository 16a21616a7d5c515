--[[
Stay or become the one of the workers that acts; its term begins anew.

KEYS[1]  string, the acting worker's name
ARGV[1]  this worker's name
ARGV[2]  how long this worker stays elected, ms
Returns  0 when this worker acts, else ms until the other one's term ends
]]
local me, term = ARGV[1], ARGV[2]

local acting = redis.call('GET', KEYS[1])
if acting and acting ~= me then
  return math.max(1, redis.call('PTTL', KEYS[1]))
end
redis.call('SET', KEYS[1], me, 'PX', term)
return 0

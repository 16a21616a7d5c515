--[[
Become or remain the leader for another term, unless another worker leads.

KEYS[1]  string with expiry: name of the leader
ARGV[1]  this worker's name
ARGV[2]  term, ms
Returns  0 if this worker leads, else ms until the other one's term ends
]]
local leader = KEYS[1]
local me, term = ARGV[1], ARGV[2]

local leading = redis.call('GET', leader)
if leading and leading ~= me then
  return math.max(1, redis.call('PTTL', leader))
end
redis.call('SET', leader, me, 'PX', term)
return 0

--[[
Become or remain the leader for another term, unless another worker leads. A term with longer to go than a whole term
dates from before the server's clock was set back, and is over.

KEYS[1]  string with expiry: name of the leader
ARGV[1]  this worker's name
ARGV[2]  term, ms
Returns  0 if this worker leads, else ms until the other one's term ends
]]
local leader = KEYS[1]
local me, term = ARGV[1], tonumber(ARGV[2])

local leading, left = redis.call('GET', leader), redis.call('PTTL', leader)
if leading and leading ~= me and left <= term then
  return math.max(1, left)
end
-- A full server refuses SET, unless the script deletes something first.
redis.call('DEL', leader)
redis.call('SET', leader, me, 'PX', term)
return 0

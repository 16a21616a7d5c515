--[[
Open the line again, because its probe has passed.

KEYS[1]  hash, line
ARGV[1]  batch id of the probe
Returns  1, or 0 when this is not the probe of a stopped line (any more)
]]
local batch = ARGV[1]

local line = redis.call('HMGET', KEYS[1], 'state', 'probe')
if line[1] ~= 'stopped' or line[2] ~= batch then
  return 0
end
redis.call('DEL', KEYS[1])
return 1

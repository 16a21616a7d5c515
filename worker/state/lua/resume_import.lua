--[[
Let a paused import continue.

KEYS[1]  hash, import_pauses
KEYS[2]  stream, history
ARGV[1]  name of the import
ARGV[2]  who says so
Returns  1, or 0 if it was not paused
]]
local pauses, history = KEYS[1], KEYS[2]
local name, by = ARGV[1], ARGV[2]

if redis.call('HDEL', pauses, name) == 0 then
  return 0
end
note('import_resumed', 'by', by, 'name', name)
return 1

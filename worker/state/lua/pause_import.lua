--[[
Make an unfinished import wait until a person resumes it, unless it is paused already.

KEYS[1]  zset, imports
KEYS[2]  hash, import_pauses
KEYS[3]  stream, history
ARGV[1]  name of the import
ARGV[2]  JSON of who says so: "by", "reason", "at" s
ARGV[3]  who says so
ARGV[4]  why
Returns  1, or 0 if it waits already, or is not unfinished
]]
local imports, pauses, history = KEYS[1], KEYS[2], KEYS[3]
local name, about, by, reason = ARGV[1], ARGV[2], ARGV[3], ARGV[4]

if not redis.call('ZSCORE', imports, name) or redis.call('HSETNX', pauses, name, about) == 0 then
  return 0
end
note('import_paused', 'by', by, 'name', name, 'reason', reason)
return 1

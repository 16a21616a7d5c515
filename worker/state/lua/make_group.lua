--[[
Make the consumer group of a stream, and the stream: from its beginning, since entries may have arrived before the first
worker.

KEYS[1]  stream
ARGV[1]  name of the group
Returns  1, or 0 if there is one
]]
local stream = KEYS[1]
local group = ARGV[1]

-- First a write that needs no memory: a full server then accepts the other.
redis.call('XTRIM', stream, 'MAXLEN', redis.call('XLEN', stream))
local made = redis.pcall('XGROUP', 'CREATE', stream, group, '0', 'MKSTREAM')
return made.ok and 1 or 0

--[[
Count users that became dead letters, and tell whether they come in masses: many in a row with the same
code and nobody delivered in between, or a good part of all users within a minute. A bad deployment must
not empty the buffer into the dead letters.

KEYS[1]  hash, health: "dead_code", "dead_row", "dead_seen", "dead_since" ms, "dead_count", "dead_base"
KEYS[2]  hash, ledger
ARGV[1]  now in ms, empty = the server's clock
ARGV[2]  error code
ARGV[3]  how many users
ARGV[4]  how many in a row are too many
ARGV[5]  how many in the window are looked at
ARGV[6]  what part of the window's users is too much
ARGV[7]  length of the window, ms
Returns  1 when they come in masses, else 0
]]
local now, code, count = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[3])
local row_max, window_max, part, window = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local time = not now and redis.call('TIME')
now = now or time[1] * 1000 + math.floor(time[2] / 1000)

local fields = { 'dead_code', 'dead_row', 'dead_seen', 'dead_since', 'dead_count', 'dead_base' }
local health = redis.call('HMGET', KEYS[1], unpack(fields))
local row, seen, since = tonumber(health[2]) or 0, tonumber(health[3]) or 0, tonumber(health[4]) or 0
local total, base = tonumber(health[5]) or 0, tonumber(health[6]) or 0
local delivered = tonumber(redis.call('HGET', KEYS[2], 'delivered')) or 0

if health[1] ~= code or now < since or now - since > window then
  row, since, total, base = health[1] == code and row or 0, now, 0, delivered
end
row = delivered > seen and 0 or row + count
total = total + count
redis.call('HSET', KEYS[1], 'dead_code', code, 'dead_row', row, 'dead_seen', delivered)
redis.call('HSET', KEYS[1], 'dead_since', since, 'dead_count', total, 'dead_base', base)
local masses = total >= window_max and total >= part * (total + delivered - base)
return (row >= row_max or masses) and 1 or 0

--[[
Count users that became dead letters, and say whether there are too many: many in a row with the same code and nobody
delivered in between, or a large share of all users within a minute. A bad deployment must not empty the buffer into the
dead letters.

KEYS[1]  hash, health: "dead_code", "dead_row", "dead_seen", "dead_since" ms, "dead_count", "dead_base"
KEYS[2]  hash, ledger
ARGV[1]  now in ms, empty = the server's clock
ARGV[2]  error code
ARGV[3]  how many users
ARGV[4]  how many in a row are too many
ARGV[5]  how many within the window are looked at
ARGV[6]  what share of the window's users is too much
ARGV[7]  length of the window, ms
Returns  1 if they are too many, else 0
]]
local health, ledger = KEYS[1], KEYS[2]
local now, code, users = now_ms(ARGV[1]), ARGV[2], tonumber(ARGV[3])
local row_max, window_max, share, window = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])

-- First a write that needs no memory: a full server then accepts the others.
redis.call('HDEL', health, '')
local same = redis.call('HGET', health, 'dead_code') == code
local row, seen, since, total, base =
  numbers(redis.call('HMGET', health, 'dead_row', 'dead_seen', 'dead_since', 'dead_count', 'dead_base'))
local delivered = numbers(redis.call('HMGET', ledger, 'delivered'))

if not same or now < since or now - since > window then
  row, since, total, base = same and row or 0, now, 0, delivered
end
row = delivered > seen and 0 or row + users
total = total + users
redis.call('HSET', health, 'dead_code', code, 'dead_row', row, 'dead_seen', delivered)
redis.call('HSET', health, 'dead_since', since, 'dead_count', total, 'dead_base', base)
local too_many = total >= window_max and total >= share * (total + delivered - base)
return (row >= row_max or too_many) and 1 or 0

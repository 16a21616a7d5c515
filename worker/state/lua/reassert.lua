--[[
Send some users' newest values again, because a call with older ones may have been applied after them: its worker was
frozen, and sent it although the lease had ended.

The newest value of an attribute is the one that is pending, else in flight, else delivered. What is pending goes out by
itself. A user in flight goes out again after its batch. Nothing is done for values that are unknown, or the same as the
late call's.

KEYS[1]  hash, pending: user -> record
KEYS[2]  zset, lane `live`
KEYS[3]  hash, flight: user -> record
KEYS[4]  hash, shadow: user -> record last delivered
KEYS[5]  zset, shadow_at
KEYS[6]  hash, server
KEYS[7]  hash, ledger
ARGV[1]  now in ms, empty = the server's clock
ARGV[2]  JSON array of [user, {name: value of the late call, or false to remove it}], at most 1000
Returns  the number of users with something to be sent again
]]
local pending, live, flight, shadow = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local shadow_at, server, ledger = KEYS[5], KEYS[6], KEYS[7]
local now, late = now_ms(ARGV[1]), cjson.decode(ARGV[2])

local since, users, created = trusted_since(), 0, 0
for _, entry in ipairs(late) do
  local user, values = entry[1], entry[2]
  local waiting, sent = redis.call('HGET', pending, user), redis.call('HGET', flight, user)
  local record = waiting and readable(waiting)
  local in_flight = attributes(sent)
  local delivered = is_trusted(user, since) and attributes(redis.call('HGET', shadow, user)) or none
  local newest, any = record or { t = now, a = {} }, false
  for name, value in pairs(values) do
    local known = in_flight[name] or delivered[name]
    if known and not newest.a[name] and known[1] ~= cjson.null and known[1] ~= value then
      newest.a[name], any = known, true
    end
  end
  if any and (record or not waiting) then
    redis.call('HSET', pending, user, cjson.encode(newest))
    users = users + 1
    if not record then
      created = created + 1
      if not sent then
        redis.call('ZADD', live, now, user)
      end
    end
  end
end
count({ redriven = created })
return users

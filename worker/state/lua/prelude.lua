--[[
What several scripts share. The loader puts it before each of them, so every function here is local to one run.
]]

-- The time in microseconds since 1970: as given, else the server's.
local function now_us(given)
  if given ~= '' then
    return tonumber(given)
  end
  local time = redis.call('TIME')
  return time[1] * 1000000 + time[2]
end

-- The same in milliseconds.
local function now_ms(given)
  return given ~= '' and tonumber(given) or math.floor(now_us('') / 1000)
end

-- A whole number as text: Redis would write a big one as 1.7e+15.
local function whole(number)
  return string.format('%.0f', number)
end

-- Fields of a hash as numbers, 0 where there is none.
local function numbers(hash, ...)
  local found = redis.call('HMGET', hash, ...)
  for i = 1, select('#', ...) do
    found[i] = tonumber(found[i]) or 0
  end
  return unpack(found)
end

-- No attributes at all. Shared, so nobody may write to it.
local none = {}

-- The attributes in a packed record: name -> {value, version}.
local function attributes(packed)
  return packed and cjson.decode(packed).a or none
end

-- Let a user wait in its lane, at the place of its first update.
local function enter_lane(live, backfill, user, record)
  redis.call('ZADD', record.b and backfill or live, record.t, user)
end

-- Add to counters of the ledger: counter -> how many.
local function count(ledger, counts)
  for counter, number in pairs(counts) do
    if number > 0 then
      redis.call('HINCRBY', ledger, counter, number)
    end
  end
end

-- Whether a permit, given by its epoch, was voided by a pause; an empty epoch stands for no permit.
local function has_lapsed(rate, epoch)
  return epoch ~= '' and epoch ~= (redis.call('HGET', rate, 'epoch') or '0')
end

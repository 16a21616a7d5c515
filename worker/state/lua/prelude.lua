--[[
Functions that several scripts share. The loader puts those that a script uses before it, so every function here is local
to one run. Keys have the names that all scripts give them.
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

-- A whole number as text: Redis would write a large one as 1.7e+15.
local function whole(number)
  return string.format('%.0f', number)
end

-- Whether a value is a number that can be stored: neither infinite nor "not a number".
local function finite(value)
  return type(value) == 'number' and value > -1e300 and value < 1e300
end

-- What HMGET found, as numbers; 0 where there is none.
local function numbers(found)
  for i = 1, #found do
    local number = tonumber(found[i] or nil)
    found[i] = finite(number) and number or 0
  end
  return unpack(found)
end

-- Set aside something that cannot be read, with its raw bytes.
local function set_aside(kind, now, user, packed)
  redis.call('HSET', quarantine, string.format('%s:%.0f:%s', kind, now, user), packed)
end

-- Take a record that cannot be read out of pending; its user leaves the lanes.
local function withdraw(now, user, packed)
  set_aside('pending', now, user, packed)
  redis.call('HDEL', pending, user)
  redis.call('ZREM', live, user)
  redis.call('ZREM', backfill, user)
  redis.call('ZREM', delayed, user)
end

-- The users of a packed batch, or nil if it cannot be read.
local function users_of(packed)
  local good, users = pcall(cjson.decode, packed or '')
  return good and type(users) == 'table' and type(users[1]) == 'string' and users or nil
end

-- A packed record, or nil if it cannot be read. Redis does not undo a failed script's writes, so anything that passes here
-- can be used and packed again. A memory has no time, and its values may be unknown (null).
local function readable(packed, is_memory)
  local good, record = pcall(cjson.decode, packed)
  if not good or type(record) ~= 'table' or type(record.a) ~= 'table' then
    return nil
  end
  if not is_memory and not (finite(record.t) and next(record.a)) then
    return nil
  end
  for field, value in pairs(record) do
    local is_text = field == 'message' and type(value) == 'string'
    if type(field) ~= 'string' or (field ~= 'a' and not is_text and not finite(value)) then
      return nil
    end
  end
  for name, pair in pairs(record.a) do
    if type(name) ~= 'string' or type(pair) ~= 'table' or pair[3] ~= nil then
      return nil
    end
    local value, version = pair[1], pair[2]
    if type(value) ~= 'string' and value ~= false and not (is_memory and value == cjson.null) then
      return nil
    end
    -- No time of an event is later than the year 2286.
    if not finite(version) or version < 0 or version > 1e13 then
      return nil
    end
  end
  return record
end

-- No attributes at all. Shared, so never write to it.
local none = {}

-- The attributes in a packed record or memory: name -> {value, version}.
local function attributes(packed)
  local record = packed and readable(packed, true)
  return record and record.a or none
end

-- Let a user wait in its lane, at the place of its first update.
local function enter_lane(user, record)
  if record.b then
    redis.call('ZADD', backfill, record.t, user)
  else
    redis.call('ZADD', live, record.t, user)
  end
end

-- Add to counters of the ledger: counter -> how many. One that is not a number starts over.
local function count(counts)
  for counter, number in pairs(counts) do
    if number > 0 and type(redis.pcall('HINCRBY', ledger, counter, number)) == 'table' then
      redis.call('HSET', ledger, counter, number)
    end
  end
end

-- Whether a permit, given by its epoch, was voided by a pause; an empty epoch stands for no permit.
local function has_lapsed(epoch)
  return epoch ~= '' and epoch ~= (redis.call('HGET', rate, 'epoch') or '0')
end

-- A full server refuses a script's first write if that may need memory, but none that follow. This one needs none. For
-- scripts that make room, or that making room depends on.
local function despite_full_memory()
  redis.call('HDEL', server, '')
end

-- Record what happened to the line and the fleet, for people: the event, who did it ("by"), and figures. Never values.
local function note(event, ...)
  redis.call('XADD', history, 'MAXLEN', '~', 10000, '*', 'event', event, ...)
end

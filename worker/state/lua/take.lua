--[[
Take messages out of a Celery queue, oldest first.

What was taken stays in a list of its own until `finish`, so a consumer that dies loses nothing: the next one gets the
same messages, with the same time. The time is noted afterwards (`stamp`): one that was read before could be older than a
message that came in between. All of these keys are the broker's, none the state's.

KEYS[1]  list, the queue, with the newest message on the left
KEYS[2]  list, the same queue at the second priority
KEYS[3]  list, the same queue at the third priority
KEYS[4]  list, the same queue at the lowest priority
KEYS[5]  list, what was taken: the time in ms, or a mark that begins with "?" until that is noted; then the messages in order
KEYS[6]  string, the time of the last taking
ARGV[1]  most messages to take
ARGV[2]  most bytes to take, but for the last few messages
ARGV[3]  bytes of the longest message that can be used: of longer ones, one byte more than that is kept
Returns  {time or mark, message, ...}, or {} if the queue is empty
]]
local first, second, third, fourth, taken, last = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local most, most_bytes, longest = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])

local unfinished = redis.call('LRANGE', taken, 0, -1)
if #unfinished > 0 then
  return unfinished
end

local function pop(priority, most)
  if priority == 1 then
    return redis.call('RPOP', first, most)
  elseif priority == 2 then
    return redis.call('RPOP', second, most)
  elseif priority == 3 then
    return redis.call('RPOP', third, most)
  end
  return redis.call('RPOP', fourth, most)
end

local messages, bytes = {}, 0
for priority = 1, 4 do
  -- A few at a time: their length is known only afterwards.
  local popped = {}
  while popped and #messages < most and bytes < most_bytes do
    popped = pop(priority, math.min(16, most - #messages))
    for _, message in ipairs(popped or {}) do
      if #message > longest then
        message = string.sub(message, 1, longest + 1)
      end
      messages[#messages + 1], bytes = message, bytes + #message
    end
  end
end
if #messages == 0 then
  return {}
end

-- No other taking has this mark: the next one comes after the time of this one is noted, which is later.
local mark = '?' .. (redis.call('GET', last) or '')
redis.call('RPUSH', taken, mark, unpack(messages))
table.insert(messages, 1, mark)
return messages

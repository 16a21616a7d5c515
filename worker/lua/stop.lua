--[[
Stop the line, or keep it stopped: nothing is sent but one probe now and then.

The first stop waits for its probe as long as its reason asks; each probe that fails doubles the wait.
Other batches that come back from flight when the line is stopped already change nothing, and a pause
that a person made stands.

KEYS[1]  hash, line
ARGV[1]  now in ms, empty = the server's clock
ARGV[2]  batch id, which may be the probe's
ARGV[3]  error code
ARGV[4]  reason, for people
ARGV[5]  first wait, ms
ARGV[6]  longest wait, ms
Returns  ms until the next probe, or 0 when nothing has changed
]]
local now, batch, code, reason = tonumber(ARGV[1]), ARGV[2], ARGV[3], ARGV[4]
local first, longest = tonumber(ARGV[5]), tonumber(ARGV[6])
local time = not now and redis.call('TIME')
now = now or time[1] * 1000 + math.floor(time[2] / 1000)

local line = redis.call('HMGET', KEYS[1], 'state', 'probe', 'wait')
local state, probe, wait = line[1], line[2], tonumber(line[3])
if state == 'paused' or (state == 'stopped' and probe ~= batch) then
  return 0
end
if state ~= 'stopped' then
  redis.call('HSET', KEYS[1], 'state', 'stopped', 'since', now)
  wait = first / 2
end
wait = math.max(first, math.min(2 * wait, longest))
redis.call('HSET', KEYS[1], 'code', code, 'reason', reason, 'wait', wait, 'next_probe', now + wait)
redis.call('HDEL', KEYS[1], 'probe')
return wait

--[[
Stop the line, or keep it stopped: nothing is sent but one probe now and then.

The first stop waits for its probe as long as its reason asks; each probe that fails doubles the wait.
Other batches that come back from flight when the line is stopped already change nothing, and a pause
that a person made stands. A reason that a person has seen and let pass, by opening the line, does not
stop it again for a while.

KEYS[1]  hash, line
KEYS[2]  hash, health: "let_code", "let_until" ms
ARGV[1]  now in ms, empty = the server's clock
ARGV[2]  batch id, which may be the probe's
ARGV[3]  kind: error, outage or data
ARGV[4]  error code, 0 = none
ARGV[5]  reason, for people; empty = as it was
ARGV[6]  first wait, ms
ARGV[7]  longest wait, ms
Returns  ms until the next probe, 0 when the line was stopped or paused already, -1 when a person let it pass
]]
local now, batch, kind, code, reason = tonumber(ARGV[1]), ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local first, longest = tonumber(ARGV[6]), tonumber(ARGV[7])
local time = not now and redis.call('TIME')
now = now or time[1] * 1000 + math.floor(time[2] / 1000)

local line = redis.call('HMGET', KEYS[1], 'state', 'probe', 'wait')
local state, probe, wait = line[1], line[2], tonumber(line[3])
local let = redis.call('HMGET', KEYS[2], 'let_code', 'let_until')
if kind == 'data' and let[1] == code and now < tonumber(let[2]) and state ~= 'paused' then
  return -1
end
if state == 'paused' or (state == 'stopped' and probe ~= batch) then
  return 0
end
if state ~= 'stopped' then
  redis.call('HSET', KEYS[1], 'state', 'stopped', 'since', now)
  wait = first / 2
else
  redis.call('HINCRBY', KEYS[1], 'failed', 1)
end
wait = math.max(first, math.min(2 * wait, longest))
redis.call('HSET', KEYS[1], 'kind', kind, 'code', code, 'wait', wait, 'next_probe', now + wait)
if reason ~= '' then
  redis.call('HSET', KEYS[1], 'reason', reason)
end
redis.call('HDEL', KEYS[1], 'probe')
return wait

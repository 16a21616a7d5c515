--[[
Stop the line, or keep it stopped: only an occasional probe is sent.

The first stop waits for its probe as long as its reason asks; each probe that fails doubles the wait. Other batches that
come back from flight while the line is stopped change nothing, and a person's pause stays in force. A code that a person
has allowed, by opening the line, does not stop it again for a while.

KEYS[1]  hash, line
KEYS[2]  hash, health: "let_code", "let_until" ms, the code that is ignored
KEYS[3]  stream, history
ARGV[1]  now in ms, empty = the server's clock
ARGV[2]  batch id, which may be the probe's
ARGV[3]  kind: error, outage or data
ARGV[4]  error code, 0 = none
ARGV[5]  reason, for people; empty = as it was
ARGV[6]  first wait, ms
ARGV[7]  longest wait, ms
Returns  ms until the next probe, 0 if the line was stopped or paused already, -1 if the code is ignored
]]
local line, health, history = KEYS[1], KEYS[2], KEYS[3]
local now, batch, kind, code, reason = now_ms(ARGV[1]), ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local first, longest = tonumber(ARGV[6]), tonumber(ARGV[7])

-- First a write that needs no memory: a full server then accepts the others.
redis.call('HDEL', line, '')
local state, probe = unpack(redis.call('HMGET', line, 'state', 'probe'))
local wait, ignored_until = numbers(redis.call('HMGET', line, 'wait')), numbers(redis.call('HMGET', health, 'let_until'))
local ignored_code = redis.call('HGET', health, 'let_code')
if kind == 'data' and ignored_code == code and now < ignored_until and state ~= 'paused' then
  return -1
end
if state == 'paused' or (state and probe ~= batch) then
  return 0
end
local failed = state and numbers(redis.call('HMGET', line, 'failed')) + 1 or 0
wait = math.max(first, math.min(2 * (state and wait or first / 2), longest))
if not state then
  redis.call('HSET', line, 'state', 'stopped', 'since', now)
  note('stopped', 'by', 'worker', 'kind', kind, 'code', code, 'reason', reason, 'batch', batch, 'probe_in_ms', wait)
else
  redis.call('HSET', line, 'failed', failed)
  note('probe_failed', 'by', 'worker', 'code', code, 'reason', reason, 'failed', failed, 'probe_in_ms', wait)
end
redis.call('HSET', line, 'kind', kind, 'code', code, 'wait', wait, 'next_probe', now + wait)
if reason ~= '' then
  redis.call('HSET', line, 'reason', reason)
end
redis.call('HDEL', line, 'probe')
return wait

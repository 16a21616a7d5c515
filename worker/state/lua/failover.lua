--[[
Functions that several scripts share to notice that Redis failed over. The loader puts those that a script uses before it,
after those of the prelude.
]]

-- What the server says about replication: its id, which changes with every promotion and restart, and the whole text. Some
-- services show neither.
local function replication()
  local about = redis.pcall('INFO', 'replication')
  about = type(about) == 'string' and about or ''
  return string.match(about, 'master_replid:(%x+)'), about
end

-- Let nobody send for that long, and void all permits. Times in us.
local function hold_all(now, length, reason, epoch)
  local paused_at, paused_until, current = numbers(redis.call('HMGET', rate, 'paused_at', 'paused_until', 'epoch'))
  paused_until = math.max(paused_at <= now and paused_until or 0, now + length)
  redis.call('HSET', rate, 'paused_at', whole(now), 'paused_until', whole(paused_until), 'reason', reason, 'code', '')
  redis.call('HSET', rate, 'next', whole(paused_until), 'epoch', whole(math.max(current + 1, epoch or 0)))
end

-- Notice whether this is another server, or other data, than scripts ran on before, and return its number. `seen` is the
-- number that the caller knows, 0 = none; `now` in us.
--
-- A promoted replica, or a restarted server, may lag: it does not know the claims and slots of the last moments. So permits
-- and tickets are void, and nothing is sent until everything under way has landed: the API gives up after 3 s (1047/34620).
-- Epochs and claim numbers continue far above any that may have been lost, so a claim with a number in between was lost.
-- Numbers begin with the time in seconds: a caller who knows one from before the first has seen data that is gone.
local function arrive(now, seen)
  local QUIET, FAR = 3e6, 1e6
  local known = redis.call('HGET', server, 'id')
  local number, first, claims = numbers(redis.call('HMGET', server, 'number', 'first', 'claims'))
  local id = replication() or known or '-'
  if id == known and (seen == 0 or seen >= first and seen <= number) then
    return number
  end
  local moved = known and id ~= known
  local emptied = not moved and seen > 0
  number = math.max(known and number + 1 or math.floor(now / 1e6), seen + 1)
  first = math.min(known and first or number, seen > 0 and seen or number)
  local lost, before, servers = numbers(redis.call('HMGET', server, 'lost', 'lost_before', 'servers'))
  local accepted = numbers(redis.call('HMGET', ledger, 'accepted'))
  redis.call('HSET', server, 'id', id, 'number', number, 'first', first, 'servers', servers + 1)
  redis.call('HSET', server, 'at', whole(now / 1000), 'accepted', whole(accepted))
  if moved or emptied then
    redis.call('HSET', server, 'claims', whole(claims + FAR), 'gap_from', whole(claims), 'gap_to', whole(claims + FAR))
    redis.call('HSET', server, 'lost', 0, 'lost_before', whole(before + lost), 'behind', 0, 'emptied', emptied and 1 or 0)
    redis.call('DEL', tickets)
    hold_all(now, QUIET, moved and 'Redis failed over or was restarted' or 'Redis was emptied', number * FAR)
  end
  return number
end

-- Notice a claim that was made on the previous server and is unknown to this one: its users may be sent again while its call
-- is still under way. `length` in us is how long that may be.
local function miss_claim(now, claim, length)
  local from, upto = numbers(redis.call('HMGET', server, 'gap_from', 'gap_to'))
  if claim > from and claim <= upto then
    redis.call('HSET', server, 'gap_from', whole(upto), 'behind', 1)
    hold_all(now, length, 'Redis failed over to a replica that was behind')
  end
end

-- Since when (ms) everything delivered is known here; 0 = always. The previous server may have seen newer values delivered
-- that this one does not know of.
local function trusted_since()
  local servers, at = numbers(redis.call('HMGET', server, 'servers', 'at'))
  return servers > 1 and at or 0
end

-- Whether the API still has the values in a user's memory, as far as can be known.
local function is_trusted(user, since)
  return since == 0 or (tonumber(redis.call('ZSCORE', shadow_at, user) or 0) or 0) >= since
end

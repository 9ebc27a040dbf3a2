-- Divides amounts, such as credits or the quotas of clients, between the replicas. A replica may use its grant without
-- asking. The sum of what was used and of the unused grants never exceeds the limit. A grant is lowered in two steps:
-- the reply contains the lower grant, and the next statement that the replica holds no more than that. Until then, no
-- other replica gets the difference.
--
-- KEYS: one hash per amount, with the fields
--   base     "amount stamp": what was used outside of the replicas, and the time of this knowledge in ms
--   turn     "replica end": the replica that collects what is left, when it does not suffice for all, until which time
--   REPLICA  "used held expires": what a replica has used, up to which amount it may use more, until which time
-- ARGV: replica, number of replicas, lease in ms, then for each amount: used here ('' to read only), needed in addition,
-- the part of it that is reserved, up to which amount it may use more now, limit, base ('' if unknown), stamp of the
-- base, whether the replica is idle (0 or 1), time to live in ms.
-- Returns for each amount: granted, used by the other replicas, base, stamp, may use more than is left (0 or 1),
-- what this replica had stated before (-1 without), what is left for all replicas.
local ARGUMENTS = 9
-- The time in ms for which one replica collects what is left, and for which only others may do so afterwards.
local TURN, PAUSE = 5000, 1000
-- The rest of a turn in which a replica may not exceed what is left any more. Replicas state themselves more often.
local LAST_PART = 2500

local me, replicas, lease = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local now = now_ms()

local function divide(key, used, needed, reserved, held, limit, base, stamp, idle, ttl)
  local known_base, known_stamp
  local turn, turn_end, others, unused, before = nil, 0, 0, 0, -1
  local fields = redis.call('HGETALL', key)
  for index = 1, #fields, 2 do
    local name, value = fields[index], fields[index + 1]
    if name == 'base' then
      local amount, at = string.match(value, '^(%-?%d+) (%d+)$')
      known_base, known_stamp = tonumber(amount), tonumber(at)
    elseif name == 'turn' then
      local replica, ends = string.match(value, '^(%S+) (%d+)$')
      turn, turn_end = replica, tonumber(ends) or 0
    else
      local its_use, its_bound, expires = string.match(value, '^(%d+) (%d+) (%d+)$')
      its_use, its_bound, expires = tonumber(its_use), tonumber(its_bound), tonumber(expires)
      if its_use and name == me then
        before = its_use
      elseif its_use then
        others = others + its_use
        if expires > now and its_bound > its_use then
          unused = unused + its_bound - its_use
        end
      end
    end
  end

  if base and used and (not known_base or stamp > known_stamp or (stamp == known_stamp and base > known_base)) then
    known_base, known_stamp = base, stamp
    redis.call('HSET', key, 'base', text(base) .. ' ' .. text(stamp))
  end

  local is_statement = used ~= nil
  used = used or math.max(before, 0)
  local left = limit - (known_base or 0) - others - used
  local free = math.max(left - unused, 0)
  local extra = math.min(needed, free)
  local is_turn_of_other = turn and turn ~= me and turn_end > now
  if is_turn_of_other then
    -- Parts that do not suffice for any replica would strand what is left, so that one replica collects them.
    if needed > extra then
      extra = math.min(reserved, free)
    end
  elseif idle == 1 then
    -- An idle replica keeps a small grant for its next request, unless little is left.
    if free * 10 > limit then
      extra = math.max(extra, math.floor(free / (4 * replicas)))
    end
  else
    extra = math.max(extra, math.floor(free / (2 * replicas)))
  end
  if not is_statement then
    extra = 0
  elseif replicas == 1 then
    extra = math.max(extra, free)
  end
  local granted = used + extra
  local exceeds = 0
  if is_statement and needed > extra and not is_turn_of_other then
    if turn ~= me or turn_end + PAUSE <= now then
      turn_end = now + TURN
      redis.call('HSET', key, 'turn', me .. ' ' .. text(turn_end))
    end
    if turn_end - LAST_PART > now and unused == 0 then
      exceeds = 1
    elseif turn_end <= now then
      granted = used + math.min(reserved, free)
    end
  elseif is_statement and turn == me then
    redis.call('HDEL', key, 'turn')
  end
  if is_statement then
    redis.call('HSET', key, me, text(used) .. ' ' .. text(math.max(granted, held)) .. ' ' .. text(now + lease))
    redis.call('PEXPIRE', key, text(ttl))
  end
  return { granted, others, known_base or 0, known_stamp or 0, exceeds, before, math.max(left, 0) }
end

return divide_each(3, ARGUMENTS, divide)

-- Divides amounts of credits between the replicas. A replica may use its grant without asking. The sum of what was used
-- and of the unused grants never exceeds the limit. A grant is lowered in two steps: the reply contains the lower grant,
-- and the next statement that the replica holds no more than that. Until then, no other replica gets the difference.
--
-- Replicas with queued requests that do not get what these need form a line. Those that are first in line collect
-- what others return, and all others keep only what they need, so that parts that suffice for no request strand nothing.
-- A request that needs more than is left may still be served if the provider agrees. One replica at a time has the
-- right to try this, when no request in the line fits, and no other replica has unused credits.
--
-- KEYS: one hash per amount, with the fields
--   base     "amount stamp": what was used outside of the replicas, and the time of this knowledge in ms
--   right    "replica state": the replica that may exceed what is left. The state is 1, or 0 if it was withdrawn and
--            the replica may not know it yet
--   REPLICA  "used held expires reserved queued least since": what a replica has used, up to which amount it may use
--            more, until which time, what its requests in flight have reserved, what its queued requests need in
--            addition, the least that serves one of them, and the time in ms since which it is in line (0 if it is not)
-- ARGV: replica, number of replicas, lease in ms, then for each amount: used here ('' to read only), reserved, queued,
-- least, up to which amount it may use more now, limit, base ('' if unknown), stamp of the base, whether the replica is
-- idle (0 or 1), time to live in ms, the sum of what other replicas have used as far as this one knows, and "replica
-- used" for each replica of which Redis has lost a part of it ('' if none).
-- Returns for each amount: granted, used by the other replicas, base, stamp, may use more than is left (0 or 1),
-- what this replica had stated before (-1 without), what is left for all replicas, whether other replicas hold more than
-- they need of what this one waits for (0 or 1), and "replica used" for each other replica if their sum is not the known
-- one ('' if it is).
local ARGUMENTS = 12

local me, replicas, lease = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local now = now_ms()

-- Raises what a replica has used to what another one has learned from it. The amount only grows.
local function restore(key, stated, restored)
  for name, amount in string.gmatch(restored, '(%S+) (%d+)') do
    local known = stated[name]
    if not known then
      known = { name = name, used = 0, held = 0, expires = 0, reserved = 0, queued = 0, least = 0, since = 0 }
      stated[name] = known
    end
    if known.used < tonumber(amount) then
      known.used = tonumber(amount)
      known.held = math.max(known.held, known.used)
      local numbers = { known.used, known.held, known.expires, known.reserved, known.queued, known.least, known.since }
      for index, number in ipairs(numbers) do
        numbers[index] = text(number)
      end
      redis.call('HSET', key, name, table.concat(numbers, ' '))
    end
  end
end

local function divide(
  key, used, reserved, queued, least, held, limit, base, stamp, idle, ttl, known_others, restored
)
  local known_base, known_stamp, right, right_state
  local stated = {}
  local fields = redis.call('HGETALL', key)
  for index = 1, #fields, 2 do
    local name, value = fields[index], fields[index + 1]
    if name == 'base' then
      local amount, at = string.match(value, '^(%-?%d+) (%d+)$')
      known_base, known_stamp = tonumber(amount), tonumber(at)
    elseif name == 'right' then
      right, right_state = string.match(value, '^(%S+) (%d)$')
    else
      local pattern = '^(%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+)$'
      local its_use, bound, expires, its_reserved, its_queue, its_least, since = string.match(value, pattern)
      if its_use then
        stated[name] = {
          name = name, used = tonumber(its_use), held = tonumber(bound), expires = tonumber(expires),
          reserved = tonumber(its_reserved), queued = tonumber(its_queue), least = tonumber(its_least),
          since = tonumber(since)
        }
      end
    end
  end
  if restored then
    restore(key, stated, restored)
  end

  local others, unused, others_reserved, line, known = 0, 0, 0, {}, {}
  for name, other in pairs(stated) do
    if name ~= me then
      others = others + other.used
      known[#known + 1] = name .. ' ' .. text(other.used)
      if other.expires > now then
        local its_unused = math.max(other.held - other.used, 0)
        unused = unused + its_unused
        others_reserved = others_reserved + math.min(other.reserved, its_unused)
        if other.since > 0 then
          line[#line + 1] = other
        end
      end
    end
  end
  -- The order of `pairs` differs between servers.
  table.sort(known)
  table.sort(line, function(a, b) return a.since < b.since end)
  if right and right ~= me and not (stated[right] and stated[right].expires > now) then
    right = nil
  end

  if base and used and (not known_base or stamp > known_stamp or (stamp == known_stamp and base > known_base)) then
    known_base, known_stamp = base, stamp
    redis.call('HSET', key, 'base', text(base) .. ' ' .. text(stamp))
  end

  local mine = stated[me]
  local before = mine and mine.used or -1
  local is_statement = used ~= nil
  -- A statement that arrives late does not lower the amount.
  used = math.max(used or 0, before, 0)
  local left = limit - (known_base or 0) - others - used
  local exceeds, unmet, granted = 0, 0, used
  if is_statement then
    local free = math.max(left - unused, 0)
    local since = mine and mine.expires > now and mine.since or 0
    -- What is left after the requests in flight, and after the queued ones of the replicas that come first.
    local possible = math.max(left - others_reserved - reserved, 0)
    local least_of_all, is_first, line_end = least, true, now
    local after_others = possible
    for _, other in ipairs(line) do
      if since == 0 or other.since < since then
        is_first = false
        if other.least <= after_others then
          after_others = after_others - math.min(other.queued, after_others)
        end
      end
      least_of_all = math.min(least_of_all, other.least)
      line_end = math.max(line_end, other.since + 1)
    end
    local fits = least <= after_others
    local extra = math.min(reserved + (fits and math.min(queued, after_others) or 0), free)
    local is_unmet = queued > 0 and extra < reserved + queued
    if not is_unmet and #line == 0 then
      if replicas == 1 then
        extra = free
      elseif idle == 0 then
        extra = math.max(extra, math.floor(free / (2 * replicas)))
      elseif free * 10 > limit then
        -- An idle replica keeps a small grant for its next request, unless little is left.
        extra = math.max(extra, math.floor(free / (4 * replicas)))
      end
    end
    granted = used + extra

    if not is_unmet then
      since = 0
    elseif since == 0 or (fits and extra >= reserved + least) then
      -- A replica that can serve a request goes to the end of the line.
      since = line_end
    end
    local may_exceed = is_unmet and least_of_all > possible
    if is_unmet and unused > others_reserved and (may_exceed and is_first or fits and extra < reserved + least) then
      unmet = 1
    end
    if right == me and right_state == '1' and may_exceed and #line == 0 and unused == 0 then
      exceeds = 1
    elseif right == me and right_state == '1' then
      -- The next statement of this replica confirms that it knows of the end of its right.
      redis.call('HSET', key, 'right', me .. ' 0')
      since = is_unmet and line_end or 0
    else
      if right == me then
        redis.call('HDEL', key, 'right')
        right = nil
      end
      if may_exceed and is_first and unused == 0 and not right then
        redis.call('HSET', key, 'right', me .. ' 1')
        exceeds = 1
      end
    end

    local numbers = { used, math.max(granted, held), now + lease, reserved, queued, least, since }
    for index, number in ipairs(numbers) do
      numbers[index] = text(number)
    end
    redis.call('HSET', key, me, table.concat(numbers, ' '))
    redis.call('PEXPIRE', key, text(ttl))
  end
  return {
    granted, others, known_base or 0, known_stamp or 0, exceeds, before, math.max(left, 0), unmet,
    others == known_others and '' or table.concat(known, ' ')
  }
end

return divide_each(3, ARGUMENTS, divide)

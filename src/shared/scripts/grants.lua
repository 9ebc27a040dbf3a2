-- Divides the credits of workspaces between the replicas. A replica uses its grant without a request to Redis. The
-- sum of the used credits and of the unused grants never exceeds the limit. A grant is lowered in two steps: the
-- reply contains the lower grant, and the next statement of the replica confirms it. Until then, no other replica
-- gets the difference.
--
-- Replicas whose queued requests need more than their grants form a line. The first replicas in the line collect the
-- credits that other replicas return. All other replicas keep only the credits that they need, so that no credits are
-- stranded in parts that suffice for no request. A request that needs more than is left may still be served if the
-- provider agrees. One replica at a time has the right to try this, when no request in the line fits, and no other
-- replica has unused credits.
--
-- KEYS: one hash per workspace, with the fields
--   base          "amount stamp": the credits that were used outside of the replicas, and the time in ms at which
--                 this amount was received
--   right         "replica state": the replica that may exceed the credits that are left. The state is 1, or 0 if the
--                 right was withdrawn and the replica may not know it yet
--   REPLICA       "used held expires reserved queued least since": the credits that a replica has used, the amount up
--                 to which it may use more, the end of its lease in ms, the credits that its requests in flight have
--                 reserved, the credits that its queued requests need in addition, the cost of the cheapest queued
--                 request, and the time in ms since which the replica is in line (0 if it is not)
--   run:REPLICA   "run before statement able": the number of the process, the part of `used` that earlier processes
--                 of the replica have used, the number of its last statement, and the time in ms since which it can
--                 serve a queued request (0 if it cannot)
-- ARGV: replica, number of replicas, lease in ms, number of the statement, time in ms for which a replica that can
-- serve a request keeps its place in the line, then for each workspace:
--   used by this replica ('' to read only), number of the process, used by earlier processes of this replica,
--   reserved, queued, least, the amount up to which the replica may use more now, limit, base ('' if unknown), stamp
--   of the base, whether the replica is idle (0 or 1), time to live in ms, the sum of the credits that other replicas
--   have used according to this replica, "replica used run before" for each replica whose used credits Redis has lost
--   in part ('' if there is none).
-- Returns for each workspace: the grant, the sum used by the other replicas, base, its stamp, whether this replica
-- may use more than is left (0 or 1), the former `used` of this replica (-1 if there is none), the credits that are
-- left for all replicas, whether other replicas hold more than they need while this replica waits (0 or 1), "replica
-- used run before" for each other replica ('' if their sum is the stated sum), the recorded number of the process,
-- and the recorded use of earlier processes.
local ARGUMENTS = 14

local me, replicas, lease = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local my_statement, turn = tonumber(ARGV[4]), tonumber(ARGV[5])
local now = now_ms()

-- Merges a statement of a process into the record of its replica. All amounts only grow. A process counts only its
-- own use. If the use of an earlier process arrives late, it is added.
local function merge(known, run, before, used)
  local own, used_before = known.used - known.before, known.used
  if run > known.run then
    own, known.before, known.run = used - before, math.max(before, known.used), run
  elseif run == known.run then
    own, known.before = math.max(own, used - before), math.max(known.before, before)
  else
    known.before = math.max(known.before, used)
  end
  known.used = known.before + own
  known.held = math.max(known.held + known.used - used_before, known.used)
end

local function record(key, known)
  local numbers = { known.used, known.held, known.expires, known.reserved, known.queued, known.least, known.since }
  for index, number in ipairs(numbers) do
    numbers[index] = text(number)
  end
  local run = { text(known.run), text(known.before), text(known.statement), text(known.able) }
  redis.call('HSET', key, known.name, table.concat(numbers, ' '), 'run:' .. known.name, table.concat(run, ' '))
end

local function new_replica(name)
  return {
    name = name, used = 0, held = 0, expires = 0, reserved = 0, queued = 0, least = 0, since = 0,
    run = 0, before = 0, statement = 0, able = 0
  }
end

-- Raises the used credits of replicas to the amounts that another replica restores.
local function restore(key, stated, restored)
  for name, amount, run, before in string.gmatch(restored, '(%S+) (%d+) (%d+) (%d+)') do
    local known = stated[name] or new_replica(name)
    stated[name] = known
    local used_before = known.used
    merge(known, tonumber(run), tonumber(before), tonumber(amount))
    if known.used > used_before then
      record(key, known)
    end
  end
end

local function divide(
  key, used, run, before, reserved, queued, least, held, limit, base, stamp, idle, ttl, known_others, restored
)
  local known_base, known_stamp, right, right_state
  local stated, runs = {}, {}
  local fields = redis.call('HGETALL', key)
  for index = 1, #fields, 2 do
    local name, value = fields[index], fields[index + 1]
    if name == 'base' then
      local amount, at = string.match(value, '^(%-?%d+) (%d+)$')
      known_base, known_stamp = tonumber(amount), tonumber(at)
    elseif name == 'right' then
      right, right_state = string.match(value, '^(%S+) (%d)$')
    elseif string.sub(name, 1, 4) == 'run:' then
      runs[string.sub(name, 5)] = value
    else
      local pattern = '^(%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+)$'
      local its_use, bound, expires, its_reserved, its_queue, its_least, since = string.match(value, pattern)
      if its_use then
        stated[name] = {
          name = name, used = tonumber(its_use), held = tonumber(bound), expires = tonumber(expires),
          reserved = tonumber(its_reserved), queued = tonumber(its_queue), least = tonumber(its_least),
          since = tonumber(since), run = 0, before = 0, statement = 0, able = 0
        }
      end
    end
  end
  for name, value in pairs(runs) do
    local known = stated[name]
    local its_run, its_before, number, able = string.match(value, '^(%d+) (%d+) (%d+) (%d+)$')
    if known and its_run then
      known.run, known.before, known.statement, known.able =
        tonumber(its_run), math.min(tonumber(its_before), known.used), tonumber(number), tonumber(able)
    end
  end
  if restored then
    restore(key, stated, restored)
  end

  local others, unused, others_reserved, line, known = 0, 0, 0, {}, {}
  for name, other in pairs(stated) do
    if name ~= me then
      others = others + other.used
      known[#known + 1] = table.concat({ name, text(other.used), text(other.run), text(other.before) }, ' ')
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

  local mine = stated[me] or new_replica(me)
  local stated_before = stated[me] and mine.used or -1
  -- A statement that arrives late frees nothing, because this replica may hold more now.
  local is_late = used and (run < mine.run or run == mine.run and my_statement <= mine.statement)
  local is_statement = used and not is_late
  local has_progressed, is_read_only = false, used == nil
  if used then
    has_progressed = used > mine.used or reserved > mine.reserved
    held = held - used
    merge(mine, run, before, used)
    held = held + mine.used
  end
  used = mine.used
  local left = limit - (known_base or 0) - others - used
  local exceeds, unmet, granted = 0, 0, used
  if is_statement then
    -- The use of another replica with the right to exceed the rest is unknown until its next statement.
    local is_other_right = right and right ~= me
    local free = is_other_right and 0 or math.max(left - unused, 0)
    local since = mine.expires > now and mine.since or 0
    local able = mine.expires > now and mine.able or 0
    -- The credits that are left after the requests in flight, and after the queued requests of the replicas ahead in
    -- line.
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

    local may_exceed = is_unmet and least_of_all > possible
    local is_waiting = unused > others_reserved and (may_exceed and is_first or fits and extra < reserved + least)
    if is_unmet and (is_waiting or is_other_right) then
      unmet = 1
    end
    -- A replica that can serve a request keeps its place until it has started the request or `turn` has passed: it
    -- may need a slot first.
    local is_turn_over = able > 0 and (has_progressed or now - able >= turn)
    if right == me and right_state == '1' and may_exceed and unused == 0 and not (is_turn_over and #line > 0) then
      exceeds = 1
    elseif right == me and right_state == '1' then
      -- The next statement of this replica confirms the end of its right.
      redis.call('HSET', key, 'right', me .. ' 0')
      is_turn_over = true
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
    local is_able = exceeds == 1 or fits and extra >= reserved + least
    if not is_unmet then
      since = 0
    elseif since == 0 or is_turn_over then
      since = line_end
    end
    if not (is_unmet and is_able) then
      able = 0
    elseif able == 0 or is_turn_over then
      able = now
    end

    mine.held, mine.expires, mine.reserved = math.max(granted, held), now + lease, reserved
    mine.queued, mine.least, mine.since = queued, least, since
    mine.statement, mine.able = my_statement, able
  end
  if not is_read_only then
    record(key, mine)
    redis.call('PEXPIRE', key, text(ttl))
  end
  return {
    granted, others, known_base or 0, known_stamp or 0, exceeds, stated_before, math.max(left, 0), unmet,
    others == known_others and '' or table.concat(known, ' '), mine.run, mine.before
  }
end

return divide_each(5, ARGUMENTS, divide)

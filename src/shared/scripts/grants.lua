-- Divides the credits of workspaces between the replicas. A replica uses its grant without a request to Redis. The
-- sum of the used credits and of the unused grants never exceeds the limit. A grant is lowered in two steps: the
-- reply contains the lower grant, and the next statement of the replica confirms it. Until then, no other replica
-- gets the difference.
--
-- Replicas whose queued requests need more than their grants form a line. The first replicas in the line collect the
-- credits that other replicas return. All other replicas keep only the credits that they need, so that no credits
-- remain in parts that are too small for any request. The provider may still serve a request that needs more than is
-- left. One replica at a time has the right to send such a request, when no request in the line fits, and no other
-- replica has unused credits.
--
-- A statement usually reads only the record of its replica and the sums of all replicas, so that its cost does not
-- depend on the number of replicas. It reads the records of all replicas if a lease has ended, or if the reply must
-- contain all records. It also reads them if a replica is in the line or has the right to exceed the credits that are
-- left.
--
-- KEYS: one hash per workspace, with the fields
--   base          "amount stamp": the credits that were used outside of the replicas, and the time in ms at which
--                 this amount was received
--   right         "replica state": the replica that may exceed the credits that are left. The state is 1, or 0 if the
--                 right was withdrawn and the replica has not confirmed it
--   sums          "epoch used unused reserved expires queued listed unlisted": a number that changes when Redis loses
--                 the hash, the sum of `used` of all replicas, the sums of the unused and of the reserved credits of
--                 the replicas with a lease, the time in ms at which the first lease with unused credits ends (0 if
--                 there is none), the number of replicas in the line, the time in ms of the last reply that contained
--                 the used credits of each other replica, and the replica whose used credits are in no such reply
--                 ("-" if there is none, "+" if there are several)
--   REPLICA       "used held expires reserved queued least since run before statement able": the credits that a
--                 replica has used, the amount up to which it may use more, the end of its lease in ms, the credits
--                 that its requests in flight have reserved, the credits that its queued requests need in addition,
--                 the cost of the cheapest queued request, the time in ms since which the replica is in line (0 if it
--                 is not), the number of the process, the part of `used` that earlier processes of the replica have
--                 used, the number of its last statement, and the time in ms since which it can serve a queued
--                 request (0 if it cannot)
-- ARGV: replica, number of replicas, lease in ms, number of the statement, time in ms for which a replica that can
-- serve a request keeps its place in the line, minimum time in ms between two replies that contain the used credits of
-- each replica although none were lost, then for each workspace:
--   used by this replica ('' to read only), number of the process, used by earlier processes of this replica,
--   reserved, queued, least, the amount up to which the replica may use more now, limit, base ('' if unknown), stamp
--   of the base, whether the replica is idle (0 or 1), time to live in ms, the sum of the credits that other replicas
--   have used according to this replica, the epoch that this replica knows (0 for a reply with the used credits of
--   each replica), "replica used run before" for each replica whose used credits Redis has lost in part ('' if there
--   is none).
-- Returns for each workspace: the grant, the sum used by the other replicas, base, its stamp, whether this replica
-- may use more than is left (0 or 1), the former `used` of this replica (-1 if there is none), the credits that are
-- left for all replicas, whether other replicas hold more than they need while this replica waits (0 or 1), the
-- recorded number of the process, the recorded use of earlier processes, epoch, whether the next element contains the
-- used credits of each other replica (0 or 1), and these as "replica used run before".
local ARGUMENTS = 15

local me, replica_count, lease = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local my_statement, turn, min_list_interval = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local now = now_ms()

-- Parses the whole numbers of a field. Returns an empty table if the field is missing.
local function parse_numbers(field)
  local numbers = {}
  for number in string.gmatch(field or '', '%d+') do
    numbers[#numbers + 1] = tonumber(number)
  end
  return numbers
end

-- Formats whole numbers with spaces between them.
local function format_numbers(numbers)
  for index, number in ipairs(numbers) do
    numbers[index] = text(number)
  end
  return table.concat(numbers, ' ')
end

-- Parses the record of a replica. All numbers of a replica without a record are 0.
local function parse_replica(name, field)
  local numbers = parse_numbers(field)
  local used = numbers[1] or 0
  return {
    name = name, used = used, held = numbers[2] or 0, expires = numbers[3] or 0, reserved = numbers[4] or 0,
    queued = numbers[5] or 0, least = numbers[6] or 0, since = numbers[7] or 0, run = numbers[8] or 0,
    before = math.min(numbers[9] or 0, used), statement = numbers[10] or 0, able = numbers[11] or 0
  }
end

local function write_replica(key, replica)
  redis.call('HSET', key, replica.name, format_numbers({
    replica.used, replica.held, replica.expires, replica.reserved, replica.queued, replica.least, replica.since,
    replica.run, replica.before, replica.statement, replica.able
  }))
end

-- Parses the sums of all replicas. Returns nil if the field is missing.
local function parse_sums(field)
  local text_of_numbers, unlisted = string.match(field or '', '^(.*) (%S+)$')
  local numbers = parse_numbers(text_of_numbers)
  return unlisted and {
    epoch = numbers[1], used = numbers[2], unused = numbers[3], reserved = numbers[4], expires = numbers[5],
    queued = numbers[6], listed = numbers[7], unlisted = unlisted
  }
end

local function write_sums(key, sums)
  local numbers = format_numbers({
    sums.epoch, sums.used, sums.unused, sums.reserved, sums.expires, sums.queued, sums.listed
  })
  redis.call('HSET', key, 'sums', numbers .. ' ' .. sums.unlisted)
end

-- Merges a statement of a process into the record of its replica. All amounts only grow. A process counts only its
-- own use. The use of an earlier process is added, even if its statement arrives late.
local function merge(replica, run, before, used)
  local own, used_before = replica.used - replica.before, replica.used
  if run > replica.run then
    own, replica.before, replica.run = used - before, math.max(before, replica.used), run
  elseif run == replica.run then
    own, replica.before = math.max(own, used - before), math.max(replica.before, before)
  else
    replica.before = math.max(replica.before, used)
  end
  replica.used = replica.before + own
  replica.held = math.max(replica.held + replica.used - used_before, replica.used)
end

-- Returns the unused credits of a replica, the part of them that its requests in flight have reserved, and the number
-- of places that the replica has in the line (0 or 1). All three are 0 for a replica without a lease.
local function holdings(replica)
  if replica.expires <= now then
    return 0, 0, 0
  end
  local unused = math.max(replica.held - replica.used, 0)
  return unused, math.min(replica.reserved, unused), replica.since > 0 and 1 or 0
end

-- Adds the holdings of a replica to the sums.
local function add_holdings(sums, replica)
  local unused, reserved, places = holdings(replica)
  sums.unused, sums.reserved, sums.queued = sums.unused + unused, sums.reserved + reserved, sums.queued + places
  if unused > 0 or places > 0 then
    sums.expires = sums.expires == 0 and replica.expires or math.min(sums.expires, replica.expires)
  end
end

-- Reads the records of all replicas, by name.
local function read_replicas(key)
  local replicas = {}
  local fields = redis.call('HGETALL', key)
  for index = 1, #fields, 2 do
    local name = fields[index]
    if name ~= 'base' and name ~= 'right' and name ~= 'sums' then
      replicas[name] = parse_replica(name, fields[index + 1])
    end
  end
  return replicas
end

-- Raises the used credits of replicas to the amounts that another replica restores.
local function restore(key, replicas, restored)
  for name, amount, run, before in string.gmatch(restored, '(%S+) (%d+) (%d+) (%d+)') do
    local replica = replicas[name] or parse_replica(name)
    replicas[name] = replica
    local used_before = replica.used
    merge(replica, tonumber(run), tonumber(before), tonumber(amount))
    if replica.used > used_before then
      write_replica(key, replica)
    end
  end
end

-- Returns the sums of the other replicas, the other replicas in the line by their order, and the used credits of each
-- other replica as a text.
local function sum_others(replicas, epoch)
  local sums = {
    epoch = epoch, used = 0, unused = 0, reserved = 0, expires = 0, queued = 0, listed = now, unlisted = '-'
  }
  local line, uses = {}, {}
  for name, replica in pairs(replicas) do
    if name ~= me then
      sums.used = sums.used + replica.used
      add_holdings(sums, replica)
      uses[#uses + 1] = table.concat({ name, text(replica.used), text(replica.run), text(replica.before) }, ' ')
      if replica.expires > now and replica.since > 0 then
        line[#line + 1] = replica
      end
    end
  end
  -- The text must not depend on the order of `pairs`, which differs between servers.
  table.sort(uses)
  table.sort(line, function(a, b) return a.since < b.since or (a.since == b.since and a.name < b.name) end)
  return sums, line, table.concat(uses, ' ')
end

-- Records the statement of this replica about one workspace, and returns its grant.
local function divide(
  key, used, run, before, reserved, queued, least, held, limit, base, stamp, idle, ttl, stated_others, epoch, restored
)
  local fields = redis.call('HMGET', key, 'base', 'right', 'sums', me)
  local newest_base, newest_stamp, right, right_state
  if fields[1] then
    newest_base, newest_stamp = string.match(fields[1], '^(%-?%d+) (%d+)$')
    newest_base, newest_stamp = tonumber(newest_base), tonumber(newest_stamp)
  end
  if fields[2] then
    right, right_state = string.match(fields[2], '^(%S+) (%d)$')
  end
  local mine, sums = parse_replica(me, fields[4]), parse_sums(fields[3])

  -- From here on, `sums` are the sums of the other replicas.
  local line, uses, has_uses = {}, '', 0
  local is_listed = true
  if sums then
    local my_unused, my_reserved, my_places = holdings(mine)
    sums.used, sums.queued = sums.used - mine.used, sums.queued - my_places
    sums.unused, sums.reserved = math.max(sums.unused - my_unused, 0), math.max(sums.reserved - my_reserved, 0)
    local is_unlisted = sums.unlisted ~= '-' and sums.unlisted ~= me
    is_listed = restored or epoch ~= sums.epoch or sums.used < stated_others
      or (is_unlisted and now - sums.listed >= min_list_interval)
  end
  local has_lease_ended = sums and sums.expires > 0 and sums.expires <= now
  if is_listed or right or sums.queued > 0 or has_lease_ended then
    local replicas = read_replicas(key)
    if restored then
      restore(key, replicas, restored)
    end
    local others_sums, all_uses
    others_sums, line, all_uses = sum_others(replicas, sums and sums.epoch or math.max(now, epoch + 1))
    if is_listed then
      uses, has_uses = all_uses, 1
      if sums and (sums.unlisted == me or sums.unlisted == '+') then
        others_sums.unlisted = me
      end
    else
      others_sums.unlisted, others_sums.listed = sums.unlisted, sums.listed
    end
    sums = others_sums
    if right and right ~= me and not (replicas[right] and replicas[right].expires > now) then
      right = nil
      if used then
        redis.call('HDEL', key, 'right')
      end
    end
  end
  local used_by_others, unused, others_reserved = sums.used, sums.unused, sums.reserved

  if base and used and (not newest_base or stamp > newest_stamp or (stamp == newest_stamp and base > newest_base)) then
    newest_base, newest_stamp = base, stamp
    redis.call('HSET', key, 'base', text(base) .. ' ' .. text(stamp))
  end

  local stated_before = fields[4] and mine.used or -1
  local used_before = mine.used
  -- A statement that arrives late frees no credits, because this replica may hold more since a later statement.
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
  local left = limit - (newest_base or 0) - used_by_others - used
  local exceeds, unmet, granted = 0, 0, used
  if is_statement then
    -- The use of another replica with the right to exceed the rest is unknown until its next statement.
    local is_other_right = right and right ~= me
    local free = is_other_right and 0 or math.max(left - unused, 0)
    local since = mine.expires > now and mine.since or 0
    local able = mine.expires > now and mine.able or 0
    -- `possible` are the credits that are left after the requests in flight. `after_others` are the credits that are
    -- also left after the queued requests of the replicas ahead in the line.
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
      if replica_count == 1 then
        extra = free
      elseif idle == 0 then
        extra = math.max(extra, math.floor(free / (2 * replica_count)))
      elseif free * 10 > limit then
        -- An idle replica keeps a small grant for its next request, unless little is left.
        extra = math.max(extra, math.floor(free / (4 * replica_count)))
      end
    end
    granted = used + extra

    local may_exceed = is_unmet and least_of_all > possible
    local is_waiting = unused > others_reserved and (may_exceed and is_first or fits and extra < reserved + least)
    if is_unmet and (is_waiting or is_other_right) then
      unmet = 1
    end
    -- A replica that can serve a request may need a slot first. It keeps its place until it has started the request, or
    -- until `turn` has passed.
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
    write_replica(key, mine)
    add_holdings(sums, mine)
    sums.used = used_by_others + mine.used
    if mine.used > used_before and sums.unlisted ~= me then
      sums.unlisted = sums.unlisted == '-' and me or '+'
    end
    write_sums(key, sums)
    redis.call('PEXPIRE', key, text(ttl))
  end
  return {
    granted, used_by_others, newest_base or 0, newest_stamp or 0, exceeds, stated_before, math.max(left, 0), unmet,
    mine.run, mine.before, sums.epoch, has_uses, uses
  }
end

return divide_each(6, ARGUMENTS, divide)

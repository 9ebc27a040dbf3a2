-- Divides the slots of a subject between the replicas by fair shares. A subject is a concurrency group of a workspace,
-- or a client. A slot permits one concurrent request. If all demands fit into the maximum, each replica gets its
-- demand, and spare slots are divided among the active replicas. Otherwise, a replica gets its demand or an equal part,
-- whichever is less. The sum of the granted slots never exceeds the maximum, unless the maximum itself falls.
--
-- KEYS: one hash per subject, with the fields
--   max      "maximum stamp": the newest maximum, and the time in ms at which it was received
--   REPLICA  "held demand expires": the slots that a replica uses or may use, and the slots that it could use
-- ARGV: replica, lease in ms, time in ms after which the remainder goes to other replicas, then for each subject:
-- held, demand (0 to return the slots that are not used), maximum (0 if unknown), stamp of the maximum.
-- Returns for each subject: granted, maximum, its stamp, number of active replicas, whether other replicas
-- hold slots that this replica demands and is entitled to (0 or 1), whether this replica has less than an equal part
-- although it is entitled to one (0 or 1).
local ARGUMENTS = 4

local me, lease, rotation = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local now = now_ms()

-- Returns the fair share of this replica. `active` has the name and demand of each active replica.
local function fair_share(active, max)
  table.sort(active, function(a, b)
    return a.demand < b.demand or (a.demand == b.demand and a.name < b.name)
  end)
  local left, mine = max, 0
  for index, replica in ipairs(active) do
    replica.share = math.min(replica.demand, math.floor(left / (#active - index + 1)))
    left = left - replica.share
  end
  -- The remaining slots are divided in an order that rotates with the time: in round 1 among the unmet demands, and in
  -- round 2 among all active replicas.
  table.sort(active, function(a, b) return a.name < b.name end)
  local first = math.floor(now / rotation) % #active
  for round = 1, 2 do
    local entitled = {}
    for offset = 0, #active - 1 do
      local replica = active[(first + offset) % #active + 1]
      if round == 2 or replica.share < replica.demand then
        entitled[#entitled + 1] = replica
      end
    end
    for index, replica in ipairs(entitled) do
      local part = math.ceil(left / (#entitled - index + 1))
      if round == 1 then
        part = math.min(part, replica.demand - replica.share)
      end
      replica.share = replica.share + part
      left = left - part
    end
  end
  for _, replica in ipairs(active) do
    if replica.name == me then
      mine = replica.share
    end
  end
  return mine
end

-- Records the statement of this replica about one subject, and returns its grant.
local function divide(key, held, demand, max, stamp)
  local known_max, known_stamp = 0, 0
  local active, taken = {}, 0
  local fields = redis.call('HGETALL', key)
  for index = 1, #fields, 2 do
    local name, value = fields[index], fields[index + 1]
    if name == 'max' then
      local amount, at = string.match(value, '^(%d+) (%d+)$')
      known_max, known_stamp = tonumber(amount) or 0, tonumber(at) or 0
    elseif name ~= me then
      local its_slots, its_demand, expires = string.match(value, '^(%d+) (%d+) (%d+)$')
      if its_slots and tonumber(expires) > now then
        taken = taken + tonumber(its_slots)
        if tonumber(its_demand) > 0 then
          active[#active + 1] = { name = name, demand = tonumber(its_demand) }
        end
      else
        redis.call('HDEL', key, name)
      end
    end
  end
  if max > 0 and (known_max == 0 or stamp > known_stamp) then
    known_max, known_stamp = max, stamp
    redis.call('HSET', key, 'max', text(max) .. ' ' .. text(stamp))
  end
  local granted, fair = 0, 0
  if demand > 0 then
    active[#active + 1] = { name = me, demand = demand }
  end
  if demand > 0 and known_max > 0 then
    fair = fair_share(active, known_max)
    granted = math.max(math.min(fair, known_max - taken), 0)
  end
  local recorded = math.max(granted, held)
  if recorded == 0 and demand == 0 then
    redis.call('HDEL', key, me)
  else
    redis.call('HSET', key, me, text(recorded) .. ' ' .. text(demand) .. ' ' .. text(now + lease))
  end
  redis.call('PEXPIRE', key, 86400000)
  -- Other replicas hold more than their shares. They return the difference when they receive a demand.
  local unmet = math.min(demand, fair) > granted and 1 or 0
  -- Only an equal part is compared, because the remainder of the division goes to another replica with each rotation.
  local partial = math.min(fair, math.floor(known_max / math.max(#active, 1))) > granted and 1 or 0
  return { granted, known_max, known_stamp, #active, unmet, partial }
end

return divide_each(3, ARGUMENTS, divide)

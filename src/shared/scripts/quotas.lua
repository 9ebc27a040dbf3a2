-- Divides the quotas of clients and users between the replicas. A replica uses its grant without a request to
-- Redis. The sum of the used amounts and of the unused grants never exceeds the limit. Unlike the use of credits, the
-- use of a quota may be refunded. A request gets either the whole amount that it needs or nothing.
--
-- KEYS: one hash per quota and period, with one field per replica, "used granted generation expires". ARGV: replica,
-- number of replicas, lease in ms, then for each quota: limit, used here (including reservations), held here,
-- generation of the held amount, needed in addition, wanted in addition, time to live in ms.
-- Returns for each quota: whether the need was granted (0 or 1), granted in all, used by the other replicas.
local ARGUMENTS = 7

local me, replicas, lease = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local now = now_ms()

-- Records the statement of this replica about one quota, and returns its grant.
local function divide(key, limit, used, held, generation, needed, wanted, ttl)
  local used_by_others, unused, mine = 0, 0, held
  local fields = redis.call('HGETALL', key)
  for index = 1, #fields, 2 do
    local pattern = '^(%d+) (%d+) (%d+) (%d+)$'
    local its_use, granted, its_generation, expires = string.match(fields[index + 1], pattern)
    its_use, granted, expires = tonumber(its_use), tonumber(granted), tonumber(expires)
    if its_use and fields[index] == me then
      -- A reply that extended the grant may still be in transit.
      if tonumber(its_generation) >= generation and expires > now then
        mine = math.max(mine, granted)
      end
    elseif its_use then
      used_by_others = used_by_others + its_use
      if expires > now and granted > its_use then
        unused = unused + granted - its_use
      end
    end
  end
  mine = math.max(mine, used)
  local free = math.max(limit - used_by_others - used - unused, 0)
  local is_granted = needed <= free
  if is_granted then
    local extra = math.min(wanted, free)
    if needed > 0 then
      -- Near the limit, a replica gets only the amount that it needs, so that no other request is denied an unused
      -- amount.
      local part = math.floor(free / (2 * replicas))
      extra = math.max(needed, extra, part >= 4 * needed and part or 0)
    end
    mine = math.max(mine, used + extra)
  end
  redis.call(
    'HSET', key, me,
    text(used) .. ' ' .. text(mine) .. ' ' .. text(generation) .. ' ' .. text(now + lease)
  )
  redis.call('PEXPIRE', key, text(ttl))
  return { is_granted and 1 or 0, mine, used_by_others }
end

return divide_each(3, ARGUMENTS, divide)

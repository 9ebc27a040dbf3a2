-- Stores the owners of identifiers, or removes them, and tells the other replicas about those that they keep.
--
-- KEYS: one string per identifier. ARGV: channel, replica, then for each identifier: owner ('' to remove it), time to
-- live in ms, what to tell the other replicas ('' for nothing).
local ARGUMENTS = 3
local channel, me = ARGV[1], ARGV[2]
for index, key in ipairs(KEYS) do
  local at = 2 + (index - 1) * ARGUMENTS
  local owner, ttl, message = ARGV[at + 1], ARGV[at + 2], ARGV[at + 3]
  if owner == '' then
    redis.call('DEL', key)
  else
    redis.call('SET', key, owner, 'PX', ttl)
  end
  if message ~= '' then
    redis.call('PUBLISH', channel, 'owner ' .. me .. ' ' .. message)
  end
end
return #KEYS

-- Stores the owners of identifiers and the accounts of lists, or removes them.
--
-- KEYS: one string per entry. ARGV: for each entry: the workspace ('' to remove the entry), time to live in ms.
-- Returns the number of entries.
local ARGUMENTS = 2
for index, key in ipairs(KEYS) do
  local at = (index - 1) * ARGUMENTS
  local owner, ttl = ARGV[at + 1], ARGV[at + 2]
  if owner == '' then
    redis.call('DEL', key)
  else
    redis.call('SET', key, owner, 'PX', ttl)
  end
end
return #KEYS

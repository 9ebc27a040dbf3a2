-- Stores entries of a map, and publishes them to the other replicas. An entry is stored only if its stamp is higher
-- than the stamp of the stored entry with the same name.
--
-- KEYS: the map (hash: name -> "stamp expires value", and `_version`, the number of changes). ARGV: channel, name of
-- the map, replica, maximum number of entries, then for each entry: name, stamp in ms, expiry in ms, value.
-- Returns the version and, for each entry, whether it was stored (0 or 1).
local ARGUMENTS = 4
local map = KEYS[1]
local channel, map_name, me, max = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local now = now_ms()

-- Removes expired entries. If there are still too many entries, removes the entries that expire first.
local function shrink()
  local fields = redis.call('HGETALL', map)
  local entries = {}
  for index = 1, #fields, 2 do
    if fields[index] ~= '_version' then
      local expires = tonumber(string.match(fields[index + 1], '^%d+ (%d+) ')) or 0
      if expires <= now then
        redis.call('HDEL', map, fields[index])
      else
        entries[#entries + 1] = { fields[index], expires }
      end
    end
  end
  table.sort(entries, function(a, b) return a[2] < b[2] end)
  for index = 1, #entries - max do
    redis.call('HDEL', map, entries[index][1])
  end
end

local results, latest = {}, now
for at = 5, #ARGV, ARGUMENTS do
  local name, stamp, expires, value = ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3]
  local stored = redis.call('HGET', map, name)
  local stored_stamp = stored and tonumber(string.match(stored, '^(%d+) ')) or -1
  local is_newer = tonumber(stamp) > stored_stamp
  if is_newer then
    local entry = stamp .. ' ' .. expires .. ' ' .. value
    redis.call('HSET', map, name, entry)
    local version = redis.call('HINCRBY', map, '_version', 1)
    redis.call('PUBLISH', channel, map_name .. ' ' .. me .. ' ' .. version .. ' ' .. name .. ' ' .. entry)
    latest = math.max(latest, tonumber(expires))
  end
  results[#results + 1] = is_newer and 1 or 0
end
if redis.call('HLEN', map) > max + 1 then
  shrink()
end
local ttl = redis.call('PTTL', map)
if ttl < latest - now + 60000 then
  redis.call('PEXPIRE', map, text(latest - now + 86400000))
end
return { tonumber(redis.call('HGET', map, '_version') or '0'), results }

-- Records that a replica is alive or leaves, and renews, takes or gives up the leadership.
--
-- KEYS: members (hash: replica -> "expires description"), leader (string: replica), then the maps whose versions are
-- returned. ARGV: replica, description, time to live of a replica in ms, or 0 if it leaves, time for which an ended
-- replica stays listed in ms, time to live of the leadership in ms, or 0 to give it up.
-- Returns the time in ms, the leader ('' if there is none), the versions, for each replica its id, its expiry in ms and
-- its description, and the previous description of this replica ('' if there is none).

local members, leader = KEYS[1], KEYS[2]
local me, description = ARGV[1], ARGV[2]
local ttl, listed, leader_ttl = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local now = now_ms()

local previous = redis.call('HGET', members, me)
if ttl > 0 then
  redis.call('HSET', members, me, text(now + ttl) .. ' ' .. description)
else
  redis.call('HDEL', members, me)
end
redis.call('PEXPIRE', members, text(listed))
local replicas = {}
local fields = redis.call('HGETALL', members)
for index = 1, #fields, 2 do
  local expires, about = string.match(fields[index + 1], '^(%d+) (.*)$')
  if not expires or tonumber(expires) + listed < now then
    redis.call('HDEL', members, fields[index])
  else
    replicas[#replicas + 1] = { fields[index], tonumber(expires), about }
  end
end

local holder = redis.call('GET', leader)
if leader_ttl > 0 and (not holder or holder == me) then
  redis.call('SET', leader, me, 'PX', text(leader_ttl))
  holder = me
elseif leader_ttl == 0 and holder == me then
  redis.call('DEL', leader)
  holder = false
end

local versions = {}
for index = 3, #KEYS do
  versions[#versions + 1] = tonumber(redis.call('HGET', KEYS[index], '_version') or '0')
end
return { now, holder or '', versions, replicas, previous and string.match(previous, '^%d+ (.*)$') or '' }

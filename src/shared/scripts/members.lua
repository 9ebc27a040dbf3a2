-- Records that a replica is alive, or removes it when it leaves. Takes, renews or gives up the leadership. Also removes
-- the replicas that expired long ago, and lists the others.
--
-- KEYS: members (hash: replica -> "expires description"), leader (string: replica), then the maps whose versions are
-- returned. ARGV: this replica, its description, its time to live in ms (0 if it leaves), time in ms for which an
-- expired replica stays listed, time to live of the leadership in ms (0 to give it up or not to take it).
-- Returns the time in ms, the leader ('' if there is none), the versions of the maps, the replicas (id, expiry in ms
-- and description of each), and the previous description of this replica ('' if there is none).

local members, leader = KEYS[1], KEYS[2]
local me, description = ARGV[1], ARGV[2]
local ttl, expired_ttl, leader_ttl = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local now = now_ms()

local previous = redis.call('HGET', members, me)
if ttl > 0 then
  redis.call('HSET', members, me, text(now + ttl) .. ' ' .. description)
else
  redis.call('HDEL', members, me)
end
redis.call('PEXPIRE', members, text(expired_ttl))
local replicas = {}
local fields = redis.call('HGETALL', members)
for index = 1, #fields, 2 do
  local expires, its_description = string.match(fields[index + 1], '^(%d+) (.*)$')
  if not expires or tonumber(expires) + expired_ttl < now then
    redis.call('HDEL', members, fields[index])
  else
    replicas[#replicas + 1] = { fields[index], tonumber(expires), its_description }
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

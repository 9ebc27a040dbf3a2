//! Defines the membership of the pool: the description that a replica sends to `members.lua`, its times to live, and
//! the reply. The reply contains the replicas, the leader and the versions of the maps of changes.

use std::time::Duration;

use redis::Value;
use serde::{Deserialize, Serialize};

use super::reply::{UnexpectedReply, parse_amount, parse_list, parse_text, parse_tuple};
use super::scripts::ChangeMap;

/// The time after its last beat at which a replica counts as ended. The next full beat of each other replica reports
/// it, at most 2 s later, so that all replicas count the live replicas correctly within 10 s.
pub(super) const MEMBER_TTL: Duration = Duration::from_secs(8);
/// The time for which status pages list an ended replica.
pub(super) const ENDED_MEMBER_TTL: Duration = Duration::from_secs(3_600);
/// The time for which a replica stays the leader after its last beat. Each of its beats renews it. After it has
/// expired, the next full beat of another replica makes that replica the leader.
pub(super) const LEADER_TTL: Duration = Duration::from_secs(8);

/// The description of a replica, which other replicas show on their status pages. It also lets the replica detect a
/// second process with its id.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Description {
    /// The version of the program.
    pub(super) version: String,
    /// The time of its start, in milliseconds by the clock of Redis.
    pub(super) started_ms: u64,
    /// A random number of the process, by which two processes with the same replica id are detected.
    pub(super) process: u64,
    /// The number of slots that the replica uses or may use.
    pub(super) slots: u64,
}

/// A replica of the pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Member {
    pub(super) id: String,
    /// The time at which it counts as ended, in milliseconds by the clock of Redis.
    pub(super) expires_ms: u64,
    pub(super) description: Description,
}

/// The reply of `members.lua`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Membership {
    /// The time of Redis, in milliseconds since 1970.
    pub(super) now_ms: u64,
    /// The id of the leader, or empty if no replica is the leader.
    pub(super) leader: String,
    /// The versions of the maps, in the order of [`ChangeMap::ALL`].
    pub(super) versions: [u64; ChangeMap::ALL.len()],
    pub(super) members: Vec<Member>,
    /// The description of this replica at its last beat, or `None` if Redis did not know the replica.
    pub(super) previous: Option<Description>,
}

impl Membership {
    pub(super) fn from_value(value: &Value) -> Result<Self, UnexpectedReply> {
        let [now, leader, versions, members, previous] = parse_tuple(value)?;
        let versions: &[Value; ChangeMap::ALL.len()] = parse_tuple(versions)?;
        let mut map_versions = [0; ChangeMap::ALL.len()];
        for (map_version, version) in map_versions.iter_mut().zip(versions) {
            *map_version = parse_amount(version)?;
        }
        let member = |value: &Value| {
            let [id, expires, description] = parse_tuple(value)?;
            Ok(Member {
                id: parse_text(id)?.to_owned(),
                expires_ms: parse_amount(expires)?,
                // A replica of a later version may send a description of another form.
                description: serde_json::from_str(parse_text(description)?).unwrap_or_default(),
            })
        };
        Ok(Self {
            now_ms: parse_amount(now)?,
            leader: parse_text(leader)?.to_owned(),
            versions: map_versions,
            members: parse_list(members)?.iter().map(member).collect::<Result<_, _>>()?,
            previous: match parse_text(previous)? {
                "" => None,
                description => Some(serde_json::from_str(description).unwrap_or_default()),
            },
        })
    }

    /// Returns the number of replicas that have not ended, which is at least 1: this replica.
    pub(super) fn live_count(&self) -> u32 {
        let live = self.members.iter().filter(|member| member.expires_ms > self.now_ms).count();
        u32::try_from(live).unwrap_or(u32::MAX).max(1)
    }
}

//! The replicas of the pool, as `members.lua` returns them.

use std::time::Duration;

use redis::Value;
use serde::{Deserialize, Serialize};

use super::reply::{UnexpectedReply, amount, list, text, tuple};
use super::scripts::Map;

/// The time after its last beat at which a replica counts as ended. The others notice it at their next full beat, at most
/// 2 s later, so that they all know of it within 10 s.
pub(super) const MEMBER_TTL: Duration = Duration::from_secs(8);
/// The time for which an ended replica is listed.
pub(super) const LISTED: Duration = Duration::from_secs(3_600);
/// The lease of the leader. It is renewed at each beat, and taken over at a full beat of another replica.
pub(super) const LEADER_LEASE: Duration = Duration::from_secs(8);

/// What a replica tells about itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Description {
    /// The version of the program.
    pub(super) version: String,
    /// The time of its start, in the time of Redis.
    pub(super) started_ms: u64,
    /// A number of this process, by which two processes with the same replica id are detected.
    pub(super) process: u64,
    /// The concurrent requests that are granted to it.
    pub(super) slots: u64,
}

/// A replica of the pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Member {
    pub(super) id: String,
    /// The time at which it counts as ended, in the time of Redis.
    pub(super) expires_ms: u64,
    pub(super) description: Description,
}

/// The reply of `members.lua`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Membership {
    pub(super) now_ms: u64,
    /// The id of the leader; empty without one.
    pub(super) leader: String,
    /// The versions of the maps, in the order of [`Map::ALL`].
    pub(super) versions: [u64; Map::ALL.len()],
    pub(super) members: Vec<Member>,
    /// What the replica had told about itself before; `None` if Redis did not know it.
    pub(super) previous: Option<Description>,
}

impl Membership {
    pub(super) fn from_value(value: &Value) -> Result<Self, UnexpectedReply> {
        let [now, leader, versions, members, previous] = tuple(value)?;
        let versions: &[Value; Map::ALL.len()] = tuple(versions)?;
        let mut known_versions = [0; Map::ALL.len()];
        for (known, version) in known_versions.iter_mut().zip(versions) {
            *known = amount(version)?;
        }
        let member = |value: &Value| {
            let [id, expires, description] = tuple(value)?;
            Ok(Member {
                id: text(id)?.to_owned(),
                expires_ms: amount(expires)?,
                // A later version may describe itself differently.
                description: serde_json::from_str(text(description)?).unwrap_or_default(),
            })
        };
        Ok(Self {
            now_ms: amount(now)?,
            leader: text(leader)?.to_owned(),
            versions: known_versions,
            members: list(members)?.iter().map(member).collect::<Result<_, _>>()?,
            previous: match text(previous)? {
                "" => None,
                description => Some(serde_json::from_str(description).unwrap_or_default()),
            },
        })
    }

    /// Returns the number of replicas that have not ended.
    pub(super) fn live_count(&self) -> u32 {
        let live = self.members.iter().filter(|member| member.expires_ms > self.now_ms).count();
        u32::try_from(live).unwrap_or(u32::MAX).max(1)
    }
}

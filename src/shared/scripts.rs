//! Contains the Lua scripts that run inside Redis, lists the maps of changes, and builds the names of the keys that the
//! scripts use. Every key has a time to live.

use redis::Cmd;

use crate::policy::shared_id::SharedId;
use crate::policy::shared_pool_name::SharedPoolName;

/// Records that a replica is alive or leaves, and returns all replicas, the leader and the versions of the maps.
pub(super) const MEMBERS: &str =
    concat!(include_str!("scripts/common.lua"), include_str!("scripts/members.lua"));
/// Divides the credits of workspaces.
pub(super) const GRANTS: &str =
    concat!(include_str!("scripts/common.lua"), include_str!("scripts/grants.lua"));
/// Divides the slots for concurrent requests of workspaces and clients.
pub(super) const SLOTS: &str = concat!(include_str!("scripts/common.lua"), include_str!("scripts/slots.lua"));
/// Stores and publishes the entries of a map of changes.
pub(super) const NEWEST: &str =
    concat!(include_str!("scripts/common.lua"), include_str!("scripts/newest.lua"));
/// Divides the quotas of clients and users.
pub(super) const QUOTAS: &str =
    concat!(include_str!("scripts/common.lua"), include_str!("scripts/quotas.lua"));
/// Stores the owners of identifiers and the accounts of lists.
pub(super) const OWNERS: &str =
    concat!(include_str!("scripts/common.lua"), include_str!("scripts/owners.lua"));

/// Maximum number of subjects in one call, such as workspaces or quotas. Redis runs no other command during a call.
pub(super) const MAX_SUBJECTS: usize = 128;

/// A call of a script: its text, its keys and its other arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ScriptCall {
    pub(super) script: &'static str,
    pub(super) keys: Vec<String>,
    pub(super) arguments: Vec<String>,
}

impl ScriptCall {
    /// Returns the command `EVAL`. It sends the text of the script with each call, because a restarted server has no
    /// scripts.
    pub(super) fn to_command(&self) -> Cmd {
        let mut command = redis::cmd("EVAL");
        command.arg(self.script).arg(self.keys.len());
        for text in self.keys.iter().chain(&self.arguments) {
            command.arg(text);
        }
        command
    }
}

/// A map of changes. Of several entries with the same name, the newest entry applies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ChangeMap {
    /// Refusals as evidence about keys and workspaces, and their refutations.
    Evidence,
    /// Refusals that restrict keys for certain kinds of requests.
    Refusals,
    /// The results of polls.
    Polls,
    /// The encrypted changes of operators.
    Overlay,
}

impl ChangeMap {
    pub(super) const ALL: [Self; 4] = [Self::Evidence, Self::Refusals, Self::Polls, Self::Overlay];

    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Evidence => "evidence",
            Self::Refusals => "refusals",
            Self::Polls => "polls",
            Self::Overlay => "overlay",
        }
    }

    pub(super) fn from_str(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|map| map.as_str() == text)
    }

    /// Returns the index of the map in [`ALL`](Self::ALL).
    pub(super) fn index(self) -> usize {
        match self {
            Self::Evidence => 0,
            Self::Refusals => 1,
            Self::Polls => 2,
            Self::Overlay => 3,
        }
    }

    /// Returns the maximum number of entries in Redis.
    pub(super) fn max_entries(self) -> usize {
        match self {
            Self::Evidence | Self::Polls => 8_192,
            Self::Refusals => 1_024,
            Self::Overlay => 1,
        }
    }
}

/// Builds the names of the keys of one pool. All these keys are in one hash slot of a cluster.
#[derive(Clone, Debug)]
pub(super) struct Keyspace {
    pool: SharedPoolName,
}

impl Keyspace {
    pub(super) fn new(pool: SharedPoolName) -> Self {
        Self { pool }
    }

    fn key(&self, name: &str) -> String {
        self.pool.key_prefix() + name
    }

    /// Returns the channel on which replicas publish changes and demands.
    pub(super) fn channel(&self) -> String {
        self.pool.changes_channel()
    }

    /// Returns the key of the replicas.
    pub(super) fn members(&self) -> String {
        self.key("members")
    }

    /// Returns the key of the leader's id.
    pub(super) fn leader(&self) -> String {
        self.key("leader")
    }

    /// Returns the key of a map of changes.
    pub(super) fn map(&self, map: ChangeMap) -> String {
        self.key(map.as_str())
    }

    /// Returns the key of the credits of a workspace.
    pub(super) fn credits(&self, workspace: SharedId) -> String {
        self.key(&format!("credits:{workspace}"))
    }

    /// Returns the key of the slots of a concurrency group, which has the index `group`, in a workspace.
    pub(super) fn slots(&self, workspace: SharedId, group: usize) -> String {
        self.key(&format!("slots:{workspace}:{group}"))
    }

    /// Returns the key of the slots of a client.
    pub(super) fn client_slots(&self, client: SharedId) -> String {
        self.key(&format!("client:{client}"))
    }

    /// Returns the key of the quota of a client or user, `owner`, in the period that starts at `start_ms`.
    pub(super) fn quota(&self, owner: SharedId, unit: &str, period: &str, start_ms: u64) -> String {
        self.key(&format!("quota:{owner}:{unit}:{period}:{start_ms}"))
    }

    /// Returns the key of the workspace that owns an identifier.
    pub(super) fn owner(&self, identifier: SharedId) -> String {
        self.key(&format!("owner:{identifier}"))
    }

    /// Returns the key of the workspace that last served a list to a client.
    pub(super) fn list_account(&self, client: SharedId) -> String {
        self.key(&format!("list:{client}"))
    }
}

//! Publishes the state of the connection to Redis and the list of replicas for status pages and metrics. The task of
//! the link replaces the published view after each beat and after a lost connection.

use std::sync::Arc;

use arc_swap::ArcSwap;

use super::link_counts::LinkCounts;
use super::members::Membership;
use super::shared_clock::SharedClock;
use crate::policy::units::UnixMs;

/// The state of the connection to Redis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkState {
    /// The first attempt to connect has not ended yet.
    Connecting,
    /// Redis responds, and the replicas share one pool.
    Connected,
    /// There is no connection to Redis, and this replica uses only its part of the pool.
    Alone,
}

impl LinkState {
    /// Returns the text on status pages.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::Connected => "connected",
            Self::Alone => "alone",
        }
    }
}

/// A replica of the pool, as status pages list it.
#[derive(Clone, Debug, PartialEq)]
pub struct ListedReplica {
    /// The random id of the replica, which it keeps in its database.
    pub id: String,
    /// The version of Keychoir that the replica runs.
    pub version: String,
    /// The time at which its process started.
    pub started_at: UnixMs,
    /// The time of its last beat.
    pub last_seen: UnixMs,
    /// Whether the replica counts as running, because its last beat is recent.
    pub is_live: bool,
    /// Whether the replica polls the provider for all replicas.
    pub is_leader: bool,
    /// Whether the entry is about this replica.
    pub is_self: bool,
    /// The replica's part of the slots of all live replicas, from 0 to 1. It is an equal part if no replica has slots,
    /// and 0 for a replica that has ended.
    pub share: f64,
}

/// The connection and the replicas, as this replica knows them.
#[derive(Clone, Debug, PartialEq)]
pub struct PoolView {
    /// The state of the connection to Redis.
    pub link: LinkState,
    /// The replicas in the reply to the last beat, the earliest start first.
    pub replicas: Vec<ListedReplica>,
}

impl PoolView {
    /// Returns the replicas that have not ended.
    pub fn live_replicas(&self) -> impl Iterator<Item = &ListedReplica> {
        self.replicas.iter().filter(|replica| replica.is_live)
    }
}

/// A handle to the current [`PoolView`], and to the counts of the connection. All clones share them.
#[derive(Clone, Debug)]
pub struct SharedPoolView {
    view: Arc<ArcSwap<PoolView>>,
    counts: LinkCounts,
}

impl Default for SharedPoolView {
    fn default() -> Self {
        let view = PoolView { link: LinkState::Connecting, replicas: Vec::new() };
        Self { view: Arc::new(ArcSwap::from_pointee(view)), counts: LinkCounts::default() }
    }
}

impl SharedPoolView {
    /// Returns the current view.
    #[must_use]
    pub fn get(&self) -> Arc<PoolView> {
        self.view.load_full()
    }

    /// Returns the counts of the connection to Redis.
    #[must_use]
    pub fn counts(&self) -> &LinkCounts {
        &self.counts
    }

    /// Replaces the view.
    pub(super) fn set(&self, view: PoolView) {
        self.view.store(Arc::new(view));
    }
}

/// Lists the replicas of a membership for the replica `own_id`. `clock` converts their times to the local clock.
pub(super) fn list_replicas(
    membership: &Membership,
    own_id: &str,
    clock: SharedClock,
    member_ttl_ms: u64,
) -> Vec<ListedReplica> {
    let is_live = |expires_ms: u64| expires_ms > membership.now_ms;
    let live = || membership.members.iter().filter(|member| is_live(member.expires_ms));
    let slots: u64 = live().map(|member| member.description.slots).sum();
    let count = live().count().max(1);
    let mut replicas: Vec<ListedReplica> = membership
        .members
        .iter()
        .map(|member| ListedReplica {
            id: member.id.clone(),
            version: member.description.version.clone(),
            started_at: clock.to_local(member.description.started_ms),
            last_seen: clock.to_local(member.expires_ms.saturating_sub(member_ttl_ms)),
            is_live: is_live(member.expires_ms),
            is_leader: membership.leader == member.id,
            is_self: member.id == own_id,
            share: match (is_live(member.expires_ms), slots) {
                (false, _) => 0.0,
                (true, 0) => 1.0 / to_f64(count as u64),
                (true, slots) => to_f64(member.description.slots) / to_f64(slots),
            },
        })
        .collect();
    replicas.sort_by(|a, b| (a.started_at, &a.id).cmp(&(b.started_at, &b.id)));
    replicas
}

#[expect(clippy::cast_precision_loss, reason = "the counts are far below 2^53")]
fn to_f64(count: u64) -> f64 {
    count as f64
}

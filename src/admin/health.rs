//! Computes the readiness of the process from the states of the keys, the usage store, the mirror, the upstream, the
//! connection to Redis and the shutdown. A load balancer reads the readiness at `/readyz` to decide whether to send
//! requests to the process. Also owns the flag for the start of the shutdown.

use serde::Serialize;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use crate::mirror;
use crate::pool::KeySnapshot;
use crate::shared::{LinkState, PoolView};
use crate::store;
use crate::upstream::Reachability;

/// A flag that is set when the shutdown starts. All clones share it.
#[derive(Clone, Debug, Default)]
pub struct DrainFlag(CancellationToken);

impl DrainFlag {
    /// Marks the start of the shutdown.
    pub fn set(&self) {
        self.0.cancel();
    }

    /// Returns whether the shutdown has started.
    #[must_use]
    pub fn is_set(&self) -> bool {
        self.0.is_cancelled()
    }

    /// Completes at the start of the shutdown.
    pub(super) fn started(&self) -> WaitForCancellationFutureOwned {
        self.0.clone().cancelled_owned()
    }
}

/// The document of `/readyz`. Its status is `ready`, `degraded` (a key can serve requests, but an operator is needed)
/// or `unready` (no key can serve requests, or the shutdown has started).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Readiness {
    status: &'static str,
    /// `ok` if a key can serve requests, or `none usable`.
    keys: &'static str,
    /// `ok` or `failing`.
    store: &'static str,
    /// `ok`, `unreachable`, or `unknown` before the first connection attempt.
    upstream: &'static str,
    /// `yes` or `no`.
    draining: &'static str,
    /// Number of usage records that are not yet written to the disk.
    records_waiting: u64,
    /// Number of usage records that could be neither written nor kept in memory.
    records_lost: u64,
    /// `off`, `ok`, `failing` (retried automatically) or `paused` (an operator is needed).
    mirror: &'static str,
    /// Number of rows that Supabase refuses because of their content.
    mirror_rows_refused: u64,
    /// `off` without `[redis]`, `connecting`, `connected`, or `alone` while Redis does not respond.
    shared: &'static str,
    /// Number of live replicas that share the pool, including this replica.
    replicas: usize,
}

impl Readiness {
    /// Computes the readiness. `shared` is `None` without `[redis]`, and `mirror` without a mirror.
    #[must_use]
    pub fn new(
        keys: &[KeySnapshot],
        store_health: &store::Health,
        mirror: Option<&mirror::MirrorHealth>,
        reachability: Reachability,
        is_draining: bool,
        shared: Option<&PoolView>,
    ) -> Self {
        let is_store_failing = store_health.is_failing();
        let has_key = keys.iter().any(|key| key.state.can_serve());
        let mirror_state = mirror.map(mirror::MirrorHealth::state);
        let needs_operator = is_store_failing
            || mirror_state == Some(mirror::MirrorState::Paused)
            || reachability == Reachability::Unreachable
            || shared.is_some_and(|view| view.link == LinkState::Alone);
        let status = match (has_key && !is_draining, needs_operator) {
            (false, _) => "unready",
            (true, true) => "degraded",
            (true, false) => "ready",
        };
        Self {
            status,
            keys: if has_key { "ok" } else { "none usable" },
            store: if is_store_failing { "failing" } else { "ok" },
            upstream: match reachability {
                Reachability::Unknown => "unknown",
                Reachability::Reachable => "ok",
                Reachability::Unreachable => "unreachable",
            },
            draining: if is_draining { "yes" } else { "no" },
            records_waiting: store_health.unwritten_records(),
            records_lost: store_health.lost_records(),
            mirror: match mirror_state {
                None => "off",
                Some(mirror::MirrorState::Working) => "ok",
                Some(mirror::MirrorState::Failing) => "failing",
                Some(mirror::MirrorState::Paused) => "paused",
            },
            mirror_rows_refused: mirror.map_or(0, mirror::MirrorHealth::refused),
            shared: shared.map_or("off", |view| view.link.as_str()),
            replicas: shared.map_or(1, |view| view.live_replicas().count().max(1)),
        }
    }

    /// Returns `ready`, `degraded` or `unready`.
    pub(super) fn status(&self) -> &'static str {
        self.status
    }

    /// Returns the state of the usage store, as in the document.
    pub(super) fn store(&self) -> &'static str {
        self.store
    }

    /// Returns whether the provider can be reached, as in the document.
    pub(super) fn upstream(&self) -> &'static str {
        self.upstream
    }

    /// Returns the state of the mirror, as in the document.
    pub(super) fn mirror(&self) -> &'static str {
        self.mirror
    }

    /// Returns whether a load balancer should send requests to this process. A degraded process is also ready, because
    /// it still serves requests.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.status != "unready"
    }
}

//! Readiness: whether a load balancer should send requests here.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::Serialize;

use crate::mirror;
use crate::pool::KeySnapshot;
use crate::store;
use crate::upstream::Reach;

/// Set when the shutdown has begun.
#[derive(Clone, Debug, Default)]
pub struct Draining(Arc<AtomicBool>);

impl Draining {
    /// Marks the begin of the shutdown.
    pub fn set(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// Whether the shutdown has begun.
    #[must_use]
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// The document of `/readyz`: `ready`, `degraded` (requests are served, but an operator is needed),
/// or `unready`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Readiness {
    status: &'static str,
    /// `ok`, `none usable`.
    keys: &'static str,
    /// `ok`, `failing`.
    store: &'static str,
    /// `ok`, `unreachable`, or `unknown` before the first connection was tried.
    upstream: &'static str,
    /// `no`, `yes`.
    draining: &'static str,
    /// Usage records not yet written to the disk.
    records_waiting: u64,
    /// Usage records that could be neither written nor kept.
    records_lost: u64,
    /// `off`, `ok`, `failing` (it retries by itself), `paused` (an operator is needed).
    mirror: &'static str,
    /// Rows that Supabase refuses for their content.
    mirror_rows_refused: u64,
}

impl Readiness {
    /// Computes the readiness from the states of the parts.
    #[must_use]
    pub fn of(
        keys: &[KeySnapshot],
        store_health: &store::Health,
        mirror: Option<&mirror::MirrorHealth>,
        reach: Reach,
        is_draining: bool,
    ) -> Self {
        let is_store_failing = store_health.is_failing();
        let has_key = keys.iter().any(|key| key.state.serves());
        let mirror_state = mirror.map(mirror::MirrorHealth::state);
        let needs_hand =
            is_store_failing || mirror_state == Some(mirror::State::Paused) || reach == Reach::Unreachable;
        let status = match (has_key && !is_draining, needs_hand) {
            (false, _) => "unready",
            (true, true) => "degraded",
            (true, false) => "ready",
        };
        Self {
            status,
            keys: if has_key { "ok" } else { "none usable" },
            store: if is_store_failing { "failing" } else { "ok" },
            upstream: match reach {
                Reach::Unknown => "unknown",
                Reach::Reachable => "ok",
                Reach::Unreachable => "unreachable",
            },
            draining: if is_draining { "yes" } else { "no" },
            records_waiting: store_health.waiting(),
            records_lost: store_health.lost(),
            mirror: match mirror_state {
                None => "off",
                Some(mirror::State::Working) => "ok",
                Some(mirror::State::Failing) => "failing",
                Some(mirror::State::Paused) => "paused",
            },
            mirror_rows_refused: mirror.map_or(0, mirror::MirrorHealth::refused),
        }
    }

    /// Whether requests should be sent here: also when degraded, because requests are still served.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.status != "unready"
    }
}

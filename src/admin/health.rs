//! Whether to send requests here.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::Serialize;

use crate::mirror;
use crate::pool::KeySnapshot;
use crate::store;
use crate::upstream::Reach;

/// Set when the program has begun to end.
#[derive(Clone, Debug, Default)]
pub struct Draining(Arc<AtomicBool>);

impl Draining {
    /// Begins it.
    pub fn set(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// Whether it has begun.
    #[must_use]
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// The page `/readyz`: `ready`, `degraded` (requests are served, something needs a hand), or
/// `unready`.
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
    /// Usage records on their way to the disk.
    records_waiting: u64,
    /// Usage records that could be neither written nor held.
    records_lost: u64,
    /// `off`, `ok`, `failing` (it tries again by itself), `paused` (a person must look).
    mirror: &'static str,
    /// Rows that Supabase refuses for what is in them.
    mirror_rows_refused: u64,
}

impl Readiness {
    /// Weighs what is known.
    #[must_use]
    pub fn of(
        keys: &[KeySnapshot],
        books: &store::Health,
        mirror: Option<&mirror::Health>,
        reach: Reach,
        is_draining: bool,
    ) -> Self {
        let is_store_failing = books.is_failing();
        let has_key = keys.iter().any(|key| key.standing.serves());
        let mirror_state = mirror.map(mirror::Health::state);
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
            records_waiting: books.waiting(),
            records_lost: books.lost(),
            mirror: match mirror_state {
                None => "off",
                Some(mirror::State::Working) => "ok",
                Some(mirror::State::Failing) => "failing",
                Some(mirror::State::Paused) => "paused",
            },
            mirror_rows_refused: mirror.map_or(0, mirror::Health::refused),
        }
    }

    /// Whether requests should be sent here: also when degraded, because traffic goes on.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.status != "unready"
    }
}

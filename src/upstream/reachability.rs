//! Records whether the last connection attempt to the configured authority succeeded. All cores and the quota
//! poller share one cell. The polls at startup set the cell before the first request arrives.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

/// The result of the last connection attempt to the configured authority.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reachability {
    /// No connection has been attempted yet.
    Unknown,
    /// The connection was opened.
    Reachable,
    /// The connection could not be opened.
    Unreachable,
}

/// A shared [`Reachability`]. Clones have the same value.
#[derive(Clone, Debug, Default)]
pub struct ReachabilityCell(Arc<AtomicU8>);

impl ReachabilityCell {
    /// Returns the result of the last connection attempt.
    #[must_use]
    pub fn get(&self) -> Reachability {
        match self.0.load(Ordering::Relaxed) {
            1 => Reachability::Reachable,
            2 => Reachability::Unreachable,
            _ => Reachability::Unknown,
        }
    }

    pub(super) fn set(&self, is_open: bool) {
        self.0.store(if is_open { 1 } else { 2 }, Ordering::Relaxed);
    }
}

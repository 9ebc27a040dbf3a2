//! Records whether the last connection attempt to the configured authority succeeded. The clients of all cores and
//! of the quota poller share one cell, so that the polls at startup set it without a request of a client. The health
//! documents report its value.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

/// The result of the last connection attempt to the configured authority.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Reachability {
    /// No connection has been attempted yet.
    Unknown,
    /// The connection was opened.
    Reachable,
    /// The connection could not be opened.
    Unreachable,
}

/// A shared [`Reachability`], which is unknown at first. All clones contain the same value.
#[derive(Clone, Debug, Default)]
pub struct ReachabilityCell(Arc<AtomicU8>);

impl ReachabilityCell {
    /// Returns the result of the last connection attempt.
    #[must_use]
    pub fn get(&self) -> Reachability {
        match self.0.load(Ordering::Relaxed) {
            code if code == Reachability::Reachable as u8 => Reachability::Reachable,
            code if code == Reachability::Unreachable as u8 => Reachability::Unreachable,
            _ => Reachability::Unknown,
        }
    }

    /// Replaces the result of the last connection attempt.
    pub(super) fn set(&self, reachability: Reachability) {
        self.0.store(reachability as u8, Ordering::Relaxed);
    }
}

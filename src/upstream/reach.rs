//! Records whether the last connection attempt to the provider succeeded. One cell is shared by all cores and
//! all senders: the quota polls at the start set it before the first request arrives.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

/// The result of the last connection attempt to the common authority.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// No connection was attempted yet.
    Unknown,
    /// The connection was opened.
    Reachable,
    /// The connection could not be opened.
    Unreachable,
}

/// The shared result; all clones have the same value.
#[derive(Clone, Debug, Default)]
pub struct ReachCell(Arc<AtomicU8>);

impl ReachCell {
    /// The result of the last connection attempt.
    #[must_use]
    pub fn get(&self) -> Reach {
        match self.0.load(Ordering::Relaxed) {
            1 => Reach::Reachable,
            2 => Reach::Unreachable,
            _ => Reach::Unknown,
        }
    }

    pub(super) fn set(&self, is_open: bool) {
        self.0.store(if is_open { 1 } else { 2 }, Ordering::Relaxed);
    }
}

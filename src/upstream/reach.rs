//! Whether connections to the provider can be opened, as the last try has shown. One cell for all
//! cores and all who send: the polls of the start fill it before the first request comes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

/// How the last connection to the common authority went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// None was tried yet.
    Unknown,
    /// It was opened.
    Reachable,
    /// It could not be opened.
    Unreachable,
}

/// Cheap to clone; all clones tell the same.
#[derive(Clone, Debug, Default)]
pub struct ReachCell(Arc<AtomicU8>);

impl ReachCell {
    /// What the last try has shown.
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

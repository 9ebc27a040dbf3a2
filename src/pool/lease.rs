//! The right to ask with a key, for as long as a request needs it.

use std::sync::Arc;

use super::roster::Key;

/// A reserved key. Dropping it releases the key, whatever became of the request.
#[derive(Debug)]
pub struct Lease {
    key: Arc<Key>,
}

impl Lease {
    pub(super) fn new(key: Arc<Key>) -> Self {
        key.enter();
        Self { key }
    }

    /// The key.
    #[must_use]
    pub fn key(&self) -> &Arc<Key> {
        &self.key
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.key.leave();
    }
}

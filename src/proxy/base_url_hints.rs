//! Logs hints about wrong base URLs, each once per client.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};

use tracing::warn;

use crate::elevenlabs::normalize_path::PathFix;
use crate::policy::client::ClientName;

/// The hints that were logged. Bounded by the number of clients and of path fixes.
#[derive(Debug, Default)]
pub(super) struct BaseUrlHints(Mutex<HashSet<(ClientName, PathFix)>>);

impl BaseUrlHints {
    /// Logs the hint, unless it was logged before.
    pub(super) fn log_once(&self, client: &ClientName, mistake: Option<PathFix>) {
        let Some(mistake) = mistake else { return };
        let mut told = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if told.insert((client.clone(), mistake)) {
            let (client, advice) = (client.as_str(), mistake.advice());
            warn!("the client `{client}` asks for paths that are mended: {advice}");
        }
    }
}

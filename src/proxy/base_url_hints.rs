//! Logs advice about a client's wrong base URL, once per client and mistake, so that the log does not repeat
//! the advice for every request.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};

use tracing::warn;

use crate::elevenlabs::normalize_path::PathFix;
use crate::policy::client::ClientName;

/// The advice that was logged. The set is bounded by the number of clients and the number of path fixes.
#[derive(Debug, Default)]
pub(super) struct BaseUrlHints(Mutex<HashSet<(ClientName, PathFix)>>);

impl BaseUrlHints {
    /// Logs the advice for `path_fix`, unless it was logged before.
    pub(super) fn log_once(&self, client: &ClientName, path_fix: Option<PathFix>) {
        let Some(path_fix) = path_fix else { return };
        let mut logged_hints = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if logged_hints.insert((client.clone(), path_fix)) {
            let (client, advice) = (client.as_str(), path_fix.advice());
            warn!("the client `{client}` uses a wrong base URL, and its paths are fixed: {advice}");
        }
    }
}

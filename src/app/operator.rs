//! The parts of the running program that changes of operators use: the stored records and the pause of a key.

use super::RunningApp;
use crate::clock;
use crate::policy::key_state::Pause;
use crate::secret::Fingerprint;
use crate::store;
use crate::telemetry::log_transitions;

impl RunningApp {
    /// Reads stored records, and records changes.
    #[must_use]
    pub fn history(&self) -> store::History {
        self.store_writer.history.clone()
    }

    /// Starts, changes or ends an operator's pause of a key. Returns whether the pool has the key.
    pub fn set_pause(&self, fingerprint: Fingerprint, pause: Option<Pause>) -> bool {
        let transitions = self.pool.set_pause(fingerprint, pause, clock::now());
        transitions.as_deref().map(log_transitions).is_some()
    }
}

//! The parts of the running program that changes of operators use: the reload, the stored records, the events
//! and the pause of a key.

use std::sync::Arc;

use super::start_error::check_exposure;
use super::{AppConfig, RunningApp, UnprotectedListener};
use crate::clock;
use crate::policy::key_state::Pause;
use crate::pool::ReloadSummary;
use crate::proxy::{Limits, RuntimeConfig};
use crate::secret::Fingerprint;
use crate::store;
use crate::telemetry::{EventRing, log_transitions};

impl RunningApp {
    /// Checks that [`reload`](Self::reload) would accept these settings.
    ///
    /// # Errors
    ///
    /// Fails when other machines could use the keys without a token.
    pub fn check_reload(&self, app_config: &AppConfig) -> Result<(), UnprotectedListener> {
        check_exposure(&self.addresses, &app_config.clients)
    }

    /// Applies the keys, clients and limits of `app_config` to new requests, and the certificates to new
    /// connections. Other settings apply only at the next start. Requests in progress keep their settings,
    /// and remaining keys keep their state.
    ///
    /// # Errors
    ///
    /// Fails when other machines could use the keys without a token. In that case, nothing is changed.
    pub fn reload(&self, app_config: AppConfig) -> Result<ReloadSummary, UnprotectedListener> {
        check_exposure(&self.addresses, &app_config.clients)?;
        self.certificates.replace(app_config.https, clock::now());
        let previous = self.config.load();
        let buffers = app_config.proxy.buffers.with_counters_of(&previous.limits.buffers);
        let limits = Limits { buffers, ..app_config.proxy };
        let AppConfig { clients, access_rules, base_path, setting_values, .. } = app_config;
        self.setting_values.store(Arc::new(setting_values));
        let client_usage = previous.client_usage.with_clients(&clients);
        self.config.store(Arc::new(RuntimeConfig { clients, client_usage, limits, access_rules, base_path }));
        let summary = self.pool.reload(app_config.keys, app_config.pool);
        if let Some((sender, polling)) = self.polling_settings.as_ref().zip(app_config.polling) {
            // Sending does not fail, because the poller runs until the program ends.
            let _ = sender.send(polling);
        }
        Ok(summary)
    }

    /// Reads stored records, and records changes.
    #[must_use]
    pub fn history(&self) -> store::History {
        self.store_writer.history.clone()
    }

    /// The events for listeners of the admin API.
    #[must_use]
    pub fn events(&self) -> EventRing {
        self.events.clone()
    }

    /// Starts, changes or ends an operator's pause of a key. Returns whether the pool has the key.
    pub fn set_pause(&self, fingerprint: Fingerprint, pause: Option<Pause>) -> bool {
        let transitions = self.pool.set_pause(fingerprint, pause, clock::now());
        transitions.as_deref().map(log_transitions).is_some()
    }
}

//! Applies a changed configuration to a running Keychoir. Also checks, without a change, whether the configuration
//! would be accepted.

use std::sync::Arc;

use super::start_error::check_exposure;
use super::{AppConfig, RunningApp, UnprotectedListener, to_document};
use crate::clock;
use crate::pool::ReloadSummary;
use crate::proxy::{Limits, RuntimeConfig};
use crate::telemetry::log_transitions;

impl RunningApp {
    /// Checks that [`reload`](Self::reload) would accept these settings.
    ///
    /// # Errors
    ///
    /// Fails when other machines could use the keys without a token.
    pub fn check_reload(&self, app_config: &AppConfig) -> Result<(), UnprotectedListener> {
        check_exposure(&self.addresses, &app_config.clients)
    }

    /// Applies the keys, pauses, clients, access rules, limits and admin token of `app_config` to new requests, the
    /// certificates to new connections, and the settings of the pool and of polling immediately. Other settings apply
    /// only at the next startup, so `app_config` must be made by [`AppConfig::from_reload`]. Requests in progress keep
    /// their settings, and remaining keys keep their state.
    ///
    /// # Errors
    ///
    /// Fails when other machines could use the keys without a token. In that case, nothing is changed.
    pub fn reload(&self, app_config: AppConfig) -> Result<ReloadSummary, UnprotectedListener> {
        check_exposure(&self.addresses, &app_config.clients)?;
        self.certificates.replace(app_config.https, clock::now());
        let previous_config = self.config.load();
        let buffers = app_config.proxy.buffers.with_counters_of(&previous_config.limits.buffers);
        let limits = Limits { buffers, ..app_config.proxy };
        let AppConfig { clients, access_rules, base_path, setting_values, .. } = app_config;
        self.settings.store(Arc::new(to_document(&setting_values)));
        self.admin_token.store(app_config.admin_token.map(Arc::new));
        let client_usage = previous_config.client_usage.with_clients(&clients);
        self.config.store(Arc::new(RuntimeConfig { clients, client_usage, limits, access_rules, base_path }));
        let summary = self.pool.reload(app_config.keys, app_config.pool);
        log_transitions(&self.pool.transitions(clock::now()));
        if let Some((sender, polling)) = self.polling_settings.as_ref().zip(app_config.polling) {
            // Unchanged settings must not wake the poller, because the provider limits the number of polls.
            sender.send_if_modified(|current| {
                let is_changed = *current != polling;
                *current = polling;
                is_changed
            });
        }
        self.pool.request_first_polls();
        Ok(summary)
    }
}

//! Reloads the configuration of the running proxy, on a signal or after a change of its files. An invalid
//! configuration is reported and not applied.

use std::future::pending;
use std::time::Duration;

use tracing::{error, info, warn};

use crate::app::{AppConfig, RunningApp};
use crate::config::{self, Config, FileStamps, LoadedConfig, Overrides};
use crate::telemetry::{LogLevelHandle, keys_loaded_message};

/// Detects changes of the configuration files and applies them.
#[derive(Debug)]
pub(super) struct ConfigReloader {
    overrides: Overrides,
    level: LogLevelHandle,
    /// The configuration at the start. Settings that need a restart keep the values of this configuration.
    start_config: Config,
    /// The metadata of the files at the last load.
    loaded_files: FileStamps,
    /// The metadata of the files at the last check.
    checked_files: FileStamps,
    interval: Duration,
    drain_timeout: Duration,
}

impl ConfigReloader {
    pub(super) fn new(overrides: Overrides, level: LogLevelHandle, loaded: &LoadedConfig) -> Self {
        let LoadedConfig { config, files, .. } = loaded;
        Self {
            overrides,
            level,
            start_config: config.clone(),
            loaded_files: files.clone(),
            checked_files: files.clone(),
            interval: config.server.reload_interval,
            drain_timeout: config.server.drain_timeout,
        }
    }

    /// The timeout for running requests to finish at shutdown.
    pub(super) fn drain_timeout(&self) -> Duration {
        self.drain_timeout
    }

    /// Waits until a file has changed and then stayed unchanged between two checks, so that a
    /// half-written file is not read.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future only delays the next check.
    pub(super) async fn wait_for_change(&mut self) {
        if self.interval.is_zero() {
            return pending().await;
        }
        loop {
            tokio::time::sleep(self.interval).await;
            let files = self.checked_files.read_again();
            if files == self.checked_files && files != self.loaded_files {
                return;
            }
            self.checked_files = files;
        }
    }

    /// Reads all files again and applies the configuration to `app`. Reading blocks this thread briefly, but
    /// not the threads that serve requests.
    pub(super) fn reload(&mut self, app: &RunningApp) {
        // The metadata is recorded before the files are read, so that a change during the read is
        // detected.
        self.loaded_files = self.checked_files.read_again();
        self.checked_files = self.loaded_files.clone();
        match config::load(&self.overrides) {
            Ok(loaded) => {
                if let Err(reason) = self.apply(loaded, app) {
                    log_failure(&reason);
                }
            }
            Err(problems) => {
                for line in problems.to_string().lines() {
                    warn!(event = "reload_problem", "{line}");
                }
                log_failure("it has mistakes");
            }
        }
    }

    /// Applies the configuration. Returns the reason if it cannot be applied.
    fn apply(&mut self, loaded: LoadedConfig, app: &RunningApp) -> Result<(), String> {
        let LoadedConfig { config, warnings, files, .. } = loaded;
        (self.loaded_files, self.checked_files) = (files.clone(), files);
        for warning in &warnings {
            warn!("{warning}");
        }
        let restart_settings = self.start_config.settings_needing_restart(&config);
        let (key_source, clients) = (config.key_source.to_string(), config.clients.len());
        let (interval, drain_timeout) = (config.server.reload_interval, config.server.drain_timeout);
        let log_level = config.log.level.to_string();
        let app_config = AppConfig::from_config(config).map_err(|error| error.to_string())?;
        let summary = app.reload(app_config).map_err(|error| error.to_string())?;
        (self.interval, self.drain_timeout) = (interval, drain_timeout);
        if let Err(error) = self.level.set(&log_level) {
            warn!("{error}");
        }
        if !restart_settings.is_empty() {
            let names = restart_settings.join(", ");
            warn!(
                event = "reload_incomplete",
                settings = names,
                "These settings change only with a restart: {names}"
            );
        }
        let (count, added, removed) = (summary.keys, summary.added, summary.removed);
        let keys_message = keys_loaded_message(count, &key_source);
        info!(
            event = "reloaded",
            keys = count,
            added,
            removed,
            clients,
            "Reloaded: {keys_message}, {added} added, {removed} removed; {clients} client tokens"
        );
        Ok(())
    }
}

fn log_failure(reason: &str) {
    error!(
        event = "reload_failed",
        "The configuration is not reloaded and the previous one stays in use: {reason}"
    );
}

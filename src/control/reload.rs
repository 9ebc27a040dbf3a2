//! Detects changes of the configuration files, applies a loaded configuration to the running server, and logs the
//! reasons if a configuration is not applied or needs a restart.

use std::future::pending;
use std::path::Path;
use std::time::Duration;

use tracing::{error, info, warn};

use crate::admin::control::ControlError;
use crate::app::{AppConfig, RunningApp};
use crate::config::{Config, FileContents, FileStamps, LoadedConfig, StateDirectory};
use crate::telemetry::{LogLevelHandle, keys_loaded_message};

/// Remembers the applied configuration and its files, to detect edits of the files and to apply them.
#[derive(Debug)]
pub struct ConfigReloader {
    /// Sets the minimum level of log lines. It is `None` if the caller did not start the log.
    log_level: Option<LogLevelHandle>,
    /// The configuration at startup. Settings that need a restart keep its values.
    start_config: Config,
    /// The configuration that was applied last.
    applied_config: Config,
    /// The contents of the files at the last load.
    contents: FileContents,
    /// The metadata of the files at the last load.
    loaded_files: FileStamps,
    /// The metadata of the files at the last check.
    checked_files: FileStamps,
    check_interval: Duration,
    drain_timeout: Duration,
}

impl ConfigReloader {
    /// Creates the reloader of a server that was started with the configuration `loaded`.
    #[must_use]
    pub fn new(log_level: Option<LogLevelHandle>, loaded: &LoadedConfig) -> Self {
        let LoadedConfig { config, contents, .. } = loaded;
        let files = contents.stamps();
        Self {
            log_level,
            contents: contents.clone(),
            start_config: config.clone(),
            applied_config: config.clone(),
            loaded_files: files.clone(),
            checked_files: files,
            check_interval: config.server.reload_interval,
            drain_timeout: config.server.drain_timeout,
        }
    }

    /// Returns the contents of the files from which the running configuration was loaded.
    pub(super) fn contents(&self) -> &FileContents {
        &self.contents
    }

    /// Returns the state directory of the running server.
    pub(super) fn state_directory(&self) -> Option<StateDirectory> {
        self.start_config.state_directory()
    }

    /// Returns the maximum time that running requests have to finish at shutdown.
    pub(super) fn drain_timeout(&self) -> Duration {
        self.drain_timeout
    }

    /// Waits until a file has changed since the last load and stayed the same between two checks, so that a
    /// half-written file is not read. Waits forever if the check interval is zero.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future only delays the next check.
    pub(super) async fn wait_for_change(&mut self) {
        if self.check_interval.is_zero() {
            return pending().await;
        }
        loop {
            tokio::time::sleep(self.check_interval).await;
            let files = self.checked_files.read_again();
            if files == self.checked_files && files != self.loaded_files {
                return;
            }
            self.checked_files = files;
        }
    }

    /// Converts a loaded configuration into the settings of each module. Settings that need a restart keep their
    /// values.
    pub(super) fn app_config(&self, loaded: &Config) -> Result<AppConfig, http::Error> {
        AppConfig::from_reload(loaded, &self.start_config)
    }

    /// Returns whether this configuration has the same settings, keys and clients as the applied one.
    pub(super) fn is_applied(&self, config: &Config) -> bool {
        self.applied_config.is_same_as(config)
    }

    /// Records the metadata of the files before they are read, so that a change during the read is detected.
    pub(super) fn mark_as_checked(&mut self) {
        self.loaded_files = self.checked_files.read_again();
        self.checked_files = self.loaded_files.clone();
    }

    /// Records the metadata of the files below `directory`, which were written after the configuration was loaded.
    pub fn mark_as_loaded(&mut self, directory: &Path) {
        self.loaded_files = self.loaded_files.read_again_below(directory);
        self.checked_files = self.loaded_files.clone();
    }

    /// Applies a configuration that [`RunningApp::check_reload`] has accepted. Returns warnings about settings that
    /// need a restart, or the error if the configuration cannot be applied.
    pub(super) fn apply_config(
        &mut self,
        loaded: LoadedConfig,
        app_config: AppConfig,
        app: &RunningApp,
    ) -> Vec<String> {
        let LoadedConfig { config, warnings, contents, .. } = loaded;
        self.loaded_files = contents.stamps();
        self.checked_files = self.loaded_files.clone();
        self.contents = contents;
        for warning in &warnings {
            warn!("{warning}");
        }
        let summary = match app.reload(app_config) {
            Ok(summary) => summary,
            Err(error) => {
                log_reload_failure(&error);
                return vec![error.to_string()];
            }
        };
        (self.check_interval, self.drain_timeout) =
            (config.server.reload_interval, config.server.drain_timeout);
        if let Some(log_level) = &self.log_level
            && let Err(error) = log_level.set(&config.log.level.to_string())
        {
            warn!("{error}");
        }
        let restart_settings = self.start_config.settings_needing_restart(&config);
        let mut restart_warnings = Vec::new();
        if !restart_settings.is_empty() {
            let names = restart_settings.join(", ");
            let message = format!("These settings change only with a restart: {names}");
            warn!(event = "reload_incomplete", settings = names, "{message}");
            restart_warnings.push(message);
        }
        let clients = config.clients.len();
        let (count, added, removed) = (summary.keys, summary.added, summary.removed);
        let keys_message = keys_loaded_message(count, &config.describe_key_sources());
        info!(
            event = "reloaded",
            keys = count,
            added,
            removed,
            clients,
            "Reloaded: {keys_message}, {added} added, {removed} removed; {clients} client tokens"
        );
        self.applied_config = config;
        restart_warnings
    }
}

/// Logs the reason why a configuration is not applied. Each mistake of the configuration gets a line of its own.
pub fn log_reload_error(error: &ControlError) {
    match error {
        // Mistakes of the configuration, each with its position.
        ControlError::Invalid(problems) if problems.ends_with(" in the configuration") => {
            for line in problems.lines() {
                warn!(event = "reload_problem", "{line}");
            }
            log_reload_failure(&"it has mistakes");
        }
        ControlError::Stale { .. }
        | ControlError::Invalid(_)
        | ControlError::NotFound(_)
        | ControlError::AlreadyExists(_)
        | ControlError::LastClient
        | ControlError::GraceNotEnded
        | ControlError::NotPaused(_)
        | ControlError::NoRandomNumbers
        | ControlError::UnreadableOverlay { .. }
        | ControlError::NotManaged(_)
        | ControlError::Unwritable { .. }
        | ControlError::NoStateDirectory
        | ControlError::Unavailable => log_reload_failure(error),
    }
}

fn log_reload_failure(reason: &dyn std::fmt::Display) {
    error!(
        event = "reload_failed",
        "The configuration is not reloaded and the previous one stays in use: {reason}"
    );
}

//! Reloads the configuration at runtime, on a signal or after a change of its files. An invalid
//! configuration is reported and not applied.

use std::future::pending;
use std::time::Duration;

use tracing::{error, info, warn};

use crate::app::{AppConfig, Running};
use crate::config::{self, Config, Files, Loaded, Overrides};
use crate::telemetry::{Level, keys_loaded};

/// The state of the reloads.
#[derive(Debug)]
pub(super) struct Reloading {
    overrides: Overrides,
    level: Level,
    /// The configuration at the start. Settings that need a restart keep its values.
    started: Config,
    /// The metadata of the files at the last load.
    read: Files,
    /// The metadata of the files at the last check.
    checked: Files,
    interval: Duration,
    drain_timeout: Duration,
}

impl Reloading {
    pub(super) fn new(overrides: Overrides, level: Level, loaded: &Loaded) -> Self {
        let Loaded { config, files, .. } = loaded;
        Self {
            overrides,
            level,
            started: config.clone(),
            read: files.clone(),
            checked: files.clone(),
            interval: config.server.reload_interval,
            drain_timeout: config.server.drain_timeout,
        }
    }

    /// The drain timeout, in which running requests may finish at shutdown.
    pub(super) fn drain_timeout(&self) -> Duration {
        self.drain_timeout
    }

    /// Waits until a file has changed and then stayed unchanged between two checks, so that no
    /// half-written file is read.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future only delays the next check.
    pub(super) async fn changed(&mut self) {
        if self.interval.is_zero() {
            return pending().await;
        }
        loop {
            tokio::time::sleep(self.interval).await;
            let now = self.checked.now();
            if now == self.checked && now != self.read {
                return;
            }
            self.checked = now;
        }
    }

    /// Reads all files again and applies the configuration to `running`. Reading blocks this thread
    /// for a short time; other threads serve the requests.
    pub(super) fn reload(&mut self, running: &Running) {
        // The metadata is recorded before the files are read, so that a change during the read is
        // detected.
        self.read = self.checked.now();
        self.checked = self.read.clone();
        match config::load(&self.overrides) {
            Ok(loaded) => self.apply(loaded, running),
            Err(problems) => {
                let text = problems.to_string();
                for line in text.lines() {
                    warn!(event = "reload_problem", "{line}");
                }
                not_reloaded("it has mistakes");
            }
        }
    }

    fn apply(&mut self, loaded: Loaded, running: &Running) {
        let Loaded { config, warnings, files, .. } = loaded;
        (self.read, self.checked) = (files.clone(), files);
        for warning in &warnings {
            warn!("{warning}");
        }
        let restart_settings = self.started.needs_restart(&config);
        let (source, clients) = (config.key_source.to_string(), config.clients.len());
        let (interval, drain_timeout) = (config.server.reload_interval, config.server.drain_timeout);
        let level = config.log.level.to_string();
        let reloaded = match AppConfig::of(config) {
            Ok(settings) => running.reload(settings),
            Err(error) => return not_reloaded(&error.to_string()),
        };
        let reloaded = match reloaded {
            Ok(reloaded) => reloaded,
            Err(exposed) => return not_reloaded(&exposed.to_string()),
        };
        (self.interval, self.drain_timeout) = (interval, drain_timeout);
        if let Err(error) = self.level.set(&level) {
            warn!("{error}");
        }
        if !restart_settings.is_empty() {
            let names = restart_settings.join(", ");
            warn!(event = "reload_incomplete", settings = names, "Only a restart changes {names}");
        }
        let (count, added, removed) = (reloaded.keys, reloaded.added, reloaded.removed);
        let text = keys_loaded(count, &source);
        info!(
            event = "reloaded",
            keys = count,
            added,
            removed,
            clients,
            "Reloaded: {text}, {added} added, {removed} removed; {clients} client tokens"
        );
    }
}

fn not_reloaded(reason: &str) {
    error!(
        event = "reload_failed",
        "The configuration is not reloaded, and the previous one stays in use: {reason}"
    );
}

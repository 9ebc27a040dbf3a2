//! Reloads the configuration at runtime: on a signal, or when one of its files has changed. An
//! invalid configuration changes nothing.

use std::future::pending;
use std::time::Duration;

use tracing::{error, info, warn};

use crate::app::{AppConfig, Running};
use crate::config::{self, Config, Files, Loaded, Overrides};
use crate::telemetry::{Level, keys_loaded};

/// The state for reloads.
#[derive(Debug)]
pub(super) struct Reloading {
    overrides: Overrides,
    level: Level,
    /// The configuration of the start, which still applies to settings that need a restart.
    started: Config,
    /// The state of the files when they were last read.
    read: Files,
    /// The state of the files when they were last checked.
    checked: Files,
    interval: Duration,
    grace: Duration,
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
            grace: config.server.drain_timeout,
        }
    }

    /// The drain timeout: how long requests may take to finish at shutdown.
    pub(super) fn grace(&self) -> Duration {
        self.grace
    }

    /// Waits until a file has changed and is then unchanged between two checks, so that no file is
    /// read while it is written.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future delays the next check and loses nothing.
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
    /// for a moment; traffic runs on other threads.
    pub(super) fn reload(&mut self, running: &Running) {
        // A change during the reading is detected as a later change.
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
        let (interval, grace) = (config.server.reload_interval, config.server.drain_timeout);
        let level = config.log.level.to_string();
        let reloaded = match AppConfig::of(config) {
            Ok(settings) => running.reload(settings),
            Err(error) => return not_reloaded(&error.to_string()),
        };
        let reloaded = match reloaded {
            Ok(reloaded) => reloaded,
            Err(exposed) => return not_reloaded(&exposed.to_string()),
        };
        (self.interval, self.grace) = (interval, grace);
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

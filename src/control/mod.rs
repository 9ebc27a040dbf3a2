//! Makes the changes of operators: of keys, of clients and of the configuration.
//!
//! [`Controller`] is the only owner of the overlay and of the running configuration. `serve` runs it in its main
//! loop, and the command line runs it without a running program. Each change is made in this order: lock the
//! overlay, compare the generation, edit the overlay, load the whole configuration as it would be, write the
//! files, apply the configuration to the running program, and record the change. A failure before the files are
//! written changes nothing.

mod admin_token;
mod edit;
mod recorder;
mod reload;

#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustls::crypto::ring::default_provider;
use serde_json::json;
use tracing::{info, warn};

pub use admin_token::NewAdminToken;
pub use recorder::{ChangeRecorder, RecordFuture, record_in, record_offline, record_unrecorded_changes};
pub use reload::{ConfigReloader, log_reload_error};

use edit::{Edit, EditSummary, KeyFile};

use crate::admin::control::{Actor, Change, ChangeOrigin, ChangeReceipt, ControlError, ControlRequest};
use crate::app::{AppConfig, RunningApp};
use crate::clock;
use crate::config::{
    self, Config, FileContents, KEYS_DIRECTORY, KeyRequirement, LoadedConfig, LockError, Overlay, Overrides,
    StateDirectory, StateLocation, StateLock,
};
use crate::store::StoredChange;

/// The action of a reload in the record of changes.
const RELOADED: &str = "reloaded";

/// Maximum wait for another process that is changing the overlay, which takes milliseconds.
const LOCK_TIMEOUT: Duration = Duration::from_secs(5);

/// Interval between two attempts to lock the overlay.
const LOCK_RETRY_INTERVAL: Duration = Duration::from_millis(20);

/// Makes the changes of operators.
pub struct Controller {
    overrides: Overrides,
    /// Applies configurations to the running program. `None` if no program runs.
    reloader: Option<Box<ConfigReloader>>,
    /// The current generation, which the admin API reads.
    generation: Arc<AtomicU64>,
    recorder: ChangeRecorder,
    /// The step after which a test stops a change, as a crash would.
    #[cfg(test)]
    stop_after: Option<Step>,
}

/// The steps of a change that write files.
#[cfg(test)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    KeyWritten,
    OverlaySaved,
}

impl std::fmt::Debug for Controller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Controller").field("generation", &self.generation).finish_non_exhaustive()
    }
}

impl Controller {
    /// Creates the controller of the running program, whose configuration `reloader` applies. `generation` is
    /// that of the loaded configuration.
    #[must_use]
    pub fn new(
        overrides: Overrides,
        reloader: ConfigReloader,
        generation: Arc<AtomicU64>,
        recorder: ChangeRecorder,
    ) -> Self {
        let state_location = StateLocation::Fixed(reloader.state_directory());
        Self {
            overrides: Overrides { state_location, ..overrides },
            reloader: Some(Box::new(reloader)),
            generation,
            recorder,
            #[cfg(test)]
            stop_after: None,
        }
    }

    /// Creates a controller without a running program. Its changes apply at the next startup.
    #[must_use]
    pub fn offline(overrides: Overrides, recorder: ChangeRecorder) -> Self {
        Self {
            overrides,
            reloader: None,
            generation: Arc::default(),
            recorder,
            #[cfg(test)]
            stop_after: None,
        }
    }

    /// Waits until a configuration file has changed.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future only delays the next check.
    pub async fn wait_for_change(&mut self) {
        match &mut self.reloader {
            Some(reloader) => reloader.wait_for_change().await,
            None => std::future::pending().await,
        }
    }

    /// Returns the timeout for running requests to finish at shutdown.
    #[must_use]
    pub fn drain_timeout(&self) -> Duration {
        self.reloader.as_ref().map_or(Duration::ZERO, |reloader| reloader.drain_timeout())
    }

    /// Makes the change of a request and sends the result. A change whose caller has stopped waiting is not made,
    /// because its new token would be lost.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future before the files are written cancels the change. Afterwards it only drops the response,
    /// and possibly the record of the change.
    pub async fn handle(&mut self, request: ControlRequest, app: &RunningApp) {
        let ControlRequest { change, expected_generation, origin, respond } = request;
        if respond.is_closed() {
            return;
        }
        let result = Box::pin(self.make(change, expected_generation, origin, Some(app))).await;
        // Fails if the caller has stopped waiting, which does not undo the change.
        let _ = respond.send(result);
    }

    /// Makes a change and applies it to `app`, or only saves it without a running program.
    ///
    /// # Errors
    ///
    /// Fails when the change is not made. The state is then unchanged.
    pub async fn make(
        &mut self,
        change: Change,
        expected_generation: Option<u64>,
        origin: ChangeOrigin,
        app: Option<&RunningApp>,
    ) -> Result<ChangeReceipt, ControlError> {
        if let Change::Reload = change {
            return self.reload(expected_generation, origin, app).await;
        }
        let directory = self.state_directory()?.ok_or(ControlError::NoStateDirectory)?;
        let lock = self.lock(&directory).await?;
        // The configuration is loaded under the lock, because another process may have changed the overlay before.
        let current = self.load_current()?.config;
        let overlay = read_overlay(&lock, &directory)?;
        self.check_generation(overlay.generation, expected_generation)?;
        let token = generate_token("kc_").ok_or(ControlError::NoRandomNumbers)?;
        let edit = edit::edit(change, overlay, &current, clock::now(), token)?;
        self.commit(edit, &lock, &directory, origin, app).await
    }

    /// Validates, saves, applies and records an edit of the overlay.
    async fn commit(
        &mut self,
        edit: Edit,
        lock: &StateLock<'_>,
        directory: &StateDirectory,
        origin: ChangeOrigin,
        app: Option<&RunningApp>,
    ) -> Result<ChangeReceipt, ControlError> {
        let Edit { mut overlay, new_key, summary } = edit;
        overlay.generation = overlay.generation.max(self.generation.load(Ordering::Acquire)) + 1;
        let generation = overlay.generation;
        let text = overlay.format().map_err(ControlError::Invalid)?;
        let mut files = vec![(directory.overlay_path(), text.clone())];
        files.extend(
            new_key.iter().map(|file| (directory.key_path(&file.name), file.key.expose().to_owned())),
        );
        let (loaded, app_config) = self.load_next(&files, &self.kept_contents(directory), app)?;

        let unwritable = |error: config::FileError| unwritable(directory, error.source.to_string());
        if let Some(KeyFile { name, key }) = &new_key {
            lock.write_key(name, key).map_err(unwritable)?;
            #[cfg(test)]
            self.check_stop(Step::KeyWritten)?;
        }
        if let Err(error) = lock.save(&text) {
            // The overlay does not name the new key file. If the file cannot be deleted, the next change deletes
            // it.
            if let Ok(previous) = lock.read() {
                let _ = lock.delete_orphaned_key_files(&previous);
            }
            return Err(unwritable(error));
        }
        #[cfg(test)]
        self.check_stop(Step::OverlaySaved)?;
        delete_orphaned_key_files(lock, &overlay);

        let EditSummary { action, target, detail, key_id, token, mut warnings } = summary;
        if let Some((reloader, app)) = self.reloader.as_mut().zip(app) {
            reloader.apply(loaded, app_config, app);
            reloader.mark_as_loaded(directory.path());
        } else {
            let path = directory.overlay_path();
            warnings.push(format!(
                "no server responds: the change is in {} and applies at the next start",
                path.display()
            ));
        }
        // The generation is stored after the configuration is applied, so that no reader gets the new generation with
        // an earlier configuration.
        self.generation.store(generation, Ordering::Release);
        self.record(origin, action, Some(target), &detail, generation).await;
        Ok(ChangeReceipt { generation, key_id, token, warnings })
    }

    /// Reads the configuration files again and applies them.
    async fn reload(
        &mut self,
        expected_generation: Option<u64>,
        origin: ChangeOrigin,
        app: Option<&RunningApp>,
    ) -> Result<ChangeReceipt, ControlError> {
        let actor = origin.actor;
        if let Some(reloader) = &mut self.reloader {
            reloader.mark_as_checked();
        }
        let (loaded, app_config) = self.load_next(&[], &FileContents::default(), app)?;
        let saved = loaded.config.generation;
        let current = self.generation.load(Ordering::Acquire);
        self.check_generation(saved, expected_generation)?;
        let is_changed = self.reloader.as_ref().is_some_and(|reloader| !reloader.is_applied(&loaded.config));
        // A higher saved generation includes this change, which another process made.
        let generation = if is_changed && saved <= current { current + 1 } else { saved.max(current) };
        let directory = self.state_directory()?;
        let mut warnings: Vec<String> = loaded.warnings.iter().map(ToString::to_string).collect();
        if let Some((reloader, app)) = self.reloader.as_mut().zip(app) {
            warnings.extend(reloader.apply(loaded, app_config, app));
        }
        self.generation.store(generation, Ordering::Release);
        if is_changed || actor != Actor::Reload {
            self.record(origin, RELOADED, None, &json!({"changed": is_changed}), generation).await;
        }
        if let Some(directory) = directory.filter(|_| generation > saved && is_changed) {
            self.save_generation(&directory, generation).await;
        }
        Ok(ChangeReceipt { generation, key_id: None, token: None, warnings })
    }

    /// Saves the generation of a reload. If the overlay cannot be written, the generation is only in memory.
    async fn save_generation(&mut self, directory: &StateDirectory, generation: u64) {
        let save = async {
            let lock = self.lock(directory).await?;
            let mut overlay = read_overlay(&lock, directory)?;
            overlay.generation = overlay.generation.max(generation);
            let text = overlay.format().map_err(ControlError::Invalid)?;
            lock.save(&text).map_err(|error| unwritable(directory, error.source.to_string()))
        };
        if let Err(error) = save.await {
            warn!(event = "generation_not_saved", "The generation {generation} cannot be saved: {error}");
        }
        if let Some(reloader) = &mut self.reloader {
            reloader.mark_as_loaded(directory.path());
        }
    }

    /// Returns the state directory of the running program, or the configured one without a running program.
    fn state_directory(&self) -> Result<Option<StateDirectory>, ControlError> {
        match &self.reloader {
            Some(reloader) => Ok(reloader.state_directory()),
            None => Ok(self.load_current()?.config.state_directory()),
        }
    }

    /// Returns the files outside of the state directory as they were when the running configuration was loaded. Edits
    /// of those files apply with the next reload, and not with a change.
    fn kept_contents(&self, directory: &StateDirectory) -> FileContents {
        let mut contents =
            self.reloader.as_ref().map(|reloader| reloader.contents().clone()).unwrap_or_default();
        contents.forget_below(directory.path());
        contents
    }

    /// Loads the configuration before the change, which may be the first key or client.
    fn load_current(&self) -> Result<LoadedConfig, ControlError> {
        let overrides = Overrides {
            key_requirement: KeyRequirement::Optional,
            allows_exposure: true,
            ..self.overrides.clone()
        };
        let directory = self.reloader.as_ref().and_then(|reloader| reloader.state_directory());
        let kept = directory.map(|directory| self.kept_contents(&directory)).unwrap_or_default();
        config::load_with_files(&overrides, &[], &kept)
            .map_err(|problems| ControlError::Invalid(problems.to_string()))
    }

    /// Loads the configuration as it would be with these files, and checks that it can be applied to `app`. Files
    /// in `kept` are not read again.
    fn load_next(
        &self,
        files: &[(PathBuf, String)],
        kept: &FileContents,
        app: Option<&RunningApp>,
    ) -> Result<(LoadedConfig, AppConfig), ControlError> {
        let invalid = |error: &dyn std::fmt::Display| ControlError::Invalid(error.to_string());
        let loaded =
            config::load_with_files(&self.overrides, files, kept).map_err(|error| invalid(&error))?;
        let app_config = match &self.reloader {
            Some(reloader) => reloader.app_config(&loaded.config),
            None => AppConfig::from_config(loaded.config.clone()),
        };
        let app_config = app_config.map_err(|error| invalid(&error))?;
        if let Some(app) = app {
            app.check_reload(&app_config).map_err(|error| invalid(&error))?;
        }
        Ok((loaded, app_config))
    }

    /// Compares the generation that the caller has read with the current one.
    fn check_generation(&self, saved: u64, expected: Option<u64>) -> Result<(), ControlError> {
        let current = saved.max(self.generation.load(Ordering::Acquire));
        match expected {
            Some(expected) if expected != current => Err(ControlError::Stale { current }),
            Some(_) | None => Ok(()),
        }
    }

    /// Locks the overlay. Waits for another process that is changing it.
    async fn lock<'a>(&self, directory: &'a StateDirectory) -> Result<StateLock<'a>, ControlError> {
        let acquire_lock = async {
            loop {
                match directory.try_lock() {
                    Ok(lock) => return Ok(lock),
                    Err(LockError::Held) => tokio::time::sleep(LOCK_RETRY_INTERVAL).await,
                    Err(LockError::File(error)) => {
                        return Err(unwritable(directory, error.source.to_string()));
                    }
                }
            }
        };
        match tokio::time::timeout(LOCK_TIMEOUT, acquire_lock).await {
            Ok(result) => result,
            Err(_) => Err(unwritable(directory, LockError::Held.to_string())),
        }
    }

    async fn record(
        &self,
        origin: ChangeOrigin,
        action: &'static str,
        target: Option<String>,
        detail: &serde_json::Value,
        generation: u64,
    ) {
        let ChangeOrigin { actor, address } = origin;
        // A reload has a log line of its own.
        if let Some(target) = &target {
            let by = actor.as_str();
            info!(event = "changed", action, target, by, generation, "Changed by {by}: {action} {target}");
        }
        let at = clock::now();
        (self.recorder)(StoredChange {
            id: StoredChange::new_id(at),
            at,
            actor: actor.as_str().to_owned(),
            address: address.map(|address| address.to_string()),
            action: action.to_owned(),
            target,
            detail: detail.to_string(),
            generation,
        })
        .await;
    }

    /// Aborts a change at the step that a test has set, as a crash would.
    #[cfg(test)]
    fn check_stop(&self, step: Step) -> Result<(), ControlError> {
        if self.stop_after == Some(step) { Err(ControlError::Unavailable) } else { Ok(()) }
    }
}

fn unwritable(directory: &StateDirectory, reason: String) -> ControlError {
    ControlError::Unwritable { directory: directory.path().display().to_string(), reason }
}

/// Deletes the key files that an interrupted change left in the state directory. Startup calls it.
pub fn delete_leftover_key_files(config: &Config) {
    let has_keys = |directory: &StateDirectory| directory.path().join(KEYS_DIRECTORY).exists();
    let Some(directory) = config.state_directory().filter(has_keys) else { return };
    // If another process holds the lock, its change deletes the files.
    if let Ok(lock) = directory.try_lock()
        && let Ok(overlay) = lock.read()
    {
        delete_orphaned_key_files(&lock, &overlay);
    }
}

fn delete_orphaned_key_files(lock: &StateLock<'_>, overlay: &Overlay) {
    if let Err(error) = lock.delete_orphaned_key_files(overlay) {
        warn!(event = "key_file_not_deleted", "The file of a removed key cannot be deleted: {error}");
    }
}

fn read_overlay(lock: &StateLock<'_>, directory: &StateDirectory) -> Result<Overlay, ControlError> {
    lock.read().map_err(|error| ControlError::UnreadableOverlay {
        path: directory.overlay_path().display().to_string(),
        reason: error.source.to_string(),
    })
}

/// Generates a token of 192 random bits. Its prefix lets operators and secret scanners recognize it. Returns
/// `None` if the system provides no random numbers.
fn generate_token(prefix: &str) -> Option<String> {
    let mut bytes = [0_u8; 24];
    default_provider().secure_random.fill(&mut bytes).ok()?;
    let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    Some(format!("{prefix}{digits}"))
}

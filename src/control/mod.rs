//! Makes the changes of operators to keys, clients and the configuration, and merges the changes of other replicas.
//! Also detects changes of the configuration files, and generates the admin token at the first startup.
//!
//! [`Controller`] is the only type that writes the overlay and applies a configuration to the running server. `serve`
//! runs it in its main loop, and the command line runs it without a running server. It makes each change in this
//! order: lock the overlay, compare the generation (a number that increases with each change), edit the overlay, load
//! the whole configuration as it would be, write the files, apply the configuration to the running server, publish the
//! overlay to the other replicas, and record the change. A failure before the last file is written changes nothing. A
//! reload edits no entry of the overlay. It reads the files again, and applies and records the changed settings.

mod admin_token;
mod document;
mod edit;
mod files;
mod left_out;
mod load;
mod merge;
mod overlay_state;
mod recorder;
mod reload;

#[cfg(test)]
mod tests;

use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::time::sleep_until;
use tracing::{info, warn};

pub use admin_token::{NewAdminToken, SaveTokenError};
pub use files::delete_leftover_key_files;
pub use recorder::{
    ChangeRecorder, RecordFuture, create_offline_recorder, create_recorder, record_unrecorded_changes,
};
pub use reload::{ConfigReloader, log_reload_error};

use edit::{Edit, EditSummary};
use files::{next_files, overlay_read_error, state_write_error};
use overlay_state::OverlayState;

use crate::admin::control::{Actor, Change, ChangeOrigin, ChangeReceipt, ControlError, ControlRequest};
use crate::app::RunningApp;
use crate::clock;
use crate::config::{FileContents, LockError, Overrides, StateDirectory, StateLocation, StateLock};
use crate::secret::{ApiKey, generate_token};
use crate::shared::{OverlayExchange, SealedOverlay};
use crate::store::StoredChange;

/// The action that the record of a reload contains.
const RELOADED: &str = "reloaded";

/// Maximum wait for the lock while another process changes the overlay. A change takes milliseconds.
const LOCK_TIMEOUT: Duration = Duration::from_secs(5);

/// Interval between two attempts to lock the overlay.
const LOCK_RETRY_INTERVAL: Duration = Duration::from_millis(20);

/// Writes the overlay, applies configurations to the running server, and records each change.
pub struct Controller {
    overrides: Overrides,
    /// Applies configurations to the running server. It is `None` if no server runs.
    reloader: Option<Box<ConfigReloader>>,
    /// The current generation, which the admin API reads.
    generation: Arc<AtomicU64>,
    recorder: ChangeRecorder,
    /// Publishes the overlay and receives the overlays of other replicas. It is `None` if the overlay is not shared.
    exchange: Option<OverlayExchange>,
    /// The reason of the last failed merge, which was logged. A successful merge resets it to `None`.
    merge_failure: Option<String>,
    /// The last overlay of another replica that could not be merged, and the time of the next attempt.
    unmerged: Option<(SealedOverlay, Instant)>,
    /// The step after which a test stops a change, as a crash would.
    #[cfg(test)]
    stop_after: Option<ChangeStep>,
}

/// An event that the controller waits for.
#[derive(Debug)]
pub enum ControllerEvent {
    /// A configuration file has changed: make [`Change::Reload`].
    FilesChanged,
    /// An overlay of another replica has arrived, or its merge is due again: call [`Controller::merge_overlay`].
    OverlayReceived(SealedOverlay),
}

/// The steps of a change after which a test can stop it.
#[cfg(test)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ChangeStep {
    KeyFilesWritten,
    OverlaySaved,
}

impl std::fmt::Debug for Controller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Controller").field("generation", &self.generation).finish_non_exhaustive()
    }
}

impl Controller {
    /// Creates the controller of the running server, whose configuration `reloader` applies. `generation` is
    /// the value of the loaded configuration.
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
            exchange: None,
            merge_failure: None,
            unmerged: None,
            #[cfg(test)]
            stop_after: None,
        }
    }

    /// Creates a controller without a running server. Its changes apply at the next startup.
    #[must_use]
    pub fn offline(overrides: Overrides, recorder: ChangeRecorder) -> Self {
        Self {
            overrides,
            reloader: None,
            generation: Arc::default(),
            recorder,
            exchange: None,
            merge_failure: None,
            unmerged: None,
            #[cfg(test)]
            stop_after: None,
        }
    }

    /// Waits until a configuration file has changed, an overlay of another replica arrives, or the next attempt to
    /// merge such an overlay is due.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future only delays the next check. No overlay is lost.
    pub async fn next_event(&mut self) -> ControllerEvent {
        let Self { reloader, exchange, unmerged, .. } = self;
        let files_changed = async {
            match reloader {
                Some(reloader) => reloader.wait_for_change().await,
                None => pending().await,
            }
        };
        let overlay_received = async {
            match exchange {
                Some(exchange) => exchange.incoming.recv().await,
                None => pending().await,
            }
        };
        let retry_due = async {
            match unmerged {
                Some((overlay, next_attempt)) => {
                    sleep_until((*next_attempt).into()).await;
                    overlay.clone()
                }
                None => pending().await,
            }
        };
        tokio::select! {
            () = files_changed => ControllerEvent::FilesChanged,
            Some(overlay) = overlay_received => ControllerEvent::OverlayReceived(overlay),
            overlay = retry_due => ControllerEvent::OverlayReceived(overlay),
        }
    }

    /// Returns the maximum time that running requests have to finish at shutdown.
    #[must_use]
    pub fn drain_timeout(&self) -> Duration {
        self.reloader.as_ref().map_or(Duration::ZERO, |reloader| reloader.drain_timeout())
    }

    /// Makes the change that a request contains, and sends the receipt or the error to the caller. A change whose
    /// caller has stopped waiting is not made, because its new token would be lost.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future before the files are written cancels the change. Afterwards it only drops the response,
    /// and possibly the record of the change.
    pub async fn answer_request(&mut self, request: ControlRequest, app: &RunningApp) {
        let ControlRequest { change, expected_generation, origin, respond } = request;
        if respond.is_closed() {
            return;
        }
        let receipt = Box::pin(self.make(change, expected_generation, origin, Some(app))).await;
        // Sending fails if the caller has stopped waiting, which does not undo the change.
        let _ = respond.send(receipt);
    }

    /// Makes a change and applies it to `app`. If `app` is `None`, the change is only saved.
    ///
    /// # Errors
    ///
    /// Fails when the change is not made. The overlay and the running configuration are then unchanged.
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
        // The configuration is loaded under the lock, because another process may have changed the overlay since the
        // last load.
        let current = self.load_current()?.config;
        let overlay = lock.read().map_err(|error| overlay_read_error(&error))?;
        self.check_generation(overlay.generation, expected_generation)?;
        let token = generate_token("kc_").ok_or(ControlError::NoRandomNumbers)?;
        let mut secrets = lock.read_keys(&overlay).map_err(|error| overlay_read_error(&error))?;
        let previous_state = OverlayState::new(&overlay, &secrets);
        let now = clock::now();
        let mut edit = edit::edit_overlay(change, overlay, &current, now, token)?;
        secrets.extend(
            edit.new_keys.iter().map(|file| (overlay_state::key_file_path(&file.name), file.key.clone())),
        );
        let mut state = OverlayState::new(&edit.overlay, &secrets);
        state.stamp_changes(&previous_state, now);
        state.forget_old(now);
        // No key file is added here, because the edited overlay has an entry for each new key.
        state.write_to(&mut edit.overlay, &secrets);
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
        let Edit { mut overlay, new_keys, summary } = edit;
        overlay.generation = overlay.generation.max(self.generation.load(Ordering::Acquire)) + 1;
        let generation = overlay.generation;
        let overlay_text = overlay.format().map_err(ControlError::Invalid)?;
        let files = next_files(directory, &overlay_text, &new_keys);
        let (loaded, app_config) = self.load_next(&files, &self.kept_contents(directory), app)?;
        self.save_files(lock, directory, &new_keys, &overlay, &overlay_text)?;

        let keys: Vec<ApiKey> = loaded.config.keys.iter().map(|key| key.key.clone()).collect();
        let EditSummary { action, target, detail, key_id, token, mut warnings } = summary;
        if let Some((reloader, app)) = self.reloader.as_mut().zip(app) {
            reloader.apply_config(loaded, app_config, app);
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
        self.publish(lock, &overlay, &keys);
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
        let saved_generation = loaded.config.generation;
        let current = self.generation.load(Ordering::Acquire);
        self.check_generation(saved_generation, expected_generation)?;
        let is_changed = self.reloader.as_ref().is_some_and(|reloader| !reloader.is_applied(&loaded.config));
        // If the saved generation is higher, another process has made this change and counted it.
        let generation = if is_changed && saved_generation <= current {
            current + 1
        } else {
            saved_generation.max(current)
        };
        let directory = self.state_directory()?;
        let mut warnings: Vec<String> = loaded.warnings.iter().map(ToString::to_string).collect();
        if let Some((reloader, app)) = self.reloader.as_mut().zip(app) {
            warnings.extend(reloader.apply_config(loaded, app_config, app));
        }
        self.generation.store(generation, Ordering::Release);
        if is_changed || actor != Actor::Reload {
            self.record(origin, RELOADED, None, &json!({"changed": is_changed}), generation).await;
        }
        if let Some(directory) = directory.filter(|_| generation > saved_generation && is_changed) {
            self.save_generation(&directory, generation).await;
        }
        if is_changed {
            // The reload may have changed the overlay, or the keys with which the published overlay is encrypted.
            Box::pin(self.share_again(app)).await;
        }
        Ok(ChangeReceipt { generation, key_id: None, token: None, warnings })
    }

    /// Saves the generation of a reload in the overlay. A failure is logged, and the generation is then kept only in
    /// memory.
    async fn save_generation(&mut self, directory: &StateDirectory, generation: u64) {
        let save = async {
            let lock = self.lock(directory).await?;
            let mut overlay = lock.read().map_err(|error| overlay_read_error(&error))?;
            overlay.generation = overlay.generation.max(generation);
            let overlay_text = overlay.format().map_err(ControlError::Invalid)?;
            lock.save(&overlay_text).map_err(|error| state_write_error(directory, error.source.to_string()))
        };
        if let Err(error) = save.await {
            warn!(
                event = "generation_not_saved",
                "The generation {generation} cannot be saved in the overlay: {error}"
            );
        }
        if let Some(reloader) = &mut self.reloader {
            reloader.mark_as_loaded(directory.path());
        }
    }

    /// Refuses a change if the generation that its caller has read is not the current one.
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
                        return Err(state_write_error(directory, error.source.to_string()));
                    }
                }
            }
        };
        match tokio::time::timeout(LOCK_TIMEOUT, acquire_lock).await {
            Ok(lock_result) => lock_result,
            Err(_) => Err(state_write_error(directory, LockError::Held.to_string())),
        }
    }

    /// Records a change, and logs it if it has a target.
    async fn record(
        &self,
        origin: ChangeOrigin,
        action: &'static str,
        target: Option<String>,
        detail: &serde_json::Value,
        generation: u64,
    ) {
        let ChangeOrigin { actor, address } = origin;
        // A reload and a merge have no target. They are logged where they are applied.
        if let Some(target) = &target {
            let actor_name = actor.as_str();
            info!(
                event = "changed",
                action, target, actor_name, generation, "{actor_name} made the change {action} to {target}"
            );
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
}

//! Shares the overlay with other replicas: encrypts and publishes it after each change, and merges the overlays of
//! other replicas.
//!
//! A merged overlay is saved and applied like a change of an operator, so that it survives a restart without Redis.
//! An overlay that cannot be merged changes nothing. The reason is logged once, and the merge is tried again at
//! intervals. An entry that conflicts with the configuration of this machine is saved and shared, but not applied until
//! the conflict has ended.

use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::json;
use tracing::{info, warn};

use super::Controller;
use super::document::{DocumentError, OverlayDocument};
use super::edit::KeyFile;
use super::files::{next_files, overlay_read_error};
use super::left_out::{LeftOutEntry, leave_out_conflicting_clients, leave_out_invalid};
use super::overlay_state::{ChangedNames, KeySecrets, OverlayState};
use crate::admin::control::{Actor, ChangeOrigin, ControlError};
use crate::app::{AppConfig, RunningApp};
use crate::clock;
use crate::config::{self, Config, EntryKind, LoadedConfig, Overlay, StateDirectory, StateLock};
use crate::secret::ApiKey;
use crate::shared::{OpenEnvelopeError, OverlayExchange, OverlayPort, SealEnvelopeError, SealedOverlay};

/// The action that the record of a merge contains.
const MERGED: &str = "merged";

/// Interval between two attempts to merge an overlay that could not be merged.
const MERGE_RETRY_INTERVAL: Duration = Duration::from_secs(30);

/// Maximum number of attempts to load the configuration with entries that are left out. An entry can become invalid
/// because another entry is left out, such as a client that may only use a key that is left out.
const MAX_LOAD_ATTEMPTS: usize = 4;

/// The reason why an overlay of another replica is not merged, or why left-out entries are not tried again.
#[derive(Debug, thiserror::Error)]
enum MergeError {
    /// The overlay cannot be decrypted.
    #[error(transparent)]
    Envelope(#[from] OpenEnvelopeError),
    /// The decrypted document is refused.
    #[error(transparent)]
    Document(#[from] DocumentError),
    /// The merge would remove all clients.
    #[error(
        "no client would be left, and without clients every request is served without a token: add a client at one \
         of the replicas"
    )]
    LastClient,
    /// There is no state directory, its files cannot be read or written, or the configuration would be invalid.
    #[error(transparent)]
    Control(#[from] ControlError),
}

/// The reason why the overlay cannot be encrypted for the other replicas.
#[derive(Debug, thiserror::Error)]
enum SealError {
    /// The document cannot be encrypted with the keys of the pool.
    #[error(transparent)]
    Envelope(#[from] SealEnvelopeError),
    /// The document cannot be written as JSON.
    #[error("the overlay cannot be formatted: {0}")]
    Format(#[from] serde_json::Error),
    /// A key file cannot be read.
    #[error(transparent)]
    Control(#[from] ControlError),
}

/// The overlay after a merge, and the configuration that is loaded with it.
struct NextOverlay {
    overlay: Overlay,
    /// The overlay as it is written to its file.
    overlay_text: String,
    loaded: LoadedConfig,
    app_config: AppConfig,
    left_out: Vec<LeftOutEntry>,
}

impl Controller {
    /// Starts to share the overlay. Returns the channels through which [`crate::shared`] sends and receives overlays.
    ///
    /// # Errors
    ///
    /// Fails if Keychoir has no state directory, or the overlay cannot be read or encrypted.
    pub async fn share_overlay(&mut self, app: Option<&RunningApp>) -> Result<OverlayPort, ControlError> {
        let directory = self.state_directory()?.ok_or(ControlError::NoStateDirectory)?;
        let lock = self.lock(&directory).await?;
        if let Err(error) = Box::pin(self.retry_left_out(&lock, &directory, app)).await {
            self.log_merge_failure(&error);
        }
        let (overlay, keys) = self.current_overlay(&lock)?;
        let sealed =
            self.seal(&lock, &overlay, &keys).map_err(|error| ControlError::Invalid(error.to_string()))?;
        let (exchange, port) = OverlayExchange::channel(sealed);
        self.exchange = Some(exchange);
        Ok(port)
    }

    /// Merges the overlay of another replica with the overlay of this replica. If the merge changes the overlay of this
    /// replica, it is saved, applied, published and recorded. If the merge fails, nothing changes. The last overlay
    /// that could not be merged is tried again at intervals, because the disk may have space again or a conflict may
    /// have ended.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future before the files are written cancels the merge. Afterwards it only drops the record of the
    /// merge.
    pub async fn merge_overlay(&mut self, sealed: SealedOverlay, app: Option<&RunningApp>) {
        match Box::pin(self.try_merge(&sealed, app)).await {
            Ok(()) => {
                self.merge_failure = None;
                self.unmerged.take_if(|(unmerged, _)| unmerged.version() == sealed.version());
            }
            Err(error) => {
                self.log_merge_failure(&error);
                self.unmerged = Some((sealed, clock::instant() + MERGE_RETRY_INTERVAL));
            }
        }
    }

    /// Logs the reason of a failed merge, unless it is the same as the last one.
    fn log_merge_failure(&mut self, error: &MergeError) {
        let reason = describe_merge_error(error);
        if self.merge_failure.as_ref() != Some(&reason) {
            warn!(event = "overlay_not_merged", "Changes of other replicas cannot be applied: {reason}");
            self.merge_failure = Some(reason);
        }
    }

    /// Merges an overlay. Does nothing if the overlay is the published one, or if this replica shares no overlay.
    async fn try_merge(
        &mut self,
        sealed: &SealedOverlay,
        app: Option<&RunningApp>,
    ) -> Result<(), MergeError> {
        let Some(exchange) = &self.exchange else { return Ok(()) };
        if exchange.outgoing.borrow().version() == sealed.version() {
            return Ok(());
        }
        let directory = self.state_directory()?.ok_or(ControlError::NoStateDirectory)?;
        let lock = self.lock(&directory).await?;
        let current = self.load_current()?.config;
        let document = OverlayDocument::parse(&sealed.open(&api_keys(&current))?)?;
        let previous_overlay = lock.read().map_err(|error| overlay_read_error(&error))?;
        let secrets = lock.read_keys(&previous_overlay).map_err(|error| overlay_read_error(&error))?;

        let now = clock::now();
        let (mut own, mut other) = (OverlayState::new(&previous_overlay, &secrets), document.state);
        own.forget_old(now);
        other.forget_old(now);
        let mut merged = own.clone().merge(other.clone());
        merged.resolve_names();
        let own_generation = previous_overlay.generation.max(self.generation.load(Ordering::Acquire));
        let newest = own_generation.max(document.generation);
        // A merged overlay that differs from the newest one needs a higher generation, so that it replaces both in
        // Redis.
        let is_generation_used =
            (merged != own && own_generation == newest) || (merged != other && document.generation == newest);
        let generation = if is_generation_used { newest + 1 } else { newest };
        if merged == own {
            // The entries of this replica do not change, so the generation is kept in memory only.
            if generation != own_generation {
                self.generation.store(generation, Ordering::Release);
                self.publish(&lock, &previous_overlay, &api_keys(&current));
            }
            return Ok(());
        }

        let changed = merged.names_changed_since(&own);
        let mut overlay = Overlay { generation, ..previous_overlay.clone() };
        let new_keys = merged.write_to(&mut overlay, &secrets);
        let next = self.load_merged(overlay, &previous_overlay, &current, &new_keys, &directory, app)?;
        if !current.clients.is_empty() && next.loaded.config.clients.is_empty() {
            return Err(MergeError::LastClient);
        }
        self.save_files(&lock, &directory, &new_keys, &next.overlay, &next.overlay_text)?;
        self.apply_merged(next, &previous_overlay, &changed, &lock, &directory, app).await;
        Ok(())
    }

    /// Applies the left-out entries that do not conflict with the current configuration file.
    async fn retry_left_out(
        &mut self,
        lock: &StateLock<'_>,
        directory: &StateDirectory,
        app: Option<&RunningApp>,
    ) -> Result<(), MergeError> {
        let previous_overlay = lock.read().map_err(|error| overlay_read_error(&error))?;
        let has_left_out = previous_overlay.keys.iter().any(|entry| entry.left_out)
            || previous_overlay.clients.iter().any(|entry| entry.left_out);
        if !has_left_out {
            return Ok(());
        }
        let current = self.load_current()?.config;
        let generation = previous_overlay.generation.max(self.generation.load(Ordering::Acquire)) + 1;
        let overlay = Overlay { generation, ..previous_overlay.clone() };
        let next = self.load_merged(overlay, &previous_overlay, &current, &[], directory, app)?;
        let keys = previous_overlay.keys.iter().filter(|entry| !next.overlay.keys.contains(entry));
        let clients = previous_overlay.clients.iter().filter(|entry| !next.overlay.clients.contains(entry));
        let changed = ChangedNames {
            keys: keys.map(|entry| entry.name.clone()).collect(),
            paused_keys: Vec::new(),
            clients: clients.map(|entry| entry.name.clone()).collect(),
        };
        if changed != ChangedNames::default() {
            self.save_files(lock, directory, &[], &next.overlay, &next.overlay_text)?;
            self.apply_merged(next, &previous_overlay, &changed, lock, directory, app).await;
        }
        Ok(())
    }

    /// Applies, publishes and records an overlay that was saved.
    async fn apply_merged(
        &mut self,
        next: NextOverlay,
        previous: &Overlay,
        changed: &ChangedNames,
        lock: &StateLock<'_>,
        directory: &StateDirectory,
        app: Option<&RunningApp>,
    ) {
        let NextOverlay { overlay, overlay_text: _, loaded, app_config, left_out } = next;
        let generation = overlay.generation;
        let keys = api_keys(&loaded.config);
        if let Some((reloader, app)) = self.reloader.as_mut().zip(app) {
            reloader.apply_config(loaded, app_config, app);
            reloader.mark_as_loaded(directory.path());
        }
        self.generation.store(generation, Ordering::Release);
        self.publish(lock, &overlay, &keys);
        log_left_out(&left_out, previous);
        info!(
            event = "overlay_merged",
            keys = changed.keys.len(),
            paused_keys = changed.paused_keys.len(),
            clients = changed.clients.len(),
            generation,
            "Applied the changes of another replica"
        );
        let origin = ChangeOrigin { actor: Actor::Replica, address: None };
        self.record(origin, MERGED, None, &json!(changed), generation).await;
    }

    /// Loads the configuration with a merged overlay. Entries that conflict with the configuration of this machine
    /// are left out.
    fn load_merged(
        &self,
        mut overlay: Overlay,
        previous: &Overlay,
        current: &Config,
        new_keys: &[KeyFile],
        directory: &StateDirectory,
        app: Option<&RunningApp>,
    ) -> Result<NextOverlay, MergeError> {
        // A left-out entry may be valid with the current configuration file.
        overlay.keys.iter_mut().for_each(|entry| entry.left_out = false);
        overlay.clients.iter_mut().for_each(|entry| entry.left_out = false);
        let mut left_out = leave_out_conflicting_clients(&mut overlay, previous, current);
        let kept = self.kept_contents(directory);
        for _ in 0..MAX_LOAD_ATTEMPTS {
            let overlay_text = overlay.format().map_err(ControlError::Invalid)?;
            let files = next_files(directory, &overlay_text, new_keys);
            let problems = match config::load_with_files(&self.overrides, &files, &kept) {
                Ok(loaded) => {
                    let (loaded, app_config) = self.check_is_applicable(loaded, app)?;
                    return Ok(NextOverlay { overlay, overlay_text, loaded, app_config, left_out });
                }
                Err(problems) => problems,
            };
            match leave_out_invalid(&mut overlay, &problems) {
                Some(mut invalid_entries) => left_out.append(&mut invalid_entries),
                None => return Err(ControlError::Invalid(problems.to_string()).into()),
            }
        }
        Err(ControlError::Invalid("too many entries are invalid on this machine".to_owned()).into())
    }

    /// Publishes the overlay if it is shared. It is encrypted with `keys`, the keys of the pool.
    pub(super) fn publish(&self, lock: &StateLock<'_>, overlay: &Overlay, keys: &[ApiKey]) {
        let Some(exchange) = &self.exchange else { return };
        match self.seal(lock, overlay, keys) {
            Ok(sealed) => {
                exchange.outgoing.send_replace(sealed);
            }
            Err(error) => warn!(
                event = "overlay_not_shared",
                "The other replicas do not get the last change, which is in force here: {error}"
            ),
        }
    }

    /// Applies the entries that a reload makes valid, and publishes the overlay, encrypted with the reloaded keys.
    pub(super) async fn share_again(&mut self, app: Option<&RunningApp>) {
        if self.exchange.is_none() {
            return;
        }
        let share = async {
            let directory = self.state_directory()?.ok_or(ControlError::NoStateDirectory)?;
            let lock = self.lock(&directory).await?;
            Box::pin(self.retry_left_out(&lock, &directory, app)).await?;
            let (overlay, keys) = self.current_overlay(&lock)?;
            self.publish(&lock, &overlay, &keys);
            Ok::<(), MergeError>(())
        };
        if let Err(error) = share.await {
            self.log_merge_failure(&error);
        }
    }

    /// Returns the saved overlay and the keys of the pool.
    fn current_overlay(&self, lock: &StateLock<'_>) -> Result<(Overlay, Vec<ApiKey>), ControlError> {
        let overlay = lock.read().map_err(|error| overlay_read_error(&error))?;
        Ok((overlay, api_keys(&self.load_current()?.config)))
    }

    /// Encrypts the overlay for `keys`, the keys of the pool, so that another replica with the same keys can read it.
    fn seal(
        &self,
        lock: &StateLock<'_>,
        overlay: &Overlay,
        keys: &[ApiKey],
    ) -> Result<SealedOverlay, SealError> {
        let secrets: KeySecrets = lock.read_keys(overlay).map_err(|error| overlay_read_error(&error))?;
        let mut state = OverlayState::new(overlay, &secrets);
        state.forget_old(clock::now());
        let generation = overlay.generation.max(self.generation.load(Ordering::Acquire));
        let (version, document) = OverlayDocument::new(generation, state).format()?;
        Ok(SealedOverlay::seal(version, &document, keys)?)
    }
}

fn api_keys(config: &Config) -> Vec<ApiKey> {
    config.keys.iter().map(|key| key.key.clone()).collect()
}

/// Describes the reason of a failed merge and its remedy in one line.
fn describe_merge_error(error: &MergeError) -> String {
    match error {
        MergeError::Control(ControlError::NoStateDirectory) => {
            "this replica keeps its state in memory only, so set storage.path and not storage.ephemeral"
                .to_owned()
        }
        MergeError::Control(ControlError::Unwritable { directory, reason }) => {
            format!("{directory} cannot be written ({reason}), so make it writable for Keychoir")
        }
        MergeError::Control(error) => error.to_string().lines().map(str::trim).collect::<Vec<_>>().join("; "),
        MergeError::Envelope(_) | MergeError::Document(_) | MergeError::LastClient => error.to_string(),
    }
}

/// Logs the entries that are left out and were not left out in the `previous` overlay.
fn log_left_out(left_out: &[LeftOutEntry], previous: &Overlay) {
    for LeftOutEntry { kind, name, reason } in left_out {
        let (kind, was_left_out) = match kind {
            EntryKind::Key => {
                ("key", previous.keys.iter().any(|entry| entry.left_out && entry.name == *name))
            }
            EntryKind::Client => {
                ("client", previous.clients.iter().any(|entry| entry.left_out && entry.name == *name))
            }
            EntryKind::PausedKey => continue,
        };
        if !was_left_out {
            warn!(
                event = "overlay_entry_left_out",
                kind,
                name,
                "The {kind} `{name}` of another replica does not apply to this one: {reason}; use the same \
                 configuration file on all replicas"
            );
        }
    }
}

//! Records changes in the usage database. A running server records through the writer of its database, and the command
//! line opens the database if no server runs. At startup, one record replaces the missing records of earlier changes.
//! A failure is logged, and never undoes the change.

use std::pin::Pin;

use serde_json::json;
use tracing::warn;

use crate::admin::record_change_event;
use crate::policy::units::UnixMs;
use crate::store::{History, OfflineChanges, StoredChange};
use crate::telemetry::EventRing;

/// The action of the record that replaces the missing records of earlier changes.
const UNRECORDED: &str = "unrecorded_changes";

/// Records a change that was made. The future completes when the record can be read or the attempt has failed.
pub type ChangeRecorder = Box<dyn Fn(StoredChange) -> RecordFuture + Send>;

/// The future that a [`ChangeRecorder`] returns.
pub type RecordFuture = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Creates a recorder that writes changes to the database of the running server, and adds them to the events of the
/// admin API.
#[must_use]
pub fn create_recorder(history: History, events: EventRing) -> ChangeRecorder {
    Box::new(move |change: StoredChange| {
        let history = history.clone();
        record_change_event(&events, &change);
        Box::pin(async move {
            if let Err(error) = history.record_change(change).await {
                warn!(
                    event = "change_not_recorded",
                    "The change is in force, and it is recorded when the database can be written: {error}"
                );
            }
        })
    })
}

/// Records at startup that changes up to `generation` are in force although they have no record, because Keychoir was
/// killed before it wrote the records or the database could not be written.
pub async fn record_unrecorded_changes(history: &History, generation: u64, now: UnixMs) {
    let Ok(latest) = history.changes(None, 1).await else { return };
    let recorded_generation = latest.first().map_or(0, |change| change.generation);
    if recorded_generation >= generation {
        return;
    }
    let detail = json!({"first_generation": recorded_generation + 1, "last_generation": generation});
    let change = StoredChange {
        id: StoredChange::new_id(now),
        at: now,
        actor: "startup".to_owned(),
        address: None,
        action: UNRECORDED.to_owned(),
        target: None,
        detail: detail.to_string(),
        generation,
    };
    if let Err(error) = history.record_change(change).await {
        warn!(
            event = "change_not_recorded",
            "Earlier changes are in force without a record, which cannot be written: {error}"
        );
    }
}

/// Creates a recorder that writes changes to the database while no server uses it.
#[must_use]
pub fn create_offline_recorder(changes: OfflineChanges) -> ChangeRecorder {
    Box::new(move |change: StoredChange| {
        if !changes.record(&change) {
            warn!(
                event = "change_not_recorded",
                "The change is saved, but it is not recorded: the database cannot be written, or another version of \
                 Keychoir has written it"
            );
        }
        Box::pin(std::future::ready(()))
    })
}

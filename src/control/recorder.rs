//! Records changes in the usage database: through the writer of the running program, or by opening the database
//! if no program runs.

use std::pin::Pin;

use tracing::warn;

use crate::admin::control::ChangeRecord;
use crate::admin::record_change_event;
use crate::config::Config;
use crate::store::{DatabaseLocation, History, Store, StoredChange};
use crate::telemetry::EventRing;

/// Records a change that was made. The future completes when the record can be read.
pub type ChangeRecorder = Box<dyn Fn(ChangeRecord) -> Recording + Send>;

/// A change that is being recorded.
pub type Recording = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Records changes in the database of the running program, and as events for the listeners of the admin API.
#[must_use]
pub fn record_in(history: History, events: EventRing) -> ChangeRecorder {
    Box::new(move |change| {
        let (history, change) = (history.clone(), stored(change));
        record_change_event(&events, &change);
        Box::pin(async move {
            if let Err(error) = history.record_change(change).await {
                warn!(
                    event = "change_not_recorded",
                    "The change is in force, but it is not recorded: {error}"
                );
            }
        })
    })
}

/// Records changes in the database of `config`, if it exists and no program uses it.
#[must_use]
pub fn record_offline(config: &Config) -> ChangeRecorder {
    let path = config.storage.file().map(ToOwned::to_owned);
    Box::new(move |change| {
        if let Some(path) = path.clone().filter(|path| path.exists()) {
            let now = change.at;
            if let Ok(store) = Store::open(&DatabaseLocation::File(path), now) {
                // The change is saved, and a record that is missing does not undo it.
                let _ = store.record_change(&stored(change));
            }
        }
        Box::pin(std::future::ready(()))
    })
}

fn stored(change: ChangeRecord) -> StoredChange {
    let ChangeRecord { at, actor, address, action, target, detail, generation } = change;
    StoredChange {
        id: StoredChange::new_id(at),
        at,
        actor: actor.as_str().to_owned(),
        address: address.map(|address| address.to_string()),
        action: action.to_owned(),
        target,
        detail,
        generation,
    }
}

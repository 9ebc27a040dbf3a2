//! Compares the documents of the keys and of the server with the documents that were recorded last, and records an
//! event in the ring for each changed document. One comparison serves all listeners.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{WantedKeys, is_wanted};
use crate::admin::{Admin, KeyDocument};
use crate::telemetry::{EventContent, EventListener, EventRing};
use crate::{clock, tasks};

/// Minimum time between two comparisons that open streams cause, for any number of listeners. A stream that opens
/// causes another comparison.
const MIN_COMPARISON_INTERVAL: Duration = Duration::from_millis(200);
/// Minimum time between two comparisons, as a multiple of the duration of the last one. Comparisons of a pool with
/// thousands of keys therefore take at most a 200th of the time of a processor.
const INTERVAL_PER_DURATION: u32 = 200;

/// Members of the overview that change with the time alone. A change of only such members is not an event. The function
/// [`KeyDocument::has_changed_since`] ignores such members of a key.
const VOLATILE_OVERVIEW_MEMBERS: [&str; 3] = ["/now", "/credits/per_day", "/credits/exhausted_at"];
/// The member of each replica in the overview that changes with the time alone.
const VOLATILE_REPLICA_MEMBER: &str = "last_seen";

/// The ring of events, and the documents that were recorded in it last. Clones share both.
#[derive(Clone, Debug)]
pub struct EventSource {
    ring: EventRing,
    recorded: Arc<Mutex<RecordedState>>,
    max_listeners: usize,
}

/// The state that was last recorded in the ring.
#[derive(Debug, Default)]
struct RecordedState {
    /// The time from which the interval until the next comparison counts: the end of the last comparison, or the start
    /// of the running one.
    interval_start: Option<Instant>,
    /// The start of the last comparison that has ended.
    compared_at: Option<Instant>,
    /// The duration of the last comparison.
    duration: Duration,
    /// The ids of the keys in the order of the pool.
    ordered_ids: Vec<Arc<str>>,
    keys: HashMap<Arc<str>, KeyDocument>,
    overview: Option<RecordedOverview>,
}

#[derive(Debug)]
struct RecordedOverview {
    document: Arc<str>,
    /// The compared part of the document: all members except those that change with the time alone.
    stable_part: String,
}

/// The state of the server and of the wanted keys at a position in the ring.
pub(super) struct StateSnapshot {
    /// The overview, followed by the wanted keys.
    pub(super) contents: Vec<EventContent>,
    /// The position in the ring after the last event that the snapshot includes.
    pub(super) position: u64,
}

impl EventSource {
    /// Creates the source for the events of `ring`, with at most `max_listeners` listeners.
    #[must_use]
    pub fn new(ring: EventRing, max_listeners: usize) -> Self {
        Self { ring, recorded: Arc::default(), max_listeners }
    }

    pub(super) fn ring(&self) -> &EventRing {
        &self.ring
    }

    pub(super) fn max_listeners(&self) -> usize {
        self.max_listeners
    }

    /// Starts a comparison, unless the last one was a short time ago. It runs on a blocking thread, because a worker
    /// that compares serves no requests meanwhile.
    pub(super) fn start_comparison_if_due(&self, admin: &Admin) {
        if self.claim_comparison() {
            let (source, admin) = (self.clone(), admin.clone());
            drop(tasks::spawn_blocking(move || source.compare(&mut source.lock(), &admin)));
        }
    }

    /// Returns whether a comparison is due. If it is, the caller must start it, and other callers get `false` until the
    /// next one is due.
    fn claim_comparison(&self) -> bool {
        let mut recorded = match self.recorded.try_lock() {
            Ok(recorded) => recorded,
            Err(TryLockError::Poisoned(error)) => error.into_inner(),
            // A comparison is running.
            Err(TryLockError::WouldBlock) => return false,
        };
        let interval = min_interval(recorded.duration);
        let is_comparison_due =
            recorded.interval_start.is_none_or(|time| clock::elapsed_since(time) >= interval);
        if is_comparison_due {
            recorded.interval_start = Some(clock::instant());
        }
        is_comparison_due
    }

    /// Waits until a comparison that started after this call has ended. Callers that wait at the same time share a
    /// comparison, which runs on a blocking thread.
    pub(super) async fn refresh(&self, admin: &Admin) {
        let (source, admin, requested_at) = (self.clone(), admin.clone(), clock::instant());
        let compare_if_older = move || {
            let mut recorded = source.lock();
            if recorded.compared_at.is_none_or(|start| start < requested_at) {
                source.compare(&mut recorded, &admin);
            }
        };
        // The task fails only if it panics or if the program ends. The stream then begins with the last recorded state.
        let _ = tasks::spawn_blocking(compare_if_older).await;
    }

    /// Returns the recorded documents of the server and of the wanted keys, or `None` while a comparison is running.
    /// Later changes of the state are events after the position of the snapshot.
    pub(super) fn snapshot(&self, listener: &EventListener, wanted: &WantedKeys) -> Option<StateSnapshot> {
        let recorded = match self.recorded.try_lock() {
            Ok(recorded) => recorded,
            Err(TryLockError::Poisoned(error)) => error.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        let overview =
            recorded.overview.iter().map(|recorded| EventContent::Overview(Arc::clone(&recorded.document)));
        let keys = recorded.ordered_ids.iter().filter(|id| is_wanted(wanted, id)).filter_map(|id| {
            let document = document_text(recorded.keys.get(id)?);
            Some(EventContent::Key { id: Arc::clone(id), document })
        });
        Some(StateSnapshot { contents: overview.chain(keys).collect(), position: listener.position() })
    }

    /// Compares the current state with the recorded one, records the differences as events, and replaces the recorded
    /// state.
    fn compare(&self, recorded: &mut RecordedState, admin: &Admin) {
        let (now, start) = (clock::now(), clock::instant());
        let (overview, keys) = admin.overview_and_keys(now);
        let overview = serde_json::to_value(overview).unwrap_or_default();
        self.ring.record(recorded.replace(keys, overview));
        recorded.interval_start = Some(clock::instant());
        recorded.compared_at = Some(start);
        recorded.duration = clock::elapsed_since(start);
    }

    fn lock(&self) -> MutexGuard<'_, RecordedState> {
        self.recorded.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns the minimum time between the end of a comparison of `duration` and the next one.
fn min_interval(duration: Duration) -> Duration {
    duration.saturating_mul(INTERVAL_PER_DURATION).max(MIN_COMPARISON_INTERVAL)
}

impl RecordedState {
    /// Replaces the recorded documents. Returns an event for each document that has changed.
    fn replace(&mut self, keys: Vec<KeyDocument>, overview: Value) -> Vec<EventContent> {
        let mut events = Vec::new();
        let mut ordered_ids = Vec::with_capacity(keys.len());
        let mut previous = std::mem::replace(&mut self.keys, HashMap::with_capacity(keys.len()));
        for key in keys {
            let (id, previous) = match previous.remove_entry(key.id.as_str()) {
                Some((id, previous)) => (id, Some(previous)),
                None => (key.id.as_str().into(), None),
            };
            if previous.is_none_or(|previous| key.has_changed_since(previous)) {
                events.push(EventContent::Key { id: Arc::clone(&id), document: document_text(&key) });
            }
            self.keys.insert(Arc::clone(&id), key);
            ordered_ids.push(id);
        }
        for id in previous.into_keys() {
            let document = json!({"id": &*id, "removed": true}).to_string().into();
            events.push(EventContent::Key { id, document });
        }
        self.ordered_ids = ordered_ids;
        let overview = RecordedOverview::new(overview);
        if self.overview.as_ref().is_none_or(|previous| previous.stable_part != overview.stable_part) {
            events.push(EventContent::Overview(Arc::clone(&overview.document)));
        }
        self.overview = Some(overview);
        events
    }
}

/// Returns the document of a key as JSON.
fn document_text(key: &KeyDocument) -> Arc<str> {
    // Serializing a document cannot fail, because it consists of numbers, strings and lists.
    serde_json::to_string(key).unwrap_or_default().into()
}

impl RecordedOverview {
    fn new(mut overview: Value) -> Self {
        let document = overview.to_string().into();
        for path in VOLATILE_OVERVIEW_MEMBERS {
            if let Some(member) = overview.pointer_mut(path) {
                *member = Value::Null;
            }
        }
        let replicas = overview.pointer_mut("/replicas").and_then(Value::as_array_mut).into_iter().flatten();
        replicas
            .filter_map(Value::as_object_mut)
            .for_each(|replica| drop(replica.remove(VOLATILE_REPLICA_MEMBER)));
        Self { document, stable_part: overview.to_string() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn overview(now: &str, total: u64) -> Value {
        let replica = json!({"id": "r1", "last_seen": now, "is_live": true});
        let credits = json!({"per_day": now.len(), "exhausted_at": now});
        json!({"now": now, "credits": credits, "keys": total, "shared": "connected", "replicas": [replica]})
    }

    fn key(id: &str, in_flight: u32, per_day: u64) -> KeyDocument {
        let exhausted_at = Some(per_day.to_string());
        KeyDocument {
            id: id.to_owned(),
            in_flight,
            credits_per_day: per_day,
            exhausted_at,
            ..KeyDocument::default()
        }
    }

    /// Replaces the recorded documents. Returns the names of the changed ones: the id of a key, `-` and the id of a
    /// removed key, or `overview`.
    fn changed_documents(
        recorded: &mut RecordedState,
        keys: Vec<KeyDocument>,
        overview: Value,
    ) -> Vec<String> {
        let events = recorded.replace(keys, overview);
        let name = |event: &EventContent| match event {
            EventContent::Key { id, document } if document.contains("removed") => format!("-{id}"),
            EventContent::Key { id, .. } => id.to_string(),
            EventContent::Overview(_) => "overview".to_owned(),
            EventContent::Request(_) | EventContent::Change(_) => "other".to_owned(),
        };
        events.iter().map(name).collect()
    }

    #[test]
    fn only_changed_documents_are_events() {
        let mut recorded = RecordedState::default();
        let both_keys = |in_flight| vec![key("a", in_flight, 1), key("b", 0, 1)];
        assert_eq!(changed_documents(&mut recorded, both_keys(0), overview("1", 2)), ["a", "b", "overview"]);
        assert!(changed_documents(&mut recorded, both_keys(0), overview("1", 2)).is_empty());
        assert_eq!(changed_documents(&mut recorded, both_keys(1), overview("1", 2)), ["a"]);
        assert_eq!(
            changed_documents(&mut recorded, vec![key("b", 0, 1)], overview("1", 1)),
            ["-a", "overview"]
        );
        assert_eq!(changed_documents(&mut recorded, both_keys(1), overview("1", 2)), ["a", "overview"]);
    }

    #[test]
    fn a_lost_redis_and_an_ended_replica_are_events() {
        let mut recorded = RecordedState::default();
        changed_documents(&mut recorded, Vec::new(), overview("1", 1));
        for (path, value) in [("/shared", json!("alone")), ("/replicas/0/is_live", json!(false))] {
            let mut changed_overview = overview("1", 1);
            *changed_overview.pointer_mut(path).unwrap() = value;
            assert_eq!(
                changed_documents(&mut recorded, Vec::new(), changed_overview),
                ["overview"],
                "a change of {path} must be an event"
            );
        }
    }

    #[test]
    fn a_long_comparison_has_a_long_interval() {
        assert_eq!(min_interval(Duration::from_micros(50)), MIN_COMPARISON_INTERVAL);
        assert_eq!(min_interval(Duration::from_millis(1)), MIN_COMPARISON_INTERVAL);
        assert_eq!(min_interval(Duration::from_millis(5)), Duration::from_secs(1));
    }

    #[test]
    fn a_change_with_the_time_alone_is_not_an_event() {
        let mut recorded = RecordedState::default();
        changed_documents(&mut recorded, vec![key("a", 0, 1)], overview("1", 1));
        let events = changed_documents(&mut recorded, vec![key("a", 0, 2)], overview("12", 1));
        assert!(events.is_empty(), "a forecast that moves with the time must not cause an event: {events:?}");
        assert!(
            recorded.overview.unwrap().document.contains("\"12\""),
            "a snapshot must contain the latest document"
        );
    }
}

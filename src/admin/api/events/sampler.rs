//! Compares the state of the keys and of the program with the state that was recorded last, once for all
//! listeners.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::documents;
use crate::admin::Admin;
use crate::clock;
use crate::telemetry::{EventContent, EventListener, EventRing};

/// Minimum time between two comparisons, for any number of listeners.
const INTERVAL: Duration = Duration::from_millis(200);

/// Members that change with the time alone. A change of only such members is not an event.
const VOLATILE_KEY_MEMBERS: [&str; 2] = ["credits_per_day", "exhausted_at"];
const VOLATILE_OVERVIEW_MEMBERS: [&str; 3] = ["/now", "/credits/per_day", "/credits/exhausted_at"];
/// The member of each replica in the overview that changes with the time alone.
const VOLATILE_REPLICA_MEMBER: &str = "last_seen";

/// The ring of events, and the state that was recorded in it. Clones share both.
#[derive(Clone, Debug)]
pub struct EventSource {
    ring: EventRing,
    recorded: Arc<Mutex<RecordedState>>,
    max_listeners: usize,
}

/// The state that was last recorded in the ring.
#[derive(Debug, Default)]
struct RecordedState {
    sampled_at: Option<Instant>,
    /// The ids of the keys in the order of the pool.
    order: Vec<Arc<str>>,
    keys: HashMap<Arc<str>, RecordedDocument>,
    overview: Option<RecordedDocument>,
}

#[derive(Debug)]
struct RecordedDocument {
    document: Arc<str>,
    /// The document without the members that change with the time alone.
    compared: String,
}

/// The whole state at a position in the ring.
pub(super) struct StateSnapshot {
    /// The overview, followed by the keys.
    pub(super) contents: Vec<EventContent>,
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

    /// Records the changed parts of the state, unless another listener did so less than [`INTERVAL`] ago.
    pub(super) fn sample(&self, admin: &Admin) {
        let mut recorded = self.lock();
        let is_due = recorded.sampled_at.is_none_or(|time| clock::elapsed_since(time) >= INTERVAL);
        if is_due {
            self.update(&mut recorded, admin);
        }
    }

    /// Returns the current state. Later changes of the state are events after the position of the snapshot.
    pub(super) fn snapshot(&self, admin: &Admin, listener: &EventListener) -> StateSnapshot {
        let mut recorded = self.lock();
        self.update(&mut recorded, admin);
        let overview =
            recorded.overview.iter().map(|recorded| EventContent::Overview(Arc::clone(&recorded.document)));
        let keys = recorded.order.iter().filter_map(|id| {
            let document = Arc::clone(&recorded.keys.get(id)?.document);
            Some(EventContent::Key { id: Arc::clone(id), document })
        });
        StateSnapshot { contents: overview.chain(keys).collect(), position: listener.position() }
    }

    fn update(&self, recorded: &mut RecordedState, admin: &Admin) {
        let now = clock::now();
        recorded.sampled_at = Some(clock::instant());
        let keys = admin.pool.snapshot(now);
        let keys = keys.iter().map(|snapshot| documents::key_document(&admin.pool, snapshot, now));
        let keys = keys.map(|key| serde_json::to_value(key).unwrap_or_default()).collect();
        let overview = documents::overview_document(admin, admin.generation(), now);
        let overview = serde_json::to_value(overview).unwrap_or_default();
        self.ring.record(recorded.replace(keys, overview));
    }

    fn lock(&self) -> MutexGuard<'_, RecordedState> {
        self.recorded.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl RecordedState {
    /// Replaces the state. Returns an event for each document that has changed.
    fn replace(&mut self, keys: Vec<Value>, overview: Value) -> Vec<EventContent> {
        let mut events = Vec::new();
        let mut order = Vec::with_capacity(keys.len());
        for key in keys {
            let id: Arc<str> = key["id"].as_str().unwrap_or_default().into();
            let recorded = RecordedDocument::of_key(key);
            let previous = self.keys.insert(Arc::clone(&id), recorded);
            if let Some(recorded) = self.keys.get(&id)
                && previous.is_none_or(|previous| previous.compared != recorded.compared)
            {
                events.push(EventContent::Key {
                    id: Arc::clone(&id),
                    document: Arc::clone(&recorded.document),
                });
            }
            order.push(id);
        }
        let in_pool: HashSet<&Arc<str>> = order.iter().collect();
        self.keys.retain(|id, _| {
            let is_in_pool = in_pool.contains(id);
            if !is_in_pool {
                let document = json!({"id": &**id, "removed": true}).to_string();
                events.push(EventContent::Key { id: Arc::clone(id), document: document.into() });
            }
            is_in_pool
        });
        self.order = order;
        let overview = RecordedDocument::of_overview(overview);
        if self.overview.as_ref().is_none_or(|previous| previous.compared != overview.compared) {
            events.push(EventContent::Overview(Arc::clone(&overview.document)));
        }
        self.overview = Some(overview);
        events
    }
}

impl RecordedDocument {
    fn of_key(mut key: Value) -> Self {
        let document = key.to_string().into();
        if let Some(members) = key.as_object_mut() {
            VOLATILE_KEY_MEMBERS.iter().for_each(|name| drop(members.remove(*name)));
        }
        Self { document, compared: key.to_string() }
    }

    fn of_overview(mut overview: Value) -> Self {
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
        Self { document, compared: overview.to_string() }
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

    fn key(id: &str, in_flight: u64, per_day: u64) -> Value {
        json!({"id": id, "in_flight": in_flight, "credits_per_day": per_day, "exhausted_at": per_day})
    }

    /// Returns the ids of the keys that have changed, and `overview`.
    fn changed(recorded: &mut RecordedState, keys: Vec<Value>, overview: Value) -> Vec<String> {
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
    fn only_what_has_changed_is_an_event() {
        let mut recorded = RecordedState::default();
        let both = |in_flight| vec![key("a", in_flight, 1), key("b", 0, 1)];
        assert_eq!(changed(&mut recorded, both(0), overview("1", 2)), ["a", "b", "overview"]);
        assert!(changed(&mut recorded, both(0), overview("1", 2)).is_empty());
        assert_eq!(changed(&mut recorded, both(1), overview("1", 2)), ["a"]);
        assert_eq!(changed(&mut recorded, vec![key("b", 0, 1)], overview("1", 1)), ["-a", "overview"]);
        assert_eq!(changed(&mut recorded, both(1), overview("1", 2)), ["a", "overview"]);
    }

    #[test]
    fn a_lost_redis_and_an_ended_replica_are_events() {
        let mut recorded = RecordedState::default();
        changed(&mut recorded, Vec::new(), overview("1", 1));
        for (path, value) in [("/shared", json!("alone")), ("/replicas/0/is_live", json!(false))] {
            let mut changed_overview = overview("1", 1);
            *changed_overview.pointer_mut(path).unwrap() = value;
            assert_eq!(changed(&mut recorded, Vec::new(), changed_overview), ["overview"], "{path}");
        }
    }

    #[test]
    fn the_time_alone_is_no_event() {
        let mut recorded = RecordedState::default();
        changed(&mut recorded, vec![key("a", 0, 1)], overview("1", 1));
        let events = changed(&mut recorded, vec![key("a", 0, 2)], overview("12", 1));
        assert!(events.is_empty(), "forecasts move with the time: {events:?}");
        assert!(recorded.overview.unwrap().document.contains("\"12\""), "a snapshot has the latest document");
    }
}

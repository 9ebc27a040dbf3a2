//! Compares the state of the keys and of the program with the state that was recorded last, once for all
//! listeners.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::documents;
use crate::admin::Admin;
use crate::clock;
use crate::telemetry::{EventContent, EventListener, EventRing};

/// Minimum time between two comparisons, for any number of listeners.
const INTERVAL: Duration = Duration::from_millis(200);

/// Members that change with the time alone. A change of only these is no event.
const VOLATILE_KEY_MEMBERS: [&str; 2] = ["credits_per_day", "exhausted_at"];
const VOLATILE_OVERVIEW_MEMBERS: [&str; 3] = ["/now", "/credits/per_day", "/credits/exhausted_at"];

/// The ring of events, and the state that its listeners know. Clones share both.
#[derive(Clone, Debug)]
pub struct EventSource {
    ring: EventRing,
    known: Arc<Mutex<KnownState>>,
    max_listeners: usize,
}

/// The state that was recorded last.
#[derive(Debug, Default)]
struct KnownState {
    sampled_at: Option<Instant>,
    /// The ids of the keys in the order of the pool.
    order: Vec<Arc<str>>,
    keys: HashMap<Arc<str>, KnownDocument>,
    overview: Option<KnownDocument>,
}

#[derive(Debug)]
struct KnownDocument {
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
        Self { ring, known: Arc::default(), max_listeners }
    }

    pub(super) fn ring(&self) -> &EventRing {
        &self.ring
    }

    pub(super) fn max_listeners(&self) -> usize {
        self.max_listeners
    }

    /// Records what has changed, unless another listener did so a moment ago.
    pub(super) fn sample(&self, admin: &Admin) {
        let mut known = self.lock();
        let is_due = known.sampled_at.is_none_or(|time| clock::elapsed_since(time) >= INTERVAL);
        if is_due {
            self.update(&mut known, admin);
        }
    }

    /// Returns the state now. Later changes of it are events after its position.
    pub(super) fn snapshot(&self, admin: &Admin, listener: &EventListener) -> StateSnapshot {
        let mut known = self.lock();
        self.update(&mut known, admin);
        let overview = known.overview.iter().map(|known| EventContent::Overview(Arc::clone(&known.document)));
        let keys = known.order.iter().filter_map(|id| {
            let document = Arc::clone(&known.keys.get(id)?.document);
            Some(EventContent::Key { id: Arc::clone(id), document })
        });
        StateSnapshot { contents: overview.chain(keys).collect(), position: listener.position() }
    }

    fn update(&self, known: &mut KnownState, admin: &Admin) {
        let now = clock::now();
        known.sampled_at = Some(clock::instant());
        let keys = admin.pool.snapshot(now);
        let keys = keys.iter().map(|snapshot| documents::key(&admin.pool, snapshot, now));
        let keys = keys.map(|key| serde_json::to_value(key).unwrap_or_default()).collect();
        let overview = documents::overview(admin, admin.generation(), now);
        self.ring.record(known.replace(keys, overview));
    }

    fn lock(&self) -> MutexGuard<'_, KnownState> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl KnownState {
    /// Replaces the state. Returns an event for each document that has changed.
    fn replace(&mut self, keys: Vec<Value>, overview: Value) -> Vec<EventContent> {
        let mut events = Vec::new();
        let mut order = Vec::with_capacity(keys.len());
        for key in keys {
            let id: Arc<str> = key["id"].as_str().unwrap_or_default().into();
            let known = KnownDocument::of_key(key);
            let previous = self.keys.insert(Arc::clone(&id), known);
            if let Some(known) = self.keys.get(&id)
                && previous.is_none_or(|previous| previous.compared != known.compared)
            {
                events.push(EventContent::Key { id: Arc::clone(&id), document: Arc::clone(&known.document) });
            }
            order.push(id);
        }
        self.keys.retain(|id, _| {
            let is_in_pool = order.contains(id);
            if !is_in_pool {
                let document = json!({"id": &**id, "removed": true}).to_string();
                events.push(EventContent::Key { id: Arc::clone(id), document: document.into() });
            }
            is_in_pool
        });
        self.order = order;
        let overview = KnownDocument::of_overview(overview);
        if self.overview.as_ref().is_none_or(|previous| previous.compared != overview.compared) {
            events.push(EventContent::Overview(Arc::clone(&overview.document)));
        }
        self.overview = Some(overview);
        events
    }
}

impl KnownDocument {
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
        Self { document, compared: overview.to_string() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn overview(now: &str, total: u64) -> Value {
        json!({"now": now, "credits": {"per_day": now.len(), "exhausted_at": now}, "keys": total})
    }

    fn key(id: &str, in_flight: u64, per_day: u64) -> Value {
        json!({"id": id, "in_flight": in_flight, "credits_per_day": per_day, "exhausted_at": per_day})
    }

    /// The ids of the keys that have changed, and `overview`.
    fn changed(known: &mut KnownState, keys: Vec<Value>, overview: Value) -> Vec<String> {
        let events = known.replace(keys, overview);
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
        let mut known = KnownState::default();
        let both = |in_flight| vec![key("a", in_flight, 1), key("b", 0, 1)];
        assert_eq!(changed(&mut known, both(0), overview("1", 2)), ["a", "b", "overview"]);
        assert!(changed(&mut known, both(0), overview("1", 2)).is_empty());
        assert_eq!(changed(&mut known, both(1), overview("1", 2)), ["a"]);
        assert_eq!(changed(&mut known, vec![key("b", 0, 1)], overview("1", 1)), ["-a", "overview"]);
        assert_eq!(changed(&mut known, both(1), overview("1", 2)), ["a", "overview"]);
    }

    #[test]
    fn the_time_alone_is_no_event() {
        let mut known = KnownState::default();
        changed(&mut known, vec![key("a", 0, 1)], overview("1", 1));
        let events = changed(&mut known, vec![key("a", 0, 2)], overview("12", 1));
        assert!(events.is_empty(), "forecasts move with the time: {events:?}");
        assert!(known.overview.unwrap().document.contains("\"12\""), "a snapshot has the latest document");
    }
}

//! Keeps the latest events for listeners of the admin API in a ring, from which each listener reads at its own pace.
//! Events are recorded only while there are listeners, and for a short time after the last one.
//!
//! A listener needs only its position in the ring, so a slow listener uses no more memory than a fast one, and delays
//! no request. While requests are not recorded, a request only loads an atomic boolean.

use std::collections::{HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use http::Method;

use crate::clock;
use crate::elevenlabs::endpoint::Route;
use crate::policy::client::ClientName;
use crate::secret::ShortKey;

/// Maximum number of events in the ring: about 0.3 MB.
const MAX_EVENTS: usize = 1_000;

/// Time for which events are recorded after the last listener has disconnected, so that the listener can resume after a
/// short interruption of its connection.
const RESUME_PERIOD: Duration = Duration::from_secs(30);

/// The events of all workers. Clones share the ring.
#[derive(Clone, Debug, Default)]
pub struct EventRing(Arc<SharedRing>);

#[derive(Debug, Default)]
struct SharedRing {
    /// Whether events are recorded: while there are listeners, and for [`RESUME_PERIOD`] after the last one.
    is_recording: AtomicBool,
    /// Whether requests are recorded: while there are listeners for requests, and for [`RESUME_PERIOD`] after the last
    /// one.
    is_recording_requests: AtomicBool,
    ring: Mutex<Ring>,
}

/// The events that a listener receives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventSelection {
    /// All events.
    All,
    /// Only the state of the keys and of Keychoir, and the changes of operators.
    State,
    /// Only the requests.
    Requests,
}

/// The recorded events, and the listeners for them.
#[derive(Debug, Default)]
struct Ring {
    /// The events in the order of their numbers. The state of each key and the overview occur at most once.
    events: VecDeque<Event>,
    /// The number of the latest event, or 0 before the first one.
    latest_number: u64,
    /// The number of the latest lost event that is not a request. An event is lost if the ring is full or recording has
    /// ended.
    latest_lost_state: u64,
    /// The number of the latest lost request.
    latest_lost_request: u64,
    /// All listeners.
    listeners: Listeners,
    /// The listeners for requests.
    request_listeners: Listeners,
}

/// The number of listeners, and the time since which there are none.
#[derive(Debug, Default)]
struct Listeners {
    count: usize,
    /// The time at which the last listener disconnected, or `None` while there are listeners and before the first one.
    idle_since: Option<Instant>,
}

/// An event and its number.
#[derive(Clone, Debug)]
pub struct Event {
    /// The number of the event, which increases by one with each event.
    pub number: u64,
    /// The content of the event.
    pub content: EventContent,
}

/// The content of an event. Documents are JSON without secrets.
#[derive(Clone, Debug)]
pub enum EventContent {
    /// The state of a key. Only the latest state of each key is kept.
    Key {
        /// The id of the key.
        id: Arc<str>,
        /// The document of the key.
        document: Arc<str>,
    },
    /// A request has ended.
    Request(Arc<EndedRequest>),
    /// An operator has made a change, which the document describes.
    Change(Arc<str>),
    /// The document of the state of the whole Keychoir process. Only the latest state is kept.
    Overview(Arc<str>),
}

/// A request that has ended.
#[derive(Clone, Debug)]
pub struct EndedRequest {
    /// The id of the request.
    pub request_id: Arc<str>,
    /// The client, or `None` if it was not authenticated.
    pub client: Option<ClientName>,
    /// The short form of the last attempt's key, or `None` if there was no attempt or the client used its own key.
    pub short_key: Option<ShortKey>,
    /// The method as it is logged: `other` stands for an unusual method.
    pub method: Method,
    /// The endpoint, or `None` if the request was refused before its path was parsed.
    pub route: Option<Route>,
    /// The status of the response, or `None` if there was no response.
    pub status: Option<u16>,
    /// The outcome, or the code of the error.
    pub outcome: &'static str,
    /// The number of attempts.
    pub attempts: u32,
    /// The reason of each retry, as in the access log.
    pub retry_reasons: Vec<&'static str>,
    /// The credits charged.
    pub credits: u64,
    /// The duration of the request.
    pub duration: Duration,
    /// The text of this event in an event stream. The first listener formats it, and all others reuse it.
    pub event_text: OnceLock<Box<str>>,
}

/// The events after a position in the ring.
#[derive(Debug)]
pub struct EventBatch {
    /// The events, in the order of their numbers.
    pub events: Vec<Event>,
    /// The position after these events.
    pub position: u64,
    /// Whether events after the requested position were lost, or the position is of another process.
    pub is_incomplete: bool,
}

/// A listener for selected events. Dropping it disconnects the listener.
#[derive(Debug)]
pub struct EventListener {
    ring: EventRing,
    selection: EventSelection,
}

impl EventSelection {
    /// Returns whether a listener with this selection receives requests.
    #[must_use]
    pub fn includes_requests(self) -> bool {
        match self {
            Self::All | Self::Requests => true,
            Self::State => false,
        }
    }

    /// Returns whether a listener with this selection receives the state of the keys and of Keychoir, and changes.
    #[must_use]
    pub fn includes_state(self) -> bool {
        match self {
            Self::All | Self::State => true,
            Self::Requests => false,
        }
    }

    fn includes(self, content: &EventContent) -> bool {
        match content {
            EventContent::Request(_) => self.includes_requests(),
            EventContent::Key { .. } | EventContent::Change(_) | EventContent::Overview(_) => {
                self.includes_state()
            }
        }
    }
}

impl Listeners {
    fn add(&mut self) {
        self.count += 1;
        self.idle_since = None;
    }

    fn remove(&mut self) {
        self.count = self.count.saturating_sub(1);
        if self.count == 0 {
            self.idle_since = Some(clock::instant());
        }
    }

    /// Returns whether the last listener disconnected more than [`RESUME_PERIOD`] before `now`.
    fn is_expired(&self, now: Instant) -> bool {
        self.idle_since.is_some_and(|since| now.saturating_duration_since(since) > RESUME_PERIOD)
    }
}

impl EventRing {
    /// Returns whether events are recorded. If they are not, callers need not create an event.
    #[must_use]
    pub fn is_recording(&self) -> bool {
        self.0.is_recording.load(Ordering::Relaxed)
    }

    /// Records events other than requests, unless no listener needs them.
    pub fn record(&self, contents: impl IntoIterator<Item = EventContent>) {
        if !self.is_recording() {
            return;
        }
        let mut ring = self.lock();
        if ring.listeners.is_expired(clock::instant()) {
            self.stop_recording(&mut ring);
            return;
        }
        ring.add(contents);
    }

    /// Records a request that has ended. Calls `request` only while requests are recorded.
    pub fn record_request(&self, request: impl FnOnce() -> EndedRequest) {
        if !self.0.is_recording_requests.load(Ordering::Relaxed) {
            return;
        }
        let content = EventContent::Request(Arc::new(request()));
        let mut ring = self.lock();
        if ring.request_listeners.is_expired(clock::instant()) {
            self.0.is_recording_requests.store(false, Ordering::Relaxed);
            ring.clear_requests();
            return;
        }
        ring.add([content]);
    }

    /// Adds a listener for the selected events. Returns `None` if there are `max_listeners` already.
    #[must_use]
    pub fn listen(&self, max_listeners: usize, selection: EventSelection) -> Option<EventListener> {
        let mut ring = self.lock();
        if ring.listeners.count >= max_listeners {
            return None;
        }
        let now = clock::instant();
        // Events after the end of the recording were lost for listeners with an earlier position.
        if ring.listeners.is_expired(now) || !self.is_recording() {
            self.stop_recording(&mut ring);
        }
        if selection.includes_requests() {
            let is_recording = self.0.is_recording_requests.load(Ordering::Relaxed);
            if ring.request_listeners.is_expired(now) || !is_recording {
                ring.clear_requests();
            }
            ring.request_listeners.add();
            self.0.is_recording_requests.store(true, Ordering::Relaxed);
        }
        ring.listeners.add();
        self.0.is_recording.store(true, Ordering::Relaxed);
        Some(EventListener { ring: self.clone(), selection })
    }

    fn stop_recording(&self, ring: &mut Ring) {
        self.0.is_recording.store(false, Ordering::Relaxed);
        self.0.is_recording_requests.store(false, Ordering::Relaxed);
        ring.clear();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Ring> {
        self.0.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl EventListener {
    /// Returns the selection of the listener.
    #[must_use]
    pub fn selection(&self) -> EventSelection {
        self.selection
    }

    /// Returns the current position, after the latest event.
    #[must_use]
    pub fn position(&self) -> u64 {
        self.ring.lock().latest_number
    }

    /// Returns the selected events after `position`.
    #[must_use]
    pub fn read(&self, position: u64) -> EventBatch {
        self.ring.lock().read(position, self.selection)
    }
}

impl Drop for EventListener {
    fn drop(&mut self) {
        let mut ring = self.ring.lock();
        ring.listeners.remove();
        if self.selection.includes_requests() {
            ring.request_listeners.remove();
        }
    }
}

impl Ring {
    fn add(&mut self, contents: impl IntoIterator<Item = EventContent>) {
        let first_new = self.events.len();
        for content in contents {
            self.latest_number += 1;
            self.events.push_back(Event { number: self.latest_number, content });
        }
        self.remove_replaced_states(first_new);
        while self.events.len() > MAX_EVENTS {
            match self.events.pop_front() {
                Some(Event { number, content: EventContent::Request(_) }) => {
                    self.latest_lost_request = number;
                }
                Some(Event { number, .. }) => self.latest_lost_state = number,
                None => {}
            }
        }
    }

    /// Removes the key states and the overview that the events from the index `first_new` on replace.
    fn remove_replaced_states(&mut self, first_new: usize) {
        let mut keys = HashSet::new();
        let mut has_overview = false;
        for event in self.events.range(first_new..) {
            match &event.content {
                EventContent::Key { id, .. } => drop(keys.insert(Arc::clone(id))),
                EventContent::Overview(_) => has_overview = true,
                EventContent::Request(_) | EventContent::Change(_) => {}
            }
        }
        if keys.is_empty() && !has_overview {
            return;
        }
        let mut index = 0;
        self.events.retain(|event| {
            let is_new = index >= first_new;
            index += 1;
            is_new
                || match &event.content {
                    EventContent::Key { id, .. } => !keys.contains(id),
                    EventContent::Overview(_) => !has_overview,
                    EventContent::Request(_) | EventContent::Change(_) => true,
                }
        });
    }

    fn read(&self, position: u64, selection: EventSelection) -> EventBatch {
        let first = self.events.partition_point(|event| event.number <= position);
        let selected = self.events.range(first..).filter(|event| selection.includes(&event.content));
        EventBatch {
            events: selected.cloned().collect(),
            position: self.latest_number,
            is_incomplete: position > self.latest_number
                || (selection.includes_state() && position < self.latest_lost_state)
                || (selection.includes_requests() && position < self.latest_lost_request),
        }
    }

    /// Removes all events when recording has ended. A listener with an earlier position has lost the removed events and
    /// the events that were not recorded.
    fn clear(&mut self) {
        self.events.clear();
        self.latest_number += 1;
        self.latest_lost_state = self.latest_number;
        self.latest_lost_request = self.latest_number;
    }

    /// Removes all requests when their recording has ended. A listener with an earlier position has lost the removed
    /// requests and the requests that were not recorded.
    fn clear_requests(&mut self) {
        self.events.retain(|event| !matches!(event.content, EventContent::Request(_)));
        self.latest_number += 1;
        self.latest_lost_request = self.latest_number;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(id: &str, document: &str) -> EventContent {
        EventContent::Key { id: id.into(), document: document.into() }
    }

    fn change(number: usize) -> EventContent {
        EventContent::Change(number.to_string().into())
    }

    fn request(outcome: &'static str) -> EndedRequest {
        EndedRequest {
            request_id: "r".into(),
            client: None,
            short_key: None,
            method: Method::GET,
            route: None,
            status: None,
            outcome,
            attempts: 0,
            retry_reasons: Vec::new(),
            credits: 0,
            duration: Duration::ZERO,
            event_text: OnceLock::new(),
        }
    }

    /// Asserts the documents of the events after a position, and whether events were lost.
    #[track_caller]
    fn assert_events(listener: &EventListener, position: u64, expected: &[&str], is_incomplete: bool) {
        let batch = listener.read(position);
        let documents: Vec<&str> = batch
            .events
            .iter()
            .map(|event| match &event.content {
                EventContent::Key { document, .. } => &**document,
                EventContent::Change(document) | EventContent::Overview(document) => &**document,
                EventContent::Request(request) => request.outcome,
            })
            .collect();
        assert_eq!((documents.as_slice(), batch.is_incomplete), (expected, is_incomplete));
    }

    #[test]
    fn nothing_is_recorded_without_listeners() {
        let ring = EventRing::default();
        ring.record([change(1)]);
        assert!(!ring.is_recording());
        let listener = ring.listen(1, EventSelection::All).unwrap();
        assert_events(&listener, listener.position(), &[], false);
        ring.record([change(2)]);
        assert_events(&listener, listener.position() - 1, &["2"], false);
    }

    #[test]
    fn the_latest_state_of_a_key_replaces_earlier_ones() {
        let ring = EventRing::default();
        let listener = ring.listen(1, EventSelection::All).unwrap();
        let start = listener.position();
        ring.record([key("a", "a1"), key("b", "b1"), EventContent::Overview("o1".into())]);
        ring.record([change(1)]);
        let middle = listener.position();
        ring.record([key("a", "a2"), EventContent::Overview("o2".into())]);
        assert_events(&listener, start, &["b1", "1", "a2", "o2"], false);
        assert_events(&listener, middle, &["a2", "o2"], false);
    }

    #[test]
    fn events_after_a_position_that_left_the_ring_are_incomplete() {
        let ring = EventRing::default();
        let listener = ring.listen(1, EventSelection::All).unwrap();
        let start = listener.position();
        ring.record((0..MAX_EVENTS).map(change));
        assert!(!listener.read(start).is_incomplete, "the ring must contain all of these events");
        ring.record([change(MAX_EVENTS)]);
        let batch = listener.read(start);
        assert!(
            batch.is_incomplete && batch.events.len() == MAX_EVENTS,
            "the loss of the first event must be reported"
        );
        assert!(!listener.read(start + 1).is_incomplete);
        assert!(
            listener.read(batch.position + 1).is_incomplete,
            "a position after the latest event is of another process"
        );
    }

    #[test]
    fn requests_are_created_only_for_listeners_that_receive_them() {
        let ring = EventRing::default();
        let state_listener = ring.listen(2, EventSelection::State).unwrap();
        let start = state_listener.position();
        ring.record_request(|| panic!("a request must not be created without a listener for requests"));
        let request_listener = ring.listen(2, EventSelection::Requests).unwrap();
        let request_start = request_listener.position();
        ring.record([change(1)]);
        ring.record_request(|| request("served"));
        assert_events(&state_listener, start, &["1"], false);
        assert_events(&request_listener, request_start, &["served"], false);
        assert!(
            request_listener.read(start).is_incomplete,
            "requests before the listener must not be recorded"
        );
    }

    #[test]
    fn lost_requests_do_not_make_the_state_incomplete() {
        let ring = EventRing::default();
        let state_listener = ring.listen(3, EventSelection::State).unwrap();
        let request_listener = ring.listen(3, EventSelection::Requests).unwrap();
        let listener = ring.listen(3, EventSelection::All).unwrap();
        let start = listener.position();
        for _ in 0..=MAX_EVENTS {
            ring.record_request(|| request("served"));
        }
        ring.record([change(1)]);
        assert_events(&state_listener, start, &["1"], false);
        assert!(request_listener.read(start).is_incomplete && listener.read(start).is_incomplete);
        (0..=MAX_EVENTS).for_each(|number| ring.record([change(number)]));
        assert!(state_listener.read(start).is_incomplete);
    }

    #[tokio::test(start_paused = true)]
    async fn requests_are_recorded_for_a_while_after_their_last_listener() {
        let ring = EventRing::default();
        let _state = ring.listen(2, EventSelection::State);
        let listener = ring.listen(2, EventSelection::Requests).unwrap();
        let position = listener.position();
        drop(listener);
        tokio::time::advance(RESUME_PERIOD).await;
        ring.record_request(|| request("served"));
        let listener = ring.listen(2, EventSelection::Requests).unwrap();
        assert_events(&listener, position, &["served"], false);
        drop(listener);
        tokio::time::advance(RESUME_PERIOD + Duration::from_millis(1)).await;
        ring.record_request(|| request("late"));
        ring.record_request(|| panic!("a request must not be created after recording has ended"));
        let listener = ring.listen(2, EventSelection::Requests).unwrap();
        assert_events(&listener, position, &[], true);
    }

    #[test]
    fn the_number_of_listeners_is_limited() {
        let ring = EventRing::default();
        let first = ring.listen(2, EventSelection::All).unwrap();
        let second = ring.listen(2, EventSelection::All);
        assert!(second.is_some() && ring.listen(2, EventSelection::All).is_none());
        drop(first);
        assert!(
            ring.listen(2, EventSelection::All).is_some(),
            "a disconnected listener must make room for another one"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn recording_continues_for_a_while_after_the_last_listener() {
        let ring = EventRing::default();
        let listener = ring.listen(1, EventSelection::All).unwrap();
        let position = listener.position();
        drop(listener);
        tokio::time::advance(RESUME_PERIOD).await;
        ring.record([change(1)]);
        let listener = ring.listen(1, EventSelection::All).unwrap();
        assert_events(&listener, position, &["1"], false);
        drop(listener);
        tokio::time::advance(RESUME_PERIOD + Duration::from_millis(1)).await;
        ring.record([change(2)]);
        assert!(!ring.is_recording());
        let listener = ring.listen(1, EventSelection::All).unwrap();
        assert_events(&listener, position, &[], true);
        assert_events(&listener, listener.position(), &[], false);
    }
}

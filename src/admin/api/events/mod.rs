//! Serves `GET events` and the events of the dashboard: changed documents of the keys and of the server, ended
//! requests, and changes of operators, as server-sent events.
//!
//! A stream reads from the ring of [`telemetry`](crate::telemetry) at most every 250 ms. A changed state is not
//! recorded where it changes. Instead, each stream starts comparisons with the earlier state on a blocking thread, so
//! that requests and workers do no work for events. A listener may name the keys that it displays, and then receives no
//! events of the other keys.

mod paced_stream;
mod sampler;

use std::collections::HashSet;
use std::fmt::Write as _;

use bytes::Bytes;
use http::HeaderMap;
use serde_json::json;

use super::documents;
use super::error::ApiError;
use crate::admin::Admin;
use crate::store::StoredChange;
use crate::telemetry::{EndedRequest, Event, EventContent, EventListener, EventRing, EventSelection};
use paced_stream::FRAME_INTERVAL;
pub(super) use paced_stream::PacedStream;
pub use sampler::EventSource;

/// The body of a response with events.
pub(super) type EventStream = PacedStream<Box<dyn FnMut() -> Option<Bytes> + Send>>;

/// The start of a stream. It sets the time after which a browser reconnects, in milliseconds.
const RETRY_FIELD: &str = "retry: 2000\n\n";

/// Replaces the number in the ids of all events of a snapshot except the last one. A listener that resumes after such
/// an event receives the whole snapshot again.
const SNAPSHOT_PART_NUMBER: &str = "snapshot";

/// The ids of the keys whose events a listener receives. If it is `None`, the listener receives the events of all keys.
pub(crate) type WantedKeys = Option<HashSet<String>>;

/// Builds the frames of one listener from the events in the ring.
struct FrameWriter {
    admin: Admin,
    listener: EventListener,
    keys: WantedKeys,
    /// The position after the last event that was sent.
    position: u64,
    /// Whether the next frame must begin with a snapshot of the state.
    needs_snapshot: bool,
    /// Whether no frame has been built yet.
    is_first: bool,
}

impl Admin {
    /// Opens a stream of the selected events. It continues after the event that `Last-Event-ID` names, and otherwise
    /// begins with a snapshot of the state, if the state is selected.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future removes the listener.
    pub(super) async fn event_stream(
        &self,
        headers: &HeaderMap,
        selection: EventSelection,
        keys: WantedKeys,
    ) -> Result<EventStream, ApiError> {
        let max_listeners = self.events.max_listeners();
        let listener = self.events.ring().listen(max_listeners, selection);
        let listener = listener.ok_or_else(|| ApiError::too_many_listeners(max_listeners))?;
        let position = headers.get("last-event-id").map(|id| {
            // The ring has no events of an earlier process. Their ids count as 0, a position before every event.
            id.to_str().ok().and_then(|id| self.parse_event_id(id)).unwrap_or(0)
        });
        let needs_snapshot = position.is_none() && selection.includes_state();
        // Requests that end after this position and before the snapshot is written follow the snapshot in the stream.
        let position = position.unwrap_or_else(|| listener.position());
        if selection.includes_state() {
            self.events.refresh(self).await;
        }
        let mut writer =
            FrameWriter { admin: self.clone(), listener, keys, position, needs_snapshot, is_first: true };
        let drain = self.draining.started();
        let stream: EventStream = PacedStream::new(Box::new(move || writer.next_frame()), drain);
        Ok(stream.with_offset(FRAME_INTERVAL.mul_f64(fastrand::f64())))
    }

    /// Returns the prefix of all event ids of this process.
    fn event_epoch(&self) -> String {
        format!("{:x}", self.started_at.0)
    }

    fn parse_event_id(&self, id: &str) -> Option<u64> {
        let (epoch, number) = id.trim().split_once('-')?;
        if epoch == self.event_epoch() { number.parse().ok() } else { None }
    }
}

impl FrameWriter {
    /// Returns a frame with the events since the last frame, or `None` if there are none.
    fn next_frame(&mut self) -> Option<Bytes> {
        let mut frame =
            if std::mem::take(&mut self.is_first) { RETRY_FIELD.to_owned() } else { String::new() };
        let epoch = self.admin.event_epoch();
        let includes_state = self.listener.selection().includes_state();
        if includes_state {
            self.admin.events.start_comparison_if_due(&self.admin);
        }
        let batch = self.listener.read(self.position);
        // A listener that has selected no state needs no snapshot, because a snapshot contains only state.
        if includes_state && (self.needs_snapshot || batch.is_incomplete) {
            self.write_snapshot(&mut frame, &epoch);
        } else {
            self.position = batch.position;
            self.write_events(&mut frame, &epoch, &batch.events);
        }
        (!frame.is_empty()).then(|| frame.into())
    }

    /// Writes those of the events that the listener receives.
    fn write_events(&self, frame: &mut String, epoch: &str, events: &[Event]) {
        for event in events {
            let is_wanted = match &event.content {
                EventContent::Key { id, .. } => is_wanted(&self.keys, id),
                EventContent::Request(_) | EventContent::Change(_) | EventContent::Overview(_) => true,
            };
            if is_wanted {
                write_event(frame, epoch, event);
            }
        }
    }

    /// Writes the state of the server and of the wanted keys, and then the requests and changes that the ring still
    /// has. Writes nothing while a comparison is running, because the worker does not wait for it.
    fn write_snapshot(&mut self, frame: &mut String, epoch: &str) {
        let Some(snapshot) = self.admin.events.snapshot(&self.listener, &self.keys) else { return };
        let mut earlier = self.listener.read(self.position).events;
        // The snapshot replaces the events with a state, because its state is later.
        earlier.retain(|event| match event.content {
            EventContent::Request(_) | EventContent::Change(_) => event.number <= snapshot.position,
            EventContent::Key { .. } | EventContent::Overview(_) => false,
        });
        let end = earlier.first().map_or(snapshot.position, |event| event.number.saturating_sub(1));
        let last = snapshot.contents.len().saturating_sub(1);
        for (index, content) in snapshot.contents.iter().enumerate() {
            let number = if index == last { end.to_string() } else { SNAPSHOT_PART_NUMBER.to_owned() };
            write_content(frame, epoch, &number, content);
        }
        self.write_events(frame, epoch, &earlier);
        self.position = snapshot.position;
        self.needs_snapshot = false;
    }
}

/// Returns whether a listener that wants these keys wants the key with this id.
fn is_wanted(keys: &WantedKeys, id: &str) -> bool {
    keys.as_ref().is_none_or(|keys| keys.contains(id))
}

fn write_event(frame: &mut String, epoch: &str, event: &Event) {
    write_content(frame, epoch, &event.number.to_string(), &event.content);
}

/// Writes an event. The text of a request is the same for all listeners, so it is built once.
fn write_content(frame: &mut String, epoch: &str, number: &str, content: &EventContent) {
    match content {
        EventContent::Key { document, .. } => write_server_sent_event(frame, epoch, number, "key", document),
        EventContent::Change(document) => write_server_sent_event(frame, epoch, number, "change", document),
        EventContent::Overview(document) => {
            write_server_sent_event(frame, epoch, number, "overview", document)
        }
        EventContent::Request(ended) => frame.push_str(ended.event_text.get_or_init(|| {
            let mut text = String::new();
            write_server_sent_event(
                &mut text,
                epoch,
                number,
                "request",
                &request_document(ended).to_string(),
            );
            text.into()
        })),
    }
}

/// Writes an event in the format of server-sent events. `data` is JSON in one line, which needs no escapes.
fn write_server_sent_event(frame: &mut String, epoch: &str, number: &str, name: &str, data: &str) {
    // Writing to a `String` cannot fail.
    let _ = write!(frame, "id: {epoch}-{number}\nevent: {name}\ndata: {data}\n\n");
}

/// Returns the document of an ended request.
fn request_document(request: &EndedRequest) -> serde_json::Value {
    let EndedRequest {
        request_id,
        client,
        short_key,
        method,
        route,
        status,
        outcome,
        attempts,
        retry_reasons,
        credits,
        duration,
        event_text: _,
    } = request;
    json!({
        "request_id": &**request_id,
        "client": client.as_ref().map(|client| client.as_str()),
        "short_key": short_key.as_ref().map(ToString::to_string),
        "method": method.as_str(),
        "route": route.map(|route| route.to_string()),
        "status": status,
        "outcome": outcome,
        "attempts": attempts,
        "retry_reasons": retry_reasons,
        "credits": credits,
        "total_ms": u64::try_from(duration.as_millis()).unwrap_or(u64::MAX),
    })
}

/// Records a change of an operator in the ring, if there are listeners.
pub fn record_change_event(ring: &EventRing, change: &StoredChange) {
    if ring.is_recording() {
        ring.record([EventContent::Change(documents::change_document(change).to_string().into())]);
    }
}

//! Reads the stream of server-sent events that the admin API sends.

use std::time::Duration;

use serde_json::Value;

/// The maximum wait for bytes of the stream. Keychoir sends a heartbeat after 15 s without an event.
const EVENT_TIMEOUT: Duration = Duration::from_secs(30);

/// An event that the admin API sent.
#[derive(Clone, Debug)]
pub struct SentEvent {
    pub id: String,
    pub name: String,
    pub data: Value,
}

/// Reads the events of a response.
pub struct EventReader {
    response: reqwest::Response,
    buffer: String,
}

impl EventReader {
    pub fn new(response: reqwest::Response) -> Self {
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        Self { response, buffer: String::new() }
    }

    /// Returns the next event, or `None` at the end of the stream.
    pub async fn next(&mut self) -> Option<SentEvent> {
        loop {
            while let Some((block, rest)) = self.buffer.split_once("\n\n") {
                let event = parse_event(block);
                self.buffer = rest.to_owned();
                if event.is_some() {
                    return event;
                }
            }
            let chunk = tokio::time::timeout(EVENT_TIMEOUT, self.response.chunk());
            let chunk = chunk.await.expect("the stream must send bytes within the timeout").unwrap()?;
            self.buffer.push_str(std::str::from_utf8(&chunk).unwrap());
        }
    }

    /// Reads up to the next event called `name` whose data `is_expected` accepts, and returns this event.
    pub async fn wait_for(&mut self, name: &str, is_expected: impl Fn(&Value) -> bool) -> SentEvent {
        loop {
            let event = self.next().await.expect("the stream must contain the event");
            if event.name == name && is_expected(&event.data) {
                return event;
            }
        }
    }

    /// Returns the next `count` events.
    pub async fn take(&mut self, count: usize) -> Vec<SentEvent> {
        let mut events = Vec::new();
        while events.len() < count {
            events.push(self.next().await.expect("the stream must contain more events"));
        }
        events
    }
}

/// Parses the lines of an event. Returns `None` for a comment or a setting of the stream.
fn parse_event(block: &str) -> Option<SentEvent> {
    let field = |name: &str| block.lines().find_map(|line| line.strip_prefix(name));
    let data = serde_json::from_str(field("data: ")?).expect("the data of an event must be JSON");
    Some(SentEvent {
        id: field("id: ").unwrap().to_owned(),
        name: field("event: ").unwrap().to_owned(),
        data,
    })
}

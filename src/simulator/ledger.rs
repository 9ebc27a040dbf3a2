//! Defines the snapshot of the simulator's requests and charges on which tests make assertions. Tests in another
//! process receive the snapshot as JSON.

use serde::{Deserialize, Serialize};

/// A snapshot of the simulator's state. Counters start at zero when the simulator starts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ledger {
    /// The keys in the order of the plan.
    pub keys: Vec<KeyEntry>,
    /// The workspaces that the plan describes, followed by the workspaces that only keys name.
    pub workspaces: Vec<WorkspaceEntry>,
    /// The sums over all requests, including requests without a known key.
    pub totals: Totals,
    /// Descriptions of content that a proxy must not forward, without the content itself, and of faults that a test set
    /// for a key outside the plan. When the list is full, later violations are only counted.
    pub violations: Vec<String>,
    /// The most recent requests that were answered or whose connection closed, oldest first. A WebSocket
    /// session is listed from its handshake, and its entry changes until the session ends.
    pub requests: Vec<RequestSummary>,
}

/// The counts of one key.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyEntry {
    /// The key as it was configured. It should not be logged, although a simulator's key is not secret.
    pub key: String,
    /// The workspace that is charged for this key.
    pub workspace: String,
    /// The number of requests received with this key.
    pub requests: u64,
    /// The number of responses with a status below 400.
    pub served: u64,
    /// The number of responses with a status of 400 or above.
    pub refused: u64,
    /// The number of requests without a response: the client disconnected, or a fault closed the connection.
    pub unanswered: u64,
    /// The credits charged to this key.
    pub charged: u64,
    /// The remaining credits of the key's workspace.
    pub remaining: u64,
}

/// The counts of one workspace.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkspaceEntry {
    /// The name of the workspace, which is its `workspace_id` as well.
    pub name: String,
    /// The credits per period.
    pub limit: u64,
    /// The credits used in this period.
    pub used: u64,
    /// The number of operations that hold a slot of the concurrency limit.
    pub running: u32,
    /// The highest number of concurrent operations so far.
    pub peak_running: u32,
}

/// The sums over all requests.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// The number of requests received, except requests to the control endpoints.
    pub requests: u64,
    /// The number of responses with a status below 400.
    pub served: u64,
    /// The number of responses with a status of 400 or above.
    pub refused: u64,
    /// The number of requests without a response: the client disconnected, or a fault closed the connection.
    pub unanswered: u64,
    /// The number of requests that have no response yet and whose connection is open.
    pub in_flight: u64,
    /// The sum of the charged credits of all keys.
    pub charged: u64,
    /// The number of open WebSocket sessions. Their handshakes are counted as served.
    #[serde(default)]
    pub sockets_open: u64,
    /// The number of violations, including violations that are omitted from the list.
    pub violations: u64,
}

/// The record of one request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequestSummary {
    /// The method as it was sent.
    pub method: String,
    /// The path and query as they were received, or `withheld` for a violation, because they may contain a credential.
    pub path_and_query: String,
    /// The key as it was configured, `elsewhere` if it belongs to another region, `unknown` if it is not in the plan,
    /// or `None` if the request contains no key.
    pub key: Option<String>,
    /// The status of the response, or `None` if there was no response.
    pub status: Option<u16>,
    /// The number of body bytes, or 0 if the body was not read to its end before the response.
    pub body_bytes: u64,
    /// The SHA-256 of the body in hexadecimal, or of an empty body if the body was not read to its end.
    pub body_sha256: String,
    /// Whether the body was read to its end. It is also `true` for an answered handshake, which has no body.
    pub is_body_complete: bool,
    /// The credits charged for this request.
    pub charged: u64,
    /// The WebSocket session, if the status is 101.
    #[serde(default)]
    pub socket: Option<SocketSummary>,
}

/// The record of a WebSocket session.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketSummary {
    /// Whether the session is open.
    pub is_open: bool,
    /// The key whose workspace pays, as it was configured. The key is taken from the request head, the first
    /// message or a token. It is `None` until the session is authorized, and always `None` for an echo.
    pub payer: Option<String>,
    /// The value of the `Origin` header, or `None` if the handshake does not have this header.
    pub origin: Option<String>,
    /// The subprotocols that the client offered, in the client's order.
    pub protocols: Vec<String>,
    /// The subprotocol that the simulator selected, or `None` if the client did not offer `convai`.
    pub protocol: Option<String>,
    /// The extensions that the client offered, or `None` if it offered none. The simulator accepts no extension.
    pub extensions: Option<String>,
    /// The number of text messages received.
    pub text_messages: u64,
    /// The number of binary messages received.
    pub binary_messages: u64,
    /// The number of bytes of all received messages.
    pub message_bytes: u64,
    /// The first text messages as they were received, up to a limit. A message with a credential is replaced
    /// by `withheld`.
    pub messages: Vec<String>,
    /// The number of messages sent, excluding the messages of refusals and faults, and excluding close and pong frames.
    pub messages_sent: u64,
    /// The text that was converted to speech, in order, up to a limit.
    pub spoken: String,
    /// The name of the refusal that was sent in the session, or `None` if the session was not refused.
    pub refused: Option<String>,
    /// The close frame that was received, or `None` if the client has sent none.
    pub close_received: Option<SocketClose>,
    /// The close frame that was sent, or `None` if none was sent. A reply to a received close frame counts as well.
    pub close_sent: Option<SocketClose>,
}

/// The content of a close frame.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketClose {
    /// The close code, or 1005 if the frame has no code.
    pub code: u16,
    /// The reason, which may be empty.
    pub reason: String,
}

impl Ledger {
    /// Returns the entry of a key, if it has one.
    #[must_use]
    pub fn key(&self, key: &str) -> Option<&KeyEntry> {
        self.keys.iter().find(|entry| entry.key == key)
    }

    /// Returns the entry of a workspace, if it has one.
    #[must_use]
    pub fn workspace(&self, name: &str) -> Option<&WorkspaceEntry> {
        self.workspaces.iter().find(|entry| entry.name == name)
    }

    /// Returns the recorded requests whose path begins with `path`.
    pub fn requests_to<'a>(&'a self, path: &'a str) -> impl Iterator<Item = &'a RequestSummary> {
        self.requests.iter().filter(move |request| request.path_and_query.starts_with(path))
    }
}

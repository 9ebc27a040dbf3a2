//! A snapshot of the simulator's requests and charges, for assertions in tests. Tests in another process
//! receive the snapshot as JSON.

use serde::{Deserialize, Serialize};

/// A snapshot. All counts begin at the start of the simulator.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ledger {
    /// The keys in the order of the plan.
    pub keys: Vec<KeyEntry>,
    /// The workspaces that the plan describes, then the workspaces that only keys name.
    pub workspaces: Vec<WorkspaceEntry>,
    /// The sums over all requests, including those without a known key.
    pub totals: Totals,
    /// Forbidden content that was received, described without its value. The oldest entries are
    /// kept.
    pub violations: Vec<String>,
    /// The last requests that have a response or a broken connection, oldest first. A WebSocket
    /// session is included from its handshake on, and its entry changes until it ends.
    pub requests: Vec<RequestSummary>,
}

/// The counts of one key.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyEntry {
    /// The key as it was configured. It should not be logged, although a simulator's key is no
    /// secret.
    pub key: String,
    /// The workspace whose credits it uses.
    pub workspace: String,
    /// Requests received with this key.
    pub requests: u64,
    /// Responses with a status below 400.
    pub served: u64,
    /// Responses with a status of 400 and above.
    pub refused: u64,
    /// Requests without a response: the client disconnected, or a fault closed the connection.
    pub unanswered: u64,
    /// Credits charged to this key.
    pub charged: u64,
    /// Remaining credits of its workspace.
    pub remaining: u64,
}

/// The counts of one workspace.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkspaceEntry {
    /// Its name, also its `workspace_id`.
    pub name: String,
    /// Credits per period.
    pub limit: u64,
    /// Used credits in this period.
    pub used: u64,
    /// Current concurrent requests.
    pub running: u32,
    /// Highest number of concurrent requests since the start.
    pub running_max: u32,
}

/// Sums over all requests.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// Requests received, except those to the simulator's own endpoints.
    pub requests: u64,
    /// Responses with a status below 400.
    pub served: u64,
    /// Responses with a status of 400 and above.
    pub refused: u64,
    /// Requests without a response.
    pub unanswered: u64,
    /// Received requests without a response or a broken connection.
    pub in_flight: u64,
    /// Credits charged.
    pub charged: u64,
    /// Open WebSocket sessions. Their handshakes are counted as served.
    #[serde(default)]
    pub sockets_open: u64,
    /// Violations, including those that the list does not contain.
    pub violations: u64,
}

/// The record of one request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequestSummary {
    /// The method as sent.
    pub method: String,
    /// The path and query as received, or `withheld` for a violation, which may contain a credential.
    pub path_and_query: String,
    /// The key as it was configured, `unknown` if it is not in the plan, or `None` if the request has no key.
    pub key: Option<String>,
    /// The status of the response, or `None` without a response.
    pub status: Option<u16>,
    /// Bytes of the body that were read before the response.
    pub body_bytes: u64,
    /// SHA-256 of the read bytes, in hexadecimal digits.
    pub body_sha256: String,
    /// Whether the read bytes are the whole body.
    pub body_complete: bool,
    /// Credits charged for this request.
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
    /// The key whose workspace pays, as it was configured. It comes from the head, the first
    /// message or a token. `None` before the session is authorized.
    pub payer: Option<String>,
    /// The header `Origin`.
    pub origin: Option<String>,
    /// The subprotocols that the client offered, in its order.
    pub protocols: Vec<String>,
    /// The selected subprotocol.
    pub protocol: Option<String>,
    /// The extensions that the client offered. The simulator accepts none.
    pub extensions: Option<String>,
    /// Text messages received.
    pub text_messages: u64,
    /// Binary messages received.
    pub binary_messages: u64,
    /// Bytes of all received messages.
    pub message_bytes: u64,
    /// The first text messages as received, up to a limit. A message with a credential is replaced by
    /// `withheld`.
    pub messages: Vec<String>,
    /// Messages sent, without close and pong frames.
    pub messages_sent: u64,
    /// The text that was converted to speech, in order, up to a limit.
    pub spoken: String,
    /// The name of the refusal that was sent in the session.
    pub refused: Option<String>,
    /// The close frame received.
    pub close_received: Option<SocketClose>,
    /// The close frame sent, also in reply to a received one.
    pub close_sent: Option<SocketClose>,
}

/// The content of a close frame.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketClose {
    /// The close code, or 1005 if the frame has no code.
    pub code: u16,
    /// The reason, possibly empty.
    pub reason: String,
}

impl Ledger {
    /// Returns the entry of a key.
    #[must_use]
    pub fn key(&self, key: &str) -> Option<&KeyEntry> {
        self.keys.iter().find(|entry| entry.key == key)
    }

    /// Returns the entry of a workspace.
    #[must_use]
    pub fn workspace(&self, name: &str) -> Option<&WorkspaceEntry> {
        self.workspaces.iter().find(|entry| entry.name == name)
    }

    /// Returns the recorded requests whose path begins with `path`.
    pub fn requests_to<'a>(&'a self, path: &'a str) -> impl Iterator<Item = &'a RequestSummary> {
        self.requests.iter().filter(move |request| request.path_and_query.starts_with(path))
    }
}

//! A snapshot of the simulator's requests and charges, which tests assert on and which another
//! process can parse from JSON.

use serde::{Deserialize, Serialize};

/// A snapshot. All counts begin at the start of the simulator.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ledger {
    /// In the order of the plan.
    pub keys: Vec<KeyEntry>,
    /// The workspaces of the plan, then those named only by keys.
    pub workspaces: Vec<WorkspaceEntry>,
    /// Sums over all requests, including those without a known key.
    pub totals: Totals,
    /// Forbidden content that was received, described without its value. The oldest are kept.
    pub violations: Vec<String>,
    /// The last requests whose head was answered or whose connection broke, oldest first. A
    /// WebSocket session is included from its handshake on, and changes until it ends.
    pub requests: Vec<RequestSummary>,
}

/// The counts of one key.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyEntry {
    /// The key as it was configured. A simulator's key is no secret, but it is not to be logged.
    pub key: String,
    /// The workspace whose credits it uses.
    pub workspace: String,
    /// Requests received with it.
    pub requests: u64,
    /// Requests answered with a status below 400.
    pub served: u64,
    /// Requests answered with a status of 400 and above.
    pub refused: u64,
    /// Requests without a response: the client disconnected, or a fault closed the connection.
    pub unanswered: u64,
    /// Credits charged to it.
    pub charged: u64,
    /// Credits its workspace has left.
    pub remaining: u64,
}

/// The counts of one workspace.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkspaceEntry {
    /// Its name, also its `workspace_id`.
    pub name: String,
    /// Credits of a period.
    pub limit: u64,
    /// Used credits of this period.
    pub used: u64,
    /// Concurrent requests now.
    pub running: u32,
    /// The maximum of concurrent requests so far.
    pub running_max: u32,
}

/// Sums over all requests.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// Requests received, without those to the simulator's own control paths.
    pub requests: u64,
    /// Answered below 400.
    pub served: u64,
    /// Answered with 400 and above.
    pub refused: u64,
    /// Without an answer.
    pub unanswered: u64,
    /// Requests received that are neither answered nor broken yet.
    pub in_flight: u64,
    /// Credits charged.
    pub charged: u64,
    /// Open WebSocket sessions. Their handshakes are counted as served.
    #[serde(default)]
    pub sockets_open: u64,
    /// Violations, including those that are not in the list.
    pub violations: u64,
}

/// The record of one request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequestSummary {
    /// As sent.
    pub method: String,
    /// Exactly as received; `withheld` for a violation, which may contain a credential.
    pub path_and_query: String,
    /// The key as it was configured, `unknown` for one that is not in the plan, `None` without a
    /// key.
    pub key: Option<String>,
    /// The status of the response; `None` without a response.
    pub status: Option<u16>,
    /// Bytes of the body that were read before the answer.
    pub body_bytes: u64,
    /// SHA-256 of those bytes, in hexadecimal digits.
    pub body_sha256: String,
    /// Whether those bytes are the whole body.
    pub body_complete: bool,
    /// Credits charged for it.
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
    /// The key whose workspace pays, as it was configured: the head's, that of the first message,
    /// or the one that minted a token. `None` before the session was authorized.
    pub payer: Option<String>,
    /// The header `Origin`.
    pub origin: Option<String>,
    /// The subprotocols that the client offered, in its order.
    pub protocols: Vec<String>,
    /// The selected subprotocol.
    pub protocol: Option<String>,
    /// The extensions that the client offered. None is ever accepted.
    pub extensions: Option<String>,
    /// Text messages received.
    pub text_messages: u64,
    /// Binary messages received.
    pub binary_messages: u64,
    /// Bytes of both.
    pub message_bytes: u64,
    /// The first text messages as received, up to a limit; `withheld` for one that contained a
    /// credential.
    pub messages: Vec<String>,
    /// Messages sent, without close and pong frames.
    pub messages_sent: u64,
    /// The text that was converted to speech, in order, up to a limit.
    pub spoken: String,
    /// The refusal that was sent in the session, by its name in the catalogue.
    pub refused: Option<String>,
    /// The close frame received.
    pub close_received: Option<SocketClose>,
    /// The close frame sent, also in reply to a received one.
    pub close_sent: Option<SocketClose>,
}

/// The content of a close frame.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketClose {
    /// The code; 1005 for a close without one.
    pub code: u16,
    /// The reason, possibly empty.
    pub reason: String,
}

impl Ledger {
    /// The entry of a key.
    #[must_use]
    pub fn key(&self, key: &str) -> Option<&KeyEntry> {
        self.keys.iter().find(|entry| entry.key == key)
    }

    /// The entry of a workspace.
    #[must_use]
    pub fn workspace(&self, name: &str) -> Option<&WorkspaceEntry> {
        self.workspaces.iter().find(|entry| entry.name == name)
    }

    /// The recorded requests whose path begins with `path`.
    pub fn requests_to<'a>(&'a self, path: &'a str) -> impl Iterator<Item = &'a RequestSummary> {
        self.requests.iter().filter(move |request| request.path_and_query.starts_with(path))
    }
}

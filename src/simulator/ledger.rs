//! What the simulator has seen and what it has charged, as a snapshot that tests assert on and
//! that reads back from JSON in another process.

use serde::{Deserialize, Serialize};

/// A snapshot. Everything counts from the start of the simulator.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ledger {
    /// In the order of the plan.
    pub keys: Vec<KeyEntry>,
    /// Those of the plan, then those that only keys name.
    pub workspaces: Vec<WorkspaceEntry>,
    /// Over all requests, also those without a known key.
    pub totals: Totals,
    /// What arrived and must not have, in words that do not repeat it. The oldest are kept.
    pub violations: Vec<String>,
    /// The last requests whose head was answered or whose connection broke, oldest first. A
    /// session on a socket is in it from its handshake on, and changes until it ends.
    pub requests: Vec<RequestSummary>,
}

/// One key's part.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyEntry {
    /// The key as it was configured. A simulator's key is no secret, but it is not to be logged.
    pub key: String,
    /// Whose credits it draws on.
    pub workspace: String,
    /// Requests that arrived with it.
    pub requests: u64,
    /// Of those, how many were answered below 400.
    pub served: u64,
    /// How many were answered with 400 and above.
    pub refused: u64,
    /// How many got no answer: the client left, or a fault closed the connection.
    pub unanswered: u64,
    /// Credits charged to it.
    pub charged: u64,
    /// Credits its workspace has left.
    pub remaining: u64,
}

/// One workspace's part.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkspaceEntry {
    /// Its name, also its `workspace_id`.
    pub name: String,
    /// Credits of a period.
    pub limit: u64,
    /// Credits of this period that are gone.
    pub used: u64,
    /// Work in flight at this moment.
    pub running: u32,
    /// The most work that was ever in flight at once.
    pub running_max: u32,
}

/// Sums over everything.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// Requests that arrived, without those to the simulator's own control paths.
    pub requests: u64,
    /// Answered below 400.
    pub served: u64,
    /// Answered with 400 and above.
    pub refused: u64,
    /// Without an answer.
    pub unanswered: u64,
    /// Arrived, and neither answered nor broken yet.
    pub in_flight: u64,
    /// Credits charged.
    pub charged: u64,
    /// Sockets whose session has not ended. Their handshakes are counted as served.
    #[serde(default)]
    pub sockets_open: u64,
    /// Violations, also those beyond the list.
    pub violations: u64,
}

/// What is remembered of one request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequestSummary {
    /// As sent.
    pub method: String,
    /// Exactly as it arrived; `withheld` for a violation, where a credential may stand in it.
    pub path_and_query: String,
    /// The key as it was configured, `unknown` for one that is not in the plan, nothing for none.
    pub key: Option<String>,
    /// The status of the answer; nothing when there was none.
    pub status: Option<u16>,
    /// Bytes of the body that were read before the answer.
    pub body_bytes: u64,
    /// SHA-256 of those bytes, in hexadecimal digits.
    pub body_sha256: String,
    /// Whether those bytes are the whole body.
    pub body_complete: bool,
    /// Credits charged for it.
    pub charged: u64,
    /// What a socket was used for, if the status is 101.
    #[serde(default)]
    pub socket: Option<SocketSummary>,
}

/// What is remembered of a session on a socket.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketSummary {
    /// Whether it still goes on.
    pub is_open: bool,
    /// The key whose workspace pays, as it was configured: the head's, that of the first message,
    /// or the one that minted a token. Nothing before it was let in.
    pub payer: Option<String>,
    /// The header `Origin`.
    pub origin: Option<String>,
    /// The protocols that the client offered, in its order.
    pub protocols: Vec<String>,
    /// The one that was agreed on.
    pub protocol: Option<String>,
    /// The extensions that the client offered, as they arrived. None is ever agreed on.
    pub extensions: Option<String>,
    /// Text messages that arrived.
    pub text_messages: u64,
    /// Binary messages that arrived.
    pub binary_messages: u64,
    /// Bytes of both.
    pub message_bytes: u64,
    /// The first text messages as they arrived, up to a bound; `withheld` for one that carried a
    /// credential.
    pub messages: Vec<String>,
    /// Messages that were sent, without closes and pongs.
    pub messages_sent: u64,
    /// The text that has become speech, one piece after the other, up to a bound.
    pub spoken: String,
    /// The refusal that was told in the session, by its name in the catalogue.
    pub refused: Option<String>,
    /// The close that arrived.
    pub close_received: Option<SocketClose>,
    /// The close that was sent, also as the answer to one that arrived.
    pub close_sent: Option<SocketClose>,
}

/// How a socket was closed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketClose {
    /// The code; 1005 for a close without one.
    pub code: u16,
    /// The reason, perhaps empty.
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

    /// The remembered requests whose path begins with `path`.
    pub fn requests_to<'a>(&'a self, path: &'a str) -> impl Iterator<Item = &'a RequestSummary> {
        self.requests.iter().filter(move |request| request.path_and_query.starts_with(path))
    }
}

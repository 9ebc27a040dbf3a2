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
    /// The last requests whose head was answered or whose connection broke, oldest first.
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

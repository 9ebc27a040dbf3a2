//! Connects the poller to the other replicas: its role among them, and the results of its polls.

use std::sync::Arc;

use tokio::sync::{mpsc, watch};

use crate::policy::authority::Authority;
use crate::policy::units::UnixMs;
use crate::pool::Observation;
use crate::secret::Fingerprint;

/// Whether this program polls the provider. Of several replicas of a pool, one polls for all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PollingRole {
    /// The replicas have not decided yet.
    Undecided,
    /// This program polls the provider.
    Leader,
    /// Another replica polls, and this program applies its results.
    Follower,
}

/// The result of a poll, for the other replicas of the pool.
#[derive(Clone, Debug)]
pub struct OwnPoll {
    /// The fingerprint of the key.
    pub key: Fingerprint,
    /// The result.
    pub observation: Observation,
    /// The time of the response.
    pub at: UnixMs,
    /// The host of the key, if it is not the default one.
    pub region: Option<Arc<Authority>>,
}

/// The connection of a poller to the other replicas of the pool.
#[derive(Clone, Debug)]
pub struct PollSharing {
    /// Whether this program polls.
    pub role: watch::Receiver<PollingRole>,
    /// Receives the results.
    pub polls: mpsc::Sender<OwnPoll>,
}

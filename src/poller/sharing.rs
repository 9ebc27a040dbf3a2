//! Defines the types that connect the quota poller to the other replicas of the pool: its role among them, and the
//! results of its polls. `shared` sends the role and receives the results.

use std::sync::Arc;

use tokio::sync::{mpsc, watch};

use crate::policy::authority::Authority;
use crate::policy::units::UnixMs;
use crate::pool::Observation;
use crate::secret::Fingerprint;

/// Whether this replica polls the provider. One replica of a pool polls for all replicas.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PollingRole {
    /// No replica is the leader yet.
    Undecided,
    /// This replica polls the provider.
    Leader,
    /// Another replica polls the provider, and this replica applies the results.
    Follower,
}

/// A poll of this replica with one key, for the other replicas of the pool.
#[derive(Clone, Debug)]
pub struct OwnPoll {
    /// The fingerprint of the polled key.
    pub key: Fingerprint,
    /// The quota of the key's workspace, or why the provider did not report it.
    pub observation: Observation,
    /// The time of the provider's response.
    pub at: UnixMs,
    /// The provider's host for the key, or `None` for the default host.
    pub region: Option<Arc<Authority>>,
}

/// The channels between the quota poller and the task that communicates with the other replicas.
#[derive(Clone, Debug)]
pub struct PollSharing {
    /// The current role of this replica.
    pub role: watch::Receiver<PollingRole>,
    /// The queue of polls to send to the other replicas.
    pub polls: mpsc::Sender<OwnPoll>,
}

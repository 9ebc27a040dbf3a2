//! The task that shares the pool with other replicas, and its connections to the rest of the program.

use std::sync::Arc;

use tokio::sync::mpsc;

use crate::policy::authority::Authority;
use crate::poller::PollSharing;
use crate::pool::Pool;
use crate::shared::{LinkInputs, LinkSettings, LinkTask, SharedPoolView};
use crate::tasks::{AbortOnDrop, Tasks};
use crate::upstream::TlsError;

/// The running task. Dropping it ends the link.
#[derive(Debug)]
pub(super) struct ReplicaTask {
    pub(super) poll_sharing: PollSharing,
    pub(super) view: SharedPoolView,
    _task: AbortOnDrop,
}

impl ReplicaTask {
    /// Starts the task. `regions` are the regional hosts of the provider, or `None` if this program does not poll.
    pub(super) fn start(
        settings: LinkSettings,
        pool: &Arc<Pool>,
        replica_id: String,
        regions: Option<Arc<[Arc<Authority>]>>,
    ) -> Result<Self, TlsError> {
        /// More polls than keys are never waiting, because one key is polled at a time.
        const MAX_QUEUED_POLLS: usize = 1_024;
        let (sender, receiver) = mpsc::channel(MAX_QUEUED_POLLS);
        let inputs = LinkInputs {
            pool: Arc::clone(pool),
            replica_id,
            polls: regions.is_some().then_some(receiver),
            regions: regions.unwrap_or_default(),
        };
        let (link, role, view) = LinkTask::new(settings, inputs)?;
        let task = Tasks::new().spawn_guarded(link.run());
        Ok(Self { poll_sharing: PollSharing { role, polls: sender }, view, _task: task })
    }
}

/// Returns a new random id of a replica.
pub(super) fn new_id() -> String {
    format!("r{:012x}", fastrand::u64(..1 << 48))
}

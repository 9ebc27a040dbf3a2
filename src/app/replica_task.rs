//! Starts and stops the task that shares the pool with other replicas through Redis, and connects the task to the
//! requests, the poller, the overlay and the admin pages. Redis gives each replica grants: amounts that the replica may
//! use without a further request to Redis.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::elevenlabs::affinity::RetentionLimits;
use crate::policy::authority::Authority;
use crate::poller::{OwnPoll, PollSharing};
use crate::pool::Pool;
use crate::proxy::{ReplicaLink, SharedConfig};
use crate::shared::{LinkHandles, LinkInputs, LinkSettings, LinkTask, OverlayPort, SharedPoolView};
use crate::tasks::{AbortOnDrop, Tasks};
use crate::upstream::TlsError;

/// The link to the other replicas, before its task is started.
pub(super) struct PreparedReplica {
    task: LinkTask,
    polls: mpsc::Sender<OwnPoll>,
    handles: LinkHandles,
}

/// The running link. Dropping it ends the link.
#[derive(Debug)]
pub(super) struct ReplicaTask {
    pub(super) poll_sharing: PollSharing,
    pub(super) view: SharedPoolView,
    pub(super) overlay: mpsc::Sender<OverlayPort>,
    leaving: CancellationToken,
    tasks: Tasks,
    _abort_guard: AbortOnDrop,
}

impl ReplicaTask {
    /// Gives the grants and leases of this replica back to the shared pool, so that the other replicas need not wait
    /// for their expiry.
    pub(super) async fn leave(self) {
        self.leaving.cancel();
        // If Redis does not respond in time, the grants and leases expire.
        let _ = tokio::time::timeout(LEAVE_TIMEOUT, self.tasks.wait_until_ended()).await;
    }
}

/// Maximum duration of [`ReplicaTask::leave`].
pub(super) const LEAVE_TIMEOUT: Duration = Duration::from_secs(1);

impl PreparedReplica {
    /// Prepares the link. `regions` are the regional hosts of the provider, or `None` if this program does not poll.
    pub(super) fn new(
        settings: LinkSettings,
        pool: &Arc<Pool>,
        replica_id: String,
        regions: Option<Arc<[Arc<Authority>]>>,
        owner_limits: RetentionLimits,
    ) -> Result<Self, TlsError> {
        /// Maximum number of poll results that wait until the task sends them to the other replicas. One key is polled
        /// at a time, so there are at most as many results as keys.
        const MAX_QUEUED_POLLS: usize = 1_024;
        let (polls, receiver) = mpsc::channel(MAX_QUEUED_POLLS);
        let inputs = LinkInputs {
            pool: Arc::clone(pool),
            replica_id,
            polls: regions.is_some().then_some(receiver),
            regions: regions.unwrap_or_default(),
            owner_limits,
        };
        let (task, handles) = LinkTask::new(settings, inputs)?;
        Ok(Self { task, polls, handles })
    }

    /// Returns the link through which requests use the shared pool.
    pub(super) fn link(&self) -> Arc<dyn ReplicaLink> {
        Arc::clone(&self.handles.link)
    }

    /// Starts the task, which reports the usage of the clients in `config` to the other replicas.
    pub(super) fn start(self, config: SharedConfig) -> ReplicaTask {
        let Self { task, polls, handles: LinkHandles { role, view, overlay, leaving, .. } } = self;
        let tasks = Tasks::new();
        let abort_guard = tasks.spawn_guarded(task.run(config));
        let poll_sharing = PollSharing { role, polls };
        ReplicaTask { poll_sharing, view, overlay, leaving, tasks, _abort_guard: abort_guard }
    }
}

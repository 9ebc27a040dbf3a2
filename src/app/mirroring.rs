//! Owns the task of the mirror in Supabase. The mirror must be ended after the last write of the usage store
//! and before the database is closed.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::mirror::{self, Mirror, MirrorHealth};
use crate::store::WriterHandle;
use crate::tasks::{AbortOnDrop, Tasks};

/// The running mirror. Dropping it aborts the task.
#[derive(Debug)]
pub(super) struct Mirroring {
    pub(super) health: MirrorHealth,
    shutdown: CancellationToken,
    tasks: Tasks,
    task: AbortOnDrop,
    pub(super) final_push_timeout: Duration,
}

impl Mirroring {
    /// Starts the mirror if it is configured and the usage store has an outbox.
    pub(super) fn start(
        settings: Option<mirror::Settings>,
        writing: &mut WriterHandle,
    ) -> Result<Option<Self>, mirror::MirrorStartError> {
        let Some((settings, outbox)) = settings.zip(writing.outbox.take()) else { return Ok(None) };
        let final_push_timeout = settings.final_push_timeout;
        let (health, shutdown, tasks) = (MirrorHealth::default(), CancellationToken::new(), Tasks::new());
        let mirror = Mirror::new(outbox, settings, health.clone())?;
        let task = tasks.spawn_guarded(mirror.run(shutdown.clone()));
        Ok(Some(Self { health, shutdown, tasks, task, final_push_timeout }))
    }

    /// Sends the remaining rows, within `final_push_timeout`, and ends.
    pub(super) async fn end(self) {
        self.shutdown.cancel();
        // Rows that are not sent in time are sent after the next start.
        let _ = tokio::time::timeout(self.final_push_timeout, self.tasks.ended()).await;
        drop(self.task);
    }
}

//! Owns the task of the mirror in Supabase. The task must end after the last write of the usage store and
//! before the database is closed.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::mirror::{self, Mirror, MirrorHealth};
use crate::store::WriterHandle;
use crate::tasks::{AbortOnDrop, Tasks};

/// The running mirror. Dropping the value aborts the task.
#[derive(Debug)]
pub(super) struct MirrorTask {
    pub(super) health: MirrorHealth,
    shutdown: CancellationToken,
    tasks: Tasks,
    abort_guard: AbortOnDrop,
    pub(super) final_push_timeout: Duration,
}

impl MirrorTask {
    /// Starts the mirror if it is configured and the usage store has an outbox.
    pub(super) fn start(
        settings: Option<mirror::Settings>,
        store_writer: &mut WriterHandle,
    ) -> Result<Option<Self>, mirror::MirrorStartError> {
        let Some((settings, outbox)) = settings.zip(store_writer.outbox.take()) else { return Ok(None) };
        let final_push_timeout = settings.final_push_timeout;
        let (health, shutdown, tasks) = (MirrorHealth::default(), CancellationToken::new(), Tasks::new());
        let mirror = Mirror::new(outbox, settings, health.clone())?;
        let abort_guard = tasks.spawn_guarded(mirror.run(shutdown.clone()));
        Ok(Some(Self { health, shutdown, tasks, abort_guard, final_push_timeout }))
    }

    /// Sends the remaining rows, for up to `final_push_timeout`, and ends the task.
    pub(super) async fn finish(self) {
        self.shutdown.cancel();
        // Rows that are not sent in time are sent after the next startup.
        let _ = tokio::time::timeout(self.final_push_timeout, self.tasks.wait_until_ended()).await;
        drop(self.abort_guard);
    }
}

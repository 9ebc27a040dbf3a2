//! Runs the mirror in Supabase: it starts with the usage store, and ends after the store's last write and
//! before the database is closed, within its timeout.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::mirror::{self, Mirror, MirrorHealth};
use crate::store::Writing;
use crate::tasks::{AbortOnDrop, Tasks};

/// A running mirror.
#[derive(Debug)]
pub(super) struct Mirroring {
    pub(super) health: MirrorHealth,
    end: CancellationToken,
    tasks: Tasks,
    running: AbortOnDrop,
    final_push_timeout: Duration,
}

impl Mirroring {
    /// Starts the mirror, when it is configured and the usage store has an outbox.
    pub(super) fn start(
        settings: Option<mirror::Settings>,
        writing: &mut Writing,
    ) -> Result<Option<Self>, mirror::MirrorStartError> {
        let Some((settings, outbox)) = settings.zip(writing.outbox.take()) else { return Ok(None) };
        let final_push_timeout = settings.final_push_timeout;
        let (health, end, tasks) = (MirrorHealth::default(), CancellationToken::new(), Tasks::new());
        let mirror = Mirror::new(outbox, settings, health.clone())?;
        let running = tasks.spawn_guarded(mirror.run(end.clone()));
        Ok(Some(Self { health, end, tasks, running, final_push_timeout }))
    }

    /// The maximum duration of `end`.
    pub(super) fn max_end_duration(&self) -> Duration {
        self.final_push_timeout
    }

    /// Sends the rows that are still due, within the timeout, and ends.
    pub(super) async fn end(self) {
        self.end.cancel();
        // Rows that are not sent now are sent after the next start.
        let _ = tokio::time::timeout(self.final_push_timeout, self.tasks.ended()).await;
        drop(self.running);
    }
}

//! The mirror as a part of the running program: begun with the books, ended after them and before
//! their file is closed, within its bound.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::mirror::{self, Health, Mirror};
use crate::store::Writing;
use crate::tasks::{AbortOnDrop, Tasks};

/// A mirror that runs.
#[derive(Debug)]
pub(super) struct Mirroring {
    pub(super) health: Health,
    end: CancellationToken,
    tasks: Tasks,
    running: AbortOnDrop,
    final_push_max: Duration,
}

impl Mirroring {
    /// Begins to mirror, when somebody wants it and the books have an outbox.
    pub(super) fn start(
        settings: Option<mirror::Settings>,
        writing: &mut Writing,
    ) -> Result<Option<Self>, mirror::StartError> {
        let Some((settings, outbox)) = settings.zip(writing.outbox.take()) else { return Ok(None) };
        let final_push_max = settings.final_push_max;
        let (health, end, tasks) = (Health::default(), CancellationToken::new(), Tasks::new());
        let mirror = Mirror::new(outbox, settings, health.clone())?;
        let running = tasks.spawn_guarded(mirror.run(end.clone()));
        Ok(Some(Self { health, end, tasks, running, final_push_max }))
    }

    /// How long its end may take.
    pub(super) fn end_max(&self) -> Duration {
        self.final_push_max
    }

    /// Sends what is still due, within its bound, and ends.
    pub(super) async fn end(self) {
        self.end.cancel();
        // What is not sent now is sent after the next start.
        let _ = tokio::time::timeout(self.final_push_max, self.tasks.ended()).await;
        drop(self.running);
    }
}

//! Connections that wait for their next request.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::wire::Connection;
use crate::clock;
use crate::tasks::Tasks;

/// Between two looks at connections that wait: one that the provider has closed is let go by then.
const SWEEP: Duration = Duration::from_secs(5);

/// The waiting connections, the freshest on top: it is the least likely to have been closed.
#[derive(Debug)]
pub(super) struct Idle {
    waiting: Mutex<Waiting>,
    connections_max: usize,
    idle_max: Duration,
    age_max: Duration,
    tasks: Tasks,
}

#[derive(Debug, Default)]
struct Waiting {
    connections: Vec<(Box<Connection>, Instant)>,
    is_swept: bool,
}

impl Idle {
    pub(super) fn new(connections_max: usize, idle_max: Duration, age_max: Duration, tasks: Tasks) -> Self {
        Self { waiting: Mutex::default(), connections_max, idle_max, age_max, tasks }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection that takes a request now. Those on top of it that waited too long or are closed are
    /// let go.
    pub(super) fn take(&self, now: Instant) -> Option<Box<Connection>> {
        let mut waiting = self.lock();
        while let Some((mut connection, since)) = waiting.connections.pop() {
            if self.is_fresh(&connection, since, now) && connection.is_quiet() {
                return Some(connection);
            }
        }
        None
    }

    fn is_fresh(&self, connection: &Connection, since: Instant, now: Instant) -> bool {
        now.saturating_duration_since(since) < self.idle_max
            && now.saturating_duration_since(connection.opened_at()) < self.age_max
    }

    /// Takes a connection back whose exchange is complete.
    pub(super) fn put(idle: &Arc<Self>, mut connection: Box<Connection>) {
        let mut waiting = idle.lock();
        if waiting.connections.len() < idle.connections_max {
            connection.rest();
            waiting.connections.push((connection, clock::instant()));
            if !std::mem::replace(&mut waiting.is_swept, true) {
                idle.tasks.spawn(sweep(Arc::downgrade(idle)));
            }
        }
    }

    /// Lets go what waited too long or is closed; whether something still waits.
    fn sweep(&self, now: Instant) -> bool {
        let mut waiting = self.lock();
        waiting.connections.retain_mut(|(connection, since)| {
            self.is_fresh(connection, *since, now) && connection.is_quiet()
        });
        waiting.is_swept = !waiting.connections.is_empty();
        waiting.is_swept
    }
}

async fn sweep(idle: Weak<Idle>) {
    loop {
        tokio::time::sleep(SWEEP).await;
        match idle.upgrade() {
            Some(idle) if idle.sweep(clock::instant()) => {}
            Some(_) | None => return,
        }
    }
}

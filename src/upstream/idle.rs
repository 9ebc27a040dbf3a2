//! The idle pool: open connections to one authority that have no request.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::wire::Connection;
use crate::clock;
use crate::tasks::Tasks;

/// Interval between two checks of the idle connections: one that the provider has closed is dropped by then.
const SWEEP: Duration = Duration::from_secs(5);

/// The idle connections, the most recently used on top: it is the least likely to have been closed.
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

    /// Takes a connection that accepts a request now. Connections above it that are expired or closed are
    /// dropped.
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

    /// Returns a connection whose response is complete to the pool.
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

    /// Drops the connections that are expired or closed; returns whether others remain.
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

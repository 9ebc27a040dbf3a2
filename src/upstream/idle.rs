//! The idle pool: open connections to one authority that have no request.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::wire::Connection;
use crate::clock;
use crate::tasks::Tasks;

/// Interval between two checks of the idle connections: within this time, a connection that the provider has
/// closed is dropped.
const SWEEP: Duration = Duration::from_secs(5);

/// The idle connections, the most recently used on top: it is the least likely to have been closed.
#[derive(Debug)]
pub(super) struct Idle {
    idle: Mutex<IdleConnections>,
    max_connections: usize,
    keepalive_timeout: Duration,
    max_connection_duration: Duration,
    tasks: Tasks,
}

#[derive(Debug, Default)]
struct IdleConnections {
    connections: Vec<(Box<Connection>, Instant)>,
    is_swept: bool,
}

impl Idle {
    pub(super) fn new(
        max_connections: usize,
        keepalive_timeout: Duration,
        max_connection_duration: Duration,
        tasks: Tasks,
    ) -> Self {
        Self { idle: Mutex::default(), max_connections, keepalive_timeout, max_connection_duration, tasks }
    }

    fn lock(&self) -> MutexGuard<'_, IdleConnections> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a connection that accepts a request now. Connections above it that are expired or closed are
    /// dropped.
    pub(super) fn take(&self, now: Instant) -> Option<Box<Connection>> {
        let mut pool = self.lock();
        while let Some((mut connection, since)) = pool.connections.pop() {
            if self.is_fresh(&connection, since, now) && connection.is_idle() {
                return Some(connection);
            }
        }
        None
    }

    fn is_fresh(&self, connection: &Connection, since: Instant, now: Instant) -> bool {
        now.saturating_duration_since(since) < self.keepalive_timeout
            && now.saturating_duration_since(connection.opened_at()) < self.max_connection_duration
    }

    /// Returns a connection whose response is complete to the pool.
    pub(super) fn put(idle: &Arc<Self>, mut connection: Box<Connection>) {
        let mut pool = idle.lock();
        if pool.connections.len() < idle.max_connections {
            connection.release_buffers();
            pool.connections.push((connection, clock::instant()));
            if !std::mem::replace(&mut pool.is_swept, true) {
                idle.tasks.spawn(sweep(Arc::downgrade(idle)));
            }
        }
    }

    /// Drops the connections that are expired or closed; returns whether others remain.
    fn sweep(&self, now: Instant) -> bool {
        let mut pool = self.lock();
        pool.connections
            .retain_mut(|(connection, since)| self.is_fresh(connection, *since, now) && connection.is_idle());
        pool.is_swept = !pool.connections.is_empty();
        pool.is_swept
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

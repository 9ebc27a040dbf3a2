//! Keeps the idle connections to one authority for the next requests. A periodic sweep drops the connections that are
//! expired or that the provider has closed. Such a connection is also dropped instead of being used for a request.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::connection::Connection;
use crate::clock;
use crate::tasks::Tasks;

/// Interval between two sweeps. A connection that the provider has closed stays in the pool for at most this time.
const SWEEP_INTERVAL: Duration = Duration::from_secs(5);

/// A stack of idle connections. The most recently used connection is on top, because it is the least likely
/// to have been closed.
#[derive(Debug)]
pub(super) struct IdlePool {
    idle: Mutex<IdleConnections>,
    max_connections: usize,
    keepalive_timeout: Duration,
    max_connection_duration: Duration,
    tasks: Tasks,
}

#[derive(Debug, Default)]
struct IdleConnections {
    /// Each connection with the time at which it became idle.
    connections: Vec<(Box<Connection>, Instant)>,
    /// Whether a task sweeps the pool. The task runs only while the pool has connections.
    has_sweep_task: bool,
}

impl IdlePool {
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

    /// Takes the most recently used connection that is neither expired nor closed. Drops the expired and closed
    /// connections above it.
    pub(super) fn take(&self, now: Instant) -> Option<Box<Connection>> {
        let mut idle = self.lock();
        while let Some((mut connection, idle_since)) = idle.connections.pop() {
            if !self.is_expired(&connection, idle_since, now) && connection.is_reusable() {
                return Some(connection);
            }
        }
        None
    }

    fn is_expired(&self, connection: &Connection, idle_since: Instant, now: Instant) -> bool {
        now.saturating_duration_since(idle_since) >= self.keepalive_timeout
            || now.saturating_duration_since(connection.opened_at()) >= self.max_connection_duration
    }

    /// Adds a connection whose response is complete, or closes it if the pool is full.
    pub(super) fn put(self: &Arc<Self>, mut connection: Box<Connection>) {
        let mut idle = self.lock();
        if idle.connections.len() < self.max_connections {
            connection.release_buffers();
            idle.connections.push((connection, clock::instant()));
            if !std::mem::replace(&mut idle.has_sweep_task, true) {
                self.tasks.spawn(sweep_periodically(Arc::downgrade(self)));
            }
        }
    }

    /// Drops expired and closed connections. Returns whether other connections remain.
    fn sweep(&self, now: Instant) -> bool {
        let mut idle = self.lock();
        idle.connections.retain_mut(|(connection, idle_since)| {
            !self.is_expired(connection, *idle_since, now) && connection.is_reusable()
        });
        idle.has_sweep_task = !idle.connections.is_empty();
        idle.has_sweep_task
    }
}

/// Sweeps the pool until the pool is empty or dropped.
async fn sweep_periodically(weak_pool: Weak<IdlePool>) {
    loop {
        tokio::time::sleep(SWEEP_INTERVAL).await;
        let has_connections = weak_pool.upgrade().is_some_and(|pool| pool.sweep(clock::instant()));
        if !has_connections {
            return;
        }
    }
}

//! The idle connections to one authority. Expired connections, and those that the provider has closed, are
//! dropped by a periodic sweep or when they are taken.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::connection::Connection;
use crate::clock;
use crate::tasks::Tasks;

/// Interval between two sweeps. A connection that the provider has closed stays open for at most this long.
const SWEEP_INTERVAL: Duration = Duration::from_secs(5);

/// A stack of idle connections. The most recently used one is on top, because it is the least likely to have
/// been closed.
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
    /// Each connection with the time since which it is idle.
    connections: Vec<(Box<Connection>, Instant)>,
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

    /// Takes the most recently used connection that is neither expired nor closed. Drops those above it.
    pub(super) fn take(&self, now: Instant) -> Option<Box<Connection>> {
        let mut pool = self.lock();
        while let Some((mut connection, idle_since)) = pool.connections.pop() {
            if !self.is_expired(&connection, idle_since, now) && connection.is_idle() {
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
    pub(super) fn put(idle: &Arc<Self>, mut connection: Box<Connection>) {
        let mut pool = idle.lock();
        if pool.connections.len() < idle.max_connections {
            connection.release_buffers();
            pool.connections.push((connection, clock::instant()));
            if !std::mem::replace(&mut pool.has_sweep_task, true) {
                idle.tasks.spawn(sweep(Arc::downgrade(idle)));
            }
        }
    }

    /// Drops expired and closed connections; returns whether others remain.
    fn sweep(&self, now: Instant) -> bool {
        let mut pool = self.lock();
        pool.connections.retain_mut(|(connection, idle_since)| {
            !self.is_expired(connection, *idle_since, now) && connection.is_idle()
        });
        pool.has_sweep_task = !pool.connections.is_empty();
        pool.has_sweep_task
    }
}

/// Sweeps the pool until it is empty or dropped.
async fn sweep(idle: Weak<IdlePool>) {
    loop {
        tokio::time::sleep(SWEEP_INTERVAL).await;
        match idle.upgrade() {
            Some(idle) if idle.sweep(clock::instant()) => {}
            Some(_) | None => return,
        }
    }
}

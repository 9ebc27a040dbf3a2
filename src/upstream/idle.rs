//! Connections that wait for their next request.

use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use hyper::client::conn::http1::SendRequest;

use crate::clock;
use crate::tasks::AbortOnDrop;

/// An open connection. Dropping it closes it, whatever it is doing.
pub(super) struct Connection<B> {
    sender: SendRequest<B>,
    opened_at: Instant,
    _driver: AbortOnDrop,
}

impl<B> Connection<B> {
    pub(super) fn new(sender: SendRequest<B>, driver: AbortOnDrop) -> Self {
        Self { sender, opened_at: clock::instant(), _driver: driver }
    }

    pub(super) fn sender(&mut self) -> &mut SendRequest<B> {
        &mut self.sender
    }
}

impl<B> fmt::Debug for Connection<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("is_ready", &self.sender.is_ready()).finish()
    }
}

/// The waiting connections, the freshest on top: it is the least likely to have been closed.
#[derive(Debug)]
pub(super) struct Idle<B> {
    waiting: Mutex<Vec<(Connection<B>, Instant)>>,
    connections_max: usize,
    idle_max: Duration,
    age_max: Duration,
}

impl<B> Idle<B> {
    pub(super) fn new(connections_max: usize, idle_max: Duration, age_max: Duration) -> Self {
        Self { waiting: Mutex::default(), connections_max, idle_max, age_max }
    }

    /// A connection that takes a request now. Those that waited too long or are closed are let go.
    pub(super) fn take(&self, now: Instant) -> Option<Connection<B>> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.retain(|(connection, since)| {
            !connection.sender.is_closed()
                && now.saturating_duration_since(*since) < self.idle_max
                && now.saturating_duration_since(connection.opened_at) < self.age_max
        });
        let ready = waiting.iter().rposition(|(connection, _)| connection.sender.is_ready())?;
        Some(waiting.remove(ready).0)
    }

    /// Takes a connection back whose exchange is complete.
    pub(super) fn put(&self, connection: Connection<B>) {
        if connection.sender.is_closed() {
            return;
        }
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.len() < self.connections_max {
            waiting.push((connection, clock::instant()));
        }
    }
}

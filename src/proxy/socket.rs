//! WebSocket sessions, from their 101 to their end. Read `session` first.
//!
//! The provider accepts a handshake even with an invalid key, and reports the error in a message.
//! So the client's opening messages are buffered until the provider sends something useful. A
//! refusal before that moves the session to the next key, unseen by the client.

mod session;

mod polling;

mod first_message_auth;
mod handshake;

mod failover;
mod speech;

mod ending;

mod buffers;
mod client_to_upstream;
mod upstream_to_client;

pub(super) use first_message_auth::FirstMessageAuth;
pub(super) use handshake::Handshake;

use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::upstream::Connect;
use first_message_auth::UnauthenticatedSession;
use session::Session;

/// The session that runs on a connection after its 101.
pub struct Socket<C>(SocketKind<C>);

enum SocketKind<C> {
    Session(Box<Session<C>>),
    Unknown(Box<UnauthenticatedSession<C>>),
}

impl<C: Connect> Socket<C> {
    /// Runs the session with `client`, which has already sent `early`, to its end.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future closes both connections at once, and writes the usage record.
    pub async fn run<S: AsyncRead + AsyncWrite + Unpin>(self, client: S, early: Bytes) {
        let (session, client, early) = match self.0 {
            SocketKind::Session(session) => (session, client, early),
            // Boxed, so that it is freed before the session begins.
            SocketKind::Unknown(unknown) => match Box::pin(unknown.introduced(client, early)).await {
                Some(introduced) => introduced,
                None => return,
            },
        };
        session.run(client, early).await;
    }
}

/// Limits of sessions.
#[derive(Clone, Copy, Debug)]
pub struct SocketLimits {
    /// Maximum time without data in either direction; zero for no limit.
    pub idle_timeout: Duration,
    /// Maximum duration of a session; zero for no limit.
    pub max_session_duration: Duration,
    /// Maximum bytes of a client's opening messages that are kept for a failover to another key.
    pub replay_buffer: usize,
    /// Maximum bytes of one message that are read before it is forwarded in parts.
    pub max_buffered_message_size: usize,
    /// How long after the last text or audio a text-to-speech socket keeps its concurrency slot.
    pub speech_idle_timeout: Duration,
    /// Maximum wait for a first message that authenticates the client.
    pub auth_message_timeout: Duration,
    /// Maximum bytes from the client that one session may buffer.
    pub max_session_buffer: usize,
    /// Maximum wait for the second close frame, and for the end of the connection.
    pub close_timeout: Duration,
    /// Interval at which a session checks its client's credit quota.
    pub quota_check_interval: Duration,
}

impl SocketLimits {
    /// Bytes of a frame that are awaited before it is forwarded in parts: a fraction of the
    /// session's buffer.
    fn slice_bytes_max(&self) -> usize {
        self.max_buffered_message_size.min(self.max_session_buffer / 4)
    }
}

#[cfg(test)]
mod tests;

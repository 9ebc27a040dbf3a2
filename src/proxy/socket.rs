//! A session on a socket, from its 101 to its end. Read `session` first.
//!
//! The provider says 101 even to a bad key, and what is wrong afterwards, in a message. So the client's
//! opening messages are kept until the provider says something useful; a refusal before that moves the
//! session to the next key, and the client notices nothing.

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

/// Who speaks on a connection after its 101.
pub struct Socket<C>(SocketKind<C>);

enum SocketKind<C> {
    Session(Box<Session<C>>),
    Unknown(Box<UnauthenticatedSession<C>>),
}

impl<C: Connect> Socket<C> {
    /// Speaks with `client`, who has already sent `early`, to the end.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future closes both ends at once; what passed is written down.
    pub async fn run<S: AsyncRead + AsyncWrite + Unpin>(self, client: S, early: Bytes) {
        let (session, client, early) = match self.0 {
            SocketKind::Session(session) => (session, client, early),
            // In a box that goes before the session begins.
            SocketKind::Unknown(unknown) => match Box::pin(unknown.introduced(client, early)).await {
                Some(introduced) => introduced,
                None => return,
            },
        };
        session.run(client, early).await;
    }
}

/// Bounds of sessions.
#[derive(Clone, Copy, Debug)]
pub struct SocketLimits {
    /// How long nothing may pass in either direction; zero for ever.
    pub idle_max: Duration,
    /// How long a session may last; zero for ever.
    pub lifetime_max: Duration,
    /// What is kept of a client's opening messages, to be said again with another key.
    pub opening_bytes_max: usize,
    /// What is read of one message before it goes on in parts.
    pub frame_bytes_max: usize,
    /// How long after the last text or sound a speech socket still counts as speaking.
    pub quiet_max: Duration,
    /// How long a client may take to say who it is in its first message.
    pub introduction_max: Duration,
    /// Bytes that one session may have in memory of what its client has sent.
    pub session_buffer_max: usize,
    /// How long the second close, and the end of the connection, may take.
    pub close_max: Duration,
    /// How often a session looks whether its client's quota of credits is used.
    pub quota_check_interval: Duration,
}

impl SocketLimits {
    /// What is waited for of a frame: no more than a part of what a session may hold.
    fn slice_bytes_max(&self) -> usize {
        self.frame_bytes_max.min(self.session_buffer_max / 4)
    }
}

#[cfg(test)]
mod tests;

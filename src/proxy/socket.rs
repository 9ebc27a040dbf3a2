//! Relays WebSocket sessions, from their 101 response to their end. Read `session` first.
//!
//! The provider accepts a handshake even with an invalid key, and reports the error in a message. Therefore,
//! the client's opening messages are buffered until the provider sends a useful message. Such a message shows that the
//! provider serves the session. A refusal before it fails the session over to the next key if possible, and is then
//! not forwarded to the client.

mod session;

mod polling;
mod run;

mod first_message_auth;
mod handshake;
mod upgrade;

mod failover;
mod speech;

mod ending;

mod buffers;
mod client_to_upstream;
mod close_frames;
mod poll_order;
mod session_end;
mod speech_tracker;
mod upstream_to_client;

pub(super) use first_message_auth::{FirstMessageAuth, UnauthenticatedSession};
pub(super) use handshake::Handshake;
pub(super) use session::Session;

#[cfg(test)]
mod tests;

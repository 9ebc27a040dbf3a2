//! The limits of WebSocket sessions.

use std::time::Duration;

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
    /// The time for which a text-to-speech socket keeps its concurrency slot after the last text or audio.
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
    pub(super) fn slice_bytes_max(&self) -> usize {
        self.max_buffered_message_size.min(self.max_session_buffer / 4)
    }
}

//! Defines the limits of WebSocket sessions, which `[websocket]` configures.

use std::time::Duration;

/// Limits of a WebSocket session.
#[derive(Clone, Copy, Debug)]
pub struct SocketLimits {
    /// Maximum time without data in either direction. Zero means no limit.
    pub idle_timeout: Duration,
    /// Maximum duration of a session. Zero means no limit.
    pub max_session_duration: Duration,
    /// Maximum number of bytes of a client's opening messages that are kept for a failover to another key.
    pub replay_buffer: usize,
    /// Maximum number of bytes of a message that are buffered before it is forwarded in parts.
    pub max_buffered_message_size: usize,
    /// Time for which a text-to-speech session keeps its concurrency slot after the last text or audio.
    pub speech_idle_timeout: Duration,
    /// Maximum wait for the first message, if it authenticates the client.
    pub auth_message_timeout: Duration,
    /// Maximum number of bytes from the client that one session may buffer.
    pub max_session_buffer: usize,
    /// Maximum wait for the second close frame, and then for the end of the connection.
    pub close_timeout: Duration,
    /// Interval at which a session checks its client's credit quota.
    pub quota_check_interval: Duration,
}

impl SocketLimits {
    /// Returns the maximum number of bytes of a frame that are buffered before the frame is forwarded in
    /// parts: at most a quarter of the session's buffer.
    pub(super) fn max_frame_part(&self) -> usize {
        self.max_buffered_message_size.min(self.max_session_buffer / 4)
    }
}

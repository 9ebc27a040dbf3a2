//! Defines the reasons for the end of a session. The reason determines the close frame for each side and, unless the
//! provider has refused the session, the outcome in the usage record and the access log.

use super::close_frames::{GOING_AWAY, POLICY_VIOLATION, SERVICE_RESTART, TRY_AGAIN_LATER};
use crate::policy::outcome::Outcome;
use crate::policy::websocket_frame::Violation;
use crate::proxy::client_usage::QuotaOwner;

/// The reason for the end of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SessionEnd {
    /// A side has sent a close frame, and then a connection was closed or the close timeout expired.
    Closed,
    /// The client has disconnected.
    ClientDisconnected,
    /// The provider has disconnected without a close frame.
    UpstreamReset,
    /// Keychoir is shutting down, and the drain timeout has expired.
    Shutdown,
    /// No data was received for the idle timeout.
    Idle,
    /// The session has reached its maximum duration.
    MaxDuration,
    /// The credit quota of the client, or of the user that it named, is exhausted or insufficient for the next text.
    QuotaExceeded(QuotaOwner),
    /// The buffer budget is exhausted.
    BuffersFull,
    /// The client has sent a close frame that cannot be forwarded, because the session waits, the client is not
    /// authenticated yet, or the provider accepts no more bytes.
    ClientClosed {
        /// The close code, or 1005 if the close frame has none.
        code: u16,
    },
    /// A side has sent an invalid frame or message, or the client has sent more bytes than the session may buffer.
    Violated(Violation, SessionSide),
}

/// One side of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SessionSide {
    Client,
    Upstream,
}

impl SessionEnd {
    /// Returns the close code and reason for the client and for the provider, or `None` if no close frame is
    /// sent.
    pub(super) fn close_frames(self) -> Option<[(u16, &'static str); 2]> {
        match self {
            Self::Closed | Self::ClientDisconnected | Self::UpstreamReset => None,
            Self::ClientClosed { code } => Some([(code, ""), (GOING_AWAY, "")]),
            Self::Violated(violation, SessionSide::Client) => Some([violation.close(), (GOING_AWAY, "")]),
            Self::Violated(violation, SessionSide::Upstream) => Some([violation.close(); 2]),
            Self::Shutdown => {
                Some([(SERVICE_RESTART, "Keychoir is restarting. Connect again."), (GOING_AWAY, "")])
            }
            Self::Idle => Some([(GOING_AWAY, "The session was idle for too long."), (GOING_AWAY, "")]),
            Self::MaxDuration => {
                Some([(GOING_AWAY, "The session has reached its maximum duration."), (GOING_AWAY, "")])
            }
            Self::BuffersFull => Some([
                (TRY_AGAIN_LATER, "Keychoir has no memory left for this session. Try again later."),
                (GOING_AWAY, ""),
            ]),
            Self::QuotaExceeded(QuotaOwner::Client) => {
                Some([(POLICY_VIOLATION, "This client has used its quota of credits."), (GOING_AWAY, "")])
            }
            Self::QuotaExceeded(QuotaOwner::User) => {
                Some([(POLICY_VIOLATION, "This user has used its quota of credits."), (GOING_AWAY, "")])
            }
        }
    }

    /// Returns the outcome for the usage record, the access log and the error message to the client.
    pub(super) fn outcome(self) -> Outcome {
        match self {
            Self::Closed => Outcome::Served,
            Self::ClientDisconnected | Self::ClientClosed { .. } => Outcome::ClientClosed,
            Self::Violated(Violation::TooLarge, SessionSide::Client) => Outcome::MessageTooLarge,
            Self::Violated(_, SessionSide::Client) => Outcome::ProtocolError,
            Self::Violated(_, SessionSide::Upstream) => Outcome::UpstreamProtocolError,
            Self::UpstreamReset => Outcome::UpstreamReset,
            Self::Shutdown => Outcome::Shutdown,
            Self::Idle => Outcome::Idle,
            Self::MaxDuration => Outcome::MaxDuration,
            Self::QuotaExceeded(QuotaOwner::Client) => Outcome::ClientQuotaExceeded,
            Self::QuotaExceeded(QuotaOwner::User) => Outcome::UserQuotaExceeded,
            Self::BuffersFull => Outcome::BuffersFull,
        }
    }
}

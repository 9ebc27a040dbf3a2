//! Defines the error of an attempt that ended without a usable response. The error contains the progress of the
//! attempt. The retry policy decides by this progress whether the request can be sent again.

use std::time::Duration;

use http::StatusCode;

use super::{ConnectError, ConnectionError};
use crate::policy::replay::Progress;

/// The reason why an attempt ended without a usable response.
#[derive(Debug, thiserror::Error)]
#[error("{kind}")]
pub struct SendError {
    /// The progress of the attempt at the time of the error.
    pub progress: Progress,
    /// The cause of the error.
    pub kind: SendErrorKind,
}

impl SendError {
    /// Creates the error of an attempt of which no byte was sent.
    pub(super) fn unsent(kind: SendErrorKind) -> Self {
        Self { progress: Progress::Unsent, kind }
    }

    /// Creates the error of a connection that could not be opened.
    pub(super) fn connect(error: ConnectError) -> Self {
        let progress = match &error {
            ConnectError::Proxy(proxy) if proxy.is_authentication_failure() => {
                Progress::ProxyAuthenticationFailed
            }
            ConnectError::Proxy(_)
            | ConnectError::Name(_)
            | ConnectError::Tcp(_)
            | ConnectError::Tls(_)
            | ConnectError::ServerName(_)
            | ConnectError::ClosedBeforeRequest => Progress::Unsent,
        };
        Self { progress, kind: error.into() }
    }

    /// Creates the error of an attempt that may have reached the provider.
    pub(super) fn no_response(kind: SendErrorKind) -> Self {
        Self { progress: Progress::NoResponse, kind }
    }
}

/// The cause of a [`SendError`].
#[derive(Debug, thiserror::Error)]
pub enum SendErrorKind {
    /// No connection could be opened.
    #[error("{0}")]
    Connect(#[from] ConnectError),
    /// No connection was opened in time.
    #[error("no connection within {} ms", .0.as_millis())]
    ConnectTimeout(Duration),
    /// No connection through the forward proxy was opened in time.
    #[error("no connection through the proxy {proxy} within {} ms", .timeout.as_millis())]
    TunnelTimeout {
        /// The forward proxy without its credentials.
        proxy: String,
        /// The timeout for the connection to the forward proxy and the tunnel together.
        timeout: Duration,
    },
    /// The connection broke before the response head was complete.
    #[error("the connection broke before a response: {0}")]
    Broken(#[source] ConnectionError),
    /// No response head was received in time.
    #[error("no response within {} ms", .0.as_millis())]
    ResponseTimeout(Duration),
    /// The upstream stopped reading the request body.
    #[error("the upstream accepted no more of the request body for {} ms", .0.as_millis())]
    UploadStalled(Duration),
    /// The client stopped sending the request body.
    #[error("the client sent no more of the request body for {} ms", .0.as_millis())]
    ClientStalled(Duration),
    /// The client sends the request body at less than the minimum rate. The field contains that rate in bytes per
    /// second.
    #[error("the client sends the request body at less than {0} bytes per second")]
    ClientTooSlow(u32),
    /// The request body of the client ended early or was malformed.
    #[error("the request body of the client ended early or was malformed")]
    ClientBodyFailed,
    /// The upstream switched protocols, although the request was not an upgrade or named another protocol.
    #[error("the upstream switched protocols with {0}, although the request is not an upgrade")]
    UnexpectedUpgrade(StatusCode),
}

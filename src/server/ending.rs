//! Ends a connection for reasons other than its traffic: the server drains, or a request head does not
//! arrive in time.

use std::convert::Infallible;
use std::future::pending;
use std::time::Duration;

use tracing::debug;

use super::connection_state::ConnectionState;
use super::{ConnectionLimits, Drain};

/// Maximum wait of a drain for the first request of a new connection: closing the connection would refuse a
/// request of a client that was accepted.
pub(super) const FIRST_REQUEST_TIMEOUT: Duration = Duration::from_secs(1);

/// The time at which a connection is to end.
pub(super) enum ConnectionEnd {
    /// When no request is under way on it.
    WhenIdle,
    /// At once.
    AtOnce,
}

/// Completes once, when the connection is to end.
pub(super) async fn connection_end(
    drain: &Drain,
    state: &ConnectionState,
    limits: &ConnectionLimits,
) -> ConnectionEnd {
    tokio::select! {
        biased;
        () = drain.cut.cancelled() => ConnectionEnd::AtOnce,
        () = drain.close.cancelled() => {
            state.set_ending();
            ConnectionEnd::WhenIdle
        }
        () = state.head_timed_out(limits) => {
            debug!("a connection ended: no request came in time");
            ConnectionEnd::AtOnce
        }
        never = limit_first_request(drain, state) => match never {},
    }
}

/// Waits for a client to finish a head that it had begun, up to [`FIRST_REQUEST_TIMEOUT`], and then
/// for the responses under way.
pub(super) async fn finish_last_request(drain: &Drain) {
    tokio::time::sleep(FIRST_REQUEST_TIMEOUT).await;
    drain.requests.ended().await;
}

/// From the beginning of the drain, makes responses close the connection, and limits how long the drain waits
/// for the first request of a connection. Never completes.
async fn limit_first_request(drain: &Drain, state: &ConnectionState) -> Infallible {
    drain.ending.cancelled().await;
    state.set_ending();
    drain.stop.cancelled().await;
    tokio::time::sleep(FIRST_REQUEST_TIMEOUT).await;
    state.expect_no_request();
    pending().await
}

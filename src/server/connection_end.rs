//! Waits until a connection must end for a reason other than its traffic: Keychoir drains, or the next request head
//! does not arrive in time. Also determines how long a drain waits for the first request of a connection, and for a
//! request whose head has begun.

use std::convert::Infallible;
use std::future::pending;
use std::time::Duration;

use tracing::debug;

use super::connection_state::ConnectionState;
use super::{ConnectionLimits, Drain};

/// Maximum time that a drain waits for the first request of a new connection, and for the rest of a request head that
/// has begun to arrive. If Keychoir closed the connection earlier, the request of a connected client would fail.
pub(super) const FIRST_REQUEST_TIMEOUT: Duration = Duration::from_secs(1);

/// The time at which a connection must end.
pub(super) enum ConnectionEnd {
    /// The connection ends as soon as no request is in progress.
    WhenIdle,
    /// The connection ends without waiting for a request in progress.
    Immediate,
}

/// Completes when the connection must end.
pub(super) async fn wait_for_connection_end(
    drain: &Drain,
    state: &ConnectionState,
    limits: &ConnectionLimits,
) -> ConnectionEnd {
    tokio::select! {
        biased;
        () = drain.abort.cancelled() => ConnectionEnd::Immediate,
        () = drain.close_idle.cancelled() => {
            state.set_ending();
            ConnectionEnd::WhenIdle
        }
        () = state.wait_for_head_timeout(limits) => {
            debug!("a connection ended: no request head arrived in time");
            ConnectionEnd::Immediate
        }
        never = limit_first_request(drain, state) => match never {},
    }
}

/// Waits for [`FIRST_REQUEST_TIMEOUT`], so that the client can complete a request head, and then until the worker has
/// no request in progress.
pub(super) async fn finish_last_request(drain: &Drain) {
    tokio::time::sleep(FIRST_REQUEST_TIMEOUT).await;
    drain.requests.wait_until_ended().await;
}

/// Once the drain starts, makes responses close the connection, and limits how long the drain waits for the
/// first request. Never completes.
async fn limit_first_request(drain: &Drain, state: &ConnectionState) -> Infallible {
    drain.draining.cancelled().await;
    state.set_ending();
    drain.stop_accepting.cancelled().await;
    tokio::time::sleep(FIRST_REQUEST_TIMEOUT).await;
    state.expect_no_request();
    pending().await
}

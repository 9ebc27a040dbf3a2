//! Ends a connection for reasons other than its traffic: the server drains, or a request head does not come
//! in time.

use std::convert::Infallible;
use std::future::pending;
use std::time::Duration;

use tracing::debug;

use super::connection_state::ConnectionState;
use super::{Drain, Limits};

/// How long a drain waits for the first request of a new connection: closing the connection would refuse a
/// request of a client that was accepted.
pub(super) const FIRST_REQUEST_MAX: Duration = Duration::from_secs(1);

/// How a connection is to end.
pub(super) enum ConnectionEnd {
    /// When no request is under way on it.
    Close,
    /// At once.
    Leave,
}

/// Completes once, when the connection is to end.
pub(super) async fn end(drain: &Drain, here: &ConnectionState, limits: &Limits) -> ConnectionEnd {
    tokio::select! {
        biased;
        () = drain.cut.cancelled() => ConnectionEnd::Leave,
        () = drain.close.cancelled() => {
            here.end();
            ConnectionEnd::Close
        }
        () = here.waited(limits) => {
            debug!("a connection ended: it brought no request in time");
            ConnectionEnd::Leave
        }
        never = expect_first(drain, here) => match never {},
    }
}

/// Completes when a client has had time to finish a head that it had begun, and the response to its request,
/// if the head became one, is complete.
pub(super) async fn last_words(drain: &Drain) {
    tokio::time::sleep(FIRST_REQUEST_MAX).await;
    drain.requests.ended().await;
}

/// From the beginning of the drain, makes responses close the connection, and limits how long the drain waits
/// for the first request of a connection. Never completes.
async fn expect_first(drain: &Drain, here: &ConnectionState) -> Infallible {
    drain.ending.cancelled().await;
    here.end();
    drain.stop.cancelled().await;
    tokio::time::sleep(FIRST_REQUEST_MAX).await;
    here.expect_nothing();
    pending().await
}

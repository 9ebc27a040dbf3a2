//! What ends a connection beside its traffic: the program's end, and a head that does not come in time.

use std::convert::Infallible;
use std::future::pending;
use std::time::Duration;

use tracing::debug;

use super::connection_state::ConnectionState;
use super::{Drain, Limits};

/// A client that has connected is about to ask. When the program ends, its request is waited for this
/// long: closing the connection would refuse a request that was let in.
pub(super) const FIRST_REQUEST_MAX: Duration = Duration::from_secs(1);

/// How a connection is to end.
pub(super) enum ConnectionEnd {
    /// When nothing is under way on it.
    Close,
    /// At once.
    Leave,
}

/// Ends, once, when the connection is to end.
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

/// Ends when a client has had its time to finish a head it had begun, and its request, if it became
/// one, is answered.
pub(super) async fn last_words(drain: &Drain) {
    tokio::time::sleep(FIRST_REQUEST_MAX).await;
    drain.requests.ended().await;
}

/// Has the answers say that the connection closes, from the beginning of the program's end on, and has
/// that end wait for the first request of a connection, but not for long.
async fn expect_first(drain: &Drain, here: &ConnectionState) -> Infallible {
    drain.ending.cancelled().await;
    here.end();
    drain.stop.cancelled().await;
    tokio::time::sleep(FIRST_REQUEST_MAX).await;
    here.expect_nothing();
    pending().await
}

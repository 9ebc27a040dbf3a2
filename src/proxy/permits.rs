//! Holds the permits of a request from its admission to its end. The request and all its attempts share one guard,
//! and the permits are released when the last of them drops it.

use super::client_usage::ClientPermit;
use super::request_limiter::RequestPermit;

/// The permits of one request.
///
/// Each attempt charges the client through these permits, at the latest when the attempt is dropped. Dropping the last
/// reference to them refunds the reservation that was not charged. The permit of the usage record and the lease of the
/// key belong to the attempt instead.
#[derive(Debug)]
pub(super) struct RequestPermits {
    /// The permit under the client's limits.
    pub(super) client: ClientPermit,
    /// The permit under `server.max_requests`. It is released when it is dropped, and is not read.
    pub(super) _request: RequestPermit,
}

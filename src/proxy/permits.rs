//! The permits that a request holds from its admission to its end, in one guard.

use super::client_usage::ClientPermit;
use super::request_limiter::RequestPermit;

/// A request's permits: one of `server.max_requests`, and the permit under its client's limits.
///
/// The request and its attempts share it. The attempt that sent the request charges the client, also when the
/// attempt is dropped. When the last holder drops this guard, the uncharged reservation is refunded. The
/// attempt itself owns the permit of its usage record and the lease of its key.
#[derive(Debug)]
pub(super) struct RequestPermits {
    client: ClientPermit,
    _request: RequestPermit,
}

impl RequestPermits {
    pub(super) fn new(request: RequestPermit, client: ClientPermit) -> Self {
        Self { client, _request: request }
    }

    /// The permit under the client's limits.
    pub(super) fn client(&self) -> &ClientPermit {
        &self.client
    }
}

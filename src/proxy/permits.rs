//! What a request holds from its admission to its end, in one guard.

use super::client_usage::ClientPermit;
use super::request_limiter::RequestPermit;

/// A request's permits: one of `server.max_requests`, and its part of its client's limits.
///
/// The request and its attempts share it. The attempt that has sent something settles what its client is
/// charged, also when it is dropped; when the last holder drops the guard, all that was not charged goes back.
/// What is an attempt's own (the place of its usage record, the lease of its key) is in the attempt.
#[derive(Debug)]
pub(super) struct RequestPermits {
    client: ClientPermit,
    _request: RequestPermit,
}

impl RequestPermits {
    pub(super) fn new(request: RequestPermit, client: ClientPermit) -> Self {
        Self { client, _request: request }
    }

    /// Its part of its client's limits.
    pub(super) fn client(&self) -> &ClientPermit {
        &self.client
    }
}

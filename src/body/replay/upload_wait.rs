//! Defines the events for which the upload of a request body can wait. The HTTP client in `upstream` chooses the
//! timeout of an attempt by this event.

/// The event for which the upload of a request body waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UploadWait {
    /// The upload waits for the next bytes from the client.
    ForClient,
    /// The upload waits until the upstream connection polls the body, because the attempt has just started or the
    /// connection has no capacity.
    ForUpstream,
    /// The body has been sent completely, and the response is awaited.
    ForResponse,
    /// The upload has failed, because the body of the client ended early or was malformed.
    Failed,
}

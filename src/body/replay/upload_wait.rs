//! The event that an upload waits for, which selects the timeout of an attempt.

/// The event that the upload of a request body waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UploadWait {
    /// The next bytes from the client.
    ForClient,
    /// Capacity of the upstream connection.
    ForUpstream,
    /// The response; the body is sent completely.
    ForResponse,
    /// Nothing, because the body of the client ended early or was malformed.
    Failed,
}

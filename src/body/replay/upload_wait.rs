//! The event that the upload of a request body waits for.

use std::fmt;

/// The event that an upload waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UploadWait {
    /// The client has not sent the next bytes.
    ForClient,
    /// The upstream has not accepted them.
    ForUpstream,
    /// The response: all bytes are sent.
    ForResponse,
    /// Nothing: the client's body broke off or was malformed.
    Never,
}

impl fmt::Display for UploadWait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ForClient => "waiting for the client's body",
            Self::ForUpstream => "waiting for the upstream to accept the body",
            Self::ForResponse => "waiting for the response",
            Self::Never => "the client's body broke off",
        })
    }
}

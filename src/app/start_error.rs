//! Defines the errors that prevent startup, with their messages and advice, and refuses listeners that other machines
//! could use without a token.

use std::io;

use crate::mirror::MirrorStartError;
use crate::policy::client::Clients;
use crate::server::Address;
use crate::store::OpenError;
use crate::upstream::TlsError;

/// The reason why Keychoir cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The usage database cannot be opened.
    #[error(transparent)]
    Database(#[from] OpenError),
    /// The usage records cannot be read, or the id of the replica cannot be read or written.
    #[error("the usage records cannot be read: {0}")]
    UnreadableRecords(#[from] rusqlite::Error),
    /// The mirror cannot be started.
    #[error(transparent)]
    Mirror(#[from] MirrorStartError),
    /// TLS for connections to the provider or to Redis cannot be configured.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// TLS for client connections cannot be configured.
    #[error("HTTPS cannot be configured: {0}")]
    Https(#[from] rustls::Error),
    /// The upstream address is not valid in a request head.
    #[error("the upstream address cannot be used: {0}")]
    Upstream(#[from] http::Error),
    /// Other machines could use the keys without a token.
    #[error(transparent)]
    UnprotectedListener(#[from] UnprotectedListener),
    /// Other machines could reach the admin API, which has no token.
    #[error("{0} is open to other machines, and there is no admin token")]
    AdminWithoutToken(Address),
    /// The operating system reported an error, for example for a listener or a thread.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl StartError {
    /// Returns advice for the operator, if the message contains none.
    #[must_use]
    pub fn advice(&self) -> Option<&'static str> {
        match self {
            // The message contains the advice.
            Self::Database(OpenError::CannotCopy { .. }) => None,
            Self::Database(_) | Self::UnreadableRecords(_) => Some(
                "Set storage.path (or KEYCHOIR_STORAGE__PATH) to another path, or keep usage records only in memory \
                 with storage.ephemeral = true (or --ephemeral).",
            ),
            Self::UnprotectedListener(_) => Some(
                "Write a [[clients]] entry with `name` and `token_sha256`, or put a token into a file and set \
                 KEYCHOIR_CLIENT_TOKEN_FILE to its path, or listen on 127.0.0.1 or a Unix socket.",
            ),
            Self::AdminWithoutToken(_) => {
                Some("Set admin.token_file or KEYCHOIR_ADMIN_TOKEN, or listen on 127.0.0.1 (admin.listen).")
            }
            Self::Upstream(_) | Self::Tls(_) | Self::Https(_) | Self::Mirror(_) | Self::Io(_) => None,
        }
    }

    /// Returns whether the operating system reported the error, so that the configuration may be valid.
    #[must_use]
    pub fn is_system_error(&self) -> bool {
        match self {
            Self::Io(_) => true,
            Self::Database(_)
            | Self::UnreadableRecords(_)
            | Self::UnprotectedListener(_)
            | Self::AdminWithoutToken(_)
            | Self::Upstream(_)
            | Self::Tls(_)
            | Self::Https(_)
            | Self::Mirror(_) => false,
        }
    }
}

/// A listener that other machines can connect to without a client token.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} is open to other machines, and no client token is required")]
pub struct UnprotectedListener(pub Address);

/// Refuses addresses that other machines can connect to if no client token is required.
pub(super) fn check_exposure(addresses: &[Address], clients: &Clients) -> Result<(), UnprotectedListener> {
    match addresses.iter().find(|address| !address.is_local()) {
        Some(exposed) if !clients.require_token() => Err(UnprotectedListener(exposed.clone())),
        Some(_) | None => Ok(()),
    }
}

/// Refuses addresses for operators that other machines can connect to if there is no admin token.
pub(super) fn check_operator_exposure(
    addresses: &[Address],
    has_admin_token: bool,
) -> Result<(), StartError> {
    match addresses.iter().find(|address| !address.is_local()) {
        Some(exposed) if !has_admin_token => Err(StartError::AdminWithoutToken(exposed.clone())),
        Some(_) | None => Ok(()),
    }
}

//! The reasons why the program cannot start.

use std::io;

use crate::mirror::MirrorStartError;
use crate::policy::client::Clients;
use crate::server::Address;
use crate::store::OpenError;
use crate::upstream::TlsError;

/// The reason why the program cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The usage database cannot be opened.
    #[error(transparent)]
    Database(#[from] OpenError),
    /// The usage records cannot be read.
    #[error("the usage records cannot be read: {0}")]
    UnreadableRecords(#[from] rusqlite::Error),
    /// The mirror cannot be started.
    #[error(transparent)]
    Mirror(#[from] MirrorStartError),
    /// TLS for upstream connections cannot be configured.
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
    /// The operating system reported an error.
    #[error(transparent)]
    Io(#[from] io::Error),
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

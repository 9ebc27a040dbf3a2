//! Builds the HTTP client for requests that are not proxied: to Supabase, and from the demo and the tests to
//! Keychoir. It uses the TLS configuration of the upstream connector, because the process has no default TLS
//! provider.

use reqwest::ClientBuilder;
use reqwest::redirect::Policy;

use super::connect::{TlsError, client_tls_config};

/// Returns a builder of a client without redirects and proxies, so that credentials are sent only to the host
/// of the request.
///
/// # Errors
///
/// Fails when the TLS library supports no protocol version.
#[expect(clippy::disallowed_methods, reason = "the lint names this function as the replacement")]
pub fn http_client() -> Result<ClientBuilder, TlsError> {
    let tls = client_tls_config(None)?;
    Ok(reqwest::Client::builder().tls_backend_preconfigured(tls).redirect(Policy::none()).no_proxy())
}

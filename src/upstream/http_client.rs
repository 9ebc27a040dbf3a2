//! The HTTP client for calls other than proxied requests: to Supabase, and from the demo and the tests to
//! Keychoir. It uses the TLS configuration of the upstream, because no TLS provider is installed process-wide
//! that another client could fall back on.

use reqwest::ClientBuilder;
use reqwest::redirect::Policy;

use super::connect::{TlsError, web_tls};

/// A client that follows no redirect and uses no proxy: a request, and its credentials, reach the named host
/// or no host at all.
///
/// # Errors
///
/// When the TLS library has no protocol version to offer.
#[expect(clippy::disallowed_methods, reason = "this is the place the lint points to")]
pub fn http_client() -> Result<ClientBuilder, TlsError> {
    let tls = web_tls(None)?;
    Ok(reqwest::Client::builder().tls_backend_preconfigured(tls).redirect(Policy::none()).no_proxy())
}

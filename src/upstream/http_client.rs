//! Builds the HTTP client for requests that are not proxied: requests to Supabase, and requests of commands, the demo
//! and the tests to a running Keychoir. The client uses the TLS configuration of the upstream connector, because the
//! process has no default TLS provider.

use std::path::Path;

use reqwest::redirect::Policy;
use reqwest::{ClientBuilder, Proxy};

use super::connect::{TlsError, client_tls_config};
use crate::policy::forward_proxy::ForwardProxy;

/// Returns a builder of a client that follows no redirects and ignores the proxies of the environment, so that
/// credentials are sent only to the host of the request.
///
/// # Errors
///
/// Fails when the TLS library has no usable protocol version.
pub fn http_client() -> Result<ClientBuilder, TlsError> {
    client_with_roots(None)
}

/// Returns a builder like [`http_client`], of a client that also trusts the certificate authorities in `ca_file`.
///
/// # Errors
///
/// Fails when the file cannot be read or contains no usable certificate, or the TLS library has no usable protocol
/// version.
pub fn http_client_trusting(ca_file: Option<&Path>) -> Result<ClientBuilder, TlsError> {
    client_with_roots(ca_file)
}

/// Returns a builder like [`http_client`], of a client that opens its connections through `proxy` and also trusts the
/// certificate authorities in `ca_file`, which may be the authorities of the proxy. Without a proxy, `ca_file` is
/// ignored.
///
/// # Errors
///
/// Fails when the file cannot be read or contains no usable certificate, the TLS library has no usable protocol
/// version, or the HTTP library rejects the proxy.
pub fn http_client_through(
    proxy: Option<&ForwardProxy>,
    ca_file: Option<&Path>,
) -> Result<ClientBuilder, HttpClientError> {
    let Some(proxy) = proxy else { return Ok(client_with_roots(None)?) };
    // The error of the library may quote the URL, which contains the password.
    let parsed_proxy =
        Proxy::all(proxy.expose_url()).map_err(|_| HttpClientError::Proxy(proxy.to_string()))?;
    Ok(client_with_roots(ca_file)?.proxy(parsed_proxy))
}

/// The reason why an HTTP client cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum HttpClientError {
    /// TLS cannot be configured.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The HTTP library rejects the forward proxy.
    #[error("the proxy {0} cannot be used")]
    Proxy(String),
}

#[expect(clippy::disallowed_methods, reason = "the lint names `http_client` as the replacement")]
fn client_with_roots(ca_file: Option<&Path>) -> Result<ClientBuilder, TlsError> {
    let tls_config = client_tls_config(ca_file)?;
    Ok(reqwest::Client::builder().tls_backend_preconfigured(tls_config).redirect(Policy::none()).no_proxy())
}

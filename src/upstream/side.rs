//! HTTP for calls beside the traffic: to Supabase, and what the demo and the tests ask us. Its TLS
//! is the upstream's, because no TLS library is installed process-wide that another client could
//! fall back on.

use reqwest::ClientBuilder;
use reqwest::redirect::Policy;

use super::connect::{TlsError, web_tls};

/// A client that follows no redirect and asks no proxy: what it is given goes to the host that was
/// named, or nowhere.
///
/// # Errors
///
/// When the TLS library has no protocol version to offer.
#[expect(clippy::disallowed_methods, reason = "this is the place the lint points to")]
pub fn side_calls() -> Result<ClientBuilder, TlsError> {
    let tls = web_tls(None)?;
    Ok(reqwest::Client::builder().tls_backend_preconfigured(tls).redirect(Policy::none()).no_proxy())
}

//! Who may use the API: the admin token, compared in constant time. Wrong tokens are limited by address and
//! logged.

use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::header::AUTHORIZATION;
use http::{HeaderMap, Response, Uri};

use super::error::ApiError;
use crate::admin::Admin;
use crate::policy::auth_failures::AuthFailures;
use crate::policy::units::UnixMs;
use crate::secret::AdminTokenFingerprint;

/// The failures of all workers. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct AuthFailureTable(Arc<Mutex<AuthFailures>>);

impl AuthFailureTable {
    fn refused_for(&self, address: Option<IpAddr>, now: UnixMs) -> Option<Duration> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).refused_for(address, now)
    }

    fn record(&self, address: Option<IpAddr>, now: UnixMs) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).record(address, now);
    }
}

impl Admin {
    /// Accepts only the admin token. An address with too many wrong tokens is refused before its token is
    /// compared, so that further guesses bring nothing.
    pub(super) fn authorize(
        &self,
        uri: &Uri,
        headers: &HeaderMap,
        peer: Option<IpAddr>,
        now: UnixMs,
    ) -> Result<(), ApiError> {
        if self.admin_token.load().is_none() {
            return Err(ApiError::disabled());
        }
        if let Some(remaining) = self.auth_failures.refused_for(peer, now) {
            return Err(ApiError::too_many_failures(remaining));
        }
        if self.has_admin_token(headers) {
            return Ok(());
        }
        let is_client =
            self.config.load().clients.require_token() && self.authenticate_client(uri, headers, now).is_ok();
        if is_client {
            return Err(ApiError::client_token());
        }
        if bearer_token(headers).is_none() {
            return Err(ApiError::token_missing());
        }
        self.auth_failures.record(peer, now);
        let address = peer.map(tracing::field::display);
        tracing::warn!(
            event = "admin_auth_failed",
            client_address = address,
            "A wrong admin token was refused"
        );
        Err(ApiError::token_wrong())
    }

    /// Returns the refusal of a page that requires the admin token, unless the request presents it.
    pub(in crate::admin) fn refuse_page(
        &self,
        uri: &Uri,
        headers: &HeaderMap,
        peer: Option<IpAddr>,
        now: UnixMs,
    ) -> Option<Response<Bytes>> {
        let error = match &*self.admin_token.load() {
            Some(_) => self.authorize(uri, headers, peer, now).err()?,
            None => ApiError::token_missing(),
        };
        Some(error.for_page().response(""))
    }

    /// Whether the request presents the admin token.
    pub(in crate::admin) fn has_admin_token(&self, headers: &HeaderMap) -> bool {
        let presented = bearer_token(headers).map(AdminTokenFingerprint::new);
        let expected = self.admin_token.load();
        presented.zip(expected.as_deref()).is_some_and(|(presented, expected)| presented == *expected)
    }
}

/// The token of the `Authorization` header.
fn bearer_token(headers: &HeaderMap) -> Option<&str> {
    let (scheme, token) = headers.get(AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    let token = token.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty()).then_some(token)
}

//! Authenticates requests to the admin API and to the pages for operators with the admin token, which is compared in
//! constant time. Each wrong token, and each wrong code of the dashboard, is logged and counted. Admin tokens from an
//! address that has sent too many wrong ones are refused temporarily.

use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::header::AUTHORIZATION;
use http::{HeaderMap, Response, Uri};

use super::error::ApiError;
use crate::admin::Admin;
use crate::policy::auth_failures::AuthFailures;
use crate::policy::units::UnixMs;
use crate::secret::AdminTokenFingerprint;

/// The number of authentication failures of each address. Clones share the numbers, so that all workers count together.
#[derive(Clone, Debug, Default)]
pub struct AuthFailureTable(Arc<Mutex<AuthFailures>>);

impl AuthFailureTable {
    /// Returns the time for which credentials of the address are still refused, or `None` if they are not refused.
    pub(super) fn retry_after(&self, address: Option<IpAddr>, now: UnixMs) -> Option<Duration> {
        self.lock().retry_after(address, now)
    }

    fn record(&self, address: Option<IpAddr>, now: UnixMs) {
        self.lock().record(address, now);
    }

    fn lock(&self) -> MutexGuard<'_, AuthFailures> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The result of checking the token in the `Authorization` header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::admin) enum AdminTokenCheck {
    /// The token is the admin token.
    Accepted,
    /// The header is missing or contains no bearer token.
    Absent,
    /// The token is a valid client token.
    ClientToken,
    /// The token is neither the admin token nor a valid client token.
    Wrong,
    /// The token was not compared, because the address has sent too many wrong tokens. After this time, tokens from the
    /// address are compared again.
    TooManyFailures(Duration),
}

impl Admin {
    /// Checks the token in the `Authorization` header of a request to the API or to a page. A wrong token is counted
    /// and logged. An address that has sent too many wrong tokens is refused before its token is compared, so that
    /// further guesses cannot succeed.
    pub(in crate::admin) fn check_admin_token(
        &self,
        headers: &HeaderMap,
        peer: Option<IpAddr>,
        now: UnixMs,
    ) -> AdminTokenCheck {
        let Some(token) = bearer_token(headers) else { return AdminTokenCheck::Absent };
        if self.config.load().clients.has_valid_token(token, now) {
            return AdminTokenCheck::ClientToken;
        }
        if let Some(retry_after) = self.auth_failures.retry_after(peer, now) {
            return AdminTokenCheck::TooManyFailures(retry_after);
        }
        let expected = self.admin_token.load();
        if expected.as_deref().is_some_and(|expected| *expected == AdminTokenFingerprint::new(token)) {
            return AdminTokenCheck::Accepted;
        }
        self.record_auth_failure(peer, now, "A wrong admin token was refused");
        AdminTokenCheck::Wrong
    }

    /// Counts a wrong credential against the address, and logs `message`.
    pub(super) fn record_auth_failure(&self, peer: Option<IpAddr>, now: UnixMs, message: &'static str) {
        self.auth_failures.record(peer, now);
        let address = peer.map(tracing::field::display);
        tracing::warn!(event = "admin_auth_failed", client_address = address, "{message}");
    }

    /// Returns an error unless the request presents the admin token.
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
        Err(match self.check_admin_token(headers, peer, now) {
            AdminTokenCheck::Accepted => return Ok(()),
            AdminTokenCheck::TooManyFailures(retry_after) => ApiError::too_many_failures(retry_after),
            AdminTokenCheck::Wrong => ApiError::token_wrong(),
            AdminTokenCheck::ClientToken => ApiError::client_token(),
            AdminTokenCheck::Absent => {
                // A client token may also be in `xi-api-key` or in the query.
                let is_client = self.config.load().clients.require_token()
                    && self.authenticate_client(uri, headers, now).is_ok();
                if is_client { ApiError::client_token() } else { ApiError::token_missing() }
            }
        })
    }

    /// Returns the response that refuses a page for operators, or `None` if the request presents the admin token.
    pub(in crate::admin) fn operator_page_refusal(
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
}

/// Returns the response to a request for a page from an address that has sent too many wrong admin tokens.
pub(in crate::admin) fn too_many_failures(retry_after: Duration) -> Response<Bytes> {
    ApiError::too_many_failures(retry_after).for_page().response("")
}

/// Returns the bearer token in the `Authorization` header, or `None` if there is none.
fn bearer_token(headers: &HeaderMap) -> Option<&str> {
    let (scheme, token) = headers.get(AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    let token = token.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty()).then_some(token)
}

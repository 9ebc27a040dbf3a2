//! What Keychoir says of itself: the status of the keys and its own health. Reads snapshots and
//! is never in the way of a request.

mod health;
mod status;

use std::sync::Arc;

use bytes::Bytes;
use http::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use http::{HeaderMap, Method, Response, StatusCode, Uri};
use serde::Serialize;

use crate::policy::client::{Unidentified, identify};
use crate::policy::units::UnixMs;
use crate::pool::Pool;
use crate::proxy::{ProxyError, SharedTerms};
use crate::store;

pub use health::{Draining, Readiness};
pub use status::StatusDocument;

/// What is read to answer.
#[derive(Clone, Debug)]
pub struct Admin {
    terms: SharedTerms,
    pool: Arc<Pool>,
    books: store::Health,
    draining: Draining,
}

impl Admin {
    /// Pages about these parts.
    #[must_use]
    pub fn new(terms: SharedTerms, pool: Arc<Pool>, books: store::Health, draining: Draining) -> Self {
        Self { terms, pool, books, draining }
    }

    /// The answer, if the path is one of ours; every other path is the provider's.
    #[must_use]
    pub fn answer(
        &self,
        method: &Method,
        uri: &Uri,
        headers: &HeaderMap,
        now: UnixMs,
    ) -> Option<Response<Bytes>> {
        let page: fn(&Self, UnixMs) -> Response<Bytes> = match uri.path() {
            "/api/elevenlabs-status" => Self::status,
            "/livez" | "/healthz" => Self::live,
            "/readyz" => Self::ready,
            _ => return None,
        };
        if method != Method::GET && method != Method::HEAD {
            let mut answer = Response::new(Bytes::from_static(b"only GET and HEAD\n"));
            *answer.status_mut() = StatusCode::METHOD_NOT_ALLOWED;
            answer.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            return Some(answer);
        }
        // Where clients have tokens, the state of the keys is for them only.
        let clients = &self.terms.load().clients;
        let refusal = match identify(clients, headers, uri.query()) {
            Ok(caller) if clients.include(&caller) => None,
            Ok(_) => Some(Unidentified::Wrong),
            Err(refusal) => Some(refusal),
        };
        if let Some(refusal) = refusal.filter(|_| uri.path() == "/api/elevenlabs-status") {
            return Some(ProxyError::Unidentified(refusal).answer("", now));
        }
        Some(page(self, now))
    }

    fn status(&self, now: UnixMs) -> Response<Bytes> {
        json(StatusCode::OK, &StatusDocument::of(&self.pool.snapshot(now)))
    }

    /// The process runs, whatever it can or cannot do.
    fn live(&self, _: UnixMs) -> Response<Bytes> {
        json(StatusCode::OK, &serde_json::json!({"status": "live"}))
    }

    fn ready(&self, now: UnixMs) -> Response<Bytes> {
        let readiness = Readiness::of(&self.pool.snapshot(now), &self.books, self.draining.is_set());
        let status = if readiness.is_ready() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        let mut answer = json(status, &readiness);
        if self.draining.is_set() {
            answer.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
        }
        answer
    }
}

fn json(status: StatusCode, page: &impl Serialize) -> Response<Bytes> {
    // These pages are made of numbers and plain words; they always serialize.
    let body = serde_json::to_vec(page).unwrap_or_default();
    let mut answer = Response::new(Bytes::from(body));
    *answer.status_mut() = status;
    let headers = answer.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    answer
}

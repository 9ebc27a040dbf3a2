//! What of an answer a client of the pool must not see: a key, whichever place it is echoed in, and
//! the owner of the key that has served.

use std::sync::Arc;

use bytes::Bytes;
use http::header::{ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_LENGTH, HeaderValue, TRANSFER_ENCODING};
use http::{HeaderMap, Method};
use hyper::ext::ReasonPhrase;

use super::Limits;
use super::answer::Answer;
use super::error::ProxyError;
use crate::body::decode::decoded;
use crate::body::redacted::redact_headers;
use crate::policy::endpoint::Endpoint;
use crate::policy::owner;
use crate::secret::Redactor;
use crate::upstream::Outbound;

/// What is kept back in the answer to one request.
#[derive(Debug)]
pub(super) struct Veil {
    redactor: Arc<Redactor>,
    hides_owner: bool,
}

impl Veil {
    /// The veil over the answer to `outbound`; `None` when nothing is kept back. An answer that
    /// describes the owner must be read here, so it is asked for uncompressed.
    pub(super) fn over(
        outbound: &mut Outbound,
        endpoint: &Endpoint,
        redactor: &Arc<Redactor>,
        limits: &Limits,
    ) -> Option<Self> {
        if !limits.redacts {
            return None;
        }
        if endpoint.shows_owner {
            outbound.headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        }
        let hides_owner = endpoint.shows_owner && outbound.method != Method::HEAD;
        Some(Self { redactor: Arc::clone(redactor), hides_owner })
    }
}

impl Veil {
    /// What keys are taken out with.
    pub(super) fn redactor(&self) -> Arc<Redactor> {
        Arc::clone(&self.redactor)
    }
}

/// An answer describes the owner of the key, and cannot be read to take that out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the answer describes the owner of the key and cannot be redacted")]
pub struct Unredacted;

/// The provider's description of a user is about 2 KB.
const OWNER_BYTES_MAX: usize = 1024 * 1024;

impl Answer {
    /// This answer as a client may see it. Its body streams on, and keys are taken out as it does;
    /// only what describes the owner, and a compressed error, is read first.
    pub(super) async fn behind(mut self, veil: Option<&Veil>, limits: &Limits) -> Result<Self, ProxyError> {
        let Some(Veil { redactor, hides_owner }) = veil else { return Ok(self) };
        redact_headers(&mut self.head.headers, redactor);
        let reason = self.head.extensions.get::<ReasonPhrase>();
        if reason.is_some_and(|reason| redactor.redacted(reason.as_bytes()).is_some()) {
            self.head.extensions.remove::<ReasonPhrase>();
        }
        let (is_served, is_packed) =
            (self.head.status.is_success(), self.head.headers.contains_key(CONTENT_ENCODING));
        if *hides_owner && is_served {
            let text = self.text(OWNER_BYTES_MAX, limits).await.ok_or(Unredacted)?;
            self.say(owner::redacted(&text).ok_or(Unredacted)?);
        } else if is_packed && !is_served {
            let text = self.text(limits.error_body_bytes_max, limits).await;
            if let Some(redacted) = text.and_then(|text| redactor.redacted(&text)) {
                self.say(redacted);
            }
        }
        self.redactor = Some(Arc::clone(redactor));
        Ok(self)
    }

    /// All of the body, unpacked, if it is there within its bounds.
    async fn text(&mut self, bytes_max: usize, limits: &Limits) -> Option<Vec<u8>> {
        let whole = self.body.whole(bytes_max, limits.error_body_max).await?;
        decoded(&whole, encoding(&self.head.headers), bytes_max)
    }

    /// Replaces the body.
    fn say(&mut self, text: Vec<u8>) {
        let headers = &mut self.head.headers;
        headers.remove(CONTENT_ENCODING);
        headers.remove(TRANSFER_ENCODING);
        headers.insert(CONTENT_LENGTH, HeaderValue::from(text.len()));
        self.body.replace(Bytes::from(text));
    }
}

/// The encoding that a body is said to have.
pub(super) fn encoding(headers: &HeaderMap) -> Option<&str> {
    headers.get(CONTENT_ENCODING).map(|value| value.to_str().unwrap_or("unreadable"))
}

//! Redacts responses to clients of the pool: removes keys wherever they are echoed, and the
//! description of the owner of the key that was used.

use std::sync::Arc;

use bytes::Bytes;
use http::Method;
use http::header::{
    ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, HeaderValue, TRANSFER_ENCODING,
};
use http_body::Body;
use hyper::ext::ReasonPhrase;

use super::config::Limits;
use super::error::{BuffersFull, ProxyError, Unredacted};
use super::upstream_response::UpstreamResponse;
use crate::body::decode::decoded;
use crate::body::redacted::redact_headers;
use crate::elevenlabs::endpoint::Endpoint;
use crate::elevenlabs::socket::readdressed;
use crate::elevenlabs::user_data;
use crate::policy::headers::{content_encoding, is_searched};
use crate::secret::Redactor;
use crate::upstream::UpstreamRequestHead;

/// What is redacted from the response to one request.
#[derive(Debug)]
pub(super) struct ResponseRedaction {
    /// `None` when keys are not redacted.
    redactor: Option<Arc<Redactor>>,
    hides_owner: bool,
    /// The base that replaces the provider's host in the address of a socket.
    socket_base: Option<Arc<str>>,
}

impl ResponseRedaction {
    /// The redaction for the response to `upstream_head`; `None` when nothing is redacted. A
    /// response which describes the owner, or gives a socket address to replace, must be read here,
    /// so it is requested without compression.
    pub(super) fn new(
        upstream_head: &mut UpstreamRequestHead,
        endpoint: &Endpoint,
        redactor: &Arc<Redactor>,
        limits: &Limits,
    ) -> Option<Self> {
        let hides_owner = endpoint.shows_owner && limits.redacts;
        let socket_base = limits.socket_base.as_ref().filter(|_| endpoint.gives_address).cloned();
        if hides_owner || socket_base.is_some() {
            upstream_head.headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        }
        let has_body = upstream_head.method != Method::HEAD;
        let redaction = Self {
            redactor: limits.redacts.then(|| Arc::clone(redactor)),
            hides_owner: hides_owner && has_body,
            socket_base: socket_base.filter(|_| has_body),
        };
        (redaction.redactor.is_some() || redaction.socket_base.is_some()).then_some(redaction)
    }
}

impl ResponseRedaction {
    /// The redactor that replaces keys.
    pub(super) fn redactor(&self) -> Option<Arc<Redactor>> {
        self.redactor.clone()
    }
}

/// Maximum size of a description of an owner; the provider's is about 2 KB.
const OWNER_BYTES_MAX: usize = 1024 * 1024;

/// Maximum size of a compressed document of known length that is read before it is relayed. The
/// provider has all of it when it begins to send, so reading it first costs only its transfer, and
/// unpacking it about a millisecond.
const PACKED_BYTES_MAX: usize = 256 * 1024;

impl UpstreamResponse {
    /// Redacts this response for a client. Keys are redacted while the body streams; only
    /// descriptions of the owner, compressed errors and short compressed documents are read first.
    pub(super) async fn redact(
        mut self: Box<Self>,
        redaction: &ResponseRedaction,
        limits: &Limits,
    ) -> Result<Box<Self>, ProxyError> {
        let ResponseRedaction { redactor, hides_owner, socket_base } = redaction;
        if let Some(base) = socket_base.as_deref().filter(|_| self.head.status.is_success()) {
            let text = self.text(OWNER_BYTES_MAX, limits).await;
            if let Some(rewritten) = text.and_then(|text| readdressed(&text, base)) {
                self.set_body(rewritten);
            }
        }
        let Some(redactor) = redactor else { return Ok(self) };
        redact_headers(&mut self.head.headers, redactor);
        let reason = self.head.extensions.get::<ReasonPhrase>();
        if reason.is_some_and(|reason| redactor.redacted(reason.as_bytes()).is_some()) {
            self.head.extensions.remove::<ReasonPhrase>();
        }
        let (is_served, is_packed) =
            (self.head.status.is_success(), self.head.headers.contains_key(CONTENT_ENCODING));
        if *hides_owner {
            self.hide_owner(limits).await?;
        } else if is_packed && let Some(bytes_max) = self.packed_bytes_max(is_served, limits) {
            let text = self.text(bytes_max, limits).await;
            match text.map(|text| redactor.redacted(&text)) {
                Some(Some(redacted)) => self.set_body(redacted),
                // The decoded text has no key. Bytes after the compressed data are no text here,
                // but a client might read them.
                Some(None) if !self.has_key_undecoded(redactor, bytes_max, limits).await => return Ok(self),
                Some(None) | None => {}
            }
        }
        self.redactor = Some(Arc::clone(redactor));
        Ok(self)
    }

    /// Maximum bytes of a compressed body that are read before it is relayed, so that a key in it
    /// can be replaced; `None` for a body that is searched as it streams, or not searched.
    fn packed_bytes_max(&self, is_served: bool, limits: &Limits) -> Option<usize> {
        if !is_served {
            return Some(limits.max_error_body_size);
        }
        let is_short = self.body.size_hint().exact().is_some_and(|length| length <= PACKED_BYTES_MAX as u64);
        (is_short && is_searched(&self.head.headers)).then_some(PACKED_BYTES_MAX)
    }

    /// Keeps of a description of the owner the fields that a client may read, whatever the status
    /// is.
    async fn hide_owner(&mut self, limits: &Limits) -> Result<(), ProxyError> {
        // A body that did not arrive in full cannot be redacted.
        let Some(whole) =
            self.body.whole(OWNER_BYTES_MAX, limits.error_body_timeout, Some(&limits.buffers)).await
        else {
            let is_over_budget = self.body.is_over_budget();
            return Err(if is_over_budget { BuffersFull.into() } else { Unredacted.into() });
        };
        if whole.is_empty() {
            return Ok(());
        }
        let text = decoded(&whole, content_encoding(&self.head.headers).as_deref(), OWNER_BYTES_MAX);
        let redacted = match text.and_then(|text| user_data::redacted(&text)) {
            Some(redacted) => redacted,
            // For an error, the status is all that a client can act upon.
            None if self.head.status.as_u16() >= 400 => user_data::withheld(),
            None => return Err(Unredacted.into()),
        };
        self.head.headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        self.set_body(redacted);
        Ok(())
    }

    /// The whole body, decoded, if it arrives within its limits of size and time.
    async fn text(&mut self, bytes_max: usize, limits: &Limits) -> Option<Vec<u8>> {
        let whole = self.body.whole(bytes_max, limits.error_body_timeout, Some(&limits.buffers)).await?;
        decoded(&whole, content_encoding(&self.head.headers).as_deref(), bytes_max)
    }

    async fn has_key_undecoded(&mut self, redactor: &Redactor, bytes_max: usize, limits: &Limits) -> bool {
        let whole = self.body.whole(bytes_max, limits.error_body_timeout, Some(&limits.buffers)).await;
        whole.is_none_or(|whole| redactor.finds_in(&whole))
    }

    /// Replaces the body.
    fn set_body(&mut self, text: Vec<u8>) {
        let headers = &mut self.head.headers;
        headers.remove(CONTENT_ENCODING);
        headers.remove(TRANSFER_ENCODING);
        headers.insert(CONTENT_LENGTH, HeaderValue::from(text.len()));
        self.body.replace(Bytes::from(text));
    }
}

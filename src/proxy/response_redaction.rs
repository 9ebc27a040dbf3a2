//! Redacts the responses to requests with keys of the pool: removes echoed keys, and the data of the account holder.
//! Also rewrites WebSocket URLs that lead past the proxy.

use std::sync::Arc;

use bytes::Bytes;
use http::Method;
use http::header::{
    ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, HeaderValue, TRANSFER_ENCODING,
};
use http_body::Body;
use hyper::ext::ReasonPhrase;

use super::config::Limits;
use super::error::{BuffersFull, ProxyError, RedactionFailed};
use super::upstream_response::UpstreamResponse;
use crate::body::decode::decode_body;
use crate::body::redacted_body::redact_headers;
use crate::elevenlabs::endpoint::Endpoint;
use crate::elevenlabs::socket::replace_signed_url_host;
use crate::elevenlabs::user_data;
use crate::policy::headers::{content_encoding, is_searched};
use crate::secret::Redactor;
use crate::upstream::UpstreamRequestHead;

/// The redaction of the response to one request.
#[derive(Debug)]
pub(super) struct ResponseRedaction {
    /// Redacts keys, or is `None` if keys are not redacted.
    pub(super) redactor: Option<Arc<Redactor>>,
    /// Whether the data of the account holder is removed from the body.
    hides_account_holder: bool,
    /// The base URL that replaces the provider's base URL in a WebSocket URL, or `None` if such a URL is not replaced.
    socket_base: Option<Arc<str>>,
}

impl ResponseRedaction {
    /// Determines the redaction for the response to `upstream_head`, or `None` if nothing is redacted. If the
    /// response describes the account holder or contains a WebSocket URL, it is requested without compression,
    /// because the proxy must read it.
    pub(super) fn new(
        upstream_head: &mut UpstreamRequestHead,
        endpoint: &Endpoint,
        redactor: &Arc<Redactor>,
        limits: &Limits,
    ) -> Option<Self> {
        let hides_account_holder = endpoint.returns_owner_data && limits.redacts;
        let socket_base = limits.socket_base.as_ref().filter(|_| endpoint.returns_websocket_url).cloned();
        if hides_account_holder || socket_base.is_some() {
            upstream_head.headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        }
        let has_body = upstream_head.method != Method::HEAD;
        let redaction = Self {
            redactor: limits.redacts.then(|| Arc::clone(redactor)),
            hides_account_holder: hides_account_holder && has_body,
            socket_base: socket_base.filter(|_| has_body),
        };
        (redaction.redactor.is_some() || redaction.socket_base.is_some()).then_some(redaction)
    }
}

/// Maximum size of a document that is rewritten because it describes the account holder or contains a WebSocket URL.
/// The provider's documents are at most about 2 KB long.
const MAX_REWRITTEN_DOCUMENT_SIZE: usize = 1024 * 1024;

/// Maximum size of a compressed document of known length that is read before it is relayed. The provider already has
/// the whole document when it starts sending, so the delay is only its transfer and about a millisecond of
/// decompression.
const MAX_COMPRESSED_DOCUMENT_SIZE: usize = 256 * 1024;

impl UpstreamResponse {
    /// Redacts this response, and rewrites its WebSocket URL. Keys are redacted while the body streams. The body is
    /// read before the relay only if it contains a WebSocket URL, describes the account holder, or is a compressed
    /// error or a short compressed document.
    ///
    /// # Errors
    ///
    /// Fails when a body that describes the account holder cannot be read or redacted.
    pub(super) async fn redact(
        mut self: Box<Self>,
        redaction: &ResponseRedaction,
        limits: &Limits,
    ) -> Result<Box<Self>, ProxyError> {
        let ResponseRedaction { redactor, hides_account_holder, socket_base } = redaction;
        if let Some(base) = socket_base.as_deref().filter(|_| self.head.status.is_success()) {
            let document = self.decoded_body(MAX_REWRITTEN_DOCUMENT_SIZE, limits).await;
            if let Some(rewritten) = document.and_then(|document| replace_signed_url_host(&document, base)) {
                self.set_body(rewritten);
            }
        }
        let Some(redactor) = redactor else { return Ok(self) };
        redact_headers(&mut self.head.headers, redactor);
        let reason_phrase = self.head.extensions.get::<ReasonPhrase>();
        if reason_phrase.is_some_and(|reason| redactor.redact(reason.as_bytes()).is_some()) {
            self.head.extensions.remove::<ReasonPhrase>();
        }
        let (is_served, is_compressed) =
            (self.head.status.is_success(), self.head.headers.contains_key(CONTENT_ENCODING));
        if *hides_account_holder {
            self.hide_account_holder(limits).await?;
        } else if is_compressed && let Some(max_bytes) = self.max_compressed_size(is_served, limits) {
            let document = self.decoded_body(max_bytes, limits).await;
            match document.map(|document| redactor.redact(&document)) {
                Some(Some(redacted)) => self.set_body(redacted),
                // The decoded document contains no key. A client might still read a key in bytes after the compressed
                // data.
                Some(None) if !self.may_raw_body_contain_key(redactor, max_bytes, limits).await => {
                    return Ok(self);
                }
                Some(None) | None => {}
            }
        }
        self.redactor = Some(Arc::clone(redactor));
        Ok(self)
    }

    /// Returns the maximum number of bytes of a compressed body that are read before it is relayed, so that keys in
    /// it can be redacted. Returns `None` for a body that is searched while it streams, or is not searched.
    fn max_compressed_size(&self, is_served: bool, limits: &Limits) -> Option<usize> {
        if !is_served {
            return Some(limits.max_error_body_size);
        }
        let is_short =
            self.body.size_hint().exact().is_some_and(|length| length <= MAX_COMPRESSED_DOCUMENT_SIZE as u64);
        (is_short && is_searched(&self.head.headers)).then_some(MAX_COMPRESSED_DOCUMENT_SIZE)
    }

    /// Reduces a document that describes the account holder to the fields that a client may read, for any status.
    async fn hide_account_holder(&mut self, limits: &Limits) -> Result<(), ProxyError> {
        // An incomplete body cannot be redacted.
        let Some(body) = self.read_body(MAX_REWRITTEN_DOCUMENT_SIZE, limits).await else {
            let is_over_budget = self.body.is_over_budget();
            return Err(if is_over_budget { BuffersFull.into() } else { RedactionFailed.into() });
        };
        if body.is_empty() {
            return Ok(());
        }
        let document =
            decode_body(&body, content_encoding(&self.head.headers).as_deref(), MAX_REWRITTEN_DOCUMENT_SIZE);
        let redacted = match document.and_then(|document| user_data::redact(&document)) {
            Some(redacted) => redacted,
            // For an error, the client only needs the status.
            None if self.head.status.as_u16() >= 400 => user_data::withheld_body(),
            None => return Err(RedactionFailed.into()),
        };
        self.head.headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        self.set_body(redacted);
        Ok(())
    }

    /// Reads and decodes the whole body. Returns `None` if the body exceeds its maximum size or time, or cannot be
    /// decoded.
    async fn decoded_body(&mut self, max_bytes: usize, limits: &Limits) -> Option<Vec<u8>> {
        let body = self.read_body(max_bytes, limits).await?;
        decode_body(&body, content_encoding(&self.head.headers).as_deref(), max_bytes)
    }

    async fn read_body(&mut self, max_bytes: usize, limits: &Limits) -> Option<Vec<u8>> {
        self.body.read_to_end(max_bytes, limits.error_body_timeout, Some(&limits.buffers)).await
    }

    /// Reads the body without decoding it. Returns whether it contains a key, or is too large to be searched.
    async fn may_raw_body_contain_key(
        &mut self,
        redactor: &Redactor,
        max_bytes: usize,
        limits: &Limits,
    ) -> bool {
        let body = self.read_body(max_bytes, limits).await;
        body.is_none_or(|body| redactor.contains_key(&body))
    }

    /// Replaces the body with uncompressed `document`.
    fn set_body(&mut self, document: Vec<u8>) {
        let headers = &mut self.head.headers;
        headers.remove(CONTENT_ENCODING);
        headers.remove(TRANSFER_ENCODING);
        headers.insert(CONTENT_LENGTH, HeaderValue::from(document.len()));
        self.body.replace(Bytes::from(document));
    }
}

//! A response of the provider with its verdict, and with its body as far as it had to be read.

use std::sync::Arc;

use http::response::Parts;
use http::{Method, Response, StatusCode};
use hyper::body::Incoming;

use super::config::Limits;
use crate::body::decode::decoded;
use crate::body::peek::Peeked;
use crate::clock;
use crate::elevenlabs::refusal::{ErrorBody, classify, classify_unreadable, is_body_needed};
use crate::policy::headers::content_encoding;
use crate::policy::retry_after::retry_after;
use crate::policy::verdict::{Concern, Verdict};
use crate::secret::Redactor;
use crate::upstream::{SendError, UpstreamBody};

/// Maximum characters of a refusal's message that are kept to explain a key's state: about its
/// first sentence.
const MESSAGE_CHARS_MAX: usize = 160;

/// A response and its classification.
#[derive(Debug)]
pub(super) struct UpstreamResponse {
    pub(super) head: Parts,
    pub(super) body: Peeked<UpstreamBody<Incoming>>,
    pub(super) verdict: Verdict,
    /// The message of a refusal, shortened, for the explanation of a key's state.
    pub(super) message: Option<String>,
    /// Replaces keys in the body while it is relayed.
    pub(super) redactor: Option<Arc<Redactor>>,
}

impl UpstreamResponse {
    /// Classifies the response to a request with `method`. The body of a refusal is read within its
    /// limits; a body that cannot be read is relayed unread.
    pub(super) async fn read(
        sent: Result<Response<UpstreamBody<Incoming>>, SendError>,
        method: &Method,
        limits: &Limits,
    ) -> Result<Box<Self>, SendError> {
        let (head, body) = sent?.into_parts();
        // A successful response has no meaningful `Retry-After`.
        let retry_after =
            (!head.status.is_success()).then(|| retry_after(&head.headers, clock::now())).flatten();
        if !is_body_needed(head.status) || method == Method::HEAD {
            let verdict = classify(head.status, None, retry_after);
            let body = Peeked::untouched(body);
            return Ok(Box::new(Self { head, body, verdict, message: None, redactor: None }));
        }
        // Boxed, so that the future of a successful request does not reserve the size of this one.
        let Limits {
            max_error_body_size: error_body_bytes_max,
            error_body_timeout: error_body_max,
            ref buffers,
            ..
        } = *limits;
        let reading = Box::pin(Peeked::read(body, error_body_bytes_max, error_body_max, Some(buffers)));
        let (body, whole) = reading.await;
        let encoding = content_encoding(&head.headers);
        let readable =
            whole.and_then(|whole| decoded(&whole, encoding.as_deref(), limits.max_error_body_size));
        let error_body = readable.map(|text| ErrorBody::read(&text));
        let verdict = match &error_body {
            Some(error_body) => classify(head.status, Some(error_body), retry_after),
            None => classify_unreadable(head.status, retry_after),
        };
        // The message about an invalid request may repeat the client's text, so it is not kept.
        let is_kept = verdict.concern() != Concern::Request;
        let message = error_body.filter(|_| is_kept).map(|error_body| error_body.summary(MESSAGE_CHARS_MAX));
        Ok(Box::new(Self { head, body, verdict, message, redactor: None }))
    }

    /// Whether the connection was switched to another protocol, as requested.
    pub(super) fn is_switched(&self) -> bool {
        self.head.status == StatusCode::SWITCHING_PROTOCOLS
    }
}

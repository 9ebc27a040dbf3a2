//! Reads and classifies a response of the provider, for `exchange`. The body of a refusal is read for its
//! classification, up to a maximum size and time.

use std::sync::Arc;

use http::response::Parts;
use http::{Method, Response, StatusCode};
use hyper::body::Incoming;

use super::config::Limits;
use crate::body::decode::decode_body;
use crate::body::peek::PeekedBody;
use crate::clock;
use crate::elevenlabs::refusal::{ErrorBody, classify, classify_unreadable, is_body_needed};
use crate::policy::headers::content_encoding;
use crate::policy::retry_after::parse_retry_after;
use crate::policy::verdict::{Concern, Verdict};
use crate::secret::Redactor;
use crate::upstream::{SendError, UpstreamBody};

/// Maximum number of characters of a refusal's message that explain a key's state: about one sentence.
const MAX_MESSAGE_CHARS: usize = 160;

/// A response of the provider and its verdict.
#[derive(Debug)]
pub(super) struct UpstreamResponse {
    pub(super) head: Parts,
    pub(super) body: PeekedBody<UpstreamBody<Incoming>>,
    pub(super) verdict: Verdict,
    /// The shortened message of a refusal, which explains a key's state. It is `None` if the body was not read
    /// completely, or if the refusal is about the request.
    pub(super) message: Option<String>,
    /// Redacts keys in the body while it is relayed, or `None` if keys are not redacted.
    pub(super) redactor: Option<Arc<Redactor>>,
}

impl UpstreamResponse {
    /// Classifies the response to a request with `method`. If the body exceeds its limits, the response is classified
    /// by its status alone, and the body is relayed.
    pub(super) async fn read(
        send_result: Result<Response<UpstreamBody<Incoming>>, SendError>,
        method: &Method,
        limits: &Limits,
    ) -> Result<Box<Self>, SendError> {
        let (head, body) = send_result?.into_parts();
        // A successful response has no meaningful `Retry-After`.
        let retry_after =
            (!head.status.is_success()).then(|| parse_retry_after(&head.headers, clock::now())).flatten();
        if !is_body_needed(head.status) || method == Method::HEAD {
            let verdict = classify(head.status, None, retry_after);
            let body = PeekedBody::new(body);
            return Ok(Box::new(Self { head, body, verdict, message: None, redactor: None }));
        }
        // The future is boxed, so that the future of a successful request does not reserve memory for it.
        let max_bytes = limits.max_error_body_size;
        let read_body =
            Box::pin(PeekedBody::read(body, max_bytes, limits.error_body_timeout, Some(&limits.buffers)));
        let (body, complete_body) = read_body.await;
        let encoding = content_encoding(&head.headers);
        let decoded_body = complete_body
            .and_then(|complete_body| decode_body(&complete_body, encoding.as_deref(), max_bytes));
        let error_body = decoded_body.map(|decoded_body| ErrorBody::parse(&decoded_body));
        let verdict = match &error_body {
            Some(error_body) => classify(head.status, Some(error_body), retry_after),
            None => classify_unreadable(head.status, retry_after),
        };
        // The message about an invalid request may repeat the client's text, so it is dropped.
        let is_about_key = verdict.concern() != Concern::Request;
        let message =
            error_body.filter(|_| is_about_key).map(|error_body| error_body.summary(MAX_MESSAGE_CHARS));
        Ok(Box::new(Self { head, body, verdict, message, redactor: None }))
    }

    /// Returns whether the connection was switched to another protocol, as requested.
    pub(super) fn is_switched(&self) -> bool {
        self.head.status == StatusCode::SWITCHING_PROTOCOLS
    }
}

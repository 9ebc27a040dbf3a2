//! Builds the response to the client from the provider's response, whose body is streamed, or from an error of the
//! proxy. Defines [`ResponseBody`], the body of every response.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::header::HeaderValue;
use http::{HeaderName, Response, Version};
use http_body::{Body, Frame, SizeHint};
use http_body_util::Full;
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::Incoming;

use super::access_log::AccessLog;
use super::attempt::Attempt;
use super::error::ProxyError;
use super::ownership_recorder::OwnershipRecorder;
use super::upstream_response::UpstreamResponse;
use crate::body::budget::{BufferBudget, BufferReservation};
use crate::body::decode::parse_codings;
use crate::body::inspect::InspectedBody;
use crate::body::peek::PeekedBody;
use crate::body::redacted_body::RedactedBody;
use crate::body::relay::{OnBodyEnd, Relay, RelayEnd};
use crate::clock;
use crate::policy::headers;
use crate::upstream::{UpstreamBody, UpstreamBodyError};

/// The body of a response to a client.
#[derive(Debug)]
pub enum ResponseBody {
    /// A body that the proxy generated.
    Generated(Full<Bytes>),
    /// A body that another module produces while it is sent.
    Produced(UnsyncBoxBody<Bytes, Infallible>),
    /// The provider's body, streamed as it arrives.
    Relayed(Box<RelayedBody>),
}

/// The provider's body, searched for identifiers and keys. The end of the body completes the attempt and the
/// access log.
type RelayedBody =
    Relay<RedactedBody<InspectedBody<PeekedBody<UpstreamBody<Incoming>>, OwnershipRecorder>>, RelayRecorder>;

/// Completes the usage record and the access log when a relay ends.
#[derive(Debug)]
pub struct RelayRecorder {
    attempt: Box<Attempt>,
    log: AccessLog,
}

impl OnBodyEnd for RelayRecorder {
    fn on_end(mut self, relay_end: RelayEnd, bytes: u64) {
        let record = self.attempt.record_relay_end(relay_end, bytes);
        self.log.summary.record_end(record);
    }
}

/// The response header with the ID of the request.
pub(super) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Relays the provider's response: its status, its headers without hop-by-hop headers, and its body.
pub(super) fn relay(
    response: UpstreamResponse,
    attempt: Box<Attempt>,
    ownership: Option<OwnershipRecorder>,
    log: AccessLog,
    buffers: &BufferBudget,
) -> Response<ResponseBody> {
    attempt.release_replay_buffer();
    log.record_relay_start();
    let UpstreamResponse { mut head, body, redactor, .. } = response;
    headers::strip_response(&mut head.headers);
    // The HTTP version is a property of each connection.
    head.version = Version::HTTP_11;
    let request_id = log.summary.request_id();
    if let (false, Ok(id)) = (head.headers.contains_key(REQUEST_ID), HeaderValue::from_str(&request_id)) {
        head.headers.insert(REQUEST_ID, id);
    }
    let max_bytes = ownership.as_ref().map_or(0, |recorder| recorder.max_bytes);
    // Identifiers are read from the body as it arrived. Keys are redacted afterwards.
    let reservation = ownership
        .as_ref()
        .map(|_| buffers.reservation(BufferReservation::UNBUDGETED_BYTES))
        .unwrap_or_default();
    let inspected = InspectedBody::new(body, ownership, max_bytes, reservation);
    let redactor = redactor.filter(|_| headers::is_searched(&head.headers));
    let codings = parse_codings(headers::content_encoding(&head.headers).as_deref());
    let relay = Relay::new(
        RedactedBody::with_codings(inspected, redactor, codings, buffers),
        RelayRecorder { attempt, log },
    );
    Response::from_parts(head, ResponseBody::Relayed(Box::new(relay)))
}

/// Builds an error response of the proxy, and records the error in the access log.
pub(super) fn error_response(error: &ProxyError, mut log: AccessLog) -> Response<ResponseBody> {
    let request_id = log.summary.request_id();
    let mut response = error.response(&request_id, clock::now());
    if let Ok(id) = HeaderValue::from_str(&request_id) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    log.summary.record_error(error, response.status());
    response.map(|body| ResponseBody::Generated(Full::new(body)))
}

impl From<Bytes> for ResponseBody {
    fn from(body: Bytes) -> Self {
        Self::Generated(Full::new(body))
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = UpstreamBodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, UpstreamBodyError>>> {
        match &mut *self {
            Self::Generated(body) => Pin::new(body).poll_frame(cx).map_err(|never| match never {}),
            Self::Produced(body) => Pin::new(body).poll_frame(cx).map_err(|never| match never {}),
            Self::Relayed(body) => Pin::new(body).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Generated(body) => body.is_end_stream(),
            Self::Produced(body) => body.is_end_stream(),
            Self::Relayed(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Generated(body) => body.size_hint(),
            Self::Produced(body) => body.size_hint(),
            Self::Relayed(body) => body.size_hint(),
        }
    }
}

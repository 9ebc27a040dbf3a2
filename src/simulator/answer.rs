//! Builds responses. A body is generated while it is sent, and a fault can delay or break it.

use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode};
use http_body::{Body, Frame, SizeHint};
use serde_json::Value;

use super::encoding::Encoding;
use super::plan::REGION;
use super::shape::Refusal;
use super::tracked_stream::Flushes;
use super::world::Slot;

/// The header with the region that served the request.
const REGION_HEADER: &str = "x-region";

/// A response to be sent.
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: AnswerBody,
    /// Credits charged for it.
    pub(super) charged: u64,
}

/// The headers of every response of the provider (captured responses of August 2026), with a trace
/// id.
fn common_headers(trace_id: &str) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (name, value) in [
        ("server", "uvicorn"),
        ("via", "1.1 google"),
        ("alt-svc", "h3=\":443\"; ma=2592000"),
        (REGION_HEADER, REGION),
    ] {
        headers.insert(HeaderName::from_static(name), HeaderValue::from_static(value));
    }
    set(&mut headers, "x-trace-id", trace_id);
    headers
}

/// Sets a header. A value that is invalid in a header is omitted.
pub(super) fn set(headers: &mut HeaderMap, name: &'static str, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(HeaderName::from_static(name), value);
    }
}

/// Creates a unique identifier that is valid in a header.
pub(super) fn trace_id() -> String {
    uuid::Uuid::now_v7().simple().to_string()
}

impl Answer {
    /// Creates a response of 200 with a JSON document.
    pub(super) fn document(document: &Value) -> Self {
        let mut answer = Self::empty(&trace_id(), "application/json");
        answer.body = AnswerBody::whole(document.to_string().into());
        answer
    }

    /// Creates a response of 200 with an empty body and the common headers.
    pub(super) fn empty(trace_id: &str, content_type: &str) -> Self {
        let mut headers = common_headers(trace_id);
        set(&mut headers, "content-type", content_type);
        Self { status: StatusCode::OK, headers, body: AnswerBody::whole(Bytes::new()), charged: 0 }
    }

    /// Creates a refusal. Its `request_id` is `trace_id`.
    pub(super) fn refusal(refusal: Refusal, trace_id: &str) -> Self {
        let mut answer = Self::empty(trace_id, "application/json");
        answer.status = refusal.status;
        for (name, value) in refusal.headers {
            set(&mut answer.headers, name, &value);
        }
        answer.body = AnswerBody::whole(refusal.body.into());
        answer
    }

    /// Encodes the body with each of `encodings` in turn.
    pub(super) fn encoded(mut self, encodings: &[Encoding]) -> Self {
        let plain: Vec<u8> = self.body.take_ready().into_iter().flatten().collect();
        let body = encodings.iter().fold(plain, |body, encoding| encoding.encode(&body));
        self.body = AnswerBody::whole(body.into());
        let names: Vec<_> = encodings.iter().map(ToString::to_string).collect();
        set(&mut self.headers, "content-encoding", &names.join(", "));
        self
    }

    /// Sets the region of the response, unless a fault has set another one.
    pub(super) fn set_region(&mut self, region: &str) {
        if self.headers.get(REGION_HEADER).is_some_and(|value| value == REGION) {
            set(&mut self.headers, REGION_HEADER, region);
        }
    }

    /// Creates the response of a fault. Invalid headers are omitted.
    pub(super) fn custom(status: u16, headers: &[(String, String)], body: Bytes) -> Self {
        let content_type = match body.first() {
            None => "",
            Some(b'{' | b'[') => "application/json",
            Some(b'<') => "text/html",
            Some(_) => "text/plain",
        };
        let mut answer = Self::empty(&trace_id(), content_type);
        answer.status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        if body.is_empty() {
            answer.headers.remove("content-type");
        }
        answer.body = AnswerBody::whole(body);
        let parse_header = |(name, value): &(String, String)| {
            Some((HeaderName::try_from(name).ok()?, HeaderValue::try_from(value).ok()?))
        };
        let headers: Vec<_> = headers.iter().filter_map(parse_header).collect();
        for (name, _) in &headers {
            answer.headers.remove(name);
        }
        for (name, value) in headers.into_iter().filter(|(_, value)| !value.is_empty()) {
            answer.headers.append(name, value);
        }
        answer
    }

    pub(super) fn into_response(self) -> Response<AnswerBody> {
        let mut response = Response::new(self.body);
        *response.status_mut() = self.status;
        *response.headers_mut() = self.headers;
        response
    }
}

type Pieces = Box<dyn Iterator<Item = Bytes> + Send>;

/// A body: ready bytes, and then bytes that are generated piece by piece.
pub(super) struct AnswerBody {
    ready: VecDeque<Bytes>,
    pieces: Option<Pieces>,
    /// The remaining length, if it is known. It becomes the content length.
    remaining: Option<u64>,
    pause: Option<Pause>,
    cut: Option<Cut>,
    /// Released when the last piece is generated, not when it is sent. Otherwise a client could
    /// receive the whole response while its operation still counts as running.
    slot: Option<Slot>,
}

struct Pause {
    length: Duration,
    is_first: bool,
    sleep: Option<Pin<Box<tokio::time::Sleep>>>,
}

struct Cut {
    remaining: u64,
    flushes: Flushes,
    flushed: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

/// The error of a body that a fault broke.
#[derive(Debug)]
pub(super) struct Broken;

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a fault breaks this connection")
    }
}

impl std::error::Error for Broken {}

impl AnswerBody {
    pub(super) fn whole(bytes: Bytes) -> Self {
        let remaining = Some(u64::try_from(bytes.len()).unwrap_or(u64::MAX));
        let ready = if bytes.is_empty() { VecDeque::new() } else { VecDeque::from([bytes]) };
        Self { ready, pieces: None, remaining, pause: None, cut: None, slot: None }
    }

    /// Creates a body that is generated while it is sent. Without a length it is sent chunked.
    pub(super) fn pieces(length: Option<u64>, pieces: impl Iterator<Item = Bytes> + Send + 'static) -> Self {
        let mut body =
            Self { pieces: Some(Box::new(pieces)), remaining: length, ..Self::whole(Bytes::new()) };
        body.remaining = length;
        body.look_ahead();
        body
    }

    /// Keeps `slot` until the last piece is generated.
    pub(super) fn with_slot(mut self, slot: Slot) -> Self {
        self.slot = Some(slot);
        self.look_ahead();
        self
    }

    /// Delays each piece except the first.
    pub(super) fn slow(&mut self, length: Duration) {
        self.pause = Some(Pause { length, is_first: true, sleep: None });
    }

    /// Breaks the body after `bytes` bytes. The body is then always chunked.
    pub(super) fn cut_after(&mut self, bytes: u64, flushes: Flushes) {
        self.remaining = None;
        self.cut = Some(Cut { remaining: bytes, flushes, flushed: None });
    }

    /// Takes the ready bytes, which are the whole body if it is not generated piece by piece.
    pub(super) fn take_ready(&mut self) -> VecDeque<Bytes> {
        std::mem::take(&mut self.ready)
    }

    /// Generates one piece in advance, so that the last piece is recognized.
    fn look_ahead(&mut self) {
        if self.ready.is_empty() {
            match self.pieces.as_mut().and_then(Iterator::next) {
                Some(piece) => self.ready.push_back(piece),
                None => {
                    self.pieces = None;
                    self.slot = None;
                }
            }
        }
    }
}

impl Pause {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.is_first {
            self.is_first = false;
            return Poll::Ready(());
        }
        let length = self.length;
        let sleep = self.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep(length)));
        ready!(sleep.as_mut().poll(cx));
        self.sleep = None;
        Poll::Ready(())
    }
}

impl Cut {
    /// Returns ready when all previous bytes are flushed to the socket. The client then receives
    /// every byte before the break, so a test knows their number.
    fn poll_flushed(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let flushes = &self.flushes;
        self.flushed.get_or_insert_with(|| Box::pin(flushes.clone().next())).as_mut().poll(cx)
    }
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        let body = &mut *self;
        if let Some(cut) = &mut body.cut
            && (cut.remaining == 0 || body.ready.is_empty())
        {
            ready!(cut.poll_flushed(cx));
            return Poll::Ready(Some(Err(Broken)));
        }
        if body.ready.is_empty() {
            return Poll::Ready(None);
        }
        if let Some(pause) = &mut body.pause {
            ready!(pause.poll(cx));
        }
        let Some(mut piece) = body.ready.pop_front() else { return Poll::Ready(None) };
        let length = |piece: &Bytes| u64::try_from(piece.len()).unwrap_or(u64::MAX);
        if let Some(cut) = &mut body.cut {
            piece.truncate(usize::try_from(cut.remaining).unwrap_or(usize::MAX));
            cut.remaining -= length(&piece);
        }
        body.remaining = body.remaining.map(|remaining| remaining.saturating_sub(length(&piece)));
        body.look_ahead();
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.ready.is_empty() && self.cut.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        self.remaining.map_or_else(SizeHint::new, SizeHint::with_exact)
    }
}

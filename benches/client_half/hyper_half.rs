//! The client half as hyper would do it: `hyper::client::conn::http1`, driven by the task of the request, with
//! the same duties as `keychoir::upstream`: the key, an idle pool, the timeouts, and whether a byte of the
//! request was accepted. Without redaction, upgrades and errors, which would only add to its cost.

use std::future::{Future, poll_fn};
use std::io::{self, IoSlice};
use std::mem;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, HOST, TRANSFER_ENCODING};
use http::{HeaderName, HeaderValue, Request, Response};
use http_body::{Body, Frame};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use keychoir::body::replay::{AttemptBody, UploadProgress, UploadWait};
use keychoir::clock;
use keychoir::policy::authority::Authority;
use keychoir::upstream::{Connect, Settings, UpstreamRequestHead};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep_until};

use crate::UploadBody;

/// The most that one read takes, as in `keychoir::upstream`.
const MAX_READ_BYTES: usize = 128 * 1024;

pub struct HyperHalf<C: Connect> {
    authority: Authority,
    connector: C,
    settings: Settings,
    key: HeaderValue,
    hop: HeaderValue,
    idle: Mutex<Idle<C::Io>>,
}

/// Connections without a request, and since when.
type Idle<S> = Vec<(Box<Open<S>>, Instant)>;

struct Open<S: AsyncRead + AsyncWrite + Unpin> {
    sender: SendRequest<AttemptBody<UploadBody>>,
    driver: http1::Connection<TokioIo<WriteDetector<S>>, AttemptBody<UploadBody>>,
    has_written: Arc<AtomicBool>,
    opened_at: Instant,
    timer: Option<Pin<Box<Sleep>>>,
}

impl<C: Connect> HyperHalf<C> {
    pub fn new(authority: Authority, connector: C, settings: Settings, key: &str) -> Arc<Self> {
        let mut key = HeaderValue::try_from(key).unwrap();
        key.set_sensitive(true);
        let hop = HeaderValue::from_static("0198c2f07b1a70008000000100000002");
        Arc::new(Self { authority, connector, settings, key, hop, idle: Mutex::default() })
    }

    pub async fn send(
        self: &Arc<Self>,
        request_head: &UpstreamRequestHead,
        body: AttemptBody<UploadBody>,
    ) -> Response<HyperBody<C>> {
        let upload = body.upload();
        let request = self.request(request_head, body);
        let mut open = match self.take() {
            Some(open) => open,
            None => self.open().await,
        };
        let mut response = pin!(open.sender.send_request(request));
        let found = poll_fn(|cx| {
            let driven = open.drive(cx);
            if open.has_written.load(Ordering::Relaxed) && !upload.has_started() {
                upload.mark_started();
            }
            // Only the driver completes the response, so its waker is never needed.
            if let Poll::Ready(found) = response.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                return Poll::Ready(found);
            }
            assert!(driven.is_pending(), "the connection ended");
            let deadline = self.deadline(&upload);
            open.poll_until(deadline, cx).map(|()| panic!("no response in time"))
        })
        .await
        .unwrap();
        let idle_timeout = self.settings.stream_idle_timeout;
        found.map(|incoming| {
            let mut body = HyperBody {
                incoming,
                open: Some(open),
                half: Arc::clone(self),
                idle_timeout,
                moved_at: clock::instant(),
                has_moved: false,
                is_first: true,
            };
            if body.incoming.is_end_stream() {
                body.finish();
            }
            body
        })
    }

    fn request(
        &self,
        request_head: &UpstreamRequestHead,
        body: AttemptBody<UploadBody>,
    ) -> Request<AttemptBody<UploadBody>> {
        let is_empty = body.is_end_stream();
        let mut request = Request::new(body);
        *request.method_mut() = request_head.method.clone();
        *request.uri_mut() = request_head.target.clone();
        let mut headers = request_head.headers.clone();
        if !is_empty {
            headers.remove(CONTENT_LENGTH);
        }
        headers.remove(TRANSFER_ENCODING);
        headers.insert(HOST, self.authority.host_header().clone());
        headers.append(HeaderName::from_static("x-keychoir-hop"), self.hop.clone());
        headers.insert(HeaderName::from_static("xi-api-key"), self.key.clone());
        *request.headers_mut() = headers;
        request
    }

    /// The most recently used connection that still accepts a request.
    fn take(&self) -> Option<Box<Open<C::Io>>> {
        let mut idle = self.idle.lock().unwrap();
        let now = clock::instant();
        while let Some((mut open, since)) = idle.pop() {
            let is_fresh = now.saturating_duration_since(since) < self.settings.keepalive_timeout
                && now.saturating_duration_since(open.opened_at) < self.settings.max_connection_duration;
            let mut cx = Context::from_waker(Waker::noop());
            if is_fresh && open.drive(&mut cx).is_pending() && open.sender.is_ready() {
                open.has_written.store(false, Ordering::Relaxed);
                return Some(open);
            }
        }
        None
    }

    async fn open(&self) -> Box<Open<C::Io>> {
        let stream = self.connector.connect(&self.authority).await.unwrap();
        let has_written = Arc::new(AtomicBool::new(false));
        let marked = WriteDetector { stream, has_written: Arc::clone(&has_written) };
        let mut builder = http1::Builder::new();
        builder.max_buf_size(MAX_READ_BYTES);
        let (sender, driver) = builder.handshake(TokioIo::new(marked)).await.unwrap();
        Box::new(Open { sender, driver, has_written, opened_at: clock::instant(), timer: None })
    }

    fn deadline(&self, upload: &UploadProgress<UploadBody>) -> Instant {
        let span = match upload.waits_for() {
            UploadWait::ForResponse => self.settings.response_timeout,
            UploadWait::ForUpstream | UploadWait::ForClient | UploadWait::Failed => {
                self.settings.request_body_timeout
            }
        };
        let idle_at = upload.last_sent_at() + span;
        upload
            .min_rate_deadline(self.settings.min_request_body_rate)
            .map_or(idle_at, |slow_at| slow_at.min(idle_at))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Open<S> {
    fn drive(&mut self, cx: &mut Context<'_>) -> Poll<hyper::Result<()>> {
        self.driver.poll_without_shutdown(cx)
    }

    fn poll_until(&mut self, deadline: Instant, cx: &mut Context<'_>) -> Poll<()> {
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(deadline.into())));
        if timer.deadline() > deadline.into() {
            timer.as_mut().reset(deadline.into());
        }
        loop {
            std::task::ready!(timer.as_mut().poll(cx));
            if timer.deadline() >= deadline.into() {
                return Poll::Ready(());
            }
            timer.as_mut().reset(deadline.into());
        }
    }
}

pub struct HyperBody<C: Connect> {
    incoming: Incoming,
    open: Option<Box<Open<C::Io>>>,
    half: Arc<HyperHalf<C>>,
    idle_timeout: Duration,
    moved_at: Instant,
    has_moved: bool,
    /// Whether the connection may have read the first piece together with the head.
    is_first: bool,
}

impl<C: Connect> HyperBody<C> {
    /// Returns the connection to the idle pool, if it takes another request.
    fn finish(&mut self) {
        let Some(mut open) = self.open.take() else { return };
        let mut cx = Context::from_waker(Waker::noop());
        if open.sender.is_ready() || (open.drive(&mut cx).is_pending() && open.sender.is_ready()) {
            self.half.idle.lock().unwrap().push((open, clock::instant()));
        }
    }
}

impl<C: Connect> Body for HyperBody<C> {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let this = &mut *self;
        let Some(open) = &mut this.open else { return Poll::Ready(None) };
        let mut is_driven = !mem::take(&mut this.is_first);
        if is_driven {
            let _ = open.drive(cx);
        }
        loop {
            // Only the driver sends pieces, so the waker of the channel is never needed.
            let mut noop = Context::from_waker(Waker::noop());
            match Pin::new(&mut this.incoming).poll_frame(&mut noop) {
                Poll::Ready(Some(Ok(frame))) => {
                    this.has_moved = true;
                    if this.incoming.is_end_stream() {
                        this.finish();
                    }
                    return Poll::Ready(Some(Ok(frame)));
                }
                Poll::Ready(Some(Err(error))) => {
                    this.open = None;
                    return Poll::Ready(Some(Err(error)));
                }
                Poll::Ready(None) => {
                    this.finish();
                    return Poll::Ready(None);
                }
                Poll::Pending if is_driven => break,
                Poll::Pending => is_driven = open.drive(cx).is_pending(),
            }
        }
        if mem::take(&mut this.has_moved) {
            this.moved_at = clock::instant();
        }
        let deadline = this.moved_at + this.idle_timeout;
        open.poll_until(deadline, cx).map(|()| panic!("the response stalled"))
    }
}

/// A stream that records whether it has accepted a byte.
struct WriteDetector<S> {
    stream: S,
    has_written: Arc<AtomicBool>,
}

impl<S> WriteDetector<S> {
    fn mark(&self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if matches!(written, Poll::Ready(Ok(1..))) {
            self.has_written.store(true, Ordering::Relaxed);
        }
        written
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for WriteDetector<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        to: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, to)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for WriteDetector<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, from: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, from);
        self.mark(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        from: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, from);
        self.mark(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

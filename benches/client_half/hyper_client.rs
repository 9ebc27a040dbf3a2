//! An HTTP/1.1 client on top of `hyper::client::conn::http1`, driven by the task of the request. It has the same duties
//! as `keychoir::upstream`: it sets the key, keeps an idle pool, enforces the timeouts, and detects whether a byte of
//! the request was sent. It lacks redaction, upgrades and error handling, which would only add to its cost.

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

/// Maximum number of bytes per read, as in `keychoir::upstream`.
const MAX_READ_BYTES: usize = 128 * 1024;

/// The client that is compared with `keychoir::upstream`.
pub struct HyperClient<C: Connect> {
    authority: Authority,
    connector: C,
    settings: Settings,
    key: HeaderValue,
    hop_id: HeaderValue,
    idle_pool: Mutex<IdlePool<C::Io>>,
}

/// Connections without a request, with the times at which they became idle.
type IdlePool<S> = Vec<(Box<Connection<S>>, Instant)>;

/// A connection. It makes progress only when its driver is polled.
struct Connection<S: AsyncRead + AsyncWrite + Unpin> {
    sender: SendRequest<AttemptBody<UploadBody>>,
    driver: http1::Connection<TokioIo<WriteDetector<S>>, AttemptBody<UploadBody>>,
    has_written: Arc<AtomicBool>,
    opened_at: Instant,
    timer: Option<Pin<Box<Sleep>>>,
}

impl<C: Connect> HyperClient<C> {
    pub fn new(authority: Authority, connector: C, settings: Settings, key: &str) -> Arc<Self> {
        let mut key = HeaderValue::try_from(key).unwrap();
        key.set_sensitive(true);
        let hop_id = HeaderValue::from_static("0198c2f07b1a70008000000100000002");
        Arc::new(Self { authority, connector, settings, key, hop_id, idle_pool: Mutex::default() })
    }

    /// Sends a request on an idle or a new connection, and returns the response when its head has arrived.
    pub async fn send(
        self: &Arc<Self>,
        request_head: &UpstreamRequestHead,
        body: AttemptBody<UploadBody>,
    ) -> Response<HyperBody<C>> {
        let upload = body.upload();
        let request = self.build_request(request_head, body);
        let mut connection = match self.take_idle() {
            Some(connection) => connection,
            None => self.open_connection().await,
        };
        let mut response_future = pin!(connection.sender.send_request(request));
        let response = poll_fn(|cx| {
            let driver_poll = connection.drive(cx);
            if connection.has_written.load(Ordering::Relaxed) && !upload.has_started() {
                upload.mark_started();
            }
            // Only the driver completes the response, so its waker is never needed.
            if let Poll::Ready(response) =
                response_future.as_mut().poll(&mut Context::from_waker(Waker::noop()))
            {
                return Poll::Ready(response);
            }
            assert!(driver_poll.is_pending(), "the connection must stay open");
            let deadline = self.deadline(&upload);
            connection.poll_until(deadline, cx).map(|()| panic!("the response must arrive in time"))
        })
        .await
        .unwrap();
        let idle_timeout = self.settings.stream_idle_timeout;
        response.map(|incoming| {
            let mut body = HyperBody {
                incoming,
                connection: Some(connection),
                client: Arc::clone(self),
                idle_timeout,
                last_frame_at: clock::instant(),
                has_received: false,
                is_first_poll: true,
            };
            if body.incoming.is_end_stream() {
                body.finish();
            }
            body
        })
    }

    fn build_request(
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
        headers.append(HeaderName::from_static("x-keychoir-hop"), self.hop_id.clone());
        headers.insert(HeaderName::from_static("xi-api-key"), self.key.clone());
        *request.headers_mut() = headers;
        request
    }

    /// Takes the most recently used connection that still accepts a request.
    fn take_idle(&self) -> Option<Box<Connection<C::Io>>> {
        let mut idle_pool = self.idle_pool.lock().unwrap();
        let now = clock::instant();
        while let Some((mut connection, idle_since)) = idle_pool.pop() {
            let is_fresh = now.saturating_duration_since(idle_since) < self.settings.keepalive_timeout
                && now.saturating_duration_since(connection.opened_at)
                    < self.settings.max_connection_duration;
            let mut cx = Context::from_waker(Waker::noop());
            if is_fresh && connection.drive(&mut cx).is_pending() && connection.sender.is_ready() {
                connection.has_written.store(false, Ordering::Relaxed);
                return Some(connection);
            }
        }
        None
    }

    async fn open_connection(&self) -> Box<Connection<C::Io>> {
        let stream = self.connector.connect(&self.authority).await.unwrap();
        let has_written = Arc::new(AtomicBool::new(false));
        let stream = WriteDetector { stream, has_written: Arc::clone(&has_written) };
        let mut builder = http1::Builder::new();
        builder.max_buf_size(MAX_READ_BYTES);
        let (sender, driver) = builder.handshake(TokioIo::new(stream)).await.unwrap();
        Box::new(Connection { sender, driver, has_written, opened_at: clock::instant(), timer: None })
    }

    /// Returns the time at which the request fails if its upload makes no progress and no response head arrives.
    fn deadline(&self, upload: &UploadProgress<UploadBody>) -> Instant {
        let timeout = match upload.waits_for() {
            UploadWait::ForResponse => self.settings.response_timeout,
            UploadWait::ForUpstream | UploadWait::ForClient | UploadWait::Failed => {
                self.settings.request_body_timeout
            }
        };
        let idle_deadline = upload.last_polled_at() + timeout;
        upload
            .min_rate_deadline(self.settings.min_request_body_rate)
            .map_or(idle_deadline, |rate_deadline| rate_deadline.min(idle_deadline))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Connection<S> {
    /// Polls the driver, which reads and writes the bytes of the connection.
    fn drive(&mut self, cx: &mut Context<'_>) -> Poll<hyper::Result<()>> {
        self.driver.poll_without_shutdown(cx)
    }

    /// Completes at the deadline. The timer is reset only if the deadline has moved to an earlier time, or when it
    /// expires.
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

/// The body of a response. It drives the connection, and returns it to the idle pool at its end.
pub struct HyperBody<C: Connect> {
    incoming: Incoming,
    connection: Option<Box<Connection<C::Io>>>,
    client: Arc<HyperClient<C>>,
    idle_timeout: Duration,
    last_frame_at: Instant,
    /// Whether a frame was received since `last_frame_at`.
    has_received: bool,
    /// Whether the body has not been polled yet. The connection may have read the first chunk together with the head.
    is_first_poll: bool,
}

impl<C: Connect> HyperBody<C> {
    /// Returns the connection to the idle pool if it accepts another request.
    fn finish(&mut self) {
        let Some(mut connection) = self.connection.take() else { return };
        let mut cx = Context::from_waker(Waker::noop());
        if connection.sender.is_ready()
            || (connection.drive(&mut cx).is_pending() && connection.sender.is_ready())
        {
            self.client.idle_pool.lock().unwrap().push((connection, clock::instant()));
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
        let Some(connection) = &mut this.connection else { return Poll::Ready(None) };
        let mut was_driven = !mem::take(&mut this.is_first_poll);
        if was_driven {
            let _ = connection.drive(cx);
        }
        loop {
            // Only the driver sends frames, so the waker of the channel is never needed.
            let mut noop = Context::from_waker(Waker::noop());
            match Pin::new(&mut this.incoming).poll_frame(&mut noop) {
                Poll::Ready(Some(Ok(frame))) => {
                    this.has_received = true;
                    if this.incoming.is_end_stream() {
                        this.finish();
                    }
                    return Poll::Ready(Some(Ok(frame)));
                }
                Poll::Ready(Some(Err(error))) => {
                    this.connection = None;
                    return Poll::Ready(Some(Err(error)));
                }
                Poll::Ready(None) => {
                    this.finish();
                    return Poll::Ready(None);
                }
                Poll::Pending if was_driven => break,
                Poll::Pending => was_driven = connection.drive(cx).is_pending(),
            }
        }
        if mem::take(&mut this.has_received) {
            this.last_frame_at = clock::instant();
        }
        let deadline = this.last_frame_at + this.idle_timeout;
        connection.poll_until(deadline, cx).map(|()| panic!("the response must not stall"))
    }
}

/// Wraps a stream to record whether a byte was written to it.
struct WriteDetector<S> {
    stream: S,
    has_written: Arc<AtomicBool>,
}

impl<S> WriteDetector<S> {
    fn record_write(&self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
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
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for WriteDetector<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let write_result = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.record_write(write_result)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let write_result = Pin::new(&mut self.stream).poll_write_vectored(cx, slices);
        self.record_write(write_result)
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

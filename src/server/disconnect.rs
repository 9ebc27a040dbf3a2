//! Detects clients that disconnect while their request is in progress. A client that closes the socket has
//! cancelled its request, but a client that closes only its sending half waits for the response (RFC 9112,
//! section 9.6). In both cases, Keychoir receives the end of the stream. While an HTTP/1.1 request waits for its
//! response, Keychoir therefore sends `100 Continue` as a probe. Every HTTP/1.1 client ignores this response, and the
//! operating system of the client replies with a reset if the socket is closed. An HTTP/1.0 request gets no probe.
//! During a response, and on a TLS stream, the end of the stream counts as a disconnect.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use http::Version;
use tokio::io::AsyncWrite;
use tokio::net::TcpStream;
use tokio::time::{Sleep, sleep};
use tokio_util::either::Either;

use super::tls;
use crate::clock;
use crate::platform::sockets::{UnixStream, poll_peek_tcp, poll_peek_unix};

/// The interim response that is sent to find out whether the client has closed its socket.
const PROBE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// Delay between the probe and the first check for a reset, which arrives within a round trip.
const FIRST_CHECK_DELAY: Duration = Duration::from_millis(5);
/// Maximum delay between two checks. Each delay is twice the previous delay.
const MAX_CHECK_DELAY: Duration = Duration::from_secs(1);

/// A stream whose end can be detected without reading from it.
pub(super) trait Peek {
    /// Returns whether the client can close only its sending half, so that the end of the stream does not prove a
    /// disconnect.
    fn supports_half_close(&self) -> bool;

    /// Returns 1 if a byte can be read, and 0 at the end of the stream, without consuming the byte.
    fn poll_peek_byte(&self, cx: &mut Context<'_>) -> Poll<io::Result<usize>>;

    /// Returns a pending error of the socket, such as a reset. Reads do not report it after the end of the
    /// stream.
    fn take_error(&self) -> io::Result<Option<io::Error>>;
}

/// Implements [`Peek`] for a socket.
macro_rules! impl_peek_for_socket {
    ($socket:ty, $poll_peek:path) => {
        impl Peek for $socket {
            fn supports_half_close(&self) -> bool {
                true
            }

            fn take_error(&self) -> io::Result<Option<io::Error>> {
                self.take_error()
            }

            fn poll_peek_byte(&self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
                $poll_peek(self, cx)
            }
        }
    };
}

impl_peek_for_socket!(TcpStream, poll_peek_tcp);
impl_peek_for_socket!(UnixStream, poll_peek_unix);

impl Peek for tls::Stream {
    /// Most TLS libraries close both halves together, so the end of the stream means a disconnect.
    fn supports_half_close(&self) -> bool {
        matches!(self, Either::Left(_))
    }

    fn take_error(&self) -> io::Result<Option<io::Error>> {
        match self {
            Either::Left(Either::Left(tcp)) => tcp.take_error(),
            Either::Left(Either::Right(unix)) => unix.take_error(),
            Either::Right(tls) => tls.get_ref().0.take_error(),
        }
    }

    fn poll_peek_byte(&self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        match self {
            Either::Left(Either::Left(tcp)) => tcp.poll_peek_byte(cx),
            Either::Left(Either::Right(unix)) => unix.poll_peek_byte(cx),
            Either::Right(_) => Poll::Pending,
        }
    }
}

#[cfg(test)]
impl Peek for tokio::io::DuplexStream {
    fn supports_half_close(&self) -> bool {
        false
    }

    fn take_error(&self) -> io::Result<Option<io::Error>> {
        Ok(None)
    }

    fn poll_peek_byte(&self, _: &mut Context<'_>) -> Poll<io::Result<usize>> {
        Poll::Pending
    }
}

/// The phase of a connection, which determines the meaning of the end of the client's stream.
#[derive(Clone, Debug, Default)]
pub(super) struct ConnectionPhase(Arc<AtomicU8>);

/// No HTTP request is in progress: the connection is idle, or its session has started. The end of the stream is then
/// the end of the connection.
const IDLE: u8 = 0;
/// An HTTP/1.1 request waits for its response.
const REQUEST: u8 = 1;
/// An HTTP/1.0 request waits for its response. Interim responses must not be sent to its client.
const REQUEST_BEFORE_1_1: u8 = 2;
/// A response is being sent.
const RESPONSE: u8 = 3;

impl ConnectionPhase {
    pub(super) fn begin_request(&self, version: Version) {
        self.set(if version >= Version::HTTP_11 { REQUEST } else { REQUEST_BEFORE_1_1 });
    }

    pub(super) fn begin_response(&self) {
        self.set(RESPONSE);
    }

    pub(super) fn set_idle(&self) {
        self.set(IDLE);
    }

    fn set(&self, phase: u8) {
        self.0.store(phase, Ordering::Relaxed);
    }

    pub(super) fn is_idle(&self) -> bool {
        self.0.load(Ordering::Relaxed) == IDLE
    }
}

/// The state of the client's sending half, as far as it is known without reading.
#[derive(Default)]
pub(super) enum SendingHalf {
    /// Neither unread bytes nor the end of the stream have been detected.
    #[default]
    Open,
    /// The client has sent bytes that hyper has not read: a part of the request body, or a pipelined request. These
    /// bytes hide the end of the stream until the current request ends.
    Pipelined,
    /// The client has closed its sending half, and is assumed to wait for its response until a check finds a
    /// reset.
    Closed { next_check: Pin<Box<Sleep>>, delay: Duration },
}

impl SendingHalf {
    /// Checks whether the client has disconnected, while a request or response is in progress in `phase`.
    ///
    /// # Errors
    ///
    /// Fails when the client has disconnected.
    pub(super) fn detect_disconnect<S: AsyncWrite + Peek>(
        &mut self,
        mut stream: Pin<&mut S>,
        cx: &mut Context<'_>,
        phase: &ConnectionPhase,
    ) -> io::Result<()> {
        loop {
            match self {
                Self::Pipelined => return Ok(()),
                Self::Open => {
                    match stream.poll_peek_byte(cx)? {
                        Poll::Pending => return Ok(()),
                        Poll::Ready(1..) => {
                            *self = Self::Pipelined;
                            return Ok(());
                        }
                        Poll::Ready(0) => {}
                    }
                    match phase.0.load(Ordering::Relaxed) {
                        REQUEST => match stream.as_mut().poll_write(cx, PROBE)? {
                            Poll::Ready(count) if count == PROBE.len() => {}
                            // Before the response, the send buffer has space for the probe. If the probe is
                            // not written completely, the connection is lost.
                            Poll::Ready(_) | Poll::Pending => return Err(disconnected_error()),
                        },
                        REQUEST_BEFORE_1_1 => {}
                        // During a response, the end of the stream counts as a disconnect.
                        _ => return Err(disconnected_error()),
                    }
                    *self = Self::Closed {
                        next_check: Box::pin(sleep(FIRST_CHECK_DELAY)),
                        delay: FIRST_CHECK_DELAY,
                    };
                }
                Self::Closed { next_check, delay } => {
                    if let Some(error) = stream.take_error()? {
                        return Err(error);
                    }
                    if next_check.as_mut().poll(cx).is_pending() {
                        return Ok(());
                    }
                    *delay = (*delay * 2).min(MAX_CHECK_DELAY);
                    next_check.as_mut().reset((clock::instant() + *delay).into());
                }
            }
        }
    }
}

/// Returns the error that ends the connection of a client that has disconnected.
fn disconnected_error() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "the client has disconnected")
}

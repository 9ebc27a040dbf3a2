//! Detects clients that disconnect while their request is under way. Some clients close both halves of the
//! connection, and their request is to be cancelled; others close only their sending half and wait for the
//! response (RFC 9112, section 9.6). The end of the stream is the same for both, so the client is probed: it
//! is sent `100 Continue`, which every HTTP/1.1 client must ignore, and the system of a client that has
//! closed the socket replies with a reset.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncWrite, Interest};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{Sleep, sleep};
use tokio_util::either::Either;

use super::tls;
use crate::clock;

const PROBE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// Delay before the first check for a reset, which arrives within a round trip. Later delays double, up to
/// the longest.
const FIRST_CHECK_DELAY: Duration = Duration::from_millis(5);
const MAX_CHECK_DELAY: Duration = Duration::from_secs(1);

/// A stream whose end can be detected without reading from it.
pub(super) trait Peek {
    /// Whether a client can close its sending half alone, so that the end of the stream does not
    /// prove a disconnect.
    fn has_halves(&self) -> bool;

    /// The result that the next read would have: 0 bytes at the end of the stream.
    fn poll_next_byte(&self, cx: &mut Context<'_>) -> Poll<io::Result<usize>>;

    /// An error that has arrived, such as a reset. After the end of the stream, reads no longer report it.
    fn take_error(&self) -> io::Result<Option<io::Error>>;
}

/// Peeks at the socket `$stream`.
macro_rules! peek {
    ($stream:expr, $cx:expr) => {
        loop {
            ready!($stream.poll_read_ready($cx))?;
            let peek = || {
                let (flags, mut byte) = (rustix::net::RecvFlags::PEEK, [0; 1]);
                Ok(rustix::net::recv($stream, &mut byte, flags | rustix::net::RecvFlags::DONTWAIT)?.0)
            };
            match $stream.try_io(Interest::READABLE, peek) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                peeked => return Poll::Ready(peeked),
            }
        }
    };
}

impl Peek for TcpStream {
    fn has_halves(&self) -> bool {
        true
    }

    fn take_error(&self) -> io::Result<Option<io::Error>> {
        self.take_error()
    }

    fn poll_next_byte(&self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        peek!(self, cx)
    }
}

impl Peek for UnixStream {
    fn has_halves(&self) -> bool {
        true
    }

    fn take_error(&self) -> io::Result<Option<io::Error>> {
        self.take_error()
    }

    fn poll_next_byte(&self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        peek!(self, cx)
    }
}

impl Peek for tls::Stream {
    /// Most TLS libraries close both halves at once, so the end of the stream means that the client has
    /// disconnected.
    fn has_halves(&self) -> bool {
        matches!(self, Either::Left(_))
    }

    fn take_error(&self) -> io::Result<Option<io::Error>> {
        match self {
            Either::Left(Either::Left(tcp)) => tcp.take_error(),
            Either::Left(Either::Right(unix)) => unix.take_error(),
            Either::Right(tls) => tls.get_ref().0.take_error(),
        }
    }

    fn poll_next_byte(&self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        match self {
            Either::Left(Either::Left(tcp)) => tcp.poll_next_byte(cx),
            Either::Left(Either::Right(unix)) => unix.poll_next_byte(cx),
            Either::Right(_) => Poll::Pending,
        }
    }
}

#[cfg(test)]
impl Peek for tokio::io::DuplexStream {
    fn has_halves(&self) -> bool {
        false
    }

    fn take_error(&self) -> io::Result<Option<io::Error>> {
        Ok(None)
    }

    fn poll_next_byte(&self, _: &mut Context<'_>) -> Poll<io::Result<usize>> {
        Poll::Pending
    }
}

/// The phase of a connection, which decides how the end of the client's stream is treated.
#[derive(Clone, Debug, Default)]
pub(super) struct Phase(Arc<AtomicU8>);

/// No request is under way: the end of the stream is the end of the connection.
const IDLE: u8 = 0;
/// A request of HTTP/1.1 that has no response yet.
const REQUEST: u8 = 1;
/// A request of an older version, whose client must not be sent anything before the response.
const REQUEST_BEFORE_1_1: u8 = 2;
/// A response is being sent.
const RESPONSE: u8 = 3;

impl Phase {
    pub(super) fn begin_request(&self, may_be_probed: bool) {
        self.set(if may_be_probed { REQUEST } else { REQUEST_BEFORE_1_1 });
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

/// The state of the client's sending half.
#[derive(Default)]
pub(super) enum SendingHalf {
    /// The client may send more bytes.
    #[default]
    Open,
    /// Bytes beyond the current request have arrived: the end of the stream is not detected.
    Ahead,
    /// The client has closed its sending half and waits for its response, until a check finds an error.
    Closed { next_check: Pin<Box<Sleep>>, delay: Duration },
}

impl SendingHalf {
    /// Checks whether the client has disconnected, while a request or response is under way in `phase`.
    ///
    /// # Errors
    ///
    /// When the client has disconnected.
    pub(super) fn poll<S: AsyncWrite + Peek>(
        &mut self,
        mut stream: Pin<&mut S>,
        cx: &mut Context<'_>,
        phase: &Phase,
    ) -> io::Result<()> {
        loop {
            match self {
                Self::Ahead => return Ok(()),
                Self::Open => {
                    match stream.poll_next_byte(cx)? {
                        Poll::Pending => return Ok(()),
                        Poll::Ready(1..) => {
                            *self = Self::Ahead;
                            return Ok(());
                        }
                        Poll::Ready(0) => {}
                    }
                    match phase.0.load(Ordering::Relaxed) {
                        REQUEST => match stream.as_mut().poll_write(cx, PROBE)? {
                            Poll::Ready(count) if count == PROBE.len() => {}
                            // No bytes were written before, so the buffer has space. A partial
                            // write means that the connection is lost.
                            Poll::Ready(_) | Poll::Pending => return Err(disconnected()),
                        },
                        REQUEST_BEFORE_1_1 => {}
                        // A client that closes its half in the middle of the response has disconnected.
                        _ => return Err(disconnected()),
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

fn disconnected() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "the client has disconnected")
}

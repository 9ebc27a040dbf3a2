//! Clients that close their half of a connection while their request is under way. Some have left, and
//! their request is to be cancelled; some have said all they had to say and wait for the answer
//! (RFC 9112, section 9.6). The end of the stream is the same for both, so the client is probed: it is
//! sent `100 Continue`, which every client of HTTP/1.1 must pass over, and a system whose program has
//! closed the socket answers that with a reset.

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

/// A reset comes back within a round trip; the socket is looked at after this long, and then after
/// pauses that double, up to the longest.
const FIRST_LOOK: Duration = Duration::from_millis(5);
const LOOKS_MAX: Duration = Duration::from_secs(1);

/// A stream whose end can be seen without reading it.
pub(super) trait Peek {
    /// Whether the end of the stream can be told apart from a client that has left.
    fn has_halves(&self) -> bool;

    /// What the next read would return: 0 at the end of the stream.
    fn poll_next_byte(&self, cx: &mut Context<'_>) -> Poll<io::Result<usize>>;

    /// An error that has arrived, such as a reset. Reading does not tell it once the end of the stream has
    /// come.
    fn take_error(&self) -> io::Result<Option<io::Error>>;
}

/// Peeks at a socket that `$stream` is.
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
    /// TLS closes both halves at once in most libraries, so its end means that the client has left.
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

/// What is under way on a connection, as far as its client's leaving matters. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(super) struct Phase(Arc<AtomicU8>);

/// Nothing is: the end of the stream is the end of the connection.
const IDLE: u8 = 0;
/// A request of HTTP/1.1 that has no answer yet.
const ASKED: u8 = 1;
/// One of a client that may not be sent anything before its answer.
const ASKED_BEFORE_1_1: u8 = 2;
/// An answer on its way.
const ANSWERED: u8 = 3;

impl Phase {
    pub(super) fn ask(&self, may_be_probed: bool) {
        self.set(if may_be_probed { ASKED } else { ASKED_BEFORE_1_1 });
    }

    pub(super) fn answer(&self) {
        self.set(ANSWERED);
    }

    pub(super) fn rest(&self) {
        self.set(IDLE);
    }

    fn set(&self, phase: u8) {
        self.0.store(phase, Ordering::Relaxed);
    }

    pub(super) fn is_idle(&self) -> bool {
        self.0.load(Ordering::Relaxed) == IDLE
    }
}

/// What is known of a client's half.
#[derive(Default)]
pub(super) enum Half {
    /// The client may send more.
    #[default]
    Open,
    /// More has come already than the request under way: its end is not looked for.
    Ahead,
    /// The client has closed its half and waits for its answer, until a look says otherwise.
    Closed { next_look: Pin<Box<Sleep>>, pause: Duration },
}

impl Half {
    /// Looks whether the client has left, while `phase` says that something is under way.
    ///
    /// # Errors
    ///
    /// When it has.
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
                        ASKED => match stream.as_mut().poll_write(cx, PROBE)? {
                            Poll::Ready(count) if count == PROBE.len() => {}
                            // Nothing was written before, so there is room; without it, all is lost.
                            Poll::Ready(_) | Poll::Pending => return Err(left()),
                        },
                        ASKED_BEFORE_1_1 => {}
                        // A client that says so in the middle of its answer has heard enough.
                        _ => return Err(left()),
                    }
                    *self = Self::Closed { next_look: Box::pin(sleep(FIRST_LOOK)), pause: FIRST_LOOK };
                }
                Self::Closed { next_look, pause } => {
                    if let Some(error) = stream.take_error()? {
                        return Err(error);
                    }
                    if next_look.as_mut().poll(cx).is_pending() {
                        return Ok(());
                    }
                    *pause = (*pause * 2).min(LOOKS_MAX);
                    next_look.as_mut().reset((clock::instant() + *pause).into());
                }
            }
        }
    }
}

fn left() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "the client has left")
}

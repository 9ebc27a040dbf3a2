//! The last seconds of a connection that Keychoir closes first: closing a socket while the client still
//! sends makes the system answer with a reset, which can destroy the answer before the client has read
//! it. So the writing half is closed, and what still comes is read and dropped, within bounds.

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{sleep, timeout};
use tokio_util::either::Either;
use tracing::debug;

use super::{Drain, Limits, tls};

/// A client that pauses for longer within an upload is not about to read its answer either. nginx's
/// `lingering_timeout` is as long.
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// When the program ends, clients get this much time to finish what they send.
const ENDING_MAX: Duration = Duration::from_secs(1);

/// What is read at once; it is dropped unseen.
const READ_SIZE: usize = 8 * 1024;

/// Closes the writing half, if that was not done, and reads and drops what the client still sends, until it
/// has closed its half, pauses for too long, or a bound of `limits` is reached.
pub(super) async fn linger<I>(mut stream: I, limits: Limits, drain: &Drain)
where
    I: AsyncRead + AsyncWrite + Unpin,
{
    let reading = async {
        // hyper leaves a connection open that asked for another protocol, whatever it was answered. An end that
        // cannot be sent is none that the client waits for.
        let _ = stream.shutdown().await;
        let mut dropped = vec![0; READ_SIZE];
        let mut left = limits.linger_bytes_max;
        while left > 0 {
            match timeout(PAUSE_MAX, stream.read(&mut dropped)).await {
                Ok(Ok(count @ 1..)) => left = left.saturating_sub(count as u64),
                Ok(Ok(_) | Err(_)) => return,
                Err(_) => break,
            }
        }
        debug!("a client still sent when its connection was closed");
    };
    let ending = async {
        drain.close.cancelled().await;
        sleep(ENDING_MAX).await;
    };
    tokio::select! {
        biased;
        () = drain.cut.cancelled() => {}
        () = reading => {}
        () = sleep(limits.linger_timeout) => {}
        () = ending => {}
    }
}

/// An empty SETTINGS frame, which an HTTP/2 server must begin with (RFC 9113, section 3.4), and a GOAWAY
/// with the error code HTTP_1_1_REQUIRED (0xd), which says why nothing else follows.
const GO_AWAY: [u8; 26] = [
    0, 0, 0, 4, 0, 0, 0, 0, 0, // SETTINGS of length 0 on stream 0
    0, 0, 8, 7, 0, 0, 0, 0, 0, // GOAWAY of length 8 on stream 0
    0, 0, 0, 0, 0, 0, 0, 0xd, // no stream was processed; HTTP_1_1_REQUIRED
];

/// Tells a client that speaks HTTP/2 with prior knowledge that only HTTP/1.1 is spoken here, and closes
/// the writing half.
pub(super) async fn refuse_http2<I: AsyncWrite + Unpin>(stream: &mut I) {
    let refusing = async {
        stream.write_all(&GO_AWAY).await?;
        stream.shutdown().await
    };
    if let Ok(Err(error)) = timeout(PAUSE_MAX, refusing).await {
        debug!("a client of HTTP/2 left: {error}");
    }
}

/// A stream that can be ended with a reset, so that the client cannot take half an answer for a whole
/// one. Only TCP has that.
pub(super) trait Reset {
    /// Has the stream reset its connection when it is dropped.
    fn reset_on_drop(&self);
}

impl Reset for TcpStream {
    fn reset_on_drop(&self) {
        // A connection that is gone needs none.
        let _ = self.set_zero_linger();
    }
}

impl Reset for UnixStream {
    fn reset_on_drop(&self) {}
}

impl Reset for tls::Stream {
    fn reset_on_drop(&self) {
        match self {
            Either::Left(Either::Left(tcp)) => tcp.reset_on_drop(),
            Either::Left(Either::Right(unix)) => unix.reset_on_drop(),
            Either::Right(tls) => tls.get_ref().0.reset_on_drop(),
        }
    }
}

#[cfg(test)]
impl Reset for tokio::io::DuplexStream {
    fn reset_on_drop(&self) {}
}

//! Closes a connection gracefully when the server ends it first: closing a socket while the client
//! still sends makes the system send a reset, which can destroy the response before the client has
//! read it. The server therefore closes only its sending half, and reads and drops the bytes that
//! still arrive, within bounds.

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{sleep, timeout};
use tokio_util::either::Either;
use tracing::debug;

use super::{ConnectionLimits, Drain, tls};

/// Maximum pause between received bytes. A client that pauses longer in its upload will not read the response
/// soon either. nginx's `lingering_timeout` is as long.
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// Maximum time for which clients may continue to send when the server drains.
const ENDING_MAX: Duration = Duration::from_secs(1);

/// Size of one read; the bytes are dropped.
const READ_SIZE: usize = 8 * 1024;

/// Closes the sending half, if it is still open, and reads and drops the bytes that the client still sends,
/// until it has closed its half, pauses for too long, or a bound of `limits` is reached.
pub(super) async fn linger<I>(mut stream: I, limits: ConnectionLimits, drain: &Drain)
where
    I: AsyncRead + AsyncWrite + Unpin,
{
    let reading = async {
        // hyper keeps a connection open whose request has an `upgrade` header, whatever the response is.
        // If the close cannot be sent, the client does not wait for it.
        let _ = stream.shutdown().await;
        let mut dropped = vec![0; READ_SIZE];
        let mut remaining = limits.max_linger_size;
        while remaining > 0 {
            match timeout(PAUSE_MAX, stream.read(&mut dropped)).await {
                Ok(Ok(count @ 1..)) => remaining = remaining.saturating_sub(count as u64),
                Ok(Ok(_) | Err(_)) => return,
                Err(_) => break,
            }
        }
        debug!("a client was still sending when its connection was closed");
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

/// An empty SETTINGS frame, which an HTTP/2 server must send first (RFC 9113, section 3.4), and a GOAWAY with
/// the error code HTTP_1_1_REQUIRED (0xd), which states why the server sends no more.
const GO_AWAY: [u8; 26] = [
    0, 0, 0, 4, 0, 0, 0, 0, 0, // SETTINGS of length 0 on stream 0
    0, 0, 8, 7, 0, 0, 0, 0, 0, // GOAWAY of length 8 on stream 0
    0, 0, 0, 0, 0, 0, 0, 0xd, // no stream was processed; HTTP_1_1_REQUIRED
];

/// Refuses a client that uses HTTP/2 with prior knowledge: sends that HTTP/1.1 is required, and closes the
/// sending half.
pub(super) async fn refuse_http2<I: AsyncWrite + Unpin>(stream: &mut I) {
    let refusing = async {
        stream.write_all(&GO_AWAY).await?;
        stream.shutdown().await
    };
    if let Ok(Err(error)) = timeout(PAUSE_MAX, refusing).await {
        debug!("an HTTP/2 client disconnected: {error}");
    }
}

/// A stream that can be closed with a reset, so that the client cannot mistake a truncated response for a
/// complete one. Only TCP can do that.
pub(super) trait Reset {
    /// Resets the connection when the stream is dropped.
    fn reset_on_drop(&self);
}

impl Reset for TcpStream {
    fn reset_on_drop(&self) {
        // A connection that is already closed needs no reset.
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

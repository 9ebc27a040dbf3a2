//! Closes a connection before the client does. Closing a socket while the client still sends makes the
//! operating system send a reset, which can destroy the response before the client has read it. The server
//! therefore closes only its sending half, and discards the bytes that still arrive, within bounds.

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{sleep, timeout};
use tokio_util::either::Either;
use tracing::debug;

use super::{ConnectionLimits, Drain, tls};

/// Timeout between two reads. A client that pauses longer during its upload will not read the response soon
/// either. nginx's `lingering_timeout` has the same default.
const LINGER_READ_TIMEOUT: Duration = Duration::from_secs(5);

/// Maximum time for which clients may continue to send after `Drain::close_idle`.
const DRAIN_LINGER_TIMEOUT: Duration = Duration::from_secs(1);

/// Size of the buffer that discarded bytes are read into.
const READ_BUFFER_SIZE: usize = 8 * 1024;

/// Closes the sending half, and discards the bytes that the client still sends. Returns when the client
/// closes its half or pauses for too long, or when a bound of `limits` is reached.
pub(super) async fn linger<I>(mut stream: I, limits: ConnectionLimits, drain: &Drain)
where
    I: AsyncRead + AsyncWrite + Unpin,
{
    let discard_bytes = async {
        // Hyper has not closed it if the request has an `upgrade` header, whatever the response is. An error
        // means that the client has disconnected.
        let _ = stream.shutdown().await;
        let mut discarded = vec![0; READ_BUFFER_SIZE];
        let mut remaining = limits.max_linger_size;
        while remaining > 0 {
            match timeout(LINGER_READ_TIMEOUT, stream.read(&mut discarded)).await {
                Ok(Ok(count @ 1..)) => remaining = remaining.saturating_sub(count as u64),
                Ok(Ok(_) | Err(_)) => return,
                Err(_) => break,
            }
        }
        debug!("a client was still sending when its connection was closed");
    };
    let drain_timeout = async {
        drain.close_idle.cancelled().await;
        sleep(DRAIN_LINGER_TIMEOUT).await;
    };
    tokio::select! {
        biased;
        () = drain.abort.cancelled() => {}
        () = discard_bytes => {}
        () = sleep(limits.linger_timeout) => {}
        () = drain_timeout => {}
    }
}

/// An empty SETTINGS frame, which an HTTP/2 server must send first (RFC 9113, section 3.4), and a GOAWAY
/// frame with the error code HTTP_1_1_REQUIRED (0xd).
const HTTP2_REFUSAL: [u8; 26] = [
    0, 0, 0, 4, 0, 0, 0, 0, 0, // SETTINGS of length 0 on stream 0
    0, 0, 8, 7, 0, 0, 0, 0, 0, // GOAWAY of length 8 on stream 0
    0, 0, 0, 0, 0, 0, 0, 0xd, // no stream was processed; HTTP_1_1_REQUIRED
];

/// Refuses a client that uses HTTP/2 with prior knowledge: sends [`HTTP2_REFUSAL`] and closes the sending
/// half.
pub(super) async fn refuse_http2<I: AsyncWrite + Unpin>(stream: &mut I) {
    let send_refusal = async {
        stream.write_all(&HTTP2_REFUSAL).await?;
        stream.shutdown().await
    };
    if let Ok(Err(error)) = timeout(LINGER_READ_TIMEOUT, send_refusal).await {
        debug!("an HTTP/2 client disconnected: {error}");
    }
}

/// A stream that can be closed with a reset, so that the client does not mistake a truncated response for a
/// complete one. Only TCP supports it.
pub(super) trait Reset {
    /// Makes dropping the stream reset the connection.
    fn reset_on_drop(&self);
}

impl Reset for TcpStream {
    fn reset_on_drop(&self) {
        // Fails only for a connection that is already closed.
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

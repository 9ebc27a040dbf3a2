//! Closes a connection before the client does. Closing a socket while the client is still sending makes the
//! operating system send a reset, which can destroy the response before the client has read it. Keychoir therefore
//! closes only its sending half, and discards the bytes that still arrive, up to the configured limits. A drain
//! shortens the wait.

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::{sleep, timeout};
use tracing::debug;

use super::{ConnectionLimits, Drain};

/// Timeout between two reads. A client that pauses its upload for longer is unlikely to read the response
/// soon. nginx's `lingering_timeout` has the same default.
const LINGER_READ_TIMEOUT: Duration = Duration::from_secs(5);

/// Maximum time for which clients may continue to send after `Drain::close_idle`.
const DRAIN_LINGER_TIMEOUT: Duration = Duration::from_secs(1);

/// Size of the buffer into which discarded bytes are read.
const READ_BUFFER_SIZE: usize = 8 * 1024;

/// Closes the sending half, and discards the bytes that still arrive. Returns when the client closes its half
/// or pauses for longer than [`LINGER_READ_TIMEOUT`], or when a limit of `limits` is reached. Also returns immediately
/// after `Drain::abort`, and [`DRAIN_LINGER_TIMEOUT`] after `Drain::close_idle`.
pub(super) async fn linger<I>(mut stream: I, limits: ConnectionLimits, drain: &Drain)
where
    I: AsyncRead + AsyncWrite + Unpin,
{
    let discard_bytes = async {
        // Hyper does not close the sending half if the request has an `upgrade` header, whatever the response
        // is. An error means that the client has disconnected.
        let _ = stream.shutdown().await;
        let mut discard_buffer = vec![0; READ_BUFFER_SIZE];
        let mut remaining = limits.max_linger_size;
        while remaining > 0 {
            match timeout(LINGER_READ_TIMEOUT, stream.read(&mut discard_buffer)).await {
                Ok(Ok(count @ 1..)) => remaining = remaining.saturating_sub(count as u64),
                Ok(Ok(_) | Err(_)) => return,
                Err(_) => break,
            }
        }
        debug!("a connection was closed before its client closed it");
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

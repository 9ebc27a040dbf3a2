//! Closes a connection with a reset, so that the client does not mistake a truncated response for a complete
//! one. Only TCP supports resets.

use tokio::net::TcpStream;
use tokio_util::either::Either;

use super::tls;
use crate::platform::sockets::UnixStream;

/// A stream that can be closed with a reset.
pub(super) trait ResetOnDrop {
    /// Resets the connection, instead of closing it, when the stream is dropped. Has no effect on a Unix socket.
    fn reset_on_drop(&self);
}

impl ResetOnDrop for TcpStream {
    fn reset_on_drop(&self) {
        // Fails only for a connection that is already closed.
        let _ = self.set_zero_linger();
    }
}

impl ResetOnDrop for UnixStream {
    fn reset_on_drop(&self) {}
}

impl ResetOnDrop for tls::Stream {
    fn reset_on_drop(&self) {
        match self {
            Either::Left(Either::Left(tcp)) => tcp.reset_on_drop(),
            Either::Left(Either::Right(unix)) => unix.reset_on_drop(),
            Either::Right(tls) => tls.get_ref().0.reset_on_drop(),
        }
    }
}

#[cfg(test)]
impl ResetOnDrop for tokio::io::DuplexStream {
    fn reset_on_drop(&self) {}
}

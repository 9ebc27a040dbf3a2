//! Where connections come from.

use std::io;
use std::net::SocketAddr;

use tokio::net::{TcpListener, TcpStream};

/// A place that is listened on.
#[derive(Debug)]
pub enum Listener {
    /// A port.
    Tcp(TcpListener),
}

impl Listener {
    /// Its address, with the port that was chosen where 0 was asked for.
    ///
    /// # Errors
    ///
    /// When the system does not tell.
    pub fn address(&self) -> io::Result<SocketAddr> {
        match self {
            Self::Tcp(listener) => listener.local_addr(),
        }
    }

    /// The next connection.
    ///
    /// # Cancel safety
    ///
    /// No connection is lost when the future is dropped.
    pub(super) async fn accept(&self) -> io::Result<TcpStream> {
        match self {
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                // Small writes go out at once: a first chunk must not wait for an acknowledgement.
                stream.set_nodelay(true)?;
                Ok(stream)
            }
        }
    }
}

impl From<TcpListener> for Listener {
    fn from(listener: TcpListener) -> Self {
        Self::Tcp(listener)
    }
}

//! The way to the provider's socket: name, TCP, TLS.

use std::future::Future;
use std::io;
use std::sync::Arc;

use hyper::rt::{Read, Write};
use hyper_util::rt::TokioIo;
use rustls::pki_types::{InvalidDnsNameError, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_util::either::Either;

use super::authority::{Authority, Scheme};

/// Opens streams to an authority. The seam at which tests replace the network.
pub trait Connect: Send + Sync + 'static {
    /// The stream.
    type Io: Read + Write + Send + Unpin + 'static;

    /// Opens one.
    fn connect(&self, authority: &Authority) -> impl Future<Output = Result<Self::Io, ConnectError>> + Send;
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The name has no address.
    #[error("the name of the upstream cannot be resolved: {0}")]
    Name(#[source] io::Error),
    /// No address answers.
    #[error("the upstream cannot be reached: {0}")]
    Tcp(#[source] io::Error),
    /// The TLS handshake failed; nothing is sent in plain instead.
    #[error("no TLS with the upstream: {0}")]
    Tls(#[source] io::Error),
    /// No certificate can be for such a name.
    #[error("the upstream's name cannot have a certificate: {0}")]
    ServerName(#[from] InvalidDnsNameError),
    /// The connection is not usable for HTTP.
    #[error("the upstream's connection is not usable: {0}")]
    Handshake(String),
    /// It was closed before it took a request.
    #[error("the upstream closed a new connection before it took the request")]
    ClosedAtOnce,
}

/// Straight to the provider: over TCP and, for `https`, TLS with the web's root certificates.
#[derive(Clone)]
pub struct Direct {
    tls: TlsConnector,
}

impl Direct {
    /// A connector.
    ///
    /// # Errors
    ///
    /// When the TLS library has no protocol version to offer.
    pub fn new() -> Result<Self, rustls::Error> {
        let roots: RootCertStore = webpki_roots::TLS_SERVER_ROOTS.iter().cloned().collect();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(Self { tls: TlsConnector::from(Arc::new(config)) })
    }
}

impl std::fmt::Debug for Direct {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Direct")
    }
}

impl Connect for Direct {
    type Io = TokioIo<Either<TcpStream, TlsStream<TcpStream>>>;

    async fn connect(&self, authority: &Authority) -> Result<Self::Io, ConnectError> {
        let tcp = dial(authority).await?;
        let stream = match authority.scheme() {
            Scheme::Http => Either::Left(tcp),
            Scheme::Https => {
                let name = ServerName::try_from(authority.host().to_owned())?;
                Either::Right(self.tls.connect(name, tcp).await.map_err(ConnectError::Tls)?)
            }
        };
        Ok(TokioIo::new(stream))
    }
}

/// The first of the name's addresses that answers.
async fn dial(authority: &Authority) -> Result<TcpStream, ConnectError> {
    let addresses =
        tokio::net::lookup_host((authority.host(), authority.port())).await.map_err(ConnectError::Name)?;
    let mut last = io::Error::new(io::ErrorKind::AddrNotAvailable, "the name has no address");
    for address in addresses {
        match TcpStream::connect(address).await {
            Ok(tcp) => {
                // Small writes go out at once: a first chunk must not wait for an acknowledgement.
                tcp.set_nodelay(true).map_err(ConnectError::Tcp)?;
                return Ok(tcp);
            }
            Err(error) => last = error,
        }
    }
    Err(ConnectError::Tcp(last))
}

//! Opens connections to the provider: resolves the name, connects over TCP and performs the TLS handshake.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, InvalidDnsNameError, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_util::either::Either;

use super::wire::Stream;
use crate::policy::authority::{Authority, Scheme};

/// Opens streams to an authority. The interface at which tests replace the network.
pub trait Connect: Send + Sync + 'static {
    /// The type of the streams.
    type Io: Stream + 'static;

    /// Opens one stream to `authority`.
    fn connect(&self, authority: &Authority) -> impl Future<Output = Result<Self::Io, ConnectError>> + Send;
}

/// Why a connection could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The name has no address.
    #[error("the name of the upstream cannot be resolved: {0}")]
    Name(#[source] io::Error),
    /// No address accepts a TCP connection.
    #[error("the upstream cannot be reached: {0}")]
    Tcp(#[source] io::Error),
    /// The TLS handshake failed; the request is not sent in plain text instead.
    #[error("no TLS with the upstream: {0}")]
    Tls(#[source] io::Error),
    /// The host is not a valid name for a certificate.
    #[error("the upstream's name cannot have a certificate: {0}")]
    ServerName(#[from] InvalidDnsNameError),
    /// The connection was closed before it accepted a byte of the request.
    #[error("the upstream closed a new connection before it took the request")]
    ClosedAtOnce,
}

/// Why TLS cannot be configured.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The TLS library has no protocol version to offer.
    #[error("no TLS: {0}")]
    Library(#[from] rustls::Error),
    /// The file of certificate authorities cannot be read.
    #[error("upstream.ca_file {} cannot be read as PEM: {source}", .path.display())]
    Unreadable {
        /// The configured path.
        path: PathBuf,
        /// The error of the PEM reader.
        source: pem::Error,
    },
    /// The file contains no certificate.
    #[error("upstream.ca_file {} has no certificate in it", .0.display())]
    Empty(PathBuf),
    /// A certificate in the file is not a usable authority.
    #[error("upstream.ca_file {} has a certificate that is no authority: {source}", .path.display())]
    Unusable {
        /// The configured path.
        path: PathBuf,
        /// The reason that the TLS library gives.
        source: rustls::Error,
    },
}

/// Connects directly to the provider: over TCP and, for `https`, with TLS and the web's root certificates.
#[derive(Clone)]
pub struct TcpTlsConnector {
    tls: TlsConnector,
}

impl TcpTlsConnector {
    /// A connector that trusts the web's root certificates, and those in `ca_file`.
    ///
    /// # Errors
    ///
    /// When the file cannot be used, or the TLS library has no protocol version to offer.
    pub fn new(ca_file: Option<&Path>) -> Result<Self, TlsError> {
        Ok(Self { tls: TlsConnector::from(Arc::new(web_tls(ca_file)?)) })
    }
}

/// The TLS configuration that trusts the web's root certificates, and those in `ca_file`.
pub(super) fn web_tls(ca_file: Option<&Path>) -> Result<ClientConfig, TlsError> {
    let mut roots: RootCertStore = webpki_roots::TLS_SERVER_ROOTS.iter().cloned().collect();
    if let Some(path) = ca_file {
        trust(&mut roots, path)?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    Ok(ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth())
}

impl std::fmt::Debug for TcpTlsConnector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TcpTlsConnector")
    }
}

impl Connect for TcpTlsConnector {
    type Io = Either<TcpStream, TlsStream<TcpStream>>;

    async fn connect(&self, authority: &Authority) -> Result<Self::Io, ConnectError> {
        let tcp = dial(authority).await?;
        Ok(match authority.scheme() {
            Scheme::Http => Either::Left(tcp),
            Scheme::Https => {
                let name = ServerName::try_from(authority.host().to_owned())?;
                Either::Right(self.tls.connect(name, tcp).await.map_err(ConnectError::Tls)?)
            }
        })
    }
}

fn trust(roots: &mut RootCertStore, path: &Path) -> Result<(), TlsError> {
    let unreadable = |source| TlsError::Unreadable { path: path.to_owned(), source };
    let before = roots.len();
    for certificate in CertificateDer::pem_file_iter(path).map_err(unreadable)? {
        let certificate = certificate.map_err(unreadable)?;
        roots.add(certificate).map_err(|source| TlsError::Unusable { path: path.to_owned(), source })?;
    }
    if roots.len() == before { Err(TlsError::Empty(path.to_owned())) } else { Ok(()) }
}

/// How long one address may take before the next is tried in parallel (RFC 8305, section 5).
const HEAD_START: Duration = Duration::from_millis(250);

/// Connects to the first of the name's addresses that accepts. An address that drops packets does not delay
/// the others.
async fn dial(authority: &Authority) -> Result<TcpStream, ConnectError> {
    let resolved =
        tokio::net::lookup_host((authority.host(), authority.port())).await.map_err(ConnectError::Name)?;
    let mut addresses = interleaved(resolved.collect()).into_iter();
    let mut dials = JoinSet::new();
    let mut last = io::Error::new(io::ErrorKind::AddrNotAvailable, "the name has no address");
    loop {
        let next = addresses.next();
        let has_more = next.is_some();
        if let Some(address) = next {
            dials.spawn(TcpStream::connect(address));
        }
        let result = if has_more {
            tokio::time::timeout(HEAD_START, dials.join_next()).await
        } else {
            Ok(dials.join_next().await)
        };
        match result {
            Ok(Some(Ok(Ok(tcp)))) => {
                // Small writes are sent at once: a first chunk must not wait for an acknowledgement.
                tcp.set_nodelay(true).map_err(ConnectError::Tcp)?;
                return Ok(tcp);
            }
            Ok(Some(Ok(Err(error)))) => last = error,
            Ok(Some(Err(error))) => last = io::Error::other(error),
            Ok(None) if !has_more => return Err(ConnectError::Tcp(last)),
            Ok(None) | Err(_) => {}
        }
    }
}

/// Alternates the address families, and keeps the resolver's order within each.
fn interleaved(addresses: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let is_first_v6 = addresses.first().is_some_and(SocketAddr::is_ipv6);
    let (first, second): (Vec<_>, Vec<_>) =
        addresses.into_iter().partition(|address| address.is_ipv6() == is_first_v6);
    let mut second = second.into_iter();
    let mut mixed: Vec<SocketAddr> =
        first.into_iter().flat_map(|one| [Some(one), second.next()]).flatten().collect();
    mixed.extend(second);
    mixed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn address_families_alternate_and_all_addresses_stay() {
        let parsed =
            |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<SocketAddr>>();
        for (input, expected) in [
            (
                &["1.1.1.1:1", "1.1.1.2:1", "[::1]:1"] as &[&str],
                &["1.1.1.1:1", "[::1]:1", "1.1.1.2:1"] as &[&str],
            ),
            (&["[::1]:1", "1.1.1.1:1", "1.1.1.2:1"], &["[::1]:1", "1.1.1.1:1", "1.1.1.2:1"]),
            (&["1.1.1.1:1"], &["1.1.1.1:1"]),
            (&[], &[]),
        ] {
            assert_eq!(interleaved(parsed(input)), parsed(expected));
        }
    }

    #[tokio::test]
    async fn an_address_that_refuses_gives_way_to_the_next() {
        // `localhost` is ::1 and 127.0.0.1 where the machine has both; one of them listens.
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let authority = Authority::new(Scheme::Http, "localhost", port, "").unwrap();
        assert!(dial(&authority).await.is_ok());
    }

    #[tokio::test]
    async fn a_port_without_a_listener_is_an_error() {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let authority = Authority::new(Scheme::Http, "127.0.0.1", free.port(), "").unwrap();
        assert!(matches!(dial(&authority).await, Err(ConnectError::Tcp(_))));
    }
}

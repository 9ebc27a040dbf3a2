//! Opens connections to the provider: resolves the host name, connects over TCP to the first address that accepts a
//! connection, and performs the TLS handshake. With a forward proxy, it connects to that proxy in the same way, opens a
//! tunnel, and performs the TLS handshake with the provider in the tunnel. It also creates the TLS configurations of
//! Keychoir's other clients, and opens the TCP connections to Redis.

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

use super::connection::ByteStream;
use super::tunnel::{self, ForwardProxyError, ForwardProxyErrorKind};
use crate::policy::authority::{Authority, Scheme};
use crate::policy::forward_proxy::{ForwardProxy, ProxyScheme};

/// Opens streams to an authority. Tests implement this trait with in-memory pipes.
pub trait Connect: Send + Sync + 'static {
    /// The type of an open stream.
    type Io: ByteStream + 'static;

    /// Opens one stream to `authority`.
    fn connect(&self, authority: &Authority) -> impl Future<Output = Result<Self::Io, ConnectError>> + Send;
}

/// The reason why a connection could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The host name could not be resolved.
    #[error("the name of the upstream cannot be resolved: {0}")]
    Name(#[source] io::Error),
    /// No address accepts a TCP connection.
    #[error("the upstream cannot be reached: {0}")]
    Tcp(#[source] io::Error),
    /// The TLS handshake failed. The request is never sent in plain text instead.
    #[error("the TLS handshake with the upstream failed: {0}")]
    Tls(#[source] io::Error),
    /// The host is not a valid name in a certificate.
    #[error("the name of the upstream is not valid in a certificate: {0}")]
    ServerName(#[from] InvalidDnsNameError),
    /// The forward proxy opened no tunnel.
    #[error("{0}")]
    Proxy(#[from] ForwardProxyError),
    /// The connection was closed before it accepted a byte of the request.
    #[error("the upstream closed a new connection before it accepted the request")]
    ClosedBeforeRequest,
}

/// The reason why TLS cannot be configured.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The TLS library supports no protocol version.
    #[error("TLS cannot be configured: {0}")]
    Library(#[from] rustls::Error),
    /// The file of certificate authorities cannot be read.
    #[error("the file of certificate authorities {} cannot be read as PEM: {source}", .path.display())]
    Unreadable {
        /// The configured path.
        path: PathBuf,
        /// The error of the PEM reader.
        source: pem::Error,
    },
    /// The file contains no certificate.
    #[error("the file of certificate authorities {} contains no certificate", .0.display())]
    Empty(PathBuf),
    /// A certificate in the file cannot be used as a certificate authority.
    #[error(
        "the file of certificate authorities {} has a certificate that is not a certificate authority: {source}",
        .path.display()
    )]
    Unusable {
        /// The configured path.
        path: PathBuf,
        /// The error of the TLS library.
        source: rustls::Error,
    },
}

/// Connects over TCP and, for [`Scheme::Https`], TLS.
#[derive(Clone)]
pub struct TcpTlsConnector {
    tls: TlsConnector,
}

impl TcpTlsConnector {
    /// Creates a connector that trusts the public certificate authorities and those in `ca_file`.
    ///
    /// # Errors
    ///
    /// Fails when the file cannot be read or contains no usable certificate, or the TLS library has no usable protocol
    /// version.
    pub fn new(ca_file: Option<&Path>) -> Result<Self, TlsError> {
        Ok(Self { tls: TlsConnector::from(Arc::new(client_tls_config(ca_file)?)) })
    }
}

/// Returns a TLS configuration that trusts the public certificate authorities and those in `ca_file`.
pub(super) fn client_tls_config(ca_file: Option<&Path>) -> Result<ClientConfig, TlsError> {
    let mut roots: RootCertStore = webpki_roots::TLS_SERVER_ROOTS.iter().cloned().collect();
    if let Some(path) = ca_file {
        add_roots(&mut roots, path)?;
    }
    tls_config_with(roots)
}

/// Returns a TLS configuration that trusts only the certificate authorities in `ca_file`, because a server in a private
/// network needs no public authority. Without a file, it trusts the public authorities.
///
/// # Errors
///
/// Fails when the file cannot be read or contains no usable certificate, or the TLS library has no usable protocol
/// version.
pub fn private_tls_config(ca_file: Option<&Path>) -> Result<ClientConfig, TlsError> {
    let Some(path) = ca_file else { return client_tls_config(None) };
    let mut roots = RootCertStore::empty();
    add_roots(&mut roots, path)?;
    tls_config_with(roots)
}

fn tls_config_with(roots: RootCertStore) -> Result<ClientConfig, TlsError> {
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
    type Io = Either<TcpOrTls, TlsStream<TcpOrTls>>;

    async fn connect(&self, authority: &Authority) -> Result<Self::Io, ConnectError> {
        if let Some(proxy) = authority.proxy() {
            let tunnel_stream = self
                .open_tunnel(proxy, authority)
                .await
                .map_err(|kind| ConnectError::Proxy(ForwardProxyError::new(proxy, kind)))?;
            return Ok(match authority.scheme() {
                Scheme::Http => Either::Left(tunnel_stream),
                Scheme::Https => Either::Right(self.perform_tls_handshake(authority, tunnel_stream).await?),
            });
        }
        let tcp = match connect_tcp(authority.host(), authority.port()).await {
            Ok(tcp) => tcp,
            Err(TcpError::Name(error)) => return Err(ConnectError::Name(error)),
            Err(TcpError::Connect(error)) => return Err(ConnectError::Tcp(error)),
        };
        Ok(Either::Left(match authority.scheme() {
            Scheme::Http => Either::Left(tcp),
            Scheme::Https => Either::Right(self.perform_tls_handshake(authority, tcp).await?),
        }))
    }
}

/// A connection to the provider or to a forward proxy, with or without TLS.
type TcpOrTls = Either<TcpStream, TlsStream<TcpStream>>;

impl TcpTlsConnector {
    /// Performs the TLS handshake with the provider.
    async fn perform_tls_handshake<S: ByteStream>(
        &self,
        authority: &Authority,
        stream: S,
    ) -> Result<TlsStream<S>, ConnectError> {
        let name = ServerName::try_from(authority.host().to_owned())?;
        self.tls.connect(name, stream).await.map_err(ConnectError::Tls)
    }

    /// Connects to the forward proxy and opens a tunnel to `authority`.
    async fn open_tunnel(
        &self,
        proxy: &ForwardProxy,
        authority: &Authority,
    ) -> Result<TcpOrTls, ForwardProxyErrorKind> {
        let tcp = match connect_tcp(proxy.host(), proxy.port()).await {
            Ok(tcp) => tcp,
            Err(TcpError::Name(error)) => return Err(ForwardProxyErrorKind::Name(error)),
            Err(TcpError::Connect(error)) => return Err(ForwardProxyErrorKind::Tcp(error)),
        };
        match proxy.scheme() {
            ProxyScheme::Http => tunnel::connect(Either::Left(tcp), proxy, authority).await,
            ProxyScheme::Https => {
                let name = ServerName::try_from(proxy.host().to_owned())?;
                let tls = self.tls.connect(name, tcp).await.map_err(ForwardProxyErrorKind::Tls)?;
                tunnel::connect(Either::Right(tls), proxy, authority).await
            }
            ProxyScheme::Socks5 => tunnel::connect_socks(Either::Left(tcp), proxy, authority).await,
        }
    }
}

/// Adds the certificate authorities in the PEM file at `path` to `roots`.
fn add_roots(roots: &mut RootCertStore, path: &Path) -> Result<(), TlsError> {
    let unreadable = |source| TlsError::Unreadable { path: path.to_owned(), source };
    let count_before = roots.len();
    for certificate in CertificateDer::pem_file_iter(path).map_err(unreadable)? {
        let certificate = certificate.map_err(unreadable)?;
        roots.add(certificate).map_err(|source| TlsError::Unusable { path: path.to_owned(), source })?;
    }
    if roots.len() == count_before { Err(TlsError::Empty(path.to_owned())) } else { Ok(()) }
}

/// Delay after which the next address is tried in parallel (RFC 8305, section 5).
const CONNECTION_ATTEMPT_DELAY: Duration = Duration::from_millis(250);

/// The reason why no TCP connection to a host could be opened.
#[derive(Debug)]
pub enum TcpError {
    /// The host name could not be resolved.
    Name(io::Error),
    /// No address accepts a connection.
    Connect(io::Error),
}

/// Resolves a host name and connects to the first address that accepts a connection (RFC 8305). The caller limits the
/// duration.
///
/// # Errors
///
/// Fails when the host name cannot be resolved, or no address accepts a connection.
pub async fn connect_tcp(host: &str, port: u16) -> Result<TcpStream, TcpError> {
    let resolved_addresses = tokio::net::lookup_host((host, port)).await.map_err(TcpError::Name)?;
    connect_any(resolved_addresses.collect()).await
}

/// Connects to the first of the addresses that accepts a connection. An address that drops packets delays the
/// attempt at the next address only by [`CONNECTION_ATTEMPT_DELAY`].
async fn connect_any(addresses: Vec<SocketAddr>) -> Result<TcpStream, TcpError> {
    let mut addresses = interleave_families(addresses).into_iter();
    let mut attempts = JoinSet::new();
    let mut last_error = None;
    loop {
        let address = addresses.next();
        let has_started_attempt = address.is_some();
        let finished_attempt = if let Some(address) = address {
            attempts.spawn(TcpStream::connect(address));
            tokio::time::timeout(CONNECTION_ATTEMPT_DELAY, attempts.join_next()).await
        } else {
            Ok(attempts.join_next().await)
        };
        match finished_attempt {
            Ok(Some(Ok(Ok(tcp)))) => {
                // Small writes are sent immediately, because the first chunk of a body must not wait until the
                // provider acknowledges the head.
                tcp.set_nodelay(true).map_err(TcpError::Connect)?;
                return Ok(tcp);
            }
            Ok(Some(Ok(Err(error)))) => last_error = Some(error),
            Ok(Some(Err(error))) => last_error = Some(io::Error::other(error)),
            Ok(None) if !has_started_attempt => {
                let no_address =
                    || io::Error::new(io::ErrorKind::AddrNotAvailable, "the name has no address");
                return Err(last_error.map_or_else(|| TcpError::Name(no_address()), TcpError::Connect));
            }
            Ok(None) | Err(_) => {}
        }
    }
}

/// Returns the addresses with alternating families, in the order of the resolver within each family.
fn interleave_families(addresses: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let starts_with_ipv6 = addresses.first().is_some_and(SocketAddr::is_ipv6);
    let (first_family, second_family): (Vec<_>, Vec<_>) =
        addresses.into_iter().partition(|address| address.is_ipv6() == starts_with_ipv6);
    let mut second_family = second_family.into_iter();
    let mut interleaved: Vec<SocketAddr> = first_family
        .into_iter()
        .flat_map(|address| [Some(address), second_family.next()])
        .flatten()
        .collect();
    interleaved.extend(second_family);
    interleaved
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn address_families_alternate_and_no_address_is_lost() {
        let parse =
            |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<SocketAddr>>();
        for (resolved, expected) in [
            (
                &["1.1.1.1:1", "1.1.1.2:1", "[::1]:1"] as &[&str],
                &["1.1.1.1:1", "[::1]:1", "1.1.1.2:1"] as &[&str],
            ),
            (&["[::1]:1", "1.1.1.1:1", "1.1.1.2:1"], &["[::1]:1", "1.1.1.1:1", "1.1.1.2:1"]),
            (&["1.1.1.1:1"], &["1.1.1.1:1"]),
            (&[], &[]),
        ] {
            assert_eq!(interleave_families(parse(resolved)), parse(expected));
        }
    }

    #[tokio::test]
    async fn the_next_address_is_used_after_a_refused_connection() {
        // `localhost` may resolve to ::1 and 127.0.0.1. Only 127.0.0.1 has a listener.
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(connect_tcp("localhost", port).await.is_ok());
    }

    #[tokio::test]
    async fn a_port_without_a_listener_is_an_error() {
        // The listener is dropped immediately, so that its port is closed.
        let closed_address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let connect_result = connect_tcp("127.0.0.1", closed_address.port()).await;
        assert!(
            matches!(connect_result, Err(TcpError::Connect(_))),
            "the connection must be refused, but the result is {connect_result:?}"
        );
    }

    #[tokio::test]
    async fn a_name_without_an_address_is_an_unresolved_name() {
        let connect_result = connect_any(Vec::new()).await;
        assert!(
            matches!(connect_result, Err(TcpError::Name(_))),
            "a name without an address must be reported as unresolved, but the result is {connect_result:?}"
        );
    }
}

//! Accepts HTTP and HTTPS on one TCP port. The first byte of a connection distinguishes them. [`Tls`] performs the TLS
//! handshake if it has a certificate, and otherwise closes connections that start a handshake. A Unix socket always
//! uses plain HTTP.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use rustls::crypto::ring;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{AlertDescription, ServerConfig};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::either::Either;
use tracing::{debug, info, warn};

use crate::platform::sockets::UnixStream;

/// The stream of a client connection: plain, or TLS. The TLS stream is boxed, because it is much larger.
pub(super) type Stream = Either<Either<TcpStream, UnixStream>, Box<TlsStream<TcpStream>>>;

/// The first byte of a TLS connection: the type of a handshake record. An HTTP request cannot start with it.
const HANDSHAKE_RECORD: u8 = 0x16;

/// The TLS state of one or more listeners. The certificate can be set, replaced and removed while they
/// listen. Clones share the certificate.
#[derive(Clone)]
pub struct Tls(Arc<TlsState>);

/// The state that the clones of [`Tls`] share.
struct TlsState {
    acceptor: TlsAcceptor,
    certificate: Arc<CurrentCertificate>,
    /// Whether the warning was logged that a client used TLS while no certificate was set.
    has_warned_of_missing_certificate: AtomicBool,
    /// Whether the message about a client that does not trust the certificate was logged.
    has_logged_distrust: AtomicBool,
}

/// The certificate in use.
#[derive(Default)]
struct CurrentCertificate(ArcSwapOption<CertifiedKey>);

impl Tls {
    /// Creates the TLS state without a certificate.
    ///
    /// # Errors
    ///
    /// Fails when the TLS library supports no protocol version, or has no randomness for session tickets.
    pub fn new() -> Result<Self, rustls::Error> {
        let certificate = Arc::new(CurrentCertificate::default());
        let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_cert_resolver(Arc::clone(&certificate) as Arc<dyn ResolvesServerCert>);
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        // Session tickets save a returning client a round trip, without session state in this process.
        config.ticketer = ring::Ticketer::new()?;
        Ok(Self(Arc::new(TlsState {
            acceptor: TlsAcceptor::from(Arc::new(config)),
            certificate,
            has_warned_of_missing_certificate: AtomicBool::new(false),
            has_logged_distrust: AtomicBool::new(false),
        })))
    }

    /// Sets the certificate for new connections. `None` disables TLS.
    pub fn set_certificate(&self, certificate: Option<Arc<CertifiedKey>>) {
        self.0.certificate.0.store(certificate);
    }

    /// Returns whether a certificate is set.
    #[must_use]
    pub fn has_certificate(&self) -> bool {
        self.0.certificate.0.load().is_some()
    }

    /// Detects whether the client uses TLS, and performs the handshake if so. `step_timeout` limits the wait
    /// for the first byte, and then the handshake. Returns `None` if reading or the handshake fails or exceeds its
    /// timeout, or if the client uses TLS and no certificate is set.
    pub(super) async fn accept(
        self,
        stream: Either<TcpStream, UnixStream>,
        step_timeout: Duration,
    ) -> Option<Stream> {
        let tcp = match stream {
            Either::Left(tcp) => tcp,
            Either::Right(_) => return Some(Either::Left(stream)),
        };
        let first_byte = match timeout(step_timeout, peek_first_byte(&tcp)).await {
            Ok(Ok(first_byte)) => first_byte,
            Ok(Err(error)) => return log_end(&error),
            Err(_) => return log_end(&"the client did not send a byte in time"),
        };
        if first_byte != Some(HANDSHAKE_RECORD) {
            // The HTTP connection also handles the end of the stream.
            return Some(Either::Left(Either::Left(tcp)));
        }
        if !self.has_certificate() {
            if !self.0.has_warned_of_missing_certificate.swap(true, Ordering::Relaxed) {
                warn!(
                    "a client connected over HTTPS, but there is no certificate: use http:// in the client, or set \
                     `server.tls`"
                );
            }
            return log_end(&"HTTPS is disabled");
        }
        // The future is boxed, so that it does not enlarge the futures of plain connections.
        match timeout(step_timeout, Box::pin(self.0.acceptor.accept(tcp))).await {
            Ok(Ok(stream)) => Some(Either::Right(Box::new(stream))),
            Ok(Err(error)) => {
                if is_distrust(&error) && !self.0.has_logged_distrust.swap(true, Ordering::Relaxed) {
                    info!("a client does not trust the HTTPS certificate: {error}; `keychoir env` helps");
                }
                log_end(&error)
            }
            Err(_) => log_end(&"the TLS handshake took too long"),
        }
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").field("has_certificate", &self.has_certificate()).finish_non_exhaustive()
    }
}

impl ResolvesServerCert for CurrentCertificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.load_full()
    }
}

impl fmt::Debug for CurrentCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CurrentCertificate")
    }
}

/// Returns the first byte without consuming it. Returns `None` at the end of the stream.
async fn peek_first_byte(tcp: &TcpStream) -> io::Result<Option<u8>> {
    let mut byte = [0];
    let count = tcp.peek(&mut byte).await?;
    Ok((count > 0).then_some(byte[0]))
}

/// Logs the end of a connection before its first request. The message is not a warning, because disconnects
/// and malformed bytes are normal.
fn log_end<T>(reason: &dyn fmt::Display) -> Option<T> {
    debug!("a connection ended before its first request: {reason}");
    None
}

/// Returns whether the client sent a TLS alert that it does not trust the certificate.
fn is_distrust(error: &io::Error) -> bool {
    let tls_error = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    matches!(
        tls_error,
        Some(rustls::Error::AlertReceived(
            AlertDescription::UnknownCA
                | AlertDescription::BadCertificate
                | AlertDescription::CertificateUnknown
        ))
    )
}

//! HTTP and HTTPS on one port: the first byte of a connection distinguishes them. With a certificate, the
//! server performs the TLS handshake; without one, it closes connections that begin a handshake.

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
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::either::Either;
use tracing::{debug, info, warn};

/// A served stream: plain, or under TLS. The TLS stream is boxed, so that it does not enlarge plain
/// ones.
pub(super) type Stream = Either<Either<TcpStream, UnixStream>, Box<TlsStream<TcpStream>>>;

/// The first byte of every TLS connection: a handshake record. No HTTP request begins with it.
const HANDSHAKE: u8 = 0x16;

/// The certificate of one or more listeners, which may be set, replaced and removed while they listen. A
/// clone shares the certificate.
#[derive(Clone)]
pub struct Tls(Arc<Inner>);

struct Inner {
    acceptor: TlsAcceptor,
    certificate: Arc<CurrentCertificate>,
    /// Whether the warning about TLS clients without a certificate was logged.
    has_warned_https_off: AtomicBool,
    /// Whether the message about a client that does not trust the certificate was logged.
    has_logged_distrust: AtomicBool,
}

/// The certificate in use.
#[derive(Default)]
struct CurrentCertificate(ArcSwapOption<CertifiedKey>);

impl Tls {
    /// TLS without a certificate.
    ///
    /// # Errors
    ///
    /// When the TLS library has no protocol version to offer, or no randomness for its tickets.
    pub fn new() -> Result<Self, rustls::Error> {
        let certificate = Arc::new(CurrentCertificate::default());
        let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_cert_resolver(Arc::clone(&certificate) as Arc<dyn ResolvesServerCert>);
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        // Session tickets save a returning client a round trip, and the server stores no session state.
        config.ticketer = ring::Ticketer::new()?;
        Ok(Self(Arc::new(Inner {
            acceptor: TlsAcceptor::from(Arc::new(config)),
            certificate,
            has_warned_https_off: AtomicBool::new(false),
            has_logged_distrust: AtomicBool::new(false),
        })))
    }

    /// Sets the certificate for new connections; `None` switches TLS off.
    pub fn show(&self, certificate: Option<Arc<CertifiedKey>>) {
        self.0.certificate.0.store(certificate);
    }

    /// Whether there is a certificate.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.0.certificate.0.load().is_some()
    }

    /// Detects whether the client uses TLS, and performs the handshake if so. `None` when the
    /// client disconnects, takes too long, or uses TLS without a certificate. Each of the two steps
    /// may take `step_timeout`.
    pub(super) async fn open(
        self,
        stream: Either<TcpStream, UnixStream>,
        step_timeout: Duration,
    ) -> Option<Stream> {
        let tcp = match stream {
            Either::Left(tcp) => tcp,
            Either::Right(_) => return Some(Either::Left(stream)),
        };
        let first = match timeout(step_timeout, first_byte(&tcp)).await {
            Ok(Ok(first)) => first,
            Ok(Err(error)) => return log_end(&error),
            Err(_) => return log_end(&"nothing was sent in time"),
        };
        if first != Some(HANDSHAKE) {
            // Also for a client that has closed its half: the HTTP connection detects that.
            return Some(Either::Left(Either::Left(tcp)));
        }
        if !self.is_on() {
            if !self.0.has_warned_https_off.swap(true, Ordering::Relaxed) {
                warn!(
                    "a client connected with https, but there is no certificate: use http:// there, or set `server.tls`"
                );
            }
            return log_end(&"https is off");
        }
        // Boxed, so that a connection without TLS does not carry the future's size.
        match timeout(step_timeout, Box::pin(self.0.acceptor.accept(tcp))).await {
            Ok(Ok(stream)) => Some(Either::Right(Box::new(stream))),
            Ok(Err(error)) => {
                if is_distrust(&error) && !self.0.has_logged_distrust.swap(true, Ordering::Relaxed) {
                    info!("a client does not trust the certificate of https: {error}; `keychoir env` helps");
                }
                log_end(&error)
            }
            Err(_) => log_end(&"the TLS handshake took too long"),
        }
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").field("is_on", &self.is_on()).finish_non_exhaustive()
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

/// Peeks at the first byte; `None` at the end of the stream.
async fn first_byte(tcp: &TcpStream) -> io::Result<Option<u8>> {
    let mut byte = [0];
    let count = tcp.peek(&mut byte).await?;
    Ok((count > 0).then_some(byte[0]))
}

/// Clients disconnect and send malformed bytes; neither is worth a warning.
fn log_end<T>(reason: &dyn fmt::Display) -> Option<T> {
    debug!("a connection ended before its first request: {reason}");
    None
}

/// Whether the client reported that it does not trust the certificate's authority.
fn is_distrust(error: &io::Error) -> bool {
    let error = error.get_ref().and_then(|error| error.downcast_ref::<rustls::Error>());
    matches!(
        error,
        Some(rustls::Error::AlertReceived(
            AlertDescription::UnknownCA
                | AlertDescription::BadCertificate
                | AlertDescription::CertificateUnknown
        ))
    )
}

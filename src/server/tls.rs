//! HTTP and HTTPS on one port: the first byte that a client sends tells which it means. With a
//! certificate, TLS is spoken; without one, a client that begins it is turned away.

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

/// What is served: as it was accepted, or under TLS. The box keeps the others as small as they were.
pub(super) type Stream = Either<Either<TcpStream, UnixStream>, Box<TlsStream<TcpStream>>>;

/// The first byte of every TLS connection: a record of the handshake. No HTTP begins with it.
const HANDSHAKE: u8 = 0x16;

/// The certificate of one or more listeners, which may come, change and go while they listen.
/// Cheap to clone.
#[derive(Clone)]
pub struct Tls(Arc<Inner>);

struct Inner {
    acceptor: TlsAcceptor,
    shown: Arc<Shown>,
    /// Whether it was told that somebody wants TLS and it is off.
    has_told_off: AtomicBool,
    /// Whether it was told that somebody does not trust the certificate.
    has_told_distrust: AtomicBool,
}

/// The certificate that is shown now.
#[derive(Default)]
struct Shown(ArcSwapOption<CertifiedKey>);

impl Tls {
    /// Without a certificate.
    ///
    /// # Errors
    ///
    /// When the TLS library has no protocol version to offer, or no randomness for its tickets.
    pub fn new() -> Result<Self, rustls::Error> {
        let shown = Arc::new(Shown::default());
        let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_cert_resolver(Arc::clone(&shown) as Arc<dyn ResolvesServerCert>);
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        // A client that comes back saves a round of the handshake, and we keep nothing for it.
        config.ticketer = ring::Ticketer::new()?;
        Ok(Self(Arc::new(Inner {
            acceptor: TlsAcceptor::from(Arc::new(config)),
            shown,
            has_told_off: AtomicBool::new(false),
            has_told_distrust: AtomicBool::new(false),
        })))
    }

    /// Shows this certificate to clients that come from now on; with none, TLS is off.
    pub fn show(&self, certificate: Option<Arc<CertifiedKey>>) {
        self.0.shown.0.store(certificate);
    }

    /// Whether there is a certificate to show.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.0.shown.0.load().is_some()
    }

    /// Finds out what the client means, and agrees on TLS if it means that. `None` when the client
    /// leaves, waits too long, or there is nothing to agree on. Each of both steps may take `max`.
    pub(super) async fn open(self, stream: Either<TcpStream, UnixStream>, max: Duration) -> Option<Stream> {
        let tcp = match stream {
            Either::Left(tcp) => tcp,
            Either::Right(_) => return Some(Either::Left(stream)),
        };
        let first = match timeout(max, first_byte(&tcp)).await {
            Ok(Ok(first)) => first,
            Ok(Err(error)) => return ended(&error),
            Err(_) => return ended(&"nothing was sent in time"),
        };
        if first != Some(HANDSHAKE) {
            // Also a client that has closed its half: what follows finds that out.
            return Some(Either::Left(Either::Left(tcp)));
        }
        if !self.is_on() {
            if !self.0.has_told_off.swap(true, Ordering::Relaxed) {
                warn!("a client asks for https where there is none: give it http://, or see server.tls");
            }
            return ended(&"https is off");
        }
        // In a box, so that a connection without TLS does not carry the room for it.
        match timeout(max, Box::pin(self.0.acceptor.accept(tcp))).await {
            Ok(Ok(stream)) => Some(Either::Right(Box::new(stream))),
            Ok(Err(error)) => {
                if is_distrust(&error) && !self.0.has_told_distrust.swap(true, Ordering::Relaxed) {
                    info!("a client does not trust the certificate of https: {error}; `keychoir env` helps");
                }
                ended(&error)
            }
            Err(_) => ended(&"the TLS handshake took too long"),
        }
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").field("is_on", &self.is_on()).finish_non_exhaustive()
    }
}

impl ResolvesServerCert for Shown {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.load_full()
    }
}

impl fmt::Debug for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Shown")
    }
}

/// The first byte, which stays where it is; `None` when none will come.
async fn first_byte(tcp: &TcpStream) -> io::Result<Option<u8>> {
    let mut byte = [0];
    let count = tcp.peek(&mut byte).await?;
    Ok((count > 0).then_some(byte[0]))
}

/// Clients leave and send what they like; neither is news.
fn ended<T>(why: &dyn fmt::Display) -> Option<T> {
    debug!("a connection ended before its first request: {why}");
    None
}

/// Whether the client has said that it does not know who vouches for us.
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

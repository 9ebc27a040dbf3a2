//! Examines the route to the provider for the online check of the configuration. Resolves the host name, opens one
//! connection in the same way as for requests, and sends a request without a key. The provider refuses this request
//! without a charge.

use std::io;
use std::net::IpAddr;
use std::time::Duration;

use http::StatusCode;
use rustls::pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_util::either::Either;

use super::connect::{Connect, ConnectError, TcpTlsConnector};
use crate::clock;
use crate::policy::authority::{Authority, Scheme};
use crate::policy::units::UnixMs;

/// Maximum number of bytes in a response head.
const MAX_PROBE_HEAD_BYTES: usize = 32 * 1024;
/// Minimum free capacity of the buffer for one read of the response.
const READ_SIZE: usize = 4 * 1024;
/// Maximum number of headers in a response head.
const MAX_PROBE_HEADERS: usize = 128;

/// The properties of the route to the provider that a probe has found.
#[derive(Clone, Debug)]
pub struct RouteProbe {
    /// The duration of the name resolution, the TCP connection and all handshakes together.
    pub connect_time: Duration,
    /// The certificates of the provider, starting with its own. The list is empty for a route without TLS.
    pub certificates: Vec<CertificateDer<'static>>,
    /// The status of the response.
    pub status: StatusCode,
    /// The provider's time, from the `Date` header, or `None` if the response has no valid `Date`.
    pub date: Option<UnixMs>,
}

/// The reason why a probe failed.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// The connection was not open before the timeout.
    #[error("no connection within {} ms", .0.as_millis())]
    ConnectTimeout(Duration),
    /// The connection could not be opened.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The response did not arrive before the timeout.
    #[error("no response within {} ms", .0.as_millis())]
    ResponseTimeout(Duration),
    /// The connection broke before the response head was complete.
    #[error("the connection broke: {0}")]
    Broken(#[from] io::Error),
    /// The response is not HTTP/1, or its head is too large.
    #[error("the response is not HTTP")]
    Malformed,
}

/// The timeouts of a probe.
#[derive(Clone, Copy, Debug)]
pub struct ProbeTimeouts {
    /// The timeout for the name resolution, the TCP connection and all handshakes together.
    pub connect: Duration,
    /// The timeout from the request to the end of the response head.
    pub response: Duration,
}

impl TcpTlsConnector {
    /// Opens one connection to `authority`, sends a request without a key, and reads the head of the response.
    ///
    /// # Errors
    ///
    /// Fails when the connection cannot be opened, or when no valid response head arrives.
    pub async fn probe(
        &self,
        authority: &Authority,
        timeouts: ProbeTimeouts,
    ) -> Result<RouteProbe, ProbeError> {
        let start = clock::instant();
        let stream = tokio::time::timeout(timeouts.connect, self.connect(authority))
            .await
            .map_err(|_| ProbeError::ConnectTimeout(timeouts.connect))??;
        let connect_time = clock::elapsed_since(start);
        let tls_session = match (&stream, authority.scheme()) {
            (Either::Right(tunneled), Scheme::Https) => Some(tunneled.get_ref().1),
            (Either::Left(Either::Right(direct)), Scheme::Https) => Some(direct.get_ref().1),
            (Either::Left(_) | Either::Right(_), _) => None,
        };
        let peer_certificates =
            tls_session.and_then(|session| session.peer_certificates()).unwrap_or_default();
        let certificates =
            peer_certificates.iter().map(|certificate| certificate.clone().into_owned()).collect();
        let head = tokio::time::timeout(timeouts.response, request_head(stream, authority))
            .await
            .map_err(|_| ProbeError::ResponseTimeout(timeouts.response))??;
        Ok(RouteProbe { connect_time, certificates, status: head.status, date: head.date })
    }
}

/// Resolves a host name to its addresses within `timeout`.
///
/// # Errors
///
/// Fails when the name cannot be resolved or has no address, or when the resolver does not respond.
pub async fn resolve(host: &str, timeout: Duration) -> io::Result<Vec<IpAddr>> {
    let lookup = tokio::time::timeout(timeout, tokio::net::lookup_host((host, 0)))
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "the resolver does not respond"))??;
    let mut addresses: Vec<IpAddr> = lookup.map(|address| address.ip()).collect();
    addresses.dedup();
    if addresses.is_empty() {
        return Err(io::Error::new(io::ErrorKind::AddrNotAvailable, "the name has no address"));
    }
    Ok(addresses)
}

/// The part of a response head that a probe reports.
#[derive(Debug, PartialEq, Eq)]
struct ProbeHead {
    status: StatusCode,
    date: Option<UnixMs>,
}

/// Sends a request without a key and reads the head of its response.
async fn request_head<S>(mut stream: S, authority: &Authority) -> Result<ProbeHead, ProbeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let host = authority.host_header().to_str().unwrap_or_default();
    let prefix = authority.prefix();
    let request = format!(
        "GET {prefix}/v1/models HTTP/1.1\r\nhost: {host}\r\naccept: application/json\r\nconnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await?;
    stream.flush().await?;
    let mut received_bytes = Vec::new();
    loop {
        if let Some(head) = parse_probe_head(&received_bytes)? {
            return Ok(head);
        }
        if received_bytes.len() >= MAX_PROBE_HEAD_BYTES {
            return Err(ProbeError::Malformed);
        }
        received_bytes.reserve(READ_SIZE);
        if stream.read_buf(&mut received_bytes).await? == 0 {
            return Err(ProbeError::Broken(io::ErrorKind::UnexpectedEof.into()));
        }
    }
}

/// Parses the response head at the start of `bytes`. Returns `None` if it is incomplete.
fn parse_probe_head(bytes: &[u8]) -> Result<Option<ProbeHead>, ProbeError> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_PROBE_HEADERS];
    let mut response = httparse::Response::new(&mut headers);
    match response.parse(bytes) {
        Ok(httparse::Status::Complete(_)) => {}
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(_) => return Err(ProbeError::Malformed),
    }
    let status = response.code.and_then(|code| StatusCode::from_u16(code).ok());
    let status = status.ok_or(ProbeError::Malformed)?;
    let date_header = response.headers.iter().find(|header| header.name.eq_ignore_ascii_case("date"));
    let date =
        date_header.and_then(|header| std::str::from_utf8(header.value).ok()).and_then(parse_http_date);
    Ok(Some(ProbeHead { status, date }))
}

fn parse_http_date(text: &str) -> Option<UnixMs> {
    let time = httpdate::parse_http_date(text).ok()?;
    let since_epoch = time.duration_since(std::time::UNIX_EPOCH).ok()?;
    Some(UnixMs(u64::try_from(since_epoch.as_millis()).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_date_of_the_provider_is_read_from_a_complete_head() {
        let head = b"HTTP/1.1 401 Unauthorized\r\nDate: Sat, 29 Nov 2025 20:01:05 GMT\r\n\r\n{";
        for length in 0..head.len() - 1 {
            let parsed_head = parse_probe_head(&head[..length]).unwrap();
            assert_eq!(parsed_head, None, "the first {length} bytes must be an incomplete head");
        }
        let expected = ProbeHead { status: StatusCode::UNAUTHORIZED, date: Some(UnixMs(1_764_446_465_000)) };
        assert_eq!(parse_probe_head(head).unwrap(), Some(expected));
    }

    #[test]
    fn a_head_without_a_valid_date_is_accepted() {
        for head in ["HTTP/1.1 200 OK\r\n\r\n", "HTTP/1.1 200 OK\r\ndate: now\r\n\r\n"] {
            assert_eq!(parse_probe_head(head.as_bytes()).unwrap().unwrap().date, None);
        }
    }

    #[test]
    fn bytes_that_are_not_http_are_rejected() {
        assert!(parse_probe_head(b"SSH-2.0-OpenSSH\r\n").is_err());
    }
}

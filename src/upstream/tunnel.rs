//! Opens a tunnel through a forward proxy: by CONNECT over HTTP/1.1 (RFC 9110, section 9.3.6), or by SOCKS5
//! (RFC 1928). The forward proxy receives the host name of the provider and resolves it.
//!
//! CONNECT is implemented here and not by a library for two reasons. Bytes that a proxy sends after the head of its
//! response must not be used as bytes of the provider, and the error must contain the response of the proxy.

use std::io;

use bytes::BytesMut;
use http::StatusCode;
use rustls::pki_types::InvalidDnsNameError;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_socks::tcp::Socks5Stream;

use crate::policy::authority::Authority;
use crate::policy::forward_proxy::{ForwardProxy, host_and_port};

/// Maximum number of bytes in the head of a response to CONNECT. Proxies send few headers.
const MAX_HEAD_BYTES: usize = 16 * 1024;
/// Maximum number of headers of a response to CONNECT.
const MAX_HEADERS: usize = 64;
/// Minimum free capacity of the buffer for one read of the response.
const READ_SIZE: usize = 1024;

/// The error of a tunnel that could not be opened. It contains the proxy without its credentials.
#[derive(Debug, thiserror::Error)]
#[error("the proxy {proxy} {kind}")]
pub struct ForwardProxyError {
    proxy: String,
    /// The cause of the error.
    #[source]
    pub kind: ForwardProxyErrorKind,
}

impl ForwardProxyError {
    pub(super) fn new(proxy: &ForwardProxy, kind: ForwardProxyErrorKind) -> Self {
        Self { proxy: proxy.to_string(), kind }
    }

    /// Returns whether the proxy refused the credentials, requires credentials, or does not accept the scheme `Basic`.
    /// Such a proxy refuses every connection.
    #[must_use]
    pub fn is_authentication_failure(&self) -> bool {
        match &self.kind {
            ForwardProxyErrorKind::CredentialsMissing(_)
            | ForwardProxyErrorKind::CredentialsRefused(_)
            | ForwardProxyErrorKind::UnsupportedAuthentication => true,
            ForwardProxyErrorKind::Name(_)
            | ForwardProxyErrorKind::Tcp(_)
            | ForwardProxyErrorKind::Tls(_)
            | ForwardProxyErrorKind::ServerName(_)
            | ForwardProxyErrorKind::Refused { .. }
            | ForwardProxyErrorKind::Closed
            | ForwardProxyErrorKind::Broken(_)
            | ForwardProxyErrorKind::MalformedHead
            | ForwardProxyErrorKind::HeadTooLarge
            | ForwardProxyErrorKind::DataAfterHead
            | ForwardProxyErrorKind::Socks(_) => false,
        }
    }
}

/// The cause of a [`ForwardProxyError`].
#[derive(Debug, thiserror::Error)]
pub enum ForwardProxyErrorKind {
    /// The host name of the proxy could not be resolved.
    #[error("cannot be reached: its name cannot be resolved: {0}")]
    Name(#[source] io::Error),
    /// No address of the proxy accepts a TCP connection.
    #[error("cannot be reached: {0}")]
    Tcp(#[source] io::Error),
    /// The TLS handshake with the proxy failed.
    #[error("cannot be reached by TLS: {0}")]
    Tls(#[source] io::Error),
    /// The proxy's host is not a valid name in a certificate.
    #[error("has a name that cannot have a certificate: {0}")]
    ServerName(#[from] InvalidDnsNameError),
    /// The proxy requires credentials, and none are configured. The field contains the status of its response, or
    /// `SOCKS5`.
    #[error(
        "requires a user and a password ({0}): add them to `proxy`, as in http://USER:PASSWORD@HOST:PORT"
    )]
    CredentialsMissing(&'static str),
    /// The proxy refused the configured credentials. The field contains the status of its response, or `SOCKS5`.
    #[error("refuses the configured user and password ({0}): correct them in `proxy` or `proxy_file`")]
    CredentialsRefused(&'static str),
    /// The proxy does not accept the authentication scheme `Basic`.
    #[error(
        "requires a method of authentication other than Basic (407): run a local proxy that has it, such as Px or \
         Cntlm, and set `proxy` to that"
    )]
    UnsupportedAuthentication,
    /// The proxy refused the tunnel, or could not open it.
    #[error("refused a connection to {target} with status {status}")]
    Refused {
        /// The host and port of the provider.
        target: String,
        /// The status of the proxy's response.
        status: StatusCode,
    },
    /// The proxy closed the connection before it sent a complete head.
    #[error("closed the connection before it responded to CONNECT")]
    Closed,
    /// The connection to the proxy broke.
    #[error("broke the connection before it responded to CONNECT: {0}")]
    Broken(#[source] io::Error),
    /// The response is not HTTP/1.
    #[error("sent a malformed response to CONNECT")]
    MalformedHead,
    /// The head of the response is too large.
    #[error("responded to CONNECT with more than {MAX_HEAD_BYTES} bytes or {MAX_HEADERS} headers")]
    HeadTooLarge,
    /// The proxy sent bytes after the head of its response. The provider cannot have sent them, because it sends
    /// nothing before it has received bytes.
    #[error("sent data after its response to CONNECT, before the provider could")]
    DataAfterHead,
    /// The SOCKS5 handshake failed.
    #[error("opened no connection by SOCKS5: {0}")]
    Socks(#[source] tokio_socks::Error),
}

impl From<io::Error> for ForwardProxyErrorKind {
    fn from(error: io::Error) -> Self {
        Self::Broken(error)
    }
}

/// Opens a tunnel to `authority` by CONNECT over `stream`, a new connection to `proxy`. The returned stream transfers
/// bytes from and to the provider. The caller limits the duration.
///
/// # Errors
///
/// Fails when the proxy refuses the tunnel, when its response is invalid, or when the connection breaks.
pub(super) async fn connect<S>(
    mut stream: S,
    proxy: &ForwardProxy,
    authority: &Authority,
) -> Result<S, ForwardProxyErrorKind>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let target = host_and_port(authority.host(), authority.port());
    let mut request = format!("CONNECT {target} HTTP/1.1\r\nhost: {target}\r\n");
    if let Some(credentials) = proxy.credentials() {
        request.push_str("proxy-authorization: ");
        request.push_str(&credentials.expose_basic());
        request.push_str("\r\n");
    }
    request.push_str("\r\n");
    stream.write_all(request.as_bytes()).await?;
    stream.flush().await?;
    let mut buffer = BytesMut::new();
    loop {
        while let Some(head) = parse_head(&buffer)? {
            if !head.status.is_informational() {
                let has_data_after_head = buffer.len() > head.length;
                head.require_tunnel(proxy, target)?;
                return if has_data_after_head {
                    Err(ForwardProxyErrorKind::DataAfterHead)
                } else {
                    Ok(stream)
                };
            }
            let _ = buffer.split_to(head.length);
        }
        if buffer.len() >= MAX_HEAD_BYTES {
            return Err(ForwardProxyErrorKind::HeadTooLarge);
        }
        buffer.reserve(READ_SIZE);
        if stream.read_buf(&mut buffer).await? == 0 {
            return Err(ForwardProxyErrorKind::Closed);
        }
    }
}

/// The parts of the head of a response to CONNECT that determine whether the tunnel is open.
struct TunnelHead {
    status: StatusCode,
    /// Whether a `proxy-authenticate` header names the scheme `Basic`.
    accepts_basic: bool,
    /// The length of the head in bytes.
    length: usize,
}

impl TunnelHead {
    /// Fails if the response opens no tunnel to `target`. A successful response to CONNECT has no body, even if its
    /// headers declare a length.
    fn require_tunnel(&self, proxy: &ForwardProxy, target: String) -> Result<(), ForwardProxyErrorKind> {
        match self.status {
            status if status.is_success() => Ok(()),
            // Some forward proxies, such as tinyproxy, refuse wrong credentials with 401 instead of 407.
            StatusCode::UNAUTHORIZED if proxy.credentials().is_some() => {
                Err(ForwardProxyErrorKind::CredentialsRefused("401"))
            }
            StatusCode::PROXY_AUTHENTICATION_REQUIRED => Err(match proxy.credentials() {
                _ if !self.accepts_basic => ForwardProxyErrorKind::UnsupportedAuthentication,
                Some(_) => ForwardProxyErrorKind::CredentialsRefused("407"),
                None => ForwardProxyErrorKind::CredentialsMissing("407"),
            }),
            status => Err(ForwardProxyErrorKind::Refused { target, status }),
        }
    }
}

/// Parses the first head in `bytes`. Returns `None` if it is incomplete.
fn parse_head(bytes: &[u8]) -> Result<Option<TunnelHead>, ForwardProxyErrorKind> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut response = httparse::Response::new(&mut headers);
    let length = match response.parse(bytes) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => return Err(ForwardProxyErrorKind::HeadTooLarge),
        Err(_) => return Err(ForwardProxyErrorKind::MalformedHead),
    };
    let code = response.code.and_then(|code| StatusCode::from_u16(code).ok());
    let status = code.ok_or(ForwardProxyErrorKind::MalformedHead)?;
    let mut schemes =
        response.headers.iter().filter(|header| header.name.eq_ignore_ascii_case("proxy-authenticate"));
    let accepts_basic = schemes.any(|header| names_basic(header.value));
    Ok(Some(TunnelHead { status, accepts_basic, length }))
}

/// Returns whether one of the challenges in a `proxy-authenticate` header uses the scheme `Basic`.
fn names_basic(challenges: &[u8]) -> bool {
    challenges.split(|byte| matches!(byte, b' ' | b',')).any(|word| word.eq_ignore_ascii_case(b"basic"))
}

/// Opens a tunnel to `authority` by SOCKS5 over `stream`, a new connection to `proxy`. The returned stream transfers
/// bytes from and to the provider. The caller limits the duration.
///
/// # Errors
///
/// Fails when the proxy refuses the connection, or when the handshake fails.
pub(super) async fn connect_socks<S>(
    stream: S,
    proxy: &ForwardProxy,
    authority: &Authority,
) -> Result<S, ForwardProxyErrorKind>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    const PROTOCOL: &str = "SOCKS5";
    let target = (authority.host(), authority.port());
    let credentials = proxy.credentials();
    let connect_result = match credentials {
        Some(credentials) => {
            let (user, password) = (credentials.expose_user(), credentials.expose_password());
            Socks5Stream::connect_with_password_and_socket(stream, target, user, password).await
        }
        None => Socks5Stream::connect_with_socket(stream, target).await,
    };
    match connect_result {
        Ok(socks_stream) => Ok(socks_stream.into_inner()),
        Err(tokio_socks::Error::PasswordAuthFailure(_)) => {
            Err(ForwardProxyErrorKind::CredentialsRefused(PROTOCOL))
        }
        Err(tokio_socks::Error::NoAcceptableAuthMethods | tokio_socks::Error::AuthorizationRequired) => {
            Err(match credentials {
                Some(_) => ForwardProxyErrorKind::CredentialsRefused(PROTOCOL),
                None => ForwardProxyErrorKind::CredentialsMissing(PROTOCOL),
            })
        }
        Err(error) => Err(ForwardProxyErrorKind::Socks(error)),
    }
}

#[cfg(test)]
mod tests;

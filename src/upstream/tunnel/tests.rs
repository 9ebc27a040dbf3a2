//! Tests tunnels through forward proxies by CONNECT and SOCKS5: the request, the credentials, refusals and other
//! errors, and any response of a proxy. The proxy of a test is at the other end of an in-memory pipe.

use std::time::Duration;

use tokio::io::DuplexStream;

use super::*;
use crate::policy::authority::Scheme;
use crate::policy::forward_proxy::ProxyScheme;
use crate::policy::replay::Progress;
use crate::secret::ProxyCredentials;
use crate::upstream::{ConnectError, SendError};

/// Returns a proxy with the credentials of a user, if they are given.
fn proxy(credentials: Option<(&str, &str)>) -> ForwardProxy {
    let credentials = credentials.map(|(user, password)| ProxyCredentials::new(user, password));
    ForwardProxy::new(ProxyScheme::Http, "proxy.corp", 3128, credentials)
}

fn authority() -> Authority {
    Authority::new(Scheme::Https, "api.example", 443, "").unwrap()
}

/// Maximum duration of opening a tunnel. Opening takes far less time, so only a test that hangs exceeds it.
const TUNNEL_TIMEOUT: Duration = Duration::from_secs(20);

/// The user and the password of a proxy with credentials.
const ALICE: Option<(&str, &str)> = Some(("alice", "hunter2"));

/// Opens a tunnel by CONNECT through a proxy that reads the request and writes the chunks of its response. Returns the
/// request, and the stream or the error.
async fn open_http_tunnel(
    proxy: &ForwardProxy,
    authority: &Authority,
    chunks: &[&[u8]],
) -> (String, Result<DuplexStream, ForwardProxyErrorKind>) {
    let (client_io, mut proxy_io) = tokio::io::duplex(1024);
    let respond = async move {
        let mut request = Vec::new();
        while !request.ends_with(b"\r\n\r\n") {
            request.push(proxy_io.read_u8().await.unwrap());
        }
        for chunk in chunks {
            // The client may close the connection before the end of the response.
            let _ = proxy_io.write_all(chunk).await;
        }
        String::from_utf8(request).unwrap()
    };
    let tunnel = async { tokio::join!(connect(client_io, proxy, authority), respond) };
    let (tunnel_result, request) = tokio::time::timeout(TUNNEL_TIMEOUT, tunnel).await.unwrap();
    (request, tunnel_result)
}

#[tokio::test]
async fn the_request_names_the_host_and_has_the_credentials() {
    let ok: &[&[u8]] = &[b"HTTP/1.1 200 Connection established\r\n\r\n"];
    let (request, tunnel_result) = open_http_tunnel(&proxy(None), &authority(), ok).await;
    assert!(tunnel_result.is_ok());
    assert_eq!(request, "CONNECT api.example:443 HTTP/1.1\r\nhost: api.example:443\r\n\r\n");
    let ipv6_authority = Authority::new(Scheme::Http, "::1", 8080, "/x").unwrap();
    let (request, tunnel_result) = open_http_tunnel(&proxy(ALICE), &ipv6_authority, ok).await;
    assert!(tunnel_result.is_ok());
    assert_eq!(
        request,
        "CONNECT [::1]:8080 HTTP/1.1\r\nhost: [::1]:8080\r\n\
         proxy-authorization: Basic YWxpY2U6aHVudGVyMg==\r\n\r\n"
    );
}

#[tokio::test]
async fn a_tunnel_is_open_after_any_successful_response() {
    for chunks in [
        &[&b"HTTP/1.1 200 OK\r\n\r\n"[..]] as &[&[u8]],
        &[b"HTTP/1.0 200 Connection established\r\nvia: 1.0 proxy\r\n\r\n"],
        &[b"HTTP/1.1 204 No Content\r\ncontent-length: 100\r\n\r\n"],
        &[b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"],
        &[b"HTTP/1.1 103 Wait\r\n\r\nHTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\n"],
        &[b"HT", b"TP/1.1 2", b"00 OK\r\nx: y\r", b"\n\r", b"\n"],
    ] {
        let (_, tunnel_result) = open_http_tunnel(&proxy(None), &authority(), chunks).await;
        assert!(tunnel_result.is_ok(), "the tunnel must be open, but the result is {tunnel_result:?}");
    }
}

/// Compares the error of an attempt with the expected one, and checks that it does not contain the credentials.
#[track_caller]
fn check_error(
    proxy: &ForwardProxy,
    tunnel_result: Result<DuplexStream, ForwardProxyErrorKind>,
    progress: Progress,
    expected: &str,
) {
    let error =
        SendError::connect(ConnectError::Proxy(ForwardProxyError::new(proxy, tunnel_result.unwrap_err())));
    assert_eq!((error.progress, error.to_string().as_str()), (progress, expected));
    let printed_text = format!("{error:?}{error:#?}{error}");
    assert!(
        !printed_text.contains("alice")
            && !printed_text.contains("hunter2")
            && !printed_text.contains("YWxpY2U6"),
        "the error must not contain the credentials"
    );
}

#[tokio::test]
async fn the_error_of_a_refused_authentication_names_the_correction() {
    let challenge = |scheme: &str| {
        format!("HTTP/1.1 407 Proxy Authentication Required\r\nproxy-authenticate: {scheme}\r\n\r\nbody")
    };
    for (credentials, scheme, expected) in [
        (
            None,
            "Basic realm=\"corp\"",
            "the proxy http://proxy.corp:3128 requires a user and a password (407): add them to `proxy`, as in \
             http://USER:PASSWORD@HOST:PORT",
        ),
        (
            ALICE,
            "basic realm=\"corp\"",
            "the proxy http://proxy.corp:3128 refuses the configured user and password (407): correct them in \
             `proxy` or `proxy_file`",
        ),
        (
            ALICE,
            "NTLM",
            "the proxy http://proxy.corp:3128 requires a method of authentication other than Basic (407): run a \
             local proxy that has it, such as Px or Cntlm, and set `proxy` to that",
        ),
    ] {
        let proxy = proxy(credentials);
        let (_, tunnel_result) =
            open_http_tunnel(&proxy, &authority(), &[challenge(scheme).as_bytes()]).await;
        check_error(&proxy, tunnel_result, Progress::ProxyAuthenticationFailed, expected);
    }
    let proxy_with_credentials = proxy(ALICE);
    let (_, tunnel_result) =
        open_http_tunnel(&proxy_with_credentials, &authority(), &[b"HTTP/1.0 401 Unauthorized\r\n\r\n"])
            .await;
    check_error(
        &proxy_with_credentials,
        tunnel_result,
        Progress::ProxyAuthenticationFailed,
        "the proxy http://proxy.corp:3128 refuses the configured user and password (401): correct them in \
         `proxy` or `proxy_file`",
    );
    // The header offers Basic after another challenge.
    let (_, tunnel_result) =
        open_http_tunnel(&proxy(None), &authority(), &[challenge("NTLM, Basic realm=x").as_bytes()]).await;
    assert!(
        matches!(tunnel_result, Err(ForwardProxyErrorKind::CredentialsMissing(_))),
        "the credentials must be missing, but the result is {tunnel_result:?}"
    );
}

#[tokio::test]
async fn a_request_without_a_tunnel_is_unsent() {
    let endless_header = [b"HTTP/1.1 200 OK\r\nx: ".to_vec(), vec![b'y'; MAX_HEAD_BYTES]].concat();
    let many_headers = ["HTTP/1.1 200 OK\r\n", &"x: y\r\n".repeat(MAX_HEADERS + 1), "\r\n"].concat();
    let interim = b"HTTP/1.1 100 Continue\r\n\r\n".repeat(3);
    for (response, expected) in [
        (
            &b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 4\r\n\r\nbody"[..],
            "refused a connection to api.example:443 with status 502 Bad Gateway",
        ),
        (
            b"HTTP/1.1 403 Filtered\r\n\r\n",
            "refused a connection to api.example:443 with status 403 Forbidden",
        ),
        (
            b"HTTP/1.1 302 Found\r\nlocation: http://x/\r\n\r\n",
            "refused a connection to api.example:443 with status 302 Found",
        ),
        (b"", "closed the connection before it responded to CONNECT"),
        (b"HTTP/1.1 200 OK\r\n", "closed the connection before it responded to CONNECT"),
        (&interim, "closed the connection before it responded to CONNECT"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "sent a malformed response to CONNECT"),
        (b"\x05\x00\x00\x01", "sent a malformed response to CONNECT"),
        (b"HTTP/1.1 2000 OK\r\n\r\n", "sent a malformed response to CONNECT"),
        (b"HTTP/1.1 099 Low\r\n\r\n", "sent a malformed response to CONNECT"),
        (&endless_header, "responded to CONNECT with more than 16384 bytes or 64 headers"),
        (many_headers.as_bytes(), "responded to CONNECT with more than 16384 bytes or 64 headers"),
    ] {
        let proxy = proxy(ALICE);
        let chunks: Vec<&[u8]> = response.chunks(1000).collect();
        let (_, tunnel_result) = open_http_tunnel(&proxy, &authority(), &chunks).await;
        check_error(
            &proxy,
            tunnel_result,
            Progress::Unsent,
            &format!("the proxy http://proxy.corp:3128 {expected}"),
        );
    }
}

#[tokio::test]
async fn bytes_of_the_proxy_are_not_taken_for_bytes_of_the_provider() {
    let response: &[u8] = b"HTTP/1.1 200 OK\r\n\r\nHTTP/1.1 200 OK\r\n\r\n";
    let proxy = proxy(ALICE);
    let (_, tunnel_result) = open_http_tunnel(&proxy, &authority(), &[response]).await;
    check_error(
        &proxy,
        tunnel_result,
        Progress::Unsent,
        "the proxy http://proxy.corp:3128 sent data after its response to CONNECT, before the provider could",
    );
}

proptest::proptest! {
    #[test]
    fn any_response_of_a_proxy_is_read_without_a_panic(
        start in proptest::option::of("HTTP/1\\.[01] (1|2|4)[0-9]{2} .{0,9}\r\n"),
        bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200),
    ) {
        let response = [start.unwrap_or_default().into_bytes(), bytes].concat();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let (proxy, authority) = (proxy(None), authority());
        let _ = runtime.block_on(open_http_tunnel(&proxy, &authority, &[&response]));
        let mut socks = readable_stream(&response);
        let _ = runtime.block_on(async { connect_socks(&mut socks, &proxy, &authority).await.map(drop) });
    }
}

/// Returns a stream whose reads return `response`, and whose writes succeed.
fn readable_stream(response: &[u8]) -> impl AsyncRead + AsyncWrite + Unpin + use<> {
    tokio::io::join(std::io::Cursor::new(response.to_vec()), tokio::io::sink())
}

/// Opens a tunnel by SOCKS5 through a proxy that responds to each message with the next of `responses`.
async fn open_socks_tunnel(
    proxy: &ForwardProxy,
    responses: &[&[u8]],
) -> (Vec<u8>, Result<DuplexStream, ForwardProxyErrorKind>) {
    let (client_io, mut proxy_io) = tokio::io::duplex(1024);
    let respond = async move {
        let mut received_bytes = Vec::new();
        for response in responses {
            proxy_io.read_buf(&mut received_bytes).await.unwrap();
            let _ = proxy_io.write_all(response).await;
        }
        received_bytes
    };
    let authority = authority();
    let tunnel = async { tokio::join!(connect_socks(client_io, proxy, &authority), respond) };
    let (tunnel_result, received_bytes) = tokio::time::timeout(TUNNEL_TIMEOUT, tunnel).await.unwrap();
    (received_bytes, tunnel_result)
}

fn contains(bytes: &[u8], pattern: &[u8]) -> bool {
    bytes.windows(pattern.len()).any(|window| window == pattern)
}

// The messages of a SOCKS5 proxy (RFC 1928 and RFC 1929).
const NO_AUTHENTICATION: &[u8] = &[5, 0];
const PASSWORD_METHOD: &[u8] = &[5, 2];
const NO_ACCEPTABLE_METHOD: &[u8] = &[5, 0xff];
const PASSWORD_ACCEPTED: &[u8] = &[1, 0];
const PASSWORD_REFUSED: &[u8] = &[1, 1];
const OPEN: &[u8] = &[5, 0, 0, 1, 127, 0, 0, 1, 0x1f, 0x90];
const HOST_UNREACHABLE: &[u8] = &[5, 4, 0, 1, 0, 0, 0, 0, 0, 0];

#[tokio::test]
async fn a_socks_proxy_receives_the_host_name_and_the_credentials() {
    let (received_bytes, tunnel_result) = open_socks_tunnel(&proxy(None), &[NO_AUTHENTICATION, OPEN]).await;
    assert!(tunnel_result.is_ok(), "the tunnel must be open, but the result is {tunnel_result:?}");
    assert!(
        contains(&received_bytes, b"\x03\x0bapi.example\x01"),
        "the proxy must receive the host name, but it receives {received_bytes:?}"
    );
    let (received_bytes, tunnel_result) =
        open_socks_tunnel(&proxy(ALICE), &[PASSWORD_METHOD, PASSWORD_ACCEPTED, OPEN]).await;
    assert!(tunnel_result.is_ok(), "the tunnel must be open, but the result is {tunnel_result:?}");
    assert!(
        contains(&received_bytes, b"\x01\x05alice\x07hunter2"),
        "the proxy must receive the credentials, but it receives {received_bytes:?}"
    );
}

#[tokio::test]
async fn the_error_of_a_socks_proxy_names_its_cause() {
    const PREFIX: &str = "the proxy http://proxy.corp:3128 ";
    for (credentials, responses, progress, expected) in [
        (
            None,
            &[NO_ACCEPTABLE_METHOD] as &[&[u8]],
            Progress::ProxyAuthenticationFailed,
            "requires a user and a password (SOCKS5): add them to `proxy`, as in http://USER:PASSWORD@HOST:PORT",
        ),
        (
            ALICE,
            &[PASSWORD_METHOD, PASSWORD_REFUSED],
            Progress::ProxyAuthenticationFailed,
            "refuses the configured user and password (SOCKS5): correct them in `proxy` or `proxy_file`",
        ),
        (
            None,
            &[NO_AUTHENTICATION, HOST_UNREACHABLE],
            Progress::Unsent,
            "opened no connection by SOCKS5: Host unreachable",
        ),
    ] {
        let proxy = proxy(credentials);
        let (_, tunnel_result) = open_socks_tunnel(&proxy, responses).await;
        check_error(&proxy, tunnel_result, progress, &format!("{PREFIX}{expected}"));
    }
}

//! Header sanitizing: removes client credentials, hop-by-hop headers, and headers in which proxies or the
//! provider describe their networks.
//!
//! No credential of a client reaches the upstream, no header of one connection reaches the next, and
//! neither side's network details reach the other. `table` lists every header that is not passed through
//! unchanged.

mod encoding;
mod forward;
mod kind;
mod present;
mod table;

use std::borrow::Cow;

use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Method, Uri, Version};

pub use encoding::content_encoding;
use forward::drop_rows;
pub use forward::{Forwarded, why_not_forwarded};
pub use kind::{forbid_sniffing, is_searched};
use present::{KnownHeader, PresentHeaders};

/// Headers in which a client may present a credential, in the order in which they are examined.
/// `xi_api_key` is not a header of the provider; a client that sends it intends `xi-api-key`.
const CREDENTIALS: [KnownHeader; 6] = [
    KnownHeader::TOKEN,
    KnownHeader::KEY,
    KnownHeader::KEY_UNDERSCORED,
    KnownHeader::AUTHORIZATION,
    KnownHeader::PROXY_AUTHORIZATION,
    KnownHeader::COOKIE,
];

/// The header for a client's token when `xi-api-key` carries the client's own key.
pub const TOKEN_HEADER: HeaderName = HeaderName::from_static("x-keychoir-token");

/// Query parameters in which a client may present a credential. The provider's own short-lived `token`,
/// `single_use_token` and `conversation_signature` are not among them: they are forwarded.
const CREDENTIAL_PARAMETERS: [&str; 3] = ["xi_api_key", "xi-api-key", "authorization"];

/// The WebSocket subprotocols. Browsers can present a token only as a subprotocol `bearer.…`
/// (`@elevenlabs/client`).
const SUBPROTOCOLS: HeaderName = header::SEC_WEBSOCKET_PROTOCOL;
const BEARER: &str = "bearer.";

/// Headers that a `Connection` header may not remove: they frame the message or name its destination.
const PROTECTED: [HeaderName; 2] = [header::CONTENT_LENGTH, header::HOST];

/// Whether a request names its host exactly once (RFC 9112, section 3.2): one `Host`, and an absolute
/// target with the same host. HTTP/1.0 had no `Host`.
#[must_use]
pub fn has_one_host(version: Version, target: &Uri, headers: &HeaderMap) -> bool {
    let mut hosts = headers.get_all(header::HOST).iter();
    let (host, is_doubled) = (hosts.next(), hosts.next().is_some());
    let is_same = |host: &HeaderValue| match (target.authority(), host.to_str()) {
        (None, written) => written.is_ok(),
        (Some(authority), Ok(written)) => authority.as_str().eq_ignore_ascii_case(written),
        (Some(_), Err(_)) => false,
    };
    match host {
        _ if is_doubled => false,
        Some(host) => is_same(host),
        None => version < Version::HTTP_11 && target.authority().is_none(),
    }
}

/// Prepares the headers of a request for the upstream: removes credentials, hop-by-hop headers and those
/// headers of proxies about the client that are not in `forwarded`, and offers only encodings that can be
/// decoded. `Host` is removed as well; the upstream request sets its own.
pub fn strip_request(headers: &mut HeaderMap, forwarded: &Forwarded) {
    let present = PresentHeaders::of(headers);
    strip_listed(headers, present);
    forwarded.strip(headers, present);
    if present.has(KnownHeader::ACCEPT_ENCODING) {
        encoding::offer_readable(headers);
    }
    if present.has(KnownHeader::SUBPROTOCOLS) {
        strip_subprotocols(headers);
    }
}

/// Removes the subprotocols that are credentials; the others keep their order.
fn strip_subprotocols(headers: &mut HeaderMap) {
    if !subprotocols(headers).any(is_bearer) {
        return;
    }
    let remaining: Vec<&str> = subprotocols(headers).filter(|name| !is_bearer(name)).collect();
    match HeaderValue::from_str(&remaining.join(", ")) {
        Ok(value) if !remaining.is_empty() => headers.insert(SUBPROTOCOLS, value),
        Ok(_) | Err(_) => headers.remove(SUBPROTOCOLS),
    };
}

fn subprotocols(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    let values = headers.get_all(SUBPROTOCOLS).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).map(str::trim)
}

fn is_bearer(subprotocol: &str) -> bool {
    subprotocol.get(..BEARER.len()).is_some_and(|start| start.eq_ignore_ascii_case(BEARER))
}

/// Whether a request is a WebSocket upgrade (RFC 6455, section 4.1). Upgrades to other protocols are
/// ignored, as a server may do (RFC 9110, section 7.8).
#[must_use]
pub fn is_websocket_upgrade(method: &Method, version: Version, headers: &HeaderMap) -> bool {
    let lists = |name: HeaderName, word: &str| {
        let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
        values.flat_map(|value| value.split(',')).any(|one| one.trim().eq_ignore_ascii_case(word))
    };
    method == Method::GET
        && version == Version::HTTP_11
        && lists(header::UPGRADE, "websocket")
        && lists(header::CONNECTION, "upgrade")
}

/// Adds the upgrade headers for the upstream, which were removed as hop-by-hop headers. When the proxy
/// parses messages (`is_parsed`), no compression is offered.
pub fn request_websocket(headers: &mut HeaderMap, is_parsed: bool) {
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    if is_parsed {
        headers.remove(header::SEC_WEBSOCKET_EXTENSIONS);
    }
}

/// Prepares the headers of a 101 for the client.
pub fn strip_switched(headers: &mut HeaderMap) {
    strip_response(headers);
    headers.remove(header::CONTENT_LENGTH);
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
}

/// Prepares the headers of a response for the client: removes hop-by-hop headers and headers about the
/// provider's own origin, and adds a sandbox policy to documents whose scripts a browser would execute.
pub fn strip_response(headers: &mut HeaderMap) {
    let present = PresentHeaders::of(headers);
    // With both headers, the chunked framing applies (RFC 9112, section 6.3).
    if present.has(KnownHeader::TRANSFER_ENCODING) {
        headers.remove(header::CONTENT_LENGTH);
    }
    strip_listed(headers, present);
    drop_rows(headers, present.and(PresentHeaders::OF_ORIGIN), &[]);
    kind::sandbox(headers);
}

/// Removes the headers that a `Connection` header lists.
fn strip_listed(headers: &mut HeaderMap, present: PresentHeaders) {
    if present.has(KnownHeader::CONNECTION) {
        for name in listed(headers) {
            headers.remove(name);
        }
    }
}

/// The headers that a `Connection` header lists, without the protected ones.
fn listed(headers: &HeaderMap) -> Vec<HeaderName> {
    let values = headers.get_all(header::CONNECTION).iter().filter_map(|value| value.to_str().ok());
    values
        // The most common value, which lists nothing to remove.
        .filter(|value| !value.eq_ignore_ascii_case("keep-alive"))
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .filter(|name| !PROTECTED.contains(name))
        .collect()
}

/// The query without its credentials; every other byte and the order stay. `None` when nothing is left.
#[must_use]
pub fn strip_query(query: &str) -> Option<Cow<'_, str>> {
    if !query.split('&').any(is_credential) {
        return Some(Cow::Borrowed(query));
    }
    let remaining: Vec<&str> = query.split('&').filter(|pair| !is_credential(pair)).collect();
    (!remaining.is_empty()).then(|| Cow::Owned(remaining.join("&")))
}

/// A credential of a request, decoded and never empty.
#[derive(Clone, PartialEq, Eq)]
pub enum Presented<'a> {
    /// From `x-keychoir-token`, which carries only Keychoir's own tokens.
    Token(&'a str),
    /// From `xi-api-key` and the like, where the provider's SDKs put a key.
    Key(Cow<'a, str>),
    /// From any other header, parameter or subprotocol.
    Other(Cow<'a, str>),
}

impl Presented<'_> {
    /// The credential as text.
    #[must_use]
    pub fn text(&self) -> &str {
        match self {
            Self::Token(text) => text,
            Self::Key(text) | Self::Other(text) => text,
        }
    }
}

/// All credentials of a request, from headers, subprotocols and query.
pub fn presented<'a>(headers: &'a HeaderMap, query: Option<&'a str>) -> impl Iterator<Item = Presented<'a>> {
    let present = PresentHeaders::of(headers);
    let in_headers = CREDENTIALS.into_iter().filter(move |known| present.has(*known)).flat_map(|known| {
        let values = headers.get_all(known.name()).iter().filter_map(|value| value.to_str().ok());
        values.map(move |value| in_header(known, value.trim()))
    });
    let subprotocol_values = present.has(KnownHeader::SUBPROTOCOLS).then(|| subprotocols(headers));
    let in_subprotocols = subprotocol_values.into_iter().flatten().filter(|name| is_bearer(name));
    let in_subprotocols =
        in_subprotocols.map(|token| Presented::Other(token.get(BEARER.len()..).unwrap_or_default().into()));
    let pairs = query.into_iter().flat_map(|query| query.split('&')).filter_map(|pair| pair.split_once('='));
    let in_query = pairs.filter_map(|(name, value)| in_parameter(credential_parameter(name)?, value));
    let all = in_headers.chain(in_subprotocols).chain(in_query);
    all.filter(|credential| !credential.text().is_empty())
}

/// Whether a key header has a value that is not visible ASCII; [`presented`] does not return such a
/// value.
pub(super) fn has_unreadable_key(headers: &HeaderMap) -> bool {
    let names = [KnownHeader::KEY, KnownHeader::KEY_UNDERSCORED].map(KnownHeader::name);
    names.iter().any(|name| headers.get_all(*name).iter().any(|value| value.to_str().is_err()))
}

fn in_header(known: KnownHeader, value: &str) -> Presented<'_> {
    match value.split_once(' ') {
        Some((scheme, token))
            if known == KnownHeader::AUTHORIZATION && scheme.eq_ignore_ascii_case("bearer") =>
        {
            Presented::Other(token.trim().into())
        }
        _ if known == KnownHeader::TOKEN => Presented::Token(value),
        _ if known == KnownHeader::KEY || known == KnownHeader::KEY_UNDERSCORED => {
            Presented::Key(value.into())
        }
        _ => Presented::Other(value.into()),
    }
}

fn in_parameter<'a>(name: &'static str, value: &'a str) -> Option<Presented<'a>> {
    let value = match decode(value) {
        Cow::Borrowed(plain) => Cow::Borrowed(plain.trim()),
        Cow::Owned(decoded) => Cow::Owned(decoded.trim().to_owned()),
    };
    Some(match value.strip_prefix("Bearer ") {
        Some(token) => Presented::Other(Cow::Owned(token.to_owned())),
        None if name == "authorization" => Presented::Other(value),
        None => Presented::Key(value),
    })
}

/// The names of the query's parameters, for logs: values may contain texts or tokens, names do not.
#[must_use]
pub fn parameter_names(query: &str) -> String {
    let mut names = String::new();
    for (index, pair) in query.split('&').take(20).enumerate() {
        if index > 0 {
            names.push(',');
        }
        let name = pair.split('=').next().unwrap_or_default();
        let name = decode(name);
        let is_plain =
            |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.' | b'[' | b']');
        names.extend(name.bytes().filter(is_plain).take(40).map(char::from));
    }
    names
}

/// The value of the first parameter of that name, decoded.
#[must_use]
pub fn parameter(query: Option<&str>, name: &str) -> Option<String> {
    let mut pairs = query.unwrap_or_default().split('&').filter_map(|pair| pair.split_once('='));
    pairs.find(|(written, _)| decode(written) == name).map(|(_, value)| decode(value).into_owned())
}

fn is_credential(pair: &str) -> bool {
    credential_parameter(pair.split('=').next().unwrap_or_default()).is_some()
}

/// The credential parameter with this name, which is decoded first.
fn credential_parameter(name: &str) -> Option<&'static str> {
    let name = decode(name);
    CREDENTIAL_PARAMETERS.into_iter().find(|credential| name.trim().eq_ignore_ascii_case(credential))
}

/// Percent and plus decoding. Invalid escapes are kept, as a server may do.
pub(crate) fn decode(text: &str) -> Cow<'_, str> {
    let bytes = text.as_bytes();
    let Some(plain) = memchr::memchr2(b'%', b'+', bytes) else { return Cow::Borrowed(text) };
    let mut decoded = Vec::with_capacity(bytes.len());
    decoded.extend_from_slice(&bytes[..plain]);
    let mut at = plain;
    while let Some(&byte) = bytes.get(at) {
        let escaped = (byte == b'%').then(|| hex_pair(bytes.get(at + 1..at + 3)?)).flatten();
        match (byte, escaped) {
            (_, Some(value)) => {
                decoded.push(value);
                at += 3;
            }
            (b'+', None) => {
                decoded.push(b' ');
                at += 1;
            }
            (other, None) => {
                decoded.push(other);
                at += 1;
            }
        }
    }
    Cow::Owned(match String::from_utf8(decoded) {
        Ok(text) => text,
        Err(error) => String::from_utf8_lossy(error.as_bytes()).into_owned(),
    })
}

/// The byte of two hexadecimal digits.
pub(super) fn hex_pair(pair: &[u8]) -> Option<u8> {
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let (high, low) = (digit(*pair.first()?)?, digit(*pair.get(1)?)?);
    u8::try_from(high * 16 + low).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in pairs {
            map.append(*name, value.parse().unwrap());
        }
        map
    }

    #[track_caller]
    fn check_host(version: Version, target: &str, hosts: &[&'static str], expected: bool) {
        let pairs: Vec<(&'static str, &'static str)> = hosts.iter().map(|host| ("host", *host)).collect();
        assert_eq!(has_one_host(version, &target.parse().unwrap(), &headers(&pairs)), expected);
    }

    #[test]
    fn a_request_names_one_host() {
        check_host(Version::HTTP_11, "/v1/x", &["localhost:11011"], true);
        check_host(Version::HTTP_11, "/v1/x", &[], false);
        check_host(Version::HTTP_11, "/v1/x", &["a", "a"], false);
        check_host(Version::HTTP_11, "http://localhost:1/v1/x", &["LOCALHOST:1"], true);
        check_host(Version::HTTP_11, "http://localhost:1/v1/x", &["localhost"], false);
        check_host(Version::HTTP_11, "http://elsewhere/v1/x", &["localhost"], false);
        check_host(Version::HTTP_10, "/v1/x", &[], true);
        check_host(Version::HTTP_10, "http://elsewhere/v1/x", &[], false);
        check_host(Version::HTTP_10, "/v1/x", &["a", "b"], false);
    }

    #[track_caller]
    fn check_request(received: &[(&'static str, &'static str)], expected: &[(&'static str, &'static str)]) {
        let mut map = headers(received);
        strip_request(&mut map, &Forwarded::default());
        assert_eq!(map, headers(expected));
    }

    #[test]
    fn no_credential_is_forwarded() {
        check_request(
            &[
                ("xi-api-key", "a"),
                ("xi-api-key", "b"),
                ("xi_api_key", "c"),
                ("x-keychoir-token", "g"),
                ("authorization", "Bearer d"),
                ("proxy-authorization", "e"),
                ("cookie", "f=g"),
                ("accept", "*/*"),
            ],
            &[("accept", "*/*")],
        );
    }

    #[test]
    fn headers_listed_in_connection_are_removed() {
        check_request(
            &[
                ("connection", "close, X-Mine"),
                ("connection", "x-more"),
                ("x-mine", "1"),
                ("x-more", "2"),
                ("x-other", "3"),
            ],
            &[("x-other", "3")],
        );
    }

    #[test]
    fn the_connection_header_cannot_remove_the_framing() {
        check_request(
            &[("connection", "content-length, host, xi-api-key, no name"), ("content-length", "5")],
            &[("content-length", "5")],
        );
    }

    #[test]
    fn hop_by_hop_headers_are_removed() {
        check_request(
            &[
                ("host", "localhost"),
                ("te", "trailers"),
                ("transfer-encoding", "chunked"),
                ("keep-alive", "timeout=5"),
                ("upgrade", "h2c"),
                ("trailer", "x"),
                ("proxy-connection", "keep-alive"),
                ("expect", "100-continue"),
                ("x-request-id", "kept"),
            ],
            &[("x-request-id", "kept")],
        );
    }

    #[test]
    fn a_response_keeps_all_but_its_hop_by_hop_headers() {
        let mut map = headers(&[
            ("connection", "x-a"),
            ("x-a", "1"),
            ("link", "a"),
            ("link", "b"),
            ("content-type", "audio/mpeg"),
            ("transfer-encoding", "chunked"),
        ]);
        strip_response(&mut map);
        assert_eq!(map, headers(&[("link", "a"), ("link", "b"), ("content-type", "audio/mpeg")]));
    }

    #[test]
    fn a_response_with_two_framings_loses_its_content_length() {
        let kind = ("content-type", "audio/mpeg");
        let mut map = headers(&[("content-length", "2"), ("transfer-encoding", "chunked"), kind]);
        strip_response(&mut map);
        assert_eq!(map, headers(&[kind]));
    }

    #[track_caller]
    fn check_query(received: &str, expected: Option<&str>) {
        assert_eq!(strip_query(received).as_deref(), expected);
    }

    #[test]
    fn a_query_keeps_every_other_byte_and_its_order() {
        check_query("a=1&xi_api_key=k&a=2&b=%20+x", Some("a=1&a=2&b=%20+x"));
        check_query("a=1&a=1&=&&x", Some("a=1&a=1&=&&x"));
        check_query(
            "token=t&single_use_token=s&conversation_signature=c",
            Some("token=t&single_use_token=s&conversation_signature=c"),
        );
        check_query("", Some(""));
    }

    #[test]
    fn credentials_are_found_in_every_spelling() {
        check_query("XI-API-KEY=k", None);
        check_query("xi%5fapi%5Fkey=k", None);
        check_query("authorization", None);
        check_query("%61uthorization=Bearer%20k&x=1", Some("x=1"));
        check_query("xi_api_key%00=k", Some("xi_api_key%00=k"));
        let nothing = HeaderMap::new();
        let credentials =
            presented(&nothing, Some("authorization=Bearer%20k&xi_api_key=&x=1&Xi%2DApi-Key=j"));
        assert!(credentials.eq([Presented::Other("k".into()), Presented::Key("j".into())]));
    }

    #[track_caller]
    fn check_subprotocols(received: &[&'static str], remaining: Option<&str>, token: Option<&str>) {
        let pairs: Vec<(&'static str, &'static str)> =
            received.iter().map(|value| ("sec-websocket-protocol", *value)).collect();
        let mut headers = headers(&pairs);
        let credentials: Vec<Presented<'_>> = presented(&headers, None).collect();
        assert_eq!(credentials.first().map(Presented::text), token);
        strip_request(&mut headers, &Forwarded::default());
        let values: Vec<&str> =
            headers.get_all(SUBPROTOCOLS).iter().map(|value| value.to_str().unwrap()).collect();
        assert_eq!(values, Vec::from_iter(remaining));
    }

    #[test]
    fn a_bearer_among_subprotocols_is_a_credential() {
        check_subprotocols(&["convai"], Some("convai"), None);
        check_subprotocols(&["convai,bearer.tok"], Some("convai"), Some("tok"));
        check_subprotocols(&["convai", "Bearer.tok, x"], Some("convai, x"), Some("tok"));
        check_subprotocols(&["bearer.tok"], None, Some("tok"));
        check_subprotocols(&["bearers"], Some("bearers"), None);
    }

    #[track_caller]
    fn check_websocket(
        method: &Method,
        version: Version,
        pairs: &[(&'static str, &'static str)],
        expected: bool,
    ) {
        assert_eq!(is_websocket_upgrade(method, version, &headers(pairs)), expected, "{pairs:?}");
    }

    #[test]
    fn a_websocket_request_has_two_headers() {
        let both = [("connection", "keep-alive, Upgrade"), ("upgrade", "WebSocket")];
        check_websocket(&Method::GET, Version::HTTP_11, &both, true);
        check_websocket(&Method::POST, Version::HTTP_11, &both, false);
        check_websocket(&Method::GET, Version::HTTP_10, &both, false);
        check_websocket(&Method::GET, Version::HTTP_11, &both[..1], false);
        check_websocket(&Method::GET, Version::HTTP_11, &both[1..], false);
        check_websocket(
            &Method::GET,
            Version::HTTP_11,
            &[("connection", "upgrade, http2-settings"), ("upgrade", "h2c")],
            false,
        );
    }

    #[test]
    fn parameter_names_contain_no_values() {
        assert_eq!(
            parameter_names("output_format=mp3&xi_api_key=secret&%0a%1b[31mx=1"),
            "output_format,xi_api_key,[31mx"
        );
    }

    #[test]
    fn malformed_escapes_are_kept() {
        for (text, expected) in
            [("%", "%"), ("%4", "%4"), ("%zz", "%zz"), ("%41%", "A%"), ("%ff", "\u{fffd}")]
        {
            assert_eq!(decode(text), expected);
        }
    }
}

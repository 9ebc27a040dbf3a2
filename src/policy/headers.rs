//! Sanitizes headers and queries: removes client credentials, hop-by-hop headers, headers in which proxies in front of
//! Keychoir describe the client, and headers about the provider's origin. Also finds the credentials and the end user
//! that a client sends, checks that a request names one host, recognizes and prepares WebSocket upgrades, decodes
//! parameters, and lists their names for logs.
//!
//! The table in `table` lists every header that is not forwarded unchanged.

mod content_type;
mod encoding;
mod forward;
mod present;
mod table;

use std::borrow::Cow;

use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Method, Uri, Version};

pub use content_type::{forbid_sniffing, is_searched};
pub use encoding::content_encoding;
use forward::remove_rows;
pub use forward::{ForwardedHeaders, unforwardable_reason};
use present::{KnownHeader, PresentHeaders};

/// Headers in which a client may send a credential, in the order in which they are examined. The provider does not
/// define `xi_api_key`. A client that sends it means `xi-api-key`.
const CREDENTIALS: [KnownHeader; 6] = [
    KnownHeader::TOKEN,
    KnownHeader::KEY,
    KnownHeader::KEY_UNDERSCORED,
    KnownHeader::AUTHORIZATION,
    KnownHeader::PROXY_AUTHORIZATION,
    KnownHeader::COOKIE,
];

/// The header for a client token if `xi-api-key` contains the client's own provider key.
pub const TOKEN_HEADER: HeaderName = HeaderName::from_static("x-keychoir-token");

/// The header and the query parameter in which a client names its end user. Browsers cannot set headers of a
/// WebSocket handshake, so they use the parameter.
pub const USER_HEADER: HeaderName = HeaderName::from_static("x-keychoir-user");

/// Query parameters in which a client may send a credential. The provider's short-lived `token`,
/// `single_use_token` and `conversation_signature` are not listed, because they must be forwarded.
const CREDENTIAL_PARAMETERS: [&str; 3] = ["xi_api_key", "xi-api-key", "authorization"];

/// The header that lists WebSocket subprotocols. A browser can send a token only as a subprotocol, for which
/// `@elevenlabs/client` uses the form `bearer.…`.
const SUBPROTOCOLS: HeaderName = header::SEC_WEBSOCKET_PROTOCOL;
/// The prefix of a subprotocol that is a token.
const BEARER: &str = "bearer.";

/// Headers that a `Connection` header must not remove, because they frame the message or name its host.
const PROTECTED: [HeaderName; 2] = [header::CONTENT_LENGTH, header::HOST];

/// Whether a request names exactly one host (RFC 9112, section 3.2): it contains one `Host` header, and an
/// absolute target names the same host. An HTTP/1.0 request may name no host.
#[must_use]
pub fn has_one_host(version: Version, target: &Uri, headers: &HeaderMap) -> bool {
    let mut hosts = headers.get_all(header::HOST).iter();
    match (hosts.next(), hosts.next()) {
        (Some(host), None) => host.to_str().is_ok_and(|host| {
            target.authority().is_none_or(|authority| authority.as_str().eq_ignore_ascii_case(host))
        }),
        (None, _) => version < Version::HTTP_11 && target.authority().is_none(),
        (Some(_), Some(_)) => false,
    }
}

/// Prepares the headers of a request for the upstream. Removes credentials, hop-by-hop headers, `Host`, and
/// the headers of proxies that are not in `forwarded`. Offers only encodings that Keychoir can decode.
pub fn strip_request(headers: &mut HeaderMap, forwarded: &ForwardedHeaders) {
    let present = PresentHeaders::in_headers(headers);
    strip_connection_listed(headers, present);
    forwarded.strip(headers, present);
    if present.contains(KnownHeader::ACCEPT_ENCODING) {
        encoding::restrict_accept_encoding(headers);
    }
    if present.contains(KnownHeader::SUBPROTOCOLS) {
        strip_subprotocols(headers);
    }
}

/// Removes the subprotocols that are credentials. The remaining subprotocols keep their order.
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
    list_elements(headers, SUBPROTOCOLS)
}

/// Returns the elements of a header whose value is a comma-separated list.
fn list_elements(headers: &HeaderMap, name: HeaderName) -> impl Iterator<Item = &str> {
    let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).map(str::trim)
}

fn is_bearer(subprotocol: &str) -> bool {
    subprotocol.get(..BEARER.len()).is_some_and(|start| start.eq_ignore_ascii_case(BEARER))
}

/// Whether a request is a WebSocket upgrade (RFC 6455, section 4.1). Upgrades to other protocols are
/// ignored, which RFC 9110 permits in section 7.8.
#[must_use]
pub fn is_websocket_upgrade(method: &Method, version: Version, headers: &HeaderMap) -> bool {
    let contains = |name: HeaderName, token: &str| {
        list_elements(headers, name).any(|element| element.eq_ignore_ascii_case(token))
    };
    method == Method::GET
        && version == Version::HTTP_11
        && contains(header::UPGRADE, "websocket")
        && contains(header::CONNECTION, "upgrade")
}

/// Adds the upgrade headers to an upstream request, from which they were removed as hop-by-hop headers. If
/// Keychoir parses the messages (`is_parsed`), compression is not offered.
pub fn prepare_upgrade_request(headers: &mut HeaderMap, is_parsed: bool) {
    insert_upgrade(headers);
    if is_parsed {
        headers.remove(header::SEC_WEBSOCKET_EXTENSIONS);
    }
}

/// Prepares the headers of a `101 Switching Protocols` response for the client.
pub fn prepare_upgrade_response(headers: &mut HeaderMap) {
    strip_response(headers);
    headers.remove(header::CONTENT_LENGTH);
    insert_upgrade(headers);
}

/// Inserts the headers of an upgrade to a WebSocket.
fn insert_upgrade(headers: &mut HeaderMap) {
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
}

/// Prepares the headers of a response for the client. Removes hop-by-hop headers and headers about the
/// provider's origin. Adds a sandbox policy to documents in which a browser would execute scripts.
pub fn strip_response(headers: &mut HeaderMap) {
    let present = PresentHeaders::in_headers(headers);
    // `Transfer-Encoding` overrides `Content-Length` (RFC 9112, section 6.3).
    if present.contains(KnownHeader::TRANSFER_ENCODING) {
        headers.remove(header::CONTENT_LENGTH);
    }
    strip_connection_listed(headers, present);
    remove_rows(headers, present.and(PresentHeaders::SENT_BY_ORIGIN), &[]);
    content_type::sandbox_scripts(headers);
}

/// Removes the headers that a `Connection` header lists.
fn strip_connection_listed(headers: &mut HeaderMap, present: PresentHeaders) {
    if present.contains(KnownHeader::CONNECTION) {
        for name in connection_listed(headers) {
            headers.remove(name);
        }
    }
}

/// Returns the headers that a `Connection` header lists, except the [`PROTECTED`] ones.
fn connection_listed(headers: &HeaderMap) -> Vec<HeaderName> {
    list_elements(headers, header::CONNECTION)
        // `Keep-Alive` is the most common element. It is removed by its own row of the table, so it needs no parsing.
        .filter(|element| !element.eq_ignore_ascii_case("keep-alive"))
        .filter_map(|name| name.parse().ok())
        .filter(|name| !PROTECTED.contains(name))
        .collect()
}

/// Removes the credentials and the end user from a query. All other bytes and their order are unchanged.
/// Returns `None` if no parameter remains.
#[must_use]
pub fn strip_query(query: &str) -> Option<Cow<'_, str>> {
    if !query.split('&').any(is_removed) {
        return Some(Cow::Borrowed(query));
    }
    let remaining: Vec<&str> = query.split('&').filter(|pair| !is_removed(pair)).collect();
    (!remaining.is_empty()).then(|| Cow::Owned(remaining.join("&")))
}

/// A credential that a client sent with a request, decoded and never empty.
#[derive(Clone, PartialEq, Eq)]
pub enum PresentedCredential<'a> {
    /// A credential from `x-keychoir-token`, which contains only Keychoir's own tokens.
    Token(&'a str),
    /// A credential from `xi-api-key` in any spelling, where the provider's SDKs send a key.
    Key(Cow<'a, str>),
    /// A credential from any other header, parameter or subprotocol, or from a parameter whose value starts with
    /// `Bearer `.
    Other(Cow<'a, str>),
}

impl PresentedCredential<'_> {
    /// Returns the value of the credential.
    #[must_use]
    pub fn as_str(&self) -> &str {
        match self {
            Self::Token(value) => value,
            Self::Key(value) | Self::Other(value) => value,
        }
    }
}

/// Returns all credentials of a request, from its headers, subprotocols and query.
pub fn presented_credentials<'a>(
    headers: &'a HeaderMap,
    query: Option<&'a str>,
) -> impl Iterator<Item = PresentedCredential<'a>> {
    let present = PresentHeaders::in_headers(headers);
    let in_headers =
        CREDENTIALS.into_iter().filter(move |known| present.contains(*known)).flat_map(|known| {
            let values = headers.get_all(known.name()).iter().filter_map(|value| value.to_str().ok());
            values.map(move |value| credential_in_header(known, value.trim()))
        });
    let subprotocols = present.contains(KnownHeader::SUBPROTOCOLS).then(|| subprotocols(headers));
    let bearers = subprotocols.into_iter().flatten().filter(|name| is_bearer(name));
    let in_subprotocols = bearers
        .map(|bearer| PresentedCredential::Other(bearer.get(BEARER.len()..).unwrap_or_default().into()));
    let pairs = query.into_iter().flat_map(|query| query.split('&')).filter_map(|pair| pair.split_once('='));
    let in_query =
        pairs.filter_map(|(name, value)| credential_in_parameter(credential_parameter(name)?, value));
    let all_credentials = in_headers.chain(in_subprotocols).chain(in_query);
    all_credentials.filter(|credential| !credential.as_str().is_empty())
}

/// Whether a key header has a value that is not visible ASCII, which [`presented_credentials`] skips.
pub(super) fn has_unreadable_key(headers: &HeaderMap) -> bool {
    let names = [KnownHeader::KEY, KnownHeader::KEY_UNDERSCORED].map(KnownHeader::name);
    names.iter().any(|name| headers.get_all(*name).iter().any(|value| value.to_str().is_err()))
}

fn credential_in_header(known: KnownHeader, value: &str) -> PresentedCredential<'_> {
    match known {
        KnownHeader::TOKEN => PresentedCredential::Token(value),
        KnownHeader::KEY | KnownHeader::KEY_UNDERSCORED => PresentedCredential::Key(value.into()),
        KnownHeader::AUTHORIZATION => {
            let bearer = value.split_once(' ').filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
            PresentedCredential::Other(bearer.map_or(value, |(_, token)| token.trim()).into())
        }
        _ => PresentedCredential::Other(value.into()),
    }
}

fn credential_in_parameter<'a>(name: &'static str, value: &'a str) -> Option<PresentedCredential<'a>> {
    let value = match decode_parameter(value) {
        Cow::Borrowed(value) => Cow::Borrowed(value.trim()),
        Cow::Owned(decoded) => Cow::Owned(decoded.trim().to_owned()),
    };
    Some(match value.strip_prefix("Bearer ") {
        Some(token) => PresentedCredential::Other(Cow::Owned(token.to_owned())),
        None if name == "authorization" => PresentedCredential::Other(value),
        None => PresentedCredential::Key(value),
    })
}

/// Maximum number of parameters whose names are logged, which bounds the length of the log line.
const MAX_LOGGED_PARAMETERS: usize = 20;
/// Maximum length of a logged name, which also bounds the length of the log line.
const MAX_LOGGED_NAME_LENGTH: usize = 40;

/// Returns the names of the query parameters for the log. Their values may contain user text or tokens.
#[must_use]
pub fn parameter_names(query: &str) -> String {
    let mut names = String::new();
    for (index, pair) in query.split('&').take(MAX_LOGGED_PARAMETERS).enumerate() {
        if index > 0 {
            names.push(',');
        }
        let name = decode_parameter(pair.split('=').next().unwrap_or_default());
        let is_loggable =
            |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.' | b'[' | b']');
        names.extend(name.bytes().filter(is_loggable).take(MAX_LOGGED_NAME_LENGTH).map(char::from));
    }
    names
}

/// Returns the decoded value of the first query parameter with the given `name`.
#[must_use]
pub fn query_parameter(query: Option<&str>, name: &str) -> Option<String> {
    let mut pairs = query.unwrap_or_default().split('&').filter_map(|pair| pair.split_once('='));
    let (_, value) = pairs.find(|(encoded_name, _)| decode_parameter(encoded_name) == name)?;
    Some(decode_parameter(value).into_owned())
}

/// Whether a parameter of a query is a credential or an end user, and is therefore not forwarded.
fn is_removed(pair: &str) -> bool {
    let name = pair.split('=').next().unwrap_or_default();
    credential_parameter(name).is_some() || is_user_parameter(name)
}

/// Returns the ids of the end user in a request's headers and query.
pub(super) fn presented_user_ids<'a>(
    headers: &'a HeaderMap,
    query: Option<&'a str>,
) -> impl Iterator<Item = Cow<'a, [u8]>> {
    let in_headers = headers.get_all(USER_HEADER).into_iter().map(|value| value.as_bytes().into());
    let pairs = query.into_iter().flat_map(|query| query.split('&')).filter_map(|pair| pair.split_once('='));
    let in_query =
        pairs.filter(|(name, _)| is_user_parameter(name)).map(|(_, value)| match decode_parameter(value) {
            Cow::Borrowed(value) => Cow::Borrowed(value.as_bytes()),
            Cow::Owned(decoded) => Cow::Owned(decoded.into_bytes()),
        });
    in_headers.chain(in_query)
}

fn is_user_parameter(name: &str) -> bool {
    decode_parameter(name).trim().eq_ignore_ascii_case(USER_HEADER.as_str())
}

/// Returns the canonical name of a credential parameter, or `None` for any other parameter.
fn credential_parameter(name: &str) -> Option<&'static str> {
    let name = decode_parameter(name);
    CREDENTIAL_PARAMETERS.into_iter().find(|credential| name.trim().eq_ignore_ascii_case(credential))
}

/// Decodes the names and values of a query or of a form.
pub(crate) fn decode_parameters(text: &str) -> Vec<(String, String)> {
    let decode = |parameter: &str| {
        let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        (decode_parameter(name).into_owned(), decode_parameter(value).into_owned())
    };
    text.split('&').filter(|parameter| !parameter.is_empty()).map(decode).collect()
}

/// Decodes percent escapes and `+` in a query parameter. Like most servers, this function keeps invalid
/// escapes.
pub(crate) fn decode_parameter(text: &str) -> Cow<'_, str> {
    let bytes = text.as_bytes();
    let Some(first_escape) = memchr::memchr2(b'%', b'+', bytes) else { return Cow::Borrowed(text) };
    let mut decoded = Vec::with_capacity(bytes.len());
    decoded.extend_from_slice(&bytes[..first_escape]);
    let mut offset = first_escape;
    while let Some(&byte) = bytes.get(offset) {
        let escaped = (byte == b'%').then(|| hex_pair(bytes.get(offset + 1..offset + 3)?)).flatten();
        decoded.push(escaped.unwrap_or(if byte == b'+' { b' ' } else { byte }));
        offset += if escaped.is_some() { 3 } else { 1 };
    }
    Cow::Owned(match String::from_utf8(decoded) {
        Ok(text) => text,
        Err(error) => String::from_utf8_lossy(error.as_bytes()).into_owned(),
    })
}

/// Parses two hexadecimal digits.
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
    fn a_request_must_name_exactly_one_host() {
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
        strip_request(&mut map, &ForwardedHeaders::default());
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
    fn only_hop_by_hop_headers_are_removed_from_a_response() {
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
    fn content_length_is_removed_next_to_transfer_encoding() {
        let content_type = ("content-type", "audio/mpeg");
        let mut map = headers(&[("content-length", "2"), ("transfer-encoding", "chunked"), content_type]);
        strip_response(&mut map);
        assert_eq!(map, headers(&[content_type]));
    }

    #[track_caller]
    fn check_query(received: &str, expected: Option<&str>) {
        assert_eq!(strip_query(received).as_deref(), expected);
    }

    #[test]
    fn other_bytes_of_a_query_are_unchanged() {
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
        let no_headers = HeaderMap::new();
        let credentials = presented_credentials(
            &no_headers,
            Some("authorization=Bearer%20k&xi_api_key=&x=1&Xi%2DApi-Key=j"),
        );
        assert!(
            credentials.eq([PresentedCredential::Other("k".into()), PresentedCredential::Key("j".into())])
        );
    }

    #[track_caller]
    fn check_subprotocols(received: &[&'static str], remaining: Option<&str>, token: Option<&str>) {
        let pairs: Vec<(&'static str, &'static str)> =
            received.iter().map(|value| ("sec-websocket-protocol", *value)).collect();
        let mut headers = headers(&pairs);
        let credentials: Vec<PresentedCredential<'_>> = presented_credentials(&headers, None).collect();
        assert_eq!(credentials.first().map(PresentedCredential::as_str), token);
        strip_request(&mut headers, &ForwardedHeaders::default());
        let values: Vec<&str> =
            headers.get_all(SUBPROTOCOLS).iter().map(|value| value.to_str().unwrap()).collect();
        assert_eq!(values, Vec::from_iter(remaining));
    }

    #[test]
    fn a_bearer_subprotocol_is_a_credential() {
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
        let is_upgrade = is_websocket_upgrade(method, version, &headers(pairs));
        assert_eq!(
            is_upgrade, expected,
            "only a complete upgrade must count: {method} {version:?} {pairs:?}"
        );
    }

    #[test]
    fn a_websocket_upgrade_needs_both_headers() {
        let upgrade = [("connection", "keep-alive, Upgrade"), ("upgrade", "WebSocket")];
        check_websocket(&Method::GET, Version::HTTP_11, &upgrade, true);
        check_websocket(&Method::POST, Version::HTTP_11, &upgrade, false);
        check_websocket(&Method::GET, Version::HTTP_10, &upgrade, false);
        check_websocket(&Method::GET, Version::HTTP_11, &upgrade[..1], false);
        check_websocket(&Method::GET, Version::HTTP_11, &upgrade[1..], false);
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
            assert_eq!(decode_parameter(text), expected);
        }
    }
}

//! Encodes the heads of upstream requests and decodes the heads of responses, without I/O. The decoder rejects every
//! response that hyper's client rejects: if two parsers disagree about the end of a response, an attacker can make
//! one of them take the rest for another response.

use std::fmt;
use std::mem::MaybeUninit;

use bytes::{Buf, Bytes, BytesMut};
use http::header::{CONNECTION, CONTENT_LENGTH, HeaderName, HeaderValue, TRANSFER_ENCODING};
use http::{Extensions, HeaderMap, Method, StatusCode, Version};
use http_body::Body;
use hyper::ext::ReasonPhrase;

use super::UpstreamRequestHead;
use super::header_name_cache::parse_header_name;
use super::loop_marker::{HOP_HEADER, LoopMarker};
use crate::policy::authority::Authority;
use crate::secret::ApiKey;

/// Maximum size of a response head. The heads of the provider have only a few kilobytes.
const MAX_HEAD_SIZE: usize = 128 * 1024;
/// Maximum number of headers of one head, which is also hyper's limit.
const MAX_HEADERS: usize = 100;
/// Number of header slots of the first parse. A head with more headers is parsed again with `MAX_HEADERS`
/// slots.
const USUAL_HEADERS: usize = 32;
/// Initial capacity of a request head, which is enough for a request line and a few headers.
const USUAL_HEAD_SIZE: usize = 1_024;

/// The framing of a request body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RequestFraming {
    /// The request contains no body.
    Empty,
    /// The request declares the length of its body in bytes.
    Length(u64),
    /// The request sends its body in the chunked transfer coding.
    Chunked,
}

impl RequestFraming {
    /// Returns the framing of a request with `body`.
    pub(super) fn new<B: Body>(body: &B) -> Self {
        match body.size_hint().exact() {
            _ if body.is_end_stream() => Self::Empty,
            Some(bytes) => Self::Length(bytes),
            None => Self::Chunked,
        }
    }
}

/// Encodes a request head. No other function writes a key to a head. The head must not be logged.
pub(super) fn encode_request(
    authority: &Authority,
    key: &ApiKey,
    request: &UpstreamRequestHead,
    framing: RequestFraming,
    loop_marker: &LoopMarker,
) -> BytesMut {
    let UpstreamRequestHead { method, target, headers } = request;
    let mut head = BytesMut::with_capacity(USUAL_HEAD_SIZE);
    let mut append = |slices: &[&[u8]]| slices.iter().for_each(|slice| head.extend_from_slice(slice));
    append(&[method.as_str().as_bytes(), b" ", authority.prefix().as_bytes()]);
    let path_and_query = target.path_and_query().map_or("/", |path_and_query| path_and_query.as_str());
    // The path of an absolute target may be empty (RFC 9112, section 3.2.2).
    append(&[if path_and_query.starts_with('?') { b"/" } else { b"" }, path_and_query.as_bytes()]);
    append(&[b" HTTP/1.1\r\nhost: "]);
    append(&[authority.host_header().as_bytes(), b"\r\n"]);
    let is_marked = !authority.is_elevenlabs();
    for (name, value) in headers {
        // The header of `framing` replaces the length of a body. The `content-length: 0` of an empty body is kept.
        let is_replaced_length = *name == CONTENT_LENGTH && framing != RequestFraming::Empty;
        if is_replaced_length || *name == TRANSFER_ENCODING || (!is_marked && *name == HOP_HEADER) {
            continue;
        }
        append(&[name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"]);
    }
    if is_marked {
        append(&[HOP_HEADER.as_str().as_bytes(), b": ", loop_marker.id().as_bytes(), b"\r\n"]);
    }
    match framing {
        RequestFraming::Empty => {}
        RequestFraming::Length(bytes) => {
            append(&[b"content-length: ", bytes.to_string().as_bytes(), b"\r\n"])
        }
        RequestFraming::Chunked => append(&[b"transfer-encoding: chunked\r\n"]),
    }
    append(&[b"xi-api-key: ", key.expose().as_bytes(), b"\r\n\r\n"]);
    head
}

/// The framing of a response body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResponseFraming {
    /// The length of the body in bytes, which is 0 if the response has no body.
    Length(u64),
    /// The body has the chunked transfer coding.
    Chunked,
    /// The end of the connection ends the body.
    Close,
}

/// The head of a response and its consequences for the connection.
#[derive(Debug)]
pub struct ResponseHead {
    /// The status. 101 is the only informational status.
    pub status: StatusCode,
    /// The HTTP version of the connection.
    pub version: Version,
    /// All headers of the response.
    pub headers: HeaderMap,
    /// Contains the [`ReasonPhrase`] if it is not the canonical phrase of the status.
    pub extensions: Extensions,
    /// The framing of the body.
    pub framing: ResponseFraming,
    /// Whether the connection can be used for another request after this response.
    pub is_keep_alive: bool,
}

/// The reason why the received bytes are not a valid response head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadError {
    /// The bytes are not a valid head of an HTTP/1 response.
    Malformed,
    /// The head has too many bytes or headers, or too many interim responses precede it.
    TooLarge,
    /// The head declares contradictory or invalid lengths of the body, or a transfer coding in HTTP/1.0.
    Ambiguous,
    /// The body uses a transfer coding other than chunked (RFC 9112, section 6.1).
    UnsupportedCoding,
}

impl fmt::Display for HeadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Malformed => "the received bytes are not HTTP",
            Self::TooLarge => "the response head is too large",
            Self::Ambiguous => "the response head has an ambiguous length of the body",
            Self::UnsupportedCoding => "the response body has a transfer coding other than chunked",
        })
    }
}

impl std::error::Error for HeadError {}

impl From<httparse::Error> for HeadError {
    fn from(error: httparse::Error) -> Self {
        match error {
            httparse::Error::TooManyHeaders => Self::TooLarge,
            httparse::Error::HeaderName
            | httparse::Error::HeaderValue
            | httparse::Error::NewLine
            | httparse::Error::Status
            | httparse::Error::Token
            | httparse::Error::Version => Self::Malformed,
        }
    }
}

/// Decodes the head of a response to a request with `method`, and removes the head from `received`. Returns
/// `None` until the head is complete. Skips informational heads other than 101.
///
/// # Errors
///
/// Fails when the bytes are not a valid head, or when parsers could disagree about its framing.
pub fn decode_response(received: &mut BytesMut, method: &Method) -> Result<Option<ResponseHead>, HeadError> {
    loop {
        // Empty lines before a head are ignored.
        let blank_bytes = received.iter().take_while(|byte| matches!(byte, b'\r' | b'\n')).count();
        received.advance(blank_bytes);
        let Some(head_size) = find_head_end(received) else {
            // An incomplete head is rejected if it cannot become valid.
            if !b"HTTP/1.".starts_with(&received[..received.len().min(7)]) {
                return Err(HeadError::Malformed);
            }
            return if received.len() > MAX_HEAD_SIZE { Err(HeadError::TooLarge) } else { Ok(None) };
        };
        if head_size > MAX_HEAD_SIZE {
            return Err(HeadError::TooLarge);
        }
        let head = parse_head(&received.split_to(head_size).freeze(), method)?;
        if !head.status.is_informational() || head.status == StatusCode::SWITCHING_PROTOCOLS {
            return Ok(Some(head));
        }
    }
}

/// Returns the offset after the empty line that ends the first head in `received`.
fn find_head_end(received: &[u8]) -> Option<usize> {
    memchr::memchr_iter(b'\n', received).find_map(|line_end| match received.get(line_end + 1..)? {
        [b'\n', ..] => Some(line_end + 2),
        [b'\r', b'\n', ..] => Some(line_end + 3),
        _ => None,
    })
}

/// Parses a complete head, first with few header slots.
fn parse_head(bytes: &Bytes, method: &Method) -> Result<ResponseHead, HeadError> {
    let parser = httparse::ParserConfig::default();
    let mut usual_headers = [const { MaybeUninit::uninit() }; USUAL_HEADERS];
    let mut head = httparse::Response::new(&mut []);
    match parser.parse_response_with_uninit_headers(&mut head, bytes, &mut usual_headers) {
        Err(httparse::Error::TooManyHeaders) => {
            let mut all_headers = [const { MaybeUninit::uninit() }; MAX_HEADERS];
            let mut head = httparse::Response::new(&mut []);
            let parse_status =
                parser.parse_response_with_uninit_headers(&mut head, bytes, &mut all_headers)?;
            convert_head(bytes, method, parse_status, &head)
        }
        parsed => convert_head(bytes, method, parsed?, &head),
    }
}

/// Converts a parsed head. The header values share the memory of `bytes`.
fn convert_head(
    bytes: &Bytes,
    method: &Method,
    parsed: httparse::Status<usize>,
    head: &httparse::Response<'_, '_>,
) -> Result<ResponseHead, HeadError> {
    let (httparse::Status::Complete(_), Some(code), Some(minor)) = (parsed, head.code, head.version) else {
        return Err(HeadError::Malformed);
    };
    let status = StatusCode::from_u16(code).map_err(|_| HeadError::Malformed)?;
    let version = if minor == 1 { Version::HTTP_11 } else { Version::HTTP_10 };
    let mut headers = HeaderMap::with_capacity(head.headers.len() + 1);
    let mut framing_headers = FramingHeaders::default();
    for header in head.headers.iter() {
        let name = parse_header_name(header.name.as_bytes()).map_err(|_| HeadError::Malformed)?;
        let value = HeaderValue::from_maybe_shared(bytes.slice_ref(header.value));
        let value = value.map_err(|_| HeadError::Malformed)?;
        framing_headers.add(&name, &value);
        headers.append(name, value);
    }
    let mut extensions = Extensions::new();
    let reason = head.reason.unwrap_or_default();
    if status.canonical_reason() != Some(reason)
        && let Ok(reason) = ReasonPhrase::try_from(reason.as_bytes())
    {
        extensions.insert(reason);
    }
    let framing = framing_headers.framing(status, version, method)?;
    let is_keep_alive = framing != ResponseFraming::Close && framing_headers.is_keep_alive(version);
    Ok(ResponseHead { status, version, headers, extensions, framing, is_keep_alive })
}

/// The parsed values of the `content-length`, `transfer-encoding` and `connection` headers of a head.
#[derive(Debug, Default)]
struct FramingHeaders {
    /// Whether chunked is the only transfer coding, or `None` if there is no transfer coding.
    is_chunked: Option<bool>,
    /// The declared length, an error if the values are invalid or contradictory, or `None` if there is no length.
    length: Option<Result<u64, HeadError>>,
    has_close: bool,
    has_keep_alive: bool,
}

impl FramingHeaders {
    /// Parses a header if it is one of the three headers.
    fn add(&mut self, name: &HeaderName, value: &HeaderValue) {
        if *name == CONTENT_LENGTH {
            // A value that is not ASCII is replaced with an empty value, which is not a number.
            for length in value.to_str().unwrap_or_default().split(',') {
                self.length = Some(match (parse_decimal(length.trim()), self.length) {
                    (Some(length), None) => Ok(length),
                    (Some(length), Some(Ok(previous))) if length == previous => Ok(length),
                    (Some(_) | None, _) => Err(HeadError::Ambiguous),
                });
            }
        } else if *name == TRANSFER_ENCODING {
            let is_chunked = value.as_bytes().eq_ignore_ascii_case(b"chunked");
            self.is_chunked = Some(is_chunked && self.is_chunked.is_none());
        } else if *name == CONNECTION {
            for token in value.to_str().unwrap_or_default().split(',').map(str::trim) {
                self.has_close |= token.eq_ignore_ascii_case("close");
                self.has_keep_alive |= token.eq_ignore_ascii_case("keep-alive");
            }
        }
    }

    /// Returns the framing of the body (RFC 9112, section 6.3).
    fn framing(
        &self,
        status: StatusCode,
        version: Version,
        method: &Method,
    ) -> Result<ResponseFraming, HeadError> {
        let has_no_body = status.is_informational()
            || status == StatusCode::NO_CONTENT
            || status == StatusCode::NOT_MODIFIED
            || method == Method::HEAD;
        match (self.is_chunked, self.length) {
            _ if has_no_body => Ok(ResponseFraming::Length(0)),
            (Some(_), _) if version == Version::HTTP_10 => Err(HeadError::Ambiguous),
            (Some(true), _) => Ok(ResponseFraming::Chunked),
            (Some(false), _) => Err(HeadError::UnsupportedCoding),
            (None, None) => Ok(ResponseFraming::Close),
            (None, Some(length)) => length.map(ResponseFraming::Length),
        }
    }

    /// Returns whether the headers allow another request on the connection (RFC 9112, section 9.3).
    fn is_keep_alive(&self, version: Version) -> bool {
        !self.has_close && (version == Version::HTTP_11 || self.has_keep_alive)
    }
}

/// Parses a number that consists of digits only. `str::parse` alone would accept a sign.
fn parse_decimal(text: &str) -> Option<u64> {
    if text.bytes().all(|byte| byte.is_ascii_digit()) { text.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The parts of a head that determine how the response and the connection end.
    #[derive(Debug, PartialEq, Eq)]
    struct DecodedEnd {
        status: u16,
        framing: ResponseFraming,
        is_keep_alive: bool,
    }

    fn keep_alive(status: u16, framing: ResponseFraming) -> DecodedEnd {
        DecodedEnd { status, framing, is_keep_alive: true }
    }

    fn closing(status: u16, framing: ResponseFraming) -> DecodedEnd {
        DecodedEnd { status, framing, is_keep_alive: false }
    }

    /// Decodes `text`, which is followed by other bytes, and compares the decoded head with the expected one.
    #[track_caller]
    fn check_head(text: &str, method: &Method, expected: Result<DecodedEnd, HeadError>) {
        let mut received_bytes = BytesMut::from(text);
        received_bytes.extend_from_slice(b"rest");
        let decoded_end = decode_response(&mut received_bytes, method).map(|head| {
            let head = head.expect("the head must be complete");
            DecodedEnd {
                status: head.status.as_u16(),
                framing: head.framing,
                is_keep_alive: head.is_keep_alive,
            }
        });
        assert_eq!(decoded_end, expected, "the head {text:?} must be decoded as expected");
        if decoded_end.is_ok() {
            assert_eq!(received_bytes, "rest", "only the head must be removed");
        }
    }

    #[test]
    fn ambiguous_framing_is_rejected() {
        let cases = [
            ("content-length: 5", Ok(keep_alive(200, ResponseFraming::Length(5)))),
            ("content-length: 5\r\ncontent-length: 5", Ok(keep_alive(200, ResponseFraming::Length(5)))),
            ("content-length: 5, 5", Ok(keep_alive(200, ResponseFraming::Length(5)))),
            ("content-length: 5\r\ncontent-length: 6", Err(HeadError::Ambiguous)),
            ("content-length: +5", Err(HeadError::Ambiguous)),
            ("content-length: ", Err(HeadError::Ambiguous)),
            ("content-length: 99999999999999999999", Err(HeadError::Ambiguous)),
            ("transfer-encoding: chunked", Ok(keep_alive(200, ResponseFraming::Chunked))),
            (
                "transfer-encoding:  Chunked \r\ncontent-length: 9",
                Ok(keep_alive(200, ResponseFraming::Chunked)),
            ),
            // Keychoir does not decode other codings, and does not forward the header that declares them.
            ("transfer-encoding: gzip, chunked", Err(HeadError::UnsupportedCoding)),
            ("transfer-encoding: chunked, gzip", Err(HeadError::UnsupportedCoding)),
            ("transfer-encoding: gzip\r\ntransfer-encoding: chunked", Err(HeadError::UnsupportedCoding)),
            ("transfer-encoding: chunked\r\ntransfer-encoding: chunked", Err(HeadError::UnsupportedCoding)),
            ("transfer-encoding: chunked, chunked", Err(HeadError::UnsupportedCoding)),
            ("transfer-encoding: identity\r\ncontent-length: 9", Err(HeadError::UnsupportedCoding)),
            ("transfer-encoding: something", Err(HeadError::UnsupportedCoding)),
            ("transfer-encoding:", Err(HeadError::UnsupportedCoding)),
            ("x: 1", Ok(closing(200, ResponseFraming::Close))),
            ("connection: close\r\ncontent-length: 5", Ok(closing(200, ResponseFraming::Length(5)))),
            (
                "connection: x, Close\r\nconnection: keep-alive\r\ncontent-length: 5",
                Ok(closing(200, ResponseFraming::Length(5))),
            ),
        ];
        for (headers, expected) in cases {
            check_head(&format!("HTTP/1.1 200 OK\r\n{headers}\r\n\r\n"), &Method::GET, expected);
        }
    }

    #[test]
    fn responses_to_head_and_some_statuses_have_no_body() {
        for (status, method) in
            [(204, Method::GET), (304, Method::GET), (200, Method::HEAD), (101, Method::GET)]
        {
            let text = format!("HTTP/1.1 {status} X\r\ncontent-length: 7\r\n\r\n");
            check_head(&text, &method, Ok(keep_alive(status, ResponseFraming::Length(0))));
        }
    }

    #[test]
    fn http_1_0_connections_are_reused_only_with_keep_alive() {
        check_head(
            "HTTP/1.0 200 OK\r\ncontent-length: 1\r\n\r\n",
            &Method::GET,
            Ok(closing(200, ResponseFraming::Length(1))),
        );
        let text = "HTTP/1.0 200 OK\r\nconnection: Keep-Alive\r\ncontent-length: 1\r\n\r\n";
        check_head(text, &Method::GET, Ok(keep_alive(200, ResponseFraming::Length(1))));
        let text = "HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
        check_head(text, &Method::GET, Err(HeadError::Ambiguous));
    }

    #[test]
    fn informational_heads_are_skipped() {
        let interim = "\r\nHTTP/1.1 103 Early\r\nlink: </x>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n".repeat(50);
        check_head(
            &format!("{interim}HTTP/1.1 200 OK\ncontent-length: 2\n\n"),
            &Method::GET,
            Ok(keep_alive(200, ResponseFraming::Length(2))),
        );
    }

    #[test]
    fn invalid_and_too_large_heads_are_rejected() {
        for text in [
            "SSH-2.0-x",
            "HTTP/2 200 OK\r\n\r\n",
            "HTTP/1.1 2x0 OK\r\n\r\n",
            "HTTP/1.1 200 OK\r\nbad header\r\n\r\n",
        ] {
            assert_eq!(
                decode_response(&mut BytesMut::from(text), &Method::GET).unwrap_err(),
                HeadError::Malformed,
                "the head {text:?} must be rejected"
            );
        }
        let too_many = format!("HTTP/1.1 200 OK\r\n{}\r\n", "x: 1\r\n".repeat(MAX_HEADERS + 1));
        let too_long = format!("HTTP/1.1 200 OK\r\nx: {}", "a".repeat(MAX_HEAD_SIZE));
        for text in [too_many, too_long] {
            let error = decode_response(&mut BytesMut::from(&*text), &Method::GET).unwrap_err();
            assert_eq!(error, HeadError::TooLarge);
        }
        for header_count in [USUAL_HEADERS, USUAL_HEADERS + 1, MAX_HEADERS] {
            let text = format!("HTTP/1.1 204 X\r\n{}\r\n", "x: 1\r\n".repeat(header_count));
            let head = decode_response(&mut BytesMut::from(&*text), &Method::GET).unwrap().unwrap();
            assert_eq!(head.headers.get_all("x").iter().count(), header_count);
        }
    }

    #[test]
    fn a_head_may_arrive_byte_by_byte() {
        let text = b"HTTP/1.1 200 Fine\r\nx-upper: A \r\ncontent-length: 2\r\n\r\n";
        let (last_byte, incomplete) = text.split_last().unwrap();
        let mut received_bytes = BytesMut::new();
        for byte in incomplete {
            received_bytes.extend_from_slice(&[*byte]);
            assert!(decode_response(&mut received_bytes, &Method::GET).unwrap().is_none());
        }
        received_bytes.extend_from_slice(&[*last_byte]);
        let head = decode_response(&mut received_bytes, &Method::GET).unwrap().unwrap();
        assert_eq!(head.headers["x-upper"], "A");
        assert_eq!(head.extensions.get::<ReasonPhrase>().unwrap().as_bytes(), b"Fine");
    }
}

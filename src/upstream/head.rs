//! Writes the heads of upstream requests and parses the heads of responses. The parser refuses every response
//! that hyper's client refuses, because two parsers that differ allow response smuggling.

use std::fmt;
use std::mem::MaybeUninit;

use bytes::{Buf, Bytes, BytesMut};
use http::header::{CONNECTION, CONTENT_LENGTH, HeaderName, HeaderValue, TRANSFER_ENCODING};
use http::{Extensions, HeaderMap, Method, StatusCode, Version};
use hyper::ext::ReasonPhrase;

use super::UpstreamRequestHead;
use super::header_name_cache::header_name;
use super::hop::{self, Hop};
use crate::policy::authority::Authority;
use crate::secret::ApiKey;

/// Maximum size of a response head. The provider's heads have a few kilobytes.
const HEAD_BYTES_MAX: usize = 128 * 1024;
/// Maximum headers of one head, the same as hyper's.
const HEADERS_MAX: usize = 100;
/// Headers that the first parse has room for: most heads have fewer.
const HEADERS_USUAL: usize = 32;
/// Initial capacity for a request line and a few headers.
const HEAD_BYTES_USUAL: usize = 1_024;

/// The framing of a request body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BodyLength {
    /// There is no body.
    Empty,
    /// A length in bytes.
    Known(u64),
    /// Chunked transfer coding.
    Chunked,
}

/// Writes a request head: the only place where a key is written to a head. The text contains the key, so it
/// must not be logged.
pub(super) fn write(
    authority: &Authority,
    key: &ApiKey,
    request: &UpstreamRequestHead,
    length: BodyLength,
    hop: &Hop,
) -> BytesMut {
    let UpstreamRequestHead { method, target, headers } = request;
    let mut head = BytesMut::with_capacity(HEAD_BYTES_USUAL);
    let mut put = |pieces: &[&[u8]]| pieces.iter().for_each(|piece| head.extend_from_slice(piece));
    put(&[method.as_str().as_bytes(), b" ", authority.prefix().as_bytes()]);
    let target = target.path_and_query().map_or("/", |target| target.as_str());
    // An absolute target may have no path; its path is then empty (RFC 9112, section 3.2.2).
    put(&[if target.starts_with('?') { b"/" } else { b"" }, target.as_bytes(), b" HTTP/1.1\r\nhost: "]);
    put(&[authority.host_header().as_bytes(), b"\r\n"]);
    let is_marked = !authority.is_elevenlabs();
    for (name, value) in headers {
        // The proxy sets the framing of the body itself; the client's length of an empty body is kept.
        let is_length = *name == CONTENT_LENGTH && length != BodyLength::Empty;
        if is_length || *name == TRANSFER_ENCODING || (!is_marked && *name == hop::HEADER) {
            continue;
        }
        put(&[name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"]);
    }
    if is_marked {
        put(&[hop::HEADER.as_str().as_bytes(), b": ", hop.id().as_bytes(), b"\r\n"]);
    }
    match length {
        BodyLength::Empty => {}
        BodyLength::Known(bytes) => put(&[b"content-length: ", bytes.to_string().as_bytes(), b"\r\n"]),
        BodyLength::Chunked => put(&[b"transfer-encoding: chunked\r\n"]),
    }
    put(&[b"xi-api-key: ", key.expose().as_bytes(), b"\r\n\r\n"]);
    head
}

/// The framing of a response body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyEnd {
    /// A length in bytes; 0 also when there is no body.
    Length(u64),
    /// Chunked transfer coding.
    Chunks,
    /// The end of the connection.
    Close,
}

/// The head of a response.
#[derive(Debug)]
pub struct ResponseHead {
    /// The status; of the informational ones only 101.
    pub status: StatusCode,
    /// The HTTP version of the connection.
    pub version: Version,
    /// All headers of the response.
    pub headers: HeaderMap,
    /// The reason phrase, where it is not the usual one.
    pub extensions: Extensions,
    /// The framing of the body.
    pub end: BodyEnd,
    /// Whether the connection accepts another request after this response.
    pub stays_open: bool,
}

/// The reason that the received bytes are not a response head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadError {
    /// The bytes are not HTTP.
    Malformed,
    /// The head is larger than the bound.
    TooLarge,
    /// The framing of the body is contradictory.
    Ambiguous,
    /// The body has a transfer coding other than chunked (RFC 9112, section 6.1).
    Coded,
}

impl fmt::Display for HeadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Malformed => "the bytes received are not HTTP",
            Self::TooLarge => "the response head is too large",
            Self::Ambiguous => "the response head has two lengths",
            Self::Coded => "the response body has a transfer coding other than chunked",
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

/// Takes the head of the response to `method` from the bytes received, once it is complete. Informational
/// heads other than 101 are skipped.
///
/// # Errors
///
/// When the bytes are not a head, or one that parsers could read in two ways.
pub fn read(received: &mut BytesMut, method: &Method) -> Result<Option<ResponseHead>, HeadError> {
    loop {
        // Empty lines before a head are ignored.
        let blank = received.iter().take_while(|byte| matches!(byte, b'\r' | b'\n')).count();
        received.advance(blank);
        let Some(bytes) = end_of_head(received) else {
            // Bytes that cannot become a head are refused before they are complete.
            if !b"HTTP/1.".starts_with(&received[..received.len().min(7)]) {
                return Err(HeadError::Malformed);
            }
            return if received.len() > HEAD_BYTES_MAX { Err(HeadError::TooLarge) } else { Ok(None) };
        };
        if bytes > HEAD_BYTES_MAX {
            return Err(HeadError::TooLarge);
        }
        let head = parse(&received.split_to(bytes).freeze(), method)?;
        if !head.status.is_informational() || head.status == StatusCode::SWITCHING_PROTOCOLS {
            return Ok(Some(head));
        }
    }
}

/// The offset behind the empty line that ends a head.
fn end_of_head(received: &[u8]) -> Option<usize> {
    memchr::memchr_iter(b'\n', received).find_map(|line| match received.get(line + 1..)? {
        [b'\n', ..] => Some(line + 2),
        [b'\r', b'\n', ..] => Some(line + 3),
        _ => None,
    })
}

fn parse(text: &Bytes, method: &Method) -> Result<ResponseHead, HeadError> {
    let parser = httparse::ParserConfig::default();
    let mut usual = [const { MaybeUninit::uninit() }; HEADERS_USUAL];
    let mut head = httparse::Response::new(&mut []);
    match parser.parse_response_with_uninit_headers(&mut head, text, &mut usual) {
        Err(httparse::Error::TooManyHeaders) => {
            let mut all_headers = [const { MaybeUninit::uninit() }; HEADERS_MAX];
            let mut head = httparse::Response::new(&mut []);
            let parsed = parser.parse_response_with_uninit_headers(&mut head, text, &mut all_headers)?;
            response_head(text, method, parsed, &head)
        }
        parsed => response_head(text, method, parsed?, &head),
    }
}

fn response_head(
    text: &Bytes,
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
    let mut framing = HeadFraming::default();
    for header in head.headers.iter() {
        let name = header_name(header.name.as_bytes()).map_err(|_| HeadError::Malformed)?;
        let value = HeaderValue::from_maybe_shared(text.slice_ref(header.value));
        let value = value.map_err(|_| HeadError::Malformed)?;
        framing.add(&name, &value);
        headers.append(name, value);
    }
    let mut extensions = Extensions::new();
    let reason = head.reason.unwrap_or_default();
    if status.canonical_reason() != Some(reason)
        && let Ok(reason) = ReasonPhrase::try_from(reason.as_bytes())
    {
        extensions.insert(reason);
    }
    let end = framing.end(status, version, method)?;
    let stays_open = end != BodyEnd::Close && framing.stays_open(version);
    Ok(ResponseHead { status, version, headers, extensions, end, stays_open })
}

/// The framing and connection headers of a head, collected while they are parsed.
#[derive(Debug, Default)]
struct HeadFraming {
    /// Whether chunked is the only transfer coding.
    is_chunked: Option<bool>,
    length: Option<Result<u64, HeadError>>,
    /// Whether `connection` has the token `close`, and whether it has `keep-alive`.
    closes: bool,
    is_kept: bool,
}

impl HeadFraming {
    fn add(&mut self, name: &HeaderName, value: &HeaderValue) {
        if *name == CONTENT_LENGTH {
            // A value that is not text is not a number either.
            for length in value.to_str().unwrap_or_default().split(',') {
                self.length = Some(match (decimal(length.trim()), self.length) {
                    (Some(length), None) => Ok(length),
                    (Some(length), Some(Ok(before))) if length == before => Ok(length),
                    (Some(_) | None, _) => Err(HeadError::Ambiguous),
                });
            }
        } else if *name == TRANSFER_ENCODING {
            let is_chunked = value.as_bytes().eq_ignore_ascii_case(b"chunked");
            self.is_chunked = Some(is_chunked && self.is_chunked.is_none());
        } else if *name == CONNECTION {
            for token in value.to_str().unwrap_or_default().split(',').map(str::trim) {
                self.closes |= token.eq_ignore_ascii_case("close");
                self.is_kept |= token.eq_ignore_ascii_case("keep-alive");
            }
        }
    }

    /// The framing of the body (RFC 9112, section 6.3).
    fn end(&self, status: StatusCode, version: Version, method: &Method) -> Result<BodyEnd, HeadError> {
        let is_bare = status.is_informational()
            || status == StatusCode::NO_CONTENT
            || status == StatusCode::NOT_MODIFIED
            || method == Method::HEAD;
        match (self.is_chunked, self.length) {
            _ if is_bare => Ok(BodyEnd::Length(0)),
            (Some(_), _) if version == Version::HTTP_10 => Err(HeadError::Ambiguous),
            (Some(true), _) => Ok(BodyEnd::Chunks),
            (Some(false), _) => Err(HeadError::Coded),
            (None, None) => Ok(BodyEnd::Close),
            (None, Some(length)) => length.map(BodyEnd::Length),
        }
    }

    fn stays_open(&self, version: Version) -> bool {
        !self.closes && (version == Version::HTTP_11 || self.is_kept)
    }
}

/// Parses a number that consists of digits only.
fn decimal(text: &str) -> Option<u64> {
    if text.bytes().all(|byte| byte.is_ascii_digit()) { text.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, method: &Method, expected: Result<(u16, BodyEnd, bool), HeadError>) {
        let mut received = BytesMut::from(text);
        received.extend_from_slice(b"rest");
        let read = read(&mut received, method).map(|head| {
            let head = head.expect("a complete head");
            (head.status.as_u16(), head.end, head.stays_open)
        });
        assert_eq!(read, expected, "{text:?}");
        if read.is_ok() {
            assert_eq!(received, "rest");
        }
    }

    #[test]
    fn the_framing_of_a_body_is_unambiguous() {
        let ends = [
            ("content-length: 5", Ok((200, BodyEnd::Length(5), true))),
            ("content-length: 5\r\ncontent-length: 5", Ok((200, BodyEnd::Length(5), true))),
            ("content-length: 5, 5", Ok((200, BodyEnd::Length(5), true))),
            ("content-length: 5\r\ncontent-length: 6", Err(HeadError::Ambiguous)),
            ("content-length: +5", Err(HeadError::Ambiguous)),
            ("content-length: ", Err(HeadError::Ambiguous)),
            ("content-length: 99999999999999999999", Err(HeadError::Ambiguous)),
            ("transfer-encoding: chunked", Ok((200, BodyEnd::Chunks, true))),
            ("transfer-encoding:  Chunked \r\ncontent-length: 9", Ok((200, BodyEnd::Chunks, true))),
            // A body with another coding would be forwarded in a form that its head does not describe.
            ("transfer-encoding: gzip, chunked", Err(HeadError::Coded)),
            ("transfer-encoding: chunked, gzip", Err(HeadError::Coded)),
            ("transfer-encoding: gzip\r\ntransfer-encoding: chunked", Err(HeadError::Coded)),
            ("transfer-encoding: chunked\r\ntransfer-encoding: chunked", Err(HeadError::Coded)),
            ("transfer-encoding: chunked, chunked", Err(HeadError::Coded)),
            ("transfer-encoding: identity\r\ncontent-length: 9", Err(HeadError::Coded)),
            ("transfer-encoding: something", Err(HeadError::Coded)),
            ("transfer-encoding:", Err(HeadError::Coded)),
            ("x: 1", Ok((200, BodyEnd::Close, false))),
            ("connection: close\r\ncontent-length: 5", Ok((200, BodyEnd::Length(5), false))),
            (
                "connection: x, Close\r\nconnection: keep-alive\r\ncontent-length: 5",
                Ok((200, BodyEnd::Length(5), false)),
            ),
        ];
        for (headers, expected) in ends {
            check(&format!("HTTP/1.1 200 OK\r\n{headers}\r\n\r\n"), &Method::GET, expected);
        }
    }

    #[test]
    fn some_responses_have_no_body_whatever_their_headers() {
        for (status, method) in
            [(204, Method::GET), (304, Method::GET), (200, Method::HEAD), (101, Method::GET)]
        {
            let text = format!("HTTP/1.1 {status} X\r\ncontent-length: 7\r\n\r\n");
            check(&text, &method, Ok((status, BodyEnd::Length(0), true)));
        }
    }

    #[test]
    fn http_1_0_stays_open_only_with_keep_alive() {
        check(
            "HTTP/1.0 200 OK\r\ncontent-length: 1\r\n\r\n",
            &Method::GET,
            Ok((200, BodyEnd::Length(1), false)),
        );
        let text = "HTTP/1.0 200 OK\r\nconnection: Keep-Alive\r\ncontent-length: 1\r\n\r\n";
        check(text, &Method::GET, Ok((200, BodyEnd::Length(1), true)));
        let text = "HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
        check(text, &Method::GET, Err(HeadError::Ambiguous));
    }

    #[test]
    fn informational_heads_are_skipped() {
        let early = "\r\nHTTP/1.1 103 Early\r\nlink: </x>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n".repeat(50);
        check(
            &format!("{early}HTTP/1.1 200 OK\ncontent-length: 2\n\n"),
            &Method::GET,
            Ok((200, BodyEnd::Length(2), true)),
        );
    }

    #[test]
    fn bytes_that_are_no_head_are_refused_early() {
        for text in [
            "SSH-2.0-x",
            "HTTP/2 200 OK\r\n\r\n",
            "HTTP/1.1 2x0 OK\r\n\r\n",
            "HTTP/1.1 200 OK\r\nbad header\r\n\r\n",
        ] {
            assert_eq!(
                read(&mut BytesMut::from(text), &Method::GET).unwrap_err(),
                HeadError::Malformed,
                "{text}"
            );
        }
        let many = format!("HTTP/1.1 200 OK\r\n{}\r\n", "x: 1\r\n".repeat(HEADERS_MAX + 1));
        let long = format!("HTTP/1.1 200 OK\r\nx: {}", "a".repeat(HEAD_BYTES_MAX));
        for text in [many, long] {
            assert_eq!(read(&mut BytesMut::from(&*text), &Method::GET).unwrap_err(), HeadError::TooLarge);
        }
        for many in [HEADERS_USUAL, HEADERS_USUAL + 1, HEADERS_MAX] {
            let text = format!("HTTP/1.1 204 X\r\n{}\r\n", "x: 1\r\n".repeat(many));
            let head = read(&mut BytesMut::from(&*text), &Method::GET).unwrap().unwrap();
            assert_eq!(head.headers.get_all("x").iter().count(), many);
        }
    }

    #[test]
    fn a_head_may_arrive_in_pieces() {
        let text = b"HTTP/1.1 200 Fine\r\nx-upper: A \r\ncontent-length: 2\r\n\r\nok";
        let mut received = BytesMut::new();
        for (at, byte) in text.iter().enumerate() {
            received.extend_from_slice(&[*byte]);
            match read(&mut received, &Method::GET).unwrap() {
                None => assert!(at + 3 < text.len()),
                Some(head) => {
                    assert_eq!(head.headers["x-upper"], "A");
                    assert_eq!(head.extensions.get::<ReasonPhrase>().unwrap().as_bytes(), b"Fine");
                    assert_eq!(at + 3, text.len());
                    return;
                }
            }
        }
        panic!("the head was never complete");
    }
}

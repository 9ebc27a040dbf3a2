//! Heads on the upstream's side: how a request's is written, and how an answer's is read. Strict
//! where two readers could differ: what hyper refuses of a server is refused here.

use std::fmt;
use std::mem::MaybeUninit;

use bytes::{Buf, Bytes, BytesMut};
use http::header::{CONNECTION, CONTENT_LENGTH, HeaderName, HeaderValue, TRANSFER_ENCODING};
use http::{Extensions, HeaderMap, Method, StatusCode, Version};
use hyper::ext::ReasonPhrase;

use super::hop::{self, Hop};
use super::{UpstreamRequestHead, names};
use crate::policy::authority::Authority;
use crate::secret::ApiKey;

/// A provider's head is a few kilobytes; one that is larger is none.
const HEAD_BYTES_MAX: usize = 128 * 1024;
/// Headers of one head, as many as hyper takes.
const HEADERS_MAX: usize = 100;
/// Most heads have fewer.
const HEADERS_USUAL: usize = 32;
/// A request line and a few headers.
const HEAD_BYTES_USUAL: usize = 1_024;

/// How the end of a request's body is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BodyLength {
    /// There is no body.
    Empty,
    /// So many bytes.
    Known(u64),
    /// In chunks.
    Chunked,
}

/// Writes a request's head: the one place where a key enters a head. The text has it, so it is shown
/// nowhere.
pub(super) fn write(
    authority: &Authority,
    key: &ApiKey,
    outbound: &UpstreamRequestHead,
    length: BodyLength,
    hop: &Hop,
) -> BytesMut {
    let UpstreamRequestHead { method, target, headers } = outbound;
    let mut head = BytesMut::with_capacity(HEAD_BYTES_USUAL);
    let mut put = |pieces: &[&[u8]]| pieces.iter().for_each(|piece| head.extend_from_slice(piece));
    put(&[method.as_str().as_bytes(), b" ", authority.prefix().as_bytes()]);
    let target = target.path_and_query().map_or("/", |target| target.as_str());
    // An absolute target may have no path, and then has an empty one (RFC 9112, section 3.2.2).
    put(&[if target.starts_with('?') { b"/" } else { b"" }, target.as_bytes(), b" HTTP/1.1\r\nhost: "]);
    put(&[authority.host_header().as_bytes(), b"\r\n"]);
    let is_marked = !authority.is_elevenlabs();
    for (name, value) in headers {
        // What ends the body is ours to say: an empty one may be called empty.
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

/// How the end of an answer's body is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyEnd {
    /// By its length in bytes; there is none when it is 0.
    Length(u64),
    /// By the last chunk.
    Chunks,
    /// By the end of the connection.
    Close,
}

/// The head of an answer.
#[derive(Debug)]
pub struct ResponseHead {
    /// Its status; never one that only informs, but for 101.
    pub status: StatusCode,
    /// The version of this connection.
    pub version: Version,
    /// Its headers, all of them.
    pub headers: HeaderMap,
    /// The words behind the status, where they are not the usual ones.
    pub extensions: Extensions,
    /// How its body ends.
    pub end: BodyEnd,
    /// Whether the connection takes another request after it.
    pub stays_open: bool,
}

/// Why what was heard is no head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadError {
    /// It is no HTTP.
    Malformed,
    /// It is larger than any head of the provider.
    TooLarge,
    /// How its body ends is told in two ways.
    Ambiguous,
    /// Its body has a transfer coding that is not understood (RFC 9112, section 6.1).
    Coded,
}

impl fmt::Display for HeadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Malformed => "what was heard is no HTTP",
            Self::TooLarge => "its head is too large",
            Self::Ambiguous => "its head tells two lengths",
            Self::Coded => "its body has a transfer coding other than chunked",
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

/// Takes the head of an answer to `method` out of what was heard, if it is there to its end. Heads
/// that only inform are passed over.
///
/// # Errors
///
/// When what was heard is no head that could be meant one way only.
pub fn read(heard: &mut BytesMut, method: &Method) -> Result<Option<ResponseHead>, HeadError> {
    loop {
        // Empty lines before a head mean nothing.
        let blank = heard.iter().take_while(|byte| matches!(byte, b'\r' | b'\n')).count();
        heard.advance(blank);
        let Some(bytes) = end_of_head(heard) else {
            // What cannot become a head is told before its end comes.
            if !b"HTTP/1.".starts_with(&heard[..heard.len().min(7)]) {
                return Err(HeadError::Malformed);
            }
            return if heard.len() > HEAD_BYTES_MAX { Err(HeadError::TooLarge) } else { Ok(None) };
        };
        if bytes > HEAD_BYTES_MAX {
            return Err(HeadError::TooLarge);
        }
        let head = parse(&heard.split_to(bytes).freeze(), method)?;
        if !head.status.is_informational() || head.status == StatusCode::SWITCHING_PROTOCOLS {
            return Ok(Some(head));
        }
    }
}

/// Where the empty line ends that ends a head.
fn end_of_head(heard: &[u8]) -> Option<usize> {
    memchr::memchr_iter(b'\n', heard).find_map(|line| match heard.get(line + 1..)? {
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
            let mut many = [const { MaybeUninit::uninit() }; HEADERS_MAX];
            let mut head = httparse::Response::new(&mut []);
            let parsed = parser.parse_response_with_uninit_headers(&mut head, text, &mut many)?;
            heard(text, method, parsed, &head)
        }
        parsed => heard(text, method, parsed?, &head),
    }
}

fn heard(
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
    let mut told = HeadFraming::default();
    for header in head.headers.iter() {
        let name = names::name(header.name.as_bytes()).map_err(|_| HeadError::Malformed)?;
        let value = HeaderValue::from_maybe_shared(text.slice_ref(header.value));
        let value = value.map_err(|_| HeadError::Malformed)?;
        told.hear(&name, &value);
        headers.append(name, value);
    }
    let mut extensions = Extensions::new();
    let reason = head.reason.unwrap_or_default();
    if status.canonical_reason() != Some(reason)
        && let Ok(reason) = ReasonPhrase::try_from(reason.as_bytes())
    {
        extensions.insert(reason);
    }
    let end = told.end(status, version, method)?;
    let stays_open = end != BodyEnd::Close && told.stays_open(version);
    Ok(ResponseHead { status, version, headers, extensions, end, stays_open })
}

/// What a head's headers say of its body and its connection, noted as they come.
#[derive(Debug, Default)]
struct HeadFraming {
    /// Whether chunks are the only coding of the transfer.
    is_chunked: Option<bool>,
    length: Option<Result<u64, HeadError>>,
    /// What the connection does.
    closes: bool,
    is_kept: bool,
}

impl HeadFraming {
    fn hear(&mut self, name: &HeaderName, value: &HeaderValue) {
        if *name == CONTENT_LENGTH {
            // What is no text is no number either.
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

    /// How the body ends (RFC 9112, section 6.3).
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

/// A number of digits and nothing else.
fn decimal(text: &str) -> Option<u64> {
    if text.bytes().all(|byte| byte.is_ascii_digit()) { text.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, method: &Method, expected: Result<(u16, BodyEnd, bool), HeadError>) {
        let mut heard = BytesMut::from(text);
        heard.extend_from_slice(b"rest");
        let read = read(&mut heard, method).map(|head| {
            let head = head.expect("a whole head");
            (head.status.as_u16(), head.end, head.stays_open)
        });
        assert_eq!(read, expected, "{text:?}");
        if read.is_ok() {
            assert_eq!(heard, "rest");
        }
    }

    #[test]
    fn the_end_is_told_in_one_way() {
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
            // What is coded otherwise would be passed on in a form that its head does not tell.
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
    fn some_answers_have_no_body_whatever_they_say() {
        for (status, method) in
            [(204, Method::GET), (304, Method::GET), (200, Method::HEAD), (101, Method::GET)]
        {
            let text = format!("HTTP/1.1 {status} X\r\ncontent-length: 7\r\n\r\n");
            check(&text, &method, Ok((status, BodyEnd::Length(0), true)));
        }
    }

    #[test]
    fn an_old_version_stays_open_only_when_it_says_so() {
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
    fn what_only_informs_is_passed_over() {
        let early = "\r\nHTTP/1.1 103 Early\r\nlink: </x>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n".repeat(50);
        check(
            &format!("{early}HTTP/1.1 200 OK\ncontent-length: 2\n\n"),
            &Method::GET,
            Ok((200, BodyEnd::Length(2), true)),
        );
    }

    #[test]
    fn what_is_no_head_is_told_early() {
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
    fn a_head_in_pieces_is_waited_for() {
        let text = b"HTTP/1.1 200 Fine\r\nx-upper: A \r\ncontent-length: 2\r\n\r\nok";
        let mut heard = BytesMut::new();
        for (at, byte) in text.iter().enumerate() {
            heard.extend_from_slice(&[*byte]);
            match read(&mut heard, &Method::GET).unwrap() {
                None => assert!(at + 3 < text.len()),
                Some(head) => {
                    assert_eq!(head.headers["x-upper"], "A");
                    assert_eq!(head.extensions.get::<ReasonPhrase>().unwrap().as_bytes(), b"Fine");
                    assert_eq!(at + 3, text.len());
                    return;
                }
            }
        }
        panic!("it is never whole");
    }
}

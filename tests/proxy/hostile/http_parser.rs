//! Strict parsers of HTTP/1.1 (RFC 9112), for requests as a provider receives them and for responses as a
//! client receives them. They accept only the forms that Keychoir sends, and share no code with it.

use memchr::memmem;

/// The parsed head of a request.
#[derive(Clone, Debug)]
pub struct RequestHead {
    pub method: String,
    pub target: String,
    pub headers: Vec<(String, Vec<u8>)>,
    /// The bytes of the head, including the empty line.
    pub bytes: Vec<u8>,
}

impl RequestHead {
    pub fn header_values<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a [u8]> {
        header_values(&self.headers, name)
    }
}

fn header_values<'a>(headers: &'a [(String, Vec<u8>)], name: &'a str) -> impl Iterator<Item = &'a [u8]> {
    headers
        .iter()
        .filter(move |(header_name, _)| header_name.eq_ignore_ascii_case(name))
        .map(|(_, value)| &**value)
}

/// Parses the requests of a connection incrementally.
#[derive(Debug, Default)]
pub struct RequestParser {
    buffer: Vec<u8>,
    state: ParserState,
    /// The number of complete requests. The user of the parser may reset it.
    pub complete_count: usize,
}

/// The part of a request that the next bytes belong to.
#[derive(Debug, Default)]
enum ParserState {
    #[default]
    Head,
    /// A body of this number of further bytes.
    Length(usize),
    ChunkSize,
    /// A chunk of this size.
    Chunk(usize),
    /// An upgrade was requested, so bytes of another protocol may follow.
    UpgradeRequested,
}

impl RequestParser {
    /// Parses further bytes and returns the heads that they complete.
    ///
    /// # Errors
    ///
    /// Returns an error if the bytes are not an unambiguous request, or if the request has trailers.
    pub fn parse(&mut self, bytes: &[u8]) -> Result<Vec<RequestHead>, String> {
        self.buffer.extend_from_slice(bytes);
        let mut heads = Vec::new();
        loop {
            match self.state {
                ParserState::Head => {
                    let Some(end) = memmem::find(&self.buffer, b"\r\n\r\n") else { return Ok(heads) };
                    let bytes: Vec<u8> = self.buffer.drain(..end + 4).collect();
                    let head = parse_request_head(bytes)?;
                    self.state = body_state(&head)?;
                    self.complete_count +=
                        usize::from(matches!(self.state, ParserState::Head | ParserState::UpgradeRequested));
                    heads.push(head);
                }
                ParserState::Length(remaining) => {
                    let received_length = remaining.min(self.buffer.len());
                    self.buffer.drain(..received_length);
                    if received_length < remaining {
                        self.state = ParserState::Length(remaining - received_length);
                        return Ok(heads);
                    }
                    self.end_request();
                }
                ParserState::ChunkSize => {
                    let Some(end) = memmem::find(&self.buffer, b"\r\n") else { return Ok(heads) };
                    let size = parse_chunk_size(&self.buffer[..end])?;
                    let after = if size == 0 { end + 4 } else { end + 2 };
                    if self.buffer.len() < after {
                        return Ok(heads);
                    }
                    if size == 0 && &self.buffer[end + 2..after] != b"\r\n" {
                        return Err("the request has trailers".to_owned());
                    }
                    self.buffer.drain(..after);
                    if size == 0 {
                        self.end_request();
                    } else {
                        self.state = ParserState::Chunk(size);
                    }
                }
                ParserState::Chunk(size) => {
                    if self.buffer.len() < size + 2 {
                        return Ok(heads);
                    }
                    if &self.buffer[size..size + 2] != b"\r\n" {
                        return Err("the chunk does not end with CRLF".to_owned());
                    }
                    self.buffer.drain(..size + 2);
                    self.state = ParserState::ChunkSize;
                }
                ParserState::UpgradeRequested => return Ok(heads),
            }
        }
    }

    fn end_request(&mut self) {
        self.state = ParserState::Head;
        self.complete_count += 1;
    }

    /// Records the response to an upgrade request. `is_upgraded` is true if it switches the protocol.
    pub fn record_response(&mut self, is_upgraded: bool) {
        if matches!(self.state, ParserState::UpgradeRequested) && !is_upgraded {
            self.state = ParserState::Head;
        }
    }
}

fn is_token(text: &[u8]) -> bool {
    let is_symbol = |byte: &u8| b"!#$%&'*+-.^_`|~".contains(byte);
    !text.is_empty() && text.iter().all(|byte| byte.is_ascii_alphanumeric() || is_symbol(byte))
}

fn parse_request_head(bytes: Vec<u8>) -> Result<RequestHead, String> {
    let (line, headers) = split_head(&bytes[..bytes.len() - 4])?;
    let parts: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
    let [method, target, b"HTTP/1.1"] = parts[..] else {
        return Err("the request line is malformed".to_owned());
    };
    if !is_token(method) {
        return Err("the method is not a token".to_owned());
    }
    let is_printable = target.iter().all(|byte| byte.is_ascii_graphic() && *byte != b'#');
    if target.first() != Some(&b'/') || !is_printable {
        return Err("the target is not in origin form".to_owned());
    }
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok(RequestHead { method: text(method), target: text(target), headers, bytes })
}

/// The first line of a head, and the name and value of each header.
type SplitHead<'a> = (&'a [u8], Vec<(String, Vec<u8>)>);

/// Splits a head into its first line and its headers.
fn split_head(head: &[u8]) -> Result<SplitHead<'_>, String> {
    let mut lines = Vec::new();
    let mut rest = head;
    while let Some(end) = memmem::find(rest, b"\r\n") {
        lines.push(&rest[..end]);
        rest = &rest[end + 2..];
    }
    lines.push(rest);
    if lines.iter().any(|line| line.iter().any(|byte| b"\r\n\0".contains(byte))) {
        return Err("the head contains a bare CR, LF or NUL".to_owned());
    }
    let headers = lines[1..].iter().map(|line| {
        let colon = line.iter().position(|byte| *byte == b':').ok_or("a header has no colon")?;
        let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
        if !is_token(name) {
            return Err("a header name is not a token");
        }
        if value.iter().any(|byte| (*byte < b' ' && *byte != b'\t') || *byte == 0x7f) {
            return Err("a header value contains a control character");
        }
        Ok((String::from_utf8_lossy(name).into_owned(), value.to_vec()))
    });
    let headers: Result<_, &str> = headers.collect();
    Ok((lines[0], headers.map_err(str::to_owned)?))
}

/// Returns the state of a parser after a head: the framing of the body, or the next head.
fn body_state(head: &RequestHead) -> Result<ParserState, String> {
    let lengths: Vec<_> = head.header_values("content-length").collect();
    let codings: Vec<_> = head.header_values("transfer-encoding").collect();
    if head.header_values("upgrade").next().is_some() {
        let has_no_body = codings.is_empty() && lengths.iter().all(|length| *length == b"0");
        return if has_no_body {
            Ok(ParserState::UpgradeRequested)
        } else {
            Err("the upgrade request has a body".to_owned())
        };
    }
    match (&*lengths, &*codings) {
        ([], []) => Ok(ParserState::Head),
        ([length], []) => match parse_number(length)? {
            0 => Ok(ParserState::Head),
            length => Ok(ParserState::Length(length)),
        },
        ([], [b"chunked"]) => Ok(ParserState::ChunkSize),
        _ => Err("the request has more than one framing".to_owned()),
    }
}

fn parse_number(text: &[u8]) -> Result<usize, String> {
    let is_number = !text.is_empty() && text.iter().all(u8::is_ascii_digit);
    let number = std::str::from_utf8(text).ok().filter(|_| is_number).and_then(|text| text.parse().ok());
    number.ok_or_else(|| "the number is malformed".to_owned())
}

fn parse_chunk_size(line: &[u8]) -> Result<usize, String> {
    let is_size = !line.is_empty() && line.iter().all(u8::is_ascii_hexdigit);
    let text = std::str::from_utf8(line).ok().filter(|_| is_size);
    let size = text.and_then(|text| usize::from_str_radix(text, 16).ok());
    size.ok_or_else(|| "the chunk size is malformed".to_owned())
}

/// A response as a client received it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    pub status: u16,
    pub headers: Vec<(String, Vec<u8>)>,
    /// The body without its framing.
    pub body: Vec<u8>,
    /// Whether the body has its whole length or its last chunk. It is always true for a body without a framing, which
    /// ends with the connection.
    pub is_complete: bool,
}

impl Response {
    pub fn header(&self, name: &str) -> Option<String> {
        header_values(&self.headers, name).next().map(|value| String::from_utf8_lossy(value).into_owned())
    }
}

/// Parses all responses of a connection. A response to a HEAD request is not supported.
///
/// # Errors
///
/// Returns an error if the bytes are not valid HTTP.
pub fn parse_responses(mut bytes: &[u8]) -> Result<Vec<Response>, String> {
    let mut responses = Vec::new();
    while !bytes.is_empty() {
        let Some(end) = memmem::find(bytes, b"\r\n\r\n") else {
            return Err("the head is incomplete".to_owned());
        };
        let (line, headers) = split_head(&bytes[..end])?;
        bytes = &bytes[end + 4..];
        let has_known_version = line.starts_with(b"HTTP/1.1 ") || line.starts_with(b"HTTP/1.0 ");
        let status = line.get(9..12).filter(|_| has_known_version && line.get(12) == Some(&b' '));
        let status = parse_number(
            status.ok_or_else(|| format!("the status line is malformed: {}", line.escape_ascii()))?,
        )?;
        let status = u16::try_from(status).map_err(|_| "the status is too large")?;
        let mut response = Response { status, headers, body: Vec::new(), is_complete: true };
        let lengths: Vec<_> =
            header_values(&response.headers, "content-length").map(<[u8]>::to_vec).collect();
        let codings: Vec<_> =
            header_values(&response.headers, "transfer-encoding").map(<[u8]>::to_vec).collect();
        match (&*lengths, &*codings) {
            _ if status == 101 => (response.body, bytes) = (bytes.to_vec(), &[]),
            _ if status < 200 || status == 204 || status == 304 => {}
            ([], []) => (response.body, bytes) = (bytes.to_vec(), &[]),
            ([length], []) => {
                let length = parse_number(length)?;
                let received_length = length.min(bytes.len());
                (response.body, response.is_complete) =
                    (bytes[..received_length].to_vec(), received_length == length);
                bytes = &bytes[received_length..];
            }
            ([], [coding]) if coding == b"chunked" => {
                (response.is_complete, bytes) = parse_chunks(bytes, &mut response.body)?;
            }
            _ => return Err("the response has more than one framing".to_owned()),
        }
        responses.push(response);
    }
    Ok(responses)
}

/// Appends the content of chunks to `body`. Returns whether the body is complete, and the bytes after it.
fn parse_chunks<'a>(mut bytes: &'a [u8], body: &mut Vec<u8>) -> Result<(bool, &'a [u8]), String> {
    loop {
        let Some(end) = memmem::find(bytes, b"\r\n") else { return Ok((false, &[])) };
        let size = parse_chunk_size(&bytes[..end])?;
        bytes = &bytes[end + 2..];
        let received_length = size.min(bytes.len());
        body.extend_from_slice(&bytes[..received_length]);
        bytes = &bytes[received_length..];
        match bytes {
            [b'\r', b'\n', rest @ ..] if size == 0 => return Ok((true, rest)),
            [b'\r', b'\n', rest @ ..] if received_length == size => bytes = rest,
            _ if received_length < size || bytes.len() < 2 => return Ok((false, &[])),
            _ => return Err("a chunk does not end with CRLF, or the response has trailers".to_owned()),
        }
    }
}

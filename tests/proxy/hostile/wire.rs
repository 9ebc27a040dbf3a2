//! Strict parsers of HTTP/1.1 (RFC 9112): of requests as a provider receives them, and of responses
//! as a client receives them. They are too strict for a proxy, and share no code with the program
//! under test.

use memchr::memmem;

/// The head of a request.
#[derive(Clone, Debug)]
pub struct Head {
    pub method: String,
    pub target: String,
    pub headers: Vec<(String, Vec<u8>)>,
    /// The raw bytes.
    pub bytes: Vec<u8>,
}

impl Head {
    pub fn values<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a [u8]> {
        values(&self.headers, name)
    }
}

fn values<'a>(headers: &'a [(String, Vec<u8>)], name: &'a str) -> impl Iterator<Item = &'a [u8]> {
    headers.iter().filter(move |(found, _)| found.eq_ignore_ascii_case(name)).map(|(_, value)| &**value)
}

/// Parses the requests of one connection from a stream of bytes.
#[derive(Debug, Default)]
pub struct Requests {
    buffer: Vec<u8>,
    state: State,
    /// Requests received with their whole bodies.
    pub whole: usize,
}

#[derive(Debug, Default)]
enum State {
    #[default]
    Head,
    Length(usize),
    ChunkSize,
    Chunk(usize),
    /// An upgrade was requested: another protocol may follow.
    Asked,
}

impl Requests {
    /// The heads that are complete with these bytes.
    ///
    /// # Errors
    ///
    /// When the bytes are no unambiguous request.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<Vec<Head>, String> {
        self.buffer.extend_from_slice(bytes);
        let mut heads = Vec::new();
        loop {
            match self.state {
                State::Head => {
                    let Some(end) = memmem::find(&self.buffer, b"\r\n\r\n") else { return Ok(heads) };
                    let bytes: Vec<u8> = self.buffer.drain(..end + 4).collect();
                    let head = request_head(bytes)?;
                    self.state = framing(&head)?;
                    self.whole += usize::from(matches!(self.state, State::Head | State::Asked));
                    heads.push(head);
                }
                State::Length(left) => {
                    let here = left.min(self.buffer.len());
                    self.buffer.drain(..here);
                    if here < left {
                        self.state = State::Length(left - here);
                        return Ok(heads);
                    }
                    self.end();
                }
                State::ChunkSize => {
                    let Some(end) = memmem::find(&self.buffer, b"\r\n") else { return Ok(heads) };
                    let size = chunk_size(&self.buffer[..end])?;
                    let after = if size == 0 { end + 4 } else { end + 2 };
                    if self.buffer.len() < after {
                        return Ok(heads);
                    }
                    if size == 0 && &self.buffer[end + 2..after] != b"\r\n" {
                        return Err("a request with trailers".to_owned());
                    }
                    self.buffer.drain(..after);
                    if size == 0 {
                        self.end();
                    } else {
                        self.state = State::Chunk(size);
                    }
                }
                State::Chunk(size) => {
                    if self.buffer.len() < size + 2 {
                        return Ok(heads);
                    }
                    if &self.buffer[size..size + 2] != b"\r\n" {
                        return Err("a chunk without its end".to_owned());
                    }
                    self.buffer.drain(..size + 2);
                    self.state = State::ChunkSize;
                }
                State::Asked => return Ok(heads),
            }
        }
    }

    fn end(&mut self) {
        self.state = State::Head;
        self.whole += 1;
    }

    /// Reports the response to an upgrade request: whether the protocol is switched.
    pub fn answered(&mut self, is_switched: bool) {
        if matches!(self.state, State::Asked) && !is_switched {
            self.state = State::Head;
        }
    }
}

fn is_token(text: &[u8]) -> bool {
    let is_mark = |byte: &u8| b"!#$%&'*+-.^_`|~".contains(byte);
    !text.is_empty() && text.iter().all(|byte| byte.is_ascii_alphanumeric() || is_mark(byte))
}

fn request_head(bytes: Vec<u8>) -> Result<Head, String> {
    let (line, headers) = lines(&bytes[..bytes.len() - 4])?;
    let parts: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
    let [method, target, b"HTTP/1.1"] = parts[..] else { return Err("no request line".to_owned()) };
    if !is_token(method) {
        return Err("no method".to_owned());
    }
    let is_printable = target.iter().all(|byte| byte.is_ascii_graphic() && *byte != b'#');
    if target.first() != Some(&b'/') || !is_printable {
        return Err("no target in origin form".to_owned());
    }
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok(Head { method: text(method), target: text(target), headers, bytes })
}

type Lines<'a> = (&'a [u8], Vec<(String, Vec<u8>)>);

/// The first line of a head, and its headers.
fn lines(head: &[u8]) -> Result<Lines<'_>, String> {
    let mut lines = Vec::new();
    let mut rest = head;
    while let Some(end) = memmem::find(rest, b"\r\n") {
        lines.push(&rest[..end]);
        rest = &rest[end + 2..];
    }
    lines.push(rest);
    if lines.iter().any(|line| line.iter().any(|byte| b"\r\n\0".contains(byte))) {
        return Err("a bare CR, LF or NUL in a head".to_owned());
    }
    let headers = lines[1..].iter().map(|line| {
        let colon = line.iter().position(|byte| *byte == b':').ok_or("a header without a colon")?;
        let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
        if !is_token(name) {
            return Err("no name of a header");
        }
        if value.iter().any(|byte| (*byte < b' ' && *byte != b'\t') || *byte == 0x7f) {
            return Err("a control character in a header");
        }
        Ok((String::from_utf8_lossy(name).into_owned(), value.to_vec()))
    });
    let headers: Result<_, &str> = headers.collect();
    Ok((lines[0], headers.map_err(str::to_owned)?))
}

fn framing(head: &Head) -> Result<State, String> {
    let lengths: Vec<_> = head.values("content-length").collect();
    let codings: Vec<_> = head.values("transfer-encoding").collect();
    if head.values("upgrade").next().is_some() {
        let is_bare = codings.is_empty() && lengths.iter().all(|length| *length == b"0");
        return if is_bare { Ok(State::Asked) } else { Err("an upgrade with a body".to_owned()) };
    }
    match (&*lengths, &*codings) {
        ([], []) => Ok(State::Head),
        ([length], []) => match number(length)? {
            0 => Ok(State::Head),
            length => Ok(State::Length(length)),
        },
        ([], [b"chunked"]) => Ok(State::ChunkSize),
        _ => Err("a request with more than one framing".to_owned()),
    }
}

fn number(text: &[u8]) -> Result<usize, String> {
    let is_number = !text.is_empty() && text.iter().all(u8::is_ascii_digit);
    let number = std::str::from_utf8(text).ok().filter(|_| is_number).and_then(|text| text.parse().ok());
    number.ok_or_else(|| "no length".to_owned())
}

fn chunk_size(line: &[u8]) -> Result<usize, String> {
    let is_size = !line.is_empty() && line.iter().all(u8::is_ascii_hexdigit);
    let text = std::str::from_utf8(line).ok().filter(|_| is_size);
    let size = text.and_then(|text| usize::from_str_radix(text, 16).ok());
    size.ok_or_else(|| "no size of a chunk".to_owned())
}

/// A response as a client received it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, Vec<u8>)>,
    /// The body without its framing.
    pub body: Vec<u8>,
    /// Whether its end came: its length, its last chunk, or, without either, the end of the
    /// connection.
    pub is_whole: bool,
}

impl Answer {
    pub fn value(&self, name: &str) -> Option<String> {
        values(&self.headers, name).next().map(|value| String::from_utf8_lossy(value).into_owned())
    }
}

/// All responses of a connection so far; none of them is to a HEAD request.
///
/// # Errors
///
/// When the client received malformed HTTP.
pub fn answers(mut bytes: &[u8]) -> Result<Vec<Answer>, String> {
    let mut answers = Vec::new();
    while !bytes.is_empty() {
        let Some(end) = memmem::find(bytes, b"\r\n\r\n") else { return Err("half a head".to_owned()) };
        let (line, headers) = lines(&bytes[..end])?;
        bytes = &bytes[end + 4..];
        let is_known = line.starts_with(b"HTTP/1.1 ") || line.starts_with(b"HTTP/1.0 ");
        let status = line.get(9..12).filter(|_| is_known && line.get(12) == Some(&b' '));
        let status = number(status.ok_or_else(|| format!("no status line: {}", line.escape_ascii()))?)?;
        let status = u16::try_from(status).map_err(|_| "no status")?;
        let mut answer = Answer { status, headers, body: Vec::new(), is_whole: true };
        let lengths: Vec<_> = values(&answer.headers, "content-length").map(<[u8]>::to_vec).collect();
        let codings: Vec<_> = values(&answer.headers, "transfer-encoding").map(<[u8]>::to_vec).collect();
        match (&*lengths, &*codings) {
            _ if status == 101 => (answer.body, bytes) = (bytes.to_vec(), &[]),
            _ if status < 200 || status == 204 || status == 304 => {}
            ([], []) => (answer.body, bytes) = (bytes.to_vec(), &[]),
            ([length], []) => {
                let length = number(length)?;
                let here = length.min(bytes.len());
                (answer.body, answer.is_whole) = (bytes[..here].to_vec(), here == length);
                bytes = &bytes[here..];
            }
            ([], [coding]) if coding == b"chunked" => {
                (answer.is_whole, bytes) = chunks(bytes, &mut answer.body)?;
            }
            _ => return Err("an answer with more than one framing".to_owned()),
        }
        answers.push(answer);
    }
    Ok(answers)
}

/// Parses chunks; returns whether their end came, and the bytes after it.
fn chunks<'a>(mut bytes: &'a [u8], body: &mut Vec<u8>) -> Result<(bool, &'a [u8]), String> {
    loop {
        let Some(end) = memmem::find(bytes, b"\r\n") else { return Ok((false, &[])) };
        let size = chunk_size(&bytes[..end])?;
        bytes = &bytes[end + 2..];
        let here = size.min(bytes.len());
        body.extend_from_slice(&bytes[..here]);
        bytes = &bytes[here..];
        match bytes {
            [b'\r', b'\n', rest @ ..] if size == 0 => return Ok((true, rest)),
            [b'\r', b'\n', rest @ ..] if here == size => bytes = rest,
            _ if here < size || bytes.len() < 2 => return Ok((false, &[])),
            _ => return Err("an answer with a chunk without its end, or with trailers".to_owned()),
        }
    }
}

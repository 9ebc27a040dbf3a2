//! Parses HTTP/1.1 messages for the load generator and the simulated provider, in as little time as possible. It finds
//! headers and the ends of heads and bodies, and neither validates them nor supports trailers.

use std::str;

use memchr::{memchr, memmem};

/// The remaining part of a message body that is being read, by its framing.
#[derive(Debug)]
pub enum Body {
    /// The body has a `content-length`. The field is the number of remaining bytes.
    Length(u64),
    /// The body is chunked. The field is the state of its parser.
    Chunked(ChunkState),
}

/// The parser state in a chunked body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChunkState {
    /// The parser reads the digits of a chunk size. The field is the value of the digits so far.
    Size(u64),
    /// The parser has read the digits, and reads the rest of the line. The field is the chunk size.
    SizeLine(u64),
    /// The parser reads chunk data. The field is the number of remaining bytes.
    Data(u64),
    /// The parser reads the end of the line after chunk data.
    DataLine,
    /// The parser has read the size line of the last chunk. The field is the number of remaining line feeds.
    Last(u8),
}

impl Body {
    pub fn is_complete(&self) -> bool {
        matches!(self, Self::Length(0) | Self::Chunked(ChunkState::Last(0)))
    }

    /// Consumes bytes up to the end of the body, and passes their payload to `payload`. Returns the number of consumed
    /// bytes.
    pub fn consume(&mut self, bytes: &[u8], payload: &mut impl FnMut(&[u8])) -> usize {
        match self {
            Self::Length(remaining) => {
                let consumed_bytes = bytes.len().min(usize::try_from(*remaining).unwrap());
                *remaining -= consumed_bytes as u64;
                payload(&bytes[..consumed_bytes]);
                consumed_bytes
            }
            Self::Chunked(state) => {
                let mut consumed_bytes = 0;
                while consumed_bytes < bytes.len() && *state != ChunkState::Last(0) {
                    consumed_bytes += state.consume(&bytes[consumed_bytes..], payload);
                }
                consumed_bytes
            }
        }
    }
}

impl ChunkState {
    pub const START: Self = Self::Size(0);

    /// Consumes at least one byte. Returns the number of consumed bytes.
    fn consume(&mut self, bytes: &[u8], payload: &mut impl FnMut(&[u8])) -> usize {
        let byte = bytes[0];
        *self = match *self {
            Self::Data(remaining) => {
                let consumed_bytes = bytes.len().min(usize::try_from(remaining).unwrap());
                payload(&bytes[..consumed_bytes]);
                let remaining = remaining - consumed_bytes as u64;
                *self = if remaining == 0 { Self::DataLine } else { Self::Data(remaining) };
                return consumed_bytes;
            }
            Self::Size(size) => match char::from(byte).to_digit(16) {
                Some(digit) => Self::Size(size * 16 + u64::from(digit)),
                None => Self::SizeLine(size),
            },
            Self::SizeLine(0) if byte == b'\n' => Self::Last(1),
            Self::SizeLine(size) if byte == b'\n' => Self::Data(size),
            Self::DataLine if byte == b'\n' => Self::START,
            Self::Last(lines) if byte == b'\n' => Self::Last(lines - 1),
            // Other bytes, such as a carriage return or a chunk extension, do not change the state.
            same @ (Self::SizeLine(_) | Self::DataLine | Self::Last(_)) => same,
        };
        1
    }
}

/// Returns the length of the head at the start of `bytes`, including its final empty line. Returns `None` if the head
/// is incomplete.
pub fn head_length(bytes: &[u8]) -> Option<usize> {
    memmem::find(bytes, b"\r\n\r\n").map(|at| at + 4)
}

/// Iterates over the header names and values of a head.
pub fn headers(head: &[u8]) -> impl Iterator<Item = (&[u8], &[u8])> {
    let lines = memchr(b'\n', head).map_or(&[][..], |end| &head[end + 1..]);
    lines.split(|byte| *byte == b'\n').filter_map(|line| {
        let colon = memchr(b':', line)?;
        Some((&line[..colon], line[colon + 1..].trim_ascii()))
    })
}

/// Returns the body whose framing the headers of a head describe. Without such a header, the body is empty.
pub fn parse_body_framing(head: &[u8]) -> Body {
    let mut body = Body::Length(0);
    for (name, value) in headers(head) {
        // Comparing the length first rules out most names cheaply.
        match name.len() {
            14 if name.eq_ignore_ascii_case(b"content-length") => {
                body = Body::Length(str::from_utf8(value).unwrap().parse().unwrap());
            }
            17 if name.eq_ignore_ascii_case(b"transfer-encoding") => body = Body::Chunked(ChunkState::START),
            _ => {}
        }
    }
    body
}

//! A minimal HTTP/1.1 parser for both ends of the comparison: the ends of heads and bodies.

use std::str;

use memchr::{memchr, memmem};

/// The framing of the body after a head.
#[derive(Debug)]
pub enum Body {
    Length(u64),
    Chunked(Chunk),
}

/// The position in a chunked body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chunk {
    /// In a size line, with the size parsed so far.
    Size(u64),
    /// After a size other than 0, before the end of its line.
    SizeLine(u64),
    Data(u64),
    /// Between a chunk's data and the next size.
    DataLine,
    /// After the last size: the number of line feeds still to come.
    Last(u8),
}

impl Body {
    /// Whether the body is complete.
    pub fn is_complete(&self) -> bool {
        matches!(self, Self::Length(0) | Self::Chunked(Chunk::Last(0)))
    }

    /// Consumes the bytes of the body, passes on its payload, and returns their number.
    pub fn take(&mut self, bytes: &[u8], payload: &mut impl FnMut(&[u8])) -> usize {
        match self {
            Self::Length(left) => {
                let own = bytes.len().min(usize::try_from(*left).unwrap());
                *left -= own as u64;
                payload(&bytes[..own]);
                own
            }
            Self::Chunked(at) => {
                let mut taken = 0;
                while taken < bytes.len() && *at != Chunk::Last(0) {
                    taken += at.take(&bytes[taken..], payload);
                }
                taken
            }
        }
    }
}

impl Chunk {
    pub const BEGIN: Self = Self::Size(0);

    fn take(&mut self, bytes: &[u8], payload: &mut impl FnMut(&[u8])) -> usize {
        let byte = bytes[0];
        *self = match *self {
            Self::Data(left) => {
                let own = bytes.len().min(usize::try_from(left).unwrap());
                payload(&bytes[..own]);
                let left = left - own as u64;
                *self = if left == 0 { Self::DataLine } else { Self::Data(left) };
                return own;
            }
            Self::Size(size) => match char::from(byte).to_digit(16) {
                Some(digit) => Self::Size(size * 16 + u64::from(digit)),
                None => Self::SizeLine(size),
            },
            Self::SizeLine(0) if byte == b'\n' => Self::Last(1),
            Self::SizeLine(size) if byte == b'\n' => Self::Data(size),
            Self::DataLine if byte == b'\n' => Self::BEGIN,
            Self::Last(lines) if byte == b'\n' => Self::Last(lines - 1),
            // Carriage returns.
            same @ (Self::SizeLine(_) | Self::DataLine | Self::Last(_)) => same,
        };
        1
    }
}

/// The length of the head at the begin of these bytes, including the empty line that ends it.
pub fn head_end(bytes: &[u8]) -> Option<usize> {
    memmem::find(bytes, b"\r\n\r\n").map(|at| at + 4)
}

/// The headers of a head as raw names and values.
pub fn headers(head: &[u8]) -> impl Iterator<Item = (&[u8], &[u8])> {
    let lines = memchr(b'\n', head).map_or(&[][..], |end| &head[end + 1..]);
    lines.split(|byte| *byte == b'\n').filter_map(|line| {
        let colon = memchr(b':', line)?;
        Some((&line[..colon], line[colon + 1..].trim_ascii()))
    })
}

/// The body framing of a head.
pub fn body(head: &[u8]) -> Body {
    let mut body = Body::Length(0);
    for (name, value) in headers(head) {
        // Most names differ in length.
        match name.len() {
            14 if name.eq_ignore_ascii_case(b"content-length") => {
                body = Body::Length(str::from_utf8(value).unwrap().parse().unwrap());
            }
            17 if name.eq_ignore_ascii_case(b"transfer-encoding") => body = Body::Chunked(Chunk::BEGIN),
            _ => {}
        }
    }
    body
}

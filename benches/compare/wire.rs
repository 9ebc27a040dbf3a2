//! As much of HTTP/1.1 as both ends of the comparison need: where a head ends, and where a body does.

use std::str;

use memchr::{memchr, memmem};

/// What a head says about the body behind it.
#[derive(Debug)]
pub enum Body {
    Length(u64),
    Chunked(Chunk),
}

/// Where in its chunks a body is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chunk {
    /// In a line with a size, of which this much was read.
    Size(u64),
    /// Behind a size that is not 0, up to the end of its line.
    SizeLine(u64),
    Data(u64),
    /// Between a chunk's data and the next size.
    DataLine,
    /// Behind the last size: so many empty lines' line feeds are to come.
    Last(u8),
}

impl Body {
    /// Whether nothing of it is to come.
    pub fn is_whole(&self) -> bool {
        matches!(self, Self::Length(0) | Self::Chunked(Chunk::Last(0)))
    }

    /// Takes what is its own of these bytes, shows its payload, and returns how many bytes that were.
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

/// The length of the head at the begin of these bytes, with the empty line that ends it.
pub fn head_end(bytes: &[u8]) -> Option<usize> {
    memmem::find(bytes, b"\r\n\r\n").map(|at| at + 4)
}

/// Each header of a head by its name, as it was written, and its value.
pub fn headers(head: &[u8]) -> impl Iterator<Item = (&[u8], &[u8])> {
    let lines = memchr(b'\n', head).map_or(&[][..], |end| &head[end + 1..]);
    lines.split(|byte| *byte == b'\n').filter_map(|line| {
        let colon = memchr(b':', line)?;
        Some((&line[..colon], line[colon + 1..].trim_ascii()))
    })
}

/// The body that a head announces.
pub fn body(head: &[u8]) -> Body {
    let mut body = Body::Length(0);
    for (name, value) in headers(head) {
        // Most names are told apart by their length.
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

//! Encodes response bodies, and parses the names of encodings in faults. Brotli and Zstandard bodies consist of
//! uncompressed blocks, because tests only check whether a proxy can decode a body.
//!
//! Sources: RFC 7932 (Brotli, 9.2), RFC 8878 (Zstandard, 3.1.1), RFC 9110 (8.4.1, `deflate` is zlib).

use std::fmt;
use std::io::Write;
use std::str::FromStr;

use flate2::Compression;
use flate2::write::{GzEncoder, ZlibEncoder};

/// A value of `Content-Encoding`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// The encoding `gzip`.
    Gzip,
    /// The encoding `deflate`, which is zlib.
    Deflate,
    /// The encoding `br`.
    Brotli,
    /// The encoding `zstd`.
    Zstandard,
}

/// Maximum number of bytes of a block. It is the maximum that Brotli can write as a length of four hexadecimal digits.
/// The maximum of Zstandard is twice as large.
const MAX_BLOCK_BYTES: usize = 65_536;

/// The names of the encodings in `Content-Encoding` and in faults.
const NAMES: [(&str, Encoding); 4] = [
    ("gzip", Encoding::Gzip),
    ("deflate", Encoding::Deflate),
    ("br", Encoding::Brotli),
    ("zstd", Encoding::Zstandard),
];

impl Encoding {
    /// Encodes `plain`.
    pub(super) fn encode(self, plain: &[u8]) -> Vec<u8> {
        match self {
            Encoding::Gzip => {
                let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
                // Writing to memory cannot fail.
                encoder.write_all(plain).and_then(|()| encoder.finish()).unwrap_or_default()
            }
            Encoding::Deflate => {
                let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
                encoder.write_all(plain).and_then(|()| encoder.finish()).unwrap_or_default()
            }
            Encoding::Brotli => encode_brotli(plain),
            Encoding::Zstandard => encode_zstandard(plain),
        }
    }
}

fn encode_brotli(plain: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(plain.len() + 8);
    // The stream begins with the window of 64 KiB, a single bit 0, which shares a byte with the first block.
    let mut window_bits = 1;
    for block in plain.chunks(MAX_BLOCK_BYTES) {
        let length = u32::try_from(block.len() - 1).unwrap_or(0);
        // The block header contains: not the last block (1 bit), a length of four digits (2 bits), the length,
        // uncompressed (1 bit), padding to the next byte.
        let block_header = (length << 3 | 1 << 19) << window_bits;
        bytes.extend_from_slice(&block_header.to_le_bytes()[..3]);
        bytes.extend_from_slice(block);
        window_bits = 0;
    }
    // The stream ends with an empty last block.
    bytes.push(0b11 << window_bits);
    bytes
}

fn encode_zstandard(plain: &[u8]) -> Vec<u8> {
    // The frame begins with the magic number, and declares a single segment whose length has four bytes.
    let mut bytes = vec![0x28, 0xb5, 0x2f, 0xfd, 0xa0];
    bytes.extend_from_slice(&u32::try_from(plain.len()).unwrap_or(u32::MAX).to_le_bytes());
    let mut blocks = plain.chunks(MAX_BLOCK_BYTES).peekable();
    if blocks.peek().is_none() {
        // An empty body consists of an empty last block.
        bytes.extend_from_slice(&[1, 0, 0]);
    }
    while let Some(block) = blocks.next() {
        // The block header contains whether the block is the last (1 bit), the type (2 bits, 0 for uncompressed), and
        // the length.
        let is_last = u32::from(blocks.peek().is_none());
        let block_header = is_last | u32::try_from(block.len()).unwrap_or(0) << 3;
        bytes.extend_from_slice(&block_header.to_le_bytes()[..3]);
        bytes.extend_from_slice(block);
    }
    bytes
}

impl fmt::Display for Encoding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = NAMES.iter().find(|(_, encoding)| encoding == self).map_or("", |(name, _)| name);
        f.write_str(name)
    }
}

impl FromStr for Encoding {
    type Err = UnknownEncoding;

    fn from_str(text: &str) -> Result<Self, UnknownEncoding> {
        let known_encoding = NAMES.into_iter().find(|(name, _)| *name == text);
        known_encoding.map(|(_, encoding)| encoding).ok_or_else(|| UnknownEncoding(text.to_owned()))
    }
}

/// An encoding that the simulator does not support.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not an encoding: write gzip, deflate, br or zstd")]
pub struct UnknownEncoding(String);

#[cfg(test)]
mod tests {
    use super::*;

    /// The expected bytes were verified with the Brotli decoder of Node.js 20 and with `zstd` 1.5.
    #[test]
    fn uncompressed_bodies_have_the_bytes_that_decoders_accept() {
        let brotli = [&[0x40, 0x00, 0x10][..], b"hello", &[0x03]].concat();
        assert_eq!(Encoding::Brotli.encode(b"hello"), brotli);
        assert_eq!(Encoding::Brotli.encode(b""), [0x06]);
        let zstandard = [&[0x28, 0xb5, 0x2f, 0xfd, 0xa0, 5, 0, 0, 0, 0x29, 0, 0][..], b"hello"].concat();
        assert_eq!(Encoding::Zstandard.encode(b"hello"), zstandard);
        assert_eq!(Encoding::Zstandard.encode(b"").len(), 12);
        let long = vec![b'a'; 100_000];
        assert_eq!(Encoding::Brotli.encode(&long).len(), 100_000 + 3 + 3 + 1);
        assert_eq!(Encoding::Zstandard.encode(&long).len(), 100_000 + 9 + 3 + 3);
    }
}

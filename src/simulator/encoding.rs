//! Encodes response bodies. Brotli and Zstandard bodies consist of uncompressed blocks, because tests
//! check only whether a proxy can decode a body.
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
    /// `gzip`
    Gzip,
    /// `deflate`, which is zlib.
    Deflate,
    /// `br`
    Brotli,
    /// `zstd`
    Zstandard,
}

/// Maximum number of bytes of a block. It is the limit of Brotli with a length of four digits. The limit of
/// Zstandard is twice as large.
const MAX_BLOCK_BYTES: usize = 65_536;

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
            Encoding::Brotli => compress_brotli(plain),
            Encoding::Zstandard => compress_zstandard(plain),
        }
    }
}

fn compress_brotli(plain: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(plain.len() + 8);
    // A window of 64 KiB is encoded as the single bit 0, which shares a byte with the first block.
    let mut window_bits = 1;
    for block in plain.chunks(MAX_BLOCK_BYTES) {
        let length = u32::try_from(block.len() - 1).unwrap_or(0);
        // The header contains: not the last block (1 bit), four digits (2 bits), the length, uncompressed
        // (1 bit), padding to the next byte.
        let head = (length << 3 | 1 << 19) << window_bits;
        bytes.extend_from_slice(&head.to_le_bytes()[..3]);
        bytes.extend_from_slice(block);
        window_bits = 0;
    }
    // The last block, which is empty.
    bytes.push(0b11 << window_bits);
    bytes
}

fn compress_zstandard(plain: &[u8]) -> Vec<u8> {
    // The magic number, and a single segment whose length has four bytes.
    let mut bytes = vec![0x28, 0xb5, 0x2f, 0xfd, 0xa0];
    bytes.extend_from_slice(&u32::try_from(plain.len()).unwrap_or(u32::MAX).to_le_bytes());
    let mut blocks = plain.chunks(MAX_BLOCK_BYTES).peekable();
    if blocks.peek().is_none() {
        bytes.extend_from_slice(&[1, 0, 0]);
    }
    while let Some(block) = blocks.next() {
        // The header contains whether the block is the last (1 bit), the type (2 bits, 0 for uncompressed), and
        // the length.
        let is_last = u32::from(blocks.peek().is_none());
        let head = is_last | u32::try_from(block.len()).unwrap_or(0) << 3;
        bytes.extend_from_slice(&head.to_le_bytes()[..3]);
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
    fn stored_blocks_are_readable_by_decoders() {
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

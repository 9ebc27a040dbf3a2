//! Encodes bytes in base64, even if they arrive in several chunks.

use bytes::Bytes;

/// Encodes bytes that are all available.
pub(super) fn base64(bytes: &[u8]) -> String {
    let mut encoder = Base64Encoder::default();
    String::from_utf8([encoder.push(bytes), encoder.finish()].concat()).unwrap_or_default()
}

/// An encoder of bytes that arrive in several chunks.
#[derive(Debug, Default)]
pub(super) struct Base64Encoder {
    /// At most two bytes, which are encoded together with the next chunk.
    remainder: Vec<u8>,
}

impl Base64Encoder {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

    /// Encodes all complete groups of three bytes.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Bytes {
        self.remainder.extend_from_slice(bytes);
        let length = self.remainder.len() / 3 * 3;
        let digits: Vec<u8> = self.remainder[..length].chunks_exact(3).flat_map(Self::encode_group).collect();
        self.remainder.drain(..length);
        digits.into()
    }

    /// Encodes the remaining bytes with padding.
    pub(super) fn finish(&mut self) -> Bytes {
        let padding = match self.remainder.len() {
            1 => 2,
            2 => 1,
            _ => return Bytes::new(),
        };
        self.remainder.resize(3, 0);
        let mut digits = Self::encode_group(&self.remainder);
        self.remainder.clear();
        digits[4 - padding..].fill(b'=');
        Bytes::copy_from_slice(&digits)
    }

    /// Encodes three bytes as four digits.
    fn encode_group(bytes: &[u8]) -> [u8; 4] {
        let bits = bytes.iter().fold(0_usize, |bits, byte| bits << 8 | usize::from(*byte));
        [18, 12, 6, 0].map(|shift| Self::DIGITS[bits >> shift & 63])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_the_same_however_the_bytes_are_split() {
        for (text, expected) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
        ] {
            for size in 1..=6 {
                let mut encoder = Base64Encoder::default();
                let mut encoded: Vec<u8> =
                    text.as_bytes().chunks(size).flat_map(|chunk| encoder.push(chunk)).collect();
                encoded.extend_from_slice(&encoder.finish());
                assert_eq!(String::from_utf8(encoded).unwrap(), expected);
            }
        }
    }
}

//! Decodes a copy of a compressed body, so that it can be classified or searched. Separate from the relay,
//! which passes on the original.
//!
//! The codings here are those that `policy::headers` offers upstream, so that a response in an offered coding
//! can always be decoded.

use std::io::Read;

use flate2::read::{DeflateDecoder, MultiGzDecoder, ZlibDecoder};

/// Maximum codings of one body. Two occur where a server and a proxy in front of it both compress; more would
/// only multiply the work.
const MAX_CODINGS: usize = 2;

/// A content coding (RFC 9110, section 8.4.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coding {
    /// `gzip` and `x-gzip`.
    Gzip,
    /// `deflate`: zlib's format, or the raw deflate stream that some servers send under this name.
    Deflate,
}

/// The codings that a `content-encoding` names, in the order in which they were applied. Empty for an
/// uncompressed body; `None` when a coding is unknown or when there are more than two.
#[must_use]
pub fn codings(encoding: Option<&str>) -> Option<Vec<Coding>> {
    let mut codings = Vec::new();
    for name in encoding.unwrap_or_default().split(',').map(str::trim) {
        let is = |known: &str| name.eq_ignore_ascii_case(known);
        if name.is_empty() || is("identity") {
            continue;
        }
        if codings.len() == MAX_CODINGS {
            return None;
        }
        codings.push(match () {
            () if is("gzip") || is("x-gzip") => Coding::Gzip,
            () if is("deflate") => Coding::Deflate,
            () => return None,
        });
    }
    Some(codings)
}

/// Decodes `body` according to its `content-encoding`, to at most `bytes_max`.
///
/// `None` when a coding is unknown, when the body is malformed, or when it would exceed the bound, also
/// between two codings: such a body cannot be classified.
#[must_use]
pub fn decoded(body: &[u8], encoding: Option<&str>, bytes_max: usize) -> Option<Vec<u8>> {
    let codings = codings(encoding)?;
    let Some((outer, inner)) = codings.split_last() else { return Some(body.to_vec()) };
    let outer_decoded = decode_one(*outer, body, bytes_max)?;
    inner.iter().rev().try_fold(outer_decoded, |body, coding| decode_one(*coding, &body, bytes_max))
}

fn decode_one(coding: Coding, body: &[u8], bytes_max: usize) -> Option<Vec<u8>> {
    match coding {
        Coding::Gzip => read(MultiGzDecoder::new(body), bytes_max),
        // The checksum of zlib's format distinguishes it from the raw one.
        Coding::Deflate => {
            read(ZlibDecoder::new(body), bytes_max).or_else(|| read(DeflateDecoder::new(body), bytes_max))
        }
    }
}

fn read(decoder: impl Read, bytes_max: usize) -> Option<Vec<u8>> {
    let mut decoded = Vec::new();
    let limit = u64::try_from(bytes_max).ok()?.checked_add(1)?;
    decoder.take(limit).read_to_end(&mut decoded).ok()?;
    (decoded.len() <= bytes_max).then_some(decoded)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::{DeflateEncoder, GzEncoder, ZlibEncoder};

    use super::*;

    fn gzip(text: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(text).unwrap();
        encoder.finish().unwrap()
    }

    fn zlib(text: &[u8]) -> Vec<u8> {
        let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(text).unwrap();
        encoder.finish().unwrap()
    }

    fn raw_deflate(text: &[u8]) -> Vec<u8> {
        let mut encoder = DeflateEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(text).unwrap();
        encoder.finish().unwrap()
    }

    #[track_caller]
    fn check(body: &[u8], encoding: Option<&str>, expected: Option<&[u8]>) {
        assert_eq!(decoded(body, encoding, 100).as_deref(), expected, "{encoding:?}");
    }

    #[test]
    fn known_encodings_are_decoded() {
        check(b"plain", None, Some(b"plain"));
        check(b"plain", Some("identity"), Some(b"plain"));
        check(b"plain", Some(""), Some(b"plain"));
        check(&gzip(b"zipped"), Some(" GZIP "), Some(b"zipped"));
        check(&gzip(b"zipped"), Some("x-gzip"), Some(b"zipped"));
        check(&zlib(b"deflated"), Some("deflate"), Some(b"deflated"));
        check(&raw_deflate(b"deflated"), Some("deflate"), Some(b"deflated"));
    }

    #[test]
    fn two_codings_are_decoded_from_the_outer_to_the_inner() {
        check(&gzip(&gzip(b"twice")), Some("gzip, gzip"), Some(b"twice"));
        check(&zlib(&gzip(b"both")), Some("gzip,deflate"), Some(b"both"));
        check(&gzip(&raw_deflate(b"both")), Some("deflate, identity, X-Gzip"), Some(b"both"));
        check(&gzip(&gzip(&gzip(b"thrice"))), Some("gzip, gzip, gzip"), None);
        check(&gzip(b"outer_decoded"), Some("gzip, gzip"), None);
        check(&gzip(b"outer_decoded"), Some("br, gzip"), None);
    }

    #[test]
    fn a_body_in_another_coding_than_declared_is_not_decoded() {
        check(b"plain", Some("gzip"), None);
        check(b"plain", Some("deflate"), None);
        check(&gzip(b"zipped")[..12], Some("gzip"), None);
        for encoding in ["br", "zstd", "compress", "gzip;q=1", "unreadable"] {
            check(b"plain", Some(encoding), None);
        }
    }

    #[test]
    fn a_compression_bomb_is_not_decoded() {
        let large = vec![b'x'; 10_000_000];
        check(&gzip(&[b'x'; 100]), Some("gzip"), Some(&[b'x'; 100]));
        check(&gzip(&[b'x'; 101]), Some("gzip"), None);
        for bomb in [gzip(&large), zlib(&large), raw_deflate(&large)] {
            check(&bomb, Some("gzip"), None);
            check(&bomb, Some("deflate"), None);
        }
        check(&gzip(&gzip(&large)), Some("gzip, gzip"), None);
    }
}

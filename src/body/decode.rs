//! Decompresses a complete body, so that the body can be classified or searched. The supported codings are
//! those that `policy::headers` offers to the upstream, so that a response can be decoded.

use std::io::Read;

use flate2::read::{DeflateDecoder, MultiGzDecoder, ZlibDecoder};

/// Maximum number of codings of one body. Two codings occur when a server and a proxy in front of the server
/// both compress. More codings would only multiply the work.
const MAX_CODINGS: usize = 2;

/// A content coding (RFC 9110, section 8.4.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coding {
    /// `gzip` and `x-gzip`.
    Gzip,
    /// `deflate`: the zlib format, or the raw deflate stream that some servers send instead.
    Deflate,
}

/// Parses a `content-encoding`. Returns the codings in the order in which they were applied, an empty list
/// for an uncompressed body, and `None` if a coding is unknown or there are more than two codings.
#[must_use]
pub fn parse_codings(encoding: Option<&str>) -> Option<Vec<Coding>> {
    let mut codings = Vec::new();
    for name in encoding.unwrap_or_default().split(',').map(str::trim) {
        let is_named = |coding: &str| name.eq_ignore_ascii_case(coding);
        if name.is_empty() || is_named("identity") {
            continue;
        }
        if codings.len() == MAX_CODINGS {
            return None;
        }
        codings.push(if is_named("gzip") || is_named("x-gzip") {
            Coding::Gzip
        } else if is_named("deflate") {
            Coding::Deflate
        } else {
            return None;
        });
    }
    Some(codings)
}

/// Decodes `body` according to its `content-encoding`. Returns `None` if a coding is unknown, the body is
/// malformed, or the decoded body exceeds `max_bytes` after any coding.
#[must_use]
pub fn decode_body(body: &[u8], encoding: Option<&str>, max_bytes: usize) -> Option<Vec<u8>> {
    let codings = parse_codings(encoding)?;
    let Some((outer, inner)) = codings.split_last() else { return Some(body.to_vec()) };
    let decoded_body = remove_coding(*outer, body, max_bytes)?;
    inner.iter().rev().try_fold(decoded_body, |encoded, coding| remove_coding(*coding, &encoded, max_bytes))
}

fn remove_coding(coding: Coding, body: &[u8], max_bytes: usize) -> Option<Vec<u8>> {
    match coding {
        Coding::Gzip => read_bounded(MultiGzDecoder::new(body), max_bytes),
        // The check value and the checksum of the zlib format distinguish it from the raw format.
        Coding::Deflate => read_bounded(ZlibDecoder::new(body), max_bytes)
            .or_else(|| read_bounded(DeflateDecoder::new(body), max_bytes)),
    }
}

/// Reads all bytes. Returns `None` if reading fails or there are more than `max_bytes`.
fn read_bounded(decoder: impl Read, max_bytes: usize) -> Option<Vec<u8>> {
    let mut decoded_body = Vec::new();
    let limit = u64::try_from(max_bytes).ok()?.checked_add(1)?;
    decoder.take(limit).read_to_end(&mut decoded_body).ok()?;
    (decoded_body.len() <= max_bytes).then_some(decoded_body)
}

#[cfg(test)]
pub(super) mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::{DeflateEncoder, GzEncoder, ZlibEncoder};

    use super::*;

    pub(in crate::body) fn gzip(text: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(text).unwrap();
        encoder.finish().unwrap()
    }

    pub(in crate::body) fn zlib(text: &[u8]) -> Vec<u8> {
        let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(text).unwrap();
        encoder.finish().unwrap()
    }

    pub(in crate::body) fn raw_deflate(text: &[u8]) -> Vec<u8> {
        let mut encoder = DeflateEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(text).unwrap();
        encoder.finish().unwrap()
    }

    #[track_caller]
    fn check(body: &[u8], encoding: Option<&str>, expected: Option<&[u8]>) {
        assert_eq!(decode_body(body, encoding, 100).as_deref(), expected, "{encoding:?}");
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
        check(&gzip(b"outer decoded"), Some("gzip, gzip"), None);
        check(&gzip(b"outer decoded"), Some("br, gzip"), None);
    }

    #[test]
    fn a_body_in_a_different_coding_than_declared_is_not_decoded() {
        check(b"plain", Some("gzip"), None);
        check(b"plain", Some("deflate"), None);
        check(&gzip(b"zipped")[..12], Some("gzip"), None);
        for encoding in ["br", "zstd", "compress", "gzip;q=1", "unreadable"] {
            check(b"plain", Some(encoding), None);
        }
    }

    #[test]
    fn a_compression_bomb_is_not_decoded() {
        let decoded = vec![b'x'; 10_000_000];
        check(&gzip(&[b'x'; 100]), Some("gzip"), Some(&[b'x'; 100]));
        check(&gzip(&[b'x'; 101]), Some("gzip"), None);
        for bomb in [gzip(&decoded), zlib(&decoded), raw_deflate(&decoded)] {
            check(&bomb, Some("gzip"), None);
            check(&bomb, Some("deflate"), None);
        }
        check(&gzip(&gzip(&decoded)), Some("gzip, gzip"), None);
    }
}

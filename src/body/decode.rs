//! Decompresses a complete body, so that the body can be classified, searched or rewritten. The supported codings are
//! the ones that `policy::headers` offers to the upstream. For a streamed body, only the list of its codings is parsed
//! here, and `compressed_search` decompresses the body.

use std::io::Read;

use flate2::read::{DeflateDecoder, MultiGzDecoder, ZlibDecoder};

/// Maximum number of codings of one body. Two codings occur if the provider and a gateway in front of it both compress.
/// More codings would only multiply the work.
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

/// Decodes one coding of `body`. Returns `None` if the body is malformed or its decoded size exceeds `max_bytes`.
fn remove_coding(coding: Coding, body: &[u8], max_bytes: usize) -> Option<Vec<u8>> {
    match coding {
        Coding::Gzip => read_bounded(MultiGzDecoder::new(body), max_bytes),
        // A raw stream fails the check value or the checksum of the zlib format, and is then decoded as raw.
        Coding::Deflate => read_bounded(ZlibDecoder::new(body), max_bytes)
            .or_else(|| read_bounded(DeflateDecoder::new(body), max_bytes)),
    }
}

/// Reads all bytes of `decoder`. Returns `None` if reading fails or there are more than `max_bytes`.
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

    /// Compresses `text` in the format of `gzip`.
    pub(in crate::body) fn gzip(text: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(text).unwrap();
        encoder.finish().unwrap()
    }

    /// Compresses `text` in the zlib format of `deflate`.
    pub(in crate::body) fn zlib(text: &[u8]) -> Vec<u8> {
        let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(text).unwrap();
        encoder.finish().unwrap()
    }

    /// Compresses `text` in the raw format of `deflate`.
    pub(in crate::body) fn raw_deflate(text: &[u8]) -> Vec<u8> {
        let mut encoder = DeflateEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(text).unwrap();
        encoder.finish().unwrap()
    }

    /// Decodes `body` to at most 100 bytes, and compares the decoded body with the expected one.
    #[track_caller]
    fn check_decoded(body: &[u8], encoding: Option<&str>, expected: Option<&[u8]>) {
        let decoded_body = decode_body(body, encoding, 100);
        assert_eq!(
            decoded_body.as_deref(),
            expected,
            "a body with the encoding {encoding:?} must be decoded or rejected as expected"
        );
    }

    #[test]
    fn known_encodings_are_decoded() {
        check_decoded(b"plain", None, Some(b"plain"));
        check_decoded(b"plain", Some("identity"), Some(b"plain"));
        check_decoded(b"plain", Some(""), Some(b"plain"));
        check_decoded(&gzip(b"zipped"), Some(" GZIP "), Some(b"zipped"));
        check_decoded(&gzip(b"zipped"), Some("x-gzip"), Some(b"zipped"));
        check_decoded(&zlib(b"deflated"), Some("deflate"), Some(b"deflated"));
        check_decoded(&raw_deflate(b"deflated"), Some("deflate"), Some(b"deflated"));
    }

    #[test]
    fn two_codings_are_decoded_from_the_outer_to_the_inner() {
        check_decoded(&gzip(&gzip(b"twice")), Some("gzip, gzip"), Some(b"twice"));
        check_decoded(&zlib(&gzip(b"both")), Some("gzip,deflate"), Some(b"both"));
        check_decoded(&gzip(&raw_deflate(b"both")), Some("deflate, identity, X-Gzip"), Some(b"both"));
        check_decoded(&gzip(&gzip(&gzip(b"thrice"))), Some("gzip, gzip, gzip"), None);
        check_decoded(&gzip(b"outer decoded"), Some("gzip, gzip"), None);
        check_decoded(&gzip(b"outer decoded"), Some("br, gzip"), None);
    }

    #[test]
    fn a_malformed_body_and_a_body_of_an_unknown_coding_are_not_decoded() {
        check_decoded(b"plain", Some("gzip"), None);
        check_decoded(b"plain", Some("deflate"), None);
        check_decoded(&gzip(b"zipped")[..12], Some("gzip"), None);
        for encoding in ["br", "zstd", "compress", "gzip;q=1", "unreadable"] {
            check_decoded(b"plain", Some(encoding), None);
        }
    }

    #[test]
    fn a_compression_bomb_is_not_decoded() {
        let large_body = vec![b'x'; 10_000_000];
        check_decoded(&gzip(&[b'x'; 100]), Some("gzip"), Some(&[b'x'; 100]));
        check_decoded(&gzip(&[b'x'; 101]), Some("gzip"), None);
        for bomb in [gzip(&large_body), zlib(&large_body), raw_deflate(&large_body)] {
            check_decoded(&bomb, Some("gzip"), None);
            check_decoded(&bomb, Some("deflate"), None);
        }
        check_decoded(&gzip(&gzip(&large_body)), Some("gzip, gzip"), None);
    }
}

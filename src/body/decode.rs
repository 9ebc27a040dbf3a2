//! A decoded copy of a compressed error body, for judging it. The client gets the original.

use std::io::Read;

use flate2::read::{MultiGzDecoder, ZlibDecoder};

/// Decodes `body` as its `content-encoding` says, to at most `bytes_max`.
///
/// `None` when the encoding is not one of identity, gzip and deflate, when the body is not what it
/// says, or when it would grow beyond the bound: such a body cannot be judged.
#[must_use]
pub fn decoded(body: &[u8], encoding: Option<&str>, bytes_max: usize) -> Option<Vec<u8>> {
    match encoding.map(|encoding| encoding.trim().to_ascii_lowercase()).as_deref() {
        None | Some("" | "identity") => Some(body.to_vec()),
        Some("gzip" | "x-gzip") => read(MultiGzDecoder::new(body), bytes_max),
        Some("deflate") => read(ZlibDecoder::new(body), bytes_max),
        Some(_) => None,
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
    use flate2::write::{GzEncoder, ZlibEncoder};

    use super::*;

    fn gzip(text: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(text).unwrap();
        encoder.finish().unwrap()
    }

    fn deflate(text: &[u8]) -> Vec<u8> {
        let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(text).unwrap();
        encoder.finish().unwrap()
    }

    #[track_caller]
    fn check(body: &[u8], encoding: Option<&str>, expected: Option<&[u8]>) {
        assert_eq!(decoded(body, encoding, 100).as_deref(), expected);
    }

    #[test]
    fn known_encodings_are_decoded() {
        check(b"plain", None, Some(b"plain"));
        check(b"plain", Some("identity"), Some(b"plain"));
        check(&gzip(b"zipped"), Some(" GZIP "), Some(b"zipped"));
        check(&deflate(b"deflated"), Some("deflate"), Some(b"deflated"));
    }

    #[test]
    fn what_is_not_what_it_says_cannot_be_judged() {
        check(b"plain", Some("gzip"), None);
        check(&gzip(b"zipped")[..12], Some("gzip"), None);
        check(b"plain", Some("br"), None);
        check(&gzip(b"twice"), Some("gzip, gzip"), None);
    }

    #[test]
    fn a_bomb_is_not_unpacked() {
        check(&gzip(&[b'x'; 100]), Some("gzip"), Some(&[b'x'; 100]));
        check(&gzip(&[b'x'; 101]), Some("gzip"), None);
        check(&gzip(&vec![b'x'; 10_000_000]), Some("gzip"), None);
    }
}

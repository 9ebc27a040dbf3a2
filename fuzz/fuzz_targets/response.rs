//! Decodes an arbitrary response. The result must not depend on how the bytes are split.

#![no_main]

use bytes::BytesMut;
use http::Method;
use keychoir::upstream::chunk_decoder::{ChunkDecoder, DecodedPart};
use keychoir::upstream::head::{self, ResponseFraming};
use libfuzzer_sys::fuzz_target;

/// Decodes a response that arrives in chunks of this length. Returns the status, the framing, the body, and whether
/// the body is complete.
fn decode(bytes: &[u8], chunk_length: usize) -> Option<(u16, ResponseFraming, Vec<u8>, bool)> {
    let (mut buffer, mut chunks) = (BytesMut::new(), bytes.chunks(chunk_length));
    let head = loop {
        match head::decode_response(&mut buffer, &Method::GET) {
            Ok(Some(head)) => break head,
            Ok(None) => buffer.extend_from_slice(chunks.next()?),
            Err(_) => return None,
        }
    };
    let (mut decoder, mut body) = (ChunkDecoder::default(), Vec::new());
    while head.framing == ResponseFraming::Chunked {
        match decoder.decode(&mut buffer) {
            Ok(DecodedPart::Data(data)) => body.extend_from_slice(&data),
            Ok(DecodedPart::Trailers(_)) => {}
            Ok(DecodedPart::Complete) => return Some((head.status.as_u16(), head.framing, body, true)),
            Ok(DecodedPart::Incomplete) => match chunks.next() {
                Some(chunk) => buffer.extend_from_slice(chunk),
                None => break,
            },
            Err(_) => break,
        }
    }
    Some((head.status.as_u16(), head.framing, body, false))
}

fuzz_target!(|input: (&[u8], u8)| {
    let (bytes, chunk_length) = input;
    let expected = decode(bytes, bytes.len().max(1));
    assert_eq!(decode(bytes, usize::from(chunk_length).max(1)), expected);
});

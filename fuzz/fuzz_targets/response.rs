//! Fuzzes the decoders of response heads and chunked bodies of the provider. They must not panic, and the decoded
//! response must not depend on how the bytes are split into reads.

#![no_main]

use bytes::BytesMut;
use http::Method;
use keychoir::upstream::chunk_decoder::{ChunkDecoder, DecodedPart};
use keychoir::upstream::head::{self, ResponseFraming};
use libfuzzer_sys::fuzz_target;

/// The decoded parts of a response.
#[derive(Debug, PartialEq)]
struct DecodedResponse {
    status: u16,
    framing: ResponseFraming,
    body: Vec<u8>,
    is_complete: bool,
}

/// Decodes a response that arrives in reads of `read_length` bytes. Returns `None` for an invalid or incomplete head.
fn decode(bytes: &[u8], read_length: usize) -> Option<DecodedResponse> {
    let (mut buffer, mut reads) = (BytesMut::new(), bytes.chunks(read_length));
    let head = loop {
        match head::decode_response(&mut buffer, &Method::GET) {
            Ok(Some(head)) => break head,
            Ok(None) => buffer.extend_from_slice(reads.next()?),
            Err(_) => return None,
        }
    };
    let (mut decoder, mut body, mut is_complete) = (ChunkDecoder::default(), Vec::new(), false);
    while !is_complete && head.framing == ResponseFraming::Chunked {
        match decoder.decode(&mut buffer) {
            Ok(DecodedPart::Data(data)) => body.extend_from_slice(&data),
            Ok(DecodedPart::Trailers(_)) => {}
            Ok(DecodedPart::Complete) => is_complete = true,
            Ok(DecodedPart::Incomplete) => match reads.next() {
                Some(read) => buffer.extend_from_slice(read),
                None => break,
            },
            Err(_) => break,
        }
    }
    Some(DecodedResponse { status: head.status.as_u16(), framing: head.framing, body, is_complete })
}

// The input consists of the bytes of a response and the length of its reads.
fuzz_target!(|input: (&[u8], u8)| {
    let (bytes, read_length) = input;
    let expected = decode(bytes, bytes.len().max(1));
    assert_eq!(
        decode(bytes, usize::from(read_length).max(1)),
        expected,
        "the response must not depend on the lengths of the reads"
    );
});

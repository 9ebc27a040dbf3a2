//! Whatever a server says, in whatever pieces: its head is read or refused, its chunks are, and where
//! the cuts were makes no difference.

#![no_main]

use bytes::BytesMut;
use http::Method;
use keychoir::upstream::chunk_decoder::{ChunkDecoder, DecodedPart};
use keychoir::upstream::head::{self, ResponseFraming};
use libfuzzer_sys::fuzz_target;

/// What is made of `text` when it comes in pieces of `cut` bytes: the status, how the body ends, what is
/// in its chunks, and whether it came to its end.
fn made(text: &[u8], cut: usize) -> Option<(u16, ResponseFraming, Vec<u8>, bool)> {
    let (mut read, mut pieces) = (BytesMut::new(), text.chunks(cut));
    let head = loop {
        match head::decode_response(&mut read, &Method::GET) {
            Ok(Some(head)) => break head,
            Ok(None) => read.extend_from_slice(pieces.next()?),
            Err(_) => return None,
        }
    };
    let (mut decoder, mut body) = (ChunkDecoder::default(), Vec::new());
    while head.framing == ResponseFraming::Chunked {
        match decoder.decode(&mut read) {
            Ok(DecodedPart::Data(piece)) => body.extend_from_slice(&piece),
            Ok(DecodedPart::Trailers(_)) => {}
            Ok(DecodedPart::Complete) => return Some((head.status.as_u16(), head.framing, body, true)),
            Ok(DecodedPart::Incomplete) => match pieces.next() {
                Some(more) => read.extend_from_slice(more),
                None => break,
            },
            Err(_) => break,
        }
    }
    Some((head.status.as_u16(), head.framing, body, false))
}

fuzz_target!(|given: (&[u8], u8)| {
    let (text, cut) = given;
    let whole = made(text, text.len().max(1));
    assert_eq!(made(text, usize::from(cut).max(1)), whole);
});

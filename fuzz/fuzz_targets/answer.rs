//! Whatever a server says, in whatever pieces: its head is read or refused, its chunks are, and where
//! the cuts were makes no difference.

#![no_main]

use bytes::BytesMut;
use http::Method;
use keychoir::upstream::chunks::{Chunks, Next};
use keychoir::upstream::head::{self, BodyEnd};
use libfuzzer_sys::fuzz_target;

/// What is made of `text` when it comes in pieces of `cut` bytes: the status, how the body ends, what is
/// in its chunks, and whether it came to its end.
fn made(text: &[u8], cut: usize) -> Option<(u16, BodyEnd, Vec<u8>, bool)> {
    let (mut read, mut pieces) = (BytesMut::new(), text.chunks(cut));
    let head = loop {
        match head::read(&mut read, &Method::GET) {
            Ok(Some(head)) => break head,
            Ok(None) => read.extend_from_slice(pieces.next()?),
            Err(_) => return None,
        }
    };
    let (mut chunks, mut body) = (Chunks::default(), Vec::new());
    while head.end == BodyEnd::Chunks {
        match chunks.next(&mut read) {
            Ok(Next::Piece(piece)) => body.extend_from_slice(&piece),
            Ok(Next::Trailers(_)) => {}
            Ok(Next::Complete) => return Some((head.status.as_u16(), head.end, body, true)),
            Ok(Next::Incomplete) => match pieces.next() {
                Some(more) => read.extend_from_slice(more),
                None => break,
            },
            Err(_) => break,
        }
    }
    Some((head.status.as_u16(), head.end, body, false))
}

fuzz_target!(|given: (&[u8], u8)| {
    let (text, cut) = given;
    let whole = made(text, text.len().max(1));
    assert_eq!(made(text, usize::from(cut).max(1)), whole);
});

//! Searches a compressed body for keys while the original bytes are relayed. A copy of the body is
//! decompressed; a piece is forwarded when the text decoded so far contains no key.
//!
//! Separate from `redacted`, because a key cannot be replaced inside compressed data: here the response ends
//! with an error instead. The compressed bytes are searched as well: not every body with a `content-encoding`
//! is compressed.

use std::collections::VecDeque;
use std::fmt;
use std::io::Write;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use flate2::write::{DeflateDecoder, MultiGzDecoder, ZlibDecoder};
use http_body::Frame;

use super::budget::BufferShare;
use super::decode::Coding;
use crate::secret::{Redaction, Redactor};

/// The reason why a compressed body is not forwarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Withheld {
    /// The body contains a key of the pool.
    #[error("the compressed response contains an API key")]
    KeyInside,
    /// The body cannot be searched for keys: the budget has no memory for its buffers.
    #[error("no memory is left to search the compressed response for API keys")]
    NoMemory,
}

/// Maximum bytes decompressed before other tasks of the worker run: about a millisecond of work.
const MAX_BYTES_PER_TURN: usize = 256 * 1024;

/// Compressed bytes decompressed in one step: they expand to a mebibyte at most.
const SLICE: usize = 1024;

/// Free buffer bytes of the search through one body: a read, the text of one slice, and the windows of two
/// decoders, which no share counts.
pub(super) const FREE: usize = 64 * 1024;

/// Maximum compressed bytes held back while the text ends in the possible start of a key. Such a
/// start has a few hundred bytes at most.
const MAX_HELD: usize = 256 * 1024;

/// The search through one body.
pub(super) struct CompressedSearch {
    redactor: Arc<Redactor>,
    redaction: Redaction,
    /// The search through the compressed bytes themselves: a lenient client may read data that is
    /// not compressed, or that follows the compressed data.
    encoded_redaction: Redaction,
    /// Whether the compressed bytes themselves contain a key.
    has_key: bool,
    /// The codings, from the outermost to the innermost.
    stages: Vec<CodingStage>,
    /// The piece that is being searched.
    piece: Option<Frame<Bytes>>,
    /// Pieces whose text ends in the possible start of a key.
    held: VecDeque<Frame<Bytes>>,
    /// Pieces that may be forwarded.
    released: VecDeque<Frame<Bytes>>,
    /// The memory of all pieces.
    share: BufferShare,
}

/// The result of one turn of the search.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// Received bytes remain to be searched.
    More,
    /// All received bytes are searched.
    Done,
}

impl CompressedSearch {
    /// A search through a body with these codings, given in the order in which they were applied.
    pub(super) fn new(redactor: Arc<Redactor>, codings: &[Coding], share: BufferShare) -> Self {
        let stages = codings.iter().rev().map(|coding| CodingStage::new(*coding)).collect();
        let (redaction, encoded_redaction) = (Redaction::default(), Redaction::default());
        let (held, released) = (VecDeque::new(), VecDeque::new());
        Self {
            redactor,
            redaction,
            encoded_redaction,
            has_key: false,
            stages,
            piece: None,
            held,
            released,
            share,
        }
    }

    /// The redactor that knows the keys.
    pub(super) fn redactor(&self) -> &Redactor {
        &self.redactor
    }

    /// Takes the next piece; all earlier ones must have been searched.
    pub(super) fn take(&mut self, piece: Bytes) {
        self.has_key |= self.encoded_redaction.finds(&self.redactor, &piece);
        if let Some(first) = self.stages.first_mut() {
            first.input.extend_from_slice(&piece);
        }
        self.piece = Some(Frame::data(piece));
    }

    /// Runs one turn of the search.
    ///
    /// # Errors
    ///
    /// When a key was found, or when there is no memory to search for one.
    pub(super) fn turn(&mut self) -> Result<Turn, Withheld> {
        if self.has_key {
            return Err(Withheld::KeyInside);
        }
        let turn = self.search()?;
        let coded: usize = self.stages.iter().map(|stage| stage.input.capacity()).sum();
        let unsent = usize::try_from(self.unsent_bytes()).unwrap_or(usize::MAX);
        if self.share.cover(coded.saturating_add(unsent)) { Ok(turn) } else { Err(Withheld::NoMemory) }
    }

    fn search(&mut self) -> Result<Turn, Withheld> {
        let mut bytes = 0;
        while let Some(at) = self.stages.iter().rposition(CodingStage::has_work) {
            let decoded = self.stages[at].step();
            bytes += decoded.len();
            match self.stages.get_mut(at + 1) {
                Some(next) => next.input.extend_from_slice(&decoded),
                None if self.redaction.finds(&self.redactor, &decoded) => return Err(Withheld::KeyInside),
                None => {}
            }
            if bytes >= MAX_BYTES_PER_TURN {
                return Ok(Turn::More);
            }
        }
        self.held.extend(self.piece.take());
        if self.redaction.is_idle() && self.encoded_redaction.is_idle() {
            self.release();
        } else if self.held_bytes() > MAX_HELD {
            return Err(Withheld::KeyInside);
        }
        Ok(Turn::Done)
    }

    /// Ends the body: a possible start of a key that was held back is released. `last` holds the trailers, if
    /// any.
    pub(super) fn end(&mut self, last: Option<Frame<Bytes>>) {
        self.release();
        self.released.extend(last);
    }

    fn release(&mut self) {
        self.released.append(&mut self.held);
    }

    /// The next piece that may be forwarded.
    pub(super) fn next(&mut self) -> Option<Frame<Bytes>> {
        self.released.pop_front()
    }

    /// Whether a piece is being searched.
    pub(super) fn is_busy(&self) -> bool {
        self.piece.is_some()
    }

    /// Bytes received and not yet forwarded.
    pub(super) fn unsent_bytes(&self) -> u64 {
        let released = self.released.iter().chain(&self.piece).filter_map(Frame::data_ref).map(Bytes::len);
        (released.sum::<usize>() + self.held_bytes()) as u64
    }

    /// Whether all received pieces have been forwarded.
    pub(super) fn is_over(&self) -> bool {
        self.piece.is_none() && self.held.is_empty() && self.released.is_empty()
    }

    fn held_bytes(&self) -> usize {
        self.held.iter().filter_map(Frame::data_ref).map(Bytes::len).sum()
    }
}

impl fmt::Debug for CompressedSearch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CompressedSearch").field("stages", &self.stages.len()).finish_non_exhaustive()
    }
}

/// The decoder of one coding.
struct CodingStage {
    decoder: Decoder,
    /// Received bytes that are not yet decoded.
    input: BytesMut,
}

enum Decoder {
    Gzip(MultiGzDecoder<Vec<u8>>),
    Zlib(ZlibDecoder<Vec<u8>>),
    RawDeflate(DeflateDecoder<Vec<u8>>),
    /// `deflate`, before its format is known.
    Unknown,
    /// The body is malformed.
    Broken,
}

impl CodingStage {
    fn new(coding: Coding) -> Self {
        let decoder = match coding {
            Coding::Gzip => Decoder::Gzip(MultiGzDecoder::new(Vec::new())),
            Coding::Deflate => Decoder::Unknown,
        };
        Self { decoder, input: BytesMut::new() }
    }

    fn has_work(&self) -> bool {
        // The first two bytes distinguish the two formats of `deflate`.
        let needed = if matches!(self.decoder, Decoder::Unknown) { 2 } else { 1 };
        self.input.len() >= needed
    }

    /// Decodes one slice of the input.
    fn step(&mut self) -> Vec<u8> {
        if matches!(self.decoder, Decoder::Unknown) {
            self.decoder = match self.input[..] {
                // The header of zlib's format: the method, and a checksum that is a multiple of 31 (RFC
                // 1950).
                [first, second, ..] if first & 0x0f == 8 && u16::from_be_bytes([first, second]) % 31 == 0 => {
                    Decoder::Zlib(ZlibDecoder::new(Vec::new()))
                }
                _ => Decoder::RawDeflate(DeflateDecoder::new(Vec::new())),
            };
        }
        let slice = self.input.split_to(self.input.len().min(SLICE));
        let (decoded, is_whole) = match &mut self.decoder {
            Decoder::Gzip(decoder) => {
                let is_whole = written(decoder, &slice);
                (std::mem::take(decoder.get_mut()), is_whole)
            }
            Decoder::Zlib(decoder) => {
                let is_whole = written(decoder, &slice);
                (std::mem::take(decoder.get_mut()), is_whole)
            }
            Decoder::RawDeflate(decoder) => {
                let is_whole = written(decoder, &slice);
                (std::mem::take(decoder.get_mut()), is_whole)
            }
            Decoder::Unknown | Decoder::Broken => (Vec::new(), true),
        };
        if !is_whole {
            self.decoder = Decoder::Broken;
        }
        decoded
    }
}

/// Whether the decoder accepts all of the slice.
fn written(decoder: &mut impl Write, slice: &[u8]) -> bool {
    decoder.write_all(slice).and_then(|()| decoder.flush()).is_ok()
}

#[cfg(test)]
mod tests {
    use flate2::Compression;
    use flate2::write::{DeflateEncoder, GzEncoder, ZlibEncoder};

    use super::*;
    use crate::secret::ApiKey;

    const KEY: &str = "sk_6c036526aaaabbbbccccddddeeeeffff0000111122223333d452b";

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

    fn search(codings: &[Coding]) -> CompressedSearch {
        CompressedSearch::new(
            Arc::new(Redactor::new([ApiKey::new(KEY).unwrap()].iter())),
            codings,
            BufferShare::default(),
        )
    }

    /// The bytes forwarded of `body` in pieces of `size`, and whether a key was found.
    fn forwarded(codings: &[Coding], body: &[u8], size: usize) -> (Vec<u8>, bool) {
        let mut search = search(codings);
        let mut out = Vec::new();
        for piece in body.chunks(size) {
            search.take(Bytes::copy_from_slice(piece));
            loop {
                match search.turn() {
                    Ok(Turn::More) => {}
                    Ok(Turn::Done) => break,
                    Err(_) => return (out, true),
                }
            }
            out.extend(std::iter::from_fn(|| search.next()).flat_map(|frame| frame.into_data().unwrap()));
        }
        search.end(None);
        out.extend(std::iter::from_fn(|| search.next()).flat_map(|frame| frame.into_data().unwrap()));
        assert!(search.is_over());
        (out, false)
    }

    type Coded = (&'static [Coding], fn(&[u8]) -> Vec<u8>);

    const CODED: [Coded; 5] = [
        (&[Coding::Gzip], gzip),
        (&[Coding::Deflate], zlib),
        (&[Coding::Deflate], raw_deflate),
        (&[Coding::Gzip, Coding::Gzip], |text| gzip(&gzip(text))),
        (&[Coding::Deflate, Coding::Gzip], |text| gzip(&raw_deflate(text))),
    ];

    #[test]
    fn a_body_without_a_key_is_relayed_byte_for_byte() {
        for (codings, coded) in CODED {
            for text in ["", "x", "sk_6c036526aaaa", &"words and words ".repeat(5_000)] {
                let body = coded(text.as_bytes());
                for size in [1, 7, 1_000, 100_000] {
                    assert_eq!(forwarded(codings, &body, size), (body.clone(), false), "{codings:?} {size}");
                }
            }
        }
    }

    #[test]
    fn a_key_is_not_relayed_however_its_body_is_split() {
        for (codings, coded) in CODED {
            for before in [0, 10, 100_000] {
                let noise: String =
                    (0..before).map(|at: u64| char::from(b'a' + (at * at % 23) as u8)).collect();
                let body = coded(format!("{noise}{KEY} and more").as_bytes());
                for size in [1, 7, 1_000, 100_000] {
                    let (out, has_key) = forwarded(codings, &body, size);
                    assert!(has_key, "{codings:?} {before} {size}");
                    // The forwarded bytes reveal no more of the key than its short form.
                    let mut alone = search(codings);
                    alone.take(out.into());
                    while alone.turn() == Ok(Turn::More) {}
                    assert!(alone.redaction.is_idle());
                }
            }
        }
    }

    #[test]
    fn a_malformed_body_is_relayed_and_searched() {
        for body in [b"plain text".to_vec(), [gzip(b"x"), b"garbage".to_vec()].concat(), vec![8]] {
            for codings in [&[Coding::Gzip][..], &[Coding::Deflate]] {
                assert_eq!(forwarded(codings, &body, 3), (body.clone(), false));
            }
        }
        // A malformed body is searched, too.
        for body in
            [KEY.as_bytes().to_vec(), [gzip(b"x"), KEY.into()].concat(), [zlib(b"x"), KEY.into()].concat()]
        {
            for (codings, size) in [(&[Coding::Gzip][..], 3), (&[Coding::Deflate], 1_000)] {
                assert!(forwarded(codings, &body, size).1);
            }
        }
        // The decodable part of a malformed body is searched.
        let body = [zlib(KEY.as_bytes()), b"garbage".to_vec()].concat();
        assert!(forwarded(&[Coding::Deflate], &body, 1_000).1);
    }

    #[test]
    fn a_compression_bomb_is_searched_in_turns() {
        let mut search = search(&[Coding::Gzip]);
        search.take(gzip(&vec![b'x'; 50_000_000]).into());
        let mut turns = 0;
        while search.turn() == Ok(Turn::More) {
            turns += 1;
        }
        assert!(turns >= 40, "{turns}");
    }
}

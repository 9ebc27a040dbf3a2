//! A search through a compressed body while it is relayed as it came. It is decompressed beside the relay;
//! a piece goes on when what has come of the text so far has no key in it.
//!
//! Separate from `redacted`, because a key cannot be replaced in what is compressed: here the answer ends
//! with an error instead. It is searched as it came, too: not everything that is called compressed is.

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

/// Why a compressed body does not go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Withheld {
    /// A key of the pool is in it.
    #[error("the compressed answer has an API key in it")]
    KeyInside,
    /// It cannot be searched for keys: nothing is left of the budget for its buffers.
    #[error("no memory is left to search the compressed answer for API keys")]
    NoMemory,
}

/// What one turn decompresses before other tasks of the worker have theirs: about a millisecond.
const MAX_BYTES_A_TURN: usize = 256 * 1024;

/// A slice of compressed bytes that is decompressed at once: at most a mebibyte comes of it.
const SLICE: usize = 1024;

/// What the search through one body may buffer for free: a read, what a slice of it unpacks to, and the windows
/// of two decoders that no share counts.
pub(super) const FREE: usize = 64 * 1024;

/// Compressed bytes that wait for the rest of what may be a key, of which there are a few hundred bytes.
const MAX_HELD: usize = 256 * 1024;

/// The search through one body.
pub(super) struct CompressedSearch {
    redactor: Arc<Redactor>,
    redaction: Redaction,
    /// The search through the body as it came: what is not compressed at all, or stands behind what is, may be
    /// read by a client that is not strict.
    as_it_came: Redaction,
    /// There is a key in that.
    has_key: bool,
    /// From the outer coding to the inner.
    stages: Vec<Stage>,
    /// The piece that is being searched.
    piece: Option<Frame<Bytes>>,
    /// Pieces whose text ends in what may be the begin of a key.
    held: VecDeque<Frame<Bytes>>,
    /// Pieces that may go on.
    released: VecDeque<Frame<Bytes>>,
    /// The memory of all of them.
    share: BufferShare,
}

/// What a turn has come to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// There is more to search in what has come.
    More,
    /// All that has come is searched.
    Done,
}

impl CompressedSearch {
    /// A search through a body with these codings, in the order in which they were applied.
    pub(super) fn new(redactor: Arc<Redactor>, codings: &[Coding], share: BufferShare) -> Self {
        let stages = codings.iter().rev().map(|coding| Stage::new(*coding)).collect();
        let (redaction, as_it_came) = (Redaction::default(), Redaction::default());
        let (held, released) = (VecDeque::new(), VecDeque::new());
        Self { redactor, redaction, as_it_came, has_key: false, stages, piece: None, held, released, share }
    }

    /// What is searched for.
    pub(super) fn redactor(&self) -> &Redactor {
        &self.redactor
    }

    /// Takes the next piece, once all before it is searched.
    pub(super) fn take(&mut self, piece: Bytes) {
        self.has_key |= self.as_it_came.finds(&self.redactor, &piece);
        if let Some(first) = self.stages.first_mut() {
            first.input.extend_from_slice(&piece);
        }
        self.piece = Some(Frame::data(piece));
    }

    /// Searches on.
    ///
    /// # Errors
    ///
    /// When there is a key, or no memory to look for one.
    pub(super) fn turn(&mut self) -> Result<Turn, Withheld> {
        if self.has_key {
            return Err(Withheld::KeyInside);
        }
        let turn = self.search()?;
        let coded: usize = self.stages.iter().map(|stage| stage.input.capacity()).sum();
        let waiting = usize::try_from(self.waiting_bytes()).unwrap_or(usize::MAX);
        if self.share.cover(coded.saturating_add(waiting)) { Ok(turn) } else { Err(Withheld::NoMemory) }
    }

    fn search(&mut self) -> Result<Turn, Withheld> {
        let mut bytes = 0;
        while let Some(at) = self.stages.iter().rposition(Stage::has_work) {
            let decoded = self.stages[at].step();
            bytes += decoded.len();
            match self.stages.get_mut(at + 1) {
                Some(next) => next.input.extend_from_slice(&decoded),
                None if self.redaction.finds(&self.redactor, &decoded) => return Err(Withheld::KeyInside),
                None => {}
            }
            if bytes >= MAX_BYTES_A_TURN {
                return Ok(Turn::More);
            }
        }
        self.held.extend(self.piece.take());
        if self.redaction.is_idle() && self.as_it_came.is_idle() {
            self.release();
        } else if self.held_bytes() > MAX_HELD {
            return Err(Withheld::KeyInside);
        }
        Ok(Turn::Done)
    }

    /// Nothing more comes: what waits is no key. `last` are the trailers, if there are some.
    pub(super) fn end(&mut self, last: Option<Frame<Bytes>>) {
        self.release();
        self.released.extend(last);
    }

    fn release(&mut self) {
        self.released.append(&mut self.held);
    }

    /// A piece that may go on.
    pub(super) fn next(&mut self) -> Option<Frame<Bytes>> {
        self.released.pop_front()
    }

    /// Whether a piece is being searched.
    pub(super) fn is_busy(&self) -> bool {
        self.piece.is_some()
    }

    /// Bytes that have come and not gone on.
    pub(super) fn waiting_bytes(&self) -> u64 {
        let released = self.released.iter().chain(&self.piece).filter_map(Frame::data_ref).map(Bytes::len);
        (released.sum::<usize>() + self.held_bytes()) as u64
    }

    /// Whether all has gone on that has come.
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

/// One coding being undone.
struct Stage {
    decoder: Decoder,
    /// What has come and is still coded.
    input: BytesMut,
}

enum Decoder {
    Gzip(MultiGzDecoder<Vec<u8>>),
    Zlib(ZlibDecoder<Vec<u8>>),
    Bare(DeflateDecoder<Vec<u8>>),
    /// `deflate`, before it is known which format is meant.
    Unknown,
    /// What has come is not what it says.
    Broken,
}

impl Stage {
    fn new(coding: Coding) -> Self {
        let decoder = match coding {
            Coding::Gzip => Decoder::Gzip(MultiGzDecoder::new(Vec::new())),
            Coding::Deflate => Decoder::Unknown,
        };
        Self { decoder, input: BytesMut::new() }
    }

    fn has_work(&self) -> bool {
        // Two bytes tell one format of `deflate` from the other.
        let wanted = if matches!(self.decoder, Decoder::Unknown) { 2 } else { 1 };
        self.input.len() >= wanted
    }

    /// Undoes the coding of a slice of the input.
    fn step(&mut self) -> Vec<u8> {
        if matches!(self.decoder, Decoder::Unknown) {
            self.decoder = match self.input[..] {
                // The header of zlib's format: the method, and a sum that is a multiple of 31 (RFC 1950).
                [first, second, ..] if first & 0x0f == 8 && u16::from_be_bytes([first, second]) % 31 == 0 => {
                    Decoder::Zlib(ZlibDecoder::new(Vec::new()))
                }
                _ => Decoder::Bare(DeflateDecoder::new(Vec::new())),
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
            Decoder::Bare(decoder) => {
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

/// Whether a decoder takes all of a slice.
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

    fn bare(text: &[u8]) -> Vec<u8> {
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

    /// What goes on of `body` in pieces of `size`, and whether there was a key.
    fn passed(codings: &[Coding], body: &[u8], size: usize) -> (Vec<u8>, bool) {
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
        (&[Coding::Deflate], bare),
        (&[Coding::Gzip, Coding::Gzip], |text| gzip(&gzip(text))),
        (&[Coding::Deflate, Coding::Gzip], |text| gzip(&bare(text))),
    ];

    #[test]
    fn what_has_no_key_in_it_passes_byte_for_byte() {
        for (codings, coded) in CODED {
            for text in ["", "x", "sk_6c036526aaaa", &"words and words ".repeat(5_000)] {
                let body = coded(text.as_bytes());
                for size in [1, 7, 1_000, 100_000] {
                    assert_eq!(passed(codings, &body, size), (body.clone(), false), "{codings:?} {size}");
                }
            }
        }
    }

    #[test]
    fn a_key_does_not_pass_however_its_body_is_cut() {
        for (codings, coded) in CODED {
            for before in [0, 10, 100_000] {
                let noise: String =
                    (0..before).map(|at: u64| char::from(b'a' + (at * at % 23) as u8)).collect();
                let body = coded(format!("{noise}{KEY} and more").as_bytes());
                for size in [1, 7, 1_000, 100_000] {
                    let (out, has_key) = passed(codings, &body, size);
                    assert!(has_key, "{codings:?} {before} {size}");
                    // What has gone on says no more of the key than its short form.
                    let mut alone = search(codings);
                    alone.take(out.into());
                    while alone.turn() == Ok(Turn::More) {}
                    assert!(alone.redaction.is_idle());
                }
            }
        }
    }

    #[test]
    fn what_is_not_what_it_says_passes() {
        for body in [b"plain text".to_vec(), [gzip(b"x"), b"garbage".to_vec()].concat(), vec![8]] {
            for codings in [&[Coding::Gzip][..], &[Coding::Deflate]] {
                assert_eq!(passed(codings, &body, 3), (body.clone(), false));
            }
        }
        // It is searched all the same.
        for body in
            [KEY.as_bytes().to_vec(), [gzip(b"x"), KEY.into()].concat(), [zlib(b"x"), KEY.into()].concat()]
        {
            for (codings, size) in [(&[Coding::Gzip][..], 3), (&[Coding::Deflate], 1_000)] {
                assert!(passed(codings, &body, size).1);
            }
        }
        // What can be read of it is searched.
        let body = [zlib(KEY.as_bytes()), b"garbage".to_vec()].concat();
        assert!(passed(&[Coding::Deflate], &body, 1_000).1);
    }

    #[test]
    fn a_bomb_is_searched_in_turns() {
        let mut search = search(&[Coding::Gzip]);
        search.take(gzip(&vec![b'x'; 50_000_000]).into());
        let mut turns = 0;
        while search.turn() == Ok(Turn::More) {
            turns += 1;
        }
        assert!(turns >= 40, "{turns}");
    }
}

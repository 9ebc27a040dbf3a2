//! Searches a compressed body for keys while the original bytes are relayed. The search decompresses a copy
//! of the body, and releases a frame once the decoded text up to its end contains no key and does not end with the
//! beginning of one. The compressed bytes are searched as well, because not every body with a `content-encoding` is
//! compressed.
//!
//! This search is separate from the search of uncompressed bodies in `redacted_body`, because a key inside compressed
//! data cannot be replaced. A response with such a key ends with an error instead, and so does a response whose search
//! does not fit the buffer budget. The search runs in turns: after about a millisecond of work, the task yields.

use std::collections::VecDeque;
use std::fmt;
use std::io::Write;
use std::mem;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use flate2::write::{DeflateDecoder, MultiGzDecoder, ZlibDecoder};
use http_body::Frame;

use super::budget::BufferReservation;
use super::decode::Coding;
use crate::secret::{Redactor, StreamRedaction};

/// The reason why a compressed body is not forwarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WithholdReason {
    /// The body contains a key of the pool, or too many bytes were held back for what may be the beginning of a key.
    #[error("the compressed response contains an API key")]
    ContainsKey,
    /// The buffer budget has no memory left for the search.
    #[error("the buffer budget has no memory left to search the compressed response for API keys")]
    NoMemory,
}

/// Number of decompressed bytes after which a turn of the search ends, which is about a millisecond of work.
/// The last step of a turn may exceed this number.
const BYTES_PER_TURN: usize = 256 * 1024;

/// Maximum number of compressed bytes that one step decompresses. They expand to about one mebibyte at most.
const STEP_SIZE: usize = 1024;

/// Number of buffer bytes per search that do not count against the budget. They are enough for one read, the
/// decoded text of a typical step, and the windows of two decoders.
pub(super) const UNBUDGETED_BYTES: usize = 64 * 1024;

/// Maximum number of compressed bytes that are held back while the text ends with what may be the beginning of a key.
/// A key is at most a few hundred bytes long.
const MAX_HELD_BYTES: usize = 256 * 1024;

/// The search for keys in one compressed body.
pub(super) struct CompressedSearch {
    redactor: Arc<Redactor>,
    /// The search of the decoded text.
    decoded_redaction: StreamRedaction,
    /// The search of the compressed bytes. A lenient client may read data that is not compressed, and data
    /// that follows the compressed data.
    encoded_redaction: StreamRedaction,
    /// Whether `encoded_redaction` has found a key in the compressed bytes.
    has_key: bool,
    /// The decoders, from the outermost coding to the innermost.
    stages: Vec<CodingStage>,
    /// The frame that is being searched.
    current_frame: Option<Frame<Bytes>>,
    /// Searched frames whose text ends with what may be the beginning of a key.
    held_frames: VecDeque<Frame<Bytes>>,
    /// Frames that may be forwarded.
    released_frames: VecDeque<Frame<Bytes>>,
    /// The memory of all frames, and of the input of the decoders.
    reservation: BufferReservation,
}

/// The progress of the search after one turn.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum SearchProgress {
    /// The search of the current frame is not finished.
    Incomplete,
    /// The search of the current frame is finished.
    Complete,
}

impl CompressedSearch {
    /// Creates a search of a body with `codings`, in the order in which they were applied.
    pub(super) fn new(redactor: Arc<Redactor>, codings: &[Coding], reservation: BufferReservation) -> Self {
        let stages = codings.iter().rev().map(|coding| CodingStage::new(*coding)).collect();
        Self {
            redactor,
            decoded_redaction: StreamRedaction::default(),
            encoded_redaction: StreamRedaction::default(),
            has_key: false,
            stages,
            current_frame: None,
            held_frames: VecDeque::new(),
            released_frames: VecDeque::new(),
            reservation,
        }
    }

    pub(super) fn redactor(&self) -> &Redactor {
        &self.redactor
    }

    /// Starts the search of the next data frame. The search of the current frame must be finished.
    pub(super) fn push(&mut self, data: Bytes) {
        self.has_key |= self.encoded_redaction.contains_key(&self.redactor, &data);
        if let Some(outermost) = self.stages.first_mut() {
            outermost.input.extend_from_slice(&data);
        }
        self.current_frame = Some(Frame::data(data));
    }

    /// Runs one turn of the search, which ends after the step that reaches [`BYTES_PER_TURN`].
    ///
    /// # Errors
    ///
    /// Fails when a key is found, when too many bytes are held back, or when the budget has no memory left.
    pub(super) fn run_turn(&mut self) -> Result<SearchProgress, WithholdReason> {
        if self.has_key {
            return Err(WithholdReason::ContainsKey);
        }
        let progress = self.search_current_frame()?;
        let input_bytes: usize = self.stages.iter().map(|stage| stage.input.capacity()).sum();
        let unsent_bytes = usize::try_from(self.unsent_bytes()).unwrap_or(usize::MAX);
        if self.reservation.try_resize(input_bytes.saturating_add(unsent_bytes)) {
            Ok(progress)
        } else {
            Err(WithholdReason::NoMemory)
        }
    }

    /// Decodes and searches the current frame until the turn ends. Releases the frame if no key may begin in it.
    fn search_current_frame(&mut self) -> Result<SearchProgress, WithholdReason> {
        let mut decoded_bytes = 0;
        while let Some(index) = self.stages.iter().rposition(CodingStage::can_decode) {
            let decoded = self.stages[index].decode_step();
            decoded_bytes += decoded.len();
            match self.stages.get_mut(index + 1) {
                Some(next) => next.input.extend_from_slice(&decoded),
                None if self.decoded_redaction.contains_key(&self.redactor, &decoded) => {
                    return Err(WithholdReason::ContainsKey);
                }
                None => {}
            }
            if decoded_bytes >= BYTES_PER_TURN {
                return Ok(SearchProgress::Incomplete);
            }
        }
        self.held_frames.extend(self.current_frame.take());
        if self.decoded_redaction.is_idle() && self.encoded_redaction.is_idle() {
            self.release_held_frames();
        } else if self.held_bytes() > MAX_HELD_BYTES {
            return Err(WithholdReason::ContainsKey);
        }
        Ok(SearchProgress::Complete)
    }

    /// Ends the body and releases the frames that were held back for an incomplete key. `last_frame` follows them, and
    /// contains the trailers if the body has trailers.
    pub(super) fn finish(&mut self, last_frame: Option<Frame<Bytes>>) {
        self.release_held_frames();
        self.released_frames.extend(last_frame);
    }

    fn release_held_frames(&mut self) {
        self.released_frames.append(&mut self.held_frames);
    }

    /// Takes the next frame that may be forwarded.
    pub(super) fn pop_released(&mut self) -> Option<Frame<Bytes>> {
        self.released_frames.pop_front()
    }

    /// Returns whether a frame is being searched.
    pub(super) fn is_busy(&self) -> bool {
        self.current_frame.is_some()
    }

    /// Returns the number of bytes that were received and are not yet forwarded.
    pub(super) fn unsent_bytes(&self) -> u64 {
        (data_bytes(self.released_frames.iter().chain(&self.current_frame)) + self.held_bytes()) as u64
    }

    /// Returns whether all received frames have been forwarded.
    pub(super) fn is_empty(&self) -> bool {
        self.current_frame.is_none() && self.held_frames.is_empty() && self.released_frames.is_empty()
    }

    fn held_bytes(&self) -> usize {
        data_bytes(&self.held_frames)
    }
}

fn data_bytes<'a>(frames: impl IntoIterator<Item = &'a Frame<Bytes>>) -> usize {
    frames.into_iter().filter_map(Frame::data_ref).map(Bytes::len).sum()
}

impl fmt::Debug for CompressedSearch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CompressedSearch").field("stages", &self.stages.len()).finish_non_exhaustive()
    }
}

/// The decoder of one coding, and its input.
struct CodingStage {
    decoder: Decoder,
    /// Bytes from the previous stage, or from the body, that are not yet decoded.
    input: BytesMut,
}

enum Decoder {
    Gzip(MultiGzDecoder<Vec<u8>>),
    Zlib(ZlibDecoder<Vec<u8>>),
    RawDeflate(DeflateDecoder<Vec<u8>>),
    /// The coding `deflate`, before the format of the body is detected.
    UnknownDeflate,
    /// The body is malformed, and its remaining bytes are not decoded.
    Failed,
}

impl CodingStage {
    fn new(coding: Coding) -> Self {
        let decoder = match coding {
            Coding::Gzip => Decoder::Gzip(MultiGzDecoder::new(Vec::new())),
            Coding::Deflate => Decoder::UnknownDeflate,
        };
        Self { decoder, input: BytesMut::new() }
    }

    /// Returns whether the input has enough bytes for a step.
    fn can_decode(&self) -> bool {
        // Two bytes are needed to detect the format of `deflate`.
        let needed_bytes = if matches!(self.decoder, Decoder::UnknownDeflate) { 2 } else { 1 };
        self.input.len() >= needed_bytes
    }

    /// Decodes at most [`STEP_SIZE`] bytes of the input. Returns the decoded bytes.
    fn decode_step(&mut self) -> Vec<u8> {
        if matches!(self.decoder, Decoder::UnknownDeflate) {
            self.decoder = match self.input[..] {
                // The header of the zlib format (RFC 1950): the method, and a check value that makes the two
                // bytes a multiple of 31.
                [first, second, ..] if first & 0x0f == 8 && u16::from_be_bytes([first, second]) % 31 == 0 => {
                    Decoder::Zlib(ZlibDecoder::new(Vec::new()))
                }
                _ => Decoder::RawDeflate(DeflateDecoder::new(Vec::new())),
            };
        }
        let input = self.input.split_to(self.input.len().min(STEP_SIZE));
        let (is_valid, decoded) = match &mut self.decoder {
            Decoder::Gzip(decoder) => (decode_all(decoder, &input), mem::take(decoder.get_mut())),
            Decoder::Zlib(decoder) => (decode_all(decoder, &input), mem::take(decoder.get_mut())),
            Decoder::RawDeflate(decoder) => (decode_all(decoder, &input), mem::take(decoder.get_mut())),
            Decoder::UnknownDeflate | Decoder::Failed => (true, Vec::new()),
        };
        if !is_valid {
            self.decoder = Decoder::Failed;
        }
        decoded
    }
}

/// Writes `input` to `decoder` and flushes the decoded bytes. Returns whether the input is valid.
fn decode_all(decoder: &mut impl Write, input: &[u8]) -> bool {
    decoder.write_all(input).and_then(|()| decoder.flush()).is_ok()
}

#[cfg(test)]
mod tests {
    use super::super::decode::tests::{gzip, raw_deflate, zlib};
    use super::*;
    use crate::secret::ApiKey;

    const KEY: &str = "sk_6c036526aaaabbbbccccddddeeeeffff0000111122223333d452b";

    fn search(codings: &[Coding]) -> CompressedSearch {
        CompressedSearch::new(
            Arc::new(Redactor::new([ApiKey::new(KEY).unwrap()].iter())),
            codings,
            BufferReservation::default(),
        )
    }

    fn pop_all(search: &mut CompressedSearch) -> Vec<u8> {
        std::iter::from_fn(|| search.pop_released()).flat_map(|frame| frame.into_data().unwrap()).collect()
    }

    /// Searches `body` in chunks. Returns the forwarded bytes, and whether the search has withheld the rest.
    fn forward(codings: &[Coding], body: &[u8], chunk_size: usize) -> (Vec<u8>, bool) {
        let mut search = search(codings);
        let mut forwarded_bytes = Vec::new();
        for chunk in body.chunks(chunk_size) {
            search.push(Bytes::copy_from_slice(chunk));
            loop {
                match search.run_turn() {
                    Ok(SearchProgress::Incomplete) => {}
                    Ok(SearchProgress::Complete) => break,
                    Err(_) => return (forwarded_bytes, true),
                }
            }
            forwarded_bytes.extend(pop_all(&mut search));
        }
        search.finish(None);
        forwarded_bytes.extend(pop_all(&mut search));
        assert!(search.is_empty(), "all frames must be forwarded");
        (forwarded_bytes, false)
    }

    /// The codings of a body, and the function that encodes a text with them.
    type Encoding = (&'static [Coding], fn(&[u8]) -> Vec<u8>);

    const ENCODINGS: [Encoding; 5] = [
        (&[Coding::Gzip], gzip),
        (&[Coding::Deflate], zlib),
        (&[Coding::Deflate], raw_deflate),
        (&[Coding::Gzip, Coding::Gzip], |text| gzip(&gzip(text))),
        (&[Coding::Deflate, Coding::Gzip], |text| gzip(&raw_deflate(text))),
    ];

    #[test]
    fn a_body_without_a_key_is_relayed_byte_for_byte() {
        for (codings, encode) in ENCODINGS {
            for text in ["", "x", "sk_6c036526aaaa", &"words and words ".repeat(5_000)] {
                let body = encode(text.as_bytes());
                for chunk_size in [1, 7, 1_000, 100_000] {
                    assert_eq!(
                        forward(codings, &body, chunk_size),
                        (body.clone(), false),
                        "a body with {codings:?} in chunks of {chunk_size} bytes must be forwarded"
                    );
                }
            }
        }
    }

    #[test]
    fn a_key_is_not_relayed_however_its_body_is_split() {
        for (codings, encode) in ENCODINGS {
            for noise_length in [0, 10, 100_000] {
                let noise: String = (0..noise_length)
                    .map(|index: u64| char::from(b'a' + (index * index % 23) as u8))
                    .collect();
                let body = encode(format!("{noise}{KEY} and more").as_bytes());
                for chunk_size in [1, 7, 1_000, 100_000] {
                    let (forwarded_bytes, is_withheld) = forward(codings, &body, chunk_size);
                    assert!(
                        is_withheld,
                        "a key after {noise_length} bytes must be found in chunks of {chunk_size} bytes with \
                         {codings:?}"
                    );
                    // The forwarded bytes reveal no more of the key than its short form.
                    let mut forwarded_search = search(codings);
                    forwarded_search.push(forwarded_bytes.into());
                    while forwarded_search.run_turn() == Ok(SearchProgress::Incomplete) {}
                    assert!(
                        forwarded_search.decoded_redaction.is_idle(),
                        "the forwarded bytes must not end with more of the key than its short form shows"
                    );
                }
            }
        }
    }

    #[test]
    fn a_malformed_body_is_relayed_and_searched() {
        for body in [b"plain text".to_vec(), [gzip(b"x"), b"garbage".to_vec()].concat(), vec![8]] {
            for codings in [&[Coding::Gzip][..], &[Coding::Deflate]] {
                assert_eq!(forward(codings, &body, 3), (body.clone(), false));
            }
        }
        // Bytes that cannot be decoded are searched.
        for body in
            [KEY.as_bytes().to_vec(), [gzip(b"x"), KEY.into()].concat(), [zlib(b"x"), KEY.into()].concat()]
        {
            for (codings, chunk_size) in [(&[Coding::Gzip][..], 3), (&[Coding::Deflate], 1_000)] {
                let (_, is_withheld) = forward(codings, &body, chunk_size);
                assert!(is_withheld, "a key in bytes that cannot be decoded must be found with {codings:?}");
            }
        }
        // The valid part of a malformed body is decoded and searched.
        let body = [zlib(KEY.as_bytes()), b"garbage".to_vec()].concat();
        let (_, is_withheld) = forward(&[Coding::Deflate], &body, 1_000);
        assert!(is_withheld, "a key before malformed bytes must be found");
    }

    #[test]
    fn a_compression_bomb_is_searched_in_turns() {
        let mut search = search(&[Coding::Gzip]);
        search.push(gzip(&vec![b'x'; 50_000_000]).into());
        let mut turns = 0;
        while search.run_turn() == Ok(SearchProgress::Incomplete) {
            turns += 1;
        }
        assert!(turns >= 40, "the search must take at least 40 turns, but it took {turns}");
    }
}

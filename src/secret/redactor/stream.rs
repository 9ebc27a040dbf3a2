//! Redacts a stream of chunks, or detects keys in it. The concatenated output of the redaction equals
//! [`Redactor::redact`] of the whole stream.
//!
//! A key may be split over chunks, so the start of a possible key is held back, except for the first characters,
//! which its short form shows. All other bytes are forwarded without delay.

use super::{Matches, Redactor, replace_keys};

/// The state of redaction between two chunks of a stream.
#[derive(Debug, Default)]
pub struct StreamRedaction {
    /// The end of the received input from the start of a possible key on. It is empty if the input ends within no key.
    partial_key: Vec<u8>,
    /// Number of bytes at the start of `partial_key` that were already forwarded.
    forwarded_length: usize,
}

/// The output for one chunk.
#[derive(Debug, PartialEq, Eq)]
pub enum RedactedChunk {
    /// The first bytes of the chunk, up to this length, are forwarded unchanged. The other bytes are held back.
    Prefix(usize),
    /// These bytes are forwarded instead of the chunk.
    Replaced(Vec<u8>),
}

impl StreamRedaction {
    /// Redacts the next chunk of the stream.
    pub fn redact_chunk(&mut self, redactor: &Redactor, chunk: &[u8]) -> RedactedChunk {
        if self.partial_key.is_empty() {
            let matches = redactor.search(chunk);
            if matches.keys.is_empty() {
                self.hold_back(chunk, &matches);
                return RedactedChunk::Prefix(chunk.len() - self.held_length());
            }
        }
        let forwarded_length = self.forwarded_length;
        let mut text = std::mem::take(&mut self.partial_key);
        text.extend_from_slice(chunk);
        let matches = redactor.search(&text);
        self.hold_back(&text, &matches);
        // A short form cannot contain the start of a key.
        let mut output = if matches.keys.is_empty() { text } else { replace_keys(&text, &matches.keys) };
        output.truncate(output.len() - self.held_length());
        output.drain(..forwarded_length.min(output.len()));
        RedactedChunk::Replaced(output)
    }

    /// Returns whether `chunk` contains or completes a key. This method is for data that is forwarded in a different
    /// encoding, in which keys cannot be replaced. While [`is_idle`](Self::is_idle) is false, the stream has
    /// received more of a possible key than its short form shows.
    pub fn contains_key(&mut self, redactor: &Redactor, chunk: &[u8]) -> bool {
        let mut text = std::mem::take(&mut self.partial_key);
        text.extend_from_slice(chunk);
        let matches = redactor.search(&text);
        self.hold_back(&text, &matches);
        !matches.keys.is_empty()
    }

    /// Returns the bytes that were held back. The end of the stream proves that they are not a key.
    pub fn finish(&mut self) -> Vec<u8> {
        let forwarded_length = std::mem::take(&mut self.forwarded_length);
        std::mem::take(&mut self.partial_key).split_off(forwarded_length)
    }

    /// Returns whether no bytes are held back.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.held_length() == 0
    }

    fn held_length(&self) -> usize {
        self.partial_key.len() - self.forwarded_length
    }

    /// Keeps the possible key at the end of `text` until the next chunk.
    fn hold_back(&mut self, text: &[u8], matches: &Matches<'_>) {
        self.partial_key = text[matches.partial_start..].to_vec();
        self.forwarded_length = matches.shown_length;
    }
}

//! Finds API keys in the provider's responses. Replaces each key with its short form (its first and last characters),
//! or masks it in data whose length must stay the same.
//!
//! The redactor finds keys in plain text, in UTF-16 in either byte order, and in characters written as
//! backslash escapes (see `escapes`). It does not find keys in base64 or in the escapes of URLs and HTML.
//! The module `stream` redacts a body that arrives in chunks.

mod escapes;
mod stream;

use std::fmt;
use std::ops::Range;

use super::ApiKey;
use escapes::Unescaped;
pub use stream::{RedactedChunk, StreamRedaction};

/// Minimum length of a key that is searched for. Shorter strings occur in responses by chance.
const MIN_KEY_LENGTH: usize = 16;

/// Every short form shows at least this number of bytes at the start of its key. These bytes may be forwarded
/// before the following bytes are known.
const MIN_SHOWN_BYTES: usize = 4;

/// Number of slots for hashes of byte pairs. A larger table would not fit the processor's cache.
const SKIP_TABLE_SIZE: usize = 4096;

/// Searches for all keys of a pool in one pass.
///
/// The search looks up the pair of bytes at the end of a window, and advances the window by the minimum
/// distance of that pair from the end of any key (the Wu-Manber algorithm). Most bytes are never read.
#[derive(Debug)]
pub struct Redactor {
    /// The keys in each encoding, sorted by their bytes.
    needles: Vec<Needle>,
    /// Length of the shortest needle. The skip table covers this number of bytes at the start of each needle. The
    /// remaining bytes are compared one by one.
    window_length: usize,
    /// Length of the longest needle.
    max_needle_length: usize,
    /// The distance by which the window may advance, indexed by the hash of its last two bytes.
    skip_distances: Vec<usize>,
    /// Whether any needle starts with the byte, indexed by the byte.
    is_first_byte: [bool; 256],
}

/// A key in one encoding.
struct Needle {
    bytes: Vec<u8>,
    short_form: Vec<u8>,
    encoding: KeyEncoding,
}

/// The text encoding of a needle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum KeyEncoding {
    /// One byte per character: ASCII and its supersets.
    Plain,
    /// Two bytes per character, little endian.
    Utf16Le,
    /// Two bytes per character, big endian.
    Utf16Be,
}

impl KeyEncoding {
    const ALL: [Self; 3] = [Self::Plain, Self::Utf16Le, Self::Utf16Be];

    fn encode(self, ascii: &[u8]) -> Vec<u8> {
        match self {
            Self::Plain => ascii.to_vec(),
            Self::Utf16Le => ascii.iter().flat_map(|byte| [*byte, 0]).collect(),
            Self::Utf16Be => ascii.iter().flat_map(|byte| [0, *byte]).collect(),
        }
    }
}

impl Needle {
    fn new(key: &ApiKey, encoding: KeyEncoding) -> Self {
        let bytes = encoding.encode(key.value.as_bytes());
        Self { bytes, short_form: encoding.encode(key.short.as_str().as_bytes()), encoding }
    }

    /// Returns the number of bytes at the start of the key that the short form shows.
    fn shown_length(&self) -> usize {
        let dots = self.encoding.encode(b"...");
        self.short_form.windows(dots.len()).position(|window| window == dots).unwrap_or(0)
    }

    /// Overwrites `matched_bytes`, which contain this key, with the short form, padded with dots. A
    /// UTF-16 key that contains escapes is overwritten with dots only.
    fn mask(&self, matched_bytes: &mut [u8]) {
        // A match that contains escapes is longer than the needle, and is plain text.
        let encoding =
            if matched_bytes.len() == self.bytes.len() { self.encoding } else { KeyEncoding::Plain };
        let dots = encoding.encode(&vec![b'.'; matched_bytes.len() / encoding.encode(b".").len()]);
        let short_form = if encoding == self.encoding { self.short_form.as_slice() } else { &[] };
        matched_bytes.copy_from_slice(&dots);
        let (start, rest) = short_form.split_at(self.shown_length().min(short_form.len()));
        let end = rest.get(encoding.encode(b"...").len()..).unwrap_or_default();
        if let Some(first_bytes) = matched_bytes.get_mut(..start.len()) {
            first_bytes.copy_from_slice(start);
        }
        let end_offset = matched_bytes.len().saturating_sub(end.len());
        if let Some(last_bytes) = matched_bytes.get_mut(end_offset..) {
            last_bytes.copy_from_slice(end);
        }
    }
}

impl fmt::Debug for Needle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Needle({:?})", self.encoding)
    }
}

/// The result of a search.
struct Matches<'a> {
    /// The range of each key in the text, with its needle.
    keys: Vec<(Range<usize>, &'a Needle)>,
    /// The offset at which an incomplete key at the end may start.
    partial_start: usize,
    /// Number of bytes from `partial_start` that are not escapes and that every short form shows.
    shown_length: usize,
}

impl Redactor {
    /// Builds the search tables for `keys`.
    pub fn new<'a>(keys: impl Iterator<Item = &'a ApiKey>) -> Self {
        let keys = keys.filter(|key| key.value.len() >= MIN_KEY_LENGTH);
        let mut needles: Vec<Needle> =
            keys.flat_map(|key| KeyEncoding::ALL.map(|encoding| Needle::new(key, encoding))).collect();
        needles.sort_by(|left, right| left.bytes.cmp(&right.bytes));
        let lengths = needles.iter().map(|needle| needle.bytes.len());
        let window_length = lengths.clone().min().unwrap_or(MIN_KEY_LENGTH);
        let max_needle_length = lengths.max().unwrap_or(MIN_KEY_LENGTH);
        let mut skip_distances = vec![window_length - 1; SKIP_TABLE_SIZE];
        let mut is_first_byte = [false; 256];
        for needle in &needles {
            is_first_byte[usize::from(needle.bytes[0])] = true;
            for (index, pair) in needle.bytes[..window_length].windows(2).enumerate() {
                let distance = &mut skip_distances[hash_pair(pair)];
                *distance = (*distance).min(window_length - 2 - index);
            }
        }
        Self { needles, window_length, max_needle_length, skip_distances, is_first_byte }
    }

    /// Returns `text` with every key replaced with its short form, or `None` if it contains no key.
    #[inline]
    #[must_use]
    pub fn redact(&self, text: &[u8]) -> Option<Vec<u8>> {
        // Most inputs are header names and values, which are shorter than a key.
        if text.len() < self.window_length { None } else { self.redact_long(text) }
    }

    fn redact_long(&self, text: &[u8]) -> Option<Vec<u8>> {
        if !escapes::may_contain_escape(text) && self.find_next(text, 0).is_none() {
            return None;
        }
        let matches = self.search(text);
        (!matches.keys.is_empty()).then(|| replace_keys(text, &matches.keys))
    }

    /// Returns whether `bytes`, which may be binary, contain a key.
    #[must_use]
    pub fn contains_key(&self, bytes: &[u8]) -> bool {
        !self.search(bytes).keys.is_empty()
    }

    /// Returns the number of bytes at the end of `bytes` that may belong to an incomplete key, without the bytes that
    /// its short form shows.
    #[must_use]
    pub fn partial_key_length(&self, bytes: &[u8]) -> usize {
        let matches = self.search(bytes);
        bytes.len() - matches.partial_start - matches.shown_length
    }

    /// Overwrites every key with its short form, padded to the length of the key. This method is for data
    /// whose length was already sent, including binary data such as WebSocket payloads.
    ///
    /// Returns the number of bytes at the end of `bytes` that may belong to an incomplete key. The caller
    /// must search them again together with the bytes that follow.
    pub fn mask_keys(&self, bytes: &mut [u8]) -> usize {
        let matches = self.search(bytes);
        for (range, needle) in matches.keys {
            if let Some(matched_bytes) = bytes.get_mut(range) {
                needle.mask(matched_bytes);
            }
        }
        bytes.len() - matches.partial_start
    }

    /// Searches for all keys, and for an incomplete key or escape at the end of `text`.
    fn search(&self, text: &[u8]) -> Matches<'_> {
        if self.needles.is_empty() {
            return Matches { keys: Vec::new(), partial_start: text.len(), shown_length: 0 };
        }
        let Some(unescaped) = Unescaped::decode(text) else {
            let (keys, partial_start) = self.search_unescaped(text);
            let shown_length = (text.len() - partial_start).min(MIN_SHOWN_BYTES);
            return Matches { keys, partial_start, shown_length };
        };
        let (mut keys, partial_start) = self.search_unescaped(&unescaped.text);
        for (range, _) in &mut keys {
            *range = unescaped.original_offset(range.start)..unescaped.original_offset(range.end);
        }
        let end = unescaped.text.len();
        let is_unescaped =
            |offset: &usize| unescaped.original_offset(*offset + 1) == unescaped.original_offset(*offset) + 1;
        let shown_length = (partial_start..end).take(MIN_SHOWN_BYTES).take_while(is_unescaped).count();
        let partial_start = if partial_start < end {
            unescaped.original_offset(partial_start)
        } else {
            unescaped.partial_escape
        };
        Matches { keys, partial_start, shown_length }
    }

    /// Returns the keys in `text`, which has no escapes, and the offset of an incomplete key at its end.
    fn search_unescaped(&self, text: &[u8]) -> (Vec<(Range<usize>, &Needle)>, usize) {
        let mut keys = Vec::new();
        let mut search_start = 0;
        while let Some((offset, needle)) = self.find_next(text, search_start) {
            search_start = offset + needle.bytes.len();
            keys.push((offset..search_start, needle));
        }
        (keys, text.len() - self.longest_partial_key(&text[search_start..]).len())
    }

    /// Overwrites the incomplete key at the start of `bytes`, except for the part that its short form shows.
    /// Use this method at the end of a stream, or where the rest of the key is in another frame.
    pub fn mask_partial_key(&self, bytes: &mut [u8]) {
        let (shown_length, encoding, hidden_start) = {
            let unescaped = Unescaped::decode(bytes);
            let text = unescaped.as_ref().map_or(&*bytes, |unescaped| &unescaped.text);
            let Some(needle) = self.needles_with_prefix(text).min_by_key(|needle| needle.shown_length())
            else {
                return;
            };
            let shown_length = needle.shown_length();
            if shown_length >= text.len() {
                return;
            }
            let hidden_start =
                unescaped.as_ref().map_or(shown_length, |unescaped| unescaped.original_offset(shown_length));
            (shown_length, needle.encoding, hidden_start)
        };
        let hidden = bytes.get_mut(hidden_start..).unwrap_or_default();
        let dots = encoding.encode(&vec![b'.'; hidden.len() + 1]);
        for (byte, dot) in hidden.iter_mut().zip(dots.iter().skip(shown_length % 2)) {
            *byte = *dot;
        }
    }

    /// Returns the offset and the needle of the first key at or after the offset `start`.
    fn find_next(&self, text: &[u8], mut start: usize) -> Option<(usize, &Needle)> {
        while let Some(window) = text.get(start..start + self.window_length) {
            let distance = self.skip_distances[hash_pair(&window[self.window_length - 2..])];
            if distance > 0 {
                start += distance;
                continue;
            }
            if let Some(needle) = self.longest_key_at_start(&text[start..]) {
                return Some((start, needle));
            }
            start += 1;
        }
        None
    }

    /// Returns the longest key at the start of `text`. If one key is a prefix of another, the longer key must match,
    /// because otherwise its remaining characters would be shown.
    fn longest_key_at_start(&self, text: &[u8]) -> Option<&Needle> {
        let window = text.get(..self.window_length)?;
        if !self.is_first_byte[usize::from(window[0])] {
            return None;
        }
        let candidates = self.needles_with_prefix(window).filter(|needle| text.starts_with(&needle.bytes));
        candidates.max_by_key(|needle| needle.bytes.len())
    }

    /// Returns the longest suffix of `text` that may be the start of a key.
    fn longest_partial_key<'a>(&self, text: &'a [u8]) -> &'a [u8] {
        let mut suffix = &text[text.len().saturating_sub(self.max_needle_length - 1)..];
        // Most bytes cannot start a key.
        while let Some(offset) = suffix.iter().position(|byte| self.is_first_byte[usize::from(*byte)]) {
            suffix = &suffix[offset..];
            if self.needles_with_prefix(suffix).next().is_some() {
                return suffix;
            }
            suffix = &suffix[1..];
        }
        &[]
    }

    /// Returns the needles that start with `prefix`, which are adjacent in the sorted list.
    fn needles_with_prefix(&self, prefix: &[u8]) -> impl Iterator<Item = &Needle> {
        let first = self.needles.partition_point(|needle| needle.bytes.as_slice() < prefix);
        self.needles[first..].iter().take_while(move |needle| needle.bytes.starts_with(prefix))
    }
}

/// Returns `text` with the keys in the given ranges replaced by their short forms.
fn replace_keys(text: &[u8], keys: &[(Range<usize>, &Needle)]) -> Vec<u8> {
    let mut replaced = Vec::with_capacity(text.len());
    let mut copied_length = 0;
    for (range, needle) in keys {
        replaced.extend_from_slice(&text[copied_length..range.start]);
        replaced.extend_from_slice(&needle.short_form);
        copied_length = range.end;
    }
    replaced.extend_from_slice(&text[copied_length..]);
    replaced
}

/// Returns the index of a byte pair in the skip table.
fn hash_pair(pair: &[u8]) -> usize {
    pair.iter().fold(0, |hash: usize, byte| (hash << 6) ^ usize::from(*byte)) % SKIP_TABLE_SIZE
}

#[cfg(test)]
mod tests;

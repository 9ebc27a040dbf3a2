//! Replaces keys in the provider's responses by their short forms. Separate from the types of keys,
//! because it works on streams: a key may be split over two chunks, and no chunk may be delayed
//! until the next.
//!
//! A key is found as plain text, in UTF-16 of either byte order, and with characters written as
//! escapes (`escapes` lists the forms). It is not found in base64, or in the escapes of URLs and
//! HTML.

mod escapes;

use std::fmt;
use std::ops::Range;

use super::ApiKey;
use escapes::Unescaped;

/// Shorter keys are not searched for, because texts contain such strings by chance.
const KEY_BYTES_MIN: usize = 16;

/// Every short form shows at least this many bytes of a key, so they may be forwarded before the
/// next bytes are known.
const SHOWN_BYTES: usize = 4;

/// Number of slots for hashes of byte pairs. A larger table would not fit the processor's cache.
const SLOTS: usize = 4096;

/// Searches for all keys of a pool at once.
///
/// It looks up pairs of bytes and skips ahead by the distance of the pair from the end of any key's
/// window (the method of Wu and Manber), so that most bytes are never read.
#[derive(Debug)]
pub struct Redactor {
    /// The keys in each of their encodings, the longest first.
    needles: Vec<Needle>,
    /// Indices of the needles in byte order.
    sorted: Vec<usize>,
    /// The length of the shortest needle. The search uses this many bytes of each needle, and
    /// compares the rest.
    window: usize,
    /// The distance by which the window may advance, by the pair in which it ends.
    skips: Vec<usize>,
    /// Whether a needle begins with the byte.
    first_bytes: [bool; 256],
}

/// A key in one of its encodings.
struct Needle {
    bytes: Vec<u8>,
    short: Vec<u8>,
    encoding: KeyEncoding,
}

/// The encoding of a text.
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

    fn write(self, text: &[u8]) -> Vec<u8> {
        match self {
            Self::Plain => text.to_vec(),
            Self::Utf16Le => text.iter().flat_map(|byte| [*byte, 0]).collect(),
            Self::Utf16Be => text.iter().flat_map(|byte| [0, *byte]).collect(),
        }
    }
}

impl Needle {
    fn of(key: &ApiKey, encoding: KeyEncoding) -> Self {
        let (bytes, short) =
            (encoding.write(key.value.as_bytes()), encoding.write(key.short.as_str().as_bytes()));
        Self { bytes, short, encoding }
    }

    /// Length of the beginning that the short form shows.
    fn shown(&self) -> usize {
        let dots = self.encoding.write(b"...");
        self.short.windows(dots.len()).position(|window| window == dots).unwrap_or(0)
    }

    /// Overwrites `span` with the short form, padded with dots.
    fn cover(&self, span: &mut [u8]) {
        // A match with escapes is longer than the needle, and plain.
        let encoding = if span.len() == self.bytes.len() { self.encoding } else { KeyEncoding::Plain };
        let dots = encoding.write(&vec![b'.'; span.len() / encoding.write(b".").len()]);
        let short = if encoding == self.encoding { self.short.clone() } else { Vec::new() };
        span.copy_from_slice(&dots);
        let (start, rest) = short.split_at(self.shown().min(short.len()));
        let end = rest.get(encoding.write(b"...").len()..).unwrap_or_default();
        if let Some(begin) = span.get_mut(..start.len()) {
            begin.copy_from_slice(start);
        }
        let before = span.len().saturating_sub(end.len());
        if let Some(last) = span.get_mut(before..) {
            last.copy_from_slice(end);
        }
    }
}

impl fmt::Debug for Needle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Needle({:?})", self.encoding)
    }
}

/// The matches in a text.
struct Matches<'a> {
    keys: Vec<(Range<usize>, &'a Needle)>,
    /// The offset from which an incomplete key may begin at the end.
    partial_start: usize,
    /// Number of bytes of that end that are unescaped and that a short form shows.
    shown: usize,
}

impl Redactor {
    /// Builds the search for `keys`.
    pub fn new<'a>(keys: impl Iterator<Item = &'a ApiKey>) -> Self {
        let keys: Vec<&ApiKey> = keys.filter(|key| key.value.len() >= KEY_BYTES_MIN).collect();
        let mut needles: Vec<Needle> =
            keys.iter().flat_map(|key| KeyEncoding::ALL.map(|encoding| Needle::of(key, encoding))).collect();
        // If one key is a prefix of another, the longer one matches.
        needles.sort_by_key(|needle| std::cmp::Reverse(needle.bytes.len()));
        let window = needles.last().map_or(KEY_BYTES_MIN, |needle| needle.bytes.len());
        let mut skips = vec![window - 1; SLOTS];
        for needle in &needles {
            for (index, pair) in needle.bytes[..window].windows(2).enumerate() {
                let slot = &mut skips[slot(pair)];
                *slot = (*slot).min(window - 2 - index);
            }
        }
        let mut sorted: Vec<usize> = (0..needles.len()).collect();
        sorted.sort_by_key(|&index| needles.get(index).map(|needle| &needle.bytes));
        let mut first_bytes = [false; 256];
        for first in needles.iter().filter_map(|needle| needle.bytes.first()) {
            first_bytes[usize::from(*first)] = true;
        }
        Self { needles, sorted, window, skips, first_bytes }
    }

    /// `text` with every key replaced by its short form; `None` if it contains no key.
    #[inline]
    #[must_use]
    pub fn redacted(&self, text: &[u8]) -> Option<Vec<u8>> {
        // Most texts are header names and values, which are shorter than a key.
        if text.len() < self.window { None } else { self.redacted_long(text) }
    }

    fn redacted_long(&self, text: &[u8]) -> Option<Vec<u8>> {
        if !escapes::may_be_in(text) && self.find(text, 0).is_none() {
            return None;
        }
        let matches = self.search(text);
        (!matches.keys.is_empty()).then(|| replaced(text, &matches.keys))
    }

    /// Whether `bytes` contains a key; `bytes` may be anything, such as a binary payload or a close
    /// reason.
    #[must_use]
    pub fn finds_in(&self, bytes: &[u8]) -> bool {
        !self.search(bytes).keys.is_empty()
    }

    /// Number of bytes at the end of `bytes` that may be the start of a key, beyond the part that
    /// its short form shows. Only the following bytes decide that.
    #[must_use]
    pub fn open_end(&self, bytes: &[u8]) -> usize {
        let matches = self.search(bytes);
        bytes.len() - matches.partial_start - matches.shown
    }

    /// Overwrites every key with its short form, padded to the key's length: for texts whose length
    /// was announced before, and for bytes of any kind, such as the payload of a binary or a
    /// control frame. Returns the number of bytes at the end that may be the start of another key:
    /// these must be searched again together with the bytes that follow.
    pub fn cover(&self, text: &mut [u8]) -> usize {
        let matches = self.search(text);
        for (range, needle) in matches.keys {
            if let Some(span) = text.get_mut(range) {
                needle.cover(span);
            }
        }
        text.len() - matches.partial_start
    }

    /// Finds all keys in a text.
    fn search(&self, text: &[u8]) -> Matches<'_> {
        if self.needles.is_empty() {
            return Matches { keys: Vec::new(), partial_start: text.len(), shown: 0 };
        }
        let Some(unescaped) = Unescaped::of(text) else {
            let (keys, partial_start) = self.search_plain(text);
            let shown = (text.len() - partial_start).min(SHOWN_BYTES);
            return Matches { keys, partial_start, shown };
        };
        let (keys, partial_start) = self.search_plain(&unescaped.text);
        let original = |range: Range<usize>| unescaped.original(range.start)..unescaped.original(range.end);
        let keys = keys.into_iter().map(|(range, needle)| (original(range), needle)).collect();
        let end = unescaped.text.len();
        let is_as_written =
            |offset: &usize| unescaped.original(*offset + 1) == unescaped.original(*offset) + 1;
        let shown = (partial_start..end).take(SHOWN_BYTES).take_while(is_as_written).count();
        let partial_start =
            if partial_start < end { unescaped.original(partial_start) } else { unescaped.partial };
        Matches { keys, partial_start, shown }
    }

    /// The same in a text without escapes, and the offset of its incomplete end.
    fn search_plain(&self, text: &[u8]) -> (Vec<(Range<usize>, &Needle)>, usize) {
        let mut keys = Vec::new();
        let mut from = 0;
        while let Some((at, needle)) = self.find(text, from) {
            from = at + needle.bytes.len();
            keys.push((at..from, needle));
        }
        (keys, text.len() - self.possible_start_at_end(&text[from..]).len())
    }

    /// Overwrites the start of a key at the end of the stream, or of one that continues elsewhere,
    /// beyond the part that its short form shows.
    pub fn cover_end(&self, end: &mut [u8]) {
        let (shown, encoding, from) = {
            let unescaped = Unescaped::of(end);
            let text = unescaped.as_ref().map_or(&*end, |unescaped| &unescaped.text);
            let candidates = self.with_prefix(text).filter_map(|index| self.needles.get(index));
            let Some(needle) = candidates.min_by_key(|needle| needle.shown()) else { return };
            let shown = needle.shown();
            if shown >= text.len() {
                return;
            }
            let from = unescaped.as_ref().map_or(shown, |unescaped| unescaped.original(shown));
            (shown, needle.encoding, from)
        };
        let hidden = end.get_mut(from..).unwrap_or_default();
        let dots = encoding.write(&vec![b'.'; hidden.len() + 1]);
        for (byte, dot) in hidden.iter_mut().zip(dots.iter().skip(shown % 2)) {
            *byte = *dot;
        }
    }

    /// The first key at or after `from`.
    fn find(&self, text: &[u8], from: usize) -> Option<(usize, &Needle)> {
        let mut start = from;
        while let Some(window) = text.get(start..start + self.window) {
            let skip = self.skips[slot(&window[self.window - 2..])];
            if skip > 0 {
                start += skip;
                continue;
            }
            if let Some(needle) = self.match_at_start(&text[start..]) {
                return Some((start, needle));
            }
            start += 1;
        }
        None
    }

    /// The longest key that `text` begins with.
    fn match_at_start(&self, text: &[u8]) -> Option<&Needle> {
        let window = text.get(..self.window)?;
        if !self.first_bytes[usize::from(window[0])] {
            return None;
        }
        let candidates = self.with_prefix(window).filter(|&index| text.starts_with(self.bytes(index)));
        // The longest needles come first.
        candidates.min().and_then(|index| self.needles.get(index))
    }

    /// The longest end of `text` that a key may begin with.
    fn possible_start_at_end<'a>(&self, text: &'a [u8]) -> &'a [u8] {
        let longest = self.needles.first().map_or(0, |needle| needle.bytes.len() - 1);
        let mut end = &text[text.len().saturating_sub(longest)..];
        // Most bytes cannot begin a key.
        while let Some(at) = end.iter().position(|byte| self.first_bytes[usize::from(*byte)]) {
            end = &end[at..];
            if self.with_prefix(end).next().is_some() {
                return end;
            }
            end = &end[1..];
        }
        &[]
    }

    /// The indices of the needles with this prefix, which are adjacent in byte order.
    fn with_prefix(&self, prefix: &[u8]) -> impl Iterator<Item = usize> {
        let first = self.sorted.partition_point(|&index| self.bytes(index) < prefix);
        let rest = self.sorted[first..].iter().copied();
        rest.take_while(move |&index| self.bytes(index).starts_with(prefix))
    }

    fn bytes(&self, index: usize) -> &[u8] {
        self.needles.get(index).map_or(&[], |needle| &needle.bytes)
    }
}

/// The text with the keys replaced by their short forms.
fn replaced(text: &[u8], keys: &[(Range<usize>, &Needle)]) -> Vec<u8> {
    let mut replaced = Vec::with_capacity(text.len());
    let mut from = 0;
    for (range, needle) in keys {
        replaced.extend_from_slice(&text[from..range.start]);
        replaced.extend_from_slice(&needle.short);
        from = range.end;
    }
    replaced.extend_from_slice(&text[from..]);
    replaced
}

/// The slot of a byte pair.
fn slot(pair: &[u8]) -> usize {
    pair.iter().fold(0, |slot: usize, byte| (slot << 6) ^ usize::from(*byte)) % SLOTS
}

/// The search in a stream of chunks. The output equals [`Redactor::redacted`] of the whole text,
/// and is not delayed: only the incomplete start of a key is held back, beyond the few characters
/// that its short form shows.
#[derive(Debug, Default)]
pub struct Redaction {
    /// The end of the input so far, if a key may have begun in it.
    held: Vec<u8>,
    /// Number of bytes of that end that were forwarded.
    sent: usize,
}

/// The output for a chunk.
#[derive(Debug, PartialEq, Eq)]
pub enum Passed {
    /// This many bytes of the chunk's start are forwarded unchanged; the others are held back.
    Start(usize),
    /// These bytes are forwarded instead.
    Instead(Vec<u8>),
}

impl Redaction {
    /// Processes the next chunk.
    pub fn pass(&mut self, redactor: &Redactor, piece: &[u8]) -> Passed {
        if self.held.is_empty() {
            let matches = redactor.search(piece);
            if matches.keys.is_empty() {
                self.hold(piece, &matches);
                return Passed::Start(piece.len() - (self.held.len() - self.sent));
            }
        }
        let sent = self.sent;
        let mut text = std::mem::take(&mut self.held);
        text.extend_from_slice(piece);
        let matches = redactor.search(&text);
        self.hold(&text, &matches);
        // A short form cannot contain the start of a key.
        let mut out = if matches.keys.is_empty() { text } else { replaced(&text, &matches.keys) };
        out.truncate(out.len() - (self.held.len() - self.sent));
        out.drain(..sent.min(out.len()));
        Passed::Instead(out)
    }

    /// Whether the input so far, including the next chunk, contains a key: for texts that are
    /// forwarded in another encoding, where nothing can be replaced. While
    /// [`is_idle`](Self::is_idle) is false, more of a key has been received than its short form
    /// shows.
    pub fn finds(&mut self, redactor: &Redactor, piece: &[u8]) -> bool {
        let mut text = std::mem::take(&mut self.held);
        text.extend_from_slice(piece);
        let matches = redactor.search(&text);
        self.hold(&text, &matches);
        !matches.keys.is_empty()
    }

    /// Returns the bytes held back at the end of the text, because they are no key.
    pub fn finish(&mut self) -> Vec<u8> {
        let sent = std::mem::take(&mut self.sent);
        let mut rest = std::mem::take(&mut self.held);
        rest.drain(..sent);
        rest
    }

    /// Whether no bytes are held back.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.held.len() == self.sent
    }

    fn hold(&mut self, text: &[u8], matches: &Matches<'_>) {
        self.held = text[matches.partial_start..].to_vec();
        self.sent = matches.shown;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LONG: &str = "sk_6c036526aaaabbbbccccddddeeeeffff0000111122223333d452b";
    const TWIN: &str = "sk_6c036526aaaabbbbccccddddeeeeffff0000111122223333d452c";
    const OLD: &str = "0123456789abcdef0123456789abcdef";

    fn redactor(keys: &[&str]) -> Redactor {
        let keys: Vec<ApiKey> = keys.iter().map(|key| ApiKey::new(key).unwrap()).collect();
        Redactor::new(keys.iter())
    }

    /// Processes `pieces` and returns the output of each chunk and of the end.
    fn passed(redactor: &Redactor, pieces: &[&[u8]]) -> Vec<String> {
        let mut redaction = Redaction::default();
        let mut out: Vec<Vec<u8>> = pieces
            .iter()
            .map(|piece| match redaction.pass(redactor, piece) {
                Passed::Start(length) => piece[..length].to_vec(),
                Passed::Instead(bytes) => bytes,
            })
            .collect();
        out.push(redaction.finish());
        out.into_iter().map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).collect()
    }

    #[track_caller]
    fn check(text: &str, expected: Option<&str>) {
        let redacted = redactor(&[LONG, TWIN, OLD]).redacted(text.as_bytes());
        assert_eq!(redacted, expected.map(|text| text.as_bytes().to_vec()));
    }

    #[test]
    fn a_key_becomes_its_short_form_at_any_position() {
        check(LONG, Some("sk_6c036526...d452b"));
        check(&format!("{{\"key\":\"{LONG}\"}}"), Some(r#"{"key":"sk_6c036526...d452b"}"#));
        check(&format!("{TWIN}{LONG} {OLD}0"), Some("sk_6c036526...d452csk_6c036526...d452b 0123...cdef0"));
        check(
            &format!("s{}sk_{LONG}", &LONG[..40]),
            Some(&format!("s{}sk_sk_6c036526...d452b", &LONG[..40])),
        );
    }

    #[test]
    fn a_text_that_is_nearly_a_key_is_kept() {
        check(&LONG[1..], None);
        check(&LONG[..LONG.len() - 1], None);
        check(&LONG.replace("cccc", "cccd"), None);
        check("", None);
        assert_eq!(redactor(&[]).redacted(LONG.as_bytes()), None);
    }

    #[test]
    fn a_covered_text_keeps_its_length() {
        let redactor = redactor(&[LONG, OLD]);
        let mut text = format!("a {LONG} b {OLD}{OLD} sk_6c036").into_bytes();
        let length = text.len();
        assert_eq!(redactor.cover(&mut text), "sk_6c036".len());
        let covered = String::from_utf8(text).unwrap();
        assert_eq!(covered.len(), length);
        assert!(
            covered.starts_with("a sk_6c036526...") && covered.contains("...d452b b 0123..."),
            "{covered}"
        );
        assert!(!covered.contains(&LONG[11..20]) && !covered.contains(&OLD[4..12]), "{covered}");
        assert_eq!(redactor.cover(&mut []), 0);
    }

    #[test]
    fn a_short_key_is_not_searched_for() {
        assert_eq!(redactor(&["0123456789abcde"]).redacted(b"0123456789abcde"), None);
        assert_eq!(
            redactor(&["0123456789abcdef"]).redacted(b"0123456789abcdef"),
            Some(b"0123...cdef".to_vec())
        );
    }

    #[test]
    fn a_key_with_a_shorter_key_as_its_prefix_is_replaced_whole() {
        let longer = format!("{OLD}{OLD}");
        let text = redactor(&[OLD, &longer]).redacted(longer.as_bytes()).unwrap();
        assert_eq!(text, b"0123456789a...bcdef");
    }

    #[test]
    fn a_piece_is_held_back_only_for_the_rest_of_a_key() {
        let redactor = redactor(&[LONG, OLD]);
        assert_eq!(passed(&redactor, &[b"data: sk", b"ill"]), ["data: sk", "ill", ""]);
        assert_eq!(passed(&redactor, &[b"data: sk_6", b"x"]), ["data: sk_6", "x", ""]);
        assert_eq!(passed(&redactor, &[b"data: sk_6c0", b"x"]), ["data: sk_6", "c0x", ""]);
        assert_eq!(passed(&redactor, &[b"data: sk_6c0"]), ["data: sk_6", "c0"]);
        let (start, end) = LONG.split_at(30);
        assert_eq!(
            passed(&redactor, &[start.as_bytes(), end.as_bytes(), b"."]),
            ["sk_6", "c036526...d452b", ".", ""]
        );
    }

    proptest! {
        #[test]
        fn the_first_and_longest_key_is_found(
            keys in prop::collection::vec("[ab]{16,19}|sk_[0-9a-f]{20}", 1..30),
            parts in prop::collection::vec("[ab]{0,20}|sk_[0-9a-f]{0,3}|[0-9a-f]{1,4}", 0..12),
            indices in prop::collection::vec(0_usize..30, 0..12),
        ) {
            let texts: Vec<&str> = keys.iter().map(String::as_str).collect();
            let text: String = parts
                .iter()
                .enumerate()
                .map(|(at, part)| part.clone() + indices.get(at).map_or("", |index| texts[index % texts.len()]))
                .collect();
            // A naive search for comparison.
            let at_each = (0..text.len()).find_map(|at| {
                let candidates = texts.iter().filter(|key| text[at..].starts_with(**key));
                candidates.max_by_key(|key| key.len()).map(|key| (at, (*key).to_owned()))
            });
            let redactor = redactor(&texts);
            let matches = redactor.find(text.as_bytes(), 0);
            let matches = matches.map(|(at, key)| (at, String::from_utf8(key.bytes.clone()).unwrap()));
            prop_assert_eq!(matches, at_each);
        }
    }

    /// `text` with each of its characters written in one of these forms in turn.
    fn written(text: &str, forms: &[fn(u8) -> String]) -> String {
        text.bytes().enumerate().map(|(at, byte)| forms[at % forms.len()](byte)).collect()
    }

    fn as_written(byte: u8) -> String {
        char::from(byte).to_string()
    }

    fn in_json(byte: u8) -> String {
        format!("\\u{byte:04x}")
    }

    fn in_json_in_json(byte: u8) -> String {
        format!("\\\\u{byte:04X}")
    }

    fn in_yaml(byte: u8) -> String {
        format!("\\x{byte:02x}")
    }

    #[test]
    fn a_key_is_found_in_every_escape() {
        for forms in [
            &[in_json as fn(u8) -> String][..],
            &[in_json, as_written],
            &[as_written, as_written, as_written, in_json],
            &[in_json_in_json],
            &[in_yaml],
        ] {
            let key = written(LONG, forms);
            check(&format!("{{\"key\":\"{key}\\n\"}}"), Some("{\"key\":\"sk_6c036526...d452b\\n\"}"));
            let redactor = redactor(&[LONG]);
            assert!(redactor.finds_in(key.as_bytes()));
            let mut text = format!("a {key} b").into_bytes();
            let length = text.len();
            assert_eq!(redactor.cover(&mut text), 0);
            assert_eq!(text.len(), length);
            assert!(!redactor.finds_in(&text) && text.starts_with(b"a ") && text.ends_with(b" b"));
            check(&written(&LONG[1..], forms), None);
        }
    }

    #[test]
    fn a_key_is_found_in_utf_16() {
        for encoding in [KeyEncoding::Utf16Le, KeyEncoding::Utf16Be] {
            let text = encoding.write(format!("\"{LONG}\".").as_bytes());
            let shown = encoding.write(b"\"sk_6c036526...d452b\".");
            let redactor = redactor(&[LONG]);
            assert_eq!(redactor.redacted(&text), Some(shown));
            let mut covered = text.clone();
            redactor.cover(&mut covered);
            assert_eq!(covered.len(), text.len());
            assert!(covered.starts_with(&encoding.write(b"\"sk_6c036526...")), "{covered:?}");
            assert!(!redactor.finds_in(&covered));
        }
    }

    #[test]
    fn binary_payloads_are_searched() {
        let redactor = redactor(&[LONG]);
        let binary = [&[0, 255, 128, b's'][..], LONG.as_bytes(), &[0, 1, 2]].concat();
        assert!(redactor.finds_in(&binary));
        assert!(!redactor.finds_in(&binary[..binary.len() - 4]));
        for (text, open_bytes) in
            [("x", 0), ("sk_6c0", 2), ("sk_6", 0), ("a\\u00", 4), ("sk\\u005f", 6), (LONG, 0)]
        {
            assert_eq!(redactor.open_end(text.as_bytes()), open_bytes, "{text}");
        }
    }

    #[test]
    fn the_covered_start_of_a_key_shows_no_more_than_its_short_form() {
        let redactor = redactor(&[LONG]);
        let covered = |text: &[u8]| {
            let mut text = text.to_vec();
            redactor.cover_end(&mut text);
            text
        };
        for (text, expected) in [
            ("sk_6c0", "sk_6c0"),
            ("sk_6c036526", "sk_6c036526"),
            ("sk_6c036526aaaa", "sk_6c036526...."),
            ("sk_6c036526\\u0061a\\u00", "sk_6c036526..........."),
            ("\\u0073k_6c036526a", "\\u0073k_6c036526."),
            ("\\u00", "\\u00"),
            ("x", "x"),
            ("", ""),
        ] {
            assert_eq!(String::from_utf8(covered(text.as_bytes())).unwrap(), expected);
        }
        for encoding in [KeyEncoding::Utf16Le, KeyEncoding::Utf16Be] {
            assert_eq!(covered(&encoding.write(b"sk_6c036526aaaa")), encoding.write(b"sk_6c036526...."));
        }
    }

    #[test]
    fn a_redactor_prints_no_key() {
        let redactor = redactor(&[LONG]);
        assert!(!format!("{redactor:?}").contains("6c03"));
    }

    /// Parts of texts that contain keys, and of similar texts.
    fn parts() -> impl Strategy<Value = Vec<u8>> {
        let texts = [
            "sk_",
            LONG,
            TWIN,
            OLD,
            "sk_6c0365",
            "0123456789",
            "\\",
            "\\u00",
            "%",
            "&#",
            "\\n",
            "a",
            "\\u0073",
        ];
        let plain = prop::sample::select(texts.map(|text| text.as_bytes().to_vec()).to_vec());
        let escaped = prop::sample::select(vec![LONG, OLD]).prop_flat_map(|key| {
            let forms = vec![in_json as fn(u8) -> String, in_json_in_json, in_yaml, as_written];
            prop::sample::subsequence(forms, 1..4).prop_map(move |forms| written(key, &forms).into_bytes())
        });
        let wide = prop::sample::select(vec![KeyEncoding::Utf16Le, KeyEncoding::Utf16Be])
            .prop_map(|encoding| encoding.write(LONG.as_bytes()));
        prop_oneof![4 => plain, 2 => escaped, 1 => wide, 1 => "[0-9a-f\\\\ux]{0,3}".prop_map(String::into_bytes)]
    }

    proptest! {
        #[test]
        fn pieces_are_redacted_like_the_whole_text(
            parts in prop::collection::vec(parts(), 0..12),
            cuts in prop::collection::vec(1_usize..40, 0..60),
        ) {
            let redactor = redactor(&[LONG, TWIN, OLD]);
            let text = parts.concat();
            let mut rest = &text[..];
            let mut redaction = Redaction::default();
            let mut out: Vec<u8> = Vec::new();
            let mut pieces = Vec::new();
            for cut in cuts {
                let (piece, after) = rest.split_at(cut.min(rest.len()));
                pieces.push(piece);
                rest = after;
            }
            pieces.push(rest);
            for piece in pieces {
                match redaction.pass(&redactor, piece) {
                    Passed::Start(length) => out.extend_from_slice(&piece[..length]),
                    Passed::Instead(bytes) => out.extend_from_slice(&bytes),
                }
            }
            out.extend_from_slice(&redaction.finish());
            let whole = redactor.redacted(&text).unwrap_or(text);
            prop_assert_eq!(String::from_utf8_lossy(&out), String::from_utf8_lossy(&whole));
        }
    }
}

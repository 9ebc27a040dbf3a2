//! Finds keys in what the provider sends and puts their short forms there. Separate from the types,
//! because it works on bytes that stream by: a key may lie in two pieces, and no piece may wait for
//! the next.

use super::ApiKey;

/// Shorter keys are not looked for: they stand in texts by chance, and hide nothing.
const KEY_BYTES_MIN: usize = 16;

/// So much of a key every short form shows, so it may pass before it is known what follows.
const SHOWN_BYTES: usize = 4;

/// As many slots as pairs of bytes are told apart by. More would not fit the processor's cache.
const SLOTS: usize = 4096;

/// A search for all keys of a pool at once.
///
/// It looks at pairs of bytes and skips ahead by how far the pair is from the end of any key's
/// start (the method of Wu and Manber), so that most bytes are never looked at.
#[derive(Debug)]
pub struct Redactor {
    keys: Vec<ApiKey>,
    /// Where they are in the order of their texts.
    sorted: Vec<usize>,
    /// The length of the shortest key: only so much of each is searched for, the rest is compared.
    window: usize,
    /// How far the window may move on when it ends in a pair.
    skips: Vec<usize>,
    /// Whether a key begins with a byte.
    begins: [bool; 256],
}

impl Redactor {
    /// A search for `keys`.
    pub fn new<'a>(keys: impl Iterator<Item = &'a ApiKey>) -> Self {
        let mut keys: Vec<ApiKey> = keys.filter(|key| key.value.len() >= KEY_BYTES_MIN).cloned().collect();
        // Where one key begins like another, the longer one is meant.
        keys.sort_by_key(|key| std::cmp::Reverse(key.value.len()));
        let window = keys.last().map_or(KEY_BYTES_MIN, |key| key.value.len());
        let mut skips = vec![window - 1; SLOTS];
        for key in &keys {
            for (index, pair) in key.value.as_bytes()[..window].windows(2).enumerate() {
                let slot = &mut skips[slot(pair)];
                *slot = (*slot).min(window - 2 - index);
            }
        }
        let mut sorted: Vec<usize> = (0..keys.len()).collect();
        sorted.sort_by_key(|&key| keys.get(key).map(|key| &key.value));
        let mut begins = [false; 256];
        for first in keys.iter().filter_map(|key| key.value.bytes().next()) {
            begins[usize::from(first)] = true;
        }
        Self { keys, sorted, window, skips, begins }
    }

    /// `text` with every key replaced by its short form; `None` when there is none in it.
    #[must_use]
    pub fn redacted(&self, text: &[u8]) -> Option<Vec<u8>> {
        self.replaced(text).map(|(redacted, _)| redacted)
    }

    /// The same, with where the last short form ends in it.
    fn replaced(&self, text: &[u8]) -> Option<(Vec<u8>, usize)> {
        let mut redacted = Vec::new();
        let mut from = 0;
        while let Some((at, key)) = self.find(text, from) {
            redacted.extend_from_slice(&text[from..at]);
            redacted.extend_from_slice(key.short.as_str().as_bytes());
            from = at + key.value.len();
        }
        (from > 0).then(|| {
            let end = redacted.len();
            redacted.extend_from_slice(&text[from..]);
            (redacted, end)
        })
    }

    /// Puts the short form of every key in its place, drawn out to its length: for texts whose length was
    /// told before. Returns how many bytes at the end may be the begin of another key: they are looked at
    /// again with what follows them.
    pub fn cover(&self, text: &mut [u8]) -> usize {
        let mut from = 0;
        while let Some((at, key)) = self.find(text, from) {
            let length = key.value.len();
            let short = key.short.as_str();
            let (start, end) = short.split_once("...").unwrap_or((short, ""));
            if let Some(place) = text.get_mut(at..at + length) {
                place.fill(b'.');
                for (byte, shown) in place.iter_mut().zip(start.bytes()) {
                    *byte = shown;
                }
                for (byte, shown) in place.iter_mut().rev().zip(end.bytes().rev()) {
                    *byte = shown;
                }
            }
            from = at + length;
        }
        self.open_end(text).len()
    }

    /// Covers the begin of a key, of which nothing more follows or follows elsewhere, beyond what its short
    /// form shows.
    pub fn cover_end(&self, end: &mut [u8]) {
        let shown = |place: usize| self.keys.get(place).and_then(|key| key.short.as_str().find("..."));
        let shown = self.beginning(end).filter_map(shown).min();
        if let Some(hidden) = shown.and_then(|shown| end.get_mut(shown..)) {
            hidden.fill(b'.');
        }
    }

    /// The first key at or after `from`.
    fn find(&self, text: &[u8], from: usize) -> Option<(usize, &ApiKey)> {
        if self.keys.is_empty() {
            return None;
        }
        let mut start = from;
        while let Some(window) = text.get(start..start + self.window) {
            let skip = self.skips[slot(&window[self.window - 2..])];
            if skip > 0 {
                start += skip;
                continue;
            }
            if let Some(key) = self.begun(&text[start..]) {
                return Some((start, key));
            }
            start += 1;
        }
        None
    }

    /// The longest key with which `text` begins.
    fn begun(&self, text: &[u8]) -> Option<&ApiKey> {
        let window = text.get(..self.window)?;
        if !self.begins[usize::from(window[0])] {
            return None;
        }
        let begun = self.beginning(window).filter(|&place| text.starts_with(self.text(place)));
        // The longest come first.
        begun.min().and_then(|place| self.keys.get(place))
    }

    /// The longest end of `text` with which a key may begin.
    fn open_end<'a>(&self, text: &'a [u8]) -> &'a [u8] {
        let longest = self.keys.first().map_or(0, |key| key.value.len() - 1);
        let mut end = &text[text.len().saturating_sub(longest)..];
        // Most bytes begin no key, whatever follows.
        while let Some(at) = end.iter().position(|byte| self.begins[usize::from(*byte)]) {
            end = &end[at..];
            if self.beginning(end).next().is_some() {
                return end;
            }
            end = &end[1..];
        }
        &[]
    }
}

impl Redactor {
    /// The places of the keys that begin with this. They stand together, behind all that are less.
    fn beginning(&self, begin: &[u8]) -> impl Iterator<Item = usize> {
        let first = self.sorted.partition_point(|&place| self.text(place) < begin);
        let rest = self.sorted[first..].iter().copied();
        rest.take_while(move |&place| self.text(place).starts_with(begin))
    }

    fn text(&self, place: usize) -> &[u8] {
        self.keys.get(place).map_or(&[], |key| key.value.as_bytes())
    }
}

/// The slot of two bytes.
fn slot(pair: &[u8]) -> usize {
    pair.iter().fold(0, |slot: usize, byte| (slot << 6) ^ usize::from(*byte)) % SLOTS
}

/// The search through a text that comes in pieces. What goes out is what [`Redactor::redacted`]
/// makes of the whole, and none of it waits: held back is only what is already the beginning of a
/// key, beyond the few characters that its short form shows anyway.
#[derive(Debug, Default)]
pub struct Redaction {
    /// The end of what has come, when a key may have begun in it.
    open: Vec<u8>,
    /// How much of that has gone out.
    sent: usize,
}

/// What becomes of a piece.
#[derive(Debug, PartialEq, Eq)]
pub enum Passed {
    /// So many bytes of its start go on as they are; the others are held back.
    Start(usize),
    /// This goes on instead.
    Instead(Vec<u8>),
}

impl Redaction {
    /// Takes the next piece.
    pub fn pass(&mut self, redactor: &Redactor, piece: &[u8]) -> Passed {
        if self.open.is_empty() && redactor.find(piece, 0).is_none() {
            self.hold(redactor.open_end(piece));
            return Passed::Start(piece.len() - (self.open.len() - self.sent));
        }
        let sent = self.sent;
        let mut text = std::mem::take(&mut self.open);
        text.extend_from_slice(piece);
        // No key begins in a short form.
        let (mut out, end) = redactor.replaced(&text).unwrap_or((text, 0));
        self.hold(redactor.open_end(&out[end..]));
        out.truncate(out.len() - (self.open.len() - self.sent));
        out.drain(..sent);
        Passed::Instead(out)
    }

    /// What is held back and was no key after all: the text has ended.
    pub fn finish(&mut self) -> Vec<u8> {
        let sent = std::mem::take(&mut self.sent);
        let mut rest = std::mem::take(&mut self.open);
        rest.drain(..sent);
        rest
    }

    /// Whether nothing is held back.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.open.len() == self.sent
    }

    fn hold(&mut self, open: &[u8]) {
        self.open = open.to_vec();
        self.sent = open.len().min(SHOWN_BYTES);
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

    /// Passes `pieces` through and returns what came out, piece by piece and at the end.
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
    fn a_key_becomes_its_short_form_wherever_it_stands() {
        check(LONG, Some("sk_6c036526...d452b"));
        check(&format!("{{\"key\":\"{LONG}\"}}"), Some(r#"{"key":"sk_6c036526...d452b"}"#));
        check(&format!("{TWIN}{LONG} {OLD}0"), Some("sk_6c036526...d452csk_6c036526...d452b 0123...cdef0"));
        check(
            &format!("s{}sk_{LONG}", &LONG[..40]),
            Some(&format!("s{}sk_sk_6c036526...d452b", &LONG[..40])),
        );
    }

    #[test]
    fn what_is_not_quite_a_key_stays() {
        check(&LONG[1..], None);
        check(&LONG[..LONG.len() - 1], None);
        check(&LONG.replace("cccc", "cccd"), None);
        check("", None);
        assert_eq!(redactor(&[]).redacted(LONG.as_bytes()), None);
    }

    #[test]
    fn a_text_whose_length_was_told_keeps_it() {
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
    fn a_tiny_key_is_a_word_like_any_other() {
        assert_eq!(redactor(&["0123456789abcde"]).redacted(b"0123456789abcde"), None);
        assert_eq!(
            redactor(&["0123456789abcdef"]).redacted(b"0123456789abcdef"),
            Some(b"0123...cdef".to_vec())
        );
    }

    #[test]
    fn a_key_that_begins_like_a_shorter_one_is_replaced_whole() {
        let longer = format!("{OLD}{OLD}");
        let text = redactor(&[OLD, &longer]).redacted(longer.as_bytes()).unwrap();
        assert_eq!(text, b"0123456789a...bcdef");
    }

    #[test]
    fn a_piece_waits_for_nothing_but_the_rest_of_a_key() {
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
        fn the_longest_key_is_found_first_whatever_else_there_is(
            keys in prop::collection::vec("[ab]{16,19}|sk_[0-9a-f]{20}", 1..30),
            parts in prop::collection::vec("[ab]{0,20}|sk_[0-9a-f]{0,3}|[0-9a-f]{1,4}", 0..12),
            places in prop::collection::vec(0_usize..30, 0..12),
        ) {
            let texts: Vec<&str> = keys.iter().map(String::as_str).collect();
            let text: String = parts
                .iter()
                .enumerate()
                .map(|(at, part)| part.clone() + places.get(at).map_or("", |place| texts[place % texts.len()]))
                .collect();
            // As it would be looked for by hand.
            let at_each = (0..text.len()).find_map(|at| {
                let begun = texts.iter().filter(|key| text[at..].starts_with(**key));
                begun.max_by_key(|key| key.len()).map(|key| (at, (*key).to_owned()))
            });
            let redactor = redactor(&texts);
            let found = redactor.find(text.as_bytes(), 0).map(|(at, key)| (at, key.value.to_string()));
            prop_assert_eq!(found, at_each);
        }
    }

    proptest! {
        #[test]
        fn pieces_become_what_the_whole_becomes(
            parts in prop::collection::vec("[0-9a-f]{0,3}|sk_|0123456789abcdef0123456789abcdef\
                |sk_6c036526aaaabbbbccccddddeeeeffff0000111122223333d452b|sk_6c0365|0123456789", 0..12),
            cuts in prop::collection::vec(1_usize..40, 0..40),
        ) {
            let redactor = redactor(&[LONG, TWIN, OLD]);
            let text = parts.concat();
            let mut rest = text.as_bytes();
            let mut pieces = Vec::new();
            for cut in cuts {
                let (piece, after) = rest.split_at(cut.min(rest.len()));
                pieces.push(piece);
                rest = after;
            }
            pieces.push(rest);
            let whole = redactor.redacted(text.as_bytes()).unwrap_or_else(|| text.clone().into_bytes());
            prop_assert_eq!(passed(&redactor, &pieces).concat().into_bytes(), whole);
        }
    }
}

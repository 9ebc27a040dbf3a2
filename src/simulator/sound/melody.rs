//! Converts text to a melody: each word is a note, and the white space between two words is a pause. The same text
//! always has the same melody, so that a test can compare two responses by their hash.

/// The length of a character, close to the speed of speech.
const CHARACTER_MS: u64 = 60;
/// The minimum length of a melody, so that a single letter is audible.
const MIN_DURATION_MS: u64 = 300;
/// The frequencies of the notes: the C major scale from C4 without the notes that form semitones. All sequences of
/// these notes are consonant.
const SCALE_HZ: [f64; 8] = [261.63, 293.66, 329.63, 392.00, 440.00, 523.25, 587.33, 659.26];

/// A tone of one pitch, or a pause.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Note {
    pub(super) start_ms: u64,
    pub(super) end_ms: u64,
    /// The frequency, or `None` for a pause.
    pub(super) hz: Option<f64>,
}

/// The melody of a text.
#[derive(Clone, Debug)]
pub(in crate::simulator) struct Melody {
    notes: Vec<Note>,
    pub(super) duration_ms: u64,
    characters: u64,
}

impl Melody {
    /// Creates the melody of `text`: 60 ms per character, and at least 300 ms.
    pub(in crate::simulator) fn new(text: &str) -> Self {
        let characters = u64::try_from(text.chars().count()).unwrap_or(u64::MAX);
        Self::with_duration(text, characters.saturating_mul(CHARACTER_MS).max(MIN_DURATION_MS))
    }

    /// Creates the melody of `text` with the length `duration_ms`.
    pub(in crate::simulator) fn with_duration(text: &str, duration_ms: u64) -> Self {
        let characters = u64::try_from(text.chars().count()).unwrap_or(u64::MAX).max(1);
        let mut melody = Self { notes: Vec::new(), duration_ms, characters };
        let mut index = 0;
        for (word, length) in split_words(text) {
            let (start_ms, end_ms) = (melody.start_ms(index), melody.start_ms(index + length));
            melody.notes.push(Note { start_ms, end_ms, hz: word.map(pitch_of) });
            index += length;
        }
        if melody.notes.is_empty() {
            melody.notes.push(Note { start_ms: 0, end_ms: duration_ms, hz: None });
        }
        melody
    }

    /// Returns the start of the character at `index`, or the end of the melody for the index after the last
    /// character.
    pub(in crate::simulator) fn start_ms(&self, index: u64) -> u64 {
        // The multiplication saturates only beyond the maximum length of a text.
        self.duration_ms.saturating_mul(index) / self.characters
    }
}

/// Splits a text into words and gaps, each with its number of characters. A gap has no word.
fn split_words(text: &str) -> impl Iterator<Item = (Option<&str>, u64)> {
    let mut remaining = text;
    std::iter::from_fn(move || {
        let is_gap = remaining.chars().next()?.is_whitespace();
        let end =
            remaining.find(|character: char| character.is_whitespace() != is_gap).unwrap_or(remaining.len());
        let (part, after) = remaining.split_at(end);
        remaining = after;
        let length = u64::try_from(part.chars().count()).unwrap_or(u64::MAX);
        Some(((!is_gap).then_some(part), length))
    })
}

/// Selects the frequency of a word by its hash.
fn pitch_of(word: &str) -> f64 {
    // The hash is FNV-1a. Only its high bits are used, because its low bits depend only on the low bits of the letters.
    let mix_byte = |hash: u32, byte: u8| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193);
    let [high, ..] = word.bytes().fold(0x811c_9dc5, mix_byte).to_be_bytes();
    SCALE_HZ[usize::from(high) % SCALE_HZ.len()]
}

/// Finds the notes at increasing times in one pass.
#[derive(Debug)]
pub(super) struct NoteCursor {
    melody: Melody,
    index: usize,
}

impl NoteCursor {
    pub(super) fn new(melody: Melody) -> Self {
        Self { melody, index: 0 }
    }

    /// Returns the note at `ms`. Returns `None` after the end. Times must not decrease between calls.
    pub(super) fn note_at(&mut self, ms: u64) -> Option<Note> {
        while self.melody.notes.get(self.index)?.end_ms <= ms {
            self.index += 1;
        }
        self.melody.notes.get(self.index).copied()
    }
}

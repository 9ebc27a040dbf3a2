//! Turns a text into a tune: each word is a note, each space a short pause. The same text always
//! gives the same tune, so that two responses can be compared by ear and by hash.

/// The length of a character, about the pace of speech.
const CHARACTER_MS: u64 = 60;
/// The minimum length, so that a single letter is audible.
const SHORTEST_MS: u64 = 300;
/// C major without its half steps, from C4 on: any sequence of these notes sounds consonant.
const SCALE_HZ: [f64; 8] = [261.63, 293.66, 329.63, 392.00, 440.00, 523.25, 587.33, 659.26];

/// A run of one pitch, or of silence.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Note {
    pub(super) start_ms: u64,
    pub(super) end_ms: u64,
    /// `None` is a pause.
    pub(super) hz: Option<f64>,
}

/// The tune of a text.
#[derive(Clone, Debug)]
pub(in crate::simulator) struct Melody {
    notes: Vec<Note>,
    duration_ms: u64,
    characters: u64,
}

impl Melody {
    /// The tune of `text`, about 60 ms for each character and never shorter than 300 ms.
    pub(in crate::simulator) fn of(text: &str) -> Self {
        let characters = u64::try_from(text.chars().count()).unwrap_or(u64::MAX);
        Self::lasting(text, characters.saturating_mul(CHARACTER_MS).max(SHORTEST_MS))
    }

    /// The tune of `text`, stretched or squeezed to `duration_ms`.
    pub(in crate::simulator) fn lasting(text: &str, duration_ms: u64) -> Self {
        let characters = u64::try_from(text.chars().count()).unwrap_or(u64::MAX).max(1);
        let mut melody = Self { notes: Vec::new(), duration_ms, characters };
        let mut index = 0;
        for run in runs(text) {
            let (word, length) = run;
            let (start_ms, end_ms) = (melody.starts_ms(index), melody.starts_ms(index + length));
            melody.notes.push(Note { start_ms, end_ms, hz: word.map(pitch_of) });
            index += length;
        }
        if melody.notes.is_empty() {
            melody.notes.push(Note { start_ms: 0, end_ms: duration_ms, hz: None });
        }
        melody
    }

    /// How long it lasts.
    pub(in crate::simulator) fn duration_ms(&self) -> u64 {
        self.duration_ms
    }

    /// When the character at `index` begins; at the index past the last, when the tune ends.
    pub(in crate::simulator) fn starts_ms(&self, index: u64) -> u64 {
        // Both factors are bounded by the longest text the provider takes, far from overflow.
        self.duration_ms.saturating_mul(index) / self.characters
    }

    pub(super) fn notes(&self) -> &[Note] {
        &self.notes
    }
}

/// Words and the gaps between them, each with its length in characters; a gap has no word.
fn runs(text: &str) -> impl Iterator<Item = (Option<&str>, u64)> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let is_gap = rest.chars().next()?.is_whitespace();
        let end = rest.find(|c: char| c.is_whitespace() != is_gap).unwrap_or(rest.len());
        let (run, after) = rest.split_at(end);
        rest = after;
        let length = u64::try_from(run.chars().count()).unwrap_or(u64::MAX);
        Some(((!is_gap).then_some(run), length))
    })
}

fn pitch_of(word: &str) -> f64 {
    // FNV-1a; its high bits, because its low ones only see the low bits of the letters.
    let mix = |hash: u32, byte: u8| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193);
    let hash = word.bytes().fold(0x811c_9dc5, mix);
    usize::try_from(hash >> 24)
        .ok()
        .and_then(|high| SCALE_HZ.get(high % SCALE_HZ.len()))
        .map_or(440.0, |hz| *hz)
}

/// Iterates over a tune without searching it again for every time.
#[derive(Debug)]
pub(super) struct Cursor {
    melody: Melody,
    index: usize,
}

impl Cursor {
    pub(super) fn new(melody: Melody) -> Self {
        Self { melody, index: 0 }
    }

    /// The note at `ms`. Times must not decrease; past the end it is `None`.
    pub(super) fn note_at(&mut self, ms: u64) -> Option<Note> {
        while self.melody.notes().get(self.index)?.end_ms <= ms {
            self.index += 1;
        }
        self.melody.notes().get(self.index).copied()
    }
}

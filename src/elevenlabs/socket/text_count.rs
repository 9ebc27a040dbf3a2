//! Counts the charged content of a client's message while it is streamed: the characters of its texts, or
//! the bytes of its audio. A message may be of any length, in any pieces; only the current member name is
//! stored.
//!
//! Members are counted as the provider's JSON parser reads them: of two with the same name the last
//! counts, and a value of another type counts nothing. A more lenient parser may accept a message that is
//! not valid JSON, so all bytes of such a message are counted: an upper bound of its text.

use super::Dialect;

/// The countable content of a message.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SpokenText {
    /// Characters of text that will be spoken.
    pub characters: u64,
    /// Bytes of audio that will be transcribed.
    pub audio_bytes: u64,
}

/// The result for a complete message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MessageCount {
    /// Its countable content.
    pub content: SpokenText,
    /// Whether it is a single JSON object.
    pub is_object: bool,
}

/// A streaming counter for one message.
#[derive(Clone, Debug, Default)]
pub struct ContentCounter {
    state: State,
    /// The enclosing objects and lists: bit 0 is the innermost one; 1 means an object, 0 a list.
    nesting: u128,
    depth: u32,
    /// All bytes of the message.
    bytes: u64,
    /// The current member of the outermost object.
    member: CountedMember,
    /// Whether the current member of a line is its text.
    is_line_text: bool,
    name: NamePrefix,
    text: TextState,
    /// Characters to be spoken, in the member `text` and in the lines of `inputs`.
    spoken: u64,
    lines: u64,
    line: u64,
    /// Characters of base64.
    audio: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    /// Before the outermost object.
    #[default]
    Start,
    /// Before a value; `true` where a list may end instead.
    Value(bool),
    /// Before a name; `true` where an object may end instead.
    BeforeName(bool),
    Colon,
    /// After a value.
    AfterValue,
    /// In a number or a word.
    Scalar,
    /// In a string.
    Text(Escape),
    /// After the outermost object.
    Complete,
    /// The message is not JSON.
    Invalid,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Escape {
    None,
    Backslash,
    /// `\u` with the number of its digits so far, and their value.
    Unit(u8, u16),
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum CountedMember {
    #[default]
    Other,
    Text,
    Inputs,
    Audio,
}

/// The current string.
#[derive(Clone, Copy, Debug, Default)]
struct TextState {
    role: Role,
    characters: u64,
    /// Whether it has a character that is not white space.
    has_visible: bool,
    /// Padding characters of base64.
    padding: u64,
    /// Whether the last character was the first half of a surrogate pair.
    is_half: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Role {
    Name,
    Counted,
    #[default]
    Skipped,
}

/// The start of the current member's name, long enough to compare it with the relevant names.
#[derive(Clone, Copy, Debug, Default)]
struct NamePrefix {
    bytes: [u8; NAME_BYTES_MAX],
    length: usize,
}

/// The length of the longest relevant name, plus one.
const NAME_BYTES_MAX: usize = "audio_base_64".len() + 1;
/// Maximum nesting depth, which is also that of the provider's parser.
const DEPTH_MAX: u32 = 127;

impl ContentCounter {
    /// Counts the next piece.
    pub fn pass(&mut self, piece: &[u8]) {
        self.bytes += piece.len() as u64;
        let mut rest = piece;
        while let Some(&byte) = rest.first() {
            let used = match self.state {
                State::Invalid => return,
                State::Text(Escape::None) => self.string_run(rest),
                State::Text(escape) => {
                    self.state = self.byte_of_escape(escape, byte);
                    1
                }
                State::Start
                | State::Value(_)
                | State::BeforeName(_)
                | State::Colon
                | State::AfterValue
                | State::Scalar
                | State::Complete => {
                    self.state = self.byte_outside_string(byte);
                    1
                }
            };
            rest = rest.get(used..).unwrap_or_default();
        }
    }

    /// Ends the message, and returns its content on a WebSocket of this protocol.
    #[must_use]
    pub fn finish(&mut self, dialect: Dialect) -> MessageCount {
        let whole = std::mem::take(self);
        let is_object = whole.state == State::Complete;
        let (characters, audio) =
            if is_object { (whole.spoken + whole.lines, whole.audio) } else { (whole.bytes, whole.bytes) };
        let content = if dialect.is_spoken() {
            SpokenText { characters, audio_bytes: 0 }
        } else if dialect == Dialect::Transcription {
            SpokenText { characters: 0, audio_bytes: decoded_length(audio) }
        } else {
            SpokenText::default()
        };
        MessageCount { content, is_object }
    }

    /// Bytes of audio so far, in a message that is not complete.
    #[must_use]
    pub fn audio_so_far(&self) -> u64 {
        let audio = if self.state == State::Invalid { self.bytes } else { self.audio + self.open_audio() };
        decoded_length(audio)
    }

    fn open_audio(&self) -> u64 {
        let is_audio = self.member == CountedMember::Audio && self.text.role == Role::Counted;
        if is_audio { self.text.characters - self.text.padding } else { 0 }
    }

    /// Processes a byte outside of strings.
    fn byte_outside_string(&mut self, byte: u8) -> State {
        let is_blank = matches!(byte, b' ' | b'\t' | b'\r' | b'\n');
        match (self.state, byte) {
            (State::Scalar, _) if is_blank => State::AfterValue,
            (state, _) if is_blank => state,
            (State::Start | State::Value(_), b'{') => self.open_container(true),
            (State::Value(_), b'[') => self.open_container(false),
            (State::Value(_), b'"') => {
                self.begin_string(if self.is_counted() { Role::Counted } else { Role::Skipped })
            }
            (State::BeforeName(_), b'"') => self.begin_string(Role::Name),
            (State::Colon, b':') => State::Value(false),
            (State::Value(true), b']') | (State::BeforeName(true), b'}') => self.close_container(),
            (State::AfterValue | State::Scalar, b',') if self.is_in_object() => State::BeforeName(false),
            (State::AfterValue | State::Scalar, b',') => State::Value(false),
            (State::AfterValue | State::Scalar, b'}') if self.is_in_object() => self.close_container(),
            (State::AfterValue | State::Scalar, b']') if !self.is_in_object() => self.close_container(),
            // Some parsers accept `NaN` and `Infinity`.
            (
                State::Value(_) | State::Scalar,
                b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' | b'+' | b'-' | b'.',
            ) => State::Scalar,
            _ => State::Invalid,
        }
    }

    fn is_in_object(&self) -> bool {
        self.nesting & 1 == 1
    }

    /// Whether the position is in a line of `inputs`: an object in the list of that name.
    fn is_in_line(&self) -> bool {
        self.depth == 3 && self.member == CountedMember::Inputs && self.nesting & 0b11 == 0b01
    }

    fn is_counted(&self) -> bool {
        match self.member {
            CountedMember::Text | CountedMember::Audio => self.depth == 1,
            CountedMember::Inputs => self.is_in_line() && self.is_line_text,
            CountedMember::Other => false,
        }
    }

    fn open_container(&mut self, is_object: bool) -> State {
        if self.depth == DEPTH_MAX {
            return State::Invalid;
        }
        self.depth += 1;
        self.nesting = self.nesting << 1 | u128::from(is_object);
        if is_object { State::BeforeName(true) } else { State::Value(true) }
    }

    fn close_container(&mut self) -> State {
        if self.is_in_line() {
            self.lines += std::mem::take(&mut self.line);
            self.is_line_text = false;
        }
        self.depth -= 1;
        self.nesting >>= 1;
        if self.depth == 0 { State::Complete } else { State::AfterValue }
    }

    fn begin_string(&mut self, role: Role) -> State {
        self.text = TextState { role, ..TextState::default() };
        self.name = NamePrefix::default();
        State::Text(Escape::None)
    }

    /// Processes a run of a string without an escape, and its end; returns the number of bytes.
    fn string_run(&mut self, rest: &[u8]) -> usize {
        let length = memchr::memchr2(b'"', b'\\', rest).unwrap_or(rest.len());
        let string_run = rest.get(..length).unwrap_or_default();
        match self.text.role {
            Role::Name => string_run.iter().for_each(|byte| self.name.push(*byte)),
            Role::Counted if !string_run.is_empty() => {
                // All bytes but those that continue a UTF-8 character.
                let characters = string_run.iter().filter(|byte| **byte & 0xc0 != 0x80).count() as u64;
                let text = &mut self.text;
                text.characters += characters;
                text.has_visible =
                    text.has_visible || string_run.iter().any(|byte| !byte.is_ascii_whitespace());
                text.is_half = false;
                if self.member == CountedMember::Audio {
                    text.padding += string_run.iter().filter(|byte| **byte == b'=').count() as u64;
                }
            }
            Role::Counted | Role::Skipped => {}
        }
        match rest.get(length) {
            None => return length,
            Some(b'\\') => self.state = State::Text(Escape::Backslash),
            Some(_) => self.state = self.end_string(),
        }
        length + 1
    }

    /// Processes a byte of an escape.
    fn byte_of_escape(&mut self, escape: Escape, byte: u8) -> State {
        let utf16_unit = match (escape, byte) {
            (Escape::Unit(digits, value), _) => {
                let Some(digit) = char::from(byte).to_digit(16) else { return State::Invalid };
                let value = value << 4 | digit as u16;
                if digits < 3 {
                    return State::Text(Escape::Unit(digits + 1, value));
                }
                value
            }
            (_, b'u') => return State::Text(Escape::Unit(0, 0)),
            (_, b'"' | b'\\' | b'/') => byte.into(),
            (_, b'b') => 8,
            (_, b'f') => 12,
            (_, b'n') => 10,
            (_, b'r') => 13,
            (_, b't') => 9,
            _ => return State::Invalid,
        };
        self.utf16_unit(utf16_unit);
        State::Text(Escape::None)
    }

    /// Processes a character, or half of one, that was written as an escape.
    fn utf16_unit(&mut self, utf16_unit: u16) {
        let ascii = u8::try_from(utf16_unit).ok().filter(u8::is_ascii);
        if self.text.role == Role::Name {
            self.name.push(ascii.unwrap_or(u8::MAX));
        }
        let text = &mut self.text;
        let ends_pair = text.is_half && (0xdc00..0xe000).contains(&utf16_unit);
        text.is_half = (0xd800..0xdc00).contains(&utf16_unit);
        text.characters += u64::from(!ends_pair);
        text.has_visible = text.has_visible || !ascii.is_some_and(|byte| byte.is_ascii_whitespace());
        text.padding += u64::from(utf16_unit == u16::from(b'='));
    }

    /// Processes the end of a string.
    fn end_string(&mut self) -> State {
        // A blank text opens a context and is not spoken.
        let spoken = if self.text.has_visible { self.text.characters } else { 0 };
        match (self.text.role, self.member) {
            (Role::Name, _) => {
                self.begin_member();
                return State::Colon;
            }
            (Role::Counted, CountedMember::Text) => self.spoken = spoken,
            (Role::Counted, CountedMember::Inputs) => self.line = spoken,
            (Role::Counted, CountedMember::Audio) => self.audio = self.text.characters - self.text.padding,
            (Role::Counted, CountedMember::Other) | (Role::Skipped, _) => {}
        }
        self.text.role = Role::Skipped;
        State::AfterValue
    }

    /// Begins a member; resets the count of an earlier one with the same name.
    fn begin_member(&mut self) {
        let name = self.name.bytes.get(..self.name.length).unwrap_or_default();
        if self.depth == 1 {
            self.member = match name {
                b"text" => CountedMember::Text,
                b"inputs" => CountedMember::Inputs,
                b"audio_base_64" => CountedMember::Audio,
                _ => CountedMember::Other,
            };
            match self.member {
                CountedMember::Text => self.spoken = 0,
                CountedMember::Inputs => self.lines = 0,
                CountedMember::Audio => self.audio = 0,
                CountedMember::Other => {}
            }
        } else if self.is_in_line() {
            self.is_line_text = name == b"text";
            if self.is_line_text {
                self.line = 0;
            }
        }
        self.text.role = Role::Skipped;
    }
}

/// Number of bytes that this many base64 characters decode to.
fn decoded_length(characters: u64) -> u64 {
    characters / 4 * 3 + characters % 4 * 3 / 4
}

impl NamePrefix {
    /// Appends a byte; a name that is too long stays at the maximum length.
    fn push(&mut self, byte: u8) {
        if let Some(slot) = self.bytes.get_mut(self.length) {
            *slot = byte;
            self.length += 1;
        }
    }
}

#[cfg(test)]
mod tests;

//! Counts the charged content of a client's message while it is forwarded: the characters of its text, or the
//! bytes of its audio. A message may have any length and arrive in any chunks; only the name of the current
//! member is stored.
//!
//! Members are counted as the provider's JSON parser reads them: of two members with the same name, the last
//! one counts, and a value of another type counts as 0. A more lenient parser may accept a message that is
//! not valid JSON, so all bytes of such a message are counted, as an upper bound of its text.

use super::Dialect;

/// The content of a message that the provider charges for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChargedContent {
    /// Characters of text that will be spoken.
    pub characters: u64,
    /// Bytes of audio that will be transcribed.
    pub audio_bytes: u64,
}

/// The result for a complete message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MessageCount {
    /// The charged content of the message.
    pub content: ChargedContent,
    /// Whether the message is a single JSON object.
    pub is_object: bool,
}

/// A streaming counter for one message.
#[derive(Clone, Debug, Default)]
pub struct ContentCounter {
    phase: State,
    /// The enclosing objects and lists: bit 0 is the innermost one; 1 means an object, 0 a list.
    nesting: u128,
    /// Number of enclosing objects and lists.
    depth: u32,
    /// All bytes of the message.
    bytes: u64,
    /// The current member of the outermost object.
    member: CountedMember,
    /// Whether the current member of a dialogue line is its text.
    is_line_text: bool,
    name: NamePrefix,
    string: StringState,
    /// Characters to be spoken in the member `text`.
    text_characters: u64,
    /// Characters to be spoken in the complete lines of `inputs`.
    input_characters: u64,
    /// Characters to be spoken in the current line of `inputs`.
    line_characters: u64,
    /// Characters of base64 in the member `audio_base_64`.
    base64_characters: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Container {
    Object,
    List,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    /// The parser is before the outermost object.
    #[default]
    Start,
    /// The parser is before a value.
    Value,
    /// The parser is at the start of a list, before a value or the end of the list.
    FirstValue,
    /// The parser is before a name.
    BeforeName,
    /// The parser is at the start of an object, before a name or the end of the object.
    BeforeFirstName,
    Colon,
    AfterValue,
    /// The parser is in a number or a literal.
    Scalar,
    String(Escape),
    /// The parser is after the outermost object.
    Complete,
    /// The message is not JSON.
    Invalid,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Escape {
    None,
    Backslash,
    /// The parser is after `\u`. Contains the number of digits so far, and their value.
    Unicode(u8, u16),
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum CountedMember {
    #[default]
    Other,
    Text,
    Inputs,
    Audio,
}

/// The progress in the current string.
#[derive(Clone, Copy, Debug, Default)]
struct StringState {
    role: StringRole,
    characters: u64,
    /// Whether the string contains a character that is not white space.
    has_visible: bool,
    /// Padding characters of base64.
    padding: u64,
    /// Whether the last character was the first half of a surrogate pair.
    is_half_pair: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum StringRole {
    Name,
    Counted,
    #[default]
    Skipped,
}

/// The start of the current member's name, long enough to compare it with the counted names.
#[derive(Clone, Copy, Debug, Default)]
struct NamePrefix {
    bytes: [u8; MAX_NAME_BYTES],
    length: usize,
}

/// The length of the longest counted name, plus one.
const MAX_NAME_BYTES: usize = "audio_base_64".len() + 1;
/// Maximum nesting depth. The provider's parser has the same maximum.
const MAX_DEPTH: u32 = 127;

impl ContentCounter {
    /// Counts the next chunk.
    pub fn process(&mut self, chunk: &[u8]) {
        self.bytes += chunk.len() as u64;
        let mut remaining = chunk;
        while let Some(&byte) = remaining.first() {
            let processed_bytes = match self.phase {
                State::Invalid => return,
                State::String(Escape::None) => self.process_string(remaining),
                State::String(escape) => {
                    self.phase = self.process_escape(escape, byte);
                    1
                }
                State::Start
                | State::Value
                | State::FirstValue
                | State::BeforeName
                | State::BeforeFirstName
                | State::Colon
                | State::AfterValue
                | State::Scalar
                | State::Complete => {
                    self.phase = self.process_structure(byte);
                    1
                }
            };
            remaining = remaining.get(processed_bytes..).unwrap_or_default();
        }
    }

    /// Ends the message, and returns its charged content in the protocol `dialect`.
    #[must_use]
    pub fn finish(&mut self, dialect: Dialect) -> MessageCount {
        let counter = std::mem::take(self);
        let is_object = counter.phase == State::Complete;
        let (characters, base64_characters) = if is_object {
            (counter.text_characters + counter.input_characters, counter.base64_characters)
        } else {
            (counter.bytes, counter.bytes)
        };
        let content = if dialect.generates_speech() {
            ChargedContent { characters, audio_bytes: 0 }
        } else if dialect == Dialect::Transcription {
            ChargedContent { characters: 0, audio_bytes: decoded_length(base64_characters) }
        } else {
            ChargedContent::default()
        };
        MessageCount { content, is_object }
    }

    /// Returns the bytes of audio in the message so far, which need not be complete.
    #[must_use]
    pub fn audio_bytes_so_far(&self) -> u64 {
        let is_in_audio = self.member == CountedMember::Audio && self.string.role == StringRole::Counted;
        let in_current_string = if is_in_audio { self.string.base64_characters() } else { 0 };
        let is_invalid = self.phase == State::Invalid;
        decoded_length(if is_invalid { self.bytes } else { self.base64_characters + in_current_string })
    }

    /// Processes a byte outside strings.
    fn process_structure(&mut self, byte: u8) -> State {
        let is_blank = matches!(byte, b' ' | b'\t' | b'\r' | b'\n');
        match (self.phase, byte) {
            (State::Scalar, _) if is_blank => State::AfterValue,
            (phase, _) if is_blank => phase,
            (State::Start | State::Value | State::FirstValue, b'{') => {
                self.begin_container(Container::Object)
            }
            (State::Value | State::FirstValue, b'[') => self.begin_container(Container::List),
            (State::Value | State::FirstValue, b'"') => {
                self.begin_string(if self.is_counted() { StringRole::Counted } else { StringRole::Skipped })
            }
            (State::BeforeName | State::BeforeFirstName, b'"') => self.begin_string(StringRole::Name),
            (State::Colon, b':') => State::Value,
            (State::FirstValue, b']') | (State::BeforeFirstName, b'}') => self.end_container(),
            (State::AfterValue | State::Scalar, b',') if self.is_in_object() => State::BeforeName,
            (State::AfterValue | State::Scalar, b',') => State::Value,
            (State::AfterValue | State::Scalar, b'}') if self.is_in_object() => self.end_container(),
            (State::AfterValue | State::Scalar, b']') if !self.is_in_object() => self.end_container(),
            // Some parsers accept `NaN` and `Infinity`.
            (
                State::Value | State::FirstValue | State::Scalar,
                b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' | b'+' | b'-' | b'.',
            ) => State::Scalar,
            _ => State::Invalid,
        }
    }

    fn is_in_object(&self) -> bool {
        self.nesting & 1 == 1
    }

    /// Whether the position is in a dialogue line: an object in the list `inputs`.
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

    fn begin_container(&mut self, container: Container) -> State {
        if self.depth == MAX_DEPTH {
            return State::Invalid;
        }
        self.depth += 1;
        self.nesting = self.nesting << 1 | u128::from(container == Container::Object);
        match container {
            Container::Object => State::BeforeFirstName,
            Container::List => State::FirstValue,
        }
    }

    fn end_container(&mut self) -> State {
        if self.is_in_line() {
            self.input_characters += std::mem::take(&mut self.line_characters);
            self.is_line_text = false;
        }
        self.depth -= 1;
        self.nesting >>= 1;
        if self.depth == 0 { State::Complete } else { State::AfterValue }
    }

    fn begin_string(&mut self, role: StringRole) -> State {
        self.string = StringState { role, ..StringState::default() };
        self.name = NamePrefix::default();
        State::String(Escape::None)
    }

    /// Processes a string up to its next escape or its end, and returns the number of bytes.
    fn process_string(&mut self, rest: &[u8]) -> usize {
        let length = memchr::memchr2(b'"', b'\\', rest).unwrap_or(rest.len());
        let segment = rest.get(..length).unwrap_or_default();
        match self.string.role {
            StringRole::Name => segment.iter().for_each(|byte| self.name.push(*byte)),
            StringRole::Counted if !segment.is_empty() => {
                let string = &mut self.string;
                // All bytes except those that continue a UTF-8 character.
                string.characters += segment.iter().filter(|byte| **byte & 0xc0 != 0x80).count() as u64;
                string.has_visible |= segment.iter().any(|byte| !byte.is_ascii_whitespace());
                string.is_half_pair = false;
                if self.member == CountedMember::Audio {
                    string.padding += segment.iter().filter(|byte| **byte == b'=').count() as u64;
                }
            }
            StringRole::Counted | StringRole::Skipped => {}
        }
        match rest.get(length) {
            None => return length,
            Some(b'\\') => self.phase = State::String(Escape::Backslash),
            Some(_) => self.phase = self.end_string(),
        }
        length + 1
    }

    /// Processes a byte of an escape sequence.
    fn process_escape(&mut self, escape: Escape, byte: u8) -> State {
        let utf16_unit = match (escape, byte) {
            (Escape::Unicode(digits, value), _) => {
                let Some(digit) = char::from(byte).to_digit(16) else { return State::Invalid };
                let value = value << 4 | digit as u16;
                if digits < 3 {
                    return State::String(Escape::Unicode(digits + 1, value));
                }
                value
            }
            (_, b'u') => return State::String(Escape::Unicode(0, 0)),
            (_, b'"' | b'\\' | b'/') => byte.into(),
            (_, b'b') => 8,
            (_, b'f') => 12,
            (_, b'n') => 10,
            (_, b'r') => 13,
            (_, b't') => 9,
            _ => return State::Invalid,
        };
        self.process_utf16_unit(utf16_unit);
        State::String(Escape::None)
    }

    /// Processes a character, or half of a surrogate pair, that was written as an escape sequence.
    fn process_utf16_unit(&mut self, utf16_unit: u16) {
        let ascii = u8::try_from(utf16_unit).ok().filter(u8::is_ascii);
        if self.string.role == StringRole::Name {
            self.name.push(ascii.unwrap_or(u8::MAX));
        }
        let string = &mut self.string;
        let ends_pair = string.is_half_pair && (0xdc00..0xe000).contains(&utf16_unit);
        string.is_half_pair = (0xd800..0xdc00).contains(&utf16_unit);
        string.characters += u64::from(!ends_pair);
        string.has_visible |= !ascii.is_some_and(|byte| byte.is_ascii_whitespace());
        string.padding += u64::from(utf16_unit == u16::from(b'='));
    }

    fn end_string(&mut self) -> State {
        // The provider does not speak blank text, which opens a context.
        let spoken_characters = if self.string.has_visible { self.string.characters } else { 0 };
        match (self.string.role, self.member) {
            (StringRole::Name, _) => {
                self.begin_member();
                return State::Colon;
            }
            (StringRole::Counted, CountedMember::Text) => self.text_characters = spoken_characters,
            (StringRole::Counted, CountedMember::Inputs) => self.line_characters = spoken_characters,
            (StringRole::Counted, CountedMember::Audio) => {
                self.base64_characters = self.string.base64_characters();
            }
            (StringRole::Counted, CountedMember::Other) | (StringRole::Skipped, _) => {}
        }
        self.string.role = StringRole::Skipped;
        State::AfterValue
    }

    /// Begins a member, and resets the count of an earlier member with the same name.
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
                CountedMember::Text => self.text_characters = 0,
                CountedMember::Inputs => self.input_characters = 0,
                CountedMember::Audio => self.base64_characters = 0,
                CountedMember::Other => {}
            }
        } else if self.is_in_line() {
            self.is_line_text = name == b"text";
            if self.is_line_text {
                self.line_characters = 0;
            }
        }
        self.string.role = StringRole::Skipped;
    }
}

impl StringState {
    fn base64_characters(&self) -> u64 {
        self.characters - self.padding
    }
}

/// Returns the number of bytes that base64 characters without padding decode to.
fn decoded_length(base64_characters: u64) -> u64 {
    base64_characters / 4 * 3 + base64_characters % 4 * 3 / 4
}

impl NamePrefix {
    /// Appends a byte. A name that is too long stays at the maximum length.
    fn push(&mut self, byte: u8) {
        if let Some(slot) = self.bytes.get_mut(self.length) {
            *slot = byte;
            self.length += 1;
        }
    }
}

#[cfg(test)]
mod tests;

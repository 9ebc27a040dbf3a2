//! Counts the charged content of a client's message while it is forwarded: the characters of its text, or the bytes of
//! its audio. A message may have any length and may arrive in any chunks, because only the name of its current member
//! is stored.
//!
//! Members are counted in the same way as the provider's JSON parser reads them: of two members with the same name,
//! only the last one counts, and a value of another type counts as 0. A more lenient parser may accept a message that
//! is not valid JSON, so all bytes of such a message are counted. Their number is an upper bound of its content.

use super::Dialect;

/// The content of a message for which the provider charges.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChargedContent {
    /// Characters of text that will be spoken.
    pub characters: u64,
    /// Bytes of audio that will be transcribed.
    pub audio_bytes: u64,
}

/// The counted content of a complete message.
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
    state: ParserState,
    /// The objects and lists that contain the position. Bit 0 is the innermost of them. 1 means an object, and 0 a
    /// list.
    nesting: u128,
    /// The number of objects and lists that contain the position.
    depth: u32,
    /// The number of all received bytes of the message.
    bytes: u64,
    /// The current member of the outermost object.
    member: CountedMember,
    /// Whether the current member of a dialogue line (an object in the list `inputs`) is its text.
    is_line_text: bool,
    name: NamePrefix,
    string: StringProgress,
    /// The number of characters to be spoken in the member `text`.
    text_characters: u64,
    /// The number of characters to be spoken in the complete lines of `inputs`.
    input_characters: u64,
    /// The number of characters to be spoken in the current line of `inputs`.
    line_characters: u64,
    /// The number of characters of base64 in the member `audio_base_64`, without padding.
    base64_characters: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Container {
    Object,
    List,
}

/// The part of the message that the parser expects next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum ParserState {
    /// The start of the outermost object.
    #[default]
    Start,
    Value,
    /// The first value of a list, or the end of the list.
    FirstValue,
    BeforeName,
    /// The first name of an object, or the end of the object.
    BeforeFirstName,
    /// The colon after a name.
    Colon,
    /// A comma, or the end of the object or list.
    AfterValue,
    /// The next byte of a number or a literal, or the comma or bracket after it.
    Scalar,
    String(Escape),
    /// Only white space, because the outermost object is complete.
    Complete,
    /// The message is not JSON.
    Invalid,
}

/// The part of an escape sequence before the current position of a string.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Escape {
    None,
    Backslash,
    /// `\u` and some hexadecimal digits, which represent `utf16_unit`.
    Unicode {
        digits: u8,
        utf16_unit: u16,
    },
}

/// The current member of the outermost object.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum CountedMember {
    #[default]
    Other,
    Text,
    Inputs,
    Audio,
}

/// The counts of the current string.
#[derive(Clone, Copy, Debug, Default)]
struct StringProgress {
    role: StringRole,
    characters: u64,
    /// Whether the string contains a character that is not white space.
    has_visible: bool,
    /// The number of padding characters of base64.
    padding: u64,
    /// Whether the last character was the first half of a surrogate pair.
    is_half_pair: bool,
}

/// The meaning of a string in the message.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum StringRole {
    Name,
    /// A text or audio whose characters are counted.
    Counted,
    /// Any other string.
    #[default]
    Skipped,
}

/// The start of the name of the current member, which is long enough to be compared with the counted names.
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
    /// Counts the content of the next chunk of the message.
    pub fn count_chunk(&mut self, chunk: &[u8]) {
        self.bytes += chunk.len() as u64;
        let mut remaining = chunk;
        while let Some(&byte) = remaining.first() {
            let processed_bytes = match self.state {
                ParserState::Invalid => return,
                ParserState::String(Escape::None) => self.process_string(remaining),
                ParserState::String(escape) => {
                    self.state = self.process_escape(escape, byte);
                    1
                }
                ParserState::Start
                | ParserState::Value
                | ParserState::FirstValue
                | ParserState::BeforeName
                | ParserState::BeforeFirstName
                | ParserState::Colon
                | ParserState::AfterValue
                | ParserState::Scalar
                | ParserState::Complete => {
                    self.state = self.process_structure(byte);
                    1
                }
            };
            remaining = remaining.get(processed_bytes..).unwrap_or_default();
        }
    }

    /// Ends the message, and returns its charged content in the protocol `dialect`. The counter is then ready for the
    /// next message.
    #[must_use]
    pub fn finish(&mut self, dialect: Dialect) -> MessageCount {
        let counter = std::mem::take(self);
        let is_object = counter.state == ParserState::Complete;
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

    /// Returns the number of bytes of audio in the received part of the message.
    #[must_use]
    pub fn audio_bytes_so_far(&self) -> u64 {
        let is_in_audio = self.member == CountedMember::Audio && self.string.role == StringRole::Counted;
        let current_characters = if is_in_audio { self.string.base64_characters() } else { 0 };
        let is_invalid = self.state == ParserState::Invalid;
        decoded_length(if is_invalid { self.bytes } else { self.base64_characters + current_characters })
    }

    /// Processes a byte outside strings. Returns the next state.
    fn process_structure(&mut self, byte: u8) -> ParserState {
        let is_blank = matches!(byte, b' ' | b'\t' | b'\r' | b'\n');
        match (self.state, byte) {
            (ParserState::Scalar, _) if is_blank => ParserState::AfterValue,
            (state, _) if is_blank => state,
            (ParserState::Start | ParserState::Value | ParserState::FirstValue, b'{') => {
                self.begin_container(Container::Object)
            }
            (ParserState::Value | ParserState::FirstValue, b'[') => self.begin_container(Container::List),
            (ParserState::Value | ParserState::FirstValue, b'"') => {
                self.begin_string(if self.is_counted() { StringRole::Counted } else { StringRole::Skipped })
            }
            (ParserState::BeforeName | ParserState::BeforeFirstName, b'"') => {
                self.begin_string(StringRole::Name)
            }
            (ParserState::Colon, b':') => ParserState::Value,
            (ParserState::FirstValue, b']') | (ParserState::BeforeFirstName, b'}') => self.end_container(),
            (ParserState::AfterValue | ParserState::Scalar, b',') if self.is_in_object() => {
                ParserState::BeforeName
            }
            (ParserState::AfterValue | ParserState::Scalar, b',') => ParserState::Value,
            (ParserState::AfterValue | ParserState::Scalar, b'}') if self.is_in_object() => {
                self.end_container()
            }
            (ParserState::AfterValue | ParserState::Scalar, b']') if !self.is_in_object() => {
                self.end_container()
            }
            // Some parsers accept `NaN` and `Infinity`.
            (
                ParserState::Value | ParserState::FirstValue | ParserState::Scalar,
                b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' | b'+' | b'-' | b'.',
            ) => ParserState::Scalar,
            _ => ParserState::Invalid,
        }
    }

    fn is_in_object(&self) -> bool {
        self.nesting & 1 == 1
    }

    /// Whether the position is in a dialogue line: an object in the list `inputs`.
    fn is_in_line(&self) -> bool {
        self.depth == 3 && self.member == CountedMember::Inputs && self.nesting & 0b11 == 0b01
    }

    /// Whether the characters of a string at the position are counted.
    fn is_counted(&self) -> bool {
        match self.member {
            CountedMember::Text | CountedMember::Audio => self.depth == 1,
            CountedMember::Inputs => self.is_in_line() && self.is_line_text,
            CountedMember::Other => false,
        }
    }

    fn begin_container(&mut self, container: Container) -> ParserState {
        if self.depth == MAX_DEPTH {
            return ParserState::Invalid;
        }
        self.depth += 1;
        self.nesting = self.nesting << 1 | u128::from(container == Container::Object);
        match container {
            Container::Object => ParserState::BeforeFirstName,
            Container::List => ParserState::FirstValue,
        }
    }

    fn end_container(&mut self) -> ParserState {
        if self.is_in_line() {
            self.input_characters += std::mem::take(&mut self.line_characters);
            self.is_line_text = false;
        }
        self.depth -= 1;
        self.nesting >>= 1;
        if self.depth == 0 { ParserState::Complete } else { ParserState::AfterValue }
    }

    fn begin_string(&mut self, role: StringRole) -> ParserState {
        self.string = StringProgress { role, ..StringProgress::default() };
        self.name = NamePrefix::default();
        ParserState::String(Escape::None)
    }

    /// Processes a string up to its next escape or its end, and returns the number of processed bytes.
    fn process_string(&mut self, rest: &[u8]) -> usize {
        let length = memchr::memchr2(b'"', b'\\', rest).unwrap_or(rest.len());
        let segment = rest.get(..length).unwrap_or_default();
        match self.string.role {
            StringRole::Name => segment.iter().for_each(|byte| self.name.push(*byte)),
            StringRole::Counted if !segment.is_empty() => {
                let string = &mut self.string;
                // The first byte of each UTF-8 character is counted.
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
            Some(b'\\') => self.state = ParserState::String(Escape::Backslash),
            Some(_) => self.state = self.end_string(),
        }
        length + 1
    }

    /// Processes a byte of an escape sequence. Returns the next state.
    fn process_escape(&mut self, escape: Escape, byte: u8) -> ParserState {
        let utf16_unit = match (escape, byte) {
            (Escape::Unicode { digits, utf16_unit }, _) => {
                let Some(digit) = char::from(byte).to_digit(16) else { return ParserState::Invalid };
                let utf16_unit = utf16_unit << 4 | digit as u16;
                if digits < 3 {
                    return ParserState::String(Escape::Unicode { digits: digits + 1, utf16_unit });
                }
                utf16_unit
            }
            (_, b'u') => return ParserState::String(Escape::Unicode { digits: 0, utf16_unit: 0 }),
            (_, b'"' | b'\\' | b'/') => byte.into(),
            (_, b'b') => 8,
            (_, b'f') => 12,
            (_, b'n') => 10,
            (_, b'r') => 13,
            (_, b't') => 9,
            _ => return ParserState::Invalid,
        };
        self.process_utf16_unit(utf16_unit);
        ParserState::String(Escape::None)
    }

    /// Processes a character, or half of a surrogate pair, that was written as an escape sequence.
    fn process_utf16_unit(&mut self, utf16_unit: u16) {
        let ascii = u8::try_from(utf16_unit).ok().filter(u8::is_ascii);
        if self.string.role == StringRole::Name {
            self.name.push(ascii.unwrap_or(u8::MAX));
        }
        let string = &mut self.string;
        let completes_pair = string.is_half_pair && (0xdc00..0xe000).contains(&utf16_unit);
        string.is_half_pair = (0xd800..0xdc00).contains(&utf16_unit);
        string.characters += u64::from(!completes_pair);
        string.has_visible |= !ascii.is_some_and(|byte| byte.is_ascii_whitespace());
        string.padding += u64::from(utf16_unit == u16::from(b'='));
    }

    /// Ends a string, and records its count for the current member. Returns the next state.
    fn end_string(&mut self) -> ParserState {
        // A client sends blank text to open a context. The provider does not speak it.
        let spoken_characters = if self.string.has_visible { self.string.characters } else { 0 };
        match (self.string.role, self.member) {
            (StringRole::Name, _) => {
                self.begin_member();
                return ParserState::Colon;
            }
            (StringRole::Counted, CountedMember::Text) => self.text_characters = spoken_characters,
            (StringRole::Counted, CountedMember::Inputs) => self.line_characters = spoken_characters,
            (StringRole::Counted, CountedMember::Audio) => {
                self.base64_characters = self.string.base64_characters();
            }
            (StringRole::Counted, CountedMember::Other) | (StringRole::Skipped, _) => {}
        }
        self.string.role = StringRole::Skipped;
        ParserState::AfterValue
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

impl StringProgress {
    fn base64_characters(&self) -> u64 {
        self.characters - self.padding
    }
}

/// Returns the number of bytes in base64 characters without padding.
fn decoded_length(base64_characters: u64) -> u64 {
    base64_characters / 4 * 3 + base64_characters % 4 * 3 / 4
}

impl NamePrefix {
    /// Appends a byte, unless the prefix has the maximum length.
    fn push(&mut self, byte: u8) {
        if let Some(slot) = self.bytes.get_mut(self.length) {
            *slot = byte;
            self.length += 1;
        }
    }
}

#[cfg(test)]
mod tests;

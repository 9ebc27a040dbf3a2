//! Finds the credentials in the messages that a client sends, and replaces them with spaces before a message is
//! forwarded. Also recognizes the provider's single-use tokens, which are forwarded unchanged.
//!
//! The provider accepts a credential as a member of the outermost object, in the first message of a connection and of
//! every context. Keychoir blanks the credential in every message, which means that it writes spaces over the member.
//! The message thus keeps its length, and its frames keep their headers. JSON parsers ignore the spaces. A message is
//! blanked in chunks of any size as it arrives, and is not stored. Its length is thus not limited.

use serde_json::{Map, Value};

/// Member names under which the provider accepts a credential in a message. Source: its Python SDK 2.78
/// (`xi-api-key`), and its published examples (`xi_api_key`).
const CREDENTIAL_NAMES: [&str; 3] = ["xi_api_key", "xi-api-key", "authorization"];

/// Maximum length of an encoded credential name, in which every letter is an escape of six bytes.
const MAX_NAME_BYTES: usize = 13 * 6;
/// Maximum number of bytes of a comma and white space that are held back. Further white space is forwarded before them.
const MAX_HELD_BLANKS: usize = 64;

/// Blanks credentials in a message that arrives in chunks.
#[derive(Debug, Default)]
pub struct CredentialBlanker {
    state: BlankerState,
    /// The bytes that are held back: a comma, white space, and a name that may be the name of a credential.
    held_back: Vec<u8>,
    /// Whether a member of the current object was forwarded.
    has_forwarded_member: bool,
}

/// The part of the message that the blanker expects next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum BlankerState {
    /// The first byte that is not white space.
    #[default]
    Start,
    /// The rest of a message that is not an object, or whose members are not valid JSON. It is forwarded unchanged.
    NotObject,
    /// The name of a member, after `{` or `,`.
    BeforeName,
    /// The next byte of a name. `is_escaped` is `true` after a backslash.
    Name { is_escaped: bool },
    /// The next byte of a member, up to the comma or the brace after the member.
    Member(MemberPosition, MemberAction),
}

/// The position within a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct MemberPosition {
    /// The number of lists and objects in the member that contain the position.
    depth: u32,
    string: StringPosition,
}

/// The position relative to a string.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum StringPosition {
    Outside,
    Inside,
    AfterBackslash,
}

/// Whether a member is forwarded or blanked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum MemberAction {
    Forward,
    Blank,
}

impl CredentialBlanker {
    /// Blanks the credentials in the next chunk, and appends the chunk to `output`. A few bytes may be held back until
    /// the next chunk.
    pub fn blank_chunk(&mut self, chunk: &[u8], output: &mut Vec<u8>) {
        let mut remaining = chunk;
        while !remaining.is_empty() {
            let processed_bytes = self.blank_next(remaining, output);
            remaining = remaining.get(processed_bytes..).unwrap_or_default();
        }
    }

    /// Ends the message and appends the bytes that are held back.
    pub fn finish(&mut self, output: &mut Vec<u8>) {
        output.append(&mut self.held_back);
        *self = Self::default();
    }

    /// Whether the message is known not to be a valid object, so that its rest can be forwarded unchanged.
    #[must_use]
    pub fn is_not_object(&self) -> bool {
        self.state == BlankerState::NotObject
    }

    /// Processes at least one byte of `rest`, and returns the number of processed bytes.
    fn blank_next(&mut self, rest: &[u8], output: &mut Vec<u8>) -> usize {
        let Some(&byte) = rest.first() else { return 0 };
        match self.state {
            BlankerState::NotObject => {
                output.extend_from_slice(rest);
                return rest.len();
            }
            BlankerState::Start => {
                self.state = match byte {
                    b'{' => BlankerState::BeforeName,
                    b' ' | b'\t' | b'\r' | b'\n' => BlankerState::Start,
                    _ => BlankerState::NotObject,
                };
                output.push(byte);
            }
            BlankerState::BeforeName => self.process_byte_before_name(byte, output),
            BlankerState::Name { is_escaped } => self.process_byte_of_name(byte, is_escaped, output),
            BlankerState::Member(position, action) => {
                return self.process_member(rest, position, action, output);
            }
        }
        1
    }

    /// Processes a byte between two members.
    fn process_byte_before_name(&mut self, byte: u8, output: &mut Vec<u8>) {
        match byte {
            b'"' => {
                self.held_back.push(byte);
                self.state = BlankerState::Name { is_escaped: false };
            }
            b' ' | b'\t' | b'\r' | b'\n'
                if self.held_back.len() <= MAX_HELD_BLANKS && !self.held_back.is_empty() =>
            {
                self.held_back.push(byte);
            }
            b' ' | b'\t' | b'\r' | b'\n' => output.push(byte),
            _ => {
                output.append(&mut self.held_back);
                output.push(byte);
                if byte == b'}' {
                    self.end_object();
                } else {
                    // The message is invalid JSON, which the provider refuses.
                    self.state = BlankerState::NotObject;
                }
            }
        }
    }

    /// Holds back a byte of a name. Begins the member at the end of the name, or if the name is too long for a
    /// credential.
    fn process_byte_of_name(&mut self, byte: u8, is_escaped: bool, output: &mut Vec<u8>) {
        self.held_back.push(byte);
        let quote = self.held_back.iter().position(|byte| *byte == b'"').unwrap_or_default();
        let name = self.held_back.get(quote + 1..).unwrap_or_default();
        match byte {
            b'\\' if !is_escaped => self.state = BlankerState::Name { is_escaped: true },
            b'"' if !is_escaped => {
                let is_credential = is_credential_name(name.strip_suffix(b"\"").unwrap_or_default());
                let action = if is_credential { MemberAction::Blank } else { MemberAction::Forward };
                self.begin_member(action, StringPosition::Outside, output);
            }
            // The rest of the name, which may start within an escape sequence, is forwarded like a string of the
            // member.
            _ if name.len() > MAX_NAME_BYTES => {
                self.begin_member(MemberAction::Forward, StringPosition::Inside, output);
            }
            _ => self.state = BlankerState::Name { is_escaped: false },
        }
    }

    /// Appends the bytes that are held back, or spaces, and begins the member after them.
    fn begin_member(&mut self, action: MemberAction, string: StringPosition, output: &mut Vec<u8>) {
        match action {
            MemberAction::Forward => {
                // If all earlier members were blanked, no member precedes the comma, so the comma is blanked as well.
                if !self.has_forwarded_member
                    && let Some(comma) = self.held_back.first_mut().filter(|byte| **byte == b',')
                {
                    *comma = b' ';
                }
                output.append(&mut self.held_back);
                self.has_forwarded_member = true;
            }
            MemberAction::Blank => output.extend(self.held_back.drain(..).map(|_| b' ')),
        }
        self.state = BlankerState::Member(MemberPosition { depth: 0, string }, action);
    }

    /// Forwards or blanks the bytes of a member, up to its end. Returns the number of processed bytes.
    fn process_member(
        &mut self,
        rest: &[u8],
        mut position: MemberPosition,
        action: MemberAction,
        output: &mut Vec<u8>,
    ) -> usize {
        let mut processed_bytes = 0;
        let mut end_byte = None;
        while let Some(&byte) = rest.get(processed_bytes) {
            match (position.string, byte) {
                (StringPosition::AfterBackslash, _) => position.string = StringPosition::Inside,
                (StringPosition::Inside, b'"') => position.string = StringPosition::Outside,
                (StringPosition::Inside, b'\\') => position.string = StringPosition::AfterBackslash,
                (StringPosition::Inside, _) => {
                    // A large message consists mostly of one string, so the string is skipped in one step.
                    let string = rest.get(processed_bytes..).unwrap_or_default();
                    processed_bytes += memchr::memchr2(b'"', b'\\', string).unwrap_or(string.len());
                    continue;
                }
                (StringPosition::Outside, b'"') => position.string = StringPosition::Inside,
                (StringPosition::Outside, b'{' | b'[') => position.depth = position.depth.saturating_add(1),
                (StringPosition::Outside, b'}' | b',') if position.depth == 0 => {
                    end_byte = Some(byte);
                    break;
                }
                (StringPosition::Outside, b'}' | b']') => position.depth = position.depth.saturating_sub(1),
                (StringPosition::Outside, _) => {}
            }
            processed_bytes += 1;
        }
        let processed = rest.get(..processed_bytes).unwrap_or_default();
        match action {
            MemberAction::Forward => output.extend_from_slice(processed),
            MemberAction::Blank => output.resize(output.len() + processed.len(), b' '),
        }
        match end_byte {
            None => {
                self.state = BlankerState::Member(position, action);
                return processed_bytes;
            }
            Some(b',') => {
                self.held_back.push(b',');
                self.state = BlankerState::BeforeName;
            }
            Some(_) => {
                output.push(b'}');
                self.end_object();
            }
        }
        processed_bytes + 1
    }

    /// Ends the object. The provider accepts no second object after it, but credentials in one are blanked as well.
    fn end_object(&mut self) {
        self.state = BlankerState::Start;
        self.has_forwarded_member = false;
    }
}

/// Whether a name, in the encoding between its quotes, is the name of a credential.
fn is_credential_name(encoded_name: &[u8]) -> bool {
    let quoted = [b"\"".as_slice(), encoded_name, b"\""].concat();
    serde_json::from_slice::<String>(&quoted)
        .is_ok_and(|name| CREDENTIAL_NAMES.iter().any(|known| name.eq_ignore_ascii_case(known)))
}

/// Returns the first credential in a complete message, without its scheme, or `None` if the message has no credential.
#[must_use]
pub fn credential_in_message(message: &[u8]) -> Option<String> {
    let members: Map<String, Value> = serde_json::from_slice(message).ok()?;
    let credential = members.iter().find_map(|(name, value)| {
        let is_credential = CREDENTIAL_NAMES.iter().any(|known| name.eq_ignore_ascii_case(known));
        value.as_str().map(str::trim).filter(|value| is_credential && !value.is_empty())
    })?;
    let without_scheme =
        credential.split_once(' ').filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
    Some(without_scheme.map_or(credential, |(_, token)| token.trim()).to_owned())
}

/// Whether a complete message contains a single-use token of the provider, which the client sends instead of a key.
/// Source: the provider's Python SDK 2.78 (the first message of a dialogue).
#[must_use]
pub fn has_single_use_token(message: &[u8]) -> bool {
    let members = serde_json::from_slice::<Map<String, Value>>(message).unwrap_or_default();
    members.get("single_use_token").and_then(Value::as_str).is_some_and(|token| !token.is_empty())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    /// Returns a message after its credentials were blanked.
    fn blanked_message(chunks: &[&[u8]]) -> String {
        let mut blanker = CredentialBlanker::default();
        let mut output = Vec::new();
        chunks.iter().for_each(|chunk| blanker.blank_chunk(chunk, &mut output));
        blanker.finish(&mut output);
        String::from_utf8(output).unwrap()
    }

    /// Compares a blanked message with the expected one, as a whole and in chunks of one byte.
    #[track_caller]
    fn check_blanked(message: &str, expected: &str) {
        assert_eq!(blanked_message(&[message.as_bytes()]), expected);
        let bytes: Vec<&[u8]> = message.as_bytes().chunks(1).collect();
        assert_eq!(blanked_message(&bytes), expected, "chunks of one byte must be blanked as well");
    }

    #[test]
    fn a_credential_at_any_position_is_replaced_by_spaces() {
        check_blanked(r#"{"text":" ","xi_api_key":"k"}"#, r#"{"text":" "                 }"#);
        check_blanked(r#"{"xi-api-key":"k","text":" "}"#, r#"{                 "text":" "}"#);
        check_blanked(r#"{"a":1,"authorization":"k","b":[2]}"#, r#"{"a":1                    ,"b":[2]}"#);
        check_blanked(r#"{"xi_api_key":"k"}"#, r"{                }");
        check_blanked(r#"{"XI_API_KEY" : null , "b":1}"#, r#"{                      "b":1}"#);
    }

    #[test]
    fn a_credential_with_any_value_is_blanked() {
        for value in [r#"{"a":[1,"}"]}"#, r#""\"},{\\""#, "[[],{}]", "12", "true", r#""\u0022""#] {
            let message = format!(r#"{{"xi_api_key":{value},"text":"x"}}"#);
            let blanked: Value = serde_json::from_str(&blanked_message(&[message.as_bytes()])).unwrap();
            assert_eq!(blanked, json!({"text": "x"}), "a credential with {value} must be blanked");
        }
    }

    #[test]
    fn a_name_with_escapes_is_recognized() {
        check_blanked(r#"{"xi\u005fapi\u005Fkey":"k","a":1}"#, r#"{                           "a":1}"#);
        let escaped: String = "authorization".bytes().map(|byte| format!("\\u{byte:04x}")).collect();
        let blanked = blanked_message(&[format!(r#"{{"{escaped}":"secret"}}"#).as_bytes()]);
        assert!(!blanked.contains("secret"), "a credential with an escaped name must be blanked");
    }

    #[test]
    fn a_message_without_a_credential_in_its_outermost_object_is_unchanged() {
        for message in [
            r#"{"text":"xi_api_key","xi_api_keys":1,"a":{"xi_api_key":"deep"}}"#,
            r#"  { "a" : 1 ,  "b" : "\"," , "c":{} }  "#,
            "{}",
            "",
            "plain",
            r#"[{"xi_api_key":"in a list"}]"#,
            r#"{"a":1,}"#,
            r#"{"a"#,
            r#"{broken"#,
            r#"{"a":"\\","b":1}"#,
            r#"{"\\":1,"x\"y":2}"#,
        ] {
            check_blanked(message, message);
        }
        let long_name = format!(r#"{{"{}":1,"b":2}}"#, "n".repeat(500));
        check_blanked(&long_name, &long_name);
    }

    #[test]
    fn a_credential_in_a_second_object_is_blanked() {
        check_blanked(r#"{"a":1}{"xi_api_key":"k"}"#, r#"{"a":1}{                }"#);
    }

    #[test]
    fn long_white_space_is_not_held_back() {
        let message = format!("{{\"a\":1,{}\"xi_api_key\":\"k\"}}", " ".repeat(300));
        let blanked = blanked_message(&[message.as_bytes()]);
        assert_eq!(serde_json::from_str::<Value>(&blanked).unwrap(), json!({"a": 1}));
        let message = format!("{{\"a\":1,{}\"b\":2}}", " ".repeat(300));
        let blanked = blanked_message(&[message.as_bytes()]);
        assert_eq!(serde_json::from_str::<Value>(&blanked).unwrap(), json!({"a": 1, "b": 2}));
    }

    #[test]
    fn the_credential_in_a_message_is_returned_without_its_scheme() {
        for (message, expected) in [
            (r#"{"text":" ","xi_api_key":" tok "}"#, Some("tok")),
            (r#"{"authorization":"Bearer tok"}"#, Some("tok")),
            (r#"{"xi-api-key":""}"#, None),
            (r#"{"text":"xi-api-key"}"#, None),
            ("[]", None),
            ("", None),
        ] {
            let credential = credential_in_message(message.as_bytes());
            assert_eq!(credential.as_deref(), expected, "the credential in {message:?} must be returned");
        }
    }

    /// Generates JSON values, some of which contain the name of a credential at an inner position.
    fn json_values() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<String>().prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 24, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::hash_map("xi_api_key|[a-z\"\\\\]{0,6}", inner, 0..4)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    /// Writes a JSON object with the given `members`, with escaped letters in some names, and with white space.
    fn write_object(members: &[(String, Value)], escapes: &[bool], blanks: &[u8]) -> String {
        let mut escapes = escapes.iter().cycle();
        let mut blanks = blanks.iter().cycle();
        let mut next_blank = || " \t\r\n"[..usize::from(*blanks.next().unwrap_or(&0) % 5).min(4)].to_owned();
        let mut text = next_blank() + "{";
        for (index, (name, value)) in members.iter().enumerate() {
            text += if index > 0 { "," } else { "" };
            text += &next_blank();
            let quoted_name = Value::from(name.as_str()).to_string();
            let is_escaped = *escapes.next().unwrap_or(&false);
            let has_only_ascii =
                name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte));
            if is_escaped && has_only_ascii {
                text += "\"";
                for byte in name.bytes() {
                    text += &if *escapes.next().unwrap_or(&false) {
                        format!("\\u{byte:04X}")
                    } else {
                        char::from(byte).to_string()
                    };
                }
                text += "\"";
            } else {
                text += &quoted_name;
            }
            text += &(next_blank() + ":" + &next_blank() + &value.to_string() + &next_blank());
        }
        text + "}" + &next_blank()
    }

    proptest! {
        #[test]
        fn all_credentials_and_only_credentials_are_blanked(
            members in prop::collection::vec(("[a-zA-Z_\\-\"\\\\\u{e9}]{0,90}", json_values()), 0..6),
            credentials in prop::collection::vec(
                (0_usize..6, prop::sample::select(&CREDENTIAL_NAMES[..]), json_values()), 0..4
            ),
            escapes in prop::collection::vec(any::<bool>(), 1..40),
            blanks in prop::collection::vec(any::<u8>(), 1..20),
            cuts in prop::collection::vec(1_usize..40, 0..60),
        ) {
            let mut members: Vec<(String, Value)> = members.into_iter()
                .filter(|(name, _)| !CREDENTIAL_NAMES.iter().any(|known| name.eq_ignore_ascii_case(known)))
                .collect();
            let expected: Map<String, Value> = members.iter().cloned().collect();
            for (index, name, value) in credentials {
                members.insert(index.min(members.len()), (name.to_owned(), value));
            }
            let message = write_object(&members, &escapes, &blanks);
            let mut remaining = message.as_bytes();
            let mut chunks = Vec::new();
            for cut in cuts {
                let (chunk, after) = remaining.split_at(cut.min(remaining.len()));
                chunks.push(chunk);
                remaining = after;
            }
            chunks.push(remaining);
            let blanked = blanked_message(&chunks);
            prop_assert_eq!(blanked.len(), message.len());
            prop_assert_eq!(serde_json::from_str::<Map<String, Value>>(&blanked).unwrap(), expected);
        }
    }
}

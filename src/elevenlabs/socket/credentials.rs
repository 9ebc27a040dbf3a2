//! Blanks credentials in the messages that a client sends. The provider accepts them as members of the
//! outermost object, in the first message of a connection and of every context; here they are blanked in
//! every message. They are replaced by spaces: the message keeps its length, so its frames need no new
//! heads, and JSON ignores the spaces.
//!
//! A message is processed as it arrives, in pieces of any size. It is not stored, so it has no maximum
//! length.

use serde_json::{Map, Value};

/// Member names under which the provider accepts a credential in a message. Source: its Python SDK 2.78
/// (`xi-api-key`), and its published examples (`xi_api_key`).
const NAMES: [&str; 3] = ["xi_api_key", "xi-api-key", "authorization"];

/// The longest encoding of a name: every letter as an escape of six bytes.
const NAME_BYTES_MAX: usize = 13 * 6;
/// White space after a comma is held back with it up to this length; more is forwarded first.
const BLANKS_MAX: usize = 64;

/// Blanks credentials in a message that arrives in pieces.
#[derive(Debug, Default)]
pub struct CredentialBlanker {
    state: State,
    /// Bytes held back: a comma, white space, and a name that may be the name of a credential.
    held_back: Vec<u8>,
    /// Whether a member of the outermost object was forwarded.
    has_forwarded_member: bool,
    /// Whether a credential was blanked in this text.
    has_blanked: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    /// Before the first byte that is not white space.
    #[default]
    Start,
    /// The text is not an object, and is not examined.
    NotObject,
    /// Between members, after `{` or `,`.
    BeforeName,
    /// In a member's name; `true` after a backslash.
    Name(bool),
    /// In a member, up to the comma or the brace after it.
    Member(MemberPosition, MemberAction),
}

/// The position within a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct MemberPosition {
    /// Number of enclosing lists and objects.
    depth: u32,
    /// In a string; `true` after a backslash.
    text: Option<bool>,
}

/// Whether a member is forwarded or blanked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum MemberAction {
    Forwarded,
    Blanked,
}

impl CredentialBlanker {
    /// Processes the next piece and appends the result to `out`. A few bytes may be held back until the
    /// next piece.
    pub fn pass(&mut self, piece: &[u8], out: &mut Vec<u8>) {
        let mut rest = piece;
        while !rest.is_empty() {
            let processed_bytes = self.step(rest, out);
            rest = rest.get(processed_bytes..).unwrap_or_default();
        }
    }

    /// Ends the text and appends the bytes held back.
    pub fn finish(&mut self, out: &mut Vec<u8>) {
        out.append(&mut self.held_back);
        *self = Self::default();
    }

    /// Whether the rest of this text need not be examined.
    #[must_use]
    pub fn is_foreign(&self) -> bool {
        self.state == State::NotObject
    }

    /// Whether a credential was removed from this text.
    #[must_use]
    pub fn has_blanked(&self) -> bool {
        self.has_blanked
    }

    /// Processes some bytes of `rest`, at least one, and returns their number.
    fn step(&mut self, rest: &[u8], out: &mut Vec<u8>) -> usize {
        let Some(&byte) = rest.first() else { return 0 };
        match self.state {
            State::NotObject => {
                out.extend_from_slice(rest);
                rest.len()
            }
            State::Start => {
                self.state = match byte {
                    b'{' => State::BeforeName,
                    b' ' | b'\t' | b'\r' | b'\n' => State::Start,
                    _ => State::NotObject,
                };
                out.push(byte);
                1
            }
            State::BeforeName => {
                self.before_name(byte, out);
                1
            }
            State::Name(is_escaped) => {
                self.name(byte, is_escaped, out);
                1
            }
            State::Member(position, action) => self.member(rest, position, action, out),
        }
    }

    fn before_name(&mut self, byte: u8, out: &mut Vec<u8>) {
        match byte {
            b'"' => {
                self.held_back.push(byte);
                self.state = State::Name(false);
            }
            b' ' | b'\t' | b'\r' | b'\n'
                if self.held_back.len() <= BLANKS_MAX && !self.held_back.is_empty() =>
            {
                self.held_back.push(byte);
            }
            b' ' | b'\t' | b'\r' | b'\n' => out.push(byte),
            b'}' => {
                out.append(&mut self.held_back);
                out.push(byte);
                self.end_object();
            }
            // Invalid JSON, which the receiver will refuse.
            _ => {
                out.append(&mut self.held_back);
                out.push(byte);
                self.state = State::NotObject;
            }
        }
    }

    fn name(&mut self, byte: u8, is_escaped: bool, out: &mut Vec<u8>) {
        self.held_back.push(byte);
        let name_at = self.held_back.iter().position(|byte| *byte == b'"').unwrap_or_default();
        let name = self.held_back.get(name_at + 1..).unwrap_or_default();
        match byte {
            b'\\' if !is_escaped => self.state = State::Name(true),
            b'"' if !is_escaped => {
                let is_secret = is_credential(name.strip_suffix(b"\"").unwrap_or_default());
                self.decide(
                    if is_secret { MemberAction::Blanked } else { MemberAction::Forwarded },
                    MemberPosition::BARE,
                    out,
                );
            }
            _ if name.len() > NAME_BYTES_MAX => {
                let position = MemberPosition { depth: 0, text: Some(false) };
                // An escape that has begun ends in the string that follows.
                self.decide(MemberAction::Forwarded, position, out);
            }
            _ => self.state = State::Name(false),
        }
    }

    fn decide(&mut self, action: MemberAction, position: MemberPosition, out: &mut Vec<u8>) {
        match action {
            MemberAction::Forwarded => {
                // If every member before was blanked, the comma would separate nothing.
                if !self.has_forwarded_member
                    && let Some(comma) = self.held_back.first_mut().filter(|byte| **byte == b',')
                {
                    *comma = b' ';
                }
                out.append(&mut self.held_back);
                self.has_forwarded_member = true;
            }
            MemberAction::Blanked => {
                out.extend(self.held_back.drain(..).map(|_| b' '));
                self.has_blanked = true;
            }
        }
        self.state = State::Member(position, action);
    }

    fn member(
        &mut self,
        rest: &[u8],
        mut position: MemberPosition,
        action: MemberAction,
        out: &mut Vec<u8>,
    ) -> usize {
        let mut processed_bytes = 0;
        let mut has_ended = false;
        while let Some(&byte) = rest.get(processed_bytes) {
            if position.text == Some(false) {
                // A large message is mostly one string, which is skipped in one step.
                let more = rest.get(processed_bytes..).unwrap_or_default();
                let end = more.iter().position(|byte| matches!(byte, b'"' | b'\\'));
                processed_bytes += end.unwrap_or(more.len());
                let Some(&delimiter) = rest.get(processed_bytes) else { break };
                position.text = if delimiter == b'"' { None } else { Some(true) };
                processed_bytes += 1;
                continue;
            }
            if position.text == Some(true) {
                position.text = Some(false);
                processed_bytes += 1;
                continue;
            }
            match byte {
                b'"' => position.text = Some(false),
                b'{' | b'[' => position.depth = position.depth.saturating_add(1),
                b'}' | b',' if position.depth == 0 => {
                    has_ended = true;
                    break;
                }
                b'}' | b']' => position.depth = position.depth.saturating_sub(1),
                _ => {}
            }
            processed_bytes += 1;
        }
        let processed = rest.get(..processed_bytes).unwrap_or_default();
        match action {
            MemberAction::Forwarded => out.extend_from_slice(processed),
            MemberAction::Blanked => out.resize(out.len() + processed.len(), b' '),
        }
        self.state = State::Member(position, action);
        if !has_ended {
            return processed_bytes;
        }
        if rest.get(processed_bytes) == Some(&b',') {
            self.held_back.push(b',');
            self.state = State::BeforeName;
        } else {
            out.push(b'}');
            self.end_object();
        }
        processed_bytes + 1
    }

    /// Another object may follow, which no server would accept; it is examined nonetheless.
    fn end_object(&mut self) {
        self.state = State::Start;
        self.has_forwarded_member = false;
    }
}

impl MemberPosition {
    const BARE: Self = Self { depth: 0, text: None };
}

/// Whether a name, as written between its quotes, is one of a credential.
fn is_credential(written: &[u8]) -> bool {
    // Longer names were forwarded before.
    let mut quoted = Vec::with_capacity(written.len() + 2);
    quoted.push(b'"');
    quoted.extend_from_slice(written);
    quoted.push(b'"');
    serde_json::from_slice::<String>(&quoted)
        .is_ok_and(|name| NAMES.iter().any(|known| name.eq_ignore_ascii_case(known)))
}

/// The credential in a message, without its scheme.
#[must_use]
pub fn presented(message: &[u8]) -> Option<String> {
    let members: Map<String, Value> = serde_json::from_slice(message).ok()?;
    let credential = members.iter().find_map(|(name, value)| {
        let is_secret = NAMES.iter().any(|known| name.eq_ignore_ascii_case(known));
        value.as_str().map(str::trim).filter(|value| is_secret && !value.is_empty())
    })?;
    let without_scheme =
        credential.split_once(' ').filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
    Some(without_scheme.map_or(credential, |(_, token)| token.trim()).to_owned())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn blanked_message(pieces: &[&[u8]]) -> String {
        let mut blanker = CredentialBlanker::default();
        let mut out = Vec::new();
        pieces.iter().for_each(|piece| blanker.pass(piece, &mut out));
        blanker.finish(&mut out);
        String::from_utf8(out).unwrap()
    }

    #[track_caller]
    fn check(message: &str, expected: &str) {
        assert_eq!(blanked_message(&[message.as_bytes()]), expected);
        let bytes: Vec<&[u8]> = message.as_bytes().chunks(1).collect();
        assert_eq!(blanked_message(&bytes), expected, "byte by byte");
    }

    #[test]
    fn a_credential_becomes_spaces_at_any_position() {
        check(r#"{"text":" ","xi_api_key":"k"}"#, r#"{"text":" "                 }"#);
        check(r#"{"xi-api-key":"k","text":" "}"#, r#"{                 "text":" "}"#);
        check(r#"{"a":1,"authorization":"k","b":[2]}"#, r#"{"a":1                    ,"b":[2]}"#);
        check(r#"{"xi_api_key":"k"}"#, r"{                }");
        check(r#"{"XI_API_KEY" : null , "b":1}"#, r#"{                      "b":1}"#);
    }

    #[test]
    fn a_credential_may_have_any_value() {
        for value in [r#"{"a":[1,"}"]}"#, r#""\"},{\\""#, "[[],{}]", "12", "true", r#""\u0022""#] {
            let message = format!(r#"{{"xi_api_key":{value},"text":"x"}}"#);
            let blanked: Value = serde_json::from_str(&blanked_message(&[message.as_bytes()])).unwrap();
            assert_eq!(blanked, json!({"text": "x"}), "{value}");
        }
    }

    #[test]
    fn a_name_is_known_in_every_spelling() {
        check(r#"{"xi\u005fapi\u005Fkey":"k","a":1}"#, r#"{                           "a":1}"#);
        let escaped: String = "authorization".bytes().map(|byte| format!("\\u{byte:04x}")).collect();
        assert!(!blanked_message(&[format!(r#"{{"{escaped}":"secret"}}"#).as_bytes()]).contains("secret"));
    }

    #[test]
    fn other_members_stay_byte_for_byte() {
        for text in [
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
            check(text, text);
        }
        let long = format!(r#"{{"{}":1,"b":2}}"#, "n".repeat(500));
        check(&long, &long);
    }

    #[test]
    fn a_second_object_is_examined_as_well() {
        check(r#"{"a":1}{"xi_api_key":"k"}"#, r#"{"a":1}{                }"#);
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
    fn a_presented_credential_is_read() {
        for (message, expected) in [
            (r#"{"text":" ","xi_api_key":" tok "}"#, Some("tok")),
            (r#"{"authorization":"Bearer tok"}"#, Some("tok")),
            (r#"{"xi-api-key":""}"#, None),
            (r#"{"text":"xi-api-key"}"#, None),
            ("[]", None),
            ("", None),
        ] {
            assert_eq!(presented(message.as_bytes()).as_deref(), expected, "{message}");
        }
    }

    fn value() -> impl Strategy<Value = Value> {
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

    /// A JSON object as text: members in any order, with escaped letters in names, and white space.
    fn written(members: &[(String, Value)], escapes: &[bool], blanks: &[u8]) -> String {
        let mut escapes = escapes.iter().cycle();
        let mut blanks = blanks.iter().cycle();
        let mut blank = || " \t\r\n"[..usize::from(*blanks.next().unwrap_or(&0) % 5).min(4)].to_owned();
        let mut text = blank() + "{";
        for (index, (name, value)) in members.iter().enumerate() {
            text += if index > 0 { "," } else { "" };
            text += &blank();
            let plain = Value::from(name.as_str()).to_string();
            let is_escaped = *escapes.next().unwrap_or(&false);
            let is_simple = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte));
            if is_escaped && is_simple {
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
                text += &plain;
            }
            text += &(blank() + ":" + &blank() + &value.to_string() + &blank());
        }
        text + "}" + &blank()
    }

    proptest! {
        #[test]
        fn all_credentials_and_only_credentials_are_blanked(
            others in prop::collection::vec(("[a-zA-Z_\\-\"\\\\\u{e9}]{0,90}", value()), 0..6),
            secrets in prop::collection::vec((0_usize..6, prop::sample::select(&NAMES[..]), value()), 0..4),
            escapes in prop::collection::vec(any::<bool>(), 1..40),
            blanks in prop::collection::vec(any::<u8>(), 1..20),
            cuts in prop::collection::vec(1_usize..40, 0..60),
        ) {
            let mut members: Vec<(String, Value)> = others.into_iter()
                .filter(|(name, _)| !NAMES.iter().any(|known| name.eq_ignore_ascii_case(known)))
                .collect();
            let expected: Map<String, Value> = members.iter().cloned().collect();
            for (at, name, value) in secrets {
                members.insert(at.min(members.len()), (name.to_owned(), value));
            }
            let text = written(&members, &escapes, &blanks);
            let mut rest = text.as_bytes();
            let mut pieces = Vec::new();
            for cut in cuts {
                let (piece, after) = rest.split_at(cut.min(rest.len()));
                pieces.push(piece);
                rest = after;
            }
            pieces.push(rest);
            let blanked = blanked_message(&pieces);
            prop_assert_eq!(blanked.len(), text.len());
            prop_assert_eq!(serde_json::from_str::<Map<String, Value>>(&blanked).unwrap(), expected);
        }
    }
}

//! Fuzzes the replacement of credentials in WebSocket messages by spaces, and the count of their characters. An
//! arbitrary message is split at arbitrary positions. The output must have the same length and lack only the
//! credentials, and neither the output nor the count may depend on the split.

#![no_main]

use arbitrary::Arbitrary;
use keychoir::elevenlabs::socket::{ContentCounter, CredentialBlanker, Dialect, credential_in_message};
use libfuzzer_sys::fuzz_target;
use serde_json::{Map, Value};

/// The names of the members that contain credentials.
const CREDENTIAL_NAMES: [&str; 3] = ["xi_api_key", "xi-api-key", "authorization"];
/// The text of all credentials. No other text contains it.
const MARKER: &str = "sk_marker_5d41402abc4b2a76b9719d911017c592";

/// A message, and its split into chunks.
#[derive(Arbitrary, Debug)]
struct BlankingCase {
    message: Message,
    /// The lengths of the chunks, except the last one.
    chunk_lengths: Vec<u8>,
}

/// A WebSocket message.
#[derive(Arbitrary, Debug)]
enum Message {
    /// Arbitrary bytes, which need not be JSON.
    Bytes(Vec<u8>),
    /// A JSON object whose members are generated.
    Object(Vec<Member>),
}

/// A member of a JSON object, with its notation.
#[derive(Arbitrary, Debug)]
struct Member {
    name: Name,
    /// Each set bit escapes a character of the name.
    escapes: u16,
    whitespace: [Whitespace; 4],
    value: Json,
}

/// The name of a member of a JSON object.
#[derive(Arbitrary, Debug)]
enum Name {
    /// One of `CREDENTIAL_NAMES`. Each set bit of `uppercase` makes a letter uppercase.
    Credential {
        index: u8,
        uppercase: u16,
    },
    Text,
    Other(String),
}

/// White space between the tokens of a JSON object. `kind` selects a text, which is repeated.
#[derive(Arbitrary, Debug)]
struct Whitespace {
    count: u8,
    kind: u8,
}

/// A JSON value.
#[derive(Arbitrary, Debug)]
enum Json {
    /// [`MARKER`] in the value of a credential, and otherwise null.
    Marker,
    Null,
    Number(i32),
    Text(String),
    List(Vec<Json>),
    Object(Vec<(Name, Json)>),
}

impl Name {
    /// Returns the name without escapes.
    fn unescaped(&self) -> String {
        match self {
            Self::Credential { index, uppercase } => {
                let name = CREDENTIAL_NAMES[usize::from(*index) % CREDENTIAL_NAMES.len()];
                let letters = name.chars().enumerate();
                letters
                    .map(|(index, letter)| {
                        if uppercase >> (index % 16) & 1 == 1 { letter.to_ascii_uppercase() } else { letter }
                    })
                    .collect()
            }
            Self::Text => "text".to_owned(),
            Self::Other(name) => without_marker(name),
        }
    }

    /// Returns the name as a JSON string, with escapes for some characters.
    fn to_json(&self, escapes: u16) -> String {
        if matches!(self, Self::Other(_)) {
            return Value::from(self.unescaped()).to_string();
        }
        let mut text = String::from('"');
        for (index, character) in self.unescaped().chars().enumerate() {
            text += &if escapes >> (index % 16) & 1 == 1 {
                format!("\\u{:04x}", u32::from(character))
            } else {
                character.to_string()
            };
        }
        text + "\""
    }
}

impl Whitespace {
    fn to_json(&self) -> String {
        // The largest counts exceed the buffer of the blanker.
        [" ", "\t", "\r\n", " \n "][usize::from(self.kind) % 4].repeat(usize::from(self.count % 120))
    }
}

impl Json {
    /// Encodes the value. Only the value of a credential contains the marker.
    fn to_json(&self, is_credential: bool) -> String {
        match self {
            Self::Marker if is_credential => format!("\"{MARKER}\""),
            Self::Marker | Self::Null => "null".to_owned(),
            Self::Number(number) => number.to_string(),
            Self::Text(text) => Value::from(without_marker(text)).to_string(),
            Self::List(list) => {
                let members: Vec<_> = list.iter().map(|value| value.to_json(is_credential)).collect();
                format!("[{}]", members.join(","))
            }
            Self::Object(members) => {
                let member = |(name, value): &(Name, Self)| {
                    format!("{}:{}", name.to_json(0), value.to_json(is_credential))
                };
                format!("{{{}}}", members.iter().map(member).collect::<Vec<_>>().join(","))
            }
        }
    }
}

/// Removes the marker from a generated string, because the fuzzer may find the marker itself.
fn without_marker(text: &str) -> String {
    text.replace("marker", "-")
}

/// Returns whether a member of this name contains a credential.
fn is_credential(name: &str) -> bool {
    CREDENTIAL_NAMES.iter().any(|known| name.eq_ignore_ascii_case(known))
}

/// Returns a JSON object with the members in their notation.
fn object_to_json(members: &[Member]) -> String {
    let mut text = String::from("{");
    for (index, Member { name, escapes, whitespace, value }) in members.iter().enumerate() {
        let [before_name, after_name, before_value, after_value] =
            whitespace.each_ref().map(Whitespace::to_json);
        let comma = if index > 0 { "," } else { "" };
        let value = value.to_json(is_credential(&name.unescaped()));
        text += &format!(
            "{comma}{before_name}{}{after_name}:{before_value}{value}{after_value}",
            name.to_json(*escapes)
        );
    }
    text + "}"
}

/// Replaces the credentials in a message that arrives in chunks of these lengths and a last chunk.
fn blank_credentials(message: &[u8], chunk_lengths: &[u8]) -> Vec<u8> {
    let (mut blanker, mut output, mut rest) = (CredentialBlanker::default(), Vec::new(), message);
    for length in chunk_lengths {
        let (chunk, following) = rest.split_at(usize::from(*length).min(rest.len()));
        blanker.blank_chunk(chunk, &mut output);
        assert!(
            output.len() <= message.len() - following.len(),
            "the output must not be longer than the input"
        );
        rest = following;
    }
    blanker.blank_chunk(rest, &mut output);
    blanker.finish(&mut output);
    output
}

/// Counts the characters of a message that arrives in chunks of these lengths and a last chunk.
fn count_characters(message: &[u8], chunk_lengths: &[u8]) -> u64 {
    let (mut counter, mut rest) = (ContentCounter::default(), message);
    for length in chunk_lengths {
        let (chunk, following) = rest.split_at(usize::from(*length).min(rest.len()));
        counter.count_chunk(chunk);
        rest = following;
    }
    counter.count_chunk(rest);
    counter.finish(Dialect::Speech).content.characters
}

/// Returns the number of characters in the member `text`. Generated objects do not have `inputs`.
fn expected_characters(members: &Map<String, Value>) -> u64 {
    let text = members.get("text").and_then(Value::as_str).unwrap_or_default();
    let is_blank = text.chars().all(|character| character.is_ascii_whitespace());
    if is_blank { 0 } else { text.chars().count() as u64 }
}

fuzz_target!(|case: BlankingCase| {
    let (message, is_generated_object) = match &case.message {
        Message::Bytes(bytes) => (bytes.clone(), false),
        Message::Object(members) => (object_to_json(members).into_bytes(), true),
    };
    let output = blank_credentials(&message, &case.chunk_lengths);
    assert_eq!(output.len(), message.len(), "the output must have the length of the message");
    assert_eq!(output, blank_credentials(&message, &[]), "the output must not depend on the split");
    let characters = count_characters(&message, &case.chunk_lengths);
    assert_eq!(characters, count_characters(&message, &[]), "the count must not depend on the split");
    // A generated object fails to parse only if it is nested too deeply.
    let Ok(mut expected) = serde_json::from_slice::<Map<String, Value>>(&message) else { return };
    if is_generated_object && !expected.contains_key("inputs") {
        assert_eq!(characters, expected_characters(&expected), "the text must be counted");
    }
    expected.retain(|name, _| !is_credential(name));
    let blanked: Map<String, Value> =
        serde_json::from_slice(&output).expect("the output must be a JSON object");
    assert_eq!(blanked, expected, "only the credentials may be missing");
    assert_eq!(credential_in_message(&output), None, "the output must not contain a credential");
    if is_generated_object {
        assert!(
            !output.windows(MARKER.len()).any(|window| window == MARKER.as_bytes()),
            "the output must not contain a credential"
        );
    }
    assert_eq!(blank_credentials(&output, &case.chunk_lengths), output, "blanking must be idempotent");
});

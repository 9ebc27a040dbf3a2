//! Whatever a client says on a socket, in whatever pieces: what goes on is as long, and of a JSON
//! object nothing is missing but its credentials, of which nothing is left. Its text is counted as by
//! reading the whole.

#![no_main]

use arbitrary::Arbitrary;
use keychoir::elevenlabs::socket::{ContentCounter, CredentialBlanker, Dialect, credential_in_message};
use libfuzzer_sys::fuzz_target;
use serde_json::{Map, Value};

const NAMES: [&str; 3] = ["xi_api_key", "xi-api-key", "authorization"];
/// A credential; nothing else has it in it.
const MARKER: &str = "sk_marker_5d41402abc4b2a76b9719d911017c592";

#[derive(Arbitrary, Debug)]
struct Case {
    text: Text,
    cuts: Vec<u8>,
}

#[derive(Arbitrary, Debug)]
enum Text {
    Any(Vec<u8>),
    Object(Vec<Member>),
}

/// A member, as it may be written.
#[derive(Arbitrary, Debug)]
struct Member {
    name: Name,
    escapes: u16,
    blanks: [Blanks; 4],
    value: Json,
}

#[derive(Arbitrary, Debug)]
enum Name {
    Credential { which: u8, upper: u16 },
    Text,
    Other(String),
}

#[derive(Arbitrary, Debug)]
struct Blanks(u8, u8);

#[derive(Arbitrary, Debug)]
enum Json {
    Marker,
    Null,
    Number(i32),
    Text(String),
    List(Vec<Json>),
    Object(Vec<(Name, Json)>),
}

impl Name {
    fn plain(&self) -> String {
        match self {
            Self::Credential { which, upper } => {
                let name = NAMES[usize::from(*which) % NAMES.len()];
                let letters = name.chars().enumerate();
                letters
                    .map(|(at, c)| if upper >> (at % 16) & 1 == 1 { c.to_ascii_uppercase() } else { c })
                    .collect()
            }
            Self::Text => "text".to_owned(),
            Self::Other(name) => innocent(name),
        }
    }

    fn written(&self, escapes: u16) -> String {
        if matches!(self, Self::Other(_)) {
            return Value::from(self.plain()).to_string();
        }
        let mut text = String::from('"');
        for (at, c) in self.plain().chars().enumerate() {
            text += &if escapes >> (at % 16) & 1 == 1 {
                format!("\\u{:04x}", u32::from(c))
            } else {
                c.to_string()
            };
        }
        text + "\""
    }
}

impl Blanks {
    fn written(&self) -> String {
        // Some are more than what waits.
        [" ", "\t", "\r\n", " \n "][usize::from(self.1) % 4].repeat(usize::from(self.0 % 120))
    }
}

impl Json {
    /// Only what `is_secret` has the marker in it.
    fn written(&self, is_secret: bool) -> String {
        match self {
            Self::Marker if is_secret => format!("\"{MARKER}\""),
            Self::Marker | Self::Null => "null".to_owned(),
            Self::Number(number) => number.to_string(),
            Self::Text(text) => Value::from(innocent(text)).to_string(),
            Self::List(list) => {
                let members: Vec<_> = list.iter().map(|value| value.written(is_secret)).collect();
                format!("[{}]", members.join(","))
            }
            Self::Object(members) => {
                let member = |(name, value): &(Name, Self)| {
                    format!("{}:{}", name.written(0), value.written(is_secret))
                };
                format!("{{{}}}", members.iter().map(member).collect::<Vec<_>>().join(","))
            }
        }
    }
}

/// The fuzzer finds out what is looked for, and puts it where it may stand.
fn innocent(text: &str) -> String {
    text.replace("marker", "-")
}

fn is_credential(name: &str) -> bool {
    NAMES.iter().any(|known| name.eq_ignore_ascii_case(known))
}

fn written(members: &[Member]) -> String {
    let mut text = String::from("{");
    for (at, Member { name, escapes, blanks, value }) in members.iter().enumerate() {
        let [before, behind_name, behind_colon, behind] = blanks.each_ref().map(Blanks::written);
        let comma = if at > 0 { "," } else { "" };
        let value = value.written(is_credential(&name.plain()));
        text +=
            &format!("{comma}{before}{}{behind_name}:{behind_colon}{value}{behind}", name.written(*escapes));
    }
    text + "}"
}

fn passed(text: &[u8], cuts: &[u8]) -> Vec<u8> {
    let (mut blanking, mut out, mut rest) = (CredentialBlanker::default(), Vec::new(), text);
    for cut in cuts {
        let (piece, behind) = rest.split_at(usize::from(*cut).min(rest.len()));
        blanking.process(piece, &mut out);
        assert!(out.len() <= text.len() - behind.len(), "nothing goes on that has not come");
        rest = behind;
    }
    blanking.process(rest, &mut out);
    blanking.finish(&mut out);
    out
}

fn counted(text: &[u8], cuts: &[u8]) -> u64 {
    let (mut counter, mut rest) = (ContentCounter::default(), text);
    for cut in cuts {
        let (piece, behind) = rest.split_at(usize::from(*cut).min(rest.len()));
        counter.process(piece);
        rest = behind;
    }
    counter.process(rest);
    counter.finish(Dialect::Speech).content.characters
}

/// What the outermost member `text` has to be spoken; lines of `inputs` are not written here.
fn spoken(members: &Map<String, Value>) -> u64 {
    let text = members.get("text").and_then(Value::as_str).unwrap_or_default();
    let is_blank = text.chars().all(|c| c.is_ascii_whitespace());
    if is_blank { 0 } else { text.chars().count() as u64 }
}

fuzz_target!(|case: Case| {
    let (text, is_ours) = match &case.text {
        Text::Any(text) => (text.clone(), false),
        Text::Object(members) => (written(members).into_bytes(), true),
    };
    let out = passed(&text, &case.cuts);
    assert_eq!(out.len(), text.len());
    assert_eq!(out, passed(&text, &[]), "the pieces do not matter");
    assert_eq!(counted(&text, &case.cuts), counted(&text, &[]), "the pieces do not matter");
    // Of what was written here, that is only what is nested too deeply for the reader.
    let Ok(mut expected) = serde_json::from_slice::<Map<String, Value>>(&text) else { return };
    if is_ours && !expected.contains_key("inputs") {
        assert_eq!(counted(&text, &case.cuts), spoken(&expected));
    }
    expected.retain(|name, _| !is_credential(name));
    let found: Map<String, Value> = serde_json::from_slice(&out).expect("an object is still one");
    assert_eq!(found, expected);
    assert_eq!(credential_in_message(&out), None, "no credential is left");
    if is_ours {
        assert!(!out.windows(MARKER.len()).any(|some| some == MARKER.as_bytes()), "a credential goes on");
    }
    assert_eq!(passed(&out, &case.cuts), out, "once is enough");
});

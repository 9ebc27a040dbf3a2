//! Extracts the facts of a request body that the pool and the usage records need: the model, the number
//! of characters of the text, and the length of the audio. The text is counted and never stored.

use std::fmt;
use std::sync::Arc;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// Maximum bytes of a body that are parsed: the longest text that a model accepts (40,000 characters), if
/// every character is escaped.
pub const BODY_BYTES_MAX: usize = 256 * 1024;

/// The model of a speech request that names none. Source: the OpenAPI document.
pub const DEFAULT_MODEL: &str = "eleven_multilingual_v2";

/// Bytes of a form that are searched for `model_id`, which precedes the uploaded file.
const FORM_BYTES_MAX: usize = 16 * 1024;

/// The features of a request body.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RequestBodyFeatures {
    /// The provider's name of the model.
    pub model: Option<Arc<str>>,
    /// Number of characters of text to be spoken.
    pub characters: Option<u64>,
    /// The requested length of the audio.
    pub duration_ms: Option<u64>,
}

impl RequestBodyFeatures {
    /// Parses the start of a body; `is_whole` when it is complete.
    #[must_use]
    pub fn of(start: &[u8], is_whole: bool) -> Self {
        match start.iter().find(|byte| !byte.is_ascii_whitespace()) {
            Some(b'{') if is_whole => {
                serde_json::from_slice(start).map_or_else(|_| Self::default(), features_of_document)
            }
            Some(b'-') => {
                Self { model: model_of_form(&start[..start.len().min(FORM_BYTES_MAX)]), ..Self::default() }
            }
            Some(_) | None => Self::default(),
        }
    }
}

#[derive(Deserialize)]
struct BodyDocument {
    model_id: Option<ModelId>,
    #[serde(default)]
    text: TextLength,
    /// The lines of a dialogue.
    #[serde(default)]
    inputs: Vec<InputLine>,
    #[serde(default)]
    duration_seconds: Seconds,
}

#[derive(Deserialize)]
struct InputLine {
    #[serde(default)]
    text: TextLength,
}

fn features_of_document(document: BodyDocument) -> RequestBodyFeatures {
    let lines = document.inputs.iter().map(|line| &line.text).chain([&document.text]);
    let characters = lines.filter_map(|text| text.0).reduce(u64::saturating_add);
    RequestBodyFeatures {
        model: document.model_id.and_then(|id| id.0),
        characters,
        duration_ms: document.duration_seconds.0,
    }
}

/// The value of `model_id` in a form.
fn model_of_form(start: &[u8]) -> Option<Arc<str>> {
    const FIELD: &[u8] = b"name=\"model_id\"";
    const BLANK: &[u8] = b"\r\n\r\n";
    let find = memchr::memmem::find;
    let head = &start[find(start, FIELD)? + FIELD.len()..];
    let value = &head[find(head, BLANK)? + BLANK.len()..];
    model(std::str::from_utf8(&value[..find(value, b"\r\n")?]).ok()?)
}

/// Accepts names of the provider's models: a family, followed by lower-case letters, digits and `_-.`.
/// Any other text of a client is not recorded.
#[must_use]
pub fn model(name: &str) -> Option<Arc<str>> {
    const FAMILIES: [&str; 4] = ["eleven_", "scribe_", "music_", "dubbing_"];
    let is_plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"_-.".contains(&byte);
    let is_name = name.len() <= 40 && name.bytes().all(is_plain);
    (is_name && FAMILIES.iter().any(|family| name.starts_with(family))).then(|| name.into())
}

/// The length of a text; `None` for other types.
#[derive(Default)]
struct TextLength(Option<u64>);

impl<'de> Deserialize<'de> for TextLength {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let count = |text: &str| Self(Some(text.chars().count() as u64));
        deserializer.deserialize_any(Texts { of_text: count, of_other: || Self(None) })
    }
}

/// A number of seconds, in milliseconds; `None` for other types.
#[derive(Default)]
struct Seconds(Option<u64>);

impl<'de> Deserialize<'de> for Seconds {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let seconds = serde_json::Value::deserialize(deserializer)?.as_f64();
        // No generated audio is longer than an hour.
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "within an hour")]
        let ms = |seconds: f64| (seconds * 1_000.0).ceil() as u64;
        Ok(Self(seconds.filter(|seconds| (0.0..=3_600.0).contains(seconds)).map(ms)))
    }
}

/// A text that may be the name of a model.
struct ModelId(Option<Arc<str>>);

impl<'de> Deserialize<'de> for ModelId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer
            .deserialize_any(Texts { of_text: |text: &str| Self(model(text)), of_other: || Self(None) })
    }
}

/// Visits texts without copying them, and skips all other values.
struct Texts<F, G> {
    of_text: F,
    of_other: G,
}

impl<'de, T, F: Fn(&str) -> T, G: Fn() -> T> Visitor<'de> for Texts<F, G> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("anything")
    }

    fn visit_str<E>(self, text: &str) -> Result<T, E> {
        Ok((self.of_text)(text))
    }

    fn visit_bool<E>(self, _: bool) -> Result<T, E> {
        Ok((self.of_other)())
    }

    fn visit_i64<E>(self, _: i64) -> Result<T, E> {
        Ok((self.of_other)())
    }

    fn visit_u64<E>(self, _: u64) -> Result<T, E> {
        Ok((self.of_other)())
    }

    fn visit_f64<E>(self, _: f64) -> Result<T, E> {
        Ok((self.of_other)())
    }

    fn visit_unit<E>(self) -> Result<T, E> {
        Ok((self.of_other)())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<T, A::Error> {
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok((self.of_other)())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<T, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok((self.of_other)())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(body: &str, model: Option<&str>, characters: Option<u64>) {
        let expected = RequestBodyFeatures { model: model.map(Into::into), characters, duration_ms: None };
        assert_eq!(RequestBodyFeatures::of(body.as_bytes(), true), expected);
    }

    #[test]
    fn a_speech_has_a_model_and_a_length() {
        let model = Some("eleven_multilingual_v2");
        check(r#"{"text":"abc","model_id":"eleven_multilingual_v2"}"#, model, Some(3));
        check(r#" {"x":[{}],"text":"\u00e4\u00f6 \ud83d\ude00\n"}"#, None, Some(5));
        check(
            r#"{"model_id":"eleven_v3","inputs":[{"text":"ab","voice_id":"x"},{"text":"c"}]}"#,
            Some("eleven_v3"),
            Some(3),
        );
        check(r#"{"text":""}"#, None, Some(0));
        check("{}", None, None);
    }

    #[test]
    fn a_value_that_is_no_text_has_no_length() {
        for value in ["3", "-3", "1.5", "true", "null", "[\"abc\"]", r#"{"text":"abc"}"#] {
            check(&format!("{{\"text\":{value},\"model_id\":\"eleven_v3\"}}"), Some("eleven_v3"), None);
            check(&format!("{{\"text\":\"a\",\"model_id\":{value}}}"), None, Some(1));
        }
    }

    #[test]
    fn a_sound_effect_has_a_length() {
        for (seconds, ms) in
            [("2.5", Some(2_500)), ("0", Some(0)), ("-1", None), ("1e9", None), ("\"2\"", None), ("{}", None)]
        {
            let body = format!("{{\"text\":\"a\",\"duration_seconds\":{seconds}}}");
            assert_eq!(RequestBodyFeatures::of(body.as_bytes(), true).duration_ms, ms, "{seconds}");
        }
    }

    #[test]
    fn a_form_names_its_model_before_its_file() {
        let form = |value: &str| {
            format!("--b\r\nContent-Disposition: form-data; name=\"model_id\"\r\n\r\n{value}\r\n--b\r\n…")
        };
        check(&form("scribe_v1"), Some("scribe_v1"), None);
        check(&form("a text"), None, None);
        check(&form("scribe_v1")[..60], None, None);
        check(&form("scribe_v1")[..10], None, None);
    }

    #[test]
    fn only_names_of_models_are_recorded() {
        for name in [
            "sk_0123456789abcdef",
            "my secret",
            "Eleven_v2",
            "eleven_\u{e4}",
            &format!("eleven_{}", "x".repeat(40)),
        ] {
            check(&format!("{{\"model_id\":\"{name}\"}}"), None, None);
        }
    }

    #[test]
    fn a_truncated_document_has_no_features() {
        let body = br#"{"text":"abc","model_id":"eleven_v3"}"#;
        assert_eq!(RequestBodyFeatures::of(body, false), RequestBodyFeatures::default());
        assert_eq!(RequestBodyFeatures::of(&body[..20], true), RequestBodyFeatures::default());
    }

    proptest::proptest! {
        #[test]
        fn no_input_panics(body: Vec<u8>, is_whole: bool) {
            let _ = RequestBodyFeatures::of(&body, is_whole);
        }

        #[test]
        fn every_text_is_counted_by_its_characters(text: String) {
            let body = serde_json::json!({"text": text}).to_string();
            proptest::prop_assert_eq!(RequestBodyFeatures::of(body.as_bytes(), true).characters, Some(text.chars().count() as u64));
        }
    }
}

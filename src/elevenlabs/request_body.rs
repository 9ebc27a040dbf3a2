//! Extracts the features of a request body that the pool and the usage records need. These are the model, the number of
//! characters of the text and the requested length of the audio in a JSON document, and the model in a form. The parser
//! counts the text and does not store it.

use std::fmt;
use std::sync::Arc;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// Maximum number of bytes of a body that are parsed, which is enough for the longest text that a model accepts (40,000
/// characters) with every character escaped.
pub const MAX_PARSED_BODY_BYTES: usize = 256 * 1024;

/// The model of a speech request that names no model. Source: the OpenAPI document.
pub const DEFAULT_MODEL: &str = "eleven_multilingual_v2";

/// Maximum number of bytes of a form that are searched for `model_id`. The field precedes the uploaded file.
const MAX_SEARCHED_FORM_BYTES: usize = 16 * 1024;

/// The features of a request body. A feature is `None` if the body does not have it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RequestBodyFeatures {
    /// The provider's name of the model.
    pub model: Option<Arc<str>>,
    /// The number of characters of all texts that will be spoken.
    pub characters: Option<u64>,
    /// The requested length of the audio in milliseconds.
    pub duration_ms: Option<u64>,
}

impl RequestBodyFeatures {
    /// Parses the start of a body. A JSON document is parsed only if `start` is the complete body (`is_complete`).
    #[must_use]
    pub fn parse(start: &[u8], is_complete: bool) -> Self {
        match start.iter().find(|byte| !byte.is_ascii_whitespace()) {
            Some(b'{') if is_complete => serde_json::from_slice::<BodyDocument>(start)
                .map_or_else(|_| Self::default(), BodyDocument::into_features),
            Some(b'-') => {
                let form_start = &start[..start.len().min(MAX_SEARCHED_FORM_BYTES)];
                Self { model: find_model_in_form(form_start), ..Self::default() }
            }
            Some(_) | None => Self::default(),
        }
    }
}

/// The members of a JSON body that contain features.
#[derive(Deserialize)]
struct BodyDocument {
    #[serde(default, rename = "model_id", deserialize_with = "deserialize_model")]
    model: Option<Arc<str>>,
    /// The number of characters of the text.
    #[serde(default, rename = "text", deserialize_with = "deserialize_character_count")]
    characters: Option<u64>,
    /// The lines of a dialogue.
    #[serde(default)]
    inputs: Vec<DialogueLine>,
    /// The requested length of the audio, converted to milliseconds.
    #[serde(default, rename = "duration_seconds", deserialize_with = "deserialize_milliseconds")]
    duration_ms: Option<u64>,
}

#[derive(Deserialize)]
struct DialogueLine {
    /// The number of characters of the line.
    #[serde(default, rename = "text", deserialize_with = "deserialize_character_count")]
    characters: Option<u64>,
}

impl BodyDocument {
    fn into_features(self) -> RequestBodyFeatures {
        let text_lengths = self.inputs.iter().map(|line| line.characters).chain([self.characters]);
        RequestBodyFeatures {
            model: self.model,
            characters: text_lengths.flatten().reduce(u64::saturating_add),
            duration_ms: self.duration_ms,
        }
    }
}

/// Returns the model in the field `model_id` of a form (`multipart/form-data`).
fn find_model_in_form(form: &[u8]) -> Option<Arc<str>> {
    const FIELD: &[u8] = b"name=\"model_id\"";
    const BLANK_LINE: &[u8] = b"\r\n\r\n";
    let find = memchr::memmem::find;
    let part_head = &form[find(form, FIELD)? + FIELD.len()..];
    let part_body = &part_head[find(part_head, BLANK_LINE)? + BLANK_LINE.len()..];
    parse_model(std::str::from_utf8(&part_body[..find(part_body, b"\r\n")?]).ok()?)
}

/// Parses a name of the provider's models: a family, followed by lower-case letters, digits and `_-.`. Any
/// other value of a client is rejected, so that it is not recorded.
#[must_use]
pub fn parse_model(name: &str) -> Option<Arc<str>> {
    const FAMILIES: [&str; 4] = ["eleven_", "scribe_", "music_", "dubbing_"];
    const MAX_NAME_BYTES: usize = 40;
    let is_name_byte =
        |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"_-.".contains(&byte);
    let is_name = name.len() <= MAX_NAME_BYTES && name.bytes().all(is_name_byte);
    (is_name && FAMILIES.iter().any(|family| name.starts_with(family))).then(|| name.into())
}

/// Deserializes the name of a model. Any other value becomes `None`.
fn deserialize_model<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Arc<str>>, D::Error> {
    deserializer.deserialize_any(StringVisitor(parse_model))
}

/// Deserializes a string as its number of characters. Any other value becomes `None`.
fn deserialize_character_count<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    deserializer.deserialize_any(StringVisitor(|text: &str| Some(text.chars().count() as u64)))
}

/// Deserializes a number of seconds as milliseconds. Any other value becomes `None`.
fn deserialize_milliseconds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    let number = serde_json::Value::deserialize(deserializer)?.as_f64();
    // No generated audio is longer than an hour.
    let seconds = number.filter(|seconds| (0.0..=3_600.0).contains(seconds));
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "the milliseconds of an hour fit"
    )]
    Ok(seconds.map(|seconds| (seconds * 1_000.0).ceil() as u64))
}

/// A visitor that converts a string with a function, without copying the string, and skips any other value.
struct StringVisitor<F>(F);

impl<'de, T, F: Fn(&str) -> Option<T>> Visitor<'de> for StringVisitor<F> {
    type Value = Option<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any JSON value")
    }

    fn visit_str<E>(self, text: &str) -> Result<Option<T>, E> {
        Ok((self.0)(text))
    }

    fn visit_bool<E>(self, _: bool) -> Result<Option<T>, E> {
        Ok(None)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Option<T>, E> {
        Ok(None)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Option<T>, E> {
        Ok(None)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Option<T>, E> {
        Ok(None)
    }

    fn visit_unit<E>(self) -> Result<Option<T>, E> {
        Ok(None)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Option<T>, A::Error> {
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(None)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Option<T>, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Compares the features of a complete body with the expected ones.
    #[track_caller]
    fn check_features(body: &str, model: Option<&str>, characters: Option<u64>) {
        let expected = RequestBodyFeatures { model: model.map(Into::into), characters, duration_ms: None };
        assert_eq!(RequestBodyFeatures::parse(body.as_bytes(), true), expected);
    }

    #[test]
    fn the_model_and_the_characters_of_a_speech_request_are_extracted() {
        let model = Some("eleven_multilingual_v2");
        check_features(r#"{"text":"abc","model_id":"eleven_multilingual_v2"}"#, model, Some(3));
        check_features(r#" {"x":[{}],"text":"\u00e4\u00f6 \ud83d\ude00\n"}"#, None, Some(5));
        check_features(
            r#"{"model_id":"eleven_v3","inputs":[{"text":"ab","voice_id":"x"},{"text":"c"}]}"#,
            Some("eleven_v3"),
            Some(3),
        );
        check_features(r#"{"text":""}"#, None, Some(0));
        check_features("{}", None, None);
    }

    #[test]
    fn a_value_that_is_not_a_string_has_no_characters() {
        for value in ["3", "-3", "1.5", "true", "null", "[\"abc\"]", r#"{"text":"abc"}"#] {
            check_features(
                &format!("{{\"text\":{value},\"model_id\":\"eleven_v3\"}}"),
                Some("eleven_v3"),
                None,
            );
            check_features(&format!("{{\"text\":\"a\",\"model_id\":{value}}}"), None, Some(1));
        }
    }

    #[test]
    fn the_length_of_a_sound_effect_is_extracted() {
        for (seconds, ms) in
            [("2.5", Some(2_500)), ("0", Some(0)), ("-1", None), ("1e9", None), ("\"2\"", None), ("{}", None)]
        {
            let body = format!("{{\"text\":\"a\",\"duration_seconds\":{seconds}}}");
            let duration_ms = RequestBodyFeatures::parse(body.as_bytes(), true).duration_ms;
            assert_eq!(duration_ms, ms, "the length {seconds} must be converted or ignored as expected");
        }
    }

    #[test]
    fn the_model_in_a_form_is_extracted() {
        let form = |value: &str| {
            format!("--b\r\nContent-Disposition: form-data; name=\"model_id\"\r\n\r\n{value}\r\n--b\r\n…")
        };
        check_features(&form("scribe_v1"), Some("scribe_v1"), None);
        check_features(&form("a text"), None, None);
        check_features(&form("scribe_v1")[..60], None, None);
        check_features(&form("scribe_v1")[..10], None, None);
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
            check_features(&format!("{{\"model_id\":\"{name}\"}}"), None, None);
        }
    }

    #[test]
    fn a_truncated_document_has_no_features() {
        let body = br#"{"text":"abc","model_id":"eleven_v3"}"#;
        assert_eq!(RequestBodyFeatures::parse(body, false), RequestBodyFeatures::default());
        assert_eq!(RequestBodyFeatures::parse(&body[..20], true), RequestBodyFeatures::default());
    }

    proptest::proptest! {
        #[test]
        fn no_input_panics(body: Vec<u8>, is_complete: bool) {
            let _ = RequestBodyFeatures::parse(&body, is_complete);
        }

        #[test]
        fn every_text_is_counted_in_characters(text: String) {
            let body = serde_json::json!({"text": text}).to_string();
            let features = RequestBodyFeatures::parse(body.as_bytes(), true);
            proptest::prop_assert_eq!(features.characters, Some(text.chars().count() as u64));
        }
    }
}

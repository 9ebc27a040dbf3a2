//! Tests the counted characters and audio bytes of messages, whole and in chunks. Property tests compare the counter
//! with a parser that reads the whole message, and check that no message makes the counter panic.

use proptest::prelude::*;
use serde_json::{Map, Value, json};

use super::*;

/// Counts the content of a message that arrives in `chunks`.
fn count_message(dialect: Dialect, chunks: &[&[u8]]) -> MessageCount {
    let mut counter = ContentCounter::default();
    chunks.iter().for_each(|chunk| counter.count_chunk(chunk));
    counter.finish(dialect)
}

/// Checks the counted content of a message that arrives as a whole, and in chunks of one byte.
#[track_caller]
fn check_count(dialect: Dialect, message: &str, characters: u64, audio_bytes: u64) {
    let expected = ChargedContent { characters, audio_bytes };
    assert_eq!(
        count_message(dialect, &[message.as_bytes()]).content,
        expected,
        "{message} must have the expected content"
    );
    let bytes: Vec<&[u8]> = message.as_bytes().chunks(1).collect();
    assert_eq!(
        count_message(dialect, &bytes).content,
        expected,
        "{message} must have the expected content in chunks of one byte"
    );
}

#[test]
fn the_characters_of_a_text_are_counted() {
    check_count(Dialect::Speech, r#"{"text":"Hell\u00f6 "}"#, 6, 0);
    check_count(Dialect::Speech, "{\"text\":\"Hell\u{f6} \u{1f600}\"}", 7, 0);
    check_count(Dialect::Speech, r#"{"text":"\ud83d\ude00\ud83d"}"#, 2, 0);
    check_count(Dialect::Speech, r#"{"te\u0078t":"\"\\ab"}"#, 4, 0);
    check_count(Dialect::Speech, r#"{"text":" ","xi_api_key":"k"}"#, 0, 0);
    check_count(Dialect::Speech, r#"{"text":" \n\u0020"}"#, 0, 0);
    check_count(Dialect::Speech, r#"{"text":""}"#, 0, 0);
    check_count(Dialect::SpeechContexts, r#"{"text":null,"context_id":"a","flush":true}"#, 0, 0);
    check_count(Dialect::Speech, r#"{"text":"","text":"last"}"#, 4, 0);
    check_count(Dialect::Speech, r#"{"text":"first","text":7}"#, 0, 0);
    check_count(Dialect::Speech, r#"{"text":"still","inputs":0}"#, 5, 0);
    check_count(Dialect::Speech, r#"{"text":"hi","seed":NaN, "x": [-1.5e+3, {}, []] }"#, 2, 0);
    check_count(Dialect::Speech, r#"{"a":{"text":"deep"},"b":[{"text":"deep"}]}"#, 0, 0);
    check_count(Dialect::Agent, r#"{"type":"user_message","text":"hello"}"#, 0, 0);
}

#[test]
fn the_lines_of_a_dialogue_are_counted() {
    let dialogue = Dialect::Dialogue;
    check_count(
        dialogue,
        r#"{"inputs":[{"text":"ab","voice_id":"v"},{"text":"c"},{"text":" "}],"voices":["v"]}"#,
        3,
        0,
    );
    check_count(dialogue, r#"{"inputs":[{"text":"ab","text":"c"}]}"#, 1, 0);
    check_count(dialogue, r#"{"inputs":[{"text":"ab"}],"inputs":[{"text":"c"}],"text":"d"}"#, 2, 0);
    check_count(dialogue, r#"{"inputs":[[{"text":"ab"}],{"a":{"text":"c"}},"text"]}"#, 0, 0);
    check_count(dialogue, r#"{"inputs":{"x":{"text":"ab"}}}"#, 0, 0);
}

#[test]
fn all_bytes_of_a_malformed_message_are_counted() {
    for message in
        ["plain", "[]", "\u{feff}{}", r#"{"text":"x""#, r#"{"text":"\x"}"#, "{} {}", "{,}", "{a:1}"]
    {
        check_count(Dialect::Speech, message, message.len() as u64, 0);
        assert!(
            !count_message(Dialect::Speech, &[message.as_bytes()]).is_object,
            "{message} must not be an object"
        );
    }
    let too_deep_message = format!("{{\"a\":{}{}}}", "[".repeat(127), "]".repeat(127));
    check_count(Dialect::Speech, &too_deep_message, too_deep_message.len() as u64, 0);
    let deepest_message = format!("{{\"text\":\"x\",\"a\":{}{}}}", "[".repeat(126), "]".repeat(126));
    check_count(Dialect::Speech, &deepest_message, 1, 0);
}

#[test]
fn the_bytes_of_audio_are_counted() {
    let transcription = Dialect::Transcription;
    check_count(transcription, r#"{"message_type":"input_audio_chunk","audio_base_64":"AAAA"}"#, 0, 3);
    check_count(transcription, r#"{"audio_base_64":"AA==","commit":true}"#, 0, 1);
    check_count(transcription, r#"{"audio_base_64":"AA\u003d="}"#, 0, 1);
    check_count(transcription, r#"{"audio_base_64":"\/\/\/\/"}"#, 0, 3);
    check_count(transcription, r#"{"audio_base_64":""}"#, 0, 0);
    check_count(transcription, r#"{"text":"hello"}"#, 0, 0);
}

#[test]
fn audio_is_counted_before_the_message_ends() {
    let mut counter = ContentCounter::default();
    counter.count_chunk(br#"{"audio_base_64":"AAAA"#);
    assert_eq!(counter.audio_bytes_so_far(), 3);
    counter.count_chunk(br#"AAAA","commit":true"#);
    assert_eq!(counter.audio_bytes_so_far(), 6);
    counter.count_chunk(b"}");
    assert_eq!(counter.finish(Dialect::Transcription).content.audio_bytes, 6);
    assert_eq!(counter.audio_bytes_so_far(), 0);
}

#[test]
fn a_message_of_any_length_is_counted() {
    let padding = " ".repeat(2_000_000);
    check_count(
        Dialect::Speech,
        &format!("{{{padding}\"text\":\"{}\"{padding}}}", "x".repeat(80_021)),
        80_021,
        0,
    );
}

/// Counts the characters with a parser that reads the whole message.
fn count_by_parser(message: &[u8]) -> u64 {
    let Ok(members) = serde_json::from_slice::<Map<String, Value>>(message) else {
        return message.len() as u64;
    };
    let lines = members.get("inputs").and_then(Value::as_array).into_iter().flatten();
    let texts = lines.filter_map(|line| line.get("text")).chain(members.get("text"));
    let is_blank = |text: &str| text.chars().all(|char| char.is_ascii_whitespace());
    let spoken_characters = |text: &str| if is_blank(text) { 0 } else { text.chars().count() as u64 };
    texts.filter_map(Value::as_str).map(spoken_characters).sum()
}

/// Generates JSON values, some of which contain the names of counted members.
fn json_values() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<String>().prop_map(Value::from),
        " {0,3}|\t|a b".prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 40, 5, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
            prop::collection::hash_map("text|inputs|[a-z\"\\\\]{0,6}", inner, 0..5)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn the_counter_and_a_parser_count_the_same_characters(
        text in json_values(), inputs in json_values(), other in json_values(), is_pretty: bool,
        cuts in prop::collection::vec(1_usize..30, 0..60), truncated_length in prop::option::of(0_usize..100),
    ) {
        let message = json!({"a": other, "text": text, "inputs": inputs});
        let mut bytes = if is_pretty {
            serde_json::to_vec_pretty(&message).unwrap()
        } else {
            serde_json::to_vec(&message).unwrap()
        };
        if let Some(length) = truncated_length {
            bytes.truncate(length);
        }
        let (mut chunks, mut rest) = (Vec::new(), &bytes[..]);
        for cut in cuts {
            let (chunk, after) = rest.split_at(cut.min(rest.len()));
            chunks.push(chunk);
            rest = after;
        }
        chunks.push(rest);
        prop_assert_eq!(count_message(Dialect::Dialogue, &chunks).content.characters, count_by_parser(&bytes));
    }

    #[test]
    fn no_message_makes_the_counter_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = count_message(Dialect::Speech, &[&bytes]);
        let _ = count_message(Dialect::Transcription, &[b"{\"audio_base_64\":\"", &bytes]);
    }
}

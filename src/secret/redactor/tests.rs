//! Tests the search for keys, the redaction of texts and of streams, and the masking of payloads. Property tests
//! compare the search with a naive search, and the redaction of a stream with the redaction of the
//! whole text. Also tests that `Debug` prints no key.

use proptest::prelude::*;

use super::*;

/// A key of the current form, which is longer than the old form.
const LONG: &str = "sk_6c036526aaaabbbbccccddddeeeeffff0000111122223333d452b";
/// A key that differs from [`LONG`] only in its last character.
const TWIN: &str = "sk_6c036526aaaabbbbccccddddeeeeffff0000111122223333d452c";
/// A key of the old form.
const OLD: &str = "0123456789abcdef0123456789abcdef";

fn redactor(keys: &[&str]) -> Redactor {
    let keys: Vec<ApiKey> = keys.iter().map(|key| ApiKey::new(key).unwrap()).collect();
    Redactor::new(keys.iter())
}

/// Returns the output for each chunk and for the end of the stream.
fn redact_chunks(redactor: &Redactor, chunks: &[&[u8]]) -> Vec<String> {
    let mut redaction = StreamRedaction::default();
    let mut output: Vec<Vec<u8>> = chunks
        .iter()
        .map(|chunk| match redaction.redact_chunk(redactor, chunk) {
            RedactedChunk::Prefix(length) => chunk[..length].to_vec(),
            RedactedChunk::Replaced(bytes) => bytes,
        })
        .collect();
    output.push(redaction.finish());
    output.into_iter().map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).collect()
}

/// Asserts the redacted form of a text. `None` means that the text contains no key.
#[track_caller]
fn assert_redacted(text: &str, expected: Option<&str>) {
    let redacted = redactor(&[LONG, TWIN, OLD]).redact(text.as_bytes());
    assert_eq!(redacted, expected.map(|text| text.as_bytes().to_vec()));
}

#[test]
fn a_key_becomes_its_short_form_at_any_position() {
    assert_redacted(LONG, Some("sk_6c036526...d452b"));
    assert_redacted(&format!("{{\"key\":\"{LONG}\"}}"), Some(r#"{"key":"sk_6c036526...d452b"}"#));
    assert_redacted(
        &format!("{TWIN}{LONG} {OLD}0"),
        Some("sk_6c036526...d452csk_6c036526...d452b 0123...cdef0"),
    );
    assert_redacted(
        &format!("s{}sk_{LONG}", &LONG[..40]),
        Some(&format!("s{}sk_sk_6c036526...d452b", &LONG[..40])),
    );
}

#[test]
fn text_that_differs_from_a_key_is_unchanged() {
    assert_redacted(&LONG[1..], None);
    assert_redacted(&LONG[..LONG.len() - 1], None);
    assert_redacted(&LONG.replace("cccc", "cccd"), None);
    assert_redacted("", None);
    assert_eq!(redactor(&[]).redact(LONG.as_bytes()), None);
}

#[test]
fn masking_does_not_change_the_length() {
    let redactor = redactor(&[LONG, OLD]);
    let mut text = format!("a {LONG} b {OLD}{OLD} sk_6c036").into_bytes();
    let length = text.len();
    assert_eq!(redactor.mask_keys(&mut text), "sk_6c036".len());
    let masked = String::from_utf8(text).unwrap();
    assert_eq!(masked.len(), length);
    assert!(
        masked.starts_with("a sk_6c036526...") && masked.contains("...d452b b 0123..."),
        "the text must contain the short forms: {masked}"
    );
    assert!(
        !masked.contains(&LONG[11..20]) && !masked.contains(&OLD[4..12]),
        "the text must not contain the hidden characters of a key: {masked}"
    );
    assert_eq!(redactor.mask_keys(&mut []), 0);
}

#[test]
fn a_short_key_is_not_searched_for() {
    assert_eq!(redactor(&["0123456789abcde"]).redact(b"0123456789abcde"), None);
    assert_eq!(redactor(&["0123456789abcdef"]).redact(b"0123456789abcdef"), Some(b"0123...cdef".to_vec()));
}

#[test]
fn a_key_whose_prefix_is_another_key_is_replaced_completely() {
    let longer = format!("{OLD}{OLD}");
    let text = redactor(&[OLD, &longer]).redact(longer.as_bytes()).unwrap();
    assert_eq!(text, b"0123456789a...bcdef");
}

#[test]
fn a_chunk_is_held_back_only_until_a_key_is_ruled_out() {
    let redactor = redactor(&[LONG, OLD]);
    assert_eq!(redact_chunks(&redactor, &[b"data: sk", b"ill"]), ["data: sk", "ill", ""]);
    assert_eq!(redact_chunks(&redactor, &[b"data: sk_6", b"x"]), ["data: sk_6", "x", ""]);
    assert_eq!(redact_chunks(&redactor, &[b"data: sk_6c0", b"x"]), ["data: sk_6", "c0x", ""]);
    assert_eq!(redact_chunks(&redactor, &[b"data: sk_6c0"]), ["data: sk_6", "c0"]);
    let (start, end) = LONG.split_at(30);
    assert_eq!(
        redact_chunks(&redactor, &[start.as_bytes(), end.as_bytes(), b"."]),
        ["sk_6", "c036526...d452b", ".", ""]
    );
}

proptest! {
    #[test]
    fn the_first_and_longest_key_is_found(
        keys in prop::collection::vec("[ab]{16,19}|sk_[0-9a-f]{20}", 1..30),
        parts in prop::collection::vec("[ab]{0,20}|sk_[0-9a-f]{0,3}|[0-9a-f]{1,4}", 0..12),
        indices in prop::collection::vec(0_usize..30, 0..12),
    ) {
        let key_values: Vec<&str> = keys.iter().map(String::as_str).collect();
        let text: String = parts
            .iter()
            .enumerate()
            .map(|(position, part)| {
                part.clone() + indices.get(position).map_or("", |index| key_values[index % key_values.len()])
            })
            .collect();
        // A naive search for comparison.
        let expected = (0..text.len()).find_map(|offset| {
            let candidates = key_values.iter().filter(|key| text[offset..].starts_with(**key));
            candidates.max_by_key(|key| key.len()).map(|key| (offset, (*key).to_owned()))
        });
        let redactor = redactor(&key_values);
        let first_key = redactor
            .find_next(text.as_bytes(), 0)
            .map(|(offset, key)| (offset, String::from_utf8(key.bytes.clone()).unwrap()));
        prop_assert_eq!(first_key, expected);
    }
}

/// Escapes each character of `text` with the next function of `escapes`, in rotation.
fn escape(text: &str, escapes: &[fn(u8) -> String]) -> String {
    text.bytes().enumerate().map(|(index, byte)| escapes[index % escapes.len()](byte)).collect()
}

fn plain_byte(byte: u8) -> String {
    char::from(byte).to_string()
}

fn json_escape(byte: u8) -> String {
    format!("\\u{byte:04x}")
}

fn nested_json_escape(byte: u8) -> String {
    format!("\\\\u{byte:04X}")
}

fn yaml_escape(byte: u8) -> String {
    format!("\\x{byte:02x}")
}

#[test]
fn a_key_is_found_in_every_kind_of_escape() {
    for escapes in [
        &[json_escape as fn(u8) -> String][..],
        &[json_escape, plain_byte],
        &[plain_byte, plain_byte, plain_byte, json_escape],
        &[nested_json_escape],
        &[yaml_escape],
    ] {
        let key = escape(LONG, escapes);
        assert_redacted(&format!("{{\"key\":\"{key}\\n\"}}"), Some("{\"key\":\"sk_6c036526...d452b\\n\"}"));
        let redactor = redactor(&[LONG]);
        assert!(redactor.contains_key(key.as_bytes()));
        let mut text = format!("a {key} b").into_bytes();
        let length = text.len();
        assert_eq!(redactor.mask_keys(&mut text), 0);
        assert_eq!(text.len(), length);
        assert!(!redactor.contains_key(&text) && text.starts_with(b"a ") && text.ends_with(b" b"));
        assert_redacted(&escape(&LONG[1..], escapes), None);
    }
}

#[test]
fn a_key_is_found_in_utf_16() {
    for encoding in [KeyEncoding::Utf16Le, KeyEncoding::Utf16Be] {
        let text = encoding.encode(format!("\"{LONG}\".").as_bytes());
        let redacted = encoding.encode(b"\"sk_6c036526...d452b\".");
        let redactor = redactor(&[LONG]);
        assert_eq!(redactor.redact(&text), Some(redacted));
        let mut masked = text.clone();
        redactor.mask_keys(&mut masked);
        assert_eq!(masked.len(), text.len());
        assert!(
            masked.starts_with(&encoding.encode(b"\"sk_6c036526...")),
            "the text must contain the short form: {masked:?}"
        );
        assert!(!redactor.contains_key(&masked));
    }
}

#[test]
fn binary_payloads_are_searched() {
    let redactor = redactor(&[LONG]);
    let binary = [&[0, 255, 128, b's'][..], LONG.as_bytes(), &[0, 1, 2]].concat();
    assert!(redactor.contains_key(&binary));
    assert!(!redactor.contains_key(&binary[..binary.len() - 4]));
}

#[test]
fn the_shown_bytes_of_a_partial_key_are_not_counted() {
    let redactor = redactor(&[LONG]);
    for (text, partial_length) in
        [("x", 0), ("sk_6c0", 2), ("sk_6", 0), ("a\\u00", 4), ("sk\\u005f", 6), (LONG, 0)]
    {
        assert_eq!(
            redactor.partial_key_length(text.as_bytes()),
            partial_length,
            "the hidden bytes of the partial key in {text} must be counted"
        );
    }
}

#[test]
fn a_masked_partial_key_shows_no_more_than_its_short_form() {
    let redactor = redactor(&[LONG]);
    let mask = |text: &[u8]| {
        let mut text = text.to_vec();
        redactor.mask_partial_key(&mut text);
        text
    };
    for (text, expected) in [
        ("sk_6c0", "sk_6c0"),
        ("sk_6c036526", "sk_6c036526"),
        ("sk_6c036526aaaa", "sk_6c036526...."),
        ("sk_6c036526\\u0061a\\u00", "sk_6c036526..........."),
        ("\\u0073k_6c036526a", "\\u0073k_6c036526."),
        ("\\u00", "\\u00"),
        ("x", "x"),
        ("", ""),
    ] {
        assert_eq!(String::from_utf8(mask(text.as_bytes())).unwrap(), expected);
    }
    for encoding in [KeyEncoding::Utf16Le, KeyEncoding::Utf16Be] {
        assert_eq!(mask(&encoding.encode(b"sk_6c036526aaaa")), encoding.encode(b"sk_6c036526...."));
    }
}

#[test]
fn debug_does_not_print_a_key() {
    let redactor = redactor(&[LONG]);
    assert!(!format!("{redactor:?}").contains("6c03"));
}

/// Fragments of keys, of escapes and of other text.
fn fragments() -> impl Strategy<Value = Vec<u8>> {
    let texts =
        ["sk_", LONG, TWIN, OLD, "sk_6c0365", "0123456789", "\\", "\\u00", "%", "&#", "\\n", "a", "\\u0073"];
    let plain = prop::sample::select(texts.map(|text| text.as_bytes().to_vec()).to_vec());
    let escaped = prop::sample::select(vec![LONG, OLD]).prop_flat_map(|key| {
        let escapes = vec![json_escape as fn(u8) -> String, nested_json_escape, yaml_escape, plain_byte];
        prop::sample::subsequence(escapes, 1..4).prop_map(move |escapes| escape(key, &escapes).into_bytes())
    });
    let utf_16 = prop::sample::select(vec![KeyEncoding::Utf16Le, KeyEncoding::Utf16Be])
        .prop_map(|encoding| encoding.encode(LONG.as_bytes()));
    prop_oneof![4 => plain, 2 => escaped, 1 => utf_16, 1 => "[0-9a-f\\\\ux]{0,3}".prop_map(String::into_bytes)]
}

proptest! {
    #[test]
    fn chunks_are_redacted_like_the_whole_text(
        fragments in prop::collection::vec(fragments(), 0..12),
        chunk_lengths in prop::collection::vec(1_usize..40, 0..60),
    ) {
        let redactor = redactor(&[LONG, TWIN, OLD]);
        let text = fragments.concat();
        let mut rest = &text[..];
        let mut chunks = Vec::new();
        for length in chunk_lengths {
            let (chunk, remaining) = rest.split_at(length.min(rest.len()));
            chunks.push(chunk);
            rest = remaining;
        }
        chunks.push(rest);
        let output = redact_chunks(&redactor, &chunks).concat();
        let expected = redactor.redact(&text).unwrap_or(text);
        prop_assert_eq!(output, String::from_utf8_lossy(&expected));
    }
}

//! Searches a message for content that a proxy must not forward: a client's credential in a field that the provider
//! reads, or a forbidden text in any field.

use memchr::memmem;
use serde_json::Value;

/// Fields in which clients send credentials (the Python SDK 2.78 and examples of the documentation).
const CREDENTIAL_FIELDS: [&str; 3] = ["xi_api_key", "xi-api-key", "authorization"];

/// The violations in a message, and whether it contains a credential.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct MessageCheck {
    /// Descriptions of the violations, without the content itself.
    pub(super) violations: Vec<String>,
    /// Whether the message contains a credential, valid or not.
    pub(super) has_credential: bool,
}

/// Returns the credential in a message, without the prefix of a bearer token.
pub(super) fn credential_of(message: &Value) -> Option<&str> {
    let credential = CREDENTIAL_FIELDS.iter().find_map(|name| message.get(name)).and_then(Value::as_str)?;
    Some(strip_bearer(credential))
}

/// Removes the prefix of a bearer token.
fn strip_bearer(credential: &str) -> &str {
    credential.strip_prefix("Bearer ").unwrap_or(credential)
}

/// Checks a text message, whose parsed document is `message` if it is JSON. If `may_contain_key` is true, the head
/// contains no key, and the message may contain a key of the plan. `is_known` returns whether a key is in the plan.
pub(super) fn check_text(
    text: &str,
    message: Option<&Value>,
    forbidden_texts: &[String],
    may_contain_key: bool,
    is_known: impl Fn(&str) -> bool,
) -> MessageCheck {
    let mut check = MessageCheck::default();
    for name in CREDENTIAL_FIELDS {
        let Some(value) = message.and_then(|message| message.get(name)) else { continue };
        // The SDK writes unset fields as null.
        if value.is_null() {
            continue;
        }
        check.has_credential = true;
        let is_known_key = value.as_str().is_some_and(|credential| is_known(strip_bearer(credential)));
        if !is_known_key || !may_contain_key {
            check.violations.push(format!("the member {name} was forwarded in a message"));
        }
    }
    check.violations.extend(find_forbidden_texts(forbidden_texts, |forbidden_text| {
        text.contains(forbidden_text) || message.is_some_and(|message| contains_text(message, forbidden_text))
    }));
    check
}

/// Checks a binary message, which can contain only a forbidden text.
pub(super) fn check_binary(bytes: &[u8], forbidden_texts: &[String]) -> MessageCheck {
    let violations = find_forbidden_texts(forbidden_texts, |forbidden_text| {
        memmem::find(bytes, forbidden_text.as_bytes()).is_some()
    });
    MessageCheck { violations, has_credential: false }
}

/// Describes the forbidden texts that a message contains, by their numbers.
fn find_forbidden_texts(forbidden_texts: &[String], contains: impl Fn(&str) -> bool) -> Vec<String> {
    let found_texts = forbidden_texts.iter().zip(1..).filter(|(text, _)| contains(text));
    found_texts
        .map(|(_, number)| {
            format!("forbidden text {number} of {} was forwarded in a message", forbidden_texts.len())
        })
        .collect()
}

/// Returns whether any string in a JSON document contains `text`. The parser has decoded escapes and limited
/// the depth.
fn contains_text(value: &Value, text: &str) -> bool {
    match value {
        Value::String(string) => string.contains(text),
        Value::Array(list) => list.iter().any(|value| contains_text(value, text)),
        Value::Object(members) => {
            members.iter().any(|(name, value)| name.contains(text) || contains_text(value, text))
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_violations(message: &str, may_contain_key: bool, expected: &[&str]) {
        let document = serde_json::from_str(message).ok();
        let forbidden_texts = ["choir_client".to_owned()];
        let check =
            check_text(message, document.as_ref(), &forbidden_texts, may_contain_key, |key| key == "sk");
        assert_eq!(check.violations, expected, "this message must have these violations: {message}");
    }

    #[test]
    fn a_credential_is_a_violation_unless_it_is_a_known_key_and_the_only_one() {
        check_violations(r#"{"text":" "}"#, true, &[]);
        check_violations(r#"{"text":" ","xi_api_key":null}"#, false, &[]);
        for name in CREDENTIAL_FIELDS {
            let expected = format!("the member {name} was forwarded in a message");
            check_violations(&format!(r#"{{"{name}":"sk"}}"#), true, &[]);
            check_violations(&format!(r#"{{"{name}":"Bearer sk"}}"#), true, &[]);
            check_violations(&format!(r#"{{"{name}":"sk"}}"#), false, &[&expected]);
            check_violations(&format!(r#"{{"{name}":"other"}}"#), true, &[&expected]);
            check_violations(&format!(r#"{{"{name}":7}}"#), true, &[&expected]);
        }
    }

    #[test]
    fn a_forbidden_text_is_found_however_it_is_written() {
        let expected = ["forbidden text 1 of 1 was forwarded in a message"];
        for message in [
            "no JSON with choir_client in it",
            r#"{"a":[{"b":"xchoir_clientx"}]}"#,
            r#"{"a":"\u0063hoir_client"}"#,
            r#"{"choir\u005fclient":1}"#,
        ] {
            check_violations(message, true, &expected);
        }
        let forbidden_texts = ["choir_client".to_owned()];
        assert_eq!(check_binary(b"\xffchoir_client", &forbidden_texts).violations, expected);
        assert_eq!(check_binary(b"\xffchoir", &forbidden_texts).violations, [] as [String; 0]);
    }
}

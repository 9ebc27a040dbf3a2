//! Checks a message for content that a proxy must not forward: a client's credential in a field
//! that the provider reads, or a forbidden text in any field.

use serde_json::Value;

/// Fields in which clients send credentials (the Python SDK 2.78 and examples of the
/// documentation).
pub(super) const CREDENTIALS: [&str; 3] = ["xi_api_key", "xi-api-key", "authorization"];

/// The result of a check.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct MessageCheck {
    /// The violations, described without the forbidden value.
    pub(super) violations: Vec<String>,
    /// Whether the message contains a credential, valid or not.
    pub(super) has_credential: bool,
}

/// The credential in a message, without the prefix of a bearer token.
pub(super) fn credential_of(message: &Value) -> Option<&str> {
    let text = CREDENTIALS.iter().find_map(|name| message.get(name)).and_then(Value::as_str)?;
    Some(text.strip_prefix("Bearer ").unwrap_or(text))
}

/// Checks a text message. `may_present` is set if the message may contain a key of the plan,
/// because the head had no key. `is_known` returns whether a key is in the plan.
pub(super) fn text(
    text: &str,
    message: Option<&Value>,
    forbidden: &[String],
    may_present: bool,
    is_known: impl Fn(&str) -> bool,
) -> MessageCheck {
    let mut check = MessageCheck::default();
    for name in CREDENTIALS {
        let Some(value) = message.and_then(|message| message.get(name)) else { continue };
        // The SDK writes unset fields as null.
        if value.is_null() {
            continue;
        }
        check.has_credential = true;
        let is_known_key =
            value.as_str().is_some_and(|value| is_known(value.strip_prefix("Bearer ").unwrap_or(value)));
        if !is_known_key || !may_present {
            check.violations.push(format!("the member {name} arrived in a message"));
        }
    }
    for (index, secret) in forbidden.iter().enumerate() {
        if text.contains(secret.as_str()) || message.is_some_and(|message| contains(message, secret)) {
            check.violations.push(format!(
                "forbidden text {} of {} arrived in a message",
                index + 1,
                forbidden.len()
            ));
        }
    }
    check
}

/// Checks a binary message.
pub(super) fn binary(bytes: &[u8], forbidden: &[String]) -> MessageCheck {
    let matches = forbidden
        .iter()
        .enumerate()
        .filter(|(_, secret)| bytes.windows(secret.len()).any(|window| window == secret.as_bytes()));
    let violations = matches.map(|(index, _)| {
        format!("forbidden text {} of {} arrived in a message", index + 1, forbidden.len())
    });
    MessageCheck { violations: violations.collect(), has_credential: false }
}

/// Whether a string anywhere in a JSON document contains `text`. The parser has decoded escapes and
/// limits the depth.
fn contains(value: &Value, text: &str) -> bool {
    match value {
        Value::String(string) => string.contains(text),
        Value::Array(list) => list.iter().any(|value| contains(value, text)),
        Value::Object(members) => {
            members.iter().any(|(name, value)| name.contains(text) || contains(value, text))
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_text(message: &str, may_present: bool, expected: &[&str]) {
        let value = serde_json::from_str(message).ok();
        let forbidden = ["choir_client".to_owned()];
        let result = text(message, value.as_ref(), &forbidden, may_present, |key| key == "sk");
        assert_eq!(result.violations, expected, "{message}");
    }

    #[test]
    fn a_credential_is_a_violation_unless_it_is_a_known_key_and_the_only_one() {
        check_text(r#"{"text":" "}"#, true, &[]);
        check_text(r#"{"text":" ","xi_api_key":null}"#, false, &[]);
        for name in CREDENTIALS {
            let expected = format!("the member {name} arrived in a message");
            check_text(&format!(r#"{{"{name}":"sk"}}"#), true, &[]);
            check_text(&format!(r#"{{"{name}":"Bearer sk"}}"#), true, &[]);
            check_text(&format!(r#"{{"{name}":"sk"}}"#), false, &[&expected]);
            check_text(&format!(r#"{{"{name}":"other"}}"#), true, &[&expected]);
            check_text(&format!(r#"{{"{name}":7}}"#), true, &[&expected]);
        }
    }

    #[test]
    fn a_forbidden_text_is_found_however_it_is_written() {
        let expected = ["forbidden text 1 of 1 arrived in a message"];
        for message in [
            "no JSON with choir_client in it",
            r#"{"a":[{"b":"xchoir_clientx"}]}"#,
            r#"{"a":"\u0063hoir_client"}"#,
            r#"{"choir\u005fclient":1}"#,
        ] {
            check_text(message, true, &expected);
        }
        let forbidden = ["choir_client".to_owned()];
        assert_eq!(binary(b"\xffchoir_client", &forbidden).violations, expected);
        assert_eq!(binary(b"\xffchoir", &forbidden).violations, [] as [String; 0]);
    }
}

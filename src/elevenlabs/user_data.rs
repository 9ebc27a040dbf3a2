//! Redacts the responses of `GET /v1/user` and `/v1/user/subscription`: a client of the pool gets only
//! the fields listed here.
//!
//! Credits, limits and features of the plan are listed, because apps read them. Names, email addresses,
//! invoices, and fields that the provider adds later describe the owner of the key and are removed.
//!
//! Source: `UserResponseModel` and `ExtendedSubscriptionResponseModel` of the provider's OpenAPI document
//! (August 2026), and the models of its SDKs, which must still parse the redacted document.

use serde_json::{Map, Value, json};

/// How a listed field is treated.
#[derive(Clone, Copy)]
enum Field {
    /// A number, a flag or a short word is kept; any other value is removed.
    Plain,
    /// The SDK models require the field: its value becomes `null`.
    Null,
    /// The SDK models require the field: its value becomes an empty list.
    EmptyList,
    /// The SDK models require the field: its value becomes `false`.
    False,
    /// The SDK models require the field: its value becomes a placeholder for an identifier.
    Placeholder,
    /// A sentence of a refusal, without email addresses.
    Sentence,
    /// An object of listed fields.
    Object(&'static [(&'static str, Field)]),
}

use Field::{EmptyList, False, Null, Object, Placeholder, Plain, Sentence};

#[rustfmt::skip] // a table
const SUBSCRIPTION: &[(&str, Field)] = &[
    ("tier", Plain), ("status", Plain), ("currency", Plain), ("billing_period", Plain),
    ("character_refresh_period", Plain), ("character_count", Plain), ("character_limit", Plain),
    ("max_character_limit_extension", Plain), ("max_credit_limit_extension", Plain),
    ("can_extend_character_limit", Plain), ("allowed_to_extend_character_limit", Plain),
    ("next_character_count_reset_unix", Plain), ("voice_slots_used", Plain),
    ("professional_voice_slots_used", Plain), ("professional_voice_slots_used_in_workspace", Plain),
    ("voice_limit", Plain), ("max_voice_add_edits", Plain), ("voice_add_edit_counter", Plain),
    ("professional_voice_limit", Plain), ("can_extend_voice_limit", Plain),
    ("can_use_instant_voice_cloning", Plain), ("can_use_professional_voice_cloning", Plain),
    ("has_used_starter_coupon_on_account", Plain), ("has_used_creator_coupon_on_account", Plain),
    ("current_overage", Object(&[("amount", Plain), ("currency", Plain)])),
    ("next_invoice", Null), ("pending_change", Null), ("open_invoices", EmptyList), ("has_open_invoices", False),
];

#[rustfmt::skip] // a table
const USER: &[(&str, Field)] = &[
    ("is_new_user", Plain), ("can_use_delayed_payment_methods", Plain), ("is_onboarding_completed", Plain),
    ("is_onboarding_checklist_completed", Plain), ("show_compliance_terms", Plain), ("is_api_key_hashed", Plain),
    ("created_at", Plain), ("seat_type", Plain), ("subscription", Object(SUBSCRIPTION)),
    ("user_id", Placeholder), ("workspace_id", Placeholder), ("first_name", Null), ("xi_api_key", Null), ("xi_api_key_preview", Null),
    ("referral_link_code", Null), ("partnerstack_partner_default_link", Null),
];

/// The fields of a refusal. The input that a validation error quotes from the request is not listed.
#[rustfmt::skip] // a table
const REFUSAL: &[(&str, Field)] = &[
    ("status", Plain), ("code", Plain), ("type", Plain), ("param", Plain), ("request_id", Plain),
    ("message", Sentence), ("msg", Sentence),
];

/// Maximum length of a word; longer texts are not words of the API.
const WORD_BYTES_MAX: usize = 64;

/// Sentences of a refusal are cut at this length.
const SENTENCE_CHARS_MAX: usize = 500;

/// The document with its listed fields only; `None` when it is not a JSON object. Responses of every
/// status are redacted.
#[must_use]
pub fn redacted(document: &[u8]) -> Option<Vec<u8>> {
    let document: Map<String, Value> = serde_json::from_slice(document).ok()?;
    let mut redacted_fields = Map::new();
    for (name, value) in document {
        let value = match name.as_str() {
            "detail" => refusal(value),
            name => field(name, value, &[USER, SUBSCRIPTION]),
        };
        if let Some(value) = value {
            redacted_fields.insert(name, value);
        }
    }
    serde_json::to_vec(&redacted_fields).ok()
}

/// The body that replaces a refusal that cannot be redacted.
#[must_use]
pub fn withheld() -> Vec<u8> {
    let message = "Keychoir withholds this answer: it may describe the owner of the API key.";
    json!({"detail": {"status": "answer_withheld", "message": message}}).to_string().into_bytes()
}

/// The redacted value of a field; `None` for a field that is not listed.
fn field(name: &str, value: Value, lists: &[&[(&str, Field)]]) -> Option<Value> {
    let (_, field) = lists.iter().copied().flatten().find(|(listed, _)| *listed == name)?;
    match (field, value) {
        (Plain, value) => is_plain(&value).then_some(value),
        (Null, _) => Some(Value::Null),
        (EmptyList, _) => Some(json!([])),
        (False, _) => Some(json!(false)),
        (Placeholder, _) => Some(json!("redacted")),
        (Sentence, Value::String(text)) => Some(Value::String(sentence(&text))),
        (Object(listed), Value::Object(fields)) => Some(object(fields, listed)),
        (Object(_) | Sentence, _) => None,
    }
}

fn object(fields: Map<String, Value>, listed: &[(&str, Field)]) -> Value {
    let redacted_fields = fields.into_iter().filter_map(|(name, value)| {
        let value = field(&name, value, &[listed])?;
        Some((name, value))
    });
    Value::Object(redacted_fields.collect())
}

/// The redacted `detail`: an object, a sentence, or a list of objects.
fn refusal(detail: Value) -> Option<Value> {
    match detail {
        Value::Object(fields) => Some(object(fields, REFUSAL)),
        Value::String(text) => Some(Value::String(sentence(&text))),
        Value::Array(list) => {
            let fields = list.into_iter().filter_map(|element| match element {
                Value::Object(fields) => Some(object(fields, REFUSAL)),
                Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => None,
            });
            Some(fields.collect())
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => None,
    }
}

fn is_plain(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => true,
        Value::String(text) => {
            let is_of_word = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte);
            text.len() <= WORD_BYTES_MAX && text.bytes().all(is_of_word)
        }
        Value::Array(_) | Value::Object(_) => false,
    }
}

/// The sentence without email addresses.
fn sentence(text: &str) -> String {
    let words = text.split(' ').map(|word| if word.contains('@') { "..." } else { word });
    words.collect::<Vec<_>>().join(" ").chars().take(SENTENCE_CHARS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(document: &Value, expected: &Value) {
        let redacted = redacted(document.to_string().as_bytes()).unwrap();
        assert_eq!(&serde_json::from_slice::<Value>(&redacted).unwrap(), expected);
    }

    #[test]
    fn personal_fields_are_removed_and_credits_are_kept() {
        check(
            &json!({
                "user_id": "u-1", "workspace_id": "w-1", "first_name": "John", "xi_api_key": "sk_1", "xi_api_key_preview": "sk_...1",
                "referral_link_code": "r", "partnerstack_partner_default_link": "https://p", "is_new_user": false,
                "created_at": 1_700_000_000, "seat_type": "workspace_admin",
                "subscription": {
                    "tier": "creator", "character_count": 5, "next_invoice": {"amount_due_cents": 1},
                    "current_overage": {"amount": "0", "currency": "usd", "payer": "John"},
                },
            }),
            &json!({
                "user_id": "redacted", "workspace_id": "redacted", "first_name": null, "xi_api_key": null, "xi_api_key_preview": null,
                "referral_link_code": null, "partnerstack_partner_default_link": null, "is_new_user": false,
                "created_at": 1_700_000_000, "seat_type": "workspace_admin",
                "subscription": {
                    "tier": "creator", "character_count": 5, "next_invoice": null,
                    "current_overage": {"amount": "0", "currency": "usd"},
                },
            }),
        );
    }

    #[test]
    fn invoices_are_removed() {
        check(
            &json!({
                "character_limit": 100_000, "max_credit_limit_extension": "unlimited",
                "next_invoice": {"amount_due_cents": 2_200}, "open_invoices": [{"amount_due_cents": 2_200}],
                "has_open_invoices": true, "pending_change": {"kind": "cancellation"},
            }),
            &json!({
                "character_limit": 100_000, "max_credit_limit_extension": "unlimited",
                "next_invoice": null, "open_invoices": [], "has_open_invoices": false, "pending_change": null,
            }),
        );
    }

    #[test]
    fn an_unlisted_field_is_removed_at_any_position() {
        let owner = json!({"first_name": "John", "email": "john@example.com", "tier": "creator"});
        for document in [
            json!({"email": "john@example.com", "last_name": "Doe", "workspace_name": "John's"}),
            json!({"user": owner, "users": [owner], "data": {"user": owner}, "error": owner}),
            json!({"tier": owner, "tier_name": "John", "character_count": ["John"]}),
            json!({"tier": "john@example.com"}),
            json!({"Tier": "creator"}),
        ] {
            check(&document, &json!({}));
        }
        check(&json!({"subscription": {"owner": owner, "email": "j@x"}}), &json!({"subscription": {}}));
        check(&json!({"subscription": "John"}), &json!({}));
    }

    #[test]
    fn a_refusal_keeps_its_listed_fields() {
        check(
            &json!({"detail": {"status": "invalid_api_key", "message": "Invalid API key", "email": "j@x"}}),
            &json!({"detail": {"status": "invalid_api_key", "message": "Invalid API key"}}),
        );
        check(&json!({"detail": "User j@x is gone"}), &json!({"detail": "User ... is gone"}));
        check(
            &json!({"detail": [{"loc": ["query"], "msg": "field required", "type": "missing", "input": "John"}]}),
            &json!({"detail": [{"msg": "field required", "type": "missing"}]}),
        );
        check(&json!({"detail": {"message": {"first_name": "John"}}}), &json!({"detail": {}}));
        assert!(redacted(&withheld()).is_some_and(|redacted_fields| redacted_fields == withheld()));
    }

    #[test]
    fn no_field_is_added() {
        check(&json!({"tier": "free"}), &json!({"tier": "free"}));
    }

    #[test]
    fn a_body_that_is_no_object_is_not_redacted() {
        for text in ["", "[]", "null", "<html>", "{\"first_name\":\"J"] {
            assert_eq!(redacted(text.as_bytes()), None);
        }
    }
}

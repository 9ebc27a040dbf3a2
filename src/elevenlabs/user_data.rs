//! Redacts the responses to `GET /v1/user` and `/v1/user/subscription`: a client of the pool receives only the fields
//! that this file lists. Also creates the body that replaces a response that cannot be redacted.
//!
//! Credits, limits and features of the plan are listed, because apps read them. All other fields are removed, because
//! names, email addresses and invoices describe the account holder. Fields that the provider adds later may also
//! describe the account holder.
//!
//! Sources: `UserResponseModel` and `ExtendedSubscriptionResponseModel` of the provider's OpenAPI document
//! (August 2026), and the models of its SDKs, which must still parse the redacted document.

use serde_json::{Map, Value, json};

/// The redaction of a listed field.
#[derive(Clone, Copy)]
enum Redaction {
    /// A number, a flag, `null` or a short word is unchanged. Any other value is removed.
    Keep,
    /// The SDK models require the field: its value becomes `null`.
    Null,
    /// The SDK models require the field: its value becomes an empty list.
    EmptyList,
    /// The SDK models require the field: its value becomes `false`.
    False,
    /// The SDK models require the field: its value becomes a placeholder for an identifier.
    Placeholder,
    /// A text is truncated and its email addresses are replaced. Any other value is removed.
    Message,
    /// The fields of an object are redacted by another list. Any other value is removed.
    Object(&'static [(&'static str, Redaction)]),
}

use Redaction::{EmptyList, False, Keep, Message, Null, Object, Placeholder};

/// The fields of a subscription.
#[rustfmt::skip] // Each line has several fields.
const SUBSCRIPTION: &[(&str, Redaction)] = &[
    ("tier", Keep), ("status", Keep), ("currency", Keep), ("billing_period", Keep),
    ("character_refresh_period", Keep), ("character_count", Keep), ("character_limit", Keep),
    ("max_character_limit_extension", Keep), ("max_credit_limit_extension", Keep),
    ("can_extend_character_limit", Keep), ("allowed_to_extend_character_limit", Keep),
    ("next_character_count_reset_unix", Keep), ("voice_slots_used", Keep),
    ("professional_voice_slots_used", Keep), ("professional_voice_slots_used_in_workspace", Keep),
    ("voice_limit", Keep), ("max_voice_add_edits", Keep), ("voice_add_edit_counter", Keep),
    ("professional_voice_limit", Keep), ("can_extend_voice_limit", Keep),
    ("can_use_instant_voice_cloning", Keep), ("can_use_professional_voice_cloning", Keep),
    ("has_used_starter_coupon_on_account", Keep), ("has_used_creator_coupon_on_account", Keep),
    ("current_overage", Object(&[("amount", Keep), ("currency", Keep)])),
    ("next_invoice", Null), ("pending_change", Null), ("open_invoices", EmptyList), ("has_open_invoices", False),
];

/// The fields of a user.
#[rustfmt::skip] // Each line has several fields.
const USER: &[(&str, Redaction)] = &[
    ("is_new_user", Keep), ("can_use_delayed_payment_methods", Keep), ("is_onboarding_completed", Keep),
    ("is_onboarding_checklist_completed", Keep), ("show_compliance_terms", Keep), ("is_api_key_hashed", Keep),
    ("created_at", Keep), ("seat_type", Keep), ("subscription", Object(SUBSCRIPTION)),
    ("user_id", Placeholder), ("workspace_id", Placeholder), ("first_name", Null), ("xi_api_key", Null),
    ("xi_api_key_preview", Null),
    ("referral_link_code", Null), ("partnerstack_partner_default_link", Null),
];

/// The fields of a refusal. The input of the request that a validation error contains is not listed.
#[rustfmt::skip] // Each line has several fields.
const REFUSAL: &[(&str, Redaction)] = &[
    ("status", Keep), ("code", Keep), ("type", Keep), ("param", Keep), ("request_id", Keep),
    ("message", Message), ("msg", Message),
];

/// Maximum length of a kept word. All words of the API are shorter.
const MAX_WORD_BYTES: usize = 64;

/// Maximum length of the message of a refusal. Longer messages are truncated.
const MAX_MESSAGE_CHARS: usize = 500;

/// Returns the document with only its listed fields, or `None` if the document is not a JSON object. The document may
/// be the body of a response with any status.
#[must_use]
pub fn redact(document: &[u8]) -> Option<Vec<u8>> {
    let fields: Map<String, Value> = serde_json::from_slice(document).ok()?;
    let redacted_fields = redact_fields(fields, |name, value| match name {
        "detail" => redact_refusal(value),
        name => redact_value(name, value, &[USER, SUBSCRIPTION]),
    });
    serde_json::to_vec(&redacted_fields).ok()
}

/// Returns the body that replaces a response that cannot be redacted.
#[must_use]
pub fn withheld_body() -> Vec<u8> {
    let message = "Keychoir withholds this response: it may describe the owner of the API key.";
    json!({"detail": {"status": "answer_withheld", "message": message}}).to_string().into_bytes()
}

/// Redacts each field with `redact_field`, and removes the fields for which it returns `None`.
fn redact_fields(
    fields: Map<String, Value>,
    redact_field: impl Fn(&str, Value) -> Option<Value>,
) -> Map<String, Value> {
    let redacted_fields = fields.into_iter().filter_map(|(name, value)| {
        let redacted_value = redact_field(&name, value)?;
        Some((name, redacted_value))
    });
    redacted_fields.collect()
}

/// Redacts an object by a list of fields.
fn redact_object(fields: Map<String, Value>, list: &[(&str, Redaction)]) -> Value {
    Value::Object(redact_fields(fields, |name, value| redact_value(name, value, &[list])))
}

/// Redacts the value of a field. Returns `None` for a field that is not in one of the lists.
fn redact_value(name: &str, value: Value, lists: &[&[(&str, Redaction)]]) -> Option<Value> {
    let (_, redaction) = lists.iter().copied().flatten().find(|(listed, _)| *listed == name)?;
    match (redaction, value) {
        (Keep, value) => is_scalar(&value).then_some(value),
        (Null, _) => Some(Value::Null),
        (EmptyList, _) => Some(json!([])),
        (False, _) => Some(json!(false)),
        (Placeholder, _) => Some(json!("redacted")),
        (Message, Value::String(text)) => Some(Value::String(redact_message(&text))),
        (Object(list), Value::Object(fields)) => Some(redact_object(fields, list)),
        (Object(_) | Message, _) => None,
    }
}

/// Redacts the `detail` of a refusal: an object, a message, or a list of objects.
fn redact_refusal(detail: Value) -> Option<Value> {
    match detail {
        Value::Object(fields) => Some(redact_object(fields, REFUSAL)),
        Value::String(text) => Some(Value::String(redact_message(&text))),
        Value::Array(elements) => {
            let objects = elements.into_iter().filter(Value::is_object);
            Some(objects.filter_map(redact_refusal).collect())
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => None,
    }
}

/// Whether a value is a number, a flag, `null` or a short word. Such a value does not describe a person.
fn is_scalar(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => true,
        Value::String(text) => {
            let is_word_byte = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte);
            text.len() <= MAX_WORD_BYTES && text.bytes().all(is_word_byte)
        }
        Value::Array(_) | Value::Object(_) => false,
    }
}

/// Replaces the email addresses in a message, and truncates the message.
fn redact_message(text: &str) -> String {
    let words = text.split(' ').map(|word| if word.contains('@') { "..." } else { word });
    words.collect::<Vec<_>>().join(" ").chars().take(MAX_MESSAGE_CHARS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Compares the redacted document with the expected one.
    #[track_caller]
    fn check_redacted(document: &Value, expected: &Value) {
        let redacted = redact(document.to_string().as_bytes()).unwrap();
        assert_eq!(&serde_json::from_slice::<Value>(&redacted).unwrap(), expected);
    }

    #[test]
    fn personal_fields_are_removed_and_credits_are_kept() {
        check_redacted(
            &json!({
                "user_id": "u-1", "workspace_id": "w-1", "first_name": "John", "xi_api_key": "sk_1",
                "xi_api_key_preview": "sk_...1",
                "referral_link_code": "r", "partnerstack_partner_default_link": "https://p", "is_new_user": false,
                "created_at": 1_700_000_000, "seat_type": "workspace_admin",
                "subscription": {
                    "tier": "creator", "character_count": 5, "next_invoice": {"amount_due_cents": 1},
                    "current_overage": {"amount": "0", "currency": "usd", "payer": "John"},
                },
            }),
            &json!({
                "user_id": "redacted", "workspace_id": "redacted", "first_name": null, "xi_api_key": null,
                "xi_api_key_preview": null,
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
        check_redacted(
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
    fn an_unlisted_field_is_removed_at_any_depth() {
        let owner = json!({"first_name": "John", "email": "john@example.com", "tier": "creator"});
        for document in [
            json!({"email": "john@example.com", "last_name": "Doe", "workspace_name": "John's"}),
            json!({"user": owner, "users": [owner], "data": {"user": owner}, "error": owner}),
            json!({"tier": owner, "tier_name": "John", "character_count": ["John"]}),
            json!({"tier": "john@example.com"}),
            json!({"Tier": "creator"}),
        ] {
            check_redacted(&document, &json!({}));
        }
        check_redacted(
            &json!({"subscription": {"owner": owner, "email": "j@x"}}),
            &json!({"subscription": {}}),
        );
        check_redacted(&json!({"subscription": "John"}), &json!({}));
    }

    #[test]
    fn a_refusal_keeps_its_listed_fields() {
        check_redacted(
            &json!({"detail": {"status": "invalid_api_key", "message": "Invalid API key", "email": "j@x"}}),
            &json!({"detail": {"status": "invalid_api_key", "message": "Invalid API key"}}),
        );
        check_redacted(&json!({"detail": "User j@x is gone"}), &json!({"detail": "User ... is gone"}));
        check_redacted(
            &json!({"detail": [{"loc": ["query"], "msg": "field required", "type": "missing", "input": "John"}]}),
            &json!({"detail": [{"msg": "field required", "type": "missing"}]}),
        );
        check_redacted(&json!({"detail": {"message": {"first_name": "John"}}}), &json!({"detail": {}}));
        assert_eq!(redact(&withheld_body()), Some(withheld_body()));
    }

    #[test]
    fn redaction_adds_no_field() {
        check_redacted(&json!({"tier": "free"}), &json!({"tier": "free"}));
    }

    #[test]
    fn a_body_that_is_not_an_object_is_rejected() {
        for body in ["", "[]", "null", "<html>", "{\"first_name\":\"J"] {
            assert_eq!(redact(body.as_bytes()), None);
        }
    }
}

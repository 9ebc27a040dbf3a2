//! What `GET /v1/user` and `/v1/user/subscription` tell of the owner of a key that a client of the
//! pool need not know. Credits, limits and what the plan can do stay: apps read them.
//!
//! Source: `UserResponseModel` and `ExtendedSubscriptionResponseModel` of the provider's OpenAPI
//! document (August 2026), and its SDKs' models, which must still read what is left.

use serde_json::{Map, Value};

/// The document without what is the owner's own; `None` when it is no JSON object.
#[must_use]
pub fn redacted(document: &[u8]) -> Option<Vec<u8>> {
    let mut document: Map<String, Value> = serde_json::from_slice(document).ok()?;
    redact(&mut document);
    if let Some(Value::Object(subscription)) = document.get_mut("subscription") {
        redact(subscription);
    }
    serde_json::to_vec(&document).ok()
}

/// Puts nothing in the place of each field that is there: null where the model allows it, and
/// otherwise the emptiest value of its type.
fn redact(fields: &mut Map<String, Value>) {
    for (name, value) in fields {
        *value = match name.as_str() {
            "xi_api_key"
            | "xi_api_key_preview"
            | "first_name"
            | "referral_link_code"
            | "partnerstack_partner_default_link"
            | "next_invoice" => Value::Null,
            "open_invoices" => Value::Array(Vec::new()),
            "has_open_invoices" => Value::Bool(false),
            "user_id" => Value::from("redacted"),
            _ => continue,
        };
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[track_caller]
    fn check(document: &Value, expected: &Value) {
        let redacted = redacted(document.to_string().as_bytes()).unwrap();
        assert_eq!(&serde_json::from_slice::<Value>(&redacted).unwrap(), expected);
    }

    #[test]
    fn what_is_the_owners_own_goes_and_credits_stay() {
        check(
            &json!({
                "user_id": "u-1", "first_name": "John", "xi_api_key": "sk_1", "xi_api_key_preview": "sk_...1",
                "referral_link_code": "r", "partnerstack_partner_default_link": "https://p", "is_new_user": false,
                "subscription": {"tier": "creator", "character_count": 5, "next_invoice": {"amount_due_cents": 1}},
            }),
            &json!({
                "user_id": "redacted", "first_name": null, "xi_api_key": null, "xi_api_key_preview": null,
                "referral_link_code": null, "partnerstack_partner_default_link": null, "is_new_user": false,
                "subscription": {"tier": "creator", "character_count": 5, "next_invoice": null},
            }),
        );
    }

    #[test]
    fn invoices_are_nobody_elses_business() {
        check(
            &json!({
                "character_limit": 100_000, "max_credit_limit_extension": "unlimited",
                "next_invoice": {"amount_due_cents": 2_200}, "open_invoices": [{"amount_due_cents": 2_200}],
                "has_open_invoices": true,
            }),
            &json!({
                "character_limit": 100_000, "max_credit_limit_extension": "unlimited",
                "next_invoice": null, "open_invoices": [], "has_open_invoices": false,
            }),
        );
    }

    #[test]
    fn nothing_is_added_that_was_not_there() {
        check(&json!({"tier": "free"}), &json!({"tier": "free"}));
    }

    #[test]
    fn what_is_no_document_is_not_relayed_as_one() {
        for text in ["", "[]", "null", "<html>", "{\"first_name\":\"J"] {
            assert_eq!(redacted(text.as_bytes()), None);
        }
    }
}

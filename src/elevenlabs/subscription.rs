//! Parses the responses about an account that the poller requests: the subscription (`GET /v1/user/subscription`) and
//! the workspace of a key (`GET /v1/user`). Also checks identifiers that the poller uses in paths.
//!
//! Sources: `ExtendedSubscriptionResponseModel` of the provider's OpenAPI document, and `User` of its
//! Python SDK 2.78.

use serde::Deserialize;
use serde_json::Value;

use super::plan::Capabilities;
use crate::policy::quota::{Extension, Quota};
use crate::policy::units::UnixMs;

/// The subscription of a workspace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subscription {
    /// The used credits, their limit, the overage and the time of the next reset.
    pub quota: Quota,
    /// The name of the plan. The provider can introduce any name.
    pub tier: Option<String>,
    /// Whether the latest invoice is paid, or `None` if the status of the subscription does not show it.
    pub is_paid: Option<bool>,
    /// The features of the plan, without its credits.
    pub capabilities: Capabilities,
}

#[derive(Deserialize)]
struct SubscriptionDocument {
    tier: Option<String>,
    status: Option<String>,
    character_count: u64,
    character_limit: Option<u64>,
    can_use_instant_voice_cloning: Option<bool>,
    voice_limit: Option<u64>,
    voice_slots_used: Option<u64>,
    /// A number, `"unlimited"`, or absent.
    #[serde(default)]
    max_credit_limit_extension: Value,
    next_character_count_reset_unix: Option<i64>,
}

impl Subscription {
    /// Parses the body of a response. Returns `None` if the body is not a subscription.
    #[must_use]
    pub fn parse(body: &[u8]) -> Option<Self> {
        let document: SubscriptionDocument = serde_json::from_slice(body).ok()?;
        let extension_value = &document.max_credit_limit_extension;
        let extension = if extension_value == "unlimited" {
            Extension::Unlimited
        } else {
            extension_value
                .as_u64()
                .filter(|&credits| credits > 0)
                .map_or(Extension::None, Extension::Credits)
        };
        let reset_unix_seconds =
            document.next_character_count_reset_unix.and_then(|reset| u64::try_from(reset).ok());
        let quota = Quota {
            count: document.character_count,
            // A pay-as-you-go account has no limit or a limit of 0, and the provider serves it (help centre, 2026).
            limit: document.character_limit.filter(|limit| *limit > 0),
            extension,
            resets_at: reset_unix_seconds
                .filter(|&seconds| seconds > 0)
                .map(|seconds| UnixMs(seconds.saturating_mul(1_000))),
        };
        let is_paid = match document.status.as_deref() {
            Some("active" | "trialing") => Some(true),
            Some("past_due" | "incomplete" | "free_disabled") => Some(false),
            // A free account has no invoices.
            Some(_) | None => None,
        };
        let voice_slots = document.voice_limit.zip(document.voice_slots_used);
        let capabilities = Capabilities {
            can_clone: document.can_use_instant_voice_cloning,
            voices_left: voice_slots.map(|(limit, used)| limit.saturating_sub(used)),
        };
        Some(Self { quota, tier: document.tier, is_paid, capabilities })
    }
}

/// Parses the identifier of the workspace to which a key belongs, from the body of a response. Returns `None` for an
/// identifier that is not valid.
#[must_use]
pub fn parse_workspace_id(body: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct User {
        workspace_id: Option<String>,
    }
    serde_json::from_slice::<User>(body).ok()?.workspace_id.filter(|id| is_valid_identifier(id))
}

/// Maximum length of an identifier in a response. The provider's identifiers are shorter.
const MAX_IDENTIFIER_BYTES: usize = 128;

/// Whether an identifier in a response is short and contains only characters that need no escape in a path.
pub(super) fn is_valid_identifier(id: &str) -> bool {
    let is_identifier_byte = |byte: u8| byte.is_ascii_alphanumeric() || b"_-".contains(&byte);
    (1..=MAX_IDENTIFIER_BYTES).contains(&id.len()) && id.bytes().all(is_identifier_byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Parses a subscription of 100,000 credits with additional members.
    fn parse_with(members: &str) -> Subscription {
        let body =
            format!(r#"{{"tier":"creator","character_count":5420,"character_limit":100000{members}}}"#);
        Subscription::parse(body.as_bytes()).unwrap()
    }

    #[test]
    fn the_credits_and_the_plan_are_parsed() {
        let expected = Subscription {
            quota: Quota {
                count: 5_420,
                limit: Some(100_000),
                extension: Extension::None,
                resets_at: Some(UnixMs(1_738_356_858_000)),
            },
            tier: Some("creator".to_owned()),
            is_paid: None,
            capabilities: Capabilities::default(),
        };
        let members = r#","next_character_count_reset_unix":1738356858,"voice_limit":10"#;
        assert_eq!(parse_with(members), expected);
        assert_eq!(parse_with(r#","next_character_count_reset_unix":null"#).quota.resets_at, None);
    }

    #[test]
    fn the_status_shows_whether_the_invoice_is_paid() {
        assert_eq!(parse_with(r#","status":"active""#).is_paid, Some(true));
        assert_eq!(parse_with(r#","status":"past_due""#).is_paid, Some(false));
        assert_eq!(parse_with(r#","status":"free""#).is_paid, None);
    }

    #[test]
    fn overage_is_a_number_or_unlimited() {
        for (extension, expected) in [
            ("10000", Extension::Credits(10_000)),
            ("0", Extension::None),
            (r#""unlimited""#, Extension::Unlimited),
            ("null", Extension::None),
        ] {
            let members = format!(r#","max_credit_limit_extension":{extension}"#);
            assert_eq!(parse_with(&members).quota.extension, expected);
        }
    }

    #[test]
    fn an_account_without_a_limit_has_an_unknown_limit() {
        for limit in ["", r#","character_limit":0"#, r#","character_limit":null"#] {
            let body = format!(r#"{{"tier":"payg","character_count":900{limit}}}"#);
            let quota = Subscription::parse(body.as_bytes()).unwrap().quota;
            assert_eq!((quota.count, quota.limit), (900, None), "{limit:?} must be an unknown limit");
        }
    }

    #[test]
    fn slots_and_capabilities_are_parsed() {
        let capabilities = |members: &str| parse_with(members).capabilities;
        let no_slots =
            capabilities(r#","can_use_instant_voice_cloning":false,"voice_limit":10,"voice_slots_used":12"#);
        assert_eq!(no_slots, Capabilities { can_clone: Some(false), voices_left: Some(0) });
        assert_eq!(capabilities(r#","voice_limit":10,"voice_slots_used":7"#).voices_left, Some(3));
        assert_eq!(capabilities(""), Capabilities::default());
    }

    #[test]
    fn only_a_valid_workspace_identifier_is_accepted() {
        let parse = |value: &str| {
            parse_workspace_id(format!(r#"{{"user_id":"u","workspace_id":{value}}}"#).as_bytes())
        };
        assert_eq!(parse(r#""ws_1-A""#).as_deref(), Some("ws_1-A"));
        for value in ["null", "\"\"", "7", "\"a b\"", &format!("\"{}\"", "x".repeat(129))] {
            assert_eq!(parse(value), None, "{value} must not be a workspace identifier");
        }
        assert_eq!(parse_workspace_id(b"[]"), None);
    }

    #[test]
    fn a_document_that_is_not_a_subscription_is_ignored() {
        for body in
            ["", "{}", "[]", r#"{"character_count":-1,"character_limit":2}"#, r#"{"character_limit":1}"#]
        {
            assert_eq!(Subscription::parse(body.as_bytes()), None);
        }
    }
}

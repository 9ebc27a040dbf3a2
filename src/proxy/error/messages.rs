//! Builds the error responses whose messages depend on details: missing keys, client limits, upstream
//! failures. Separate from the list of errors.

use std::time::Duration;

use http::StatusCode;

use crate::elevenlabs::affinity::Kind;
use crate::elevenlabs::affinity::claim::TwoOwners;
use crate::policy::client_quota::{QuotaShortfall, QuotaSpent};
use crate::policy::replay::Progress;
use crate::policy::select::Unavailable;
use crate::policy::units::{Grouped, UnixMs};
use crate::proxy::client_usage::ClientLimitExceeded;
use crate::upstream::{SendError, SendErrorKind};

/// The content of an error response.
pub(super) struct ErrorResponse {
    pub(super) http: StatusCode,
    /// The provider's name of the error, which SDKs and apps check.
    pub(super) status: &'static str,
    /// The proxy's own stable error code.
    pub(super) code: &'static str,
    pub(super) message: String,
    pub(super) retry_after_s: Option<u64>,
}

/// The message for an empty pool, as the contract words it.
const NOTHING_LEFT: &str = "All ElevenLabs API keys are exhausted or rate limited";
/// `Retry-After` when all slots are taken: about the time until a request in progress ends.
const FULL_RETRY_AFTER: Duration = Duration::from_secs(1);
/// Maximum `Retry-After` while all slots are taken: a slot may become free long before a later event, such as
/// a credit reset next month.
const FULL_RETRY_AFTER_MAX: Duration = Duration::from_secs(10);

pub(super) fn conflicting_owners_message(TwoOwners(one, other): TwoOwners) -> String {
    let with_article = |kind: Kind| {
        let article = if kind.word().starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" };
        format!("{article} {}", kind.word())
    };
    let what = if one == other {
        format!("{} and another", with_article(one))
    } else {
        format!("{} and {}", with_article(one), with_article(other))
    };
    format!(
        "The request names {what} that belong to different ElevenLabs accounts, and no API key can use both. \
         Leave one out, or make both in one account."
    )
}

/// Like `unavailable_response`, but for the one account that owns the named resource.
pub(super) fn owner_unavailable_response(kind: Kind, unavailable: Unavailable, now: UnixMs) -> ErrorResponse {
    let content = unavailable_response(unavailable, now);
    let account = format!("The ElevenLabs account that this {} belongs to", kind.word());
    let (code, message) = match unavailable {
        Unavailable::Exhausted { resets_at, left } => {
            let lack = match left {
                Some(left) => {
                    format!("has {} credits left, which is too few for this request", Grouped(left))
                }
                None => "is out of credits".to_owned(),
            };
            let message = format!("{account} {lack}, and no other account has it.{}", next_reset(resets_at));
            ("owner_exhausted", message)
        }
        Unavailable::Cooling { .. } => {
            let seconds = content.retry_after_s.unwrap_or(1);
            let message =
                format!("{account} is rate limited, and no other account has it. Try again in {seconds} s.");
            ("owner_rate_limited", message)
        }
        Unavailable::Full { .. } => {
            let seconds = content.retry_after_s.unwrap_or(1);
            (
                "owner_busy",
                format!(
                    "{account} has as many requests under way as its plan allows. Try again in {seconds} s."
                ),
            )
        }
        Unavailable::Invalid | Unavailable::Tried | Unavailable::Outdated => {
            ("owner_invalid", format!("{account} refuses every API key that Keychoir holds for it."))
        }
    };
    ErrorResponse { code, message, ..content }
}

pub(super) fn client_limit_response(exceeded: ClientLimitExceeded) -> ErrorResponse {
    match exceeded {
        ClientLimitExceeded::Concurrency { max } => ErrorResponse {
            http: StatusCode::TOO_MANY_REQUESTS,
            status: "too_many_concurrent_requests",
            code: "client_concurrency_exceeded",
            message: format!("Keychoir lets this client have {max} requests under way at once."),
            // A request in progress may end at any moment.
            retry_after_s: Some(1),
        },
        ClientLimitExceeded::Rate { wait } => {
            let seconds = whole_seconds(wait);
            ErrorResponse {
                http: StatusCode::TOO_MANY_REQUESTS,
                status: "rate_limit_exceeded",
                code: "client_rate_limited",
                message: format!("Keychoir lets this client begin its next request in {seconds} s."),
                retry_after_s: Some(seconds),
            }
        }
        ClientLimitExceeded::Unpriced { max } => ErrorResponse {
            http: StatusCode::TOO_MANY_REQUESTS,
            status: "too_many_concurrent_requests",
            code: "client_concurrency_exceeded",
            message: format!(
                "This client has a quota of credits, and as many requests under way as it may have ({max}) whose price \
                 is known only from their answers."
            ),
            // A request in progress may end at any moment.
            retry_after_s: Some(1),
        },
        ClientLimitExceeded::DirectAccess => ErrorResponse {
            http: StatusCode::FORBIDDEN,
            status: "forbidden",
            code: "direct_access_not_allowed",
            message:
                "This client has a quota, and this answer would let it use ElevenLabs without Keychoir. \
                      The operator of Keychoir can allow it with provider_tokens."
                    .to_owned(),
            retry_after_s: None,
        },
        ClientLimitExceeded::Spent(spent) => ErrorResponse {
            // The status is not 429, because SDKs would retry that.
            http: StatusCode::PAYMENT_REQUIRED,
            status: "insufficient_credits",
            code: "client_quota_exceeded",
            message: spent_message(spent),
            retry_after_s: None,
        },
    }
}

fn spent_message(QuotaSpent { quota, resets_at, shortfall }: QuotaSpent) -> String {
    let used = match shortfall {
        None => format!("This client has used its quota of {quota}."),
        Some(QuotaShortfall { left, needed }) => format!(
            "This client has {} of its quota of {quota} left, and this request may need {}.",
            Grouped(left),
            Grouped(needed)
        ),
    };
    match resets_at {
        Some(at) => format!("{used} It begins anew at {}.", at.rfc3339_seconds()),
        None => used,
    }
}

/// A sentence about the earliest reset, when one is known.
fn next_reset(resets_at: Option<UnixMs>) -> String {
    resets_at.map(|at| format!(" Next reset: {}.", at.rfc3339_seconds())).unwrap_or_default()
}

/// At least one second, so that clients do not retry at once.
fn whole_seconds(wait: Duration) -> u64 {
    u64::try_from(wait.as_millis().div_ceil(1_000)).unwrap_or(u64::MAX).max(1)
}

pub(super) fn unavailable_response(unavailable: Unavailable, now: UnixMs) -> ErrorResponse {
    match unavailable {
        Unavailable::Exhausted { resets_at, left } => {
            let left = left.map(|left| {
                format!(" The most credits that one of them has left are {}, too few for this request.", Grouped(left))
            });
            ErrorResponse {
                http: StatusCode::UNAUTHORIZED,
                status: "quota_exceeded",
                code: "all_keys_exhausted",
                message: format!("{NOTHING_LEFT}.{}{}", next_reset(resets_at), left.unwrap_or_default()),
                retry_after_s: None,
            }
        }
        Unavailable::Cooling { until } => {
            let seconds = whole_seconds(until.since(now));
            ErrorResponse {
                http: StatusCode::TOO_MANY_REQUESTS,
                status: "rate_limit_exceeded",
                code: "all_keys_rate_limited",
                message: format!("{NOTHING_LEFT}. Try again in {seconds} s."),
                retry_after_s: Some(seconds),
            }
        }
        Unavailable::Full { until } => {
            let span = until.map_or(FULL_RETRY_AFTER, |until| until.since(now).min(FULL_RETRY_AFTER_MAX));
            let span = span.as_millis();
            let seconds = span.div_ceil(1_000).max(1);
            ErrorResponse {
                http: StatusCode::TOO_MANY_REQUESTS,
                status: "too_many_concurrent_requests",
                code: "all_keys_busy",
                message: format!(
                    "Every ElevenLabs API key has as many requests under way as its plan allows. \
                     Try again in {seconds} s."
                ),
                retry_after_s: u64::try_from(seconds).ok(),
            }
        }
        // No key could be tried: the response is the same as when all keys are refused.
        Unavailable::Invalid | Unavailable::Tried | Unavailable::Outdated => ErrorResponse {
            http: StatusCode::UNAUTHORIZED,
            status: "invalid_api_key",
            code: "all_keys_invalid",
            message: "ElevenLabs refuses every API key that Keychoir holds. The operator of Keychoir must replace them."
                .to_owned(),
            retry_after_s: None,
        },
    }
}

pub(super) fn upstream_response(error: &SendError) -> ErrorResponse {
    let (http, status, code, message) = match &error.kind {
        SendErrorKind::ClientBroke => (
            StatusCode::BAD_REQUEST,
            "bad_request",
            "request_body_broken",
            "The request's body broke off or was malformed.",
        ),
        SendErrorKind::ClientStalled(_) | SendErrorKind::ClientSlow(_) => (
            StatusCode::REQUEST_TIMEOUT,
            "request_timeout",
            "request_body_timeout",
            "The request's body stopped coming.",
        ),
        SendErrorKind::ConnectTimeout(_) => (
            StatusCode::GATEWAY_TIMEOUT,
            "gateway_timeout",
            "upstream_timeout",
            "ElevenLabs could not be reached in time.",
        ),
        SendErrorKind::ResponseTimeout(_) | SendErrorKind::UploadStalled(_) => (
            StatusCode::GATEWAY_TIMEOUT,
            "gateway_timeout",
            "upstream_timeout",
            "ElevenLabs did not answer in time. The request may have been charged and was not sent again.",
        ),
        SendErrorKind::Connect(_) => {
            (StatusCode::BAD_GATEWAY, "bad_gateway", "upstream_unreachable", "ElevenLabs cannot be reached.")
        }
        SendErrorKind::Broken(_) if error.progress == Progress::Unsent => {
            (StatusCode::BAD_GATEWAY, "bad_gateway", "upstream_unreachable", "ElevenLabs cannot be reached.")
        }
        SendErrorKind::Broken(_) => (
            StatusCode::BAD_GATEWAY,
            "bad_gateway",
            "upstream_reset",
            "The connection to ElevenLabs broke before an answer. The request may have been charged and was not \
             sent again.",
        ),
        SendErrorKind::Switched(_) => (
            StatusCode::BAD_GATEWAY,
            "bad_gateway",
            "upstream_reset",
            "ElevenLabs answered with a protocol that the request did not ask for.",
        ),
    };
    ErrorResponse { http, status, code, message: message.to_owned(), retry_after_s: None }
}

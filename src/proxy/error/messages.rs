//! Builds the error responses whose status or message depends on the details of an error. These errors are unavailable
//! keys, exceeded limits of a client or user, resources of two accounts, and requests that failed while they were sent.

use std::time::Duration;

use http::StatusCode;

use crate::elevenlabs::affinity::ResourceKind;
use crate::elevenlabs::affinity::required_owner::ConflictingOwners;
use crate::policy::client_quota::{QuotaExceeded, QuotaShortfall};
use crate::policy::replay::Progress;
use crate::policy::select::Unavailable;
use crate::policy::units::{Grouped, UnixMs};
use crate::proxy::client_usage::ClientLimitExceeded;
use crate::upstream::{SendError, SendErrorKind};

/// The content of an error response.
pub(super) struct ErrorResponse {
    pub(super) http_status: StatusCode,
    /// The provider's name for the error, which SDKs and apps check.
    pub(super) status: &'static str,
    /// The proxy's own stable error code.
    pub(super) code: &'static str,
    pub(super) message: String,
    /// The value of `Retry-After` in seconds, or `None` if the response has no such header.
    pub(super) retry_after_s: Option<u64>,
}

/// The fixed start of the message for a pool whose keys are exhausted or rate limited.
const POOL_EXHAUSTED: &str = "All ElevenLabs API keys are exhausted or rate limited";
/// `Retry-After` while all concurrency slots are in use, or while a client or user has its maximum number of requests
/// in progress: about the time until a request ends.
const BUSY_RETRY_AFTER: Duration = Duration::from_secs(1);
/// Maximum `Retry-After` while all concurrency slots are in use. A slot may become free long before the next
/// known event, such as a credit reset next month.
const MAX_BUSY_RETRY_AFTER: Duration = Duration::from_secs(10);
/// `Retry-After` while all keys are paused until an operator resumes one.
const PAUSED_RETRY_AFTER: Duration = Duration::from_secs(60);

impl ErrorResponse {
    pub(super) fn new(
        http_status: StatusCode,
        status: &'static str,
        code: &'static str,
        message: &str,
    ) -> Self {
        Self { http_status, status, code, message: message.to_owned(), retry_after_s: None }
    }
}

/// Builds a 429 response.
fn too_many_requests(
    status: &'static str,
    code: &'static str,
    message: String,
    retry_after_s: u64,
) -> ErrorResponse {
    let http_status = StatusCode::TOO_MANY_REQUESTS;
    ErrorResponse { http_status, status, code, message, retry_after_s: Some(retry_after_s) }
}

/// Returns the message for a request that names resources of two accounts.
pub(super) fn conflicting_owners_message(ConflictingOwners(first, second): ConflictingOwners) -> String {
    let with_article = |kind: ResourceKind| {
        let article = if kind.as_str().starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" };
        format!("{article} {}", kind.as_str())
    };
    let second = if first == second { "another".to_owned() } else { with_article(second) };
    format!(
        "The request names {} and {second} that belong to different ElevenLabs accounts, and no API key can \
         use both. Remove one of them, or create both in one account.",
        with_article(first)
    )
}

/// Returns the response to a request that only the account of the named resource could serve. Its status is the same
/// as in [`unavailable_response`].
pub(super) fn owner_unavailable_response(
    kind: ResourceKind,
    unavailable: Unavailable,
    now: UnixMs,
) -> ErrorResponse {
    let response = unavailable_response(unavailable, now);
    let account = format!("The ElevenLabs account that this {} belongs to", kind.as_str());
    let seconds = response.retry_after_s.unwrap_or(1);
    let (code, message) = match unavailable {
        Unavailable::Exhausted { resets_at, left } => {
            let shortage = match left {
                Some(left) => {
                    format!("has {} credits left, which is not enough for this request", Grouped(left))
                }
                None => "has no credits left".to_owned(),
            };
            let reset = next_reset(resets_at);
            ("owner_exhausted", format!("{account} {shortage}, and no other account has it.{reset}"))
        }
        Unavailable::Cooling { .. } => {
            let message =
                format!("{account} is rate limited, and no other account has it. Try again in {seconds} s.");
            ("owner_rate_limited", message)
        }
        Unavailable::Full { .. } => {
            let message = format!(
                "{account} has the maximum concurrent requests of its plan. Try again in {seconds} s."
            );
            ("owner_busy", message)
        }
        Unavailable::Paused { .. } => (
            "owner_paused",
            format!("{account} is paused by the operator of Keychoir, and no other account has it."),
        ),
        Unavailable::Invalid | Unavailable::Tried | Unavailable::Outdated => {
            ("owner_invalid", format!("{account} refuses all of its API keys that Keychoir has."))
        }
    };
    ErrorResponse { code, message, ..response }
}

/// Returns the response to a request that exceeds a limit of its client or user.
pub(super) fn client_limit_response(exceeded: ClientLimitExceeded, now: UnixMs) -> ErrorResponse {
    match exceeded {
        // A request in progress may end at any moment, so the client may retry soon.
        ClientLimitExceeded::Concurrency { max } => too_many_requests(
            "too_many_concurrent_requests",
            "client_concurrency_exceeded",
            format!("This client has its maximum of {max} concurrent requests."),
            whole_seconds(BUSY_RETRY_AFTER),
        ),
        ClientLimitExceeded::Unpriced { max } => too_many_requests(
            "too_many_concurrent_requests",
            "client_concurrency_exceeded",
            format!(
                "This client has a credit quota, and its maximum of {max} concurrent requests whose price is \
                 known only from the response."
            ),
            whole_seconds(BUSY_RETRY_AFTER),
        ),
        ClientLimitExceeded::Rate { wait } => {
            let seconds = whole_seconds(wait);
            let message = format!("This client has reached its rate limit. Try again in {seconds} s.");
            too_many_requests("rate_limit_exceeded", "client_rate_limited", message, seconds)
        }
        ClientLimitExceeded::DirectAccess => ErrorResponse::new(
            StatusCode::FORBIDDEN,
            "forbidden",
            "direct_access_not_allowed",
            "This client has a quota, and this response would let it use ElevenLabs without Keychoir. The \
             operator of Keychoir can allow it with provider_tokens.",
        ),
        // The status is not 429, because SDKs would retry that.
        ClientLimitExceeded::Quota(exceeded) => ErrorResponse::new(
            StatusCode::PAYMENT_REQUIRED,
            "insufficient_credits",
            "client_quota_exceeded",
            &quota_message("client", exceeded),
        ),
        ClientLimitExceeded::UserQuota(exceeded) => ErrorResponse {
            retry_after_s: exceeded.resets_at.map(|at| whole_seconds(at.since(now))),
            ..ErrorResponse::new(
                StatusCode::PAYMENT_REQUIRED,
                "insufficient_credits",
                "user_quota_exceeded",
                &quota_message("user", exceeded),
            )
        },
        ClientLimitExceeded::UserUnpriced { max } => too_many_requests(
            "too_many_concurrent_requests",
            "user_concurrency_exceeded",
            format!(
                "This user has a credit quota, and its maximum of {max} concurrent requests whose price is known \
                 only from the response."
            ),
            whole_seconds(BUSY_RETRY_AFTER),
        ),
    }
}

/// Describes the used quota of `owner`, a client or a user.
fn quota_message(owner: &str, QuotaExceeded { quota, resets_at, shortfall }: QuotaExceeded) -> String {
    let usage = match shortfall {
        None => format!("This {owner} has used its quota of {quota}."),
        Some(QuotaShortfall { remaining, needed }) => format!(
            "This {owner} has {} of its quota of {quota} left, and this request may need {}.",
            Grouped(remaining),
            Grouped(needed)
        ),
    };
    match resets_at {
        Some(at) => format!("{usage} It resets at {}.", at.rfc3339_seconds()),
        None => usage,
    }
}

/// Returns a sentence about the earliest reset, or an empty string if no reset is known.
fn next_reset(resets_at: Option<UnixMs>) -> String {
    resets_at.map(|at| format!(" Next reset: {}.", at.rfc3339_seconds())).unwrap_or_default()
}

/// Rounds up to whole seconds, and to at least one second, so that clients do not retry immediately.
fn whole_seconds(wait: Duration) -> u64 {
    u64::try_from(wait.as_millis().div_ceil(1_000)).unwrap_or(u64::MAX).max(1)
}

/// Returns the response to a request that no key can serve.
pub(super) fn unavailable_response(unavailable: Unavailable, now: UnixMs) -> ErrorResponse {
    match unavailable {
        Unavailable::Exhausted { resets_at, left } => {
            let remaining_credits = left.map(|remaining_credits| {
                format!(
                    " At most {} credits are left on one key, which is not enough for this request.",
                    Grouped(remaining_credits)
                )
            });
            let message = format!(
                "{POOL_EXHAUSTED}.{}{}",
                next_reset(resets_at),
                remaining_credits.unwrap_or_default()
            );
            ErrorResponse::new(StatusCode::UNAUTHORIZED, "quota_exceeded", "all_keys_exhausted", &message)
        }
        Unavailable::Cooling { until } => {
            let seconds = whole_seconds(until.since(now));
            let message = format!("{POOL_EXHAUSTED}. Try again in {seconds} s.");
            too_many_requests("rate_limit_exceeded", "all_keys_rate_limited", message, seconds)
        }
        Unavailable::Full { until } => {
            let wait = until.map_or(BUSY_RETRY_AFTER, |until| until.since(now).min(MAX_BUSY_RETRY_AFTER));
            let seconds = whole_seconds(wait);
            let message = format!(
                "All ElevenLabs API keys have the maximum concurrent requests of their plans. Try again in \
                 {seconds} s."
            );
            too_many_requests("too_many_concurrent_requests", "all_keys_busy", message, seconds)
        }
        Unavailable::Paused { until } => {
            let wait = until.map_or(PAUSED_RETRY_AFTER, |until| until.since(now));
            let message =
                "The operator of Keychoir has paused all ElevenLabs API keys that could serve this request.";
            ErrorResponse {
                retry_after_s: Some(whole_seconds(wait)),
                ..ErrorResponse::new(
                    StatusCode::SERVICE_UNAVAILABLE,
                    "service_unavailable",
                    "all_keys_paused",
                    message,
                )
            }
        }
        // If no key could be tried, the response is the same as if all keys were refused.
        Unavailable::Invalid | Unavailable::Tried | Unavailable::Outdated => ErrorResponse::new(
            StatusCode::UNAUTHORIZED,
            "invalid_api_key",
            "all_keys_invalid",
            "ElevenLabs refuses all API keys that Keychoir has. The operator of Keychoir must replace them.",
        ),
    }
}

/// Returns the response to a request that could not be sent, whose body failed, or to which ElevenLabs sent no usable
/// response.
pub(super) fn upstream_error_response(failure: &SendError) -> ErrorResponse {
    let bad_gateway =
        |code, message: &str| ErrorResponse::new(StatusCode::BAD_GATEWAY, "bad_gateway", code, message);
    let gateway_timeout = |message: &str| {
        ErrorResponse::new(StatusCode::GATEWAY_TIMEOUT, "gateway_timeout", "upstream_timeout", message)
    };
    let unreachable = || bad_gateway("upstream_unreachable", "ElevenLabs cannot be reached.");
    match &failure.kind {
        SendErrorKind::ClientBodyFailed => ErrorResponse::new(
            StatusCode::BAD_REQUEST,
            "bad_request",
            "request_body_broken",
            "The request body ended early or was malformed.",
        ),
        SendErrorKind::ClientStalled(_) | SendErrorKind::ClientTooSlow(_) => ErrorResponse::new(
            StatusCode::REQUEST_TIMEOUT,
            "request_timeout",
            "request_body_timeout",
            "The request body did not arrive in time.",
        ),
        SendErrorKind::ConnectTimeout(_) | SendErrorKind::TunnelTimeout { .. } => {
            gateway_timeout("ElevenLabs could not be reached in time.")
        }
        SendErrorKind::ResponseTimeout(_) | SendErrorKind::UploadStalled(_) => gateway_timeout(
            "ElevenLabs did not respond in time. The request may have been charged and was not sent again.",
        ),
        SendErrorKind::Connect(_) if failure.progress == Progress::ProxyAuthenticationFailed => bad_gateway(
            "proxy_authentication_failed",
            "The proxy between Keychoir and ElevenLabs refuses Keychoir's credentials. The operator of Keychoir \
             must correct them.",
        ),
        SendErrorKind::Connect(_) => unreachable(),
        SendErrorKind::Broken(_) if failure.progress == Progress::Unsent => unreachable(),
        SendErrorKind::Broken(_) => bad_gateway(
            "upstream_reset",
            "The connection to ElevenLabs broke before a response. The request may have been charged and was \
             not sent again.",
        ),
        SendErrorKind::UnexpectedUpgrade(_) => {
            bad_gateway("upstream_reset", "ElevenLabs switched to a protocol that the request did not name.")
        }
    }
}

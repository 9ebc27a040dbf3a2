//! Defines the errors of the proxy, and builds their responses, which contain `x-keychoir-error` and a JSON body that
//! every SDK can parse. The message in the response contains neither keys nor internal details. The `Display` text is
//! for the log.

mod messages;

use bytes::Bytes;
use http::header::{
    ALLOW, CACHE_CONTROL, CONNECTION, CONTENT_TYPE, HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE,
};
use http::{Response, StatusCode};
use serde_json::json;

use super::client_usage::{ClientLimitExceeded, UserUsageUnavailable};
use super::request_limiter::Overloaded;
use super::usage::QueueFull;
use crate::elevenlabs::affinity::ResourceKind;
use crate::elevenlabs::affinity::required_owner::ConflictingOwners;
use crate::policy::client::Unauthenticated;
use crate::policy::method::MAX_METHOD_LENGTH;
use crate::policy::origin::OriginRejected;
use crate::policy::path::AmbiguousPathError;
use crate::policy::select::Unavailable;
use crate::policy::units::UnixMs;
use crate::policy::user::{InvalidUser, MAX_USER_ID_BYTES};
use crate::upstream::SendError;
use messages::{
    ErrorResponse, client_limit_response, conflicting_owners_message, owner_unavailable_response,
    unavailable_response, upstream_error_response,
};

/// The response describes the account holder. It cannot be redacted, or it could not be read completely.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the response describes the owner of the key and cannot be redacted")]
pub struct RedactionFailed;

/// The response must be read before it is relayed, and the buffer budget is exhausted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the buffer budget is used up, so the response cannot be read before it is relayed")]
pub struct BuffersFull;

/// The reason for an error response of the proxy.
#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    /// The client's token is missing, unknown or expired, or the client's own key is malformed.
    #[error("the client presents no valid token or key")]
    Unauthenticated(#[from] Unauthenticated),
    /// The request names a foreign host, or comes from a web page that is not allowed.
    #[error("{0}")]
    OriginRejected(#[from] OriginRejected),
    /// The proxy has its maximum number of requests in progress.
    #[error(transparent)]
    Overloaded(#[from] Overloaded),
    /// The endpoint is blocked.
    #[error("the endpoint is blocked: {0}")]
    EndpointBlocked(&'static str),
    /// The client's configuration does not allow this path.
    #[error("the client may not use this path")]
    PathNotAllowed,
    /// The client or its end user has reached a limit, or the client may not request direct access to the provider.
    #[error(transparent)]
    ClientLimit(#[from] ClientLimitExceeded),
    /// The end user of the request cannot be identified.
    #[error(transparent)]
    InvalidUser(#[from] InvalidUser),
    /// The client has a quota per user, and the request names no user.
    #[error("the client has a quota per user, and the request names no user")]
    UserRequired,
    /// The usage of the user cannot be read, so its quota cannot be checked.
    #[error(transparent)]
    UserUsageUnavailable(#[from] UserUsageUnavailable),
    /// The method is TRACE or CONNECT.
    #[error("the method is not proxied")]
    MethodNotAllowed,
    /// The method is longer than any registered method.
    #[error("the method is too long")]
    MethodTooLong,
    /// The request contains no `Host` header, more than one, or one that contradicts its target.
    #[error("the Host header is missing, repeated or contradicts the target")]
    InvalidHost,
    /// A WebSocket handshake has a body.
    #[error("a WebSocket handshake has a body")]
    InvalidUpgrade,
    /// The request's path could be interpreted in more than one way.
    #[error("the path is ambiguous: {0}")]
    AmbiguousPath(#[from] AmbiguousPathError),
    /// The path and query to forward are not a valid request target.
    #[error("the request target is invalid: {0}")]
    InvalidTarget(#[from] http::Error),
    /// No key can serve the request.
    #[error("{0}")]
    Unavailable(#[from] Unavailable),
    /// The request names resources of two accounts.
    #[error("{0}")]
    ConflictingOwners(#[from] ConflictingOwners),
    /// No key of the account that owns the named resource can serve the request.
    #[error("no key of the account that owns the {} is available: {unavailable}", .kind.as_str())]
    OwnerUnavailable {
        /// The kind of the owned resource.
        kind: ResourceKind,
        /// The reason why no key of the account is available.
        unavailable: Unavailable,
    },
    /// The queue of usage records is full.
    #[error("{0}")]
    UsageQueueFull(#[from] QueueFull),
    /// Keychoir itself sent the request.
    #[error("this Keychoir sent the request itself")]
    LoopDetected,
    /// Keychoir is shutting down.
    #[error("Keychoir is shutting down")]
    Draining,
    /// The response describes the account holder, and cannot be redacted or read completely.
    #[error(transparent)]
    RedactionFailed(#[from] RedactionFailed),
    /// The response must be read before it is relayed, and the buffer budget is exhausted.
    #[error(transparent)]
    BuffersFull(#[from] BuffersFull),
    /// The request could not be sent, its body failed, or the upstream sent no usable response.
    #[error("{0}")]
    Upstream(#[from] SendError),
}

/// The value of the `Allow` header. Extension methods are also proxied.
const ALLOWED_METHODS: &str = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS";

impl ProxyError {
    /// Returns the code in `x-keychoir-error`.
    #[must_use]
    pub fn code(&self) -> &'static str {
        self.response_content(UnixMs::default()).code
    }

    /// Returns the status and the message of the response, for an error message in a WebSocket session.
    pub(super) fn message(&self, now: UnixMs) -> (StatusCode, String) {
        let ErrorResponse { http_status, message, .. } = self.response_content(now);
        (http_status, message)
    }

    /// Builds the error response to the client.
    #[must_use]
    pub fn response(&self, request_id: &str, now: UnixMs) -> Response<Bytes> {
        let ErrorResponse { http_status, status, code, message, retry_after_s } = self.response_content(now);
        let body = json!({
            "detail": {"status": status, "code": code, "message": message, "request_id": request_id},
            "error": {"message": message, "code": http_status.as_u16()},
        });
        let mut response = Response::new(Bytes::from(body.to_string()));
        *response.status_mut() = http_status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        headers.insert("x-keychoir-error", HeaderValue::from_static(code));
        // After a contradictory host or a handshake with a body, client and proxy may disagree about where
        // the request ends, so the connection is not reused.
        if matches!(self, Self::InvalidHost | Self::InvalidUpgrade) {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        // RFC 9110 requires these headers: sections 11.6.1 and 10.2.1.
        if http_status == StatusCode::UNAUTHORIZED {
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"keychoir\""));
        }
        if http_status == StatusCode::METHOD_NOT_ALLOWED {
            headers.insert(ALLOW, HeaderValue::from_static(ALLOWED_METHODS));
        }
        if let Some(seconds) = retry_after_s {
            headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }

    /// Returns the status, the codes and the message of the response.
    fn response_content(&self, now: UnixMs) -> ErrorResponse {
        let unauthorized = |code, message: &str| {
            ErrorResponse::new(StatusCode::UNAUTHORIZED, "invalid_api_key", code, message)
        };
        let bad_request =
            |code, message: &str| ErrorResponse::new(StatusCode::BAD_REQUEST, "bad_request", code, message);
        let forbidden =
            |code, message: &str| ErrorResponse::new(StatusCode::FORBIDDEN, "forbidden", code, message);
        let unavailable = |code, message: &str| ErrorResponse {
            retry_after_s: Some(1),
            ..ErrorResponse::new(StatusCode::SERVICE_UNAVAILABLE, "service_unavailable", code, message)
        };
        match self {
            Self::Unauthenticated(Unauthenticated::MissingToken) => unauthorized(
                "client_token_missing",
                "Keychoir requires a client token. Send one as the API key of your SDK (xi-api-key).",
            ),
            Self::Unauthenticated(Unauthenticated::UnknownToken) => unauthorized(
                "client_token_wrong",
                "This client token is unknown. Ask the operator of Keychoir for a valid one.",
            ),
            Self::Unauthenticated(Unauthenticated::ExpiredToken) => unauthorized(
                "client_token_expired",
                "This client token has expired. Ask the operator of Keychoir for a new one.",
            ),
            Self::Unauthenticated(Unauthenticated::MalformedKey) => ErrorResponse::new(
                StatusCode::BAD_REQUEST,
                "invalid_api_key",
                "malformed_own_key",
                "This is not an API key: it contains a space, a control character or a non-ASCII character. \
                 Send only your ElevenLabs key in xi-api-key, or no key to use the pool.",
            ),
            Self::OriginRejected(OriginRejected::Host) => ErrorResponse::new(
                StatusCode::MISDIRECTED_REQUEST,
                "forbidden",
                "host_not_allowed",
                "This is not a host name of Keychoir. Use localhost or an address, or add it to access.hosts.",
            ),
            Self::OriginRejected(OriginRejected::Origin) => forbidden(
                "origin_not_allowed",
                "Keychoir does not serve web pages of this origin. To allow them, add it to access.origins.",
            ),
            Self::EndpointBlocked(reason) => {
                forbidden("path_denied", &format!("Keychoir does not forward this path: {reason}."))
            }
            Self::PathNotAllowed => forbidden(
                "path_not_allowed",
                "This client may not use this path. Ask the operator of Keychoir for permission.",
            ),
            Self::ClientLimit(exceeded) => client_limit_response(*exceeded, now),
            Self::InvalidUser(InvalidUser::Malformed) => bad_request(
                "invalid_user",
                &format!(
                    "The id of the user in x-keychoir-user must be visible text of 1 to {MAX_USER_ID_BYTES} bytes."
                ),
            ),
            Self::InvalidUser(InvalidUser::Contradictory) => {
                bad_request("invalid_user", "The request names two different users in x-keychoir-user.")
            }
            Self::UserRequired => bad_request(
                "user_required",
                "This client has a quota for each of its users. Name the user in the header x-keychoir-user, or \
                 in the query parameter of the same name.",
            ),
            Self::UserUsageUnavailable(UserUsageUnavailable) => unavailable(
                "user_usage_unavailable",
                "Keychoir cannot read the usage of this user, so it cannot check the quota. Try again in a second.",
            ),
            Self::MethodNotAllowed => ErrorResponse::new(
                StatusCode::METHOD_NOT_ALLOWED,
                "method_not_allowed",
                "method_not_allowed",
                "Keychoir does not forward TRACE and CONNECT requests.",
            ),
            Self::MethodTooLong => ErrorResponse::new(
                StatusCode::NOT_IMPLEMENTED,
                "method_not_implemented",
                "method_too_long",
                &format!("Keychoir forwards methods of at most {MAX_METHOD_LENGTH} characters."),
            ),
            Self::InvalidHost => bad_request(
                "invalid_host",
                "A request must have one Host header, and its target must not name another host.",
            ),
            Self::InvalidUpgrade => {
                bad_request("invalid_upgrade", "A request that opens a WebSocket must not have a body.")
            }
            Self::AmbiguousPath(reason) => bad_request(
                "ambiguous_path",
                &format!("Servers could interpret this path differently, so it is not forwarded: {reason}."),
            ),
            Self::InvalidTarget(_) => {
                bad_request("bad_target", "The path or query of the request is malformed.")
            }
            Self::Unavailable(unavailable) => unavailable_response(*unavailable, now),
            // The status is not 409, because the provider's Python library would retry that several times.
            Self::ConflictingOwners(owners) => ErrorResponse::new(
                StatusCode::BAD_REQUEST,
                "conflict",
                "conflicting_owners",
                &conflicting_owners_message(*owners),
            ),
            Self::OwnerUnavailable { kind, unavailable } => {
                owner_unavailable_response(*kind, *unavailable, now)
            }
            Self::UsageQueueFull(_) => unavailable(
                "usage_queue_full",
                "Keychoir cannot write its usage records fast enough. Try again in a second.",
            ),
            Self::Overloaded(_) => unavailable(
                "overloaded",
                "Keychoir has its maximum number of requests in progress. Try again in a second.",
            ),
            Self::LoopDetected => ErrorResponse::new(
                StatusCode::LOOP_DETECTED,
                "loop_detected",
                "loop_detected",
                "Keychoir itself sent this request: upstream.base_url leads back to it instead of to ElevenLabs.",
            ),
            // A restart takes about one second.
            Self::Draining => unavailable("draining", "Keychoir is shutting down. Try again in a second."),
            Self::RedactionFailed(RedactionFailed) => ErrorResponse::new(
                StatusCode::BAD_GATEWAY,
                "bad_gateway",
                "answer_not_redacted",
                "The response describes the owner of the API key in a form that Keychoir cannot redact.",
            ),
            Self::BuffersFull(BuffersFull) => unavailable(
                "buffers_full",
                "Keychoir has no memory left to read the response before the relay. Try again in a second.",
            ),
            Self::Upstream(error) => upstream_error_response(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use std::time::Duration;

    use super::*;
    use crate::policy::client_quota::{ClientQuota, Period, QuotaUnit};
    use crate::policy::client_quota::{QuotaExceeded, QuotaShortfall};
    use crate::policy::replay::Progress;
    use crate::upstream::SendErrorKind;

    const NOW: UnixMs = UnixMs(1_796_000_000_000);

    #[track_caller]
    fn check_response(
        error: &ProxyError,
        http_status: u16,
        status: &str,
        code: &str,
        message: &str,
    ) -> Response<Bytes> {
        let response = error.response("req-1", NOW);
        assert_eq!(response.status().as_u16(), http_status);
        assert_eq!(response.headers()["x-keychoir-error"], code);
        assert_eq!(response.headers()["content-type"], "application/json");
        let body: Value = serde_json::from_slice(response.body()).unwrap();
        let expected = json!({
            "detail": {"status": status, "code": code, "message": message, "request_id": "req-1"},
            "error": {"message": message, "code": http_status},
        });
        assert_eq!(body, expected);
        response
    }

    #[test]
    fn an_exhausted_pool_responds_like_the_provider_and_names_the_reset() {
        let error = ProxyError::Unavailable(Unavailable::Exhausted {
            resets_at: Some(UnixMs(1_796_083_200_000)),
            left: None,
        });
        let message =
            "All ElevenLabs API keys are exhausted or rate limited. Next reset: 2026-12-01T00:00:00Z.";
        let response = check_response(&error, 401, "quota_exceeded", "all_keys_exhausted", message);
        assert!(
            !response.headers().contains_key(RETRY_AFTER),
            "the response must not contain `Retry-After`, so that SDKs do not retry"
        );
        let short = Unavailable::Exhausted { resets_at: None, left: Some(8_900) };
        let message = "All ElevenLabs API keys are exhausted or rate limited. At most 8,900 credits are left \
                       on one key, which is not enough for this request.";
        check_response(&ProxyError::Unavailable(short), 401, "quota_exceeded", "all_keys_exhausted", message);
        let error = ProxyError::Unavailable(Unavailable::Exhausted { resets_at: None, left: None });
        check_response(
            &error,
            401,
            "quota_exceeded",
            "all_keys_exhausted",
            "All ElevenLabs API keys are exhausted or rate limited.",
        );
    }

    #[test]
    fn a_pool_in_cooldown_has_a_retry_after() {
        for (ms, seconds) in [(1, "1"), (1_000, "1"), (1_001, "2"), (59_500, "60"), (0, "1")] {
            let until = NOW.plus(Duration::from_millis(ms));
            let error = ProxyError::Unavailable(Unavailable::Cooling { until });
            let message =
                format!("All ElevenLabs API keys are exhausted or rate limited. Try again in {seconds} s.");
            let response =
                check_response(&error, 429, "rate_limit_exceeded", "all_keys_rate_limited", &message);
            assert_eq!(response.headers()[RETRY_AFTER], seconds);
        }
    }

    #[test]
    fn the_retry_after_of_a_busy_pool_is_at_most_ten_seconds() {
        for (until, seconds) in
            [(None, "1"), (Some(2_000), "2"), (Some(10_001), "10"), (Some(86_400_000), "10")]
        {
            let until = until.map(|ms| NOW.plus(Duration::from_millis(ms)));
            let response = ProxyError::Unavailable(Unavailable::Full { until }).response("r", NOW);
            assert_eq!(
                (response.status().as_u16(), &response.headers()[RETRY_AFTER]),
                (429, &seconds.parse().unwrap())
            );
        }
    }

    #[test]
    fn the_error_of_a_paused_pool_contains_the_end_of_the_first_pause() {
        for (until, seconds) in [(None, "60"), (Some(NOW.plus(Duration::from_millis(1_500))), "2")] {
            let response = ProxyError::Unavailable(Unavailable::Paused { until }).response("r", NOW);
            assert_eq!(response.headers()["retry-after"], seconds);
        }
    }

    #[test]
    fn an_exhausted_client_quota_names_its_reset() {
        let quota = ClientQuota { amount: 3, unit: QuotaUnit::Requests, period: Period::Total };
        let exceeded = |resets_at| {
            let exceeded = QuotaExceeded { quota, resets_at, shortfall: None };
            ProxyError::ClientLimit(ClientLimitExceeded::Quota(exceeded))
        };
        let message = "This client has used its quota of 3 requests.";
        let response =
            check_response(&exceeded(None), 402, "insufficient_credits", "client_quota_exceeded", message);
        assert!(
            !response.headers().contains_key(RETRY_AFTER),
            "the response must not contain `Retry-After`, so that SDKs do not retry"
        );
        let message = format!("{message} It resets at 2026-12-01T00:00:00Z.");
        let resets_at = Some(UnixMs(1_796_083_200_000));
        check_response(&exceeded(resets_at), 402, "insufficient_credits", "client_quota_exceeded", &message);
    }

    #[test]
    fn an_insufficient_client_quota_names_remaining_and_required_credits() {
        let quota = ClientQuota { amount: 10_000, unit: QuotaUnit::Credits, period: Period::Total };
        let shortfall = Some(QuotaShortfall { remaining: 51, needed: 1_055 });
        let exceeded = QuotaExceeded { quota, resets_at: None, shortfall };
        let error = ProxyError::ClientLimit(ClientLimitExceeded::Quota(exceeded));
        let message =
            "This client has 51 of its quota of 10,000 credits left, and this request may need 1,055.";
        check_response(&error, 402, "insufficient_credits", "client_quota_exceeded", message);
    }

    #[test]
    fn an_exhausted_user_quota_names_its_reset() {
        let quota = ClientQuota { amount: 3, unit: QuotaUnit::Requests, period: Period::Day };
        let exceeded = |resets_at| {
            let exceeded = QuotaExceeded { quota, resets_at, shortfall: None };
            ProxyError::ClientLimit(ClientLimitExceeded::UserQuota(exceeded))
        };
        let message = "This user has used its quota of 3 requests per day.";
        let response =
            check_response(&exceeded(None), 402, "insufficient_credits", "user_quota_exceeded", message);
        assert!(!response.headers().contains_key(RETRY_AFTER));
        let message = format!("{message} It resets at 2026-12-01T00:00:00Z.");
        let resets_at = Some(UnixMs(1_796_083_200_000));
        let response = check_response(
            &exceeded(resets_at),
            402,
            "insufficient_credits",
            "user_quota_exceeded",
            &message,
        );
        assert_eq!(response.headers()[RETRY_AFTER], "83200");
    }

    #[test]
    fn a_client_at_its_rate_or_concurrency_limit_receives_a_retry_after() {
        let wait = Duration::from_millis(1_001);
        let response = ProxyError::ClientLimit(ClientLimitExceeded::Rate { wait }).response("r", NOW);
        assert_eq!(
            (response.status().as_u16(), &response.headers()[RETRY_AFTER]),
            (429, &"2".parse().unwrap())
        );
        let response =
            ProxyError::ClientLimit(ClientLimitExceeded::Concurrency { max: 2 }).response("r", NOW);
        assert_eq!(
            (response.status().as_u16(), &response.headers()[RETRY_AFTER]),
            (429, &"1".parse().unwrap())
        );
    }

    #[test]
    fn errors_have_their_status_code_and_headers() {
        let upstream = |progress, kind| ProxyError::Upstream(SendError { progress, kind });
        let timeout = Duration::from_millis(5);
        for (error, http_status, code) in [
            (ProxyError::Unauthenticated(Unauthenticated::MissingToken), 401, "client_token_missing"),
            (ProxyError::Unauthenticated(Unauthenticated::UnknownToken), 401, "client_token_wrong"),
            (ProxyError::Unauthenticated(Unauthenticated::ExpiredToken), 401, "client_token_expired"),
            (ProxyError::Unauthenticated(Unauthenticated::MalformedKey), 400, "malformed_own_key"),
            (ProxyError::OriginRejected(OriginRejected::Host), 421, "host_not_allowed"),
            (ProxyError::OriginRejected(OriginRejected::Origin), 403, "origin_not_allowed"),
            (ProxyError::EndpointBlocked("it is dangerous"), 403, "path_denied"),
            (ProxyError::PathNotAllowed, 403, "path_not_allowed"),
            (
                ProxyError::ClientLimit(ClientLimitExceeded::Concurrency { max: 1 }),
                429,
                "client_concurrency_exceeded",
            ),
            (
                ProxyError::ClientLimit(ClientLimitExceeded::Rate { wait: timeout }),
                429,
                "client_rate_limited",
            ),
            (
                ProxyError::ClientLimit(ClientLimitExceeded::Unpriced { max: 1 }),
                429,
                "client_concurrency_exceeded",
            ),
            (ProxyError::ClientLimit(ClientLimitExceeded::DirectAccess), 403, "direct_access_not_allowed"),
            (InvalidUser::Malformed.into(), 400, "invalid_user"),
            (InvalidUser::Contradictory.into(), 400, "invalid_user"),
            (ProxyError::UserRequired, 400, "user_required"),
            (UserUsageUnavailable.into(), 503, "user_usage_unavailable"),
            (
                ProxyError::ClientLimit(ClientLimitExceeded::UserUnpriced { max: 1 }),
                429,
                "user_concurrency_exceeded",
            ),
            (ProxyError::MethodNotAllowed, 405, "method_not_allowed"),
            (ProxyError::MethodTooLong, 501, "method_too_long"),
            (ProxyError::InvalidHost, 400, "invalid_host"),
            (AmbiguousPathError::Dots.into(), 400, "ambiguous_path"),
            (ProxyError::Overloaded(Overloaded), 503, "overloaded"),
            (ProxyError::InvalidUpgrade, 400, "invalid_upgrade"),
            (ProxyError::UsageQueueFull(QueueFull), 503, "usage_queue_full"),
            (ProxyError::LoopDetected, 508, "loop_detected"),
            (ProxyError::Draining, 503, "draining"),
            (
                ConflictingOwners(ResourceKind::Voice, ResourceKind::Dictionary).into(),
                400,
                "conflicting_owners",
            ),
            (ProxyError::RedactionFailed(RedactionFailed), 502, "answer_not_redacted"),
            (ProxyError::BuffersFull(BuffersFull), 503, "buffers_full"),
            (ProxyError::Unavailable(Unavailable::Invalid), 401, "all_keys_invalid"),
            (ProxyError::Unavailable(Unavailable::Full { until: None }), 429, "all_keys_busy"),
            (ProxyError::Unavailable(Unavailable::Paused { until: None }), 503, "all_keys_paused"),
            (upstream(Progress::Unsent, SendErrorKind::ConnectTimeout(timeout)), 504, "upstream_timeout"),
            (
                upstream(
                    Progress::Unsent,
                    SendErrorKind::TunnelTimeout { proxy: "http://p:1".to_owned(), timeout },
                ),
                504,
                "upstream_timeout",
            ),
            (
                upstream(Progress::NoResponse, SendErrorKind::ResponseTimeout(timeout)),
                504,
                "upstream_timeout",
            ),
            (upstream(Progress::NoResponse, SendErrorKind::UploadStalled(timeout)), 504, "upstream_timeout"),
            (
                upstream(Progress::NoResponse, SendErrorKind::ClientStalled(timeout)),
                408,
                "request_body_timeout",
            ),
            (upstream(Progress::NoResponse, SendErrorKind::ClientBodyFailed), 400, "request_body_broken"),
        ] {
            let response = error.response("r", NOW);
            assert_eq!(
                (response.status().as_u16(), error.code()),
                (http_status, code),
                "the response to `{error}` must have its status and code"
            );
            let has = |name| response.headers().contains_key(name);
            assert_eq!(
                (has(WWW_AUTHENTICATE), has(ALLOW)),
                (http_status == 401, http_status == 405),
                "only a 401 response must name a challenge, and only a 405 response must list methods: `{error}`"
            );
        }
    }
}

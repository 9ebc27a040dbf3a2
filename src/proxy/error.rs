//! Error responses of the proxy, marked with `x-keychoir-error`, in a JSON form that every SDK can parse. The
//! message for the client contains no keys and no internals; the log message is separate.

mod messages;

use bytes::Bytes;
use http::header::{
    ALLOW, CACHE_CONTROL, CONNECTION, CONTENT_TYPE, HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE,
};
use http::{Response, StatusCode};
use serde_json::json;

use super::client_usage::ClientLimitExceeded;
use super::request_limiter::Overloaded;
use super::usage::QueueFull;
use crate::elevenlabs::affinity::Kind;
use crate::elevenlabs::affinity::claim::TwoOwners;
use crate::policy::client::Unidentified;
use crate::policy::method::MAX_METHOD_LENGTH;
use crate::policy::origin::OriginRejected;
use crate::policy::path::Ambiguous;
use crate::policy::select::Unavailable;
use crate::policy::units::UnixMs;
use crate::upstream::SendError;
use messages::{
    ErrorResponse, client_limit_response, conflicting_owners_message, owner_unavailable_response,
    unavailable_response, upstream_response,
};

/// The response describes the owner of the key, and is not in a form that can be redacted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the response describes the owner of the key and cannot be redacted")]
pub struct Unredacted;

/// The response must be read before it is relayed, and the buffer budget is used up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the buffer budget is used up, so the response cannot be read before it is relayed")]
pub struct BuffersFull;

/// The reason for an error response of the proxy.
#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    /// The client's token is missing or unknown.
    #[error("the client's token is missing or wrong")]
    Unidentified(#[from] Unidentified),
    /// The request names a foreign host, or comes from a web page that is not allowed.
    #[error("{0}")]
    OriginRejected(#[from] OriginRejected),
    /// The maximum of requests is in progress.
    #[error(transparent)]
    Overloaded(#[from] Overloaded),
    /// The endpoint is blocked.
    #[error("the path is denied: {0}")]
    Denied(&'static str),
    /// The client's configuration does not allow this path.
    #[error("the client may not use this path")]
    PathNotAllowed,
    /// The client has reached one of its limits.
    #[error(transparent)]
    ClientLimit(#[from] ClientLimitExceeded),
    /// The method is TRACE or CONNECT.
    #[error("the method is not proxied")]
    Method,
    /// The method is longer than any that is defined.
    #[error("the method is too long")]
    LongMethod,
    /// The request has no `Host` header, two of them, or one that contradicts its target.
    #[error("the request has no host, two, or a foreign one")]
    Host,
    /// A WebSocket handshake has a body.
    #[error("a WebSocket handshake has a body")]
    Upgrade,
    /// The request's path could be interpreted in more than one way.
    #[error("the request's path is ambiguous: {0}")]
    Path(#[from] Ambiguous),
    /// The remaining path and query are no valid target.
    #[error("the request's target cannot be sent: {0}")]
    Target(#[from] http::Error),
    /// No key can serve the request.
    #[error("{0}")]
    Unavailable(#[from] Unavailable),
    /// The request names resources of two accounts.
    #[error("{0}")]
    ConflictingOwners(#[from] TwoOwners),
    /// No key of the account that owns the named resource can serve the request.
    #[error("no key of the account that owns the {} is available: {unavailable}", .kind.word())]
    OwnerUnavailable {
        /// The kind of the owned resource.
        kind: Kind,
        /// Why no key of the account is available.
        unavailable: Unavailable,
    },
    /// The queue of usage records is full.
    #[error("{0}")]
    UsageQueueFull(#[from] QueueFull),
    /// The request was sent by this proxy itself.
    #[error("the request was sent by this Keychoir itself")]
    Loop,
    /// The program shuts down.
    #[error("Keychoir shuts down")]
    Draining,
    /// The response describes the owner of the key, and cannot be redacted.
    #[error(transparent)]
    Unredacted(#[from] Unredacted),
    /// The response must be read before it is relayed, and the buffer budget is used up.
    #[error(transparent)]
    BuffersFull(#[from] BuffersFull),
    /// The upstream sent no response.
    #[error("{0}")]
    Upstream(#[from] SendError),
}

/// The methods for the `Allow` header: the named ones that are proxied.
const METHODS: &str = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS";

/// A restart takes about one second.
const DRAINING_RETRY_AFTER_S: u64 = 1;

impl ProxyError {
    /// The code in `x-keychoir-error`.
    #[must_use]
    pub fn code(&self) -> &'static str {
        self.content(UnixMs::default()).code
    }

    /// The status and the message of the response, for a message on a socket.
    pub(super) fn message(&self, now: UnixMs) -> (StatusCode, String) {
        let ErrorResponse { http, message, .. } = self.content(now);
        (http, message)
    }

    /// The error response to the client.
    #[must_use]
    pub fn response(&self, request_id: &str, now: UnixMs) -> Response<Bytes> {
        let ErrorResponse { http, status, code, message, retry_after_s } = self.content(now);
        let body = json!({
            "detail": {"status": status, "code": code, "message": message, "request_id": request_id},
            "error": {"message": message, "code": http.as_u16()},
        });
        let mut response = Response::new(Bytes::from(body.to_string()));
        *response.status_mut() = http;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        headers.insert("x-keychoir-error", HeaderValue::from_static(code));
        // A client that sends a contradictory host, or a body before a WebSocket, may disagree with
        // the proxy about where its request ends, so the connection is not reused.
        if matches!(self, Self::Host | Self::Upgrade) {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        // RFC 9110 requires these headers: sections 11.6.1 and 10.2.1.
        if http == StatusCode::UNAUTHORIZED {
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"keychoir\""));
        }
        if http == StatusCode::METHOD_NOT_ALLOWED {
            headers.insert(ALLOW, HeaderValue::from_static(METHODS));
        }
        if let Some(seconds) = retry_after_s {
            headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }

    fn content(&self, now: UnixMs) -> ErrorResponse {
        let content_of = |http, status, code, message: &str| ErrorResponse {
            http,
            status,
            code,
            message: message.to_owned(),
            retry_after_s: None,
        };
        match self {
            Self::Unidentified(Unidentified::Missing) => content_of(
                StatusCode::UNAUTHORIZED,
                "invalid_api_key",
                "client_token_missing",
                "Keychoir asks for a client token. Send one where your SDK puts its API key (xi-api-key).",
            ),
            Self::Unidentified(Unidentified::Wrong) => content_of(
                StatusCode::UNAUTHORIZED,
                "invalid_api_key",
                "client_token_wrong",
                "Keychoir does not know this client token. Ask the operator of Keychoir for one.",
            ),
            Self::Unidentified(Unidentified::MalformedKey) => content_of(
                StatusCode::BAD_REQUEST,
                "invalid_api_key",
                "malformed_own_key",
                "This is no API key: it has a space, a control character or a letter beyond ASCII. Send your \
                 ElevenLabs key alone in xi-api-key, or none to be served by the pool.",
            ),
            Self::OriginRejected(OriginRejected::Host) => content_of(
                StatusCode::MISDIRECTED_REQUEST,
                "forbidden",
                "host_not_allowed",
                "Keychoir does not go by this name. Use localhost or an address, or add the name to access.hosts.",
            ),
            Self::OriginRejected(OriginRejected::Origin) => content_of(
                StatusCode::FORBIDDEN,
                "forbidden",
                "origin_not_allowed",
                "Keychoir does not serve web pages of this origin. To let them in, add it to access.origins.",
            ),
            Self::Denied(why) => content_of(
                StatusCode::FORBIDDEN,
                "forbidden",
                "path_denied",
                &format!("Keychoir does not pass this path on: {why}."),
            ),
            Self::PathNotAllowed => content_of(
                StatusCode::FORBIDDEN,
                "forbidden",
                "path_not_allowed",
                "Keychoir does not let this client use this path. Ask the operator of Keychoir for it.",
            ),
            Self::ClientLimit(exceeded) => client_limit_response(*exceeded),
            Self::Method => content_of(
                StatusCode::METHOD_NOT_ALLOWED,
                "method_not_allowed",
                "method_not_allowed",
                "Keychoir does not pass TRACE and CONNECT on.",
            ),
            Self::LongMethod => content_of(
                StatusCode::NOT_IMPLEMENTED,
                "method_not_implemented",
                "method_too_long",
                &format!("Keychoir passes methods of at most {MAX_METHOD_LENGTH} characters on."),
            ),
            Self::Host => content_of(
                StatusCode::BAD_REQUEST,
                "bad_request",
                "invalid_host",
                "A request has one Host header, and its target names no other host.",
            ),
            Self::Upgrade => content_of(
                StatusCode::BAD_REQUEST,
                "bad_request",
                "invalid_upgrade",
                "A request that opens a WebSocket has no body.",
            ),
            Self::Path(why) => content_of(
                StatusCode::BAD_REQUEST,
                "bad_request",
                "ambiguous_path",
                &format!("Servers could read this path differently, so Keychoir does not pass it on: {why}."),
            ),
            Self::Target(_) => content_of(
                StatusCode::BAD_REQUEST,
                "bad_request",
                "bad_target",
                "The path or query of the request is malformed.",
            ),
            Self::Unavailable(unavailable) => unavailable_response(*unavailable, now),
            // The status is not 409, because the provider's Python library would retry that several times.
            Self::ConflictingOwners(two) => content_of(
                StatusCode::BAD_REQUEST,
                "conflict",
                "conflicting_owners",
                &conflicting_owners_message(*two),
            ),
            Self::OwnerUnavailable { kind, unavailable } => {
                owner_unavailable_response(*kind, *unavailable, now)
            }
            Self::UsageQueueFull(_) => ErrorResponse {
                retry_after_s: Some(1),
                ..content_of(
                    StatusCode::SERVICE_UNAVAILABLE,
                    "service_unavailable",
                    "usage_queue_full",
                    "Keychoir's usage records cannot be written fast enough. Try again in a second.",
                )
            },
            Self::Overloaded(_) => ErrorResponse {
                retry_after_s: Some(1),
                ..content_of(
                    StatusCode::SERVICE_UNAVAILABLE,
                    "service_unavailable",
                    "overloaded",
                    "Keychoir has as many requests under way as it may have. Try again in a second.",
                )
            },
            Self::Loop => content_of(
                StatusCode::LOOP_DETECTED,
                "loop_detected",
                "loop_detected",
                "This request comes from Keychoir itself: upstream.base_url leads back to it instead of to ElevenLabs.",
            ),
            Self::Draining => ErrorResponse {
                retry_after_s: Some(DRAINING_RETRY_AFTER_S),
                ..content_of(
                    StatusCode::SERVICE_UNAVAILABLE,
                    "service_unavailable",
                    "draining",
                    "Keychoir is about to end. Try again in a second.",
                )
            },
            Self::Unredacted(Unredacted) => content_of(
                StatusCode::BAD_GATEWAY,
                "bad_gateway",
                "answer_not_redacted",
                "ElevenLabs' answer describes the owner of the API key in a form that Keychoir cannot redact.",
            ),
            Self::BuffersFull(BuffersFull) => ErrorResponse {
                retry_after_s: Some(1),
                ..content_of(
                    StatusCode::SERVICE_UNAVAILABLE,
                    "service_unavailable",
                    "buffers_full",
                    "Keychoir has no memory left to read this answer before it passes it on. Try again in a second.",
                )
            },
            Self::Upstream(error) => upstream_response(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use std::time::Duration;

    use super::*;
    use crate::policy::client_quota::{ClientQuota, Measure, Period};
    use crate::policy::client_quota::{QuotaShortfall, QuotaSpent};
    use crate::policy::replay::Progress;
    use crate::upstream::SendErrorKind;

    const NOW: UnixMs = UnixMs(1_796_000_000_000);

    #[track_caller]
    fn check(error: &ProxyError, http: u16, status: &str, code: &str, message: &str) -> Response<Bytes> {
        let response = error.response("req-1", NOW);
        assert_eq!(response.status().as_u16(), http);
        assert_eq!(response.headers()["x-keychoir-error"], code);
        assert_eq!(response.headers()["content-type"], "application/json");
        let body: Value = serde_json::from_slice(response.body()).unwrap();
        let expected = json!({
            "detail": {"status": status, "code": code, "message": message, "request_id": "req-1"},
            "error": {"message": message, "code": http},
        });
        assert_eq!(body, expected);
        response
    }

    #[test]
    fn an_empty_pool_responds_like_the_provider_and_names_the_reset() {
        let error = ProxyError::Unavailable(Unavailable::Exhausted {
            resets_at: Some(UnixMs(1_796_083_200_000)),
            left: None,
        });
        let message =
            "All ElevenLabs API keys are exhausted or rate limited. Next reset: 2026-12-01T00:00:00Z.";
        let response = check(&error, 401, "quota_exceeded", "all_keys_exhausted", message);
        assert!(!response.headers().contains_key(RETRY_AFTER), "SDKs would retry");
        let short = Unavailable::Exhausted { resets_at: None, left: Some(8_900) };
        let message = "All ElevenLabs API keys are exhausted or rate limited. The most credits that one of them has left are 8,900, \
                       too few for this request.";
        check(&ProxyError::Unavailable(short), 401, "quota_exceeded", "all_keys_exhausted", message);
        let error = ProxyError::Unavailable(Unavailable::Exhausted { resets_at: None, left: None });
        check(
            &error,
            401,
            "quota_exceeded",
            "all_keys_exhausted",
            "All ElevenLabs API keys are exhausted or rate limited.",
        );
    }

    #[test]
    fn a_pool_in_cooldown_names_its_end() {
        for (ms, seconds) in [(1, "1"), (1_000, "1"), (1_001, "2"), (59_500, "60"), (0, "1")] {
            let until = NOW.plus(Duration::from_millis(ms));
            let error = ProxyError::Unavailable(Unavailable::Cooling { until });
            let message =
                format!("All ElevenLabs API keys are exhausted or rate limited. Try again in {seconds} s.");
            let response = check(&error, 429, "rate_limit_exceeded", "all_keys_rate_limited", &message);
            assert_eq!(response.headers()[RETRY_AFTER], seconds);
        }
    }

    #[test]
    fn a_busy_pool_names_a_time_for_a_slot_and_not_for_credits() {
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
    fn a_client_that_has_used_its_quota_gets_the_time_of_its_reset() {
        let quota = ClientQuota { amount: 3, measure: Measure::Requests, period: Period::Ever };
        let spent =
            |resets_at| ProxyError::ClientLimit(QuotaSpent { quota, resets_at, shortfall: None }.into());
        let message = "This client has used its quota of 3 requests.";
        let response = check(&spent(None), 402, "insufficient_credits", "client_quota_exceeded", message);
        assert!(!response.headers().contains_key(RETRY_AFTER), "SDKs would retry");
        let message = format!("{message} It begins anew at 2026-12-01T00:00:00Z.");
        let resets_at = Some(UnixMs(1_796_083_200_000));
        check(&spent(resets_at), 402, "insufficient_credits", "client_quota_exceeded", &message);
    }

    #[test]
    fn a_quota_too_small_for_a_request_names_both_figures() {
        let quota = ClientQuota { amount: 10_000, measure: Measure::Credits, period: Period::Ever };
        let shortfall = Some(QuotaShortfall { left: 51, needed: 1_055 });
        let error = ProxyError::ClientLimit(QuotaSpent { quota, resets_at: None, shortfall }.into());
        let message =
            "This client has 51 of its quota of 10,000 credits left, and this request may need 1,055.";
        check(&error, 402, "insufficient_credits", "client_quota_exceeded", message);
    }

    #[test]
    fn a_rate_limited_client_gets_a_retry_after() {
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
    fn every_error_has_its_status_and_code() {
        let upstream = |progress, kind| ProxyError::Upstream(SendError { progress, kind });
        let span = Duration::from_millis(5);
        for (error, http, code) in [
            (ProxyError::Unidentified(Unidentified::Missing), 401, "client_token_missing"),
            (ProxyError::Unidentified(Unidentified::Wrong), 401, "client_token_wrong"),
            (ProxyError::Unidentified(Unidentified::MalformedKey), 400, "malformed_own_key"),
            (ProxyError::OriginRejected(OriginRejected::Host), 421, "host_not_allowed"),
            (ProxyError::OriginRejected(OriginRejected::Origin), 403, "origin_not_allowed"),
            (ProxyError::Denied("it is dangerous"), 403, "path_denied"),
            (ProxyError::PathNotAllowed, 403, "path_not_allowed"),
            (
                ProxyError::ClientLimit(ClientLimitExceeded::Concurrency { max: 1 }),
                429,
                "client_concurrency_exceeded",
            ),
            (ProxyError::ClientLimit(ClientLimitExceeded::Rate { wait: span }), 429, "client_rate_limited"),
            (
                ProxyError::ClientLimit(ClientLimitExceeded::Unpriced { max: 1 }),
                429,
                "client_concurrency_exceeded",
            ),
            (ProxyError::ClientLimit(ClientLimitExceeded::DirectAccess), 403, "direct_access_not_allowed"),
            (ProxyError::Method, 405, "method_not_allowed"),
            (ProxyError::LongMethod, 501, "method_too_long"),
            (ProxyError::Host, 400, "invalid_host"),
            (Ambiguous::Dots.into(), 400, "ambiguous_path"),
            (ProxyError::Overloaded(Overloaded), 503, "overloaded"),
            (ProxyError::Upgrade, 400, "invalid_upgrade"),
            (ProxyError::UsageQueueFull(QueueFull), 503, "usage_queue_full"),
            (ProxyError::Loop, 508, "loop_detected"),
            (ProxyError::Draining, 503, "draining"),
            (TwoOwners(Kind::Voice, Kind::Dictionary).into(), 400, "conflicting_owners"),
            (ProxyError::Unredacted(Unredacted), 502, "answer_not_redacted"),
            (ProxyError::BuffersFull(BuffersFull), 503, "buffers_full"),
            (ProxyError::Unavailable(Unavailable::Invalid), 401, "all_keys_invalid"),
            (ProxyError::Unavailable(Unavailable::Full { until: None }), 429, "all_keys_busy"),
            (upstream(Progress::Unsent, SendErrorKind::ConnectTimeout(span)), 504, "upstream_timeout"),
            (upstream(Progress::Unanswered, SendErrorKind::ResponseTimeout(span)), 504, "upstream_timeout"),
            (upstream(Progress::Unanswered, SendErrorKind::UploadStalled(span)), 504, "upstream_timeout"),
            (upstream(Progress::Unanswered, SendErrorKind::ClientStalled(span)), 408, "request_body_timeout"),
            (upstream(Progress::Unanswered, SendErrorKind::ClientBroke), 400, "request_body_broken"),
        ] {
            let response = error.response("r", NOW);
            assert_eq!((response.status().as_u16(), error.code()), (http, code), "{error}");
            let has = |name| response.headers().contains_key(name);
            assert_eq!((has(WWW_AUTHENTICATE), has(ALLOW)), (http == 401, http == 405), "{error}");
        }
    }
}

//! Defines the errors of the admin API with their status, code and message, and renders them in the format that
//! Keychoir uses for refused proxied requests. `ControlError` and errors of other modules are converted into them.

use std::time::Duration;

use bytes::Bytes;
use http::header::{ALLOW, CONTENT_TYPE, ETAG, HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE};
use http::{Method, Response, StatusCode};
use serde_json::json;

use super::etag;
use crate::admin::control::ControlError;
use crate::policy::client::Unauthenticated;
use crate::policy::user::InvalidUser;
use crate::proxy::{ProxyError, UserUsageUnavailable};
use crate::store::HistoryError;

/// The reason why a request to the admin API was refused.
#[derive(Debug)]
pub(super) struct ApiError {
    http: StatusCode,
    /// The kind of the error in `detail.status`, which SDKs of the provider read.
    status: &'static str,
    /// The stable code in `x-keychoir-error`.
    code: &'static str,
    message: String,
    retry_after: Option<Duration>,
    allowed_methods: &'static [Method],
    /// The generation to read again, after a stale `If-Match`.
    generation: Option<u64>,
}

/// The time in `Retry-After` with the status 503. A restart of Keychoir takes about this time.
const RESTART_TIME: Duration = Duration::from_secs(1);

impl ApiError {
    fn new(http: StatusCode, status: &'static str, code: &'static str, message: impl Into<String>) -> Self {
        let (retry_after, allowed_methods, generation) = (None, [].as_slice(), None);
        Self { http, status, code, message: message.into(), retry_after, allowed_methods, generation }
    }

    fn unavailable(code: &'static str, message: impl Into<String>) -> Self {
        let error = Self::new(StatusCode::SERVICE_UNAVAILABLE, "service_unavailable", code, message);
        Self { retry_after: Some(RESTART_TIME), ..error }
    }

    /// Returns the error for a malformed request.
    pub(super) fn bad_request(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "bad_request", code, message)
    }

    pub(super) fn unknown_path() -> Self {
        let message = "The admin API has no such path. See docs/openapi.json for its paths.";
        Self::new(StatusCode::NOT_FOUND, "not_found", "unknown_path", message)
    }

    /// Returns the error for an unknown id of a key. The id is not repeated, because it may be a key.
    pub(super) fn key_not_found() -> Self {
        let message = "No key of the pool has this id. GET keys lists the keys with their ids.";
        Self::new(StatusCode::NOT_FOUND, "not_found", "key_not_found", message)
    }

    pub(super) fn client_not_found() -> Self {
        let message = "No client has this name. GET clients lists the clients.";
        Self::new(StatusCode::NOT_FOUND, "not_found", "client_not_found", message)
    }

    pub(super) fn method_not_allowed(allowed_methods: &'static [Method]) -> Self {
        let http = StatusCode::METHOD_NOT_ALLOWED;
        let message = format!("This path accepts only {}.", method_list(allowed_methods));
        Self { allowed_methods, ..Self::new(http, "method_not_allowed", "method_not_allowed", message) }
    }

    /// Returns the error for every request to the API if Keychoir has no admin token.
    pub(super) fn disabled() -> Self {
        let message = "The admin API is off, because Keychoir has no admin token: set admin.token_file or \
                       KEYCHOIR_ADMIN_TOKEN, or give it a state directory.";
        Self::new(StatusCode::NOT_FOUND, "not_found", "admin_api_disabled", message)
    }

    /// Returns the error for a path that only the listener at `admin.listen` serves.
    pub(super) fn served_elsewhere() -> Self {
        let message = "This address serves clients. The admin API and the pages for operators are at the address \
                       of admin.listen.";
        Self::new(StatusCode::NOT_FOUND, "not_found", "served_elsewhere", message)
    }

    pub(super) fn not_proxied() -> Self {
        let message = "This address serves only the admin API and Keychoir's own pages. Clients use the address of \
                       server.listen.";
        Self::new(StatusCode::NOT_FOUND, "not_found", "not_proxied", message)
    }

    /// Replaces the message about the API with a message about a page, unless the address has sent too many wrong
    /// tokens.
    pub(super) fn for_page(self) -> Self {
        let message = "From other machines, this page requires the admin token: send `Authorization: Bearer TOKEN`, \
                       or list the page in admin.public.";
        if self.http == StatusCode::TOO_MANY_REQUESTS {
            self
        } else {
            Self { message: message.into(), ..self }
        }
    }

    pub(super) fn token_missing() -> Self {
        let message = "The admin API requires the admin token: send `Authorization: Bearer TOKEN`.";
        Self::new(StatusCode::UNAUTHORIZED, "invalid_api_key", "admin_token_missing", message)
    }

    pub(super) fn token_wrong() -> Self {
        let message = "This is not the admin token.";
        Self::new(StatusCode::UNAUTHORIZED, "invalid_api_key", "admin_token_wrong", message)
    }

    pub(super) fn client_token() -> Self {
        let message = "The token of a client does not open the admin API. Use /api/keychoir/v1/me for the usage \
                       of this client.";
        Self::new(StatusCode::FORBIDDEN, "forbidden", "client_token", message)
    }

    pub(super) fn too_many_failures(retry_after: Duration) -> Self {
        let message = "Too many wrong admin tokens came from this address.";
        let http = StatusCode::TOO_MANY_REQUESTS;
        let error = Self::new(http, "rate_limit_exceeded", "too_many_failures", message);
        Self { retry_after: Some(retry_after), ..error }
    }

    pub(super) fn foreign_page() -> Self {
        let message = "The admin API does not serve web pages of other origins.";
        Self::new(StatusCode::FORBIDDEN, "forbidden", "origin_not_allowed", message)
    }

    pub(super) fn unauthenticated(error: Unauthenticated) -> Self {
        let code = ProxyError::Unauthenticated(error).code();
        let message = match error {
            Unauthenticated::ExpiredToken => {
                "This client token has expired. Ask the operator of Keychoir for a new one."
            }
            Unauthenticated::MissingToken | Unauthenticated::UnknownToken | Unauthenticated::MalformedKey => {
                "Send the token of a client as xi-api-key or as `Authorization: Bearer TOKEN`."
            }
        };
        Self::new(StatusCode::UNAUTHORIZED, "invalid_api_key", code, message)
    }

    pub(super) fn media_type() -> Self {
        let message = "Send the body as JSON, with `content-type: application/json`.";
        let http = StatusCode::UNSUPPORTED_MEDIA_TYPE;
        Self::new(http, "unsupported_media_type", "unsupported_media_type", message)
    }

    pub(super) fn body_too_large(max_bytes: usize) -> Self {
        let message = format!("A body may have at most {max_bytes} bytes.");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "payload_too_large", "body_too_large", message)
    }

    pub(super) fn body_timeout() -> Self {
        let message = "The request body did not arrive in time.";
        Self::new(StatusCode::REQUEST_TIMEOUT, "request_timeout", "request_body_timeout", message)
    }

    pub(super) fn check_in_progress() -> Self {
        let message = "Another check of this key is running.";
        let error = Self::new(StatusCode::CONFLICT, "conflict", "check_in_progress", message);
        Self { retry_after: Some(Duration::from_secs(1)), ..error }
    }

    pub(super) fn too_many_listeners(max_listeners: usize) -> Self {
        let message = format!(
            "{max_listeners} listeners receive events already, which is the maximum (admin.max_event_listeners)."
        );
        Self::unavailable("too_many_listeners", message)
    }

    pub(super) fn no_random_numbers() -> Self {
        Self::unavailable("no_random_numbers", "The system provides no random numbers for a code.")
    }

    pub(super) fn no_control() -> Self {
        Self::unavailable("control_unavailable", "This Keychoir makes no changes at runtime.")
    }

    pub(super) fn status_code(&self) -> StatusCode {
        self.http
    }

    pub(super) fn into_message(self) -> String {
        self.message
    }

    pub(super) fn response(&self, request_id: &str) -> Response<Bytes> {
        let Self { http, status, code, message, .. } = self;
        let body = json!({
            "detail": {"status": status, "code": code, "message": message, "request_id": request_id},
            "error": {"message": message, "code": http.as_u16()},
        });
        let mut response = Response::new(Bytes::from(body.to_string()));
        *response.status_mut() = *http;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert("x-keychoir-error", HeaderValue::from_static(self.code));
        // RFC 9110 requires these headers: sections 11.6.1 and 10.2.1.
        if *http == StatusCode::UNAUTHORIZED {
            let challenge = HeaderValue::from_static("Bearer realm=\"keychoir-admin\"");
            headers.insert(WWW_AUTHENTICATE, challenge);
        }
        if !self.allowed_methods.is_empty()
            && let Ok(methods) = HeaderValue::from_str(&method_list(self.allowed_methods))
        {
            headers.insert(ALLOW, methods);
        }
        if let Some(retry_after) = self.retry_after {
            let seconds = u64::try_from(retry_after.as_millis().div_ceil(1_000)).unwrap_or(u64::MAX);
            headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        if let Some(generation) = self.generation {
            headers.insert(ETAG, etag(generation));
        }
        response
    }
}

fn method_list(methods: &[Method]) -> String {
    methods.iter().map(Method::as_str).collect::<Vec<_>>().join(", ")
}

impl From<ControlError> for ApiError {
    fn from(error: ControlError) -> Self {
        let message = capitalized(&error.to_string());
        let conflict = |code, message| Self::new(StatusCode::CONFLICT, "conflict", code, message);
        match error {
            ControlError::Stale { current } => {
                let http = StatusCode::PRECONDITION_FAILED;
                let error = Self::new(http, "precondition_failed", "stale_generation", message);
                Self { generation: Some(current), ..error }
            }
            ControlError::NotFound(_) => Self::new(StatusCode::NOT_FOUND, "not_found", "not_found", message),
            ControlError::AlreadyExists(_) => conflict("already_exists", message),
            ControlError::LastClient => conflict("last_client", message),
            ControlError::GraceNotEnded => conflict("grace_not_ended", message),
            ControlError::NotPaused(_) => conflict("not_paused", message),
            ControlError::Invalid(_) => {
                Self::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid_value", "invalid_change", message)
            }
            ControlError::NotManaged(_) => conflict("not_managed", message),
            ControlError::NoStateDirectory => conflict("no_state_directory", message),
            ControlError::Unwritable { .. } => Self::unavailable("state_unwritable", message),
            ControlError::UnreadableOverlay { .. } => Self::unavailable("state_unreadable", message),
            ControlError::NoRandomNumbers => Self::unavailable("no_random_numbers", message),
            ControlError::Unavailable => Self::unavailable("control_unavailable", message),
        }
    }
}

impl From<InvalidUser> for ApiError {
    fn from(error: InvalidUser) -> Self {
        let message = "x-keychoir-user must name one user, by visible text of at most 256 bytes.";
        Self::bad_request(ProxyError::InvalidUser(error).code(), message)
    }
}

impl From<UserUsageUnavailable> for ApiError {
    fn from(error: UserUsageUnavailable) -> Self {
        let message = "The usage of this user cannot be read now.";
        Self::unavailable(ProxyError::UserUsageUnavailable(error).code(), message)
    }
}

impl From<HistoryError> for ApiError {
    fn from(error: HistoryError) -> Self {
        match error {
            HistoryError::TooSlow => Self::unavailable(
                "query_too_slow",
                format!("{}. Request a shorter period.", capitalized(&error.to_string())),
            ),
            HistoryError::Unavailable => {
                Self::unavailable("records_unavailable", capitalized(&error.to_string()))
            }
        }
    }
}

/// Returns the message of an error with a capital first letter.
fn capitalized(message: &str) -> String {
    let mut characters = message.chars();
    characters.next().map(|first| first.to_uppercase().chain(characters).collect()).unwrap_or_default()
}

//! Lists the codes of the provider's errors, with the status of each code over HTTP.
//!
//! A WebSocket error has no status. If no row of `table` matches its code, the error is classified by the status that
//! is listed here.
//!
//! Source of the codes of HTTP: the table of errors in the provider's documentation (2026). Sources of the codes of
//! WebSockets: its AsyncAPI document of live transcription and its Python SDK 2.78. The statuses of these codes are not
//! documented. They are chosen by the meanings of the codes.

use http::StatusCode;

use super::ErrorBody;

/// A status, with the error type and the codes that the provider sends with it.
pub(in crate::elevenlabs) struct StatusRow {
    pub(in crate::elevenlabs) status: u16,
    /// The `type` of the error, or an empty string for older codes and codes of WebSockets.
    pub(in crate::elevenlabs) error_type: &'static str,
    pub(in crate::elevenlabs) codes: &'static [&'static str],
}

const fn row(status: u16, error_type: &'static str, codes: &'static [&'static str]) -> StatusRow {
    StatusRow { status, error_type, codes }
}

/// The current codes of HTTP.
#[rustfmt::skip] // Each row of the documentation has its own lines.
pub(in crate::elevenlabs) const DOCUMENTED_CODES: &[StatusRow] = &[
    row(400, "validation_error", &["text_too_long", "text_too_short", "invalid_text", "empty_text",
        "invalid_parameters", "missing_required_field", "invalid_voice_settings", "invalid_voice_id",
        "unsupported_model", "invalid_audio", "invalid_audio_format", "invalid_output_format", "audio_too_long",
        "audio_too_short", "invalid_file_type", "invalid_page_size", "invalid_cursor"]),
    row(400, "invalid_request", &["bad_request", "malformed_json", "invalid_content_type", "request_too_large"]),
    row(401, "authentication_error", &["invalid_api_key", "missing_api_key", "invalid_authorization_header",
        "unauthorized", "sign_in_required"]),
    row(402, "payment_required", &["insufficient_credits", "paid_plan_required"]),
    row(403, "authorization_error", &["forbidden", "insufficient_permissions", "workspace_access_denied",
        "feature_not_available", "subscription_required", "voice_access_denied", "model_access_denied"]),
    row(404, "not_found", &["voice_not_found", "sample_not_found", "user_not_found", "workspace_not_found",
        "project_not_found", "history_item_not_found", "document_not_found", "file_not_found",
        "conversation_not_found", "agent_not_found", "pronunciation_dictionary_not_found", "model_not_found"]),
    row(409, "conflict", &["resource_already_exists", "voice_already_exists", "already_running",
        "already_processing", "concurrent_modification", "slug_already_exists"]),
    row(429, "rate_limit_error", &["rate_limit_exceeded", "concurrent_limit_exceeded", "system_busy"]),
    row(500, "internal_error", &[]),
    row(503, "service_unavailable", &["maintenance"]),
];

/// Older codes of HTTP, which the provider sends in `status` or `error`.
#[rustfmt::skip]
pub(in crate::elevenlabs) const OLDER_CODES: &[StatusRow] = &[
    row(400, "", &["max_character_limit_exceeded", "free_users_not_allowed", "voice_limit_reached",
        "invalid_workspace_type", "can_not_use_instant_voice_cloning", "voice_does_not_exist", "invalid_uid"]),
    row(401, "", &["quota_exceeded", "missing_permissions", "needs_authorization", "detected_unusual_activity",
        "payment_issue"]),
    row(403, "", &["only_for_creator+", "output_format_not_allowed", "unaccepted_terms", "permission_denied"]),
    row(425, "", &["dubbing_not_dubbed"]),
    row(429, "", &["too_many_concurrent_requests"]),
];

/// Codes that the provider sends only on WebSockets.
#[rustfmt::skip]
pub(in crate::elevenlabs) const WEBSOCKET_CODES: &[StatusRow] = &[
    row(400, "", &["input_error", "commit_throttled", "session_time_limit_exceeded", "chunk_size_exceeded",
        "insufficient_audio_activity", "max_active_conversations", "input_timeout_exceeded"]),
    row(401, "", &["auth_error", "authentication_required"]),
    // These codes do not show whether the account or the provider has reached a limit.
    row(429, "", &["resource_exhausted", "queue_overflow", "rate_limited"]),
    row(500, "", &["transcriber_error", "something_went_wrong", "internal_server_error"]),
];

/// Finds the status of an error by its codes, or by its type if the codes are not known.
pub(super) fn find_status(body: &ErrorBody) -> Option<StatusCode> {
    let rows = || DOCUMENTED_CODES.iter().chain(OLDER_CODES).chain(WEBSOCKET_CODES);
    let by_code = || rows().find(|row| body.any_code(|code| row.codes.contains(&code)));
    let by_type =
        || rows().find(|row| !row.error_type.is_empty() && body.any_code(|code| code == row.error_type));
    StatusCode::from_u16(by_code().or_else(by_type)?.status).ok()
}

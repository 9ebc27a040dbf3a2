//! Tests the classification with captured and documented messages and close frames of each protocol.

use super::*;
use crate::elevenlabs::refusal::{classify, codes};
use crate::policy::permission::Permission;
use crate::policy::verdict::{Shortfall, Subject};
use http::StatusCode;
use serde_json::json;

const QUOTA: Verdict = Verdict::WorkspaceQuota(Shortfall { remaining: None, required: None, quota: None });

/// Compares the kind of the first message of a session with the expected one.
#[track_caller]
fn check_kind(dialect: Dialect, message: &str, expected: MessageKind) {
    assert_eq!(
        classify_message(dialect, SessionStage::Opening, message.as_bytes(), false),
        expected,
        "{message} must have the expected kind"
    );
}

#[track_caller]
fn check_refused(dialect: Dialect, message: &str, expected: Verdict) {
    check_kind(dialect, message, MessageKind::Refused(expected));
}

#[test]
fn errors_of_speech_and_dialogue_are_classified_by_their_code() {
    let speech = Dialect::Speech;
    check_refused(
        speech,
        r#"{"message":"Invalid API key","error":"invalid_api_key","code":1008}"#,
        Verdict::InvalidKey,
    );
    check_refused(
        speech,
        r#"{"message":"This request exceeds your quota of 10000. You have 4 credits remaining, while 43 credits are required for this request.","error":"quota_exceeded","code":1008}"#,
        Verdict::WorkspaceQuota(Shortfall { remaining: Some(4), required: Some(43), quota: Some(10_000) }),
    );
    check_refused(
        speech,
        r#"{"message":"None of the authentication methods (xi-api-key, authorization header, single-use token) were found.","error":"authentication_required","code":1008}"#,
        Verdict::Unexplained(UnexplainedRefusal::Unauthorized),
    );
    check_refused(
        Dialect::SpeechContexts,
        r#"{"message":"Maximum simultaneous contexts per WebSocket connection exceeded (5)","error":"max_active_conversations","code":1008}"#,
        Verdict::RequestError,
    );
    check_refused(
        Dialect::Dialogue,
        r#"{"message":"A voice with the voice_id x was not found.","error":"voice_not_found","code":"voice_not_found","param":"voices"}"#,
        Verdict::NotFound,
    );
    check_refused(
        speech,
        r#"{"message":"We are sorry, something went wrong. You are not charged for this request.","error":"something_went_wrong","code":1008}"#,
        Verdict::ServerError,
    );
}

#[test]
fn a_code_that_denies_access_allows_an_attempt_with_another_account() {
    let [unauthorized, forbidden] =
        [UnexplainedRefusal::Unauthorized, UnexplainedRefusal::Forbidden].map(Verdict::Unexplained);
    for (code, expected) in [
        ("unauthorized", unauthorized),
        ("api_key_expired", unauthorized),
        ("forbidden", forbidden),
        ("subscription_required", forbidden),
        ("voice_settings_invalid", Verdict::RequestError),
    ] {
        let message = format!(r#"{{"message":"No.","error":"{code}","code":1008}}"#);
        let kind = classify_message(Dialect::Speech, SessionStage::Opening, message.as_bytes(), false);
        assert!(
            kind == MessageKind::Refused(expected)
                || matches!(kind, MessageKind::Refused(Verdict::PlanFeature(_))),
            "{code} must be a refusal of the plan or have the verdict {expected:?}, but it is {kind:?}"
        );
    }
    check_close(1008, "", Some(forbidden));
    check_close(3000, "", Some(unauthorized));
    check_close(1008, "Have you submitted text?", Some(Verdict::RequestError));
    assert_eq!(
        classify_close(1008, "", false, true),
        Some(Verdict::RequestError),
        "the refusal must concern the client's token"
    );
}

#[test]
fn a_key_of_another_host_is_recognized_on_every_websocket() {
    let text = "Invalid API key: The API key used is for a data residency stack, however this server is \
        a global server. Please check you are calling the correct API URL.";
    for (dialect, message) in [
        (Dialect::Speech, json!({"message": text, "error": "invalid_api_key", "code": 1008})),
        (Dialect::Dialogue, json!({"message": text, "error": "invalid_api_key"})),
        (Dialect::Transcription, json!({"message_type": "auth_error", "error": text})),
        (Dialect::Agent, json!({"type": "error", "message": text})),
    ] {
        check_refused(dialect, &message.to_string(), Verdict::WrongHost);
    }
}

#[test]
fn audio_and_unparsed_messages_are_useful() {
    check_kind(Dialect::Speech, r#"{"audio":"AAAA","isFinal":null}"#, MessageKind::Useful);
    check_kind(Dialect::Speech, r#"{"audio":null,"isFinal":true}"#, MessageKind::Useful);
    check_kind(Dialect::Speech, r#"{"audio":null,"error":null}"#, MessageKind::Useful);
    check_kind(Dialect::Speech, "no json", MessageKind::Useful);
    let long_message =
        format!(r#"{{"error":"invalid_api_key","audio":"{}"}}"#, "A".repeat(MAX_REFUSAL_BYTES));
    check_kind(Dialect::Speech, &long_message, MessageKind::Useful);
}

#[test]
fn errors_of_transcription_are_classified_by_their_message_type() {
    let transcription = Dialect::Transcription;
    for (message_type, verdict) in [
        ("auth_error", Verdict::Unexplained(UnexplainedRefusal::Unauthorized)),
        ("quota_exceeded", QUOTA),
        ("rate_limited", Verdict::RateLimited(None)),
        ("unaccepted_terms", Verdict::Billing),
        ("queue_overflow", Verdict::Unexplained(UnexplainedRefusal::TooMany(None))),
        ("resource_exhausted", Verdict::Unexplained(UnexplainedRefusal::TooMany(None))),
        ("payment_issue", Verdict::Billing),
        ("transcriber_error", Verdict::ServerError),
        ("input_error", Verdict::RequestError),
        ("chunk_size_exceeded", Verdict::RequestError),
    ] {
        let message = format!(r#"{{"message_type":"{message_type}","error":"x"}}"#);
        check_refused(transcription, &message, verdict);
        check_refused(Dialect::Unknown, &message, verdict);
    }
    check_kind(transcription, r#"{"message_type":"session_started","session_id":"x"}"#, MessageKind::Useful);
    check_kind(transcription, r#"{"message_type":"partial_transcript","text":"error"}"#, MessageKind::Useful);
    check_refused(
        transcription,
        r#"{"message_type":"error","error":"Too many concurrent requests. Your current subscription is associated with a maximum of 6 concurrent requests"}"#,
        Verdict::Concurrency { maximum: Some(6) },
    );
}

#[test]
fn errors_of_an_agent_are_events() {
    let agent = Dialect::Agent;
    check_kind(agent, r#"{"type":"conversation_initiation_metadata"}"#, MessageKind::Useful);
    check_kind(agent, r#"{"type":"ping","ping_event":{"event_id":1}}"#, MessageKind::KeepAlive);
    check_kind(agent, r#"{"type":"queue_status","queue_status_event":{"position":3}}"#, MessageKind::Queued);
    check_refused(
        agent,
        r#"{"type":"error","message":"received 1002 (protocol error) This request exceeds your quota limit."}"#,
        QUOTA,
    );
    check_refused(
        agent,
        r#"{"type":"client_error","error_event":{"code":"quota_exceeded","message":"x"}}"#,
        QUOTA,
    );
    check_refused(agent, r#"{"type":"error","message":"Agent not available"}"#, Verdict::RequestError);
}

#[track_caller]
fn check_close(code: u16, reason: &str, expected: Option<Verdict>) {
    assert_eq!(
        classify_close(code, reason, false, false),
        expected,
        "the close frame {code} {reason:?} must have the expected verdict"
    );
}

#[test]
fn a_close_frame_is_classified_by_its_reason_and_then_by_its_code() {
    check_close(1000, "", None);
    check_close(1005, "", None);
    check_close(1002, "This request exceeds your quota limit.", Some(QUOTA));
    check_close(1008, "Invalid API key", Some(Verdict::InvalidKey));
    check_close(
        1008,
        "Too many concurrent requests. Your current subscription is associated with a maximum of 10 concurrent \
        requests (running ",
        Some(Verdict::Concurrency { maximum: Some(10) }),
    );
    check_close(
        1008,
        "Have not received a new text input within the timeout of 20 seconds.",
        Some(Verdict::RequestError),
    );
    check_close(1008, "Unusual activity detected. Free Tier usage disabled.", Some(Verdict::Abuse));
    // A close reason has at most 123 bytes, so a longer message is truncated.
    let wrong_host = "Invalid API key: The API key used is for a data residency stack, however this \
        server is a global server. Please check you are calling the correct API URL.";
    check_close(1008, &wrong_host[..123], Some(Verdict::WrongHost));
    check_close(1009, "", Some(Verdict::RequestError));
    check_close(1011, "", Some(Verdict::ServerError));
    check_close(1012, "", Some(Verdict::Busy));
}

#[test]
fn a_refused_token_of_a_client_is_not_evidence_about_a_key() {
    let message = br#"{"message_type":"auth_error","error":"x"}"#;
    assert_eq!(
        classify_message(Dialect::Transcription, SessionStage::Opening, message, true),
        MessageKind::Refused(Verdict::RequestError)
    );
    assert_eq!(classify_close(1008, "Invalid API key", false, true), Some(Verdict::RequestError));
    assert_eq!(classify_close(1002, "This request exceeds your quota", false, true), Some(QUOTA));
}

/// Returns all codes with their verdicts. The codes of HTTP are classified with their status, and the codes of
/// WebSockets in a close frame.
fn verdicts_of_codes() -> Vec<(&'static str, Verdict)> {
    let http_codes = codes::DOCUMENTED_CODES.iter().chain(codes::OLDER_CODES).flat_map(|row| {
        let status = StatusCode::from_u16(row.status).unwrap();
        row.codes.iter().map(move |code| {
            let body = ErrorBody::parse(json!({"detail": {"code": code}}).to_string().as_bytes());
            (*code, classify(status, Some(&body), None))
        })
    });
    let websocket_codes = codes::WEBSOCKET_CODES.iter().flat_map(|row| row.codes.iter());
    http_codes
        .chain(
            websocket_codes
                .map(|code| (*code, classify_without_status(&ErrorBody::from_close_reason(code)).unwrap())),
        )
        .collect()
}

/// All protocols whose messages are parsed.
const INSPECTED_DIALECTS: [Dialect; 7] = [
    Dialect::Speech,
    Dialect::SpeechContexts,
    Dialect::Dialogue,
    Dialect::DialogueContexts,
    Dialect::Transcription,
    Dialect::Agent,
    Dialect::Unknown,
];

/// Returns messages with a code, one in each format in which the provider can send it.
fn messages_with_code(code: &str) -> Vec<Value> {
    vec![
        json!({"message": "x", "error": code, "code": 1008}),
        json!({"message": "x", "error": code, "code": 1008, "contextId": "c"}),
        json!({"message": "x", "error": "x", "code": code, "param": null}),
        json!({"message_type": code, "error": "x"}),
        json!({"message_type": code}),
        json!({"message_type": "error", "error": code}),
        json!({"message_type": "error", "error": "x", "code": code}),
        json!({"type": "error", "message": code}),
        json!({"type": "error", "error": code, "message": "x"}),
        json!({"type": "error", "error_event": {"code": 1008, "error_type": code, "message": "x"}}),
        json!({"type": "client_error", "error_event": {"code": code, "reason": "x"}}),
        json!({"type": code, "message": "x"}),
        json!({"status": code, "message": "x"}),
        json!({"code": code, "message": "x"}),
        json!({"detail": {"status": code, "message": "x"}}),
        json!({"detail": {"type": "x", "code": code, "status": code, "message": "x", "request_id": "r"}}),
        json!({"detail": code}),
        json!({"error": {"code": code, "message": "x"}}),
    ]
}

#[test]
fn a_code_is_recognized_in_every_format_on_every_websocket() {
    for (code, expected) in verdicts_of_codes() {
        for dialect in INSPECTED_DIALECTS {
            for message in messages_with_code(code) {
                // In an unknown protocol, a message without a code is not classified.
                let has_only_message = message.get("detail").is_some_and(Value::is_string);
                if !(has_only_message && dialect == Dialect::Unknown) {
                    check_refused(dialect, &message.to_string(), expected);
                }
            }
        }
        for close_code in [1000, 1002, 1008, 1011, 4000] {
            check_close(close_code, code, Some(expected));
            check_close(close_code, &format!("{code}: x"), Some(expected));
            let body = json!({"detail": {"status": code, "message": "x"}}).to_string();
            check_close(close_code, &body, Some(expected));
        }
    }
}

/// The code of some messages is less specific than their text.
#[test]
fn a_message_of_http_is_recognized_in_every_format_on_every_websocket() {
    let missing_permission = Verdict::MissingPermission(Permission::parse("speech_to_text"));
    for (error_text, expected) in [
        (
            "The API key you used is missing the permission speech_to_text to execute this operation.",
            missing_permission,
        ),
        (
            "Free users cannot use library voices via the API. Please upgrade your subscription to use this voice.",
            Verdict::PlanFeature(Subject::Voice),
        ),
        (
            "Your subscription has a failed or incomplete payment. Complete the latest invoice to continue usage.",
            Verdict::Billing,
        ),
    ] {
        for message in [
            json!({"message": error_text, "error": "x", "code": 1008}),
            json!({"message_type": "auth_error", "error": error_text}),
            json!({"message_type": "error", "error": error_text}),
            json!({"type": "error", "message": error_text}),
            json!({"type": "error", "error_event": {"code": 1008, "message": "x", "reason": error_text}}),
        ] {
            for dialect in INSPECTED_DIALECTS {
                check_refused(dialect, &message.to_string(), expected);
            }
        }
        for message in [
            json!({"message": error_text}),
            json!({"detail": error_text}),
            json!({"detail": {"message": error_text}}),
        ] {
            for dialect in INSPECTED_DIALECTS.into_iter().filter(|dialect| *dialect != Dialect::Unknown) {
                check_refused(dialect, &message.to_string(), expected);
            }
        }
        for code in [1002, 1008, 3000, 4003] {
            check_close(code, error_text, Some(expected));
        }
    }
}

#[test]
fn only_a_message_about_the_key_makes_it_invalid() {
    let auth_error = |text: &str| json!({"message_type": "auth_error", "error": text}).to_string();
    let unexplained = Verdict::Unexplained(UnexplainedRefusal::Unauthorized);
    for (text, expected) in [
        ("You must be authenticated to use this endpoint.", Verdict::InvalidKey),
        ("Invalid API key", Verdict::InvalidKey),
        ("Your session has ended.", unexplained),
        ("", unexplained),
    ] {
        check_refused(Dialect::Transcription, &auth_error(text), expected);
    }
    check_close(1008, "You must be authenticated to use this endpoint.", Some(unexplained));
}

/// Transcripts and the parameters of tool calls may contain the text of a refusal.
#[test]
fn a_useful_message_may_contain_the_text_of_a_refusal() {
    let refusal_text = "Invalid API key";
    for (dialect, message) in [
        (Dialect::Speech, json!({"audio": "AAAA", "error": "quota_exceeded", "message": refusal_text})),
        (Dialect::Speech, json!({"audio": null, "isFinal": true, "message": refusal_text})),
        (
            Dialect::Speech,
            json!({"audio": "AAAA", "alignment": {"chars": ["quota_exceeded"]}, "code": "forbidden"}),
        ),
        (Dialect::SpeechContexts, json!({"contextId": "quota_exceeded", "isFinal": true})),
        (Dialect::Dialogue, json!({"context_id": "invalid_api_key", "is_final": true})),
        (
            Dialect::Transcription,
            json!({"message_type": "session_started", "session_id": "invalid_api_key", "error": "forbidden"}),
        ),
        (Dialect::Transcription, json!({"message_type": "partial_transcript", "text": refusal_text})),
        (
            Dialect::Transcription,
            json!({"message_type": "committed_transcript", "text": "quota_exceeded", "error": "forbidden"}),
        ),
        (
            Dialect::Agent,
            json!({"type": "agent_response", "agent_response_event": {"agent_response": refusal_text, "error": "quota_exceeded"}}),
        ),
        (
            Dialect::Agent,
            json!({"type": "client_tool_call", "client_tool_call": {"tool_name": "forbidden", "parameters": {"error": "quota_exceeded", "detail": {"code": "invalid_api_key"}}}}),
        ),
        (
            Dialect::Agent,
            json!({"type": "user_transcript", "user_transcription_event": {"user_transcript": refusal_text}}),
        ),
        (
            Dialect::Agent,
            json!({"type": "agent_tool_response", "agent_tool_response": {"is_error": true, "tool_name": "not_found"}}),
        ),
        (Dialect::Unknown, json!({"message": "The voice was not found."})),
        (Dialect::Unknown, json!({"type": "transcript", "status": "done", "text": "quota_exceeded"})),
        (Dialect::Foreign, json!({"error": "quota_exceeded"})),
    ] {
        let message = message.to_string();
        check_kind(dialect, &message, MessageKind::Useful);
        assert_eq!(
            classify_message(dialect, SessionStage::Served, message.as_bytes(), false),
            MessageKind::Useful,
            "{message} must be useful in a served session"
        );
    }
}

#[test]
fn a_served_session_is_refused_only_in_the_format_of_its_protocol() {
    let served = |dialect, message: Value| {
        classify_message(dialect, SessionStage::Served, message.to_string().as_bytes(), false)
    };
    for (dialect, message) in [
        (Dialect::Speech, json!({"message": "x", "error": "quota_exceeded", "code": 1008})),
        (Dialect::Transcription, json!({"message_type": "quota_exceeded", "error": "x"})),
        (Dialect::Agent, json!({"type": "error", "message": "This request exceeds your quota limit."})),
    ] {
        assert_eq!(served(dialect, message), MessageKind::Refused(QUOTA));
    }
    for (dialect, message) in [
        (Dialect::Speech, json!({"message": "This request exceeds your quota", "code": "quota_exceeded"})),
        (Dialect::Speech, json!({"detail": {"code": "quota_exceeded"}})),
        (Dialect::Transcription, json!({"message_type": "gizmo", "error": "quota_exceeded"})),
        (Dialect::Agent, json!({"type": "quota_exceeded", "message": "x", "error": "quota_exceeded"})),
    ] {
        assert_eq!(served(dialect, message), MessageKind::Useful);
    }
}

#[test]
fn the_close_frame_decides_whether_an_unknown_error_is_a_refusal() {
    for (dialect, message) in [
        (Dialect::Transcription, json!({"message_type": "gizmo", "error": "Gizmo."})),
        (Dialect::Transcription, json!({"detail": {"code": "gizmo"}})),
        (Dialect::Agent, json!({"type": "gizmo", "error": "Gizmo."})),
        (Dialect::Speech, json!({"message": "Gizmo.", "code": 1008})),
    ] {
        check_kind(dialect, &message.to_string(), MessageKind::UnknownError);
    }
    let unexplained = Some(Verdict::Unexplained(UnexplainedRefusal::Forbidden));
    for (code, reason, expected) in [
        (1008, "", unexplained),
        (1008, "Gizmo.", unexplained),
        (1008, "quota_exceeded", Some(QUOTA)),
        (1011, "", Some(Verdict::ServerError)),
        (1000, "", Some(Verdict::RequestError)),
    ] {
        assert_eq!(
            classify_close(code, reason, true, false),
            expected,
            "the close frame {code} {reason:?} after an unknown error must have the expected verdict"
        );
    }
    check_kind(Dialect::Transcription, r#"{"message_type":"gizmo","text":"x"}"#, MessageKind::Useful);
    check_refused(
        Dialect::Transcription,
        r#"{"message_type":"gizmo","error":"Access denied."}"#,
        Verdict::Unexplained(UnexplainedRefusal::Forbidden),
    );
}

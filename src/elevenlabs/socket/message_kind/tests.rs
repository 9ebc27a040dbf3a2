use super::*;
use crate::elevenlabs::refusal::{classify, codes};
use crate::policy::permission::Permission;
use crate::policy::verdict::{Shortfall, Subject};
use http::StatusCode;
use serde_json::json;

const QUOTA: Verdict = Verdict::WorkspaceQuota(Shortfall { remaining: None, required: None, quota: None });

#[track_caller]
fn check(dialect: Dialect, message: &str, expected: MessageKind) {
    assert_eq!(
        classify_message(dialect, SessionStage::Opening, message.as_bytes(), false),
        expected,
        "{message}"
    );
}

#[track_caller]
fn refused(dialect: Dialect, message: &str, expected: Verdict) {
    check(dialect, message, MessageKind::Refused(expected));
}

#[test]
fn an_error_of_speech_has_a_code() {
    let speech = Dialect::Speech;
    refused(
        speech,
        r#"{"message":"Invalid API key","error":"invalid_api_key","code":1008}"#,
        Verdict::InvalidKey,
    );
    refused(
        speech,
        r#"{"message":"This request exceeds your quota of 10000. You have 4 credits remaining, while 43 credits are required for this request.","error":"quota_exceeded","code":1008}"#,
        Verdict::WorkspaceQuota(Shortfall { remaining: Some(4), required: Some(43), quota: Some(10_000) }),
    );
    refused(
        speech,
        r#"{"message":"None of the authentication methods (xi-api-key, authorization header, single-use token) were found.","error":"authentication_required","code":1008}"#,
        Verdict::Unexplained(Refusal::Unauthorized),
    );
    refused(
        Dialect::SpeechContexts,
        r#"{"message":"Maximum simultaneous contexts per WebSocket connection exceeded (5)","error":"max_active_conversations","code":1008}"#,
        Verdict::RequestError,
    );
    refused(
        Dialect::Dialogue,
        r#"{"message":"A voice with the voice_id x was not found.","error":"voice_not_found","code":"voice_not_found","param":"voices"}"#,
        Verdict::NotFound,
    );
    refused(
        speech,
        r#"{"message":"We are sorry, something went wrong. You are not charged for this request.","error":"something_went_wrong","code":1008}"#,
        Verdict::ServerError,
    );
}

#[test]
fn a_code_that_denies_access_is_retried_in_another_account() {
    let unclear = [Refusal::Unauthorized, Refusal::Forbidden].map(Verdict::Unexplained);
    for (word, refusal) in [
        ("unauthorized", unclear[0]),
        ("api_key_expired", unclear[0]),
        ("forbidden", unclear[1]),
        ("subscription_required", unclear[1]),
        ("voice_settings_invalid", Verdict::RequestError),
    ] {
        let message = format!(r#"{{"message":"No.","error":"{word}","code":1008}}"#);
        let kind = classify_message(Dialect::Speech, SessionStage::Opening, message.as_bytes(), false);
        assert!(
            kind == MessageKind::Refused(refusal)
                || matches!(kind, MessageKind::Refused(Verdict::PlanFeature(_))),
            "{word}: {kind:?}"
        );
    }
    check_close(1008, "", Some(unclear[1]));
    check_close(3000, "", Some(unclear[0]));
    check_close(1008, "Have you submitted text?", Some(Verdict::RequestError));
    assert_eq!(classify_close(1008, "", false, true), Some(Verdict::RequestError), "the client's own token");
}

#[test]
fn a_key_of_another_host_is_known_on_every_websocket() {
    let words = "Invalid API key: The API key used is for a data residency stack, however this server is a global server. Please check you are calling the correct API URL.";
    for (dialect, message) in [
        (Dialect::Speech, serde_json::json!({"message": words, "error": "invalid_api_key", "code": 1008})),
        (Dialect::Dialogue, serde_json::json!({"message": words, "error": "invalid_api_key"})),
        (Dialect::Transcription, serde_json::json!({"message_type": "auth_error", "error": words})),
        (Dialect::Agent, serde_json::json!({"type": "error", "message": words})),
    ] {
        refused(dialect, &message.to_string(), Verdict::WrongHost);
    }
}

#[test]
fn audio_is_useful_with_any_other_members() {
    check(Dialect::Speech, r#"{"audio":"AAAA","isFinal":null}"#, MessageKind::Useful);
    check(Dialect::Speech, r#"{"audio":null,"isFinal":true}"#, MessageKind::Useful);
    check(Dialect::Speech, r#"{"audio":null,"error":null}"#, MessageKind::Useful);
    check(Dialect::Speech, "no json", MessageKind::Useful);
    let long = format!(r#"{{"error":"invalid_api_key","audio":"{}"}}"#, "A".repeat(REFUSAL_BYTES_MAX));
    check(Dialect::Speech, &long, MessageKind::Useful);
}

#[test]
fn an_error_of_transcription_has_a_message_type() {
    let transcription = Dialect::Transcription;
    for (kind, verdict) in [
        ("auth_error", Verdict::Unexplained(Refusal::Unauthorized)),
        ("quota_exceeded", QUOTA),
        ("rate_limited", Verdict::RateLimited(None)),
        ("unaccepted_terms", Verdict::Billing),
        ("queue_overflow", Verdict::Unexplained(Refusal::TooMany(None))),
        ("resource_exhausted", Verdict::Unexplained(Refusal::TooMany(None))),
        ("payment_issue", Verdict::Billing),
        ("transcriber_error", Verdict::ServerError),
        ("input_error", Verdict::RequestError),
        ("chunk_size_exceeded", Verdict::RequestError),
    ] {
        let message = format!(r#"{{"message_type":"{kind}","error":"whatever"}}"#);
        refused(transcription, &message, verdict);
        refused(Dialect::Unknown, &message, verdict);
    }
    check(transcription, r#"{"message_type":"session_started","session_id":"x"}"#, MessageKind::Useful);
    check(transcription, r#"{"message_type":"partial_transcript","text":"error"}"#, MessageKind::Useful);
    refused(
        transcription,
        r#"{"message_type":"error","error":"Too many concurrent requests. Your current subscription is associated with a maximum of 6 concurrent requests"}"#,
        Verdict::Concurrency { maximum: Some(6) },
    );
}

#[test]
fn an_error_of_an_agent_is_an_event() {
    let agent = Dialect::Agent;
    check(agent, r#"{"type":"conversation_initiation_metadata"}"#, MessageKind::Useful);
    check(agent, r#"{"type":"ping","ping_event":{"event_id":1}}"#, MessageKind::Aside);
    check(agent, r#"{"type":"queue_status","queue_status_event":{"position":3}}"#, MessageKind::Queued);
    refused(
        agent,
        r#"{"type":"error","message":"received 1002 (protocol error) This request exceeds your quota limit."}"#,
        QUOTA,
    );
    refused(agent, r#"{"type":"client_error","error_event":{"code":"quota_exceeded","message":"x"}}"#, QUOTA);
    refused(agent, r#"{"type":"error","message":"Agent not available"}"#, Verdict::RequestError);
}

#[track_caller]
fn check_close(code: u16, reason: &str, expected: Option<Verdict>) {
    assert_eq!(classify_close(code, reason, false, false), expected, "{code} {reason}");
}

#[test]
fn a_close_is_classified_by_its_reason_and_then_by_its_code() {
    check_close(1000, "", None);
    check_close(1005, "", None);
    check_close(1002, "This request exceeds your quota limit.", Some(QUOTA));
    check_close(1008, "Invalid API key", Some(Verdict::InvalidKey));
    check_close(
        1008,
        "Too many concurrent requests. Your current subscription is associated with a maximum of 10 concurrent requests (running ",
        Some(Verdict::Concurrency { maximum: Some(10) }),
    );
    check_close(
        1008,
        "Have not received a new text input within the timeout of 20 seconds.",
        Some(Verdict::RequestError),
    );
    check_close(1008, "Unusual activity detected. Free Tier usage disabled.", Some(Verdict::Abuse));
    // A close reason has at most 123 bytes: the provider truncates it.
    let wrong_host = "Invalid API key: The API key used is for a data residency stack, however this server is a global server. Please check you are calling the correct API URL.";
    check_close(1008, &wrong_host[..123], Some(Verdict::WrongHost));
    check_close(1009, "", Some(Verdict::RequestError));
    check_close(1011, "", Some(Verdict::ServerError));
    check_close(1012, "", Some(Verdict::Busy));
}

#[test]
fn a_refused_token_of_a_client_is_no_evidence_about_a_key() {
    let message = br#"{"message_type":"auth_error","error":"x"}"#;
    assert_eq!(
        classify_message(Dialect::Transcription, SessionStage::Opening, message, true),
        MessageKind::Refused(Verdict::RequestError)
    );
    assert_eq!(classify_close(1008, "Invalid API key", false, true), Some(Verdict::RequestError));
    assert_eq!(classify_close(1002, "This request exceeds your quota", false, true), Some(QUOTA));
}

/// Codes of errors and their meaning. Codes of HTTP are classified with their status, codes of WebSockets
/// in a close frame.
fn every_code() -> Vec<(&'static str, Verdict)> {
    let of_http = codes::DOCUMENTED.iter().chain(codes::OLDER).flat_map(|row| {
        let status = StatusCode::from_u16(row.status).unwrap();
        row.codes.iter().map(move |code| {
            let body = ErrorBody::read(json!({"detail": {"code": code}}).to_string().as_bytes());
            (*code, classify(status, Some(&body), None))
        })
    });
    let of_sockets = codes::OF_SOCKETS.iter().flat_map(|row| row.codes.iter());
    of_http.chain(of_sockets.map(|code| (*code, in_band(&ErrorBody::of_reason(code)).unwrap()))).collect()
}

const READ: [Dialect; 7] = [
    Dialect::Speech,
    Dialect::SpeechContexts,
    Dialect::Dialogue,
    Dialect::DialogueContexts,
    Dialect::Transcription,
    Dialect::Agent,
    Dialect::Unknown,
];

/// Every message format in which a code can appear.
fn shapes(code: &str) -> Vec<Value> {
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
fn a_code_is_known_in_every_shape_on_every_websocket() {
    for (code, expected) in every_code() {
        for dialect in READ {
            for message in shapes(code) {
                // In an unknown protocol, a lone sentence is not classified.
                let is_sentence = message.get("detail").is_some_and(Value::is_string);
                if !(is_sentence && dialect == Dialect::Unknown) {
                    refused(dialect, &message.to_string(), expected);
                }
            }
        }
        for close in [1000, 1002, 1008, 1011, 4000] {
            check_close(close, code, Some(expected));
            check_close(close, &format!("{code}: x"), Some(expected));
            let body = json!({"detail": {"status": code, "message": "x"}}).to_string();
            check_close(close, &body, Some(expected));
        }
    }
}

/// A sentence of HTTP is known in messages and close frames, also where the code is less specific.
#[test]
fn a_sentence_is_known_in_every_shape_on_every_websocket() {
    let missing = Verdict::MissingPermission(Permission::parse("speech_to_text"));
    for (sentence, expected) in [
        ("The API key you used is missing the permission speech_to_text to execute this operation.", missing),
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
            json!({"message": sentence, "error": "x", "code": 1008}),
            json!({"message_type": "auth_error", "error": sentence}),
            json!({"message_type": "error", "error": sentence}),
            json!({"type": "error", "message": sentence}),
            json!({"type": "error", "error_event": {"code": 1008, "message": "x", "reason": sentence}}),
        ] {
            for dialect in READ {
                refused(dialect, &message.to_string(), expected);
            }
        }
        for message in [
            json!({"message": sentence}),
            json!({"detail": sentence}),
            json!({"detail": {"message": sentence}}),
        ] {
            for dialect in READ.into_iter().filter(|dialect| *dialect != Dialect::Unknown) {
                refused(dialect, &message.to_string(), expected);
            }
        }
        for code in [1002, 1008, 3000, 4003] {
            check_close(code, sentence, Some(expected));
        }
    }
}

/// The captured text for an unknown key, and any other text.
#[test]
fn only_words_about_the_key_make_it_invalid() {
    let auth_error = |text: &str| json!({"message_type": "auth_error", "error": text}).to_string();
    let unclear = Verdict::Unexplained(Refusal::Unauthorized);
    for (text, expected) in [
        ("You must be authenticated to use this endpoint.", Verdict::InvalidKey),
        ("Invalid API key", Verdict::InvalidKey),
        ("Your session has ended.", unclear),
        ("", unclear),
    ] {
        refused(Dialect::Transcription, &auth_error(text), expected);
    }
    check_close(1008, "You must be authenticated to use this endpoint.", Some(unclear));
}

/// Transcripts and the parameters of tool calls may contain the words of refusals.
#[test]
fn a_useful_message_may_contain_words_of_a_refusal() {
    let invalid = "Invalid API key";
    for (dialect, message) in [
        (Dialect::Speech, json!({"audio": "AAAA", "error": "quota_exceeded", "message": invalid})),
        (Dialect::Speech, json!({"audio": null, "isFinal": true, "message": invalid})),
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
        (Dialect::Transcription, json!({"message_type": "partial_transcript", "text": invalid})),
        (
            Dialect::Transcription,
            json!({"message_type": "committed_transcript", "text": "quota_exceeded", "error": "forbidden"}),
        ),
        (
            Dialect::Agent,
            json!({"type": "agent_response", "agent_response_event": {"agent_response": invalid, "error": "quota_exceeded"}}),
        ),
        (
            Dialect::Agent,
            json!({"type": "client_tool_call", "client_tool_call": {"tool_name": "forbidden", "parameters": {"error": "quota_exceeded", "detail": {"code": "invalid_api_key"}}}}),
        ),
        (
            Dialect::Agent,
            json!({"type": "user_transcript", "user_transcription_event": {"user_transcript": invalid}}),
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
        check(dialect, &message, MessageKind::Useful);
        assert_eq!(
            classify_message(dialect, SessionStage::Served, message.as_bytes(), false),
            MessageKind::Useful,
            "{message}"
        );
    }
}

/// After the first useful message, only a message in the error format of the protocol is an error.
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

/// An unknown error waits for the close frame after it, which decides whether the session is refused.
#[test]
fn the_close_decides_about_an_error_in_unknown_words() {
    for (dialect, message) in [
        (Dialect::Transcription, json!({"message_type": "gizmo", "error": "Gizmo."})),
        (Dialect::Transcription, json!({"detail": {"code": "gizmo"}})),
        (Dialect::Agent, json!({"type": "gizmo", "error": "Gizmo."})),
        (Dialect::Speech, json!({"message": "Gizmo.", "code": 1008})),
    ] {
        check(dialect, &message.to_string(), MessageKind::UnknownError);
    }
    let unclear = Some(Verdict::Unexplained(Refusal::Forbidden));
    for (code, reason, expected) in [
        (1008, "", unclear),
        (1008, "Gizmo.", unclear),
        (1008, "quota_exceeded", Some(QUOTA)),
        (1011, "", Some(Verdict::ServerError)),
        (1000, "", Some(Verdict::RequestError)),
    ] {
        assert_eq!(classify_close(code, reason, true, false), expected, "{code} {reason}");
    }
    check(Dialect::Transcription, r#"{"message_type":"gizmo","text":"x"}"#, MessageKind::Useful);
    refused(
        Dialect::Transcription,
        r#"{"message_type":"gizmo","error":"Access denied."}"#,
        Verdict::Unexplained(Refusal::Forbidden),
    );
}

//! What the provider says on a socket: whether the session has begun, or is refused and why. Message
//! and close are judged alike, because neither comes without the other for long, and a code alone says
//! little: 1008 is a bad key as well as a client that was silent for too long.

use serde_json::{Map, Value};

use super::Dialect;
use crate::policy::classify::{ErrorBody, Refusal, Shortfall, Verdict, in_band};

/// What a message, or the end, means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// The session is served: whatever comes now is the client's.
    Useful,
    /// It is refused.
    Refused(Verdict),
    /// It says neither: a question whether the client is there.
    Aside,
    /// It says neither: the agent is busy and the client waits for it, which is not billed. Source: the
    /// provider's changelog up to September 2026 (`queueing_config`).
    Queued,
}

/// Longer messages are sound and no refusals.
pub const REFUSAL_BYTES_MAX: usize = 16 * 1024;

/// What a text message means. `has_token` says that the client brought a token of the provider's own:
/// then what is wrong with it is not the key's matter.
#[must_use]
pub fn hear(dialect: Dialect, message: &[u8], has_token: bool) -> Heard {
    if message.len() > REFUSAL_BYTES_MAX {
        return Heard::Useful;
    }
    let Ok(members) = serde_json::from_slice::<Map<String, Value>>(message) else { return Heard::Useful };
    let heard = match dialect {
        Dialect::Speech | Dialect::SpeechContexts | Dialect::Dialogue | Dialect::DialogueContexts => {
            hear_spoken(&members)
        }
        Dialect::Transcription => hear_typed(&members).unwrap_or(Heard::Useful),
        Dialect::Agent => hear_agent(&members),
        Dialect::Unknown => hear_typed(&members).unwrap_or_else(|| hear_spoken(&members)),
        Dialect::Foreign => Heard::Useful,
    };
    match heard {
        Heard::Refused(verdict) if has_token => Heard::Refused(not_the_key(verdict)),
        Heard::Refused(_) | Heard::Useful | Heard::Aside | Heard::Queued => heard,
    }
}

/// What the end of a session means; `None` for an end that refuses nothing.
#[must_use]
pub fn hear_close(code: u16, reason: &str, has_token: bool) -> Option<Verdict> {
    let said = ErrorBody::said([], bare(reason));
    let verdict = in_band(&said).or(match code {
        // Nothing is wrong, or both ends have other things to do.
        1000 | 1001 | 1005 => None,
        1011 => Some(Verdict::ServerError),
        // A restart, and «try again later».
        1012 | 1013 => Some(Verdict::Busy),
        // IANA's registry of close codes has 3000 for unauthorized and 3003 for forbidden.
        3000 => Some(Verdict::Unexplained(Refusal::Unauthorized)),
        3003 => Some(Verdict::Unexplained(Refusal::Forbidden)),
        1008 if reason.is_empty() => Some(Verdict::Unexplained(Refusal::Forbidden)),
        _ => Some(by_access(&said).unwrap_or(Verdict::RequestError)),
    })?;
    Some(if has_token { not_the_key(verdict) } else { verdict })
}

/// `{"message","error","code"}` of speech and dialogue.
fn hear_spoken(members: &Map<String, Value>) -> Heard {
    let Some(word) = members.get("error").and_then(Value::as_str) else { return Heard::Useful };
    let code = members.get("code").and_then(Value::as_str);
    let message = members.get("message").and_then(Value::as_str).unwrap_or_default();
    let said = ErrorBody::said([Some(word), code], message);
    let otherwise = || {
        // "We are sorry, something went wrong." (captured with close code 1008).
        let has_failed = said.message_starts("we are sorry");
        if has_failed { Verdict::ServerError } else { Verdict::RequestError }
    };
    Heard::Refused(in_band(&said).or_else(|| by_access(&said)).unwrap_or_else(otherwise))
}

/// The verdict of an unknown error word that denies access, on a socket, where no status does. Whether the
/// account or the request is at fault shows when a second account is asked.
fn by_access(said: &ErrorBody) -> Option<Verdict> {
    const KEY: [&str; 4] = ["unauthorized", "unauthorised", "authentication", "api_key"];
    const ACCESS: [&str; 4] = ["forbidden", "denied", "not_allowed", "subscription"];
    let has = |parts: [&str; 4]| {
        let is_among = |part: &str| said.any_word(|word| word.contains(part)) || said.message_has(part);
        parts.iter().any(|part| is_among(part) || said.message_has(&part.replace('_', " ")))
    };
    if has(KEY) {
        Some(Verdict::Unexplained(Refusal::Unauthorized))
    } else {
        has(ACCESS).then_some(Verdict::Unexplained(Refusal::Forbidden))
    }
}

/// `{"message_type","error"}` of transcription, translation and live dubbing; `None` for no refusal.
/// Source: the provider's AsyncAPI document of Scribe, and its Python SDK 2.78.
fn hear_typed(members: &Map<String, Value>) -> Option<Heard> {
    let kind = members.get("message_type").and_then(Value::as_str)?;
    let message = members.get("error").and_then(Value::as_str).unwrap_or_default();
    let by_kind = match kind {
        // "You must be authenticated to use this endpoint.", also to a bad key.
        "auth_error" => Verdict::InvalidKey,
        "quota_exceeded" => Verdict::WorkspaceQuota(Shortfall::default()),
        "rate_limited" => Verdict::RateLimited(None),
        "unaccepted_terms" | "payment_issue" => Verdict::Billing,
        "resource_exhausted" | "queue_overflow" => Verdict::Busy,
        "transcriber_error" => Verdict::ServerError,
        "error"
        | "input_error"
        | "invalid_request"
        | "commit_throttled"
        | "session_time_limit_exceeded"
        | "chunk_size_exceeded"
        | "insufficient_audio_activity" => Verdict::RequestError,
        _ => return None,
    };
    Some(Heard::Refused(in_band(&ErrorBody::said([], message)).unwrap_or(by_kind)))
}

/// Events of an agent: errors are flat, or in an event of their own.
fn hear_agent(members: &Map<String, Value>) -> Heard {
    match members.get("type").and_then(Value::as_str) {
        Some("ping") => Heard::Aside,
        Some("queue_status") => Heard::Queued,
        Some("error" | "client_error" | "error_event") => {
            let event = members.get("error_event").and_then(Value::as_object).unwrap_or(members);
            let text = |name: &str| event.get(name).and_then(Value::as_str);
            let message = text("message").or_else(|| text("reason")).unwrap_or_default();
            let said = ErrorBody::said([text("code"), text("error_type")], bare(message));
            Heard::Refused(in_band(&said).or_else(|| by_access(&said)).unwrap_or(Verdict::RequestError))
        }
        _ => Heard::Useful,
    }
}

/// A reason that another socket's end is told in:
/// "received 1002 (protocol error) This request exceeds your quota limit." (elevenlabs/packages#911).
fn bare(message: &str) -> &str {
    match message.strip_prefix("received 1").and_then(|rest| rest.split_once(") ")) {
        Some((_, told)) => told,
        None => message,
    }
}

/// The same refusal when it is the client's own token that was judged.
fn not_the_key(verdict: Verdict) -> Verdict {
    let is_of_the_key = matches!(verdict, Verdict::InvalidKey | Verdict::WrongHost | Verdict::Unexplained(_));
    if is_of_the_key { Verdict::RequestError } else { verdict }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUOTA: Verdict =
        Verdict::WorkspaceQuota(Shortfall { remaining: None, required: None, quota: None });

    #[track_caller]
    fn check(dialect: Dialect, message: &str, expected: Heard) {
        assert_eq!(hear(dialect, message.as_bytes(), false), expected, "{message}");
    }

    #[track_caller]
    fn refused(dialect: Dialect, message: &str, expected: Verdict) {
        check(dialect, message, Heard::Refused(expected));
    }

    #[test]
    fn speech_says_what_is_wrong_in_a_word() {
        let speech = Dialect::Speech;
        refused(
            speech,
            r#"{"message":"Invalid API key","error":"invalid_api_key","code":1008}"#,
            Verdict::InvalidKey,
        );
        refused(
            speech,
            r#"{"message":"This request exceeds your quota of 10000. You have 4 credits remaining, while 43 credits are required for this request.","error":"quota_exceeded","code":1008}"#,
            Verdict::WorkspaceQuota(Shortfall {
                remaining: Some(4),
                required: Some(43),
                quota: Some(10_000),
            }),
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
    fn words_that_say_who_may_not_are_another_accounts_matter() {
        let unclear = [Refusal::Unauthorized, Refusal::Forbidden].map(Verdict::Unexplained);
        for (word, refusal) in [
            ("unauthorized", unclear[0]),
            ("api_key_expired", unclear[0]),
            ("forbidden", unclear[1]),
            ("subscription_required", unclear[1]),
            ("voice_settings_invalid", Verdict::RequestError),
        ] {
            let message = format!(r#"{{"message":"No.","error":"{word}","code":1008}}"#);
            let is_known = hear(Dialect::Speech, message.as_bytes(), false);
            assert!(
                is_known == Heard::Refused(refusal)
                    || matches!(is_known, Heard::Refused(Verdict::PlanFeature(_))),
                "{word}: {is_known:?}"
            );
        }
        check_close(1008, "", Some(unclear[1]));
        check_close(3000, "", Some(unclear[0]));
        check_close(1008, "Have you submitted text?", Some(Verdict::RequestError));
        assert_eq!(hear_close(1008, "", true), Some(Verdict::RequestError), "the client's own token");
    }

    #[test]
    fn a_key_of_another_host_is_known_on_every_socket() {
        let words = "Invalid API key: The API key used is for a data residency stack, however this server is a global server. Please check you are calling the correct API URL.";
        for (dialect, message) in [
            (
                Dialect::Speech,
                serde_json::json!({"message": words, "error": "invalid_api_key", "code": 1008}),
            ),
            (Dialect::Dialogue, serde_json::json!({"message": words, "error": "invalid_api_key"})),
            (Dialect::Transcription, serde_json::json!({"message_type": "auth_error", "error": words})),
            (Dialect::Agent, serde_json::json!({"type": "error", "message": words})),
        ] {
            refused(dialect, &message.to_string(), Verdict::WrongHost);
        }
    }

    #[test]
    fn sound_is_useful_whatever_it_is_called() {
        check(Dialect::Speech, r#"{"audio":"AAAA","isFinal":null}"#, Heard::Useful);
        check(Dialect::Speech, r#"{"audio":null,"isFinal":true}"#, Heard::Useful);
        check(Dialect::Speech, r#"{"audio":null,"error":null}"#, Heard::Useful);
        check(Dialect::Speech, "no json", Heard::Useful);
        let long = format!(r#"{{"error":"invalid_api_key","audio":"{}"}}"#, "A".repeat(REFUSAL_BYTES_MAX));
        check(Dialect::Speech, &long, Heard::Useful);
    }

    #[test]
    fn transcription_says_it_by_type() {
        let transcription = Dialect::Transcription;
        for (kind, verdict) in [
            ("auth_error", Verdict::InvalidKey),
            ("quota_exceeded", QUOTA),
            ("rate_limited", Verdict::RateLimited(None)),
            ("unaccepted_terms", Verdict::Billing),
            ("queue_overflow", Verdict::Busy),
            ("resource_exhausted", Verdict::Busy),
            ("transcriber_error", Verdict::ServerError),
            ("input_error", Verdict::RequestError),
            ("chunk_size_exceeded", Verdict::RequestError),
        ] {
            let message = format!(r#"{{"message_type":"{kind}","error":"whatever"}}"#);
            refused(transcription, &message, verdict);
            refused(Dialect::Unknown, &message, verdict);
        }
        check(transcription, r#"{"message_type":"session_started","session_id":"x"}"#, Heard::Useful);
        check(transcription, r#"{"message_type":"partial_transcript","text":"error"}"#, Heard::Useful);
        refused(
            transcription,
            r#"{"message_type":"error","error":"Too many concurrent requests. Your current subscription is associated with a maximum of 6 concurrent requests"}"#,
            Verdict::Concurrency { maximum: Some(6) },
        );
    }

    #[test]
    fn agents_say_it_in_an_event() {
        let agent = Dialect::Agent;
        check(agent, r#"{"type":"conversation_initiation_metadata"}"#, Heard::Useful);
        check(agent, r#"{"type":"ping","ping_event":{"event_id":1}}"#, Heard::Aside);
        check(agent, r#"{"type":"queue_status","queue_status_event":{"position":3}}"#, Heard::Queued);
        refused(
            agent,
            r#"{"type":"error","message":"received 1002 (protocol error) This request exceeds your quota limit."}"#,
            QUOTA,
        );
        refused(
            agent,
            r#"{"type":"client_error","error_event":{"code":"quota_exceeded","message":"x"}}"#,
            QUOTA,
        );
        refused(agent, r#"{"type":"error","message":"Agent not available"}"#, Verdict::RequestError);
    }

    #[track_caller]
    fn check_close(code: u16, reason: &str, expected: Option<Verdict>) {
        assert_eq!(hear_close(code, reason, false), expected, "{code} {reason}");
    }

    #[test]
    fn an_end_is_judged_by_its_words_and_then_by_its_code() {
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
        // A reason has room for 123 bytes: the provider cuts it there.
        let wrong_host = "Invalid API key: The API key used is for a data residency stack, however this server is a global server. Please check you are calling the correct API URL.";
        check_close(1008, &wrong_host[..123], Some(Verdict::WrongHost));
        check_close(1009, "", Some(Verdict::RequestError));
        check_close(1011, "", Some(Verdict::ServerError));
        check_close(1012, "", Some(Verdict::Busy));
    }

    #[test]
    fn a_token_of_the_clients_own_says_nothing_of_a_key() {
        let message = br#"{"message_type":"auth_error","error":"x"}"#;
        assert_eq!(hear(Dialect::Transcription, message, true), Heard::Refused(Verdict::RequestError));
        assert_eq!(hear_close(1008, "Invalid API key", true), Some(Verdict::RequestError));
        assert_eq!(hear_close(1002, "This request exceeds your quota", true), Some(QUOTA));
    }
}

//! Classifies the provider's WebSocket messages and close frames. A message can show that the session is served,
//! refused or queued, and a close frame shows whether the session is refused. If the client presented a token of the
//! provider, a refusal of the token is an error of the request and not a verdict about a key.
//!
//! A refusal usually consists of a message and a close frame. Both are classified by the same table, because the close
//! code alone is ambiguous: 1008 can mean a bad key or a client that was idle for too long.

use serde_json::{Map, Value};

use super::Dialect;
use crate::elevenlabs::refusal::{ErrorBody, classify_without_status};
use crate::policy::verdict::{UnexplainedRefusal, Verdict};

/// The meaning of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MessageKind {
    /// The session is served, and the message is for the client. Messages that are not recognized count as useful.
    Useful,
    /// The session is refused.
    Refused(Verdict),
    /// The message keeps the connection alive, and does not show that the session is served.
    KeepAlive,
    /// The message is an unknown error. The close frame after it determines whether the session is refused.
    UnknownError,
    /// The agent is busy, and the client waits in a queue. The provider does not charge this time. Source: the
    /// provider's changelog up to September 2026 (`queueing_config`).
    Queued,
}

/// Maximum length of a refusal. Longer messages are not parsed and count as useful, because they contain audio.
pub const MAX_REFUSAL_BYTES: usize = 16 * 1024;

/// The progress of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SessionStage {
    /// No useful message has been received. A message is also classified as a refusal if all its JSON members occur in
    /// errors and its code or text is known.
    Opening,
    /// The session is served. Only a message in the error format of its protocol is an error.
    Served,
}

/// The format of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum MessageFormat {
    /// The message is a known event and not an error.
    Event(MessageKind),
    /// The message is an error in the format of this protocol.
    Error,
    /// The message is an error in the format of another protocol or of HTTP.
    OtherProtocolError,
    /// The format is unknown.
    Other,
}

/// Classifies a text message. If the client has presented a token of the provider (`has_token`), a refusal concerns the
/// token and not the key.
#[must_use]
pub fn classify_message(
    dialect: Dialect,
    stage: SessionStage,
    message: &[u8],
    has_token: bool,
) -> MessageKind {
    if message.len() > MAX_REFUSAL_BYTES {
        return MessageKind::Useful;
    }
    let Ok(members) = serde_json::from_slice::<Map<String, Value>>(message) else {
        return MessageKind::Useful;
    };
    let format = match dialect {
        Dialect::Speech | Dialect::SpeechContexts | Dialect::Dialogue | Dialect::DialogueContexts => {
            speech_format(&members)
        }
        Dialect::Transcription => transcription_format(&members),
        Dialect::Agent => agent_format(&members),
        Dialect::Unknown => unknown_format(&members),
        Dialect::Foreign => MessageFormat::Event(MessageKind::Useful),
    };
    let body = || ErrorBody::from_members(&members);
    let kind = match (format, stage) {
        (MessageFormat::Event(kind), _) => kind,
        (MessageFormat::Error, _) => MessageKind::Refused(error_verdict(&body())),
        (MessageFormat::OtherProtocolError, SessionStage::Opening) => {
            known_verdict(&body()).map_or(MessageKind::UnknownError, MessageKind::Refused)
        }
        (MessageFormat::Other, SessionStage::Opening) if ErrorBody::has_only_error_members(&members) => {
            // In an unknown protocol, a message without a code may be useful.
            let is_known = dialect != Dialect::Unknown;
            let body = if is_known { body() } else { body().without_messages() };
            classify_without_status(&body).map_or(MessageKind::Useful, MessageKind::Refused)
        }
        (MessageFormat::OtherProtocolError, SessionStage::Served)
        | (MessageFormat::Other, SessionStage::Opening | SessionStage::Served) => MessageKind::Useful,
    };
    if has_token && let MessageKind::Refused(verdict) = kind {
        return MessageKind::Refused(verdict_about_token(verdict));
    }
    kind
}

/// Classifies a close frame. Returns `None` if the frame is not a refusal. `follows_error` is `true` if an
/// [unknown error](MessageKind::UnknownError) was received before the frame and the session was not served. `has_token`
/// has the same meaning as in [`classify_message`].
#[must_use]
pub fn classify_close(code: u16, reason: &str, follows_error: bool, has_token: bool) -> Option<Verdict> {
    let body = ErrorBody::from_close_reason(reason);
    let verdict = classify_without_status(&body).or(match code {
        // Live transcription sends the codes of a normal end even after an error.
        1000 | 1001 | 1005 if follows_error => Some(Verdict::RequestError),
        // The session has ended normally.
        1000 | 1001 | 1005 => None,
        1011 => Some(Verdict::ServerError),
        // The server restarts (1012), or the client should try again later (1013).
        1012 | 1013 => Some(Verdict::Busy),
        // In IANA's registry of close codes, 3000 means unauthorized and 3003 means forbidden.
        3000 => Some(Verdict::Unexplained(UnexplainedRefusal::Unauthorized)),
        3003 => Some(Verdict::Unexplained(UnexplainedRefusal::Forbidden)),
        1008 if reason.is_empty() || follows_error => {
            Some(Verdict::Unexplained(UnexplainedRefusal::Forbidden))
        }
        _ => Some(access_denied_verdict(&body).unwrap_or(Verdict::RequestError)),
    })?;
    Some(if has_token { verdict_about_token(verdict) } else { verdict })
}

/// Returns the verdict of an error whose code or message is in the table of refusals or contains a word for denied
/// access. Returns `None` for any other error.
fn known_verdict(body: &ErrorBody) -> Option<Verdict> {
    classify_without_status(body).or_else(|| access_denied_verdict(body))
}

/// Returns the verdict of an error in the format of its protocol.
fn error_verdict(body: &ErrorBody) -> Verdict {
    // The captured message is "We are sorry, something went wrong." with the close code 1008.
    let is_server_error = body.message_starts_with("we are sorry");
    let default_verdict = if is_server_error { Verdict::ServerError } else { Verdict::RequestError };
    known_verdict(body).unwrap_or(default_verdict)
}

/// Returns the verdict of an unknown code or message that contains a word for denied access. The verdict allows an
/// attempt with a second account, which shows whether the account or the request is the cause.
fn access_denied_verdict(body: &ErrorBody) -> Option<Verdict> {
    const KEY_WORDS: [&str; 4] = ["unauthorized", "unauthorised", "authentication", "api_key"];
    const ACCESS_WORDS: [&str; 4] = ["forbidden", "denied", "not_allowed", "subscription"];
    let contains_any = |words: [&str; 4]| {
        words.iter().any(|word| {
            body.any_code(|code| code.contains(word))
                || body.message_contains(word)
                || body.message_contains(&word.replace('_', " "))
        })
    };
    if contains_any(KEY_WORDS) {
        Some(Verdict::Unexplained(UnexplainedRefusal::Unauthorized))
    } else {
        contains_any(ACCESS_WORDS).then_some(Verdict::Unexplained(UnexplainedRefusal::Forbidden))
    }
}

/// Recognizes the error formats of other protocols and of HTTP.
fn other_protocol_format(members: &Map<String, Value>) -> MessageFormat {
    let has_member =
        |name: &str| members.get(name).is_some_and(|value| value.is_string() || value.is_object());
    let has_code = members.get("code").is_some_and(Value::is_number);
    let is_error = has_member("error") || has_member("detail") || has_code && has_member("message");
    if is_error { MessageFormat::OtherProtocolError } else { MessageFormat::Other }
}

/// Recognizes `{"message","error","code"}` of speech and dialogue.
fn speech_format(members: &Map<String, Value>) -> MessageFormat {
    if members.get("audio").is_some_and(Value::is_string) {
        return MessageFormat::Event(MessageKind::Useful);
    }
    match members.get("error") {
        Some(Value::String(_) | Value::Object(_)) => MessageFormat::Error,
        Some(_) | None => other_protocol_format(members),
    }
}

/// Recognizes `{"message_type","error"}` of transcription, translation and live dubbing. Sources: the
/// provider's AsyncAPI document of Scribe, and its Python SDK 2.78.
fn transcription_format(members: &Map<String, Value>) -> MessageFormat {
    let Some(message_type) = members.get("message_type").and_then(Value::as_str) else {
        return other_protocol_format(members);
    };
    let is_error_code = || classify_without_status(&ErrorBody::from_close_reason(message_type)).is_some();
    if message_type == "error" || is_error_code() {
        MessageFormat::Error
    } else if message_type == "session_started" || message_type.contains("transcript") {
        MessageFormat::Event(MessageKind::Useful)
    } else {
        other_protocol_format(members)
    }
}

/// Recognizes the events of an agent by their `type`. The members of an error are in the event itself or in its member
/// `error_event`. Another event has its content in a nested member, in which errors are not searched.
fn agent_format(members: &Map<String, Value>) -> MessageFormat {
    match members.get("type").and_then(Value::as_str) {
        Some("ping") => MessageFormat::Event(MessageKind::KeepAlive),
        Some("queue_status") => MessageFormat::Event(MessageKind::Queued),
        Some("error" | "client_error" | "error_event") => MessageFormat::Error,
        Some(_) | None => other_protocol_format(members),
    }
}

/// Recognizes the error formats of the known protocols in an unknown protocol.
fn unknown_format(members: &Map<String, Value>) -> MessageFormat {
    if agent_format(members) == MessageFormat::Error {
        return MessageFormat::Error;
    }
    [transcription_format(members), speech_format(members)]
        .into_iter()
        .find(|format| matches!(format, MessageFormat::Error | MessageFormat::Event(_)))
        .unwrap_or(MessageFormat::Other)
}

/// Replaces a verdict about the key by an error of the request, for a session in which the client presented a token.
fn verdict_about_token(verdict: Verdict) -> Verdict {
    match verdict {
        // The token is refused. It is part of the request.
        Verdict::InvalidKey
        | Verdict::WrongHost
        | Verdict::Unexplained(
            UnexplainedRefusal::Unauthorized
            | UnexplainedRefusal::PaymentRequired
            | UnexplainedRefusal::Forbidden
            | UnexplainedRefusal::Bodiless,
        ) => Verdict::RequestError,
        // The other refusals do not depend on the credential.
        Verdict::Unexplained(UnexplainedRefusal::TooMany(_))
        | Verdict::Served
        | Verdict::WorkspaceQuota(_)
        | Verdict::KeyQuota(_)
        | Verdict::MissingPermission(_)
        | Verdict::PlanFeature(_)
        | Verdict::Slots
        | Verdict::Billing
        | Verdict::Abuse
        | Verdict::RateLimited(_)
        | Verdict::Concurrency { .. }
        | Verdict::Busy
        | Verdict::NotFound
        | Verdict::RequestError
        | Verdict::ServerError
        | Verdict::Unreadable => verdict,
    }
}

#[cfg(test)]
mod tests;

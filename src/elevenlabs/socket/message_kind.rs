//! Classifies the provider's WebSocket messages and close frames: the session is served, or it is refused
//! for a reason. Both are classified by the same words, because a refusal usually has a message and a
//! close frame, and the close code alone is ambiguous: 1008 means a bad key as well as a client that was
//! idle for too long.

use serde_json::{Map, Value};

use super::Dialect;
use crate::elevenlabs::refusal::{ErrorBody, in_band};
use crate::policy::verdict::{Refusal, Verdict};

/// The meaning of a message or close frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MessageKind {
    /// The session is served: this message belongs to the client.
    Useful,
    /// The session is refused.
    Refused(Verdict),
    /// Neither useful nor refused: a keep-alive message of the protocol.
    Aside,
    /// An error in unknown words: the close frame after it decides whether the session is refused.
    UnknownError,
    /// Neither useful nor refused: the agent is busy and the client is queued, which is not billed.
    /// Source: the provider's changelog up to September 2026 (`queueing_config`).
    Queued,
}

/// Maximum length of a refusal; longer messages are audio.
pub const REFUSAL_BYTES_MAX: usize = 16 * 1024;

/// The progress of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SessionStage {
    /// No useful message was received yet: a message with only members of errors is classified by its
    /// words.
    Opening,
    /// The session is served: only a message in the error format of its protocol is an error.
    Served,
}

/// The format of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum MessageFormat {
    /// Not an error.
    Event(MessageKind),
    /// An error in the known format of this protocol.
    Error,
    /// An error in the format of another protocol or of HTTP.
    ForeignError,
    /// An unknown format.
    Other,
}

/// Classifies a text message. `has_token` says that the client presented a token of the provider: a
/// refusal is then about the token and not about the key.
#[must_use]
pub fn classify_message(
    dialect: Dialect,
    stage: SessionStage,
    message: &[u8],
    has_token: bool,
) -> MessageKind {
    if message.len() > REFUSAL_BYTES_MAX {
        return MessageKind::Useful;
    }
    let Ok(members) = serde_json::from_slice::<Map<String, Value>>(message) else {
        return MessageKind::Useful;
    };
    let format = match dialect {
        Dialect::Speech | Dialect::SpeechContexts | Dialect::Dialogue | Dialect::DialogueContexts => {
            speech_format(&members)
        }
        Dialect::Transcription => typed_format(&members),
        Dialect::Agent => agent_format(&members),
        Dialect::Unknown => unknown_format(&members),
        Dialect::Foreign => MessageFormat::Event(MessageKind::Useful),
    };
    let body = || ErrorBody::of(&members);
    let kind = match (format, stage) {
        (MessageFormat::Event(kind), _) => kind,
        (MessageFormat::Error, _) => MessageKind::Refused(error_verdict(&body())),
        (MessageFormat::ForeignError, SessionStage::Opening) => {
            let body = body();
            in_band(&body)
                .or_else(|| access_denied_verdict(&body))
                .map_or(MessageKind::UnknownError, MessageKind::Refused)
        }
        (MessageFormat::Other, SessionStage::Opening) if ErrorBody::has_only_error_members(&members) => {
            // In an unknown protocol, a lone sentence may be a useful message.
            let is_known = dialect != Dialect::Unknown;
            let body = if is_known { body() } else { body().codes_only() };
            in_band(&body).map_or(MessageKind::Useful, MessageKind::Refused)
        }
        (MessageFormat::ForeignError, SessionStage::Served)
        | (MessageFormat::Other, SessionStage::Opening | SessionStage::Served) => MessageKind::Useful,
    };
    match kind {
        MessageKind::Refused(verdict) if has_token => MessageKind::Refused(verdict_about_token(verdict)),
        MessageKind::Refused(_)
        | MessageKind::Useful
        | MessageKind::Aside
        | MessageKind::UnknownError
        | MessageKind::Queued => kind,
    }
}

/// Classifies a close frame; `None` for one that is not a refusal. `follows_error` says that an [error in
/// unknown words](MessageKind::UnknownError) was received right before.
#[must_use]
pub fn classify_close(code: u16, reason: &str, follows_error: bool, has_token: bool) -> Option<Verdict> {
    let body = ErrorBody::of_reason(reason);
    let verdict = in_band(&body).or(match code {
        // Transcription uses these codes after its errors, too.
        1000 | 1001 | 1005 if follows_error => Some(Verdict::RequestError),
        // A normal end of the session.
        1000 | 1001 | 1005 => None,
        1011 => Some(Verdict::ServerError),
        // A restart, and «try again later».
        1012 | 1013 => Some(Verdict::Busy),
        // IANA's registry of close codes has 3000 for unauthorized and 3003 for forbidden.
        3000 => Some(Verdict::Unexplained(Refusal::Unauthorized)),
        3003 => Some(Verdict::Unexplained(Refusal::Forbidden)),
        1008 if reason.is_empty() || follows_error => Some(Verdict::Unexplained(Refusal::Forbidden)),
        _ => Some(access_denied_verdict(&body).unwrap_or(Verdict::RequestError)),
    })?;
    Some(if has_token { verdict_about_token(verdict) } else { verdict })
}

fn error_verdict(body: &ErrorBody) -> Verdict {
    let by_sentence = || {
        // "We are sorry, something went wrong." (captured with close code 1008).
        let has_failed = body.message_starts("we are sorry");
        if has_failed { Verdict::ServerError } else { Verdict::RequestError }
    };
    in_band(body).or_else(|| access_denied_verdict(body)).unwrap_or_else(by_sentence)
}

/// Whether a message is an error in the format of other protocols, or of HTTP.
fn foreign_format(members: &Map<String, Value>) -> MessageFormat {
    let has = |name: &str| members.get(name).is_some_and(|value| value.is_string() || value.is_object());
    let has_code = members.get("code").is_some_and(Value::is_number);
    let is_error = has("error") || has("detail") || has_code && has("message");
    if is_error { MessageFormat::ForeignError } else { MessageFormat::Other }
}

/// `{"message","error","code"}` of speech and dialogue.
fn speech_format(members: &Map<String, Value>) -> MessageFormat {
    if members.get("audio").is_some_and(Value::is_string) {
        return MessageFormat::Event(MessageKind::Useful);
    }
    match members.get("error") {
        Some(Value::String(_) | Value::Object(_)) => MessageFormat::Error,
        Some(_) | None => foreign_format(members),
    }
}

/// The verdict of an unknown error word that means denied access, because a WebSocket error has no
/// status. An attempt with a second account shows whether the account or the request is at fault.
fn access_denied_verdict(body: &ErrorBody) -> Option<Verdict> {
    const KEY: [&str; 4] = ["unauthorized", "unauthorised", "authentication", "api_key"];
    const ACCESS: [&str; 4] = ["forbidden", "denied", "not_allowed", "subscription"];
    let has = |parts: [&str; 4]| {
        let is_among = |part: &str| body.any_code(|word| word.contains(part)) || body.message_has(part);
        parts.iter().any(|part| is_among(part) || body.message_has(&part.replace('_', " ")))
    };
    if has(KEY) {
        Some(Verdict::Unexplained(Refusal::Unauthorized))
    } else {
        has(ACCESS).then_some(Verdict::Unexplained(Refusal::Forbidden))
    }
}

/// `{"message_type","error"}` of transcription, translation and live dubbing.
/// Source: the provider's AsyncAPI document of Scribe, and its Python SDK 2.78.
fn typed_format(members: &Map<String, Value>) -> MessageFormat {
    let Some(message_type) = members.get("message_type").and_then(Value::as_str) else {
        return foreign_format(members);
    };
    if message_type == "error" || in_band(&ErrorBody::of_reason(message_type)).is_some() {
        MessageFormat::Error
    } else if message_type == "session_started" || message_type.contains("transcript") {
        MessageFormat::Event(MessageKind::Useful)
    } else {
        foreign_format(members)
    }
}

/// Events of an agent: an error is flat, or in a separate event. The content of other events is nested in
/// a separate member, whose words are not examined for errors.
fn agent_format(members: &Map<String, Value>) -> MessageFormat {
    match members.get("type").and_then(Value::as_str) {
        Some("ping") => MessageFormat::Event(MessageKind::Aside),
        Some("queue_status") => MessageFormat::Event(MessageKind::Queued),
        Some("error" | "client_error" | "error_event") => MessageFormat::Error,
        Some(_) | None => foreign_format(members),
    }
}

/// Recognizes on an unknown protocol the error formats of the known ones.
fn unknown_format(members: &Map<String, Value>) -> MessageFormat {
    if agent_format(members) == MessageFormat::Error {
        return MessageFormat::Error;
    }
    match (typed_format(members), speech_format(members)) {
        (format @ (MessageFormat::Error | MessageFormat::Event(_)), _)
        | (_, format @ (MessageFormat::Error | MessageFormat::Event(_))) => format,
        (
            MessageFormat::ForeignError | MessageFormat::Other,
            MessageFormat::ForeignError | MessageFormat::Other,
        ) => MessageFormat::Other,
    }
}

/// The verdict of a refusal of a session with the client's own token.
fn verdict_about_token(verdict: Verdict) -> Verdict {
    // A rate limit does not depend on the credential.
    let is_rate_limit = matches!(verdict, Verdict::Unexplained(Refusal::TooMany(_)));
    let blames_key = matches!(verdict, Verdict::InvalidKey | Verdict::WrongHost | Verdict::Unexplained(_));
    if blames_key && !is_rate_limit { Verdict::RequestError } else { verdict }
}

#[cfg(test)]
mod tests;

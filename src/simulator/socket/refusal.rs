//! Renders the refusals of the HTTP catalogue in the format of each WebSocket, byte for byte, with
//! the close frame that follows.
//!
//! Sources: captured responses of 2026 (the key, the timeout and contexts of speech, `auth_error`
//! of the transcription, the quota of the agent), the Python SDK 2.78 (the fields of each format,
//! the names of the transcription). All other texts are those of HTTP.

use serde::Serialize;
use serde_json::Value;

use super::super::shape::{Facts, Family, Shape};

/// The format of a WebSocket's refusals.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RefusalFormat {
    /// `{"message", "error", "code"}`, and a close with the message as its reason.
    Speech,
    /// The format of speech with an additional `param`.
    Dialogue,
    /// `{"message_type", "error"}`, and a close with 1000.
    Scribe,
    /// A close frame, usually without a preceding message.
    Agent,
}

/// A refusal as sent on a WebSocket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct SocketRefusal {
    /// Its name in the ledger.
    pub(super) name: String,
    pub(super) message: Option<String>,
    pub(super) code: u16,
    pub(super) reason: String,
}

/// Policy violation: the code with which speech closes after every refusal.
const POLICY: u16 = 1_008;
/// The provider truncates close reasons to this number of characters, even within a word (captured,
/// 2024 and 2026).
const MAX_REASON_CHARACTERS: usize = 120;

#[derive(Serialize)]
struct SpeechError<'a> {
    message: &'a str,
    error: &'a str,
    code: u16,
}

#[derive(Serialize)]
struct DialogueError<'a> {
    message: &'a str,
    error: &'a str,
    code: u16,
    param: Option<&'a str>,
}

#[derive(Serialize)]
struct AgentError<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    message: &'a str,
}

#[derive(Serialize)]
struct ScribeError<'a> {
    message_type: &'a str,
    error: &'a str,
}

/// Renders the refusal of a shape.
pub(super) fn render(format: RefusalFormat, shape: &Shape, facts: &Facts) -> SocketRefusal {
    let mut refusal = match format {
        RefusalFormat::Speech => {
            let (error, message) = http_texts(shape, facts);
            let refusal = speech(&error, &message);
            // This refusal has no message before its close (captured, 2026).
            if *shape == Shape::Concurrency { SocketRefusal { message: None, ..refusal } } else { refusal }
        }
        RefusalFormat::Dialogue => {
            let (error, message) = http_texts(shape, facts);
            dialogue(&error, &message, None)
        }
        RefusalFormat::Agent => agent(shape, facts),
        RefusalFormat::Scribe => {
            let (message_type, error) = scribe_texts(shape, facts);
            scribe(message_type, &error)
        }
    };
    refusal.name = shape.to_string();
    refusal
}

/// Creates a refusal of speech.
pub(super) fn speech(error: &str, message: &str) -> SocketRefusal {
    let body = json(&SpeechError { message, error, code: POLICY });
    SocketRefusal { name: error.to_owned(), message: Some(body), code: POLICY, reason: reason(message) }
}

/// Creates a refusal of dialogue.
pub(super) fn dialogue(error: &str, message: &str, param: Option<&str>) -> SocketRefusal {
    let body = json(&DialogueError { message, error, code: POLICY, param });
    SocketRefusal { message: Some(body), ..speech(error, message) }
}

/// Creates a refusal of a conversation: 1002 for errors that end the session, 1011 for errors of
/// the provider, 1008 for errors of the client (the documentation; the quota is captured, 2026).
fn agent(shape: &Shape, facts: &Facts) -> SocketRefusal {
    const QUOTA: &str = "This request exceeds your quota limit.";
    let close =
        |code, reason: &str| SocketRefusal { code, reason: reason.to_owned(), ..SocketRefusal::default() };
    match shape {
        Shape::Quota | Shape::KeyCap | Shape::QuotaForbidden => close(1_002, QUOTA),
        Shape::Fixed(fixed) => match Family::of(fixed) {
            Family::Quota => close(1_002, QUOTA),
            Family::Key | Family::Other => close(POLICY, &reason(&http_texts(shape, facts).1)),
        },
        // The other captured form: a message before the close (2026).
        Shape::InsufficientCredits => {
            let message = format!("received 1002 (protocol error) {QUOTA}");
            let body = json(&AgentError { kind: "error", message: &message });
            SocketRefusal { message: Some(body), ..close(1_002, QUOTA) }
        }
        Shape::Concurrency | Shape::RateLimit(_) => close(1_002, &reason(&http_texts(shape, facts).1)),
        Shape::ServerError | Shape::SystemBusy | Shape::Maintenance => {
            close(1_011, &reason(&http_texts(shape, facts).1))
        }
        Shape::InvalidKey
        | Shape::InvalidKey400
        | Shape::NeedsAuthorization
        | Shape::MissingPermissions(_)
        | Shape::UnusualActivity
        | Shape::PaymentIssue
        | Shape::PaidPlanRequired
        | Shape::UnacceptedTerms
        | Shape::Forbidden
        | Shape::WorkspaceAccessDenied
        | Shape::SubscriptionRequired
        | Shape::FieldMissing(_)
        | Shape::NotAString(_)
        | Shape::MalformedJson
        | Shape::VoiceNotFound
        | Shape::InvalidCursor
        | Shape::UnknownRequest
        | Shape::HistoryItemNotFound
        | Shape::AgentNotFound
        | Shape::ConversationNotFound
        | Shape::AnonymousWorkspace
        | Shape::ModelNotFound
        | Shape::TextTooLong
        | Shape::EmptyText
        | Shape::InvalidOutputFormat
        | Shape::RequestTooLarge
        | Shape::NotFound
        | Shape::MethodNotAllowed(_)
        | Shape::Page(_) => close(POLICY, &reason(&http_texts(shape, facts).1)),
    }
}

/// Creates a refusal of transcription, with a normal close (captured for the key, 2026).
pub(super) fn scribe(message_type: &str, error: &str) -> SocketRefusal {
    let body = json(&ScribeError { message_type, error });
    SocketRefusal { name: message_type.to_owned(), message: Some(body), code: 1_000, reason: String::new() }
}

fn json(body: &impl Serialize) -> String {
    // Strings and numbers can always be serialized.
    serde_json::to_string(body).unwrap_or_default()
}

fn reason(message: &str) -> String {
    let text: String = message.chars().take(MAX_REASON_CHARACTERS).collect();
    // A control frame has at most 125 bytes, of which the code takes two.
    (0..=text.len().min(123)).rev().find_map(|end| text.get(..end)).unwrap_or_default().to_owned()
}

/// The name and the message of a refusal. With few exceptions they are those of HTTP.
fn http_texts(shape: &Shape, facts: &Facts) -> (String, String) {
    let fixed_texts = |name: &str, message: &str| (name.to_owned(), message.to_owned());
    if matches!(shape, Shape::InvalidKey | Shape::InvalidKey400) {
        return fixed_texts("invalid_api_key", "Invalid API key");
    }
    if *shape == Shape::NeedsAuthorization {
        return fixed_texts(
            "authentication_required",
            "None of the authentication methods (xi-api-key, authorization header, single-use token) were found.",
        );
    }
    if *shape == Shape::ServerError {
        return fixed_texts(
            "something_went_wrong",
            "We are sorry, something went wrong. You are not charged for this request.",
        );
    }
    let body: Value = serde_json::from_str(&shape.render(facts, "").body).unwrap_or_default();
    // The list has at most one entry.
    let detail = body.pointer("/detail/0").or_else(|| body.get("detail")).unwrap_or(&body);
    let text = |names: &[&str]| names.iter().find_map(|name| detail.get(name)).and_then(Value::as_str);
    let name = text(&["status", "type", "error"]).map_or_else(|| shape.to_string(), str::to_owned);
    let message = text(&["message", "msg"]).or(detail.as_str());
    (name, message.unwrap_or("We are sorry, something went wrong.").to_owned())
}

/// The `message_type` and the text of a refusal. The first two texts are captured; the names come
/// from the Python SDK 2.78.
fn scribe_texts(shape: &Shape, facts: &Facts) -> (&'static str, String) {
    const AUTH: &str = "You must be authenticated to use this endpoint.";
    const QUOTA: &str = "You have exceeded your quota.";
    let kind = match shape {
        Shape::Fixed(fixed) => match Family::of(fixed) {
            Family::Quota => return ("quota_exceeded", QUOTA.to_owned()),
            // The text of HTTP, unless it only reports an unknown key.
            Family::Key => "auth_error",
            Family::Other => "error",
        },
        Shape::InvalidKey
        | Shape::InvalidKey400
        | Shape::NeedsAuthorization
        | Shape::MissingPermissions(_)
        | Shape::Forbidden
        | Shape::WorkspaceAccessDenied => {
            return ("auth_error", AUTH.to_owned());
        }
        Shape::Quota | Shape::KeyCap | Shape::QuotaForbidden | Shape::InsufficientCredits => {
            return ("quota_exceeded", QUOTA.to_owned());
        }
        Shape::Concurrency | Shape::RateLimit(_) => "rate_limited",
        Shape::SystemBusy | Shape::Maintenance => "resource_exhausted",
        Shape::UnacceptedTerms => "unaccepted_terms",
        Shape::ServerError => "transcriber_error",
        Shape::FieldMissing(_) | Shape::NotAString(_) | Shape::MalformedJson => "input_error",
        Shape::ModelNotFound | Shape::InvalidOutputFormat | Shape::EmptyText => "invalid_request",
        Shape::TextTooLong | Shape::RequestTooLarge => "chunk_size_exceeded",
        Shape::UnusualActivity
        | Shape::PaymentIssue
        | Shape::PaidPlanRequired
        | Shape::SubscriptionRequired
        | Shape::VoiceNotFound
        | Shape::InvalidCursor
        | Shape::UnknownRequest
        | Shape::HistoryItemNotFound
        | Shape::AgentNotFound
        | Shape::ConversationNotFound
        | Shape::AnonymousWorkspace
        | Shape::NotFound
        | Shape::MethodNotAllowed(_)
        | Shape::Page(_) => "error",
    };
    (kind, http_texts(shape, facts).1)
}

#[cfg(test)]
mod tests {
    use super::super::super::shape::NAMED;
    use super::*;
    use crate::elevenlabs::refusal::{ErrorBody, classify, examples};
    use crate::elevenlabs::socket::{Dialect, MessageKind, SessionStage, classify_close, classify_message};
    use crate::policy::verdict::Verdict;

    /// The verdict on a refusal, by its message or else by its close.
    fn verdict_of(dialect: Dialect, refusal: &SocketRefusal) -> Option<Verdict> {
        let Some(message) = &refusal.message else {
            return classify_close(refusal.code, &refusal.reason, false, false);
        };
        match classify_message(dialect, SessionStage::Opening, message.as_bytes(), false) {
            MessageKind::Refused(verdict) => Some(verdict),
            MessageKind::Useful | MessageKind::Aside | MessageKind::UnknownError | MessageKind::Queued => {
                None
            }
        }
    }

    /// On every WebSocket with a specific text for a refusal, the verdict is the same as over HTTP.
    #[test]
    fn a_refusal_is_classified_alike_over_http_and_on_sockets() {
        let facts = Facts { needed: 43, limit: 10_000, concurrency_max: 4, ..Facts::default() };
        let shapes = NAMED.into_iter().map(|(_, shape)| shape).chain(examples().map(Shape::Fixed));
        let (mut compared, mut others) = (0, Vec::new());
        // A page contains no text of the provider.
        for shape in shapes.filter(|shape| !matches!(shape, Shape::Page(_))) {
            let refusal = shape.render(&facts, "r");
            let body = ErrorBody::read(refusal.body.as_bytes());
            let over_http = classify(refusal.status, Some(&body), None);
            // Some texts are classified with one status only, and a WebSocket has no status.
            let is_of_status = matches!(&shape, Shape::Fixed(fixed) if fixed.name.starts_with("pay_"));
            for (dialect, format) in [
                (Dialect::Speech, RefusalFormat::Speech),
                (Dialect::Dialogue, RefusalFormat::Dialogue),
                (Dialect::Agent, RefusalFormat::Agent),
                (Dialect::Transcription, RefusalFormat::Scribe),
            ] {
                let refusal = render(format, &shape, &facts);
                let on_socket = verdict_of(dialect, &refusal).map(|verdict| std::mem::discriminant(&verdict));
                // Captured: transcription has one text for all keys without permission, and agents
                // have one text for all quotas.
                let is_vague =
                    format == RefusalFormat::Scribe || format == RefusalFormat::Agent || is_of_status;
                let is_same = on_socket == Some(std::mem::discriminant(&over_http));
                assert!(on_socket.is_some(), "{shape} on {dialect:?}: {refusal:?} is no refusal");
                if !is_vague {
                    compared += 1;
                    if !is_same {
                        others.push(format!("{shape} on {dialect:?}: {refusal:?} is not {over_http:?}"));
                    }
                }
            }
        }
        assert!(others.is_empty(), "{}", others.join("\n"));
        assert!(compared > 80, "{compared}");
    }
}

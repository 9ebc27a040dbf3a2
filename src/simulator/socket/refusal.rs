//! Renders refusals in the format of each WebSocket byte for byte, with the close frame that follows. Most of them are
//! the refusals of HTTP, and the others exist only on WebSockets.
//!
//! Sources: captured responses of 2026 (the key, the timeout and contexts of speech, `auth_error` of the
//! transcription, the quota of the agent), the Python SDK 2.78 (the fields of each format, the names of the
//! transcription). All other texts are the same as over HTTP.

use serde::Serialize;
use serde_json::Value;

use super::super::refusal::{RefusalFamily, RefusalKind, RefusalValues};

/// The format of a WebSocket's refusals.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RefusalFormat {
    /// `{"message", "error", "code"}`, and a close frame whose reason is the message. A concurrency refusal has only
    /// the close frame.
    Speech,
    /// The format of speech with an additional `param`.
    Dialogue,
    /// `{"message_type", "error"}`, and a close frame with code 1000.
    Scribe,
    /// A close frame, usually without a preceding message.
    Agent,
}

/// A refusal as sent on a WebSocket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct SocketRefusal {
    /// The name of the refusal in the ledger.
    pub(super) name: String,
    /// The message before the close frame, or `None` if only the close frame is sent.
    pub(super) message: Option<String>,
    /// The code of the close frame.
    pub(super) code: u16,
    /// The reason of the close frame.
    pub(super) reason: String,
}

/// The close code of every refusal of speech and dialogue, and of most refusals of agents.
const POLICY_VIOLATION: u16 = 1_008;
/// The provider truncates close reasons to this number of characters, even within a word (captured,
/// 2024 and 2026).
const MAX_REASON_CHARACTERS: usize = 120;

/// The message of a refusal on the speech and dialogue WebSockets.
#[derive(Serialize)]
struct SpeechError<'a> {
    message: &'a str,
    error: &'a str,
    code: u16,
    #[serde(skip_serializing_if = "ParamField::is_absent")]
    param: ParamField<'a>,
}

/// The `param` field of a refusal, which names the wrong field of a message.
#[derive(Clone, Copy, Serialize)]
#[serde(untagged)]
enum ParamField<'a> {
    /// The field is not sent, as on the speech WebSockets.
    Absent,
    /// The field is sent, as on the dialogue WebSockets. It may be null.
    Sent(Option<&'a str>),
}

impl ParamField<'_> {
    fn is_absent(&self) -> bool {
        matches!(self, Self::Absent)
    }
}

/// The message of a refusal on the agent WebSocket.
#[derive(Serialize)]
struct AgentError<'a> {
    #[serde(rename = "type")]
    error_type: &'a str,
    message: &'a str,
}

/// The message of a refusal on the transcription WebSocket.
#[derive(Serialize)]
struct ScribeError<'a> {
    message_type: &'a str,
    error: &'a str,
}

/// Renders a refusal that the provider also sends over HTTP.
pub(super) fn render(format: RefusalFormat, kind: &RefusalKind, values: &RefusalValues) -> SocketRefusal {
    let refusal = match format {
        RefusalFormat::Speech => {
            let (error, message) = name_and_message(kind, values);
            let refusal = speech_refusal(&error, &message);
            // A concurrency refusal has no message before its close frame (captured, 2026).
            if *kind == RefusalKind::Concurrency {
                SocketRefusal { message: None, ..refusal }
            } else {
                refusal
            }
        }
        RefusalFormat::Dialogue => {
            let (error, message) = name_and_message(kind, values);
            dialogue_refusal(&error, &message, None)
        }
        RefusalFormat::Agent => agent_refusal(kind, values),
        RefusalFormat::Scribe => {
            let (message_type, error) = scribe_type_and_error(kind, values);
            scribe_refusal(message_type, &error)
        }
    };
    SocketRefusal { name: kind.to_string(), ..refusal }
}

/// Creates a refusal on a speech WebSocket.
pub(super) fn speech_refusal(error: &str, message: &str) -> SocketRefusal {
    text_refusal(error, message, ParamField::Absent)
}

/// Creates a refusal on a dialogue WebSocket.
pub(super) fn dialogue_refusal(error: &str, message: &str, param: Option<&str>) -> SocketRefusal {
    text_refusal(error, message, ParamField::Sent(param))
}

fn text_refusal(error: &str, message: &str, param: ParamField<'_>) -> SocketRefusal {
    let body = to_json(&SpeechError { message, error, code: POLICY_VIOLATION, param });
    SocketRefusal {
        name: error.to_owned(),
        message: Some(body),
        code: POLICY_VIOLATION,
        reason: close_reason(message),
    }
}

/// Creates a refusal of a conversation. Its close code is 1002 for exceeded limits, 1011 for errors of the provider,
/// and 1008 for errors of the client (documentation, and a captured quota refusal of 2026).
fn agent_refusal(kind: &RefusalKind, values: &RefusalValues) -> SocketRefusal {
    const QUOTA: &str = "This request exceeds your quota limit.";
    if RefusalFamily::of(kind) == RefusalFamily::Quota {
        // The other captured form of this refusal has a message before the close frame (2026).
        let message = (*kind == RefusalKind::InsufficientCredits).then(|| {
            let message = format!("received 1002 (protocol error) {QUOTA}");
            to_json(&AgentError { error_type: "error", message: &message })
        });
        return SocketRefusal { name: String::new(), message, code: 1_002, reason: QUOTA.to_owned() };
    }
    let code = if matches!(kind, RefusalKind::Concurrency | RefusalKind::RateLimit(_)) {
        1_002
    } else if matches!(kind, RefusalKind::ServerError | RefusalKind::SystemBusy | RefusalKind::Maintenance) {
        1_011
    } else {
        POLICY_VIOLATION
    };
    let reason = close_reason(&name_and_message(kind, values).1);
    SocketRefusal { name: String::new(), message: None, code, reason }
}

/// Creates a refusal of transcription, with a normal close (captured for the key, 2026).
pub(super) fn scribe_refusal(message_type: &str, error: &str) -> SocketRefusal {
    let body = to_json(&ScribeError { message_type, error });
    SocketRefusal { name: message_type.to_owned(), message: Some(body), code: 1_000, reason: String::new() }
}

fn to_json(body: &impl Serialize) -> String {
    // Strings and numbers can always be serialized.
    serde_json::to_string(body).unwrap_or_default()
}

/// Truncates a message to the length of a close reason.
fn close_reason(message: &str) -> String {
    let text: String = message.chars().take(MAX_REASON_CHARACTERS).collect();
    // A control frame has at most 125 bytes, and the close code takes two of them.
    (0..=text.len().min(123)).rev().find_map(|end| text.get(..end)).unwrap_or_default().to_owned()
}

/// Returns the name and the message of a refusal. With few exceptions, both are the same as over HTTP.
fn name_and_message(kind: &RefusalKind, values: &RefusalValues) -> (String, String) {
    let fixed_texts = |name: &str, message: &str| (name.to_owned(), message.to_owned());
    if matches!(kind, RefusalKind::InvalidKey | RefusalKind::InvalidKey400) {
        return fixed_texts("invalid_api_key", "Invalid API key");
    }
    if *kind == RefusalKind::NeedsAuthorization {
        return fixed_texts(
            "authentication_required",
            "None of the authentication methods (xi-api-key, authorization header, single-use token) were found.",
        );
    }
    if *kind == RefusalKind::ServerError {
        return fixed_texts(
            "something_went_wrong",
            "We are sorry, something went wrong. You are not charged for this request.",
        );
    }
    let body: Value = serde_json::from_str(&kind.render(values, "").body).unwrap_or_default();
    // The list has at most one entry.
    let detail = body.pointer("/detail/0").or_else(|| body.get("detail")).unwrap_or(&body);
    let text = |names: &[&str]| names.iter().find_map(|name| detail.get(name)).and_then(Value::as_str);
    let name = text(&["status", "type", "error"]).map_or_else(|| kind.to_string(), str::to_owned);
    let message = text(&["message", "msg"]).or(detail.as_str());
    (name, message.unwrap_or("We are sorry, something went wrong.").to_owned())
}

/// Returns the `message_type` and the text of a refusal. The constant texts are captured, and the names are
/// the types of the Python SDK 2.78.
fn scribe_type_and_error(kind: &RefusalKind, values: &RefusalValues) -> (&'static str, String) {
    const AUTH: &str = "You must be authenticated to use this endpoint.";
    const QUOTA: &str = "You have exceeded your quota.";
    let message_type = match kind {
        RefusalKind::InvalidKey
        | RefusalKind::InvalidKey400
        | RefusalKind::NeedsAuthorization
        | RefusalKind::MissingPermissions(_)
        | RefusalKind::Forbidden
        | RefusalKind::WorkspaceAccessDenied => return ("auth_error", AUTH.to_owned()),
        RefusalKind::Concurrency | RefusalKind::RateLimit(_) => "rate_limited",
        RefusalKind::SystemBusy | RefusalKind::Maintenance => "resource_exhausted",
        RefusalKind::UnacceptedTerms => "unaccepted_terms",
        RefusalKind::ServerError => "transcriber_error",
        RefusalKind::FieldMissing(_) | RefusalKind::NotAString(_) | RefusalKind::MalformedJson => {
            "input_error"
        }
        RefusalKind::ModelNotFound | RefusalKind::InvalidOutputFormat | RefusalKind::EmptyText => {
            "invalid_request"
        }
        RefusalKind::TextTooLong | RefusalKind::RequestTooLarge => "chunk_size_exceeded",
        RefusalKind::Quota
        | RefusalKind::KeyCap
        | RefusalKind::QuotaForbidden
        | RefusalKind::InsufficientCredits
        | RefusalKind::Fixed(_)
        | RefusalKind::UnusualActivity
        | RefusalKind::PaymentIssue
        | RefusalKind::PaidPlanRequired
        | RefusalKind::SubscriptionRequired
        | RefusalKind::VoiceNotFound
        | RefusalKind::InvalidCursor
        | RefusalKind::UnknownRequest
        | RefusalKind::HistoryItemNotFound
        | RefusalKind::AgentNotFound
        | RefusalKind::ConversationNotFound
        | RefusalKind::AnonymousWorkspace
        | RefusalKind::NotFound
        | RefusalKind::MethodNotAllowed(_)
        | RefusalKind::Page(_) => match RefusalFamily::of(kind) {
            RefusalFamily::Quota => return ("quota_exceeded", QUOTA.to_owned()),
            // The text is the same as over HTTP, because it contains more than that the key is unknown.
            RefusalFamily::Key => "auth_error",
            RefusalFamily::Other => "error",
        },
    };
    (message_type, name_and_message(kind, values).1)
}

#[cfg(test)]
mod tests {
    use super::super::super::refusal::NAMED_REFUSALS;
    use super::*;
    use crate::elevenlabs::refusal::{ErrorBody, classify, examples};
    use crate::elevenlabs::socket::{Dialect, MessageKind, SessionStage, classify_close, classify_message};
    use crate::policy::verdict::Verdict;

    /// Returns the proxy's classification of a refusal (its verdict), by its message or else by its close frame.
    fn verdict_of(dialect: Dialect, refusal: &SocketRefusal) -> Option<Verdict> {
        let Some(message) = &refusal.message else {
            return classify_close(refusal.code, &refusal.reason, false, false);
        };
        match classify_message(dialect, SessionStage::Opening, message.as_bytes(), false) {
            MessageKind::Refused(verdict) => Some(verdict),
            MessageKind::Useful
            | MessageKind::KeepAlive
            | MessageKind::UnknownError
            | MessageKind::Queued => None,
        }
    }

    /// The test compares the verdicts on every WebSocket that has a specific text for a refusal.
    #[test]
    fn a_refusal_has_the_same_verdict_over_http_and_on_websockets() {
        let values = RefusalValues {
            requested_amount: 43,
            credit_limit: 10_000,
            max_concurrent: 4,
            ..RefusalValues::default()
        };
        let kinds =
            NAMED_REFUSALS.into_iter().map(|(_, kind)| kind).chain(examples().map(RefusalKind::Fixed));
        let (mut compared, mut differences) = (0, Vec::new());
        // A page is left out, because it contains no text of the provider.
        for kind in kinds.filter(|kind| !matches!(kind, RefusalKind::Page(_))) {
            let refusal = kind.render(&values, "r");
            let body = ErrorBody::parse(refusal.body.as_bytes());
            let over_http = classify(refusal.status, Some(&body), None);
            // Some texts are a refusal only together with their HTTP status.
            let needs_status =
                matches!(&kind, RefusalKind::Fixed(example) if example.name.starts_with("pay_"));
            for (dialect, format) in [
                (Dialect::Speech, RefusalFormat::Speech),
                (Dialect::Dialogue, RefusalFormat::Dialogue),
                (Dialect::Agent, RefusalFormat::Agent),
                (Dialect::Transcription, RefusalFormat::Scribe),
            ] {
                let refusal = render(format, &kind, &values);
                let on_socket = verdict_of(dialect, &refusal).map(|verdict| std::mem::discriminant(&verdict));
                // Transcription has one text for all keys without permission, and agents have one text
                // for all quotas (captured).
                let is_text_generic =
                    format == RefusalFormat::Scribe || format == RefusalFormat::Agent || needs_status;
                let is_same = on_socket == Some(std::mem::discriminant(&over_http));
                assert!(
                    on_socket.is_some(),
                    "{kind} on {dialect:?}: {refusal:?} must be classified as a refusal"
                );
                if !is_text_generic {
                    compared += 1;
                    if !is_same {
                        differences.push(format!("{kind} on {dialect:?}: {refusal:?} is not {over_http:?}"));
                    }
                }
            }
        }
        assert!(differences.is_empty(), "the verdicts must be the same:\n{}", differences.join("\n"));
        assert!(compared > 80, "most refusals must be compared: {compared}");
    }
}

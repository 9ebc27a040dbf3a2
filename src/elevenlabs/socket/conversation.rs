//! Parses the identifier of a conversation with an agent from the first message of its session, and the cost of the
//! conversation from a later response that the poller requests.
//!
//! Sources: the provider's AsyncAPI document of agents, and `GET /v1/convai/conversations/{id}` of its OpenAPI
//! document.

use serde::Deserialize;

use crate::elevenlabs::subscription::is_valid_identifier;

/// Parses the identifier of a conversation from the first message of its session. Returns `None` for an identifier with
/// characters that need an escape in a path, because the poller requests the cost by the identifier.
#[must_use]
pub fn conversation_id(first_message: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct FirstMessage {
        conversation_initiation_metadata_event: MetadataEvent,
    }
    #[derive(Deserialize)]
    struct MetadataEvent {
        conversation_id: String,
    }
    let message: FirstMessage = serde_json::from_slice(first_message).ok()?;
    Some(message.conversation_initiation_metadata_event.conversation_id).filter(|id| is_valid_identifier(id))
}

/// Parses the cost of a conversation in credits. Returns `None` before the end of the conversation, or if its cost is
/// unknown.
#[must_use]
pub fn conversation_cost(response: &[u8]) -> Option<u64> {
    #[derive(Deserialize)]
    struct Conversation {
        status: String,
        metadata: Metadata,
    }
    #[derive(Deserialize)]
    struct Metadata {
        cost: Option<u64>,
    }
    let conversation: Conversation = serde_json::from_slice(response).ok()?;
    let is_over = ["done", "failed"].contains(&conversation.status.as_str());
    conversation.metadata.cost.filter(|_| is_over)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_valid_identifier_of_a_conversation_is_returned() {
        let parse = |id: &str| {
            let first_message = serde_json::json!({
                "type": "conversation_initiation_metadata",
                "conversation_initiation_metadata_event": {
                    "conversation_id": id, "agent_output_audio_format": "pcm_16000",
                },
            });
            conversation_id(first_message.to_string().as_bytes())
        };
        assert_eq!(parse("conv_01k").as_deref(), Some("conv_01k"));
        for id in ["", "../user", "a b", "a?b", &"x".repeat(129)] {
            assert_eq!(parse(id), None, "{id:?} must not be an identifier");
        }
        assert_eq!(conversation_id(b"{}"), None);
    }

    #[test]
    fn a_cost_is_known_when_the_conversation_is_over() {
        for (response, expected) in [
            (r#"{"status":"done","metadata":{"cost":296,"charging":{}}}"#, Some(296)),
            (r#"{"status":"failed","metadata":{"cost":0}}"#, Some(0)),
            (r#"{"status":"processing","metadata":{"cost":12}}"#, None),
            (r#"{"status":"done","metadata":{"cost":null}}"#, None),
            (r#"{"status":"done","metadata":{}}"#, None),
            ("[]", None),
        ] {
            assert_eq!(
                conversation_cost(response.as_bytes()),
                expected,
                "the cost in {response:?} must be parsed"
            );
        }
    }
}

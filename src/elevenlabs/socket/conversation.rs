//! The identifier and the cost of a conversation with an agent. Source: the provider's AsyncAPI document
//! of agents, and `GET /v1/convai/conversations/{id}` of its OpenAPI document.

use serde::Deserialize;

#[derive(Deserialize)]
struct Begin {
    conversation_initiation_metadata_event: Metadata,
}

#[derive(Deserialize)]
struct Metadata {
    conversation_id: String,
}

/// Maximum length of an identifier.
const ID_BYTES_MAX: usize = 128;

/// The identifier of a conversation, from its first message. Only characters that may appear in a path
/// segment are accepted.
#[must_use]
pub fn conversation_id(first: &[u8]) -> Option<String> {
    let Begin { conversation_initiation_metadata_event: Metadata { conversation_id: id } } =
        serde_json::from_slice(first).ok()?;
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-".contains(&byte);
    ((1..=ID_BYTES_MAX).contains(&id.len()) && id.bytes().all(is_plain)).then_some(id)
}

#[derive(Deserialize)]
struct ConversationBody {
    status: String,
    metadata: Costs,
}

#[derive(Deserialize)]
struct Costs {
    cost: Option<u64>,
}

/// The cost of a conversation, in credits; `None` while it is not known.
#[must_use]
pub fn conversation_cost(response: &[u8]) -> Option<u64> {
    let body: ConversationBody = serde_json::from_slice(response).ok()?;
    let is_over = ["done", "failed"].contains(&body.status.as_str());
    body.metadata.cost.filter(|_| is_over)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_conversation_has_its_identifier_in_the_first_message() {
        let named = |id: &str| {
            let first = serde_json::json!({
                "type": "conversation_initiation_metadata",
                "conversation_initiation_metadata_event": {"conversation_id": id, "agent_output_audio_format": "pcm_16000"},
            });
            conversation_id(first.to_string().as_bytes())
        };
        assert_eq!(named("conv_01k").as_deref(), Some("conv_01k"));
        for id in ["", "../user", "a b", "a?b", &"x".repeat(129)] {
            assert_eq!(named(id), None);
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
            assert_eq!(conversation_cost(response.as_bytes()), expected, "{response}");
        }
    }
}

//! Rewrites the WebSocket addresses in responses. They name the provider's host, so a client that
//! connects to one would bypass the proxy. The proxy's own address replaces the host where it is
//! configured; the signature is kept.

use serde_json::{Map, Value};

/// The response with `base` in place of the host of its signed URL; `None` when it has none.
#[must_use]
pub fn readdressed(response: &[u8], base: &str) -> Option<Vec<u8>> {
    let mut members: Map<String, Value> = serde_json::from_slice(response).ok()?;
    let Value::String(url) = members.get_mut("signed_url")? else { return None };
    let (_, rest) = url.split_once("://")?;
    let path = rest.find(['/', '?']).map_or("", |at| rest.get(at..).unwrap_or_default());
    *url = format!("{base}{path}");
    serde_json::to_vec(&members).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(response: &str, expected: Option<&str>) {
        let rewritten = readdressed(response.as_bytes(), "wss://localhost:11011");
        assert_eq!(rewritten.map(|bytes| String::from_utf8(bytes).unwrap()).as_deref(), expected);
    }

    #[test]
    fn only_the_host_is_replaced() {
        check(
            r#"{"signed_url":"wss://api.elevenlabs.io/v1/convai/conversation?agent_id=a&conversation_signature=c%3D"}"#,
            Some(
                r#"{"signed_url":"wss://localhost:11011/v1/convai/conversation?agent_id=a&conversation_signature=c%3D"}"#,
            ),
        );
        check(r#"{"signed_url":"wss://host"}"#, Some(r#"{"signed_url":"wss://localhost:11011"}"#));
        check(r#"{"signed_url":null}"#, None);
        check(r#"{"token":"x"}"#, None);
        check("", None);
    }
}

//! Replaces the host of the signed WebSocket URL in a response. The URL names the provider's host, so a client that
//! connects to it would bypass Keychoir. If Keychoir's public address is configured, that address replaces the scheme
//! and the host. The path and the signature are unchanged.

use serde_json::{Map, Value};

/// Returns the response with `base_url` (scheme and host) at the start of its signed URL, or `None` if the response
/// contains no signed URL.
#[must_use]
pub fn replace_signed_url_host(response: &[u8], base_url: &str) -> Option<Vec<u8>> {
    let mut members: Map<String, Value> = serde_json::from_slice(response).ok()?;
    let Value::String(url) = members.get_mut("signed_url")? else { return None };
    let (_, rest) = url.split_once("://")?;
    let path = rest.find(['/', '?']).map_or("", |start| &rest[start..]);
    *url = format!("{base_url}{path}");
    serde_json::to_vec(&members).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Compares the response after the replacement with the expected one.
    #[track_caller]
    fn check_replaced(response: &str, expected: Option<&str>) {
        let replaced = replace_signed_url_host(response.as_bytes(), "wss://localhost:11011");
        assert_eq!(replaced.map(|bytes| String::from_utf8(bytes).unwrap()).as_deref(), expected);
    }

    #[test]
    fn only_the_host_of_the_signed_url_is_replaced() {
        check_replaced(
            r#"{"signed_url":"wss://api.elevenlabs.io/v1/convai/conversation?agent_id=a&conversation_signature=c%3D"}"#,
            Some(
                r#"{"signed_url":"wss://localhost:11011/v1/convai/conversation?agent_id=a&conversation_signature=c%3D"}"#,
            ),
        );
        check_replaced(r#"{"signed_url":"wss://host"}"#, Some(r#"{"signed_url":"wss://localhost:11011"}"#));
        check_replaced(r#"{"signed_url":null}"#, None);
        check_replaced(r#"{"token":"x"}"#, None);
        check_replaced("", None);
    }
}

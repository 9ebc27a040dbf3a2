//! Addresses of sockets that answers give: they name the provider's host, so that whoever follows one
//! goes past us. Where our own is told, it is put in its place; what was signed stays.

use serde_json::{Map, Value};

/// An answer with our `base` in the address that it gives; `None` when it gives none.
#[must_use]
pub fn readdressed(answer: &[u8], base: &str) -> Option<Vec<u8>> {
    let mut members: Map<String, Value> = serde_json::from_slice(answer).ok()?;
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
    fn check(answer: &str, expected: Option<&str>) {
        let found = readdressed(answer.as_bytes(), "wss://localhost:11011");
        assert_eq!(found.map(|bytes| String::from_utf8(bytes).unwrap()).as_deref(), expected);
    }

    #[test]
    fn only_the_host_becomes_ours() {
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

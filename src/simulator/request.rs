//! Finds in request heads the key, and content that a proxy must not forward. Receives, skips or discards request
//! bodies. A body is counted and hashed while it is received, and is stored up to a limit.

use std::time::Duration;

use http::request::Parts;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use memchr::memmem;
use sha2::{Digest, Sha256};

use super::provider::{PresentedKey, Provider};
use super::query::{form_decode, query_pairs};

/// Maximum number of bytes of a stored body. A larger JSON body is refused.
pub(super) const MAX_JSON_BYTES: usize = 1_048_576;
/// Timeout for reading the rest of a request body after an early response.
const DISCARD_TIMEOUT: Duration = Duration::from_secs(30);

/// Headers in which clients send credentials to a proxy. They must not reach the provider.
const CREDENTIAL_HEADERS: [&str; 4] = ["authorization", "cookie", "proxy-authorization", "xi_api_key"];
/// Query parameters in which clients send credentials.
const CREDENTIAL_PARAMETERS: [&str; 3] = ["xi_api_key", "xi-api-key", "authorization"];

/// Finds the key in a request head.
pub(super) fn find_presented_key(parts: &Parts, provider: &Provider) -> PresentedKey {
    match parts.headers.get("xi-api-key") {
        None => PresentedKey::Absent,
        Some(value) => value.to_str().map_or(PresentedKey::Unknown, |key| provider.find_key(key)),
    }
}

/// Describes the forbidden content in a request head. The descriptions do not contain the content itself.
pub(super) fn find_violations(parts: &Parts, forbidden_texts: &[String]) -> Vec<String> {
    let mut violations = Vec::new();
    for name in CREDENTIAL_HEADERS {
        if parts.headers.contains_key(name) {
            violations.push(format!("the header {name} was forwarded"));
        }
    }
    if parts.headers.get_all("xi-api-key").iter().count() > 1 {
        violations.push("more than one value of xi-api-key was forwarded".to_owned());
    }
    let protocols = parts.headers.get_all("sec-websocket-protocol").iter();
    if protocols.filter_map(|value| value.to_str().ok()).any(|value| value.contains("bearer.")) {
        violations.push("a bearer token was forwarded as a WebSocket subprotocol".to_owned());
    }
    for (name, _) in query_pairs(parts.uri.query().unwrap_or_default()) {
        if let Some(parameter) =
            CREDENTIAL_PARAMETERS.iter().find(|parameter| name.eq_ignore_ascii_case(parameter))
        {
            violations.push(format!("the query parameter {parameter} was forwarded"));
        }
    }
    for (index, text) in forbidden_texts.iter().enumerate() {
        if let Some(location) = find_text(parts, text) {
            violations.push(format!(
                "forbidden text {} of {} was forwarded in {location}",
                index + 1,
                forbidden_texts.len()
            ));
        }
    }
    violations
}

/// Describes the position of `text` in a request head. Returns `None` if the head does not contain `text`.
fn find_text(parts: &Parts, text: &str) -> Option<String> {
    let target = parts.uri.to_string();
    if target.contains(text) || form_decode(&target).contains(text) {
        return Some("the path or the query".to_owned());
    }
    // HTTP libraries convert header names to lower case.
    let lowercase_text = text.to_ascii_lowercase();
    parts.headers.iter().find_map(|(name, value)| {
        if name.as_str().contains(&lowercase_text) {
            Some("a header name".to_owned())
        } else {
            let position = memmem::find(value.as_bytes(), text.as_bytes());
            position.map(|_| format!("the header {name}"))
        }
    })
}

/// The SHA-256 of an empty body, in hexadecimal digits.
pub(super) const EMPTY_SHA256: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

/// A received request body, with its size and hash.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct ReceivedBody {
    /// Number of bytes of the body.
    pub(super) length: u64,
    /// The SHA-256 of the body, in hexadecimal digits.
    pub(super) sha256: String,
    /// The body, or `None` if the body is larger than [`MAX_JSON_BYTES`].
    pub(super) content: Option<Vec<u8>>,
    /// Whether the form contains the part `model_id`, which a transcription requires.
    pub(super) has_model_id_part: bool,
}

impl ReceivedBody {
    /// Returns the value of a form part. Returns `None` if the part is missing, or if the form was too large
    /// to be stored.
    pub(super) fn form_part(&self, name: &str) -> Option<String> {
        let form = String::from_utf8_lossy(self.content.as_deref()?);
        let (_, headers_and_value) = form.split_once(&format!("name=\"{name}\""))?;
        let (_, value) = headers_and_value.split_once("\r\n\r\n")?;
        let (value, _) = value.split_once("\r\n--")?;
        Some(value.to_owned())
    }

    /// Returns whether the form contains a part called `name`. Returns true for a form that was too large to be
    /// stored.
    pub(super) fn has_form_part(&self, name: &str) -> bool {
        let Some(content) = &self.content else { return true };
        memmem::find(content, format!("name=\"{name}\"").as_bytes()).is_some()
    }
}

/// Receives a request body up to its end.
///
/// # Errors
///
/// Fails if the client disconnects.
pub(super) async fn receive_body(mut body: Incoming) -> Result<ReceivedBody, hyper::Error> {
    let mut hash = Sha256::new();
    let mut length = 0_u64;
    let mut content = Some(Vec::new());
    let mut search = PartSearch::default();
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else { continue };
        hash.update(&data);
        length += u64::try_from(data.len()).unwrap_or(u64::MAX);
        search.push(&data);
        content = content.filter(|content: &Vec<u8>| content.len() + data.len() <= MAX_JSON_BYTES);
        if let Some(content) = &mut content {
            content.extend_from_slice(&data);
        }
    }
    let sha256 = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(ReceivedBody { length, sha256, content, has_model_id_part: search.is_found })
}

/// Reads and drops the next `bytes` bytes of a body, or the whole body if it is shorter.
///
/// # Errors
///
/// Fails if the client disconnects.
pub(super) async fn skip_body(body: &mut Incoming, mut bytes: u64) -> Result<(), hyper::Error> {
    while bytes > 0 {
        let Some(frame) = body.frame().await else { break };
        let Ok(data) = frame?.into_data() else { continue };
        bytes = bytes.saturating_sub(u64::try_from(data.len()).unwrap_or(u64::MAX));
    }
    Ok(())
}

/// Reads and drops the rest of a body. A client that is still sending could otherwise receive a
/// reset before the response.
pub(super) async fn discard_body(mut body: Incoming) {
    let remaining_frames = async { while let Some(Ok(_)) = body.frame().await {} };
    // The connection is closed after the timeout.
    let _result = tokio::time::timeout(DISCARD_TIMEOUT, remaining_frames).await;
}

/// Searches for the form part `model_id`. The name of the part may be split between frames.
#[derive(Debug, Default)]
struct PartSearch {
    /// The last bytes of the previous frames, which may be the beginning of the name.
    last_bytes: Vec<u8>,
    is_found: bool,
}

impl PartSearch {
    const PART_NAME: &[u8] = b"name=\"model_id\"";

    fn push(&mut self, data: &[u8]) {
        if self.is_found {
            return;
        }
        let length = Self::PART_NAME.len();
        self.last_bytes.extend_from_slice(&data[..data.len().min(length)]);
        self.is_found =
            [&self.last_bytes, data].iter().any(|bytes| memmem::find(bytes, Self::PART_NAME).is_some());
        if data.len() > length {
            self.last_bytes.clear();
            self.last_bytes.extend_from_slice(&data[data.len() - length..]);
        }
        self.last_bytes.drain(..self.last_bytes.len().saturating_sub(length));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_found_however_the_body_is_split_into_frames() {
        let body = b"--x\r\nContent-Disposition: form-data; name=\"model_id\"\r\n\r\nscribe_v2\r\n--x--";
        for size in 1..body.len() {
            let mut search = PartSearch::default();
            body.chunks(size).for_each(|chunk| search.push(chunk));
            assert!(search.is_found, "the part must be found in chunks of {size} bytes");
        }
        let mut search = PartSearch::default();
        search.push(b"name=\"model_ids\"");
        assert!(!search.is_found);
    }
}

//! Receives requests: searches the head for forbidden content, and reads the body. The body is
//! counted and hashed while it is received, and stored up to a limit.

use std::fmt::Write;
use std::time::Duration;

use bytes::Buf;
use http::request::Parts;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use sha2::{Digest, Sha256};

use super::route::{decoded, query};
use super::world::{Presented, World};

/// Maximum bytes of a JSON body. Larger bodies are refused.
pub(super) const MAX_JSON_BYTES: usize = 1_048_576;
/// Timeout for reading the rest of a body after an early response.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);

/// Headers in which clients send credentials to a proxy. They must not reach the provider.
const CLIENT_HEADERS: [&str; 4] = ["authorization", "cookie", "proxy-authorization", "xi_api_key"];
/// Query parameters in which clients send credentials.
const CLIENT_QUERIES: [&str; 3] = ["xi_api_key", "xi-api-key", "authorization"];

/// The key in the head of a request.
pub(super) fn presented(parts: &Parts, world: &World) -> Presented {
    match parts.headers.get("xi-api-key") {
        None => Presented::Nothing,
        Some(value) => value.to_str().map_or(Presented::Unknown, |key| world.find(key)),
    }
}

/// The forbidden content in the head of a request, described without its values.
pub(super) fn violations(parts: &Parts, forbidden: &[String]) -> Vec<String> {
    let mut violations = Vec::new();
    for name in CLIENT_HEADERS {
        if parts.headers.contains_key(name) {
            violations.push(format!("the header {name} arrived"));
        }
    }
    if parts.headers.get_all("xi-api-key").iter().count() > 1 {
        violations.push("two values of xi-api-key arrived".to_owned());
    }
    let protocols = parts.headers.get_all("sec-websocket-protocol").iter();
    if protocols.filter_map(|value| value.to_str().ok()).any(|value| value.contains("bearer.")) {
        violations.push("a bearer token arrived as a socket protocol".to_owned());
    }
    for (name, _) in query(parts.uri.query().unwrap_or_default()) {
        if let Some(known) = CLIENT_QUERIES.iter().find(|known| name.eq_ignore_ascii_case(known)) {
            violations.push(format!("the query {known} arrived"));
        }
    }
    for (index, text) in forbidden.iter().enumerate() {
        if let Some(location) = location_of(parts, text) {
            violations.push(format!(
                "forbidden text {} of {} arrived in {location}",
                index + 1,
                forbidden.len()
            ));
        }
    }
    violations
}

fn location_of(parts: &Parts, text: &str) -> Option<String> {
    let target = parts.uri.to_string();
    if target.contains(text) || decoded(&target).contains(text) {
        return Some("the path or the query".to_owned());
    }
    let contains = |bytes: &[u8]| bytes.windows(text.len()).any(|window| window == text.as_bytes());
    let header = parts.headers.iter().find(|(name, value)| {
        // HTTP libraries convert header names to lower case.
        name.as_str().contains(&text.to_ascii_lowercase()) || contains(value.as_bytes())
    });
    header.map(|(name, _)| {
        let is_name = name.as_str().contains(&text.to_ascii_lowercase());
        if is_name { "the name of a header".to_owned() } else { format!("the header {name}") }
    })
}

/// SHA-256 of an empty body.
pub(super) const EMPTY_SHA256: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

/// A received body.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct ReceivedBody {
    pub(super) bytes: u64,
    /// SHA-256 of the body, in hexadecimal digits.
    pub(super) sha256: String,
    /// The body; `None` if it is larger than the limit of JSON bodies.
    pub(super) kept: Option<Vec<u8>>,
    /// Whether the form has a part `model_id`, which a transcription requires.
    pub(super) names_model: bool,
}

impl ReceivedBody {
    /// The text of a form part; `None` if the part is missing or the form was too large to be
    /// stored.
    pub(super) fn part(&self, name: &str) -> Option<String> {
        let text = String::from_utf8_lossy(self.kept.as_deref()?);
        let (_, after) = text.split_once(&format!("name=\"{name}\""))?;
        let (_, value) = after.split_once("\r\n\r\n")?;
        let (value, _) = value.split_once("\r\n--")?;
        Some(value.to_owned())
    }

    /// Whether the form has a part with this name; true for every form that was too large to be
    /// stored.
    pub(super) fn has_part(&self, name: &str) -> bool {
        let expected = format!("name=\"{name}\"");
        let Some(kept) = &self.kept else { return true };
        kept.windows(expected.len()).any(|window| window == expected.as_bytes())
    }
}

/// Reads a body to its end.
///
/// # Errors
///
/// When the client disconnects.
pub(super) async fn receive(mut body: Incoming) -> Result<ReceivedBody, hyper::Error> {
    let mut hash = Sha256::new();
    let mut bytes = 0_u64;
    let mut kept = Some(Vec::new());
    let mut search = PartSearch::default();
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else { continue };
        hash.update(&data);
        bytes += u64::try_from(data.remaining()).unwrap_or(u64::MAX);
        search.push(&data);
        kept = kept.filter(|kept| kept.len() + data.len() <= MAX_JSON_BYTES);
        if let Some(kept) = &mut kept {
            kept.extend_from_slice(&data);
        }
    }
    Ok(ReceivedBody { bytes, sha256: hex(&hash.finalize()), kept, names_model: search.is_found })
}

/// Reads and drops the next `bytes` bytes of a body, or all of a shorter body.
///
/// # Errors
///
/// When the client disconnects.
pub(super) async fn skip(body: &mut Incoming, mut bytes: u64) -> Result<(), hyper::Error> {
    while bytes > 0 {
        let Some(frame) = body.frame().await else { break };
        let Ok(data) = frame?.into_data() else { continue };
        bytes = bytes.saturating_sub(u64::try_from(data.remaining()).unwrap_or(u64::MAX));
    }
    Ok(())
}

/// Reads and drops the rest of a body. A client that is still sending could otherwise receive a
/// reset before the response.
pub(super) async fn drain(mut body: Incoming) {
    let rest = async { while let Some(Ok(_)) = body.frame().await {} };
    // After the timeout the connection is closed.
    let _ended = tokio::time::timeout(DRAIN_TIMEOUT, rest).await;
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string cannot fail.
        let _written = write!(text, "{byte:02x}");
        text
    })
}

/// Searches for the name of a form part, also if it is split between two frames.
#[derive(Debug, Default)]
struct PartSearch {
    tail: Vec<u8>,
    is_found: bool,
}

impl PartSearch {
    const WANTED: &[u8] = b"name=\"model_id\"";

    fn push(&mut self, data: &[u8]) {
        if self.is_found {
            return;
        }
        let contains = |bytes: &[u8]| bytes.windows(Self::WANTED.len()).any(|window| window == Self::WANTED);
        let length = Self::WANTED.len();
        self.tail.extend_from_slice(&data[..data.len().min(length)]);
        self.is_found = contains(&self.tail) || contains(data);
        if data.len() > length {
            self.tail.clear();
            self.tail.extend_from_slice(&data[data.len() - length..]);
        }
        self.tail.drain(..self.tail.len().saturating_sub(length));
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
            assert!(search.is_found, "chunks of {size}");
        }
        let mut search = PartSearch::default();
        search.push(b"name=\"model_ids\"");
        assert!(!search.is_found);
    }
}

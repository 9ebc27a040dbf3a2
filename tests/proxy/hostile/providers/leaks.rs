//! Searches the bytes that a client received for keys and forbidden headers, including in compressed, escaped
//! and UTF-16 text.

use std::io::Read;

use flate2::read::{MultiGzDecoder, ZlibDecoder};

use super::super::http_parser::{self, Response};
use super::super::{contains, escape_bytes};

/// Headers of a provider that clients must not receive.
const FORBIDDEN_HEADERS: [&str; 8] = [
    "set-cookie",
    "strict-transport-security",
    "alt-svc",
    "clear-site-data",
    "nel",
    "report-to",
    "keep-alive",
    "proxy-authenticate",
];

/// Returns a description of each forbidden header and key that a client received.
pub fn find_leaks(received: &[u8], keys: &[&str]) -> Vec<String> {
    let mut leaks = Vec::new();
    let responses = http_parser::parse_responses(received).unwrap_or_default();
    for response in &responses {
        let is_present = |name: &&&str| response.header(name).is_some();
        leaks.extend(
            FORBIDDEN_HEADERS
                .iter()
                .filter(is_present)
                .map(|name| format!("the client received the header {name}")),
        );
    }
    for key in keys {
        let is_in = |bytes: &[u8]| {
            contains(bytes, key)
                || contains(&without_nul_bytes(bytes), key)
                || contains(&decode_json_escapes(bytes), key)
        };
        if is_in(received)
            || responses.iter().any(|response| is_in(&response.body) || is_in(&decompress(response)))
        {
            leaks.push(format!("the client received a key: {}", escape_bytes(received)));
        }
    }
    leaks
}

/// Removes NUL bytes, so that ASCII text in UTF-16 becomes ASCII.
fn without_nul_bytes(bytes: &[u8]) -> Vec<u8> {
    bytes.iter().copied().filter(|byte| *byte != 0).collect()
}

/// Decodes the `\u00xx` escapes of JSON.
fn decode_json_escapes(bytes: &[u8]) -> Vec<u8> {
    let text = String::from_utf8_lossy(bytes);
    let mut parts = text.split("\\u00");
    let mut decoded_text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let code = part.get(..2).and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match code {
            Some(code) => decoded_text.extend([&*char::from(code).to_string(), &part[2..]]),
            None => decoded_text.extend(["\\u00", part]),
        }
    }
    decoded_text.into_bytes()
}

/// Decodes the content codings of a body, up to the first error.
fn decompress(response: &Response) -> Vec<u8> {
    let codings = response.header("content-encoding").unwrap_or_default().to_ascii_lowercase();
    let mut body = response.body.clone();
    for coding in codings.rsplit(',').map(str::trim) {
        let mut decoded_body = Vec::new();
        // The bytes before an error are still searched.
        let _ = match coding {
            "gzip" | "x-gzip" => MultiGzDecoder::new(&*body).take(1 << 20).read_to_end(&mut decoded_body),
            "deflate" => ZlibDecoder::new(&*body).take(1 << 20).read_to_end(&mut decoded_body),
            _ => continue,
        };
        body = decoded_body;
    }
    body
}

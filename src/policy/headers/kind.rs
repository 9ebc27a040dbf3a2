//! Evaluates the content type of a response: whether its body is searched for keys, and whether a browser
//! would execute it.

use http::header::{self, HeaderMap, HeaderName, HeaderValue};

/// Types whose bytes are not text: audio, images, video, archives.
const NOT_SEARCHED: [&str; 16] = [
    "audio/",
    "image/",
    "video/",
    "application/ogg",
    "application/zip",
    "application/x-zip-compressed",
    "application/gzip",
    "application/x-gzip",
    "application/x-tar",
    "application/x-gtar",
    "application/x-bzip2",
    "application/x-xz",
    "application/zstd",
    "application/x-7z-compressed",
    "application/vnd.rar",
    "application/x-rar-compressed",
];

/// Text formats among those types: drawings and playlists.
const TEXTS: [&str; 3] = ["xml", "mpegurl", "scpls"];

/// Parts of the content types that may contain scripts: HTML, XHTML, SVG, any XML, and multipart streams
/// whose parts replace one another.
const ACTIVE: [&str; 5] = ["html", "xml", "svg", "xsl", "mixed-replace"];

/// The most common types, which no browser executes.
const USUAL: [&[u8]; 3] = [b"application/json", b"audio/mpeg", b"text/event-stream"];

/// Whether a body with these headers is searched for keys: all but known audio, images, video and
/// archives. A body without a type, or with two, is searched.
#[must_use]
pub fn is_searched(headers: &HeaderMap) -> bool {
    let mut kinds = headers.get_all(header::CONTENT_TYPE).iter();
    let (Some(kind), None) = (kinds.next(), kinds.next()) else { return true };
    let kind = kind.as_bytes();
    if USUAL.contains(&kind) {
        return kind != b"audio/mpeg";
    }
    if kind.contains(&b',') {
        return true;
    }
    let kind = kind.split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii();
    let is_known = NOT_SEARCHED.iter().any(|known| {
        let start = if known.ends_with('/') { kind.get(..known.len()) } else { Some(kind) };
        start.is_some_and(|start| start.eq_ignore_ascii_case(known.as_bytes()))
    });
    !is_known || TEXTS.iter().any(|text| has(kind, text))
}

/// Prevents browsers from executing scripts in a document of the provider, which would run with the
/// rights of Keychoir's own origin. Restrictions of the response itself are kept.
pub(super) fn sandbox(headers: &mut HeaderMap) {
    const SANDBOX: HeaderValue = HeaderValue::from_static("sandbox");
    const POLICY: HeaderName = header::CONTENT_SECURITY_POLICY;
    let mut kinds = headers.get_all(header::CONTENT_TYPE).iter().map(HeaderValue::as_bytes).peekable();
    let is_untyped = kinds.peek().is_none();
    let is_active = kinds.any(|kind| !USUAL.contains(&kind) && ACTIVE.iter().any(|part| has(kind, part)));
    if is_untyped || is_active {
        // A browser would guess the type of an untyped document.
        forbid_sniffing(headers);
    }
    if !is_active {
        return;
    }
    let theirs: Vec<HeaderValue> = headers.get_all(POLICY).iter().cloned().collect();
    headers.insert(POLICY, SANDBOX);
    for policy in theirs {
        headers.append(POLICY, policy);
    }
}

/// Makes browsers use the declared content type, whatever the bytes look like.
pub fn forbid_sniffing(headers: &mut HeaderMap) {
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
}

fn has(text: &[u8], part: &str) -> bool {
    text.windows(part.len()).any(|window| window.eq_ignore_ascii_case(part.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(kinds: &[&'static str]) -> HeaderMap {
        let values = kinds.iter().map(|kind| (header::CONTENT_TYPE, HeaderValue::from_static(kind)));
        let mut headers = HeaderMap::new();
        for (name, value) in values {
            headers.append(name, value);
        }
        headers
    }

    #[test]
    fn every_type_but_audio_images_video_and_archives_is_searched() {
        for kinds in [
            &["application/json"][..],
            &["APPLICATION/JSON; charset=utf-8"],
            &["application/problem+json"],
            &["text/html"],
            &["text/event-stream"],
            &["application/octet-stream"],
            &["message/http"],
            &["multipart/mixed; boundary=audio/mpeg"],
            &["application/yaml"],
            &["application/x-whatever"],
            &["image/svg+xml"],
            &["audio/x-mpegurl"],
            &["audio"],
            &["audio/mpeg, application/json"],
            &["audio/mpeg", "application/json"],
            &[""],
            &[],
        ] {
            assert!(is_searched(&kind(kinds)), "{kinds:?}");
        }
        for kinds in ["audio/mpeg", "Audio/PCM;rate=16000", " video/mp4", "image/png", "application/zip"] {
            assert!(!is_searched(&kind(&[kinds])), "{kinds}");
        }
    }

    #[test]
    fn documents_with_scripts_run_in_a_sandbox() {
        for (kinds, is_active) in [
            (&["text/html; charset=utf-8"][..], true),
            (&["application/xhtml+xml"], true),
            (&["IMAGE/SVG+XML"], true),
            (&["text/xml"], true),
            (&["application/rdf+xml"], true),
            (&["multipart/x-mixed-replace; boundary=a"], true),
            (&["text/plain", "text/html"], true),
            (&["text/plain, text/html"], true),
            (&["application/json"], false),
            (&["audio/mpeg"], false),
            (&[], false),
        ] {
            let mut headers = kind(kinds);
            sandbox(&mut headers);
            let policies: Vec<_> = headers.get_all("content-security-policy").iter().collect();
            assert_eq!(policies, if is_active { vec!["sandbox"] } else { Vec::new() }, "{kinds:?}");
            let is_sniffed = !headers.contains_key("x-content-type-options");
            assert_eq!(is_sniffed, !is_active && !kinds.is_empty(), "{kinds:?}");
        }
    }

    #[test]
    fn restrictions_of_the_provider_are_kept() {
        let mut headers = kind(&["text/html"]);
        headers.insert("content-security-policy", HeaderValue::from_static("script-src 'none'"));
        headers.insert("x-content-type-options", HeaderValue::from_static("sniff"));
        sandbox(&mut headers);
        let policies: Vec<_> = headers.get_all("content-security-policy").iter().collect();
        assert_eq!(policies, ["sandbox", "script-src 'none'"]);
        assert_eq!(headers.get_all("x-content-type-options").iter().count(), 1);
    }
}

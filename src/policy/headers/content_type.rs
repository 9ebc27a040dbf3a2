//! Decides by the content type of a response whether its body is searched for keys, and whether a browser would execute
//! scripts in it. Adds the headers that prevent browsers from executing the scripts and from guessing the type.

use http::header::{self, HeaderMap, HeaderName, HeaderValue};

/// Content types whose bytes are not text: audio, images, video and archives. An element that ends with a slash covers
/// all types with this prefix.
const BINARY_TYPES: [&str; 16] = [
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

/// Substrings of audio and image types that are text: vector graphics and playlists.
const TEXT_SUBTYPES: [&str; 3] = ["xml", "mpegurl", "scpls"];

/// Substrings of the content types that may contain scripts: HTML, XHTML, SVG, any XML, and multipart
/// streams whose parts replace one another.
const SCRIPTABLE_TYPES: [&str; 5] = ["html", "xml", "svg", "xsl", "mixed-replace"];

/// The most common content types, which browsers do not execute. They need no parsing.
const COMMON_TYPES: [&[u8]; 3] = [b"application/json", b"audio/mpeg", b"text/event-stream"];

/// Whether a body with the given `headers` is searched for keys. Known audio, images, video and archives are not. A
/// body with no content type, or with more than one, is searched.
#[must_use]
pub fn is_searched(headers: &HeaderMap) -> bool {
    let mut content_types = headers.get_all(header::CONTENT_TYPE).iter();
    let (Some(content_type), None) = (content_types.next(), content_types.next()) else { return true };
    let content_type = content_type.as_bytes();
    if COMMON_TYPES.contains(&content_type) {
        return content_type != b"audio/mpeg";
    }
    if content_type.contains(&b',') {
        return true;
    }
    let essence = content_type.split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii();
    let is_binary = BINARY_TYPES.iter().any(|binary| {
        let compared = if binary.ends_with('/') { essence.get(..binary.len()) } else { Some(essence) };
        compared.is_some_and(|compared| compared.eq_ignore_ascii_case(binary.as_bytes()))
    });
    !is_binary || TEXT_SUBTYPES.iter().any(|subtype| contains_ignoring_case(essence, subtype))
}

/// Prevents browsers from executing scripts in a document of the provider, which would run in Keychoir's
/// origin. A content security policy of the response is kept.
pub(super) fn sandbox_scripts(headers: &mut HeaderMap) {
    const SANDBOX: HeaderValue = HeaderValue::from_static("sandbox");
    const POLICY: HeaderName = header::CONTENT_SECURITY_POLICY;
    let mut content_types =
        headers.get_all(header::CONTENT_TYPE).iter().map(HeaderValue::as_bytes).peekable();
    let is_untyped = content_types.peek().is_none();
    let is_scriptable = content_types.any(|content_type| {
        !COMMON_TYPES.contains(&content_type)
            && SCRIPTABLE_TYPES.iter().any(|part| contains_ignoring_case(content_type, part))
    });
    if is_untyped || is_scriptable {
        // A browser would guess the type of an untyped document.
        forbid_sniffing(headers);
    }
    if !is_scriptable {
        return;
    }
    let existing_policies: Vec<HeaderValue> = headers.get_all(POLICY).iter().cloned().collect();
    headers.insert(POLICY, SANDBOX);
    for policy in existing_policies {
        headers.append(POLICY, policy);
    }
}

/// Makes browsers use the declared content type instead of guessing it from the bytes.
pub fn forbid_sniffing(headers: &mut HeaderMap) {
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
}

fn contains_ignoring_case(text: &[u8], part: &str) -> bool {
    text.windows(part.len()).any(|window| window.eq_ignore_ascii_case(part.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers_with(content_types: &[&'static str]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for content_type in content_types {
            headers.append(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
        }
        headers
    }

    #[test]
    fn every_type_but_audio_images_video_and_archives_is_searched() {
        for content_types in [
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
            assert!(is_searched(&headers_with(content_types)), "{content_types:?} must be searched");
        }
        for binary in ["audio/mpeg", "Audio/PCM;rate=16000", " video/mp4", "image/png", "application/zip"] {
            assert!(!is_searched(&headers_with(&[binary])), "{binary} must not be searched");
        }
    }

    #[test]
    fn documents_with_scripts_are_sandboxed() {
        for (content_types, is_scriptable) in [
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
            let mut headers = headers_with(content_types);
            sandbox_scripts(&mut headers);
            let policies: Vec<_> = headers.get_all("content-security-policy").iter().collect();
            assert_eq!(
                policies,
                if is_scriptable { vec!["sandbox"] } else { Vec::new() },
                "only documents with scripts must be sandboxed: {content_types:?}"
            );
            let is_sniffed = !headers.contains_key("x-content-type-options");
            assert_eq!(
                is_sniffed,
                !is_scriptable && !content_types.is_empty(),
                "browsers must not guess the type of untyped documents and of documents with scripts: {content_types:?}"
            );
        }
    }

    #[test]
    fn the_content_security_policy_of_the_provider_is_kept() {
        let mut headers = headers_with(&["text/html"]);
        headers.insert("content-security-policy", HeaderValue::from_static("script-src 'none'"));
        headers.insert("x-content-type-options", HeaderValue::from_static("sniff"));
        sandbox_scripts(&mut headers);
        let policies: Vec<_> = headers.get_all("content-security-policy").iter().collect();
        assert_eq!(policies, ["sandbox", "script-src 'none'"]);
        assert_eq!(headers.get_all("x-content-type-options").iter().count(), 1);
    }
}

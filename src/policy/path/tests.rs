//! Tests which paths are ambiguous, with models of servers and gateways that interpret paths in different ways. Also
//! tests the prefixes of paths and the removal of the base path.

use http::Uri;
use proptest::prelude::*;

use super::*;

#[track_caller]
fn check_segments_of(path: &str, expected: &[&str]) {
    let parsed = Path::parse(path).unwrap();
    assert_eq!(segments(parsed.as_str()).collect::<Vec<_>>(), expected, "{path} must have these segments");
}

#[track_caller]
fn check_rejected(path: &str, expected: AmbiguousPathError) {
    assert_eq!(Path::parse(path).map(|path| path.0.into_owned()), Err(expected), "{path} must be rejected");
}

#[test]
fn a_path_is_decoded_once_and_split() {
    check_segments_of("/", &[]);
    check_segments_of("/v1/voices", &["v1", "voices"]);
    check_segments_of("/v1/voices/", &["v1", "voices"]);
    check_segments_of("/v1/%76oices/a%20b", &["v1", "voices", "a b"]);
    check_segments_of("/v1/caf%C3%A9/%E5%A3%B0%F0%9F%8E%99", &["v1", "caf\u{e9}", "\u{58f0}\u{1f399}"]);
    check_segments_of("/v1/a.b/..c/c../.../.well-known", &["v1", "a.b", "..c", "c..", "...", ".well-known"]);
    check_segments_of("/v1/100%25/50%25x/%25", &["v1", "100%", "50%x", "%"]);
    check_segments_of("/v1/a+b,c=d&e@f:g!$'()*~-_|{id}", &["v1", "a+b,c=d&e@f:g!$'()*~-_|{id}"]);
}

#[test]
fn an_ambiguous_path_is_rejected_with_its_reason() {
    use AmbiguousPathError::{
        Control, Dots, DoubleEscape, EmptySegment, Encoding, Escape, Relative, Separator, Whitespace,
    };
    for (reason, paths) in [
        (Relative, &["", "v1", "*"][..]),
        (EmptySegment, &["//", "//v1", "/v1//voices", "/v1/voices//"]),
        (
            Dots,
            &["/.", "/..", "/v1/.", "/v1/../x", "/v1/./x", "/v1/%2e", "/v1/%2E%2e/x", "/v1/.%2e", "/v1/%2e."],
        ),
        (
            Separator,
            &[
                "/v1/..;/x",
                "/v1/.;x/y",
                "/v1/;",
                "/v1/voices;a=b",
                "/v1/%3b",
                "/v1/..%3B",
                "/v1%2fvoices",
                "/v1/a%2Fb",
                "/v1/a%5cb",
                "/v1\\voices",
                "/v1/%5C..",
                "/v1/voices%3fx",
                "/v1/voices%23",
                "/v1/#",
                "/v1/x?",
                "/v1/%EF%BC%8E%EF%BC%8E",
                "/v1/a%EF%BC%8Fb",
                "/v1/%E2%80%A5",
            ],
        ),
        (Control, &["/v1/%00", "/v1/%0a", "/v1/%0D%0A", "/v1/%7f", "/v1/\t", "/v1/%c2%85"]),
        (Escape, &["/v1/%", "/v1/%4", "/v1/%zz", "/v1/%u002e", "/v1/a%/", "/v1/%+1"]),
        (
            DoubleEscape,
            &[
                "/v1/%252e%252e/x",
                "/v1/%252f",
                "/v1/%2573ervice-accounts",
                "/v1/%25%32%65",
                "/v1/%25u002e",
                "/v1/%25252e",
            ],
        ),
        (
            Encoding,
            &[
                "/v1/%c0%ae%c0%ae",
                "/v1/%c0%af",
                "/v1/%e0%80%ae",
                "/v1/%ff",
                "/v1/%c3",
                "/v1/%ed%a0%80",
                "/v1/caf\u{e9}",
                "/v1/%f0%80%80%af",
                "/v1/%f8%80%80%80%ae",
            ],
        ),
        (
            Whitespace,
            &["/v1/%20", "/v1/%20service-accounts", "/v1/service-accounts%20", "/v1/a%c2%a0/b", "/v1/ x"],
        ),
    ] {
        for path in paths {
            check_rejected(path, reason);
        }
    }
}

#[test]
fn every_segment_of_a_long_path_is_returned() {
    for depth in 0..40 {
        let path = format!("/{}", vec!["a"; depth].join("/"));
        assert_eq!(segments(Path::parse(&path).unwrap().as_str()).count(), depth);
    }
}

/// Paths of the provider's OpenAPI document are accepted with identifiers of every form.
#[test]
fn paths_of_the_provider_are_accepted_with_their_identifiers() {
    for identifier in [
        "21m00Tcm4TlvDq8ikWAM",
        "agent_3701k3ttaq12ewp8b7qv5rfyszkz",
        "3f2504e0-4f89-11d3-9a0c-0305e82c3301",
        "en-US",
        "my%20tool",
        "caf%C3%A9.v1.2",
        "a+b=",
        "user@example.com",
        "100%25",
        "..hidden",
    ] {
        for path in [
            "/v1/text-to-speech/{}/stream/with-timestamps",
            "/v1/convai/mcp-servers/x/tool-approvals/{}",
            "/v1/pronunciation-dictionaries/x/{}/download",
            "/v2/voices/{}/",
        ] {
            let path = path.replace("{}", identifier);
            assert!(Path::parse(&path).is_ok(), "{path} must be accepted");
        }
    }
}

/// Returns the segments of a path as one server interprets it, or `None` if the server rejects the path.
type Interpreter = fn(&str) -> Option<Vec<String>>;

/// Percent-decodes `text`. Like common servers, keeps malformed escapes.
fn percent_decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut decoded = Vec::new();
    let mut offset = 0;
    while offset < bytes.len() {
        match bytes
            .get(offset + 1..offset + 3)
            .and_then(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok())
        {
            Some(escaped) if bytes[offset] == b'%' && bytes[offset + 1] != b'+' => {
                decoded.push(escaped);
                offset += 3;
            }
            _ => {
                decoded.push(bytes[offset]);
                offset += 1;
            }
        }
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

/// Resolves dot segments and removes empty segments.
fn resolve_dots<'a>(segments: impl Iterator<Item = &'a str>) -> Vec<String> {
    let mut resolved: Vec<String> = Vec::new();
    for segment in segments {
        match segment {
            "" | "." => {}
            ".." => {
                resolved.pop();
            }
            name => resolved.push(name.to_owned()),
        }
    }
    resolved
}

/// Splits a path into its segments, without the empty segments before the first slash and after the last slash.
fn split_segments(path: &str) -> Vec<&str> {
    let path = path.strip_prefix('/').unwrap_or(path);
    let path = path.strip_suffix('/').unwrap_or(path);
    if path.is_empty() { Vec::new() } else { path.split('/').collect() }
}

/// Models nginx with a URI in `proxy_pass`: decodes the path, merges slashes, resolves dots, and rejects a zero byte.
fn nginx(path: &str) -> Option<Vec<String>> {
    let decoded = percent_decode(path);
    (!decoded.contains('\0')).then(|| resolve_dots(decoded.split('/')))
}

/// Models Starlette with uvicorn: decodes the whole path once, then matches it.
fn starlette(path: &str) -> Option<Vec<String>> {
    Some(split_segments(&percent_decode(path)).into_iter().map(str::to_owned).collect())
}

/// Models Express: splits the path, then decodes each parameter.
fn express(path: &str) -> Option<Vec<String>> {
    Some(split_segments(path).into_iter().map(percent_decode).collect())
}

/// Models Go's `ServeMux`: decodes the path, cleans it, and redirects to the clean path.
fn go(path: &str) -> Option<Vec<String>> {
    Some(resolve_dots(percent_decode(path).split('/')))
}

/// Models a gateway that decodes the path, in front of a server that decodes it again and treats backslashes as
/// slashes.
fn double_decoder(path: &str) -> Option<Vec<String>> {
    Some(resolve_dots(percent_decode(&percent_decode(path)).split(['/', '\\'])))
}

/// Models Tomcat: removes the parameters of each segment, decodes it, and resolves dots.
fn tomcat(path: &str) -> Option<Vec<String>> {
    let segments: Vec<String> =
        path.split('/').map(|part| percent_decode(part.split(';').next().unwrap())).collect();
    Some(resolve_dots(segments.iter().flat_map(|part| part.split('/'))))
}

/// Models a gateway that decodes the path and copies it into a new request line without encoding it.
fn unencoding_gateway(path: &str) -> Option<Vec<String>> {
    let decoded = percent_decode(path);
    let path = decoded.split(['?', '#']).next().unwrap();
    Some(
        resolve_dots(percent_decode(path).split('/'))
            .into_iter()
            .map(|segment| segment.trim().to_owned())
            .collect(),
    )
}

const INTERPRETERS: [(&str, Interpreter); 7] = [
    ("nginx", nginx),
    ("starlette", starlette),
    ("express", express),
    ("go", go),
    ("double decoder", double_decoder),
    ("tomcat", tomcat),
    ("unencoding gateway", unencoding_gateway),
];

/// Checks that every server and Keychoir interpret an accepted path in the same way, with and without a base path.
/// Returns whether the path is accepted.
fn check_interpreters(path: &str) -> Result<bool, TestCaseError> {
    let Ok(parsed) = Path::parse(path) else { return Ok(false) };
    let expected: Vec<String> = segments(parsed.as_str()).map(str::to_owned).collect();
    for (name, interpret) in INTERPRETERS {
        prop_assert_eq!(
            interpret(path),
            Some(expected.clone()),
            "{} must agree with Keychoir on {}",
            name,
            path
        );
        let below_base = [&["base".to_owned(), "p".to_owned()], expected.as_slice()].concat();
        prop_assert_eq!(
            interpret(&format!("/base/p{path}")),
            Some(below_base),
            "{} must agree with Keychoir on /base/p{}",
            name,
            path
        );
    }
    Ok(true)
}

#[test]
fn servers_interpret_a_rejected_path_differently() {
    for path in
        ["/a/..;/b", "/a/%2e%2e/b", "/a%2fb", "/a//b", "/a/%252e%252e/b", "/a\\b", "/a;b", "/a%3fb", "/a%20"]
    {
        let interpretations: Vec<_> = INTERPRETERS.iter().map(|(_, interpret)| interpret(path)).collect();
        assert!(
            interpretations.iter().any(|other| *other != interpretations[0]),
            "the servers must interpret {path} differently: {interpretations:?}"
        );
        assert!(Path::parse(path).is_err(), "{path} must be rejected");
    }
}

/// A regular expression for segments that no server changes.
const PLAIN_SEGMENT: &str = "[A-Za-z0-9_-]{1,24}|%E2%82%AC[a-z]|[a-z]%20[a-z]";

/// A regular expression for parts of paths, many of which are ambiguous.
const PATH_PART: &str = "[a-c]{1,3}|v1|service-accounts|\\.|\\.\\.|/|//|\\\\|;|;x=1|%2e|%2E%2e|%2f|%5c|%25|%252e|%252f\
    |%|%4|%41|%73|%00|%0a|%20|\\+|%2b|%3b|%3f|%23|#|%c0%ae|%c3%a9|%ff|%ef%bc%8e|~|:|@\
    |\\.\\.;|%25%32%65|%u002e|%25u002e";

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn every_server_interprets_an_accepted_path_in_the_same_way(
        parts in prop::collection::vec(PATH_PART, 0..8),
    ) {
        check_interpreters(&format!("/{}", parts.concat()))?;
        check_interpreters(&format!("/{}", parts.join("/")))?;
    }

    #[test]
    fn every_server_interprets_an_accepted_path_below_a_base_in_the_same_way(
        parts in prop::collection::vec(PATH_PART, 0..8),
    ) {
        let target = format!("/eleven/labs/{}", parts.concat());
        let stripped = target.parse::<Uri>().ok().and_then(|target| strip_base_path(&target, "/eleven/labs"));
        if let Some(stripped) = stripped {
            check_interpreters(stripped.path())?;
        }
    }

    #[test]
    fn every_server_interprets_unusual_bytes_in_the_same_way(path in "/[ -~\u{e9}\u{a0}]{0,24}") {
        check_interpreters(&path)?;
    }

    #[test]
    fn every_plain_path_is_accepted(segments in prop::collection::vec(PLAIN_SEGMENT, 0..14)) {
        let is_accepted = check_interpreters(&format!("/{}", segments.join("/")))?;
        prop_assert!(is_accepted, "a path of plain segments must be accepted");
    }
}

#[test]
fn a_path_is_within_a_prefix_by_whole_segments() {
    for (path, prefix, expected) in [
        ("/v1/voices", "/v1/voices", true),
        ("/v1/Voices/x/", "/v1/voices", true),
        ("/v1/voices/x/samples", "/v1/voices/{id}/samples", true),
        ("/v1/voicesx", "/v1/voices", false),
        ("/v1", "/v1/voices", false),
        ("/v1/voices", "", true),
    ] {
        assert_eq!(
            Path::parse(path).unwrap().is_within(prefix),
            expected,
            "{path} must be within {prefix} only by whole segments"
        );
    }
}

#[track_caller]
fn check_base(target: &str, expected: Option<&str>) {
    let stripped = strip_base_path(&target.parse().unwrap(), "/eleven/labs");
    assert_eq!(stripped.map(|stripped| stripped.to_string()).as_deref(), expected);
}

#[test]
fn a_base_path_is_removed_as_a_whole() {
    check_base("/eleven/labs/v1/voices?a=%20&a", Some("/v1/voices?a=%20&a"));
    check_base("/eleven/labs", Some("/"));
    check_base("/eleven/labs?a=1", Some("/?a=1"));
    check_base("http://localhost/eleven/labs/livez", Some("http://localhost/livez"));
    for other in ["/eleven/labsx", "/v1/voices", "/eleven", "/x/eleven/labs/v1", "*"] {
        check_base(other, None);
    }
    assert_eq!(strip_base_path(&"/v1".parse().unwrap(), ""), None);
}

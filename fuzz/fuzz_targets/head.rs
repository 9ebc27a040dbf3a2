//! Fuzzes the processing of request heads: the removal of credentials and hop-by-hop headers, the endpoint lookup and
//! the logged names of query parameters. No credential may remain in the headers or the query, and `content-length`
//! must stay unchanged. The route label must be short, and the logged names must contain no control characters.

#![no_main]

use arbitrary::Arbitrary;
use http::{HeaderMap, HeaderName, HeaderValue, Method};
use keychoir::elevenlabs::endpoint::lookup;
use keychoir::policy::headers::{
    ForwardedHeaders, parameter_names, presented_credentials, strip_query, strip_request,
};
use libfuzzer_sys::fuzz_target;

/// An unparsed request head.
#[derive(Arbitrary, Debug)]
struct RequestHead {
    method: String,
    path: String,
    query: String,
    headers: Vec<(String, Vec<u8>)>,
}

fuzz_target!(|head: RequestHead| {
    let method = Method::from_bytes(head.method.as_bytes()).unwrap_or(Method::POST);
    if let Ok(endpoint) = lookup(&method, &head.path) {
        assert!(endpoint.route.to_string().len() < 1_000, "the route label must be short");
    }

    if let Some(stripped) = strip_query(&head.query) {
        assert!(
            presented_credentials(&HeaderMap::new(), Some(&stripped)).next().is_none(),
            "no credential may remain in the query"
        );
        assert!(
            strip_query(&stripped).is_some_and(|again| again == stripped),
            "stripping must be idempotent"
        );
    }
    assert!(
        !parameter_names(&head.query).chars().any(char::is_control),
        "the names of parameters must contain no control characters"
    );

    let mut headers = HeaderMap::new();
    for (name, value) in &head.headers {
        if let (Ok(name), Ok(value)) = (HeaderName::try_from(name.as_str()), HeaderValue::from_bytes(value)) {
            headers.append(name, value);
        }
    }
    let content_length = headers.get("content-length").cloned();
    strip_request(&mut headers, &ForwardedHeaders::default());
    for name in [
        "xi-api-key",
        "xi_api_key",
        "x-keychoir-token",
        "authorization",
        "proxy-authorization",
        "cookie",
        "connection",
        "host",
    ] {
        assert!(!headers.contains_key(name), "the header {name} must be removed");
    }
    assert_eq!(
        headers.get("content-length"),
        content_length.as_ref(),
        "the framing of the body must not change"
    );
});

//! Strips an arbitrary request head. Credentials must be removed from the headers and the query, and `content-length`
//! must be kept.

#![no_main]

use arbitrary::Arbitrary;
use http::{HeaderMap, HeaderName, HeaderValue, Method};
use keychoir::elevenlabs::endpoint::lookup;
use keychoir::policy::headers::{
    ForwardedHeaders, parameter_names, presented_credentials, strip_query, strip_request,
};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Head {
    method: String,
    path: String,
    query: String,
    headers: Vec<(String, Vec<u8>)>,
}

fuzz_target!(|head: Head| {
    let method = Method::from_bytes(head.method.as_bytes()).unwrap_or(Method::POST);
    if let Ok(endpoint) = lookup(&method, &head.path) {
        assert!(endpoint.route.to_string().len() < 1_000, "the route label must be short");
    }

    if let Some(stripped) = strip_query(&head.query) {
        assert!(
            presented_credentials(&HeaderMap::new(), Some(&stripped)).next().is_none(),
            "no credential must remain"
        );
        assert!(strip_query(&stripped).is_some_and(|again| again == stripped), "stripping must be idempotent");
    }
    assert!(!parameter_names(&head.query).chars().any(char::is_control));

    let mut map = HeaderMap::new();
    for (name, value) in &head.headers {
        if let (Ok(name), Ok(value)) = (HeaderName::try_from(name.as_str()), HeaderValue::from_bytes(value)) {
            map.append(name, value);
        }
    }
    let length = map.get("content-length").cloned();
    strip_request(&mut map, &ForwardedHeaders::default());
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
        assert!(!map.contains_key(name));
    }
    assert_eq!(map.get("content-length"), length.as_ref(), "the framing of the body must not change");
});

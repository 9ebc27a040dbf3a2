//! Decides which web pages may use Keychoir, and writes the CORS headers and the preflight responses for them.
//!
//! Listening on loopback does not protect Keychoir from web pages. Any page in a browser on this machine can send
//! requests to Keychoir, and a host name that resolves to this machine makes a page same-origin (DNS rebinding). SDKs
//! and scripts send no headers of a browser, so their requests are only checked for their host name.

use core::net::IpAddr;
use std::borrow::Cow;

use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Method, StatusCode};

/// The accepted hosts and origins.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AccessRules {
    /// Accepted names in a `Host` header, in lower case. `*` accepts any name.
    pub hosts: Vec<String>,
    /// Origins whose pages may use Keychoir, in lower case, such as `https://app.example`.
    pub origins: Vec<String>,
}

/// The sender of an accepted request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RequestOrigin {
    /// The request was sent by a program, by a user who opened an address in a browser, by a page of Keychoir, or
    /// without `Origin` by a page of a listed origin.
    Direct,
    /// The request was sent by a page of the contained listed origin.
    Page(HeaderValue),
    /// The request is a CORS preflight for a page of the contained listed origin.
    Preflight(HeaderValue),
}

/// The reason why a request is rejected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OriginRejected {
    /// The `Host` is not accepted.
    #[error("the request's Host is a name that is not listed")]
    Host,
    /// A page whose origin is not listed sent the request, or the request contains more than one `Origin`.
    #[error("a web page of an origin that is not listed sent the request")]
    Origin,
}

/// Checks the host and the origin of a request. If tokens are configured (`requires_token` is true), any host is
/// accepted, because a page that uses DNS rebinding has no token.
///
/// # Errors
///
/// Fails if the host is not accepted or the origin of the page is not listed.
pub fn check_origin(
    rules: &AccessRules,
    requires_token: bool,
    method: &Method,
    headers: &HeaderMap,
) -> Result<RequestOrigin, OriginRejected> {
    let lowercase_value =
        |name: HeaderName| headers.get(name).map(|value| lowercase(value.to_str().unwrap_or("")));
    if !requires_token && !lowercase_value(header::HOST).is_none_or(|host| is_accepted_host(rules, &host)) {
        return Err(OriginRejected::Host);
    }
    let mut origins = headers.get_all(header::ORIGIN).iter();
    let origin = origins.next();
    // A browser sends one `Origin`. If there are two, this check and a later parser could use different values.
    if origins.next().is_some() {
        return Err(OriginRejected::Origin);
    }
    let Some(origin) = origin else {
        // A request for an image or from a link has no `Origin`. `Sec-Fetch-Site` indicates whether its page
        // has another origin, and `Referer` may contain the URL of the page.
        let is_cross_origin =
            lowercase_value(SEC_FETCH_SITE).is_some_and(|site| site != "same-origin" && site != "none");
        let is_listed =
            || lowercase_value(header::REFERER).is_some_and(|page| is_listed_page(&rules.origins, &page));
        return if is_cross_origin && !is_listed() {
            Err(OriginRejected::Origin)
        } else {
            Ok(RequestOrigin::Direct)
        };
    };
    let origin_text = lowercase_value(header::ORIGIN).unwrap_or_default();
    let is_own_page = origin_text
        .strip_prefix("http://")
        .or_else(|| origin_text.strip_prefix("https://"))
        .is_some_and(|host| Some(host) == lowercase_value(header::HOST).as_deref());
    if is_own_page {
        return Ok(RequestOrigin::Direct);
    }
    if !rules.origins.iter().any(|origin| *origin == origin_text) {
        return Err(OriginRejected::Origin);
    }
    let is_preflight =
        *method == Method::OPTIONS && headers.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
    Ok(if is_preflight {
        RequestOrigin::Preflight(origin.clone())
    } else {
        RequestOrigin::Page(origin.clone())
    })
}

/// The header in which a browser reports whether a request is sent by a page of another origin.
const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// Converts `text` to lower case, and copies it only if it contains an upper-case letter.
fn lowercase(text: &str) -> Cow<'_, str> {
    let has_upper = text.bytes().any(|byte| byte.is_ascii_uppercase());
    if has_upper { Cow::Owned(text.to_ascii_lowercase()) } else { Cow::Borrowed(text) }
}

/// Whether the origin of a page's URL is one of the given origins.
fn is_listed_page(origins: &[String], page: &str) -> bool {
    let contains_page = |origin: &String| {
        page.strip_prefix(origin.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    origins.iter().any(contains_page)
}

/// Whether a host is listed or is always accepted. The owner of a public name, or of the local network for a
/// name without a dot, can make the name resolve to this machine. IP addresses are not resolved, and
/// `localhost` and the names below it always mean this machine (RFC 6761, section 6.3).
fn is_accepted_host(rules: &AccessRules, host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    name == "localhost"
        || name.ends_with(".localhost")
        || name.parse::<IpAddr>().is_ok()
        || rules.hosts.iter().any(|listed| listed == "*" || listed == name)
}

/// Response headers that pages may read: identifiers of the request, its cost and its error.
const EXPOSED_HEADERS: &str =
    "request-id, history-item-id, song-id, character-cost, x-request-id, x-keychoir-error, retry-after";

/// Maximum length of the list of exposed headers in bytes. The maximum exceeds any list of the provider, and keeps the
/// search for duplicates fast.
const MAX_EXPOSED_LENGTH: usize = 2 * 1024;

/// The value of `Access-Control-Max-Age` in seconds: two hours, the maximum that Chromium accepts.
const MAX_AGE_SECONDS: u32 = 7_200;

/// Adds CORS headers that let pages of `origin` read a response. They replace the provider's CORS headers, which
/// are about its own pages, but the headers that the provider exposes are still exposed.
pub fn insert_cors_headers(headers: &mut HeaderMap, origin: &HeaderValue) {
    let exposed = exposed_headers(headers);
    let provider_headers: Vec<HeaderName> =
        headers.keys().filter(|name| name.as_str().starts_with("access-control-")).cloned().collect();
    for name in provider_headers {
        headers.remove(name);
    }
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
    headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, exposed);
    headers.append(header::VARY, HeaderValue::from_static("Origin"));
}

/// Returns the list of the headers that Keychoir or the provider exposes.
fn exposed_headers(headers: &HeaderMap) -> HeaderValue {
    let mut exposed = EXPOSED_HEADERS.to_owned();
    let provider_headers = headers.get_all(header::ACCESS_CONTROL_EXPOSE_HEADERS).iter();
    for name in provider_headers
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
    {
        let is_new = |exposed: &str| exposed.split(", ").all(|listed| !listed.eq_ignore_ascii_case(name));
        if !name.is_empty() && exposed.len() + name.len() <= MAX_EXPOSED_LENGTH && is_new(&exposed) {
            exposed.push_str(", ");
            exposed.push_str(name);
        }
    }
    HeaderValue::try_from(exposed).unwrap_or(HeaderValue::from_static(EXPOSED_HEADERS))
}

/// Returns the response to a CORS preflight, which permits the requested method and headers.
#[must_use]
pub fn preflight_response(request: &HeaderMap, origin: &HeaderValue) -> (StatusCode, HeaderMap) {
    let mut headers = HeaderMap::new();
    insert_cors_headers(&mut headers, origin);
    headers.remove(header::ACCESS_CONTROL_EXPOSE_HEADERS);
    for (requested, allowed) in [
        (header::ACCESS_CONTROL_REQUEST_METHOD, header::ACCESS_CONTROL_ALLOW_METHODS),
        (header::ACCESS_CONTROL_REQUEST_HEADERS, header::ACCESS_CONTROL_ALLOW_HEADERS),
    ] {
        if let Some(value) = request.get(requested) {
            headers.insert(allowed, value.clone());
        }
    }
    // Browsers request a separate permission for addresses outside the public network.
    if request.contains_key("access-control-request-private-network") {
        headers.insert("access-control-allow-private-network", HeaderValue::from_static("true"));
    }
    headers.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from(MAX_AGE_SECONDS));
    (StatusCode::NO_CONTENT, headers)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules() -> AccessRules {
        AccessRules { hosts: vec!["keys.home".to_owned()], origins: vec!["https://app.example".to_owned()] }
    }

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, value.parse().unwrap());
        }
        headers
    }

    #[track_caller]
    fn check_request(
        pairs: &[(&'static str, &'static str)],
        expected: Result<RequestOrigin, OriginRejected>,
    ) {
        assert_eq!(check_origin(&rules(), false, &Method::POST, &headers(pairs)), expected);
    }

    #[test]
    fn requests_of_programs_are_accepted() {
        check_request(&[("host", "localhost:11011")], Ok(RequestOrigin::Direct));
        check_request(&[("host", "127.0.0.1:11011"), ("sec-fetch-site", "none")], Ok(RequestOrigin::Direct));
        check_request(&[], Ok(RequestOrigin::Direct));
    }

    #[test]
    fn an_unlisted_host_name_is_rejected() {
        for host in ["localhost", "a.localhost:1", "[::1]:11011", "192.168.1.5", "KEYS.home:80"] {
            check_request(&[("host", host)], Ok(RequestOrigin::Direct));
        }
        for host in [
            "evil.example",
            "evil.example:11011",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "",
            ".",
            "keychoir.",
            "keychoir:11011",
            "router",
            "localhost.",
            "host.docker.internal:11011",
            "keys.home.evil",
        ] {
            check_request(&[("host", host)], Err(OriginRejected::Host));
        }
    }

    #[test]
    fn any_host_is_accepted_if_tokens_are_configured() {
        let origin =
            check_origin(&rules(), true, &Method::POST, &headers(&[("host", "keychoir.home:11011")]));
        assert_eq!(origin, Ok(RequestOrigin::Direct));
        let any_host = AccessRules { hosts: vec!["*".to_owned()], ..rules() };
        assert_eq!(
            check_origin(&any_host, false, &Method::GET, &headers(&[("host", "any.example")])),
            Ok(RequestOrigin::Direct)
        );
    }

    #[test]
    fn pages_of_listed_origins_and_of_keychoir_are_accepted() {
        let page = RequestOrigin::Page("https://app.example".parse().unwrap());
        check_request(
            &[("host", "localhost"), ("origin", "https://app.example"), ("sec-fetch-site", "cross-site")],
            Ok(page),
        );
        check_request(
            &[("host", "localhost:11011"), ("origin", "http://localhost:11011")],
            Ok(RequestOrigin::Direct),
        );
    }

    #[test]
    fn other_pages_are_rejected() {
        for origin in [
            "https://evil.example",
            "null",
            "",
            "http://app.example",
            "https://app.example.evil",
            "http://localhost:3000",
        ] {
            check_request(&[("host", "localhost:11011"), ("origin", origin)], Err(OriginRejected::Origin));
        }
        let own = ("origin", "http://localhost:11011");
        check_request(
            &[("host", "localhost:11011"), own, ("origin", "https://evil.example")],
            Err(OriginRejected::Origin),
        );
        check_request(&[("host", "localhost:11011"), own, own], Err(OriginRejected::Origin));
        for site in ["cross-site", "same-site", "Same-Site", "what-comes-next", ""] {
            let page = |referer| [("host", "localhost"), ("sec-fetch-site", site), ("referer", referer)];
            check_request(&page("")[..2], Err(OriginRejected::Origin));
            for other in ["http://localhost:3000/", "https://app.example.evil/", "https://app.examplex", ""] {
                check_request(&page(other), Err(OriginRejected::Origin));
            }
            check_request(&page("https://app.example/player?a=1"), Ok(RequestOrigin::Direct));
            check_request(&page("https://App.example"), Ok(RequestOrigin::Direct));
        }
        check_request(&[("host", "localhost"), ("sec-fetch-site", "same-origin")], Ok(RequestOrigin::Direct));
    }

    #[test]
    fn a_preflight_gets_its_requested_permissions() {
        let request = headers(&[
            ("host", "localhost"),
            ("origin", "https://app.example"),
            ("access-control-request-method", "POST"),
            ("access-control-request-headers", "xi-api-key,content-type"),
            ("access-control-request-private-network", "true"),
        ]);
        let origin: HeaderValue = "https://app.example".parse().unwrap();
        assert_eq!(
            check_origin(&rules(), false, &Method::OPTIONS, &request),
            Ok(RequestOrigin::Preflight(origin.clone()))
        );
        let (status, response) = preflight_response(&request, &origin);
        assert_eq!(status, 204);
        assert_eq!(
            response,
            headers(&[
                ("access-control-allow-origin", "https://app.example"),
                ("access-control-allow-methods", "POST"),
                ("access-control-allow-headers", "xi-api-key,content-type"),
                ("access-control-allow-private-network", "true"),
                ("access-control-max-age", "7200"),
                ("vary", "Origin"),
            ])
        );
    }

    #[test]
    fn only_pages_of_the_listed_origin_may_read_a_response() {
        let mut response = headers(&[
            ("access-control-allow-origin", "*"),
            ("access-control-allow-credentials", "true"),
            ("vary", "Accept-Language"),
        ]);
        insert_cors_headers(&mut response, &"https://app.example".parse().unwrap());
        assert_eq!(response["access-control-allow-origin"], "https://app.example");
        assert!(!response.contains_key("access-control-allow-credentials"));
        assert_eq!(response.get_all("vary").iter().collect::<Vec<_>>(), ["Accept-Language", "Origin"]);
        assert_eq!(response["access-control-expose-headers"], EXPOSED_HEADERS);
    }

    #[test]
    fn headers_that_the_provider_exposes_stay_exposed() {
        let mut response = headers(&[
            ("access-control-expose-headers", "X-Region, Request-Id"),
            ("access-control-expose-headers", "current-concurrent-requests,, x-region"),
        ]);
        response.append("access-control-expose-headers", HeaderValue::try_from("x".repeat(5_000)).unwrap());
        insert_cors_headers(&mut response, &"https://app.example".parse().unwrap());
        let lists: Vec<_> = response.get_all("access-control-expose-headers").iter().collect();
        assert_eq!(lists, [&format!("{EXPOSED_HEADERS}, X-Region, current-concurrent-requests")]);
    }
}

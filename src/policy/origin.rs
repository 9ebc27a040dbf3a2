//! Decides which web pages may send requests to the proxy. Listening on loopback is no protection: any
//! page in a browser on this machine can send requests here, and a name that resolves to this machine can
//! make a page same-origin (DNS rebinding).
//!
//! Requests without a browser's headers, from SDKs and scripts, are not restricted.

use core::net::IpAddr;
use std::borrow::Cow;

use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Method, StatusCode};

/// The hosts and origins that are accepted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AccessRules {
    /// Names in a `Host` header that are accepted, lower case; `*` for any.
    pub hosts: Vec<String>,
    /// Origins whose pages may read responses, such as `https://app.example`, lower case.
    pub origins: Vec<String>,
}

/// The origin of an accepted request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RequestOrigin {
    /// A program, or a page of the proxy itself.
    Direct,
    /// A page of a listed origin.
    Page(HeaderValue),
    /// A CORS preflight of a browser for such a page.
    Preflight(HeaderValue),
}

/// Why a request is rejected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OriginRejected {
    /// Its `Host` is not accepted.
    #[error("the request's Host is a name that is not listed")]
    Host,
    /// It was sent by a page whose origin is not listed.
    #[error("a web page of an origin that is not listed sent the request")]
    Origin,
}

/// Checks host and origin of a request. `requires_token` says whether clients need a token: a page that
/// reaches the proxy by DNS rebinding has none, so the host is checked only where tokens are not needed.
///
/// # Errors
///
/// When the host is not accepted, or the page's origin is not listed.
pub fn admit(
    rules: &AccessRules,
    requires_token: bool,
    method: &Method,
    headers: &HeaderMap,
) -> Result<RequestOrigin, OriginRejected> {
    let text = |name: HeaderName| headers.get(name).map(|value| lowercase(value.to_str().unwrap_or("")));
    if !requires_token && !text(header::HOST).is_none_or(|host| is_accepted_host(rules, &host)) {
        return Err(OriginRejected::Host);
    }
    let mut origins = headers.get_all(header::ORIGIN).iter();
    let (origin, is_doubled) = (origins.next(), origins.next().is_some());
    // A browser sends one `Origin`. Of two, this check and a later reader could use different ones.
    if is_doubled {
        return Err(OriginRejected::Origin);
    }
    let Some(origin) = origin else {
        // A request for an image or a link has no `Origin`, but `Sec-Fetch-Site` says that it comes from
        // another site, or from another port or name of this one. Only `Referer` may name its page.
        let is_cross_origin =
            text(SEC_FETCH_SITE).is_some_and(|site| site != "same-origin" && site != "none");
        let is_listed = || text(header::REFERER).is_some_and(|page| is_page_of(&rules.origins, &page));
        return if is_cross_origin && !is_listed() {
            Err(OriginRejected::Origin)
        } else {
            Ok(RequestOrigin::Direct)
        };
    };
    let origin_text = text(header::ORIGIN).unwrap_or_default();
    let is_own = origin_text
        .strip_prefix("http://")
        .or_else(|| origin_text.strip_prefix("https://"))
        .is_some_and(|host| Some(host) == text(header::HOST).as_deref());
    if is_own {
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

const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

fn lowercase(text: &str) -> Cow<'_, str> {
    let has_upper = text.bytes().any(|byte| byte.is_ascii_uppercase());
    if has_upper { Cow::Owned(text.to_ascii_lowercase()) } else { Cow::Borrowed(text) }
}

/// Whether the address of a page begins with one of the origins.
fn is_page_of(origins: &[String], page: &str) -> bool {
    let begins_with = |origin: &String| {
        page.strip_prefix(origin.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    origins.iter().any(begins_with)
}

/// Whether a host is listed, or is accepted without being listed. A public name can be made to resolve to
/// this machine by its owner, and a name without a dot by the owner of the local network. An IP address
/// cannot, and `localhost` with all names below it is this machine (RFC 6761, section 6.3).
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

/// Response headers that a page needs to read: identifiers of the request, and its cost.
const EXPOSED: &str =
    "request-id, history-item-id, song-id, character-cost, x-request-id, x-keychoir-error, retry-after";

/// Longer than any list of the provider, and short enough for a fast search for duplicates.
const EXPOSED_BYTES_MAX: usize = 2 * 1024;

/// `Access-Control-Max-Age` in seconds: two hours, the maximum of any browser.
const PREFLIGHT_MAX_AGE_S: u32 = 7_200;

/// Makes a response readable for a page of `origin`. CORS headers of the provider are about its own
/// origin and are replaced; headers that it exposes stay exposed.
pub fn open(headers: &mut HeaderMap, origin: &HeaderValue) {
    let exposed = exposed(headers);
    let provider_headers: Vec<HeaderName> =
        headers.keys().filter(|name| name.as_str().starts_with("access-control-")).cloned().collect();
    for name in provider_headers {
        headers.remove(name);
    }
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
    headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, exposed);
    headers.append(header::VARY, HeaderValue::from_static("Origin"));
}

/// The headers that this proxy exposes, and those that the provider exposes.
fn exposed(headers: &HeaderMap) -> HeaderValue {
    let mut all = EXPOSED.to_owned();
    let provider_headers = headers.get_all(header::ACCESS_CONTROL_EXPOSE_HEADERS).iter();
    for name in provider_headers
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
    {
        let is_new = |all: &str| all.split(", ").all(|known| !known.eq_ignore_ascii_case(name));
        if !name.is_empty() && all.len() + name.len() <= EXPOSED_BYTES_MAX && is_new(&all) {
            all.push_str(", ");
            all.push_str(name);
        }
    }
    HeaderValue::try_from(all).unwrap_or(HeaderValue::from_static(EXPOSED))
}

/// The response to a CORS preflight, which permits the requested method and headers.
#[must_use]
pub fn permit(request: &HeaderMap, origin: &HeaderValue) -> (StatusCode, HeaderMap) {
    let mut headers = HeaderMap::new();
    open(&mut headers, origin);
    headers.remove(header::ACCESS_CONTROL_EXPOSE_HEADERS);
    for (requested, allowed) in [
        (header::ACCESS_CONTROL_REQUEST_METHOD, header::ACCESS_CONTROL_ALLOW_METHODS),
        (header::ACCESS_CONTROL_REQUEST_HEADERS, header::ACCESS_CONTROL_ALLOW_HEADERS),
    ] {
        if let Some(value) = request.get(requested) {
            headers.insert(allowed, value.clone());
        }
    }
    // Browsers request this permission separately for addresses outside the public network.
    if request.contains_key("access-control-request-private-network") {
        headers.insert("access-control-allow-private-network", HeaderValue::from_static("true"));
    }
    headers.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from(PREFLIGHT_MAX_AGE_S));
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
    fn check(pairs: &[(&'static str, &'static str)], expected: Result<RequestOrigin, OriginRejected>) {
        assert_eq!(admit(&rules(), false, &Method::POST, &headers(pairs)), expected);
    }

    #[test]
    fn requests_of_programs_are_accepted() {
        check(&[("host", "localhost:11011")], Ok(RequestOrigin::Direct));
        check(&[("host", "127.0.0.1:11011"), ("sec-fetch-site", "none")], Ok(RequestOrigin::Direct));
        check(&[], Ok(RequestOrigin::Direct));
    }

    #[test]
    fn a_foreign_host_name_is_refused() {
        for host in ["localhost", "a.localhost:1", "[::1]:11011", "192.168.1.5", "KEYS.home:80"] {
            check(&[("host", host)], Ok(RequestOrigin::Direct));
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
            check(&[("host", host)], Err(OriginRejected::Host));
        }
    }

    #[test]
    fn any_host_is_accepted_where_tokens_are_needed() {
        let origin = admit(&rules(), true, &Method::POST, &headers(&[("host", "keychoir.home:11011")]));
        assert_eq!(origin, Ok(RequestOrigin::Direct));
        let any = AccessRules { hosts: vec!["*".to_owned()], ..rules() };
        assert_eq!(
            admit(&any, false, &Method::GET, &headers(&[("host", "any.example")])),
            Ok(RequestOrigin::Direct)
        );
    }

    #[test]
    fn listed_and_own_pages_are_accepted() {
        let page = RequestOrigin::Page("https://app.example".parse().unwrap());
        check(
            &[("host", "localhost"), ("origin", "https://app.example"), ("sec-fetch-site", "cross-site")],
            Ok(page),
        );
        check(
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
            check(&[("host", "localhost:11011"), ("origin", origin)], Err(OriginRejected::Origin));
        }
        let own = ("origin", "http://localhost:11011");
        check(
            &[("host", "localhost:11011"), own, ("origin", "https://evil.example")],
            Err(OriginRejected::Origin),
        );
        check(&[("host", "localhost:11011"), own, own], Err(OriginRejected::Origin));
        for site in ["cross-site", "same-site", "Same-Site", "what-comes-next", ""] {
            let page = |referer| [("host", "localhost"), ("sec-fetch-site", site), ("referer", referer)];
            check(&page("")[..2], Err(OriginRejected::Origin));
            for other in ["http://localhost:3000/", "https://app.example.evil/", "https://app.examplex", ""] {
                check(&page(other), Err(OriginRejected::Origin));
            }
            check(&page("https://app.example/player?a=1"), Ok(RequestOrigin::Direct));
            check(&page("https://App.example"), Ok(RequestOrigin::Direct));
        }
        check(&[("host", "localhost"), ("sec-fetch-site", "same-origin")], Ok(RequestOrigin::Direct));
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
            admit(&rules(), false, &Method::OPTIONS, &request),
            Ok(RequestOrigin::Preflight(origin.clone()))
        );
        let (status, response) = permit(&request, &origin);
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
    fn a_response_is_readable_for_one_origin() {
        let mut response = headers(&[
            ("access-control-allow-origin", "*"),
            ("access-control-allow-credentials", "true"),
            ("vary", "Accept-Language"),
        ]);
        open(&mut response, &"https://app.example".parse().unwrap());
        assert_eq!(response["access-control-allow-origin"], "https://app.example");
        assert!(!response.contains_key("access-control-allow-credentials"));
        assert_eq!(response.get_all("vary").iter().collect::<Vec<_>>(), ["Accept-Language", "Origin"]);
        assert_eq!(response["access-control-expose-headers"], EXPOSED);
    }

    #[test]
    fn headers_that_the_provider_exposes_stay_exposed() {
        let mut response = headers(&[
            ("access-control-expose-headers", "X-Region, Request-Id"),
            ("access-control-expose-headers", "current-concurrent-requests,, x-region"),
        ]);
        response.append("access-control-expose-headers", HeaderValue::try_from("x".repeat(5_000)).unwrap());
        open(&mut response, &"https://app.example".parse().unwrap());
        let lists: Vec<_> = response.get_all("access-control-expose-headers").iter().collect();
        assert_eq!(lists, [&format!("{EXPOSED}, X-Region, current-concurrent-requests")]);
    }
}

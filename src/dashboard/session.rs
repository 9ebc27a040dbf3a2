//! Reads and sets the cookie with the token of a session, decides whether a page of this Keychoir sent a form, and
//! whether the browser uses HTTPS.
//!
//! A browser sends cookies to all ports of a host. The name of the cookie therefore contains the port, so that two
//! Keychoir processes on one machine do not replace each other's cookie. A form is accepted only from a page with the
//! host and port of this Keychoir. The cookie's attribute `SameSite` is not enough, because it treats all ports of a
//! host as the same site.

use std::time::Duration;

use http::header::{COOKIE, HOST, HeaderMap, HeaderName, HeaderValue, ORIGIN, SET_COOKIE};
use http::{Response, StatusCode};

use super::response::redirect;
use crate::admin::{ApiBody, DashboardSecret};

const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// Returns the token of the session in the cookie of this Keychoir.
pub(super) fn find_token(headers: &HeaderMap) -> Option<&str> {
    let name = cookie_name(headers);
    let cookies = headers.get_all(COOKIE).iter().filter_map(|value| value.to_str().ok());
    let mut cookies = cookies.flat_map(|value| value.split(';')).map(str::trim);
    cookies.find_map(|cookie| cookie.strip_prefix(&*name)?.strip_prefix('='))
}

/// Returns whether a page of this Keychoir sent a form. A browser sends the origin of the page in `Origin`, and its
/// relation to the requested origin in `Sec-Fetch-Site`. At least one of the headers must exist, and each of them that
/// exists must match.
pub(super) fn is_same_origin(headers: &HeaderMap) -> bool {
    let origin = headers.get(ORIGIN).and_then(|origin| origin.to_str().ok());
    let host = headers.get(HOST).and_then(|host| host.to_str().ok());
    let is_own_origin = origin
        .and_then(|origin| origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://")))
        .is_some_and(|origin| host.is_some_and(|host| origin.eq_ignore_ascii_case(host)));
    let site = headers.get(SEC_FETCH_SITE).map(HeaderValue::as_bytes);
    match (origin, site) {
        (Some(_), Some(site)) => is_own_origin && site == b"same-origin",
        (Some(_), None) => is_own_origin,
        (None, Some(site)) => site == b"same-origin",
        (None, None) => false,
    }
}

/// Returns whether the browser uses HTTPS: the origin of its form begins with `https`, or a proxy that ends TLS in
/// front of Keychoir has set `X-Forwarded-Proto` to `https`.
pub(super) fn is_https(headers: &HeaderMap) -> bool {
    let origin = headers.get(ORIGIN).map(HeaderValue::as_bytes);
    let forwarded = headers.get("x-forwarded-proto").map(HeaderValue::as_bytes);
    origin.is_some_and(|origin| origin.starts_with(b"https://")) || forwarded == Some(b"https")
}

/// Returns a response that sets the cookie of a new session and redirects to the overview.
pub(super) fn sign_in(headers: &HeaderMap, token: &DashboardSecret, max_age: Duration) -> Response<ApiBody> {
    set_cookie(headers, token.expose(), max_age)
}

/// Returns a response that removes the cookie and redirects to the login page.
pub(super) fn sign_out(headers: &HeaderMap) -> Response<ApiBody> {
    set_cookie(headers, "", Duration::ZERO)
}

/// Returns a response that sets the cookie, and redirects to the overview, or to the login page if `value` is empty.
fn set_cookie(headers: &HeaderMap, value: &str, max_age: Duration) -> Response<ApiBody> {
    let (name, seconds) = (cookie_name(headers), max_age.as_secs());
    let secure = if is_https(headers) { "; Secure" } else { "" };
    let cookie = format!("{name}={value}; Path=/; Max-Age={seconds}; HttpOnly; SameSite=Strict{secure}");
    // A browser sends a `SameSite=Strict` cookie after this redirect, because a page of Keychoir has sent the form.
    let location = if value.is_empty() { "login" } else { "./" };
    let mut response = redirect(StatusCode::SEE_OTHER, location);
    if let Ok(cookie) = HeaderValue::from_str(&cookie) {
        response.headers_mut().insert(SET_COOKIE, cookie);
    }
    response
}

/// Returns the name of the cookie, with the port in the address that the browser uses.
fn cookie_name(headers: &HeaderMap) -> String {
    let host = headers.get(HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    let port = host.rsplit_once(':').map(|(_, port)| port);
    match port.filter(|port| !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit())) {
        Some(port) => format!("keychoir_session_{port}"),
        None => "keychoir_session".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(headers: &[(&'static str, &'static str)]) -> HeaderMap {
        headers
            .iter()
            .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)))
            .collect()
    }

    #[track_caller]
    fn check_form(sent: &[(&'static str, &'static str)], is_accepted: bool) {
        let mut sent = sent.to_vec();
        sent.push(("host", "localhost:11011"));
        assert_eq!(
            is_same_origin(&headers(&sent)),
            is_accepted,
            "a form must be accepted only from the same origin: {sent:?}"
        );
    }

    #[test]
    fn only_forms_of_the_same_origin_are_accepted() {
        const OWN: (&str, &str) = ("origin", "http://localhost:11011");
        const SAME: (&str, &str) = ("sec-fetch-site", "same-origin");
        check_form(&[OWN, SAME], true);
        check_form(&[OWN], true);
        check_form(&[SAME], true);
        check_form(&[("origin", "https://LOCALHOST:11011")], true);
        check_form(&[], false);
        for origin in ["http://localhost:8080", "http://localhost", "http://127.0.0.1:11011", "null", ""] {
            check_form(&[("origin", origin)], false);
            check_form(&[("origin", origin), SAME], false);
        }
        for site in ["same-site", "cross-site", "none"] {
            check_form(&[OWN, ("sec-fetch-site", site)], false);
            check_form(&[("sec-fetch-site", site)], false);
        }
    }

    #[test]
    fn the_cookie_of_this_port_is_read() {
        let cookies = "a=1; keychoir_session_80=other; keychoir_session_11011=token";
        assert_eq!(find_token(&headers(&[("host", "localhost:11011"), ("cookie", cookies)])), Some("token"));
        assert_eq!(find_token(&headers(&[("host", "[::1]:80"), ("cookie", cookies)])), Some("other"));
        assert_eq!(find_token(&headers(&[("host", "keys.example"), ("cookie", cookies)])), None);
        assert_eq!(find_token(&headers(&[("host", "[::1]"), ("cookie", "keychoir_session=x")])), Some("x"));
    }

    #[test]
    fn the_cookie_is_for_this_site_only_and_hidden_from_scripts() {
        let cookie = |sent: &[_]| {
            let response = set_cookie(&headers(sent), "kcs_1", Duration::from_secs(60));
            response.headers()[SET_COOKIE].to_str().unwrap().to_owned()
        };
        let plain = cookie(&[("host", "localhost:11011"), ("origin", "http://localhost:11011")]);
        assert_eq!(plain, "keychoir_session_11011=kcs_1; Path=/; Max-Age=60; HttpOnly; SameSite=Strict");
        let secure = cookie(&[("host", "keys.example"), ("origin", "https://keys.example")]);
        assert!(secure.ends_with("; Secure"), "{secure} must be restricted to HTTPS");
    }
}

//! Builds the responses of the dashboard, and sets the headers by which browsers protect its pages.

use bytes::Bytes;
use http::header::{
    ALLOW, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue,
    LOCATION, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use http::{Response, StatusCode};
use maud::Markup;

use crate::admin::ApiBody;

/// The Content-Security-Policy. It forbids inline scripts and styles, files of other hosts, a frame around a page, and
/// DOM functions that run a text as a script or parse it as HTML.
const CONTENT_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
                      img-src 'self' data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'; \
                      require-trusted-types-for 'script'";

/// Sets the headers that protect every response of the dashboard.
pub(super) fn set_security_headers(headers: &mut HeaderMap) {
    headers.entry(CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    headers.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(CONTENT_POLICY));
    // With the policy `no-referrer`, a browser would send `Origin: null` with forms, which `session.rs` refuses.
    headers.insert(REFERRER_POLICY, HeaderValue::from_static("same-origin"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    for name in ["cross-origin-opener-policy", "cross-origin-resource-policy"] {
        headers.insert(HeaderName::from_static(name), HeaderValue::from_static("same-origin"));
    }
}

/// Returns a response with an HTML page.
pub(super) fn html(status: StatusCode, page: &Markup) -> Response<ApiBody> {
    with_content_type(status, "text/html; charset=utf-8", page.0.clone())
}

/// Returns a response with plain text.
pub(super) fn text(status: StatusCode, message: impl Into<Bytes>) -> Response<ApiBody> {
    with_content_type(status, "text/plain; charset=utf-8", message)
}

/// Returns a response with content of any type.
pub(super) fn with_content_type(
    status: StatusCode,
    content_type: &'static str,
    content: impl Into<Bytes>,
) -> Response<ApiBody> {
    let mut response = Response::new(ApiBody::document(content));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

/// Returns a response with status 405 and the permitted methods.
pub(super) fn method_not_allowed(methods: &'static str) -> Response<ApiBody> {
    let mut response = text(StatusCode::METHOD_NOT_ALLOWED, format!("This path accepts only {methods}.\n"));
    response.headers_mut().insert(ALLOW, HeaderValue::from_static(methods));
    response
}

/// Returns a redirect to a location that is relative to the requested path. The `Location` header is left out if
/// `location` is not a valid header value.
pub(super) fn redirect(status: StatusCode, location: &str) -> Response<ApiBody> {
    let mut response = text(status, "");
    if let Ok(location) = HeaderValue::from_str(location) {
        response.headers_mut().insert(LOCATION, location);
    }
    response
}

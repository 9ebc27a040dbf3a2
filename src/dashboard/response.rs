//! The responses of the dashboard and their headers.

use bytes::Bytes;
use http::header::{
    ALLOW, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue,
    LOCATION, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use http::{Response, StatusCode};
use maud::Markup;

use crate::admin::ApiBody;

/// No inline script or style, nothing of other hosts, and no text that becomes a script.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
                      img-src 'self' data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'; \
                      require-trusted-types-for 'script'";

/// Sets the headers that every response of the dashboard has.
pub(super) fn secure(headers: &mut HeaderMap) {
    headers.entry(CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    headers.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
    // With `no-referrer`, a browser would send `Origin: null` with the forms of this page.
    headers.insert(REFERRER_POLICY, HeaderValue::from_static("same-origin"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    for name in ["cross-origin-opener-policy", "cross-origin-resource-policy"] {
        headers.insert(HeaderName::from_static(name), HeaderValue::from_static("same-origin"));
    }
}

pub(super) fn html(status: StatusCode, page: &Markup) -> Response<ApiBody> {
    with_type(status, "text/html; charset=utf-8", page.0.clone())
}

pub(super) fn text(status: StatusCode, message: impl Into<Bytes>) -> Response<ApiBody> {
    with_type(status, "text/plain; charset=utf-8", message)
}

pub(super) fn with_type(
    status: StatusCode,
    content_type: &'static str,
    content: impl Into<Bytes>,
) -> Response<ApiBody> {
    let mut response = Response::new(ApiBody::document(content));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

pub(super) fn method_not_allowed(methods: &'static str) -> Response<ApiBody> {
    let mut response =
        text(StatusCode::METHOD_NOT_ALLOWED, format!("This path has the methods {methods}.\n"));
    response.headers_mut().insert(ALLOW, HeaderValue::from_static(methods));
    response
}

/// Redirects to a path relative to the requested one.
pub(super) fn found_elsewhere(status: StatusCode, location: &str) -> Response<ApiBody> {
    let mut response = text(status, "");
    if let Ok(location) = HeaderValue::from_str(location) {
        response.headers_mut().insert(LOCATION, location);
    }
    response
}

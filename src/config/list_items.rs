//! Parses the items of settings that are lists: host names, origins, public pages, base URLs and header names.

use http::HeaderName;

use super::admin::PUBLIC_PAGES;
use super::base_url::BaseUrl;
use super::mask::quote_masked;
use super::problem::ValueError;
use crate::policy::headers::unforwardable_reason;

/// Parses a host name without a port, or `*` for any host.
pub(super) fn parse_host(text: &str) -> Result<String, ValueError> {
    let name = text.trim().to_ascii_lowercase();
    let is_name =
        !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte));
    if is_name || name == "*" {
        return Ok(name);
    }
    Err(ValueError::new(format!("{} is not a valid host name", quote_masked(text)))
        .advise("write only the name, for example keys.example.com, or * for any host"))
}

/// Parses an origin as browsers send it: the scheme, the host, and a port other than the default.
pub(super) fn parse_origin(text: &str) -> Result<String, ValueError> {
    let origin = text.trim().to_ascii_lowercase();
    let host_and_port = origin.strip_prefix("https://").or_else(|| origin.strip_prefix("http://"));
    let is_host_and_port = |host_and_port: &str| {
        !host_and_port.is_empty()
            && host_and_port.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._:[]".contains(&byte))
    };
    if host_and_port.is_some_and(is_host_and_port) {
        return Ok(origin);
    }
    Err(ValueError::new(format!("{} is not a valid origin", quote_masked(text)))
        .advise("write the scheme and host without a path, for example https://app.example.com"))
}

/// Parses the name of a page that can be public.
pub(super) fn parse_public_page(text: &str) -> Result<String, ValueError> {
    let name = text.trim();
    if PUBLIC_PAGES.contains(&name) {
        return Ok(name.to_owned());
    }
    Err(ValueError::unknown_name("page", name, &PUBLIC_PAGES))
}

/// Parses a base URL of the provider, and returns its text.
pub(super) fn parse_base_url(text: &str) -> Result<String, ValueError> {
    text.trim().parse::<BaseUrl>().map(|_| text.trim().to_owned())
}

/// Parses the name of a header to forward to the provider.
pub(super) fn parse_header_name(text: &str) -> Result<String, ValueError> {
    let name = HeaderName::try_from(text.trim()).ok().filter(|name| !name.as_str().contains('*'));
    let Some(name) = name else {
        return Err(ValueError::new(format!("{} is not a valid header name", quote_masked(text)))
            .advise("write only the name, for example X-Forwarded-For"));
    };
    match unforwardable_reason(&name) {
        None => Ok(name.as_str().to_owned()),
        Some(reason) => Err(ValueError::new(format!("`{name}` is never forwarded: it {reason}"))
            .advise("remove it from access.forward_headers")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_has_no_port() {
        assert_eq!(parse_host(" Keys.Example.com ").unwrap(), "keys.example.com");
        assert_eq!(parse_host("*").unwrap(), "*");
        for text in ["", "https://keys.example.com", "keys.example.com:80", "a b", "*.example.com"] {
            assert!(parse_host(text).is_err(), "the host {text:?} must be refused");
        }
    }

    #[test]
    fn an_origin_has_a_scheme_and_no_path() {
        assert_eq!(parse_origin("HTTPS://App.example.com").unwrap(), "https://app.example.com");
        assert_eq!(parse_origin("http://localhost:3000").unwrap(), "http://localhost:3000");
        for text in ["", "app.example.com", "https://app.example.com/", "https://", "null", "*", "ftp://a"] {
            assert!(parse_origin(text).is_err(), "the origin {text:?} must be refused");
        }
    }

    #[test]
    fn an_invalid_header_and_a_header_for_credentials_or_for_one_connection_are_refused() {
        assert_eq!(parse_header_name(" X-Forwarded-For ").unwrap(), "x-forwarded-for");
        assert_eq!(parse_header_name("cf-ipcountry").unwrap(), "cf-ipcountry");
        for text in ["", "x y", "cf-*", "x:", "Cookie", "authorization", "connection", "Host", "xi-api-key"] {
            assert!(parse_header_name(text).is_err(), "the header {text:?} must be refused");
        }
    }
}

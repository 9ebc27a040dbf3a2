//! Parses the accepted `Host` names, the allowed origins of web pages, and the headers to forward.

use http::HeaderName;

use super::base_url::BaseUrl;
use super::mask::shown;
use super::problem::WrongValue;
use crate::policy::headers::why_not_forwarded;

/// Parses a host name without a port, or `*` for any host.
pub(super) fn host(text: &str) -> Result<String, WrongValue> {
    let name = text.trim().to_ascii_lowercase();
    let is_name =
        !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte));
    if is_name || name == "*" {
        return Ok(name);
    }
    Err(WrongValue::new(format!("{} is not a valid host name", shown(text)))
        .advise("write the name alone, for example keys.example.com, or * for any"))
}

/// Parses an origin as browsers send it: scheme, host, and the port if it is not the default.
pub(super) fn origin(text: &str) -> Result<String, WrongValue> {
    let origin = text.trim().to_ascii_lowercase();
    let host_and_port = origin.strip_prefix("https://").or_else(|| origin.strip_prefix("http://"));
    let is_host_and_port = |host_and_port: &str| {
        !host_and_port.is_empty()
            && host_and_port.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._:[]".contains(&byte))
    };
    if host_and_port.is_some_and(is_host_and_port) {
        return Ok(origin);
    }
    Err(WrongValue::new(format!("{} is not a valid origin", shown(text)))
        .advise("write scheme and host, without a path, for example https://app.example.com"))
}

/// Parses a base URL of the provider.
pub(super) fn base_url(text: &str) -> Result<String, WrongValue> {
    text.trim().parse::<BaseUrl>().map(|_| text.trim().to_owned())
}

/// Parses the name of a header to forward to the provider.
pub(super) fn header(text: &str) -> Result<String, WrongValue> {
    let name = HeaderName::try_from(text.trim()).ok().filter(|name| !name.as_str().contains('*'));
    let Some(name) = name else {
        return Err(WrongValue::new(format!("{} is not a valid header name", shown(text)))
            .advise("write the name alone, for example X-Forwarded-For"));
    };
    match why_not_forwarded(&name) {
        None => Ok(name.as_str().to_owned()),
        Some(reason) => Err(WrongValue::new(format!("`{name}` is never forwarded: it {reason}"))
            .advise("remove it from access.forward_headers")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_has_no_port() {
        assert_eq!(host(" Keys.Example.com ").unwrap(), "keys.example.com");
        assert_eq!(host("*").unwrap(), "*");
        for text in ["", "https://keys.example.com", "keys.example.com:80", "a b", "*.example.com"] {
            assert!(host(text).is_err(), "{text}");
        }
    }

    #[test]
    fn an_origin_has_a_scheme_and_no_path() {
        assert_eq!(origin("HTTPS://App.example.com").unwrap(), "https://app.example.com");
        assert_eq!(origin("http://localhost:3000").unwrap(), "http://localhost:3000");
        for text in ["", "app.example.com", "https://app.example.com/", "https://", "null", "*", "ftp://a"] {
            assert!(origin(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_header_is_forwarded_unless_it_is_a_credential_or_of_one_connection() {
        assert_eq!(header(" X-Forwarded-For ").unwrap(), "x-forwarded-for");
        assert_eq!(header("cf-ipcountry").unwrap(), "cf-ipcountry");
        for text in ["", "x y", "cf-*", "x:", "Cookie", "authorization", "connection", "Host", "xi-api-key"] {
            assert!(header(text).is_err(), "{text}");
        }
    }
}

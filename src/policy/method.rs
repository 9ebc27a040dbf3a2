//! Limits the HTTP methods of clients. A client may send any token as a method, so usage records, logs and
//! metrics contain only known methods and `other`, and long methods are rejected.

use http::Method;

/// Maximum length of a method in bytes. A longer method is rejected. The longest method registered with IANA has
/// 17 bytes.
pub const MAX_METHOD_LENGTH: usize = 32;

/// Whether a method is short enough to be forwarded.
#[must_use]
pub fn has_allowed_length(method: &Method) -> bool {
    method.as_str().len() <= MAX_METHOD_LENGTH
}

/// Returns the method under which a request is recorded: the method itself if RFC 9110 or RFC 5789 defines
/// it, and `other` otherwise.
#[must_use]
pub fn recorded_method(method: &Method) -> Method {
    const KNOWN: [Method; 9] = [
        Method::GET,
        Method::POST,
        Method::PUT,
        Method::PATCH,
        Method::DELETE,
        Method::HEAD,
        Method::OPTIONS,
        Method::TRACE,
        Method::CONNECT,
    ];
    if KNOWN.contains(method) { method.clone() } else { Method::from_bytes(b"other").unwrap_or_default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_method_is_recorded_as_other() {
        for (method, expected) in [
            ("GET", "GET"),
            ("PATCH", "PATCH"),
            ("BREW", "other"),
            ("get", "other"),
            ("PROPFIND", "other"),
            (&*"A".repeat(30_000), "other"),
        ] {
            assert_eq!(recorded_method(&method.parse().unwrap()).as_str(), expected);
        }
    }

    #[test]
    fn a_long_method_is_rejected() {
        for (length, expected) in [(1, true), (32, true), (33, false), (30_000, false)] {
            assert_eq!(has_allowed_length(&"A".repeat(length).parse().unwrap()), expected);
        }
    }
}

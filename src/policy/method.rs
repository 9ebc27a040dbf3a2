//! The method under which a request is recorded. A client may send any token as a method, so usage
//! records, log and metrics have only known methods and `other`.

use http::Method;

/// Maximum length of a method; a longer one is refused. The longest one registered with IANA has 17
/// characters.
pub const MAX_METHOD_LENGTH: usize = 32;

/// Whether a method is short enough to be forwarded.
#[must_use]
pub fn has_allowed_length(method: &Method) -> bool {
    method.as_str().len() <= MAX_METHOD_LENGTH
}

/// The method under which a request is recorded: itself, if HTTP defines it (RFC 9110 and 5789), or
/// `other`.
#[must_use]
pub fn recorded(method: &Method) -> Method {
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
    match KNOWN.iter().find(|known| *known == method) {
        Some(known) => known.clone(),
        None => Method::from_bytes(b"other").unwrap_or_default(),
    }
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
            assert_eq!(recorded(&method.parse().unwrap()).as_str(), expected);
        }
    }

    #[test]
    fn a_method_has_a_maximum_length() {
        for (length, expected) in [(1, true), (32, true), (33, false), (30_000, false)] {
            assert_eq!(has_allowed_length(&"A".repeat(length).parse().unwrap()), expected);
        }
    }
}

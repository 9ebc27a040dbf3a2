//! Negotiates content encodings: reads `Content-Encoding`, and restricts `Accept-Encoding` to the encodings that
//! Keychoir can decode. In another encoding, a refusal could not be classified, and a key could not be redacted.

use std::borrow::Cow;

use http::header::{ACCEPT_ENCODING, CONTENT_ENCODING, HeaderMap, HeaderValue};

/// The encodings that `body::decode` supports.
const SUPPORTED: [&str; 4] = ["gzip", "x-gzip", "deflate", "identity"];

/// The encodings that replace `*`, which accepts any encoding.
const WILDCARD_REPLACEMENT: [&str; 2] = ["gzip", "deflate"];

/// Common values and their replacements, so that most requests need no parsing. Python's `httpx` and
/// `requests`, Node's `fetch` and browsers send these values.
const COMMON_VALUES: [(&str, &str); 4] = [
    ("gzip, deflate", "gzip, deflate"),
    ("gzip, deflate, br", "gzip, deflate"),
    ("gzip, deflate, br, zstd", "gzip, deflate"),
    ("gzip", "gzip"),
];

/// Returns the declared content encodings, or `None` if the header is missing. Several header lines form one list (RFC
/// 9110, section 5.3).
#[must_use]
pub fn content_encoding(headers: &HeaderMap) -> Option<Cow<'_, str>> {
    let mut lines =
        headers.get_all(CONTENT_ENCODING).iter().map(|value| value.to_str().unwrap_or("unreadable"));
    let first = lines.next()?;
    Some(lines.fold(Cow::Borrowed(first), |all, line| Cow::Owned(format!("{all}, {line}"))))
}

/// Removes the encodings that Keychoir cannot decode from `Accept-Encoding`. The remaining encodings keep their order
/// and weights, and `*` becomes gzip and deflate. If the client accepts only unsupported encodings, `identity` is
/// requested, which is acceptable unless the client excludes it (RFC 9110, section 12.5.3). A request without the
/// header is unchanged.
pub(super) fn restrict_accept_encoding(headers: &mut HeaderMap) {
    let mut lines = headers.get_all(ACCEPT_ENCODING).iter();
    if let (Some(only), None) = (lines.next(), lines.next())
        && let Some((requested, offered)) = COMMON_VALUES.iter().find(|(requested, _)| *only == *requested)
    {
        if requested != offered {
            headers.insert(ACCEPT_ENCODING, HeaderValue::from_static(offered));
        }
        return;
    }
    let values = headers.get_all(ACCEPT_ENCODING).iter().map(|value| value.to_str().unwrap_or(""));
    let requested: Vec<&str> = values.flat_map(|value| value.split(',')).map(str::trim).collect();
    let Some(offered) = supported_elements(&requested) else { return };
    let value = HeaderValue::try_from(offered).unwrap_or(HeaderValue::from_static("identity"));
    headers.insert(ACCEPT_ENCODING, value);
}

/// Returns the supported elements of a list, or `None` if all of them are supported.
fn supported_elements(requested: &[&str]) -> Option<String> {
    let is_supported = |element: &str| {
        SUPPORTED.iter().any(|supported| supported.eq_ignore_ascii_case(coding_name(element)))
    };
    if requested.iter().all(|element| is_supported(element)) {
        return None;
    }
    let mut offered: Vec<String> = Vec::new();
    for element in requested {
        match coding_name(element) {
            // `*;q=0` does not offer an encoding, but excludes the encodings that are not listed.
            "*" if is_excluded(element) => offered.push((*element).to_owned()),
            "*" => {
                let is_named = |coding: &str| {
                    requested.iter().any(|element| coding_name(element).eq_ignore_ascii_case(coding))
                };
                let weight = element.get(1..).unwrap_or_default();
                let replacements = WILDCARD_REPLACEMENT.iter().filter(|coding| !is_named(coding));
                offered.extend(replacements.map(|coding| format!("{coding}{weight}")));
            }
            _ if is_supported(element) => offered.push((*element).to_owned()),
            _ => {}
        }
    }
    let offers_any = offered.iter().any(|element| !is_excluded(element));
    Some(if offers_any { offered.join(", ") } else { "identity".to_owned() })
}

/// Returns the encoding of an element without its weight.
fn coding_name(element: &str) -> &str {
    element.split(';').next().unwrap_or_default().trim_end()
}

/// Whether the element has the weight 0, which excludes its encoding.
fn is_excluded(element: &str) -> bool {
    let mut parameters = element.split(';').skip(1).map(str::trim);
    parameters.any(|parameter| {
        let weight = parameter.strip_prefix("q=").or_else(|| parameter.strip_prefix("Q="));
        weight.and_then(|weight| weight.trim().parse::<f32>().ok()).is_some_and(|weight| weight <= 0.0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_offered(requested: &[&'static str], offered: &[&str]) {
        let mut headers = HeaderMap::new();
        for value in requested {
            headers.append(ACCEPT_ENCODING, HeaderValue::from_static(value));
        }
        restrict_accept_encoding(&mut headers);
        let values: Vec<_> = headers.get_all(ACCEPT_ENCODING).iter().collect();
        assert_eq!(values, offered, "only supported encodings of {requested:?} must be offered");
    }

    #[test]
    fn only_supported_encodings_are_offered() {
        check_offered(&["gzip, deflate, br"], &["gzip, deflate"]);
        check_offered(&["gzip, deflate, br, zstd"], &["gzip, deflate"]);
        check_offered(&["br;q=1.0, gzip;q=0.8, *;q=0.1"], &["gzip;q=0.8, deflate;q=0.1"]);
        check_offered(&["zstd,  GZIP ;q=0.5 , compress"], &["GZIP ;q=0.5"]);
        check_offered(&["br", "gzip"], &["gzip"]);
        check_offered(&["dcb, x-gzip"], &["x-gzip"]);
    }

    #[test]
    fn a_supported_list_is_unchanged() {
        check_offered(&["gzip"], &["gzip"]);
        check_offered(&["gzip,deflate;q=0.5", "identity;q=0"], &["gzip,deflate;q=0.5", "identity;q=0"]);
        check_offered(&["identity"], &["identity"]);
        check_offered(&[], &[]);
    }

    #[test]
    fn a_wildcard_becomes_every_supported_encoding() {
        check_offered(&["*"], &["gzip, deflate"]);
        check_offered(&["gzip;q=0, *"], &["gzip;q=0, deflate"]);
        check_offered(&["gzip, *;q=0"], &["gzip, *;q=0"]);
        check_offered(&["*;q=0.5, gzip, deflate"], &["gzip, deflate"]);
    }

    #[test]
    fn a_list_without_supported_encodings_becomes_identity() {
        for requested in
            ["br", "zstd, br;q=0.5", "br, *;q=0", "br, gzip;q=0.000", "identity;q=0, br", "", ","]
        {
            check_offered(&[requested], &["identity"]);
        }
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_bytes(b"gzip, \xff").unwrap());
        restrict_accept_encoding(&mut headers);
        assert_eq!(headers[ACCEPT_ENCODING], "identity");
    }
}

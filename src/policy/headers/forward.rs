//! Removes the headers of proxies in front of Keychoir from requests, except the headers that the operator lists in
//! `access.forward_headers`. Also decides which headers the operator must not list. A row of the table in `table`
//! covers one header, or all headers with a prefix.

use http::header::{HeaderMap, HeaderName};

use super::present::{KnownHeader, PresentHeaders};
use super::table::Rule;

/// The headers that `access.forward_headers` lists.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ForwardedHeaders {
    /// The table rows of the listed headers, if each row covers only one header.
    rows: PresentHeaders,
    /// Listed headers whose table row also covers other names.
    names: Vec<HeaderName>,
}

impl ForwardedHeaders {
    /// Creates the set from the configured names. Headers without a table row need not be listed, because they are
    /// always forwarded. `strip` removes credentials and hop-by-hop headers even if they are listed.
    #[must_use]
    pub fn new(listed: impl IntoIterator<Item = HeaderName>) -> Self {
        let mut forwarded = Self::default();
        for name in listed {
            match KnownHeader::find(name.as_str()) {
                Some(known) if known.row().prefix().is_some() => forwarded.names.push(name),
                Some(known) => forwarded.rows = forwarded.rows.with(known),
                None => {}
            }
        }
        forwarded
    }

    /// Removes the headers of a request that are not sent upstream. `present` is the set of rows that cover `headers`.
    pub(super) fn strip(&self, headers: &mut HeaderMap, present: PresentHeaders) {
        let removed = PresentHeaders::NEVER_SENT.or(PresentHeaders::SENT_BY_PROXIES.without(self.rows));
        remove_rows(headers, present.and(removed), &self.names);
    }
}

/// Returns the reason why `access.forward_headers` must not list a header, or `None` if it may list it.
#[must_use]
pub fn unforwardable_reason(name: &HeaderName) -> Option<&'static str> {
    let row = KnownHeader::find(name.as_str())?.row();
    match row.rule {
        Rule::HopByHop | Rule::Credential | Rule::Special => Some(row.reason),
        Rule::Request | Rule::Response => None,
    }
}

/// Removes the headers that belong to `rows`, except the headers in `kept`.
pub(super) fn remove_rows(headers: &mut HeaderMap, rows: PresentHeaders, kept: &[HeaderName]) {
    for known in rows.rows() {
        let Some(prefix) = known.row().prefix() else {
            headers.remove(known.name());
            continue;
        };
        let is_removed = |name: &&HeaderName| name.as_str().starts_with(prefix) && !kept.contains(name);
        let names: Vec<HeaderName> = headers.keys().filter(is_removed).cloned().collect();
        for name in names {
            headers.remove(name);
        }
    }
}

#[cfg(test)]
mod tests {
    use http::header::HeaderValue;

    use super::super::table::ROWS;
    use super::super::{strip_request, strip_response};
    use super::*;

    fn headers_with(names: &[&str]) -> HeaderMap {
        let value = HeaderValue::from_static("x");
        names.iter().map(|name| (name.parse().unwrap(), value.clone())).collect()
    }

    fn names(headers: &HeaderMap) -> Vec<String> {
        let mut names: Vec<String> = headers.keys().map(ToString::to_string).collect();
        names.sort_unstable();
        names
    }

    /// Returns a header name for each row with one of `rules`.
    fn names_with_rule(rules: &[Rule]) -> Vec<String> {
        let rows = ROWS.iter().filter(|row| rules.contains(&row.rule));
        rows.map(|row| row.prefix().map_or(row.name.to_owned(), |prefix| format!("{prefix}x"))).collect()
    }

    #[test]
    fn headers_that_proxies_add_to_requests_are_removed() {
        let removed_names = names_with_rule(&[Rule::Request, Rule::HopByHop, Rule::Credential]);
        let all: Vec<&str> =
            removed_names.iter().map(String::as_str).chain(["x-mine", "alt-svc", "host"]).collect();
        let mut headers = headers_with(&all);
        strip_request(&mut headers, &ForwardedHeaders::default());
        assert_eq!(names(&headers), ["alt-svc", "x-mine"]);
    }

    #[test]
    fn headers_about_the_origin_of_the_provider_are_removed() {
        let removed_names = names_with_rule(&[Rule::Response, Rule::HopByHop]);
        let all: Vec<&str> =
            removed_names.iter().map(String::as_str).chain(["content-type", "cf-ray", "via"]).collect();
        let mut headers = headers_with(&all);
        strip_response(&mut headers);
        assert_eq!(names(&headers), ["cf-ray", "content-type", "via"]);
    }

    #[test]
    fn a_listed_header_is_forwarded_and_similar_names_are_not() {
        let listed_names =
            ["cf-ipcountry", "x-real-ip", "x-mine", "cookie"].map(|name| name.parse().unwrap());
        let mut headers = headers_with(&[
            "cf-ipcountry",
            "cf-connecting-ip",
            "x-real-ip",
            "x-client-ip",
            "cookie",
            "x-mine",
        ]);
        strip_request(&mut headers, &ForwardedHeaders::new(listed_names));
        assert_eq!(names(&headers), ["cf-ipcountry", "x-mine", "x-real-ip"]);
    }

    #[test]
    fn credentials_and_hop_by_hop_headers_cannot_be_listed() {
        for name in names_with_rule(&[Rule::HopByHop, Rule::Credential, Rule::Special]) {
            assert!(unforwardable_reason(&name.parse().unwrap()).is_some(), "{name} must not be listed");
        }
        for name in ["x-forwarded-for", "cf-ray", "x-mine", "set-cookie"] {
            assert_eq!(unforwardable_reason(&name.parse().unwrap()), None, "{name} may be listed");
        }
    }
}

//! The exceptions of the operator: headers of proxies in front of Keychoir that `access.forward_headers`
//! lists are forwarded upstream.

use http::header::{HeaderMap, HeaderName};

use super::present::{KnownHeader, PresentHeaders};
use super::table::Rule;

/// The headers listed in `access.forward_headers`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Forwarded {
    rows: PresentHeaders,
    /// Listed headers whose table row covers other names as well.
    names: Vec<HeaderName>,
}

impl Forwarded {
    /// The headers of these names. Names that are always or never forwarded are ignored.
    #[must_use]
    pub fn of(listed: impl IntoIterator<Item = HeaderName>) -> Self {
        let mut forwarded = Self::default();
        for name in listed {
            match KnownHeader::of(name.as_str()) {
                Some(known) if known.row().prefix().is_some() => forwarded.names.push(name),
                Some(known) => forwarded.rows = forwarded.rows.with(known),
                None => {}
            }
        }
        forwarded
    }

    /// Removes from a request's headers those that are not sent upstream. `present` are the rows it has.
    pub(super) fn strip(&self, headers: &mut HeaderMap, present: PresentHeaders) {
        let removed = PresentHeaders::NEVER_SENT.or(PresentHeaders::OF_PROXIES.without(self.rows));
        drop_rows(headers, present.and(removed), &self.names);
    }
}

/// The reason why a listed header cannot be forwarded; `None` if it can.
#[must_use]
pub fn why_not_forwarded(name: &HeaderName) -> Option<&'static str> {
    let row = KnownHeader::of(name.as_str())?.row();
    match row.rule {
        Rule::Hop | Rule::Credential | Rule::Special => Some(row.reason),
        Rule::Up | Rule::Down => None,
    }
}

/// Removes the headers of these rows, except those in `kept`.
pub(super) fn drop_rows(headers: &mut HeaderMap, rows: PresentHeaders, kept: &[HeaderName]) {
    for known in rows.rows() {
        let Some(prefix) = known.row().prefix() else {
            headers.remove(known.name());
            continue;
        };
        let covered = |name: &&HeaderName| name.as_str().starts_with(prefix) && !kept.contains(name);
        let names: Vec<HeaderName> = headers.keys().filter(covered).cloned().collect();
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

    fn head(names: &[&str]) -> HeaderMap {
        let value = HeaderValue::from_static("x");
        names.iter().map(|name| (name.parse().unwrap(), value.clone())).collect()
    }

    fn names(headers: &HeaderMap) -> Vec<String> {
        let mut names: Vec<String> = headers.keys().map(ToString::to_string).collect();
        names.sort_unstable();
        names
    }

    /// A header name for each row with one of these rules.
    fn of_rule(wanted: &[Rule]) -> Vec<String> {
        let rows = ROWS.iter().filter(|row| wanted.contains(&row.rule));
        rows.map(|row| row.prefix().map_or(row.name.to_owned(), |prefix| format!("{prefix}x"))).collect()
    }

    #[test]
    fn headers_of_proxies_about_a_client_are_removed() {
        let names_of_rule = of_rule(&[Rule::Up, Rule::Hop, Rule::Credential]);
        let all: Vec<&str> =
            names_of_rule.iter().map(String::as_str).chain(["x-mine", "alt-svc", "host"]).collect();
        let mut headers = head(&all);
        strip_request(&mut headers, &Forwarded::default());
        assert_eq!(names(&headers), ["alt-svc", "x-mine"]);
    }

    #[test]
    fn headers_of_the_provider_about_its_origin_are_removed() {
        let names_of_rule = of_rule(&[Rule::Down, Rule::Hop]);
        let all: Vec<&str> =
            names_of_rule.iter().map(String::as_str).chain(["content-type", "cf-ray", "via"]).collect();
        let mut headers = head(&all);
        strip_response(&mut headers);
        assert_eq!(names(&headers), ["cf-ray", "content-type", "via"]);
    }

    #[test]
    fn a_listed_header_is_forwarded_and_similar_names_are_not() {
        let listed = ["cf-ipcountry", "x-real-ip", "x-mine", "cookie"].map(|name| name.parse().unwrap());
        let mut headers =
            head(&["cf-ipcountry", "cf-connecting-ip", "x-real-ip", "x-client-ip", "cookie", "x-mine"]);
        strip_request(&mut headers, &Forwarded::of(listed));
        assert_eq!(names(&headers), ["cf-ipcountry", "x-mine", "x-real-ip"]);
    }

    #[test]
    fn credentials_and_headers_of_one_connection_cannot_be_listed() {
        for name in of_rule(&[Rule::Hop, Rule::Credential, Rule::Special]) {
            assert!(why_not_forwarded(&name.parse().unwrap()).is_some(), "{name}");
        }
        for name in ["x-forwarded-for", "cf-ray", "x-mine", "set-cookie"] {
            assert_eq!(why_not_forwarded(&name.parse().unwrap()), None, "{name}");
        }
    }
}

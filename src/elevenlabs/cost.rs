//! Parses the headers of a response in which the provider reports the cost of the request and the maximum number of
//! concurrent requests.

use http::HeaderMap;

/// The cost and the concurrency limit in the headers of a response.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReportedCost {
    /// The charged credits, from `character-cost` (the header that the provider sends) or `x-character-count` (the
    /// header in the introduction of its documentation), or `None` if the response has neither.
    pub credits: Option<u64>,
    /// Maximum number of concurrent requests of this kind in the workspace, from
    /// `maximum-concurrent-requests`, or `None` if the response does not contain it. Source: captured responses of
    /// August 2026.
    pub max_concurrent: Option<u32>,
}

impl ReportedCost {
    /// Parses the headers of a response. One loop over the headers is faster than a search for each name, because most
    /// responses contain none of the names.
    #[must_use]
    pub fn from_headers(headers: &HeaderMap) -> Self {
        let (mut character_cost, mut character_count, mut max_concurrent) = (None, None, None);
        for (name, value) in headers {
            let text = || value.to_str().unwrap_or_default().trim();
            match name.as_str() {
                "character-cost" => character_cost = character_cost.or_else(|| parse_credits(text())),
                "x-character-count" => character_count = character_count.or_else(|| parse_credits(text())),
                "maximum-concurrent-requests" => max_concurrent = max_concurrent.or(text().parse().ok()),
                _ => {}
            }
        }
        let credits = character_cost.or(character_count);
        Self { credits, max_concurrent: max_concurrent.filter(|&maximum| maximum > 0) }
    }
}

/// Maximum plausible cost. The largest plans have about ten million credits a month, so a larger number cannot be
/// correct. Sums of such numbers could overflow.
const MAX_CREDITS: u64 = 1_000_000_000;

/// Parses a number of credits, rounded up to whole credits.
fn parse_credits(text: &str) -> Option<u64> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let is_number =
        !whole.is_empty() && whole.bytes().chain(fraction.bytes()).all(|byte| byte.is_ascii_digit());
    let whole: u64 = is_number.then(|| whole.parse().ok()).flatten()?;
    let credits = whole.saturating_add(u64::from(fraction.bytes().any(|byte| byte != b'0')));
    (credits <= MAX_CREDITS).then_some(credits)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Compares the credits in a header with the expected ones.
    #[track_caller]
    fn check_credits(name: &'static str, value: &'static str, expected: Option<u64>) {
        let headers = HeaderMap::from_iter([(name.parse().unwrap(), value.parse().unwrap())]);
        assert_eq!(ReportedCost::from_headers(&headers).credits, expected);
    }

    #[test]
    fn the_cost_is_parsed_from_either_header() {
        check_credits("character-cost", "43", Some(43));
        check_credits("x-character-count", "43", Some(43));
        check_credits("content-length", "43", None);
    }

    #[test]
    fn a_fraction_is_rounded_up() {
        check_credits("character-cost", "3.0", Some(3));
        check_credits("character-cost", " 3.01 ", Some(4));
        check_credits("character-cost", "0", Some(0));
        check_credits("character-cost", "1000000000.0", Some(MAX_CREDITS));
    }

    #[test]
    fn the_concurrency_limit_is_parsed() {
        for (value, expected) in [("10", Some(10)), ("0", None), ("-1", None), ("many", None)] {
            let headers = HeaderMap::from_iter([(
                "maximum-concurrent-requests".parse().unwrap(),
                value.parse().unwrap(),
            )]);
            assert_eq!(ReportedCost::from_headers(&headers).max_concurrent, expected);
        }
        assert_eq!(ReportedCost::from_headers(&HeaderMap::new()), ReportedCost::default());
    }

    #[test]
    fn an_invalid_number_of_credits_is_ignored() {
        for value in [
            "",
            "-1",
            "1e3",
            ".",
            ".5",
            "NaN",
            "18446744073709551616",
            "18446744073709551615",
            "1000000000.1",
            "1.x",
        ] {
            check_credits("character-cost", value, None);
        }
    }
}

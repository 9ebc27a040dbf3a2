//! What a request has cost, as the answer says it.

use http::{HeaderMap, HeaderName};

/// Credits charged, from the answer's `character-cost` (the wire's name) or `x-character-count`
/// (the name in the provider's introduction). `None` when neither says.
#[must_use]
pub fn told(headers: &HeaderMap) -> Option<u64> {
    static TELLING: [HeaderName; 2] =
        [HeaderName::from_static("character-cost"), HeaderName::from_static("x-character-count")];
    TELLING.iter().find_map(|name| headers.get(name)?.to_str().ok().and_then(credits))
}

/// How many requests of this kind may run at once in the workspace, from the answer's
/// `maximum-concurrent-requests`. Source: captured answers of August 2026.
#[must_use]
pub fn concurrency_max(headers: &HeaderMap) -> Option<u32> {
    static TELLING: HeaderName = HeaderName::from_static("maximum-concurrent-requests");
    let told = headers.get(&TELLING)?.to_str().ok()?.trim().parse().ok()?;
    Some(told).filter(|&maximum: &u32| maximum > 0)
}

/// Whole credits; a fraction counts as a whole one.
fn credits(text: &str) -> Option<u64> {
    let text = text.trim();
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let is_number =
        !whole.is_empty() && whole.bytes().chain(fraction.bytes()).all(|byte| byte.is_ascii_digit());
    let whole: u64 = is_number.then(|| whole.parse().ok()).flatten()?;
    Some(whole.saturating_add(u64::from(fraction.bytes().any(|byte| byte != b'0'))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(name: &'static str, value: &'static str, expected: Option<u64>) {
        let headers = HeaderMap::from_iter([(name.parse().unwrap(), value.parse().unwrap())]);
        assert_eq!(told(&headers), expected);
    }

    #[test]
    fn the_cost_is_read_from_either_name() {
        check("character-cost", "43", Some(43));
        check("x-character-count", "43", Some(43));
        check("content-length", "43", None);
    }

    #[test]
    fn a_fraction_counts_as_a_whole_credit() {
        check("character-cost", "3.0", Some(3));
        check("character-cost", " 3.01 ", Some(4));
        check("character-cost", "0", Some(0));
    }

    #[test]
    fn the_room_for_requests_is_read() {
        for (value, expected) in [("10", Some(10)), ("0", None), ("-1", None), ("many", None)] {
            let headers = HeaderMap::from_iter([(
                "maximum-concurrent-requests".parse().unwrap(),
                value.parse().unwrap(),
            )]);
            assert_eq!(concurrency_max(&headers), expected);
        }
        assert_eq!(concurrency_max(&HeaderMap::new()), None);
    }

    #[test]
    fn what_is_no_amount_says_nothing() {
        for value in ["", "-1", "1e3", ".", ".5", "NaN", "18446744073709551616", "1.x"] {
            check("character-cost", value, None);
        }
    }
}

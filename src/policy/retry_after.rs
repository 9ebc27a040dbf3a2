//! Parses the delay before a retry from response headers: seconds or a date in `Retry-After`, seconds
//! since 1970 in `X-RateLimit-Reset`.
//!
//! No captured response of the provider has either; a front end of the provider may send them.

use std::time::{Duration, UNIX_EPOCH};

use http::HeaderMap;
use http::header::RETRY_AFTER;

use super::units::UnixMs;

/// Maximum time; a longer one is an error of the sender, because no rate limit lasts beyond a day.
const SPAN_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// The time to wait from `now`, if the headers have one.
#[must_use]
pub fn retry_after(headers: &HeaderMap, now: UnixMs) -> Option<Duration> {
    let text = |name: &str| headers.get(name)?.to_str().ok().map(str::trim);
    let delay =
        text(RETRY_AFTER.as_str()).and_then(|value| seconds(value).or_else(|| until_date(value, now)));
    let reset = || text("x-ratelimit-reset").and_then(seconds).map(|at| moment(at).since(now));
    delay.or_else(reset).map(|span| span.min(SPAN_MAX))
}

/// RFC 9110 has whole seconds; some rate limiters send `1.5`, which is rounded up.
fn seconds(value: &str) -> Option<Duration> {
    let (whole, fraction) = value.split_once('.').unwrap_or((value, ""));
    let is_digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if whole.is_empty() || !is_digits(whole) || !is_digits(fraction) {
        return None;
    }
    // A number that overflows is above the maximum, and is cut to it.
    let whole: u64 = whole.parse().unwrap_or(u64::MAX);
    let rounding = u64::from(fraction.bytes().any(|byte| byte != b'0'));
    Some(Duration::from_secs(whole.saturating_add(rounding)))
}

fn until_date(value: &str, now: UnixMs) -> Option<Duration> {
    let since_epoch = httpdate::parse_http_date(value).ok()?.duration_since(UNIX_EPOCH).ok()?;
    Some(moment(since_epoch).since(now))
}

fn moment(since_epoch: Duration) -> UnixMs {
    UnixMs::default().plus(since_epoch)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: UnixMs = UnixMs(1_700_000_000_000);

    #[track_caller]
    fn check(name: &'static str, value: &'static str, expected: Option<u64>) {
        let headers = HeaderMap::from_iter([(name.parse().unwrap(), value.parse().unwrap())]);
        assert_eq!(retry_after(&headers, NOW), expected.map(Duration::from_secs));
    }

    #[test]
    fn a_number_is_a_delay_in_seconds() {
        check("retry-after", "0", Some(0));
        check("retry-after", " 60 ", Some(60));
        check("retry-after", "-1", None);
        check("retry-after", "", None);
        check("retry-after", ".", None);
        check("retry-after", "+5", None);
        check("retry-after", "1e3", None);
        check("retry-after", "1.5", Some(2));
        check("retry-after", "2.0", Some(2));
        check("retry-after", "0.001", Some(1));
        check("retry-after", "soon", None);
    }

    #[test]
    fn a_date_is_a_span_from_now() {
        check("retry-after", "Tue, 14 Nov 2023 22:13:50 GMT", Some(30));
        check("retry-after", "Tue, 14 Nov 2023 22:13:19 GMT", Some(0));
    }

    #[test]
    fn a_reset_moment_is_a_span_from_now() {
        check("x-ratelimit-reset", "1700000012", Some(12));
        check("x-ratelimit-reset", "12", Some(0));
    }

    #[test]
    fn a_delay_is_at_most_a_day() {
        check("retry-after", "86400", Some(86_400));
        check("retry-after", "86401", Some(86_400));
        check("retry-after", "18446744073709551615", Some(86_400));
        check("retry-after", "99999999999999999999999", Some(86_400));
        check("x-ratelimit-reset", "18446744073709551615", Some(86_400));
    }

    #[test]
    fn without_a_header_there_is_no_delay() {
        check("x-other", "60", None);
    }
}

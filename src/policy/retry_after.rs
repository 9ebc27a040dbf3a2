//! Parses the delay before a retry from response headers: seconds or a date in `Retry-After`, or seconds
//! since 1970 in `X-RateLimit-Reset`.
//!
//! No captured response of the provider has either header, but a reverse proxy in front of the provider may send them.

use std::time::{Duration, UNIX_EPOCH};

use http::HeaderMap;
use http::header::RETRY_AFTER;

use super::units::UnixMs;

/// Maximum delay. A longer delay is an error of the sender, because no rate limit lasts for more than a day.
const MAX_DELAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Returns the delay from `now` until the retry, if the headers specify one.
#[must_use]
pub fn parse_retry_after(headers: &HeaderMap, now: UnixMs) -> Option<Duration> {
    let header_text = |name: &str| headers.get(name)?.to_str().ok().map(str::trim);
    let delay = header_text(RETRY_AFTER.as_str())
        .and_then(|text| parse_seconds(text).or_else(|| delay_until_date(text, now)));
    let reset_delay = || {
        header_text("x-ratelimit-reset")
            .and_then(parse_seconds)
            .map(|since_epoch| unix_time(since_epoch).since(now))
    };
    delay.or_else(reset_delay).map(|delay| delay.min(MAX_DELAY))
}

/// Parses a number of seconds. RFC 9110 specifies whole seconds. Some rate limiters send a fraction, which is rounded
/// up.
fn parse_seconds(text: &str) -> Option<Duration> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let is_digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if whole.is_empty() || !is_digits(whole) || !is_digits(fraction) {
        return None;
    }
    // A number that overflows exceeds the maximum, to which the caller limits it.
    let whole: u64 = whole.parse().unwrap_or(u64::MAX);
    let rounding = u64::from(fraction.bytes().any(|byte| byte != b'0'));
    Some(Duration::from_secs(whole.saturating_add(rounding)))
}

/// Parses an HTTP date, and returns the delay from `now` until it.
fn delay_until_date(text: &str, now: UnixMs) -> Option<Duration> {
    let since_epoch = httpdate::parse_http_date(text).ok()?.duration_since(UNIX_EPOCH).ok()?;
    Some(unix_time(since_epoch).since(now))
}

fn unix_time(since_epoch: Duration) -> UnixMs {
    UnixMs::default().plus(since_epoch)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: UnixMs = UnixMs(1_700_000_000_000);

    #[track_caller]
    fn check_delay(name: &'static str, value: &'static str, expected_secs: Option<u64>) {
        let headers = HeaderMap::from_iter([(name.parse().unwrap(), value.parse().unwrap())]);
        assert_eq!(parse_retry_after(&headers, NOW), expected_secs.map(Duration::from_secs));
    }

    #[test]
    fn a_number_is_a_delay_in_seconds() {
        check_delay("retry-after", "0", Some(0));
        check_delay("retry-after", " 60 ", Some(60));
        check_delay("retry-after", "-1", None);
        check_delay("retry-after", "", None);
        check_delay("retry-after", ".", None);
        check_delay("retry-after", "+5", None);
        check_delay("retry-after", "1e3", None);
        check_delay("retry-after", "1.5", Some(2));
        check_delay("retry-after", "2.0", Some(2));
        check_delay("retry-after", "0.001", Some(1));
        check_delay("retry-after", "soon", None);
    }

    #[test]
    fn a_date_is_a_delay_from_now() {
        check_delay("retry-after", "Tue, 14 Nov 2023 22:13:50 GMT", Some(30));
        check_delay("retry-after", "Tue, 14 Nov 2023 22:13:19 GMT", Some(0));
    }

    #[test]
    fn a_reset_time_is_a_delay_from_now() {
        check_delay("x-ratelimit-reset", "1700000012", Some(12));
        check_delay("x-ratelimit-reset", "12", Some(0));
    }

    #[test]
    fn a_delay_is_at_most_a_day() {
        check_delay("retry-after", "86400", Some(86_400));
        check_delay("retry-after", "86401", Some(86_400));
        check_delay("retry-after", "18446744073709551615", Some(86_400));
        check_delay("retry-after", "99999999999999999999999", Some(86_400));
        check_delay("x-ratelimit-reset", "18446744073709551615", Some(86_400));
    }

    #[test]
    fn without_a_header_no_delay_is_returned() {
        check_delay("x-other", "60", None);
    }
}

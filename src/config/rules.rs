//! Parses the access rules and limits of a `[[clients]]` entry, such as the quota
//! `"10_000 credits per month"` and the rate limit `"60 per minute"`.

use std::str::FromStr;
use std::time::Duration;

use super::document::TableEntry;
use super::keys::KeyConfig;
use super::mask::quote_masked;
use super::problem::{Problem, ValueError};
use crate::policy::client::{AllowedKeys, Rules};
use crate::policy::client_quota::{ClientQuota, Period, QuotaUnit, RateLimit};
use crate::policy::path::Path;
use crate::policy::similar::find_similar;

/// Maximum value of `max_concurrent`, which is also the maximum of `server.max_requests`.
const MAX_CONCURRENT: u32 = 1_000_000;

/// Parses the rules of an entry. The keys and workspaces that the rules name must be in `pool`.
pub(super) fn parse(entry: &TableEntry<'_>, pool: &[KeyConfig], problems: &mut Vec<Problem>) -> Rules {
    Rules {
        quota: entry.parse("quota", problems),
        user_quota: entry.parse("user_quota", problems),
        rate_limit: entry.parse("rate_limit", problems),
        max_concurrent: entry.parse_count("max_concurrent", 1..=MAX_CONCURRENT, problems),
        paths: entry.parse_list("paths", parse_path, problems),
        allowed_keys: AllowedKeys {
            keys: entry.parse_list(
                "keys",
                |name| check_pool_name(name, "key", pool, |key| key.name.as_deref()),
                problems,
            ),
            workspaces: entry.parse_list(
                "workspaces",
                |name| check_pool_name(name, "workspace", pool, |key| key.workspace.as_deref()),
                problems,
            ),
        },
        may_bring_key: entry.parse_bool("bring_your_own_key", problems).unwrap_or(false),
        may_request_tokens: entry.parse_bool("provider_tokens", problems).unwrap_or(false),
    }
}

/// Parses an integer with optional digit groups (`_` or `,`).
fn parse_amount(text: &str) -> Option<u64> {
    let digits: String = text.chars().filter(|character| !matches!(character, '_' | ',')).collect();
    digits.parse().ok()
}

impl FromStr for ClientQuota {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        const NOTATION: &str =
            "write for example \"3 requests\", \"50 requests per day\" or \"10_000 credits per month\"";
        let error = || ValueError::new(format!("{} is not a quota", quote_masked(text))).advise(NOTATION);
        let mut words = text.split_whitespace();
        let amount = words.next().and_then(parse_amount).ok_or_else(error)?;
        let unit = match words.next() {
            Some("request" | "requests") => QuotaUnit::Requests,
            Some("credit" | "credits") => QuotaUnit::Credits,
            Some(other) => return Err(error().suggest(find_similar(other, ["requests", "credits"]))),
            None => return Err(error()),
        };
        let period = match words.collect::<Vec<_>>()[..] {
            [] => Period::Total,
            ["per" | "a", "day"] => Period::Day,
            ["per" | "a", "month"] => Period::Month,
            _ => return Err(error()),
        };
        Ok(Self { amount, unit, period })
    }
}

impl FromStr for RateLimit {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let error = || {
            ValueError::new(format!("{} is not a rate limit", quote_masked(text)))
                .advise("write for example \"60 per minute\" or \"5 per second\"")
        };
        let mut words = text.split_whitespace();
        let requests = words.next().and_then(parse_amount).and_then(|count| u32::try_from(count).ok());
        let requests = requests.filter(|&count| count > 0).ok_or_else(error)?;
        let words: Vec<&str> = words.filter(|word| !matches!(*word, "request" | "requests")).collect();
        let interval = match words[..] {
            ["per" | "a", "second"] => Duration::from_secs(1),
            ["per" | "a", "minute"] => Duration::from_secs(60),
            _ => return Err(error()),
        };
        Ok(Self { requests, interval })
    }
}

/// Parses a path of the provider, including its API version.
fn parse_path(text: &str) -> Result<String, ValueError> {
    let is_path_byte = |byte: u8| byte.is_ascii_alphanumeric() || b"/-_.{}".contains(&byte);
    if text.bytes().all(is_path_byte) && Path::parse(text).is_ok() {
        return Ok(text.trim_end_matches('/').to_owned());
    }
    Err(ValueError::new(format!("{} is not a valid path", quote_masked(text))).advise(
        "begin with the API version, for example \"/v1/text-to-speech\"; {id} stands for any segment",
    ))
}

/// Checks that a key of the pool has the given name, which `name_of_key` returns. `kind` is what the name identifies: a
/// key or a workspace.
fn check_pool_name(
    name: &str,
    kind: &str,
    pool: &[KeyConfig],
    name_of_key: impl Fn(&KeyConfig) -> Option<&str>,
) -> Result<String, ValueError> {
    if pool.iter().any(|key| name_of_key(key) == Some(name)) {
        return Ok(name.to_owned());
    }
    Err(ValueError::new(format!("the pool has no {kind} named {}", quote_masked(name)))
        .suggest(find_similar(name, pool.iter().filter_map(name_of_key)))
        .advise(format!("write the `{}` of a [[keys]] entry", if kind == "key" { "name" } else { kind })))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_quota(text: &str, expected: &str) {
        let printed_text = match text.parse::<ClientQuota>() {
            Ok(quota) => quota.to_string(),
            Err(error) => format!("! {error}"),
        };
        assert_eq!(printed_text, expected);
    }

    #[test]
    fn quotas_are_parsed_in_all_notations() {
        check_quota("3 requests", "3 requests");
        check_quota("1 request a day", "1 request per day");
        check_quota(" 10_000  credits per month ", "10,000 credits per month");
        check_quota("10,000 credits per month", "10,000 credits per month");
        check_quota("0 credits", "0 credits");
    }

    #[test]
    fn the_error_for_an_invalid_quota_shows_the_notation() {
        let advice =
            "write for example \"3 requests\", \"50 requests per day\" or \"10_000 credits per month\"";
        for text in
            ["", "3", "requests", "-3 requests", "3 requests per year", "3 requests per", "3.5 credits"]
        {
            check_quota(text, &format!("! `{text}` is not a quota; {advice}"));
        }
        check_quota(
            "3 reqests per day",
            &format!("! `3 reqests per day` is not a quota; {advice}; did you mean `requests`?"),
        );
    }

    #[test]
    fn a_rate_limit_is_per_second_or_minute() {
        let limit = |requests, seconds| Ok(RateLimit { requests, interval: Duration::from_secs(seconds) });
        assert_eq!("60 per minute".parse(), limit(60, 60));
        assert_eq!("5 requests a second".parse(), limit(5, 1));
        for text in ["", "60", "0 per minute", "60 per hour", "x per minute", "5000000000 per second"] {
            assert!(text.parse::<RateLimit>().is_err(), "the rate limit {text:?} must be refused");
        }
    }

    #[test]
    fn a_path_begins_with_a_slash_and_has_no_other_url_parts() {
        assert_eq!(parse_path("/v1/text-to-speech/"), Ok("/v1/text-to-speech".to_owned()));
        assert_eq!(parse_path("/v1/voices/{id}/settings"), Ok("/v1/voices/{id}/settings".to_owned()));
        for text in ["", "v1/voices", "/v1/../x", "/v1/a?b", "/v1/%20", "https://x/v1"] {
            assert!(parse_path(text).is_err(), "the path {text:?} must be refused");
        }
    }
}

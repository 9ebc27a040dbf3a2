//! Parses the rules and limits of a client: `"3 requests"`, `"10_000 credits per month"`, `"60 per
//! minute"`.

use std::str::FromStr;
use std::time::Duration;

use super::document::TableEntry;
use super::keys::KeyConfig;
use super::mask::shown;
use super::problem::{Problem, WrongValue, nearest};
use crate::policy::client::{AllowedKeys, Rules};
use crate::policy::client_quota::{ClientQuota, Measure, Period, Rate};
use crate::policy::path::Path;

/// The fields of a `[[clients]]` entry that this module parses.
pub(super) const FIELDS: [&str; 8] = [
    "quota",
    "rate_limit",
    "max_concurrent",
    "paths",
    "keys",
    "workspaces",
    "bring_your_own_key",
    "provider_tokens",
];

/// Parses the rules of an entry. Pinned keys and workspaces must be in `pool`.
pub(super) fn read(entry: &TableEntry<'_>, pool: &[KeyConfig], problems: &mut Vec<Problem>) -> Rules {
    Rules {
        quota: parsed(entry, "quota", problems),
        rate: parsed(entry, "rate_limit", problems),
        concurrency: entry.count("max_concurrent", 1..=1_000_000, problems),
        paths: entry.list("paths", path, problems),
        pins: AllowedKeys {
            keys: entry.list(
                "keys",
                |text| allowed_key(text, "key", pool, |key| key.name.as_deref()),
                problems,
            ),
            workspaces: entry.list(
                "workspaces",
                |text| allowed_key(text, "workspace", pool, |key| key.workspace.as_deref()),
                problems,
            ),
        },
        may_bring_key: entry.switch("bring_your_own_key", problems).unwrap_or(false),
        may_take_tokens: entry.switch("provider_tokens", problems).unwrap_or(false),
    }
}

fn parsed<T: FromStr<Err = WrongValue>>(
    entry: &TableEntry<'_>,
    name: &str,
    problems: &mut Vec<Problem>,
) -> Option<T> {
    let (text, span) = entry.text(name, problems)?;
    text.parse().map_err(|wrong| problems.push(span.problem(wrong))).ok()
}

/// Parses an integer with optional digit groups (`_` or `,`).
fn amount(text: &str) -> Option<u64> {
    let digits: String = text.chars().filter(|character| !matches!(character, '_' | ',')).collect();
    digits.parse().ok()
}

impl FromStr for ClientQuota {
    type Err = WrongValue;

    fn from_str(text: &str) -> Result<Self, WrongValue> {
        const NOTATION: &str =
            "write for example \"3 requests\", \"50 requests per day\" or \"10_000 credits per month\"";
        let wrong = || WrongValue::new(format!("{} is no quota", shown(text))).advise(NOTATION);
        let mut words = text.split_whitespace();
        let amount = words.next().and_then(amount).ok_or_else(wrong)?;
        let measure = match words.next() {
            Some("request" | "requests") => Measure::Requests,
            Some("credit" | "credits") => Measure::Credits,
            Some(other) => return Err(wrong().suggest(nearest(other, ["requests", "credits"]))),
            None => return Err(wrong()),
        };
        let period = match words.collect::<Vec<_>>()[..] {
            [] => Period::Ever,
            ["per" | "a", "day"] => Period::Day,
            ["per" | "a", "month"] => Period::Month,
            _ => return Err(wrong()),
        };
        Ok(Self { amount, measure, period })
    }
}

impl FromStr for Rate {
    type Err = WrongValue;

    fn from_str(text: &str) -> Result<Self, WrongValue> {
        let wrong = || {
            WrongValue::new(format!("{} is no rate limit", shown(text)))
                .advise("write for example \"60 per minute\" or \"5 per second\"")
        };
        let mut words = text.split_whitespace();
        let requests = words.next().and_then(amount).and_then(|count| u32::try_from(count).ok());
        let requests = requests.filter(|&count| count > 0).ok_or_else(wrong)?;
        let words: Vec<&str> = words.filter(|word| !matches!(*word, "request" | "requests")).collect();
        let span = match words[..] {
            ["per" | "a", "second"] => Duration::from_secs(1),
            ["per" | "a", "minute"] => Duration::from_secs(60),
            _ => return Err(wrong()),
        };
        Ok(Self { requests, span })
    }
}

/// Parses a path of the provider, including its API version.
pub(super) fn path(text: &str) -> Result<String, WrongValue> {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/-_.{}".contains(&byte);
    if text.bytes().all(is_plain) && Path::read(text).is_ok() {
        return Ok(text.trim_end_matches('/').to_owned());
    }
    Err(WrongValue::new(format!("{} is no path", shown(text))).advise(
        "write it from its version on, for example \"/v1/text-to-speech\"; {id} stands for any one name",
    ))
}

fn allowed_key(
    text: &str,
    kind: &str,
    pool: &[KeyConfig],
    name: impl Fn(&KeyConfig) -> Option<&str>,
) -> Result<String, WrongValue> {
    if pool.iter().any(|key| name(key) == Some(text)) {
        return Ok(text.to_owned());
    }
    Err(WrongValue::new(format!("the pool has no {kind} of the name {}", shown(text)))
        .suggest(nearest(text, pool.iter().filter_map(name)))
        .advise(format!("write the `{}` of a [[keys]] entry", if kind == "key" { "name" } else { kind })))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_quota(text: &str, expected: &str) {
        let printed = match text.parse::<ClientQuota>() {
            Ok(quota) => quota.to_string(),
            Err(wrong) => format!("! {wrong}"),
        };
        assert_eq!(printed, expected);
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
    fn the_error_says_how_a_quota_is_written() {
        let form =
            "write for example \"3 requests\", \"50 requests per day\" or \"10_000 credits per month\"";
        for text in
            ["", "3", "requests", "-3 requests", "3 requests per year", "3 requests per", "3.5 credits"]
        {
            check_quota(text, &format!("! `{text}` is no quota; {form}"));
        }
        check_quota(
            "3 reqests per day",
            &format!("! `3 reqests per day` is no quota; {form}; did you mean `requests`?"),
        );
    }

    #[test]
    fn rates_are_per_second_or_minute() {
        let rate = |requests, seconds| Ok(Rate { requests, span: Duration::from_secs(seconds) });
        assert_eq!("60 per minute".parse(), rate(60, 60));
        assert_eq!("5 requests a second".parse(), rate(5, 1));
        for text in ["", "60", "0 per minute", "60 per hour", "x per minute", "5000000000 per second"] {
            assert!(text.parse::<Rate>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_path_begins_with_a_slash() {
        assert_eq!(path("/v1/text-to-speech/"), Ok("/v1/text-to-speech".to_owned()));
        assert_eq!(path("/v1/voices/{id}/settings"), Ok("/v1/voices/{id}/settings".to_owned()));
        for text in ["", "v1/voices", "/v1/../x", "/v1/a?b", "/v1/%20", "https://x/v1"] {
            assert!(path(text).is_err(), "{text}");
        }
    }
}

//! Numbers, times and states as HTML. Without JavaScript, numbers have commas and times are in UTC; the script replaces
//! them by the viewer's format and zone.

use std::time::Duration;

use maud::{Markup, html};

use crate::policy::units::UnixMs;

/// The time of day of a recent event. The script replaces it by the time of the viewer's zone.
pub(super) fn time_of_day(time: UnixMs) -> Markup {
    let rfc3339 = time.rfc3339();
    let clock = rfc3339.get(11..19).unwrap_or_default().to_owned();
    html! { time datetime=(rfc3339) data-clock { (clock) " UTC" } }
}

/// A number with a separator between thousands.
pub(super) fn number(number: u64) -> Markup {
    html! { data data-number value=(number) { (grouped(number)) } }
}

/// A number, or a dash if it is unknown.
pub(super) fn known(amount: Option<u64>) -> Markup {
    match amount {
        Some(amount) => number(amount),
        None => unknown(),
    }
}

pub(super) fn unknown() -> Markup {
    html! { span.muted title="unknown" { "–" } }
}

/// A time that is given in RFC 3339.
pub(super) fn time(rfc3339: &str) -> Markup {
    let text = match UnixMs::parse(rfc3339) {
        Some(time) => time.date_and_minute(),
        None => rfc3339.to_owned(),
    };
    html! { time datetime=(rfc3339) { (text) } }
}

pub(super) fn known_time(rfc3339: Option<&str>) -> Markup {
    match rfc3339 {
        Some(text) => time(text),
        None => unknown(),
    }
}

/// The time from `now` to a later time, such as `in 3 h`.
pub(super) fn until(rfc3339: &str, now: UnixMs) -> String {
    match UnixMs::parse(rfc3339) {
        Some(time) if time > now => format!("in {}", span(time.since(now))),
        Some(_) | None => "now".to_owned(),
    }
}

/// A duration in its largest unit, rounded down.
pub(super) fn span(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3_600 => format!("{} min", seconds / 60),
        3_600..172_800 => format!("{} h", seconds / 3_600),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// A duration of a request.
pub(super) fn latency(duration: Duration) -> String {
    let milliseconds = duration.as_millis();
    match milliseconds {
        0..1_000 => format!("{milliseconds} ms"),
        1_000..10_000 => format!("{}.{} s", milliseconds / 1_000, milliseconds % 1_000 / 100),
        _ => span(duration),
    }
}

/// A number of bytes in its largest decimal unit, such as `16.1 MB`.
pub(super) fn size(bytes: u64) -> String {
    let units = [("kB", 1_000_u64), ("MB", 1_000_000), ("GB", 1_000_000_000), ("TB", 1_000_000_000_000)];
    match units.into_iter().rev().find(|(_, unit)| bytes >= *unit) {
        None => format!("{bytes} B"),
        Some((name, unit)) if bytes / unit < 100 => {
            format!("{}.{} {name}", bytes / unit, bytes % unit * 10 / unit)
        }
        Some((name, unit)) => format!("{} {name}", grouped(bytes / unit)),
    }
}

/// `1,234`.
pub(super) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// The whole percentage of `part` in `whole`, at most 100.
pub(super) fn percent(part: u64, whole: u64) -> u64 {
    let part = u128::from(part) * 100;
    part.checked_div(u128::from(whole)).map_or(0, |percent| u64::try_from(percent.min(100)).unwrap_or(100))
}

/// A state as an icon and a word, so that its color is not needed to understand it.
pub(super) fn state(name: &str) -> Markup {
    let (class, icon, word) = match name {
        "active" | "ready" | "ok" | "connected" | "up" | "reachable" => ("ok", "●", name),
        "near_limit" => ("warn", "▲", "near limit"),
        "rate_limited" => ("warn", "◔", "rate limited"),
        "paused" => ("idle", "‖", "paused"),
        "off" | "unknown" => ("idle", "○", name),
        "exhausted" => ("bad", "■", "exhausted"),
        "invalid" => ("bad", "✕", "invalid"),
        _ => ("warn", "▲", name),
    };
    html! { span class={ "state " (class) } data-state=(name) { span aria-hidden="true" { (icon) } " " (word) } }
}

/// A meter of used credits, with its numbers as text.
pub(super) fn credits_meter(label: &str, used: u64, limit: Option<u64>) -> Markup {
    let Some(limit) = limit else {
        return html! { (number(used)) span.muted { " used, limit unknown" } };
    };
    let percent = percent(used, limit);
    html! {
        (usage_meter(label, percent, "of credits used"))
        span.small { (number(used)) span.muted { " of " } (number(limit)) span.muted { " (" (percent) " %)" } }
    }
}

/// A meter of a used percentage, which warns from 80 percent.
pub(super) fn usage_meter(label: &str, percent: u64, of: &str) -> Markup {
    let text = format!("{label}: {percent} % {of}");
    html! { meter min="0" max="100" low="80" high="95" optimum="0" value=(percent) aria-label=(text) {} }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_commas_between_thousands() {
        let numbers =
            [(0, "0"), (999, "999"), (1_000, "1,000"), (84_766, "84,766"), (1_234_567, "1,234,567")];
        for (number, text) in numbers {
            assert_eq!(grouped(number), text);
        }
    }

    #[test]
    fn durations_are_in_their_largest_unit() {
        let spans = [
            (59, "59 s"),
            (60, "1 min"),
            (3_599, "59 min"),
            (3_600, "1 h"),
            (172_799, "47 h"),
            (172_800, "2 d"),
        ];
        for (seconds, text) in spans {
            assert_eq!(span(Duration::from_secs(seconds)), text);
        }
        let latencies = [(7, "7 ms"), (999, "999 ms"), (1_450, "1.4 s"), (12_000, "12 s")];
        for (milliseconds, text) in latencies {
            assert_eq!(latency(Duration::from_millis(milliseconds)), text);
        }
    }

    #[test]
    fn sizes_are_in_their_largest_unit() {
        let sizes = [
            (999, "999 B"),
            (1_000, "1.0 kB"),
            (99_999, "99.9 kB"),
            (100_000, "100 kB"),
            (16_150_000, "16.1 MB"),
            (1_234_000_000_000_000, "1,234 TB"),
        ];
        for (bytes, text) in sizes {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn a_percentage_is_rounded_down_and_at_most_100() {
        assert_eq!(
            [percent(0, 0), percent(999, 1_000), percent(3, 2), percent(u64::MAX, u64::MAX)],
            [0, 99, 100, 100]
        );
    }

    #[test]
    fn a_text_of_a_client_is_escaped() {
        assert!(state("<script>").0.contains("&lt;script&gt;"));
    }
}

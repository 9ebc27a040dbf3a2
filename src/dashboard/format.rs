//! Formats numbers, times, durations and states as text, and renders them as HTML. Numbers have commas and times are in
//! UTC. The script of the dashboard replaces both by the viewer's format and time zone.

use std::time::Duration;

use maud::{Markup, html};

use crate::policy::units::UnixMs;

/// Renders the time of day of a recent event.
pub(super) fn render_time_of_day(time: UnixMs) -> Markup {
    let rfc3339 = time.rfc3339();
    let clock = rfc3339.get(11..19).unwrap_or_default().to_owned();
    html! { time datetime=(rfc3339) data-clock { (clock) " UTC" } }
}

/// Renders a number with commas between thousands.
pub(super) fn render_number(number: u64) -> Markup {
    html! { data data-number value=(number) { (format_number(number)) } }
}

/// Renders a number, or a dash if it is unknown.
pub(super) fn render_number_or_dash(amount: Option<u64>) -> Markup {
    match amount {
        Some(amount) => render_number(amount),
        None => render_dash(),
    }
}

/// Renders the dash that stands for an unknown number or time.
pub(super) fn render_dash() -> Markup {
    html! { span.muted title="unknown" { "–" } }
}

/// Renders a time, which is given in RFC 3339, as its date and minute. A malformed time is rendered as it is.
pub(super) fn render_time(rfc3339: &str) -> Markup {
    let text = match UnixMs::parse(rfc3339) {
        Some(time) => time.date_and_minute(),
        None => rfc3339.to_owned(),
    };
    html! { time datetime=(rfc3339) { (text) } }
}

/// Renders a time, or a dash if it is unknown.
pub(super) fn render_time_or_dash(rfc3339: Option<&str>) -> Markup {
    match rfc3339 {
        Some(text) => render_time(text),
        None => render_dash(),
    }
}

/// Formats the time from `now` to a later time, such as `in 3 h`. Returns `now` for an earlier or malformed time.
pub(super) fn format_time_until(rfc3339: &str, now: UnixMs) -> String {
    match UnixMs::parse(rfc3339) {
        Some(time) if time > now => format!("in {}", format_duration(time.since(now))),
        Some(_) | None => "now".to_owned(),
    }
}

/// Formats a duration in its largest unit, rounded down.
pub(super) fn format_duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3_600 => format!("{} min", seconds / 60),
        3_600..172_800 => format!("{} h", seconds / 3_600),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// Formats the duration of a request. Below 10 s, it is more exact than [`format_duration`].
pub(super) fn format_latency(duration: Duration) -> String {
    let milliseconds = duration.as_millis();
    match milliseconds {
        0..1_000 => format!("{milliseconds} ms"),
        1_000..10_000 => format!("{}.{} s", milliseconds / 1_000, milliseconds % 1_000 / 100),
        _ => format_duration(duration),
    }
}

/// Formats a number of bytes in its largest decimal unit, such as `16.1 MB`.
pub(super) fn format_size(bytes: u64) -> String {
    let units = [("kB", 1_000_u64), ("MB", 1_000_000), ("GB", 1_000_000_000), ("TB", 1_000_000_000_000)];
    match units.into_iter().rev().find(|(_, unit)| bytes >= *unit) {
        None => format!("{bytes} B"),
        Some((name, unit)) if bytes / unit < 100 => {
            format!("{}.{} {name}", bytes / unit, bytes % unit * 10 / unit)
        }
        Some((name, unit)) => format!("{} {name}", format_number(bytes / unit)),
    }
}

/// Formats a number with commas between thousands, such as `1,234`.
pub(super) fn format_number(number: u64) -> String {
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

/// Returns the percentage of `part` in `whole`, rounded down and at most 100.
pub(super) fn percentage(part: u64, whole: u64) -> u64 {
    let hundredfold = u128::from(part) * 100;
    hundredfold
        .checked_div(u128::from(whole))
        .map_or(0, |percent| u64::try_from(percent.min(100)).unwrap_or(100))
}

/// Renders a state as an icon and a word, so that a viewer need not see its color.
pub(super) fn render_state(name: &str) -> Markup {
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

/// Renders a meter of used credits, with the numbers as text. `label` names the key or workspace.
pub(super) fn render_credits_meter(label: &str, used: u64, limit: Option<u64>) -> Markup {
    let Some(limit) = limit else {
        return html! { (render_number(used)) span.muted { " used, limit unknown" } };
    };
    let percent = percentage(used, limit);
    html! {
        (render_usage_meter(label, percent, "of credits used"))
        span.small { (render_number(used)) span.muted { " of " } (render_number(limit)) span.muted { " (" (percent) " %)" } }
    }
}

/// Renders a meter, whose color changes at 80 and 95 percent. `label` names the measured quota or credits, and `of`
/// continues the text after the percentage, such as `of credits used`.
pub(super) fn render_usage_meter(label: &str, percent: u64, of: &str) -> Markup {
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
            assert_eq!(format_number(number), text);
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
            assert_eq!(format_duration(Duration::from_secs(seconds)), text);
        }
        let latencies = [(7, "7 ms"), (999, "999 ms"), (1_450, "1.4 s"), (12_000, "12 s")];
        for (milliseconds, text) in latencies {
            assert_eq!(format_latency(Duration::from_millis(milliseconds)), text);
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
            assert_eq!(format_size(bytes), text);
        }
    }

    #[test]
    fn a_percentage_is_rounded_down_and_at_most_100() {
        assert_eq!(
            [percentage(0, 0), percentage(999, 1_000), percentage(3, 2), percentage(u64::MAX, u64::MAX)],
            [0, 99, 100, 100]
        );
    }

    #[test]
    fn an_unknown_state_is_escaped() {
        let html = render_state("<script>").0;
        assert!(html.contains("&lt;script&gt;"), "{html} must contain the state as text");
    }
}

//! Renders the overview: whether requests can be served, the credits and the requests of the last minutes, a list of
//! keys, and charts of the last day. The list has up to 12 keys, and begins with those that are not active.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use maud::{Markup, html};

use super::{render_history_error, render_key_name};
use crate::admin::{Admin, KeyDocument, OverviewDocument};
use crate::dashboard::PageRequest;
use crate::dashboard::chart::{Chart, ChartStyle, ValueUnit};
use crate::dashboard::format::{
    format_duration, format_latency, format_number, format_time_until, percentage, render_credits_meter,
    render_dash, render_number, render_state, render_time, render_time_or_dash, render_usage_meter,
};
use crate::dashboard::headline::{Headline, KnownCredits, earliest_after};
use crate::dashboard::history_cache::CHART_SPAN;
use crate::policy::retention::start_of_hour;
use crate::policy::units::UnixMs;
use crate::store::{HistoryError, HourOfKey};
use crate::telemetry::{RecentRequests, TimelineInterval};

/// The time before now that the numbers about requests cover.
const RECENT_SPAN: Duration = Duration::from_secs(300);
/// Maximum number of keys in the list.
const MAX_LISTED_KEYS: usize = 12;
/// Maximum number of series in the chart of credits. Keys that used fewer credits share the last series.
const MAX_SERIES: usize = 8;

/// Renders the page.
pub(in crate::dashboard) async fn render_overview(request: &PageRequest<'_>) -> Markup {
    let hours = request.history.credits_by_hour(&request.admin.history, request.now).await;
    let admin = request.admin.clone();
    request.overview.render_once(move |now| render_content(&admin, &hours, now)).await
}

/// Renders the content of the page, which is the same for all viewers.
fn render_content(admin: &Admin, hours: &Result<Arc<Vec<HourOfKey>>, HistoryError>, now: UnixMs) -> Markup {
    let (overview, keys) = admin.overview_and_keys(now);
    let headline = Headline::new(&overview, &keys, now);
    let recent = admin.timeline.recent(now, RECENT_SPAN);
    let intervals = admin.timeline.intervals(now);
    let is_unused = intervals.iter().all(|interval| interval.requests == 0)
        && hours.as_ref().is_ok_and(|hours| hours.is_empty());
    html! {
        h1.hidden { "Overview" }
        section.headline.(headline.urgency.class()) aria-label="State" {
            p.question { "Can requests be served?" }
            p.answer { span aria-hidden="true" { (headline.urgency.icon()) } " " (headline.title) }
            p { (headline.detail) }
        }
        @if is_unused {
            p.notice.warn { span aria-hidden="true" { "▲ " } "No request has been served yet. " a href="connect" { "Connect an app" } " by changing its base URL." }
        }
        (render_tiles(&overview, &keys, &recent, now))
        (render_key_list(&keys, now))
        @match hours {
            Ok(hours) => (render_credits_chart(hours, now)),
            Err(error) => (render_history_error(error)),
        }
        div.pair { (render_first_byte_chart(&intervals)) (render_requests_chart(&intervals)) }
    }
}

/// Renders the most important numbers, each with its unit.
fn render_tiles(
    overview: &OverviewDocument,
    keys: &[KeyDocument],
    recent: &RecentRequests,
    now: UnixMs,
) -> Markup {
    let credits = &overview.credits;
    let known = KnownCredits::new(keys);
    let next_reset = earliest_after(keys.iter().filter_map(|key| key.resets_at.as_deref()), now);
    html! {
        dl.tiles {
            div { dt { "Credits left" }
                dd { @if known.limit == 0 { strong { (render_dash()) } } @else {
                    strong { (render_number(known.remaining)) }
                    (render_usage_meter("All workspaces", percentage(known.used, known.limit), "of credits used"))
                    span.small.muted { "of " (render_number(known.limit)) ", " (percentage(known.used, known.limit)) " % used" @if !known.is_complete { "; without keys of unknown credits" } }
                } } }
            div { dt { "Consumption" }
                dd { strong { (render_number(credits.per_day)) } span.small.muted { "credits per day, by the last hours" } } }
            div { dt { "Credits run out" }
                dd { @match credits.exhausted_at.as_deref() {
                    Some(at) => { strong { (format_time_until(at, now)) } span.small { (render_time(at)) } },
                    None => { strong { "no" } span.small.muted { "not before their reset, at the current rate" } },
                } } }
            div { dt { "Next reset" }
                dd { @match next_reset {
                    Some(at) => { strong { "in " (format_duration(at.since(now))) } span.small { (render_time(&at.rfc3339_seconds())) } },
                    None => strong { (render_dash()) },
                } } }
            div { dt { "Requests" }
                dd { strong { (format_requests_per_minute(recent)) } span.small.muted { "per minute, last 5 minutes; " span data-field="requests.in_flight" { (render_number(overview.requests.in_flight)) } " running, " span data-field="requests.queued" { (render_number(overview.requests.queued as u64)) } " queued" } } }
            div { dt { "Failed requests" }
                dd { strong { @match recent.requests { 0 => (render_dash()), requests => { (percentage(recent.failed, requests)) " %" } } }
                    span.small.muted { (format_number(recent.failed)) " of " (format_number(recent.requests)) " got no response, or a status from 500, in the last 5 minutes" } } }
            div { dt { "First byte" }
                dd { @match &recent.first_byte {
                    Some(times) => { strong { (format_latency(times.p50)) } span.small.muted { "median; 95 % within " (format_latency(times.p95)) } },
                    None => strong { (render_dash()) },
                } } }
            div { dt { "Failovers" }
                dd { strong { (render_number(recent.retries)) } span.small.muted { "attempts were repeated with another key in the last 5 minutes" } } }
        }
    }
}

/// Formats the rate of requests, with a decimal place below 10.
fn format_requests_per_minute(recent: &RecentRequests) -> String {
    let rate = recent.requests_per_minute();
    if rate >= 10.0 || rate == 0.0 { format!("{rate:.0}") } else { format!("{rate:.1}") }
}

/// Renders a list of the keys that are not active, followed by active keys, up to [`MAX_LISTED_KEYS`].
fn render_key_list(keys: &[KeyDocument], now: UnixMs) -> Markup {
    let mut listed: Vec<&KeyDocument> = keys.iter().collect();
    listed.sort_by_key(|key| key.state == "active");
    listed.truncate(MAX_LISTED_KEYS);
    html! {
        section {
            h2 { "Keys" }
            div.scroll tabindex="0" role="region" aria-label="Table: Keys" {
                table.cards {
                    caption.hidden { "Keys, those that cannot serve requests first" }
                    thead { tr { th scope="col" { "Key" } th scope="col" { "State" } th scope="col" { "Credits" } th scope="col" { "Reset" } th scope="col" { "Reason" } } }
                    tbody {
                        @for key in listed {
                            tr data-key=(key.id) {
                                th scope="row" { (render_key_name(key)) }
                                td data-cell="state" { (render_state(key.state)) }
                                td data-cell="credits" { (render_credits_meter(key.name.as_deref().unwrap_or(&key.short_key), key.credits_used, key.credits_limit)) }
                                td data-label="Reset" { (render_time_or_dash(key.resets_at.as_deref())) }
                                td data-label="Reason" { (render_reason(key, now)) }
                            }
                        }
                    }
                }
            }
            @if keys.len() > MAX_LISTED_KEYS { p { a href="keys" { "All " (keys.len()) " keys" } } }
        }
    }
}

/// Renders the reason for the state of a key and the end of the state, or a dash if it has neither. A reason that
/// repeats the state is left out.
pub(super) fn render_reason(key: &KeyDocument, now: UnixMs) -> Markup {
    let reason = key.reason.as_deref().filter(|reason| *reason != key.state);
    html! {
        @if let Some(reason) = reason { (reason.replace('_', " ")) " " }
        @if let Some(end) = &key.until { span.muted { "until " (render_time(end)) " (" (format_time_until(end, now)) ")" } }
        @if reason.is_none() && key.until.is_none() { span.muted.none { "–" } }
    }
}

/// Renders a chart of the credits that each key has used in each hour. `hours` has an entry for each key and hour.
fn render_credits_chart(hours: &[HourOfKey], now: UnixMs) -> Markup {
    let mut totals: HashMap<&str, u64> = HashMap::new();
    for hour in hours {
        *totals.entry(&hour.key_hash).or_default() += hour.credits;
    }
    let mut ranked: Vec<(&str, u64)> = totals.into_iter().filter(|(_, credits)| *credits > 0).collect();
    ranked.sort_by_key(|(key, credits)| (std::cmp::Reverse(*credits), *key));
    let has_other_keys = ranked.len() > MAX_SERIES;
    let named_count = if has_other_keys { MAX_SERIES - 1 } else { ranked.len() };
    let columns: HashMap<&str, usize> =
        ranked.iter().enumerate().map(|(index, (key, _))| (*key, index.min(named_count))).collect();
    let mut series: Vec<String> =
        ranked.iter().take(named_count).map(|(key, _)| series_name(hours, key)).collect();
    if has_other_keys {
        series.push("other keys".to_owned());
    }
    let first = start_of_hour(now.minus(CHART_SPAN));
    let mut rows: Vec<(UnixMs, Vec<Option<u64>>)> =
        (0..=24_u64).map(|hour| (UnixMs(first.0 + hour * 3_600_000), vec![Some(0); series.len()])).collect();
    for hour in hours {
        let row = usize::try_from(hour.hour.since(first).as_secs() / 3_600).unwrap_or(usize::MAX);
        let Some(column) = columns.get(hour.key_hash.as_str()) else { continue };
        if let Some(Some(value)) = rows.get_mut(row).and_then(|(_, values)| values.get_mut(*column)) {
            *value += hour.credits;
        }
    }
    let total: u64 = ranked.iter().map(|(_, credits)| credits).sum();
    let description = match ranked.first() {
        Some((most, _)) => format!(
            "{} credits were used in the last 24 hours, most of them by {}.",
            format_number(total),
            series_name(hours, most)
        ),
        None => "No credits were used in the last 24 hours.".to_owned(),
    };
    Chart {
        title: "Credits by key, last 24 hours",
        description,
        unit: ValueUnit::Credits,
        style: ChartStyle::StackedBars(Duration::from_secs(3_600)),
        series,
        rows,
    }
    .render()
}

/// Returns the name of the series of a key. A key with neither a name nor a short form belongs to a client.
fn series_name(hours: &[HourOfKey], key: &str) -> String {
    let hour = hours.iter().find(|hour| hour.key_hash == key);
    let name = hour.and_then(|hour| hour.key_name.clone().or_else(|| hour.short_key.clone()));
    name.unwrap_or_else(|| "keys of clients".to_owned())
}

/// Renders a chart of the time to the first byte.
fn render_first_byte_chart(intervals: &[TimelineInterval]) -> Markup {
    let milliseconds = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    let values = |interval: &TimelineInterval| {
        let times = interval.first_byte.as_ref();
        vec![times.map(|times| milliseconds(times.p50)), times.map(|times| milliseconds(times.p95))]
    };
    Chart {
        title: "Time to first byte",
        description: "The median and the 95th percentile of the time to the first byte, every 5 minutes."
            .to_owned(),
        unit: ValueUnit::Milliseconds,
        style: ChartStyle::Lines,
        series: vec!["median".to_owned(), "95 %".to_owned()],
        rows: intervals.iter().map(|interval| (interval.start, values(interval))).collect(),
    }
    .render()
}

/// Renders a chart of the requests, failovers and failed requests.
fn render_requests_chart(intervals: &[TimelineInterval]) -> Markup {
    let sum = |count: fn(&TimelineInterval) -> u64| intervals.iter().map(count).fold(0, u64::saturating_add);
    let description = format!(
        "{} requests, {} failovers and {} failed requests since the start or in the last 24 hours.",
        format_number(sum(|interval| interval.requests)),
        format_number(sum(|interval| interval.retries)),
        format_number(sum(|interval| interval.failed))
    );
    let values = |interval: &TimelineInterval| {
        vec![Some(interval.requests), Some(interval.retries), Some(interval.failed)]
    };
    Chart {
        title: "Requests and failovers",
        description,
        unit: ValueUnit::Requests,
        style: ChartStyle::Lines,
        series: vec!["requests".to_owned(), "failovers".to_owned(), "failed".to_owned()],
        rows: intervals.iter().map(|interval| (interval.start, values(interval))).collect(),
    }
    .render()
}

//! The overview: can requests be served, until when, which keys cannot, and how the last day went.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use maud::{Markup, html};

use super::{history_unavailable, key_name};
use crate::admin::{Admin, KeyDocument, OverviewDocument};
use crate::dashboard::PageRequest;
use crate::dashboard::chart::{Chart, Style, ValueUnit};
use crate::dashboard::format::{
    credits_meter, grouped, known_time, latency, number, percent, span, state, time, unknown, until,
    usage_meter,
};
use crate::dashboard::headline::{Headline, KnownCredits, earliest};
use crate::dashboard::history_cache::CHART_SPAN;
use crate::policy::retention::start_of_hour;
use crate::policy::units::UnixMs;
use crate::store::{HistoryError, HourOfKey};
use crate::telemetry::{RecentRequests, TimelineInterval};

/// The span of the figures about requests.
const RECENT: Duration = Duration::from_secs(300);
/// Maximum keys in the list.
const MAX_KEYS: usize = 12;
/// Maximum series of the chart. The keys that used less share one series.
const MAX_SERIES: usize = 8;

/// Renders the page.
pub(in crate::dashboard) async fn overview(request: &PageRequest<'_>) -> Markup {
    let hours = request.history.hours(&request.admin.history, request.now).await;
    let admin = request.admin.clone();
    request.overview.get(move |now| render(&admin, &hours, now)).await
}

fn render(admin: &Admin, hours: &Result<Arc<Vec<HourOfKey>>, HistoryError>, now: UnixMs) -> Markup {
    let (overview, keys) = admin.overview_and_keys(now);
    let headline = Headline::new(&overview, &keys, now);
    let recent = admin.timeline.recent(now, RECENT);
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
        (tiles(&overview, &keys, &recent, now))
        (key_list(&keys, now))
        @match hours {
            Ok(hours) => (credits_chart(hours, now)),
            Err(error) => (history_unavailable(error)),
        }
        div.pair { (first_byte_chart(&intervals)) (requests_chart(&intervals)) }
    }
}

fn tiles(overview: &OverviewDocument, keys: &[KeyDocument], recent: &RecentRequests, now: UnixMs) -> Markup {
    let credits = &overview.credits;
    let known = KnownCredits::new(keys);
    let next_reset = earliest(keys.iter().filter_map(|key| key.resets_at.as_deref()), now);
    html! {
        dl.tiles {
            div { dt { "Credits left" }
                dd { @if known.limit == 0 { strong { (unknown()) } } @else {
                    strong { (number(known.remaining)) }
                    (usage_meter("All workspaces", percent(known.used, known.limit), "of credits used"))
                    span.small.muted { "of " (number(known.limit)) ", " (percent(known.used, known.limit)) " % used" @if !known.is_complete { "; without keys of unknown credits" } }
                } } }
            div { dt { "Consumption" }
                dd { strong { (number(credits.per_day)) } span.small.muted { "credits per day, by the last hours" } } }
            div { dt { "Credits run out" }
                dd { @match credits.exhausted_at.as_deref() {
                    Some(at) => { strong { (until(at, now)) } span.small { (time(at)) } },
                    None => { strong { "no" } span.small.muted { "not before their reset, at the current rate" } },
                } } }
            div { dt { "Next reset" }
                dd { @match next_reset {
                    Some(at) => { strong { "in " (span(at.since(now))) } span.small { (time(&at.rfc3339_seconds())) } },
                    None => strong { (unknown()) },
                } } }
            div { dt { "Requests" }
                dd { strong { (per_minute(recent)) } span.small.muted { "per minute, last 5 minutes; " span data-field="requests.in_flight" { (number(overview.requests.in_flight)) } " running, " span data-field="requests.queued" { (number(overview.requests.queued as u64)) } " queued" } } }
            div { dt { "Failed requests" }
                dd { strong { @match recent.requests { 0 => (unknown()), requests => { (percent(recent.failed, requests)) " %" } } }
                    span.small.muted { (grouped(recent.failed)) " of " (grouped(recent.requests)) " got no response, or a status from 500, in the last 5 minutes" } } }
            div { dt { "First byte" }
                dd { @match &recent.first_byte {
                    Some(times) => { strong { (latency(times.p50)) } span.small.muted { "median; 95 % within " (latency(times.p95)) } },
                    None => strong { (unknown()) },
                } } }
            div { dt { "Failovers" }
                dd { strong { (number(recent.retries)) } span.small.muted { "attempts were repeated with another key in the last 5 minutes" } } }
        }
    }
}

fn per_minute(recent: &RecentRequests) -> String {
    let rate = recent.requests_per_minute();
    if rate >= 10.0 || rate == 0.0 { format!("{rate:.0}") } else { format!("{rate:.1}") }
}

/// The keys that need attention, and then others up to [`MAX_KEYS`].
fn key_list(keys: &[KeyDocument], now: UnixMs) -> Markup {
    let mut listed: Vec<&KeyDocument> = keys.iter().collect();
    listed.sort_by_key(|key| key.state == "active");
    listed.truncate(MAX_KEYS);
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
                                th scope="row" { (key_name(key)) }
                                td data-cell="state" { (state(key.state)) }
                                td data-cell="credits" { (credits_meter(key.name.as_deref().unwrap_or(&key.short_key), key.credits_used, key.credits_limit)) }
                                td data-label="Reset" { (known_time(key.resets_at.as_deref())) }
                                td data-label="Reason" { (reason(key, now)) }
                            }
                        }
                    }
                }
            }
            @if keys.len() > MAX_KEYS { p { a href="keys" { "All " (keys.len()) " keys" } } }
        }
    }
}

/// Why a key is not used, and until when. A reason that is the same word as the state is left out.
pub(super) fn reason(key: &KeyDocument, now: UnixMs) -> Markup {
    let reason = key.reason.as_deref().filter(|reason| *reason != key.state);
    html! {
        @if let Some(reason) = reason { (reason.replace('_', " ")) " " }
        @if let Some(end) = &key.until { span.muted { "until " (time(end)) " (" (until(end, now)) ")" } }
        @if reason.is_none() && key.until.is_none() { span.muted.none { "–" } }
    }
}

/// The credits of each key by hour.
fn credits_chart(hours: &[HourOfKey], now: UnixMs) -> Markup {
    let mut totals: HashMap<&str, u64> = HashMap::new();
    for hour in hours {
        *totals.entry(&hour.key_hash).or_default() += hour.credits;
    }
    let mut ranked: Vec<(&str, u64)> = totals.into_iter().filter(|(_, credits)| *credits > 0).collect();
    ranked.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(b.0)));
    let has_rest = ranked.len() > MAX_SERIES;
    let named = if has_rest { MAX_SERIES - 1 } else { ranked.len() };
    let index: HashMap<&str, usize> =
        ranked.iter().enumerate().map(|(index, (key, _))| (*key, index.min(named))).collect();
    let mut series: Vec<String> = ranked.iter().take(named).map(|(key, _)| series_name(hours, key)).collect();
    if has_rest {
        series.push("other keys".to_owned());
    }
    let first = start_of_hour(now.minus(CHART_SPAN));
    let mut rows: Vec<(UnixMs, Vec<Option<u64>>)> =
        (0..=24_u64).map(|hour| (UnixMs(first.0 + hour * 3_600_000), vec![Some(0); series.len()])).collect();
    for hour in hours {
        let row = usize::try_from(hour.hour.since(first).as_secs() / 3_600).unwrap_or(usize::MAX);
        let Some(column) = index.get(hour.key_hash.as_str()) else { continue };
        if let Some(Some(value)) = rows.get_mut(row).and_then(|(_, values)| values.get_mut(*column)) {
            *value += hour.credits;
        }
    }
    let total: u64 = ranked.iter().map(|(_, credits)| credits).sum();
    let description = match ranked.first() {
        Some((most, _)) => format!(
            "{} credits were used in the last 24 hours, most of them by {}.",
            grouped(total),
            series_name(hours, most)
        ),
        None => "No credits were used in the last 24 hours.".to_owned(),
    };
    Chart {
        title: "Credits by key, last 24 hours",
        description,
        unit: ValueUnit::Credits,
        style: Style::StackedBars(Duration::from_secs(3_600)),
        series,
        rows,
    }
    .render()
}

fn series_name(hours: &[HourOfKey], key: &str) -> String {
    let hour = hours.iter().find(|hour| hour.key_hash == key);
    let name = hour.and_then(|hour| hour.key_name.clone().or_else(|| hour.short_key.clone()));
    name.unwrap_or_else(|| "keys of clients".to_owned())
}

fn first_byte_chart(intervals: &[TimelineInterval]) -> Markup {
    let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    let values = |interval: &TimelineInterval| {
        let times = interval.first_byte.as_ref();
        vec![times.map(|times| ms(times.p50)), times.map(|times| ms(times.p95))]
    };
    Chart {
        title: "Time to first byte",
        description: "The median and the 95th percentile of the time to the first byte, every 5 minutes."
            .to_owned(),
        unit: ValueUnit::Milliseconds,
        style: Style::Lines,
        series: vec!["median".to_owned(), "95 %".to_owned()],
        rows: intervals.iter().map(|interval| (interval.start, values(interval))).collect(),
    }
    .render()
}

fn requests_chart(intervals: &[TimelineInterval]) -> Markup {
    let sum = |count: fn(&TimelineInterval) -> u64| intervals.iter().map(count).fold(0, u64::saturating_add);
    let description = format!(
        "{} requests, {} failovers and {} failed requests since the start or in the last 24 hours.",
        grouped(sum(|interval| interval.requests)),
        grouped(sum(|interval| interval.retries)),
        grouped(sum(|interval| interval.failed))
    );
    let values = |interval: &TimelineInterval| {
        vec![Some(interval.requests), Some(interval.retries), Some(interval.failed)]
    };
    Chart {
        title: "Requests and failovers",
        description,
        unit: ValueUnit::Requests,
        style: Style::Lines,
        series: vec!["requests".to_owned(), "failovers".to_owned(), "failed".to_owned()],
        rows: intervals.iter().map(|interval| (interval.start, values(interval))).collect(),
    }
    .render()
}

//! Sums of attempts and credits by day, key, client, user, region, model or route.

use std::collections::HashMap;
use std::time::Duration;

use maud::{Markup, html};

use super::history_unavailable;
use crate::dashboard::PageRequest;
use crate::dashboard::chart::{Chart, Style, ValueUnit};
use crate::dashboard::form::Form;
use crate::dashboard::format::{grouped, number, percent, size, time};
use crate::policy::units::UnixMs;
use crate::store::{UsageDimension, UsageFilter, UsageRow};

/// The periods that can be chosen.
const PERIODS: [(&str, &str, u64); 4] =
    [("1d", "24 hours", 1), ("7d", "7 days", 7), ("30d", "30 days", 30), ("365d", "1 year", 365)];
/// Maximum rows of the table: more than the hours of a month.
const MAX_ROWS: usize = 1_000;

/// The sums that a page or a download shows.
pub(in crate::dashboard) struct UsageQuery {
    pub(in crate::dashboard) dimension: UsageDimension,
    pub(in crate::dashboard) period: &'static str,
    since: UnixMs,
    until: UnixMs,
}

impl UsageQuery {
    /// Parses the parameters `by` and `since`. Unknown values count as missing.
    pub(in crate::dashboard) fn parse(query: &Form, now: UnixMs) -> Self {
        let by = query.value("by").unwrap_or("day");
        let dimension = UsageDimension::ALL.into_iter().find(|dimension| dimension.as_str() == by);
        let since = query.value("since").unwrap_or("7d");
        let (period, _, days) =
            PERIODS.into_iter().find(|(period, ..)| *period == since).unwrap_or(PERIODS[1]);
        Self {
            dimension: dimension.unwrap_or(UsageDimension::Day),
            period,
            since: now.minus(Duration::from_secs(days * 86_400)),
            until: UnixMs(now.0.saturating_add(1)),
        }
    }

    /// Returns whether a chart has few enough bars. The hours of a year would not be visible.
    fn is_drawable(&self) -> bool {
        self.dimension == UsageDimension::Day || self.period != "365d"
    }

    /// Returns the filter for at most `limit` rows.
    pub(in crate::dashboard) fn filter(&self, limit: usize) -> UsageFilter {
        let Self { dimension, since, until, .. } = *self;
        UsageFilter { since, until, dimension, client: None, limit }
    }
}

/// Renders the page.
pub(in crate::dashboard) async fn usage(request: &PageRequest<'_>) -> Markup {
    let query = UsageQuery::parse(&request.query, request.now);
    let rows = request.admin.history.usage(query.filter(MAX_ROWS)).await;
    let by = query.dimension.as_str();
    html! {
        h1 { "Usage" }
        form.filter method="get" action="usage" {
            label { "By" select name="by" {
                @for dimension in UsageDimension::ALL { option value=(dimension.as_str()) selected[dimension == query.dimension] { (dimension.as_str()) } }
            } }
            label { "Period" select name="since" {
                @for (value, text, _) in PERIODS { option value=(value) selected[value == query.period] { (text) } }
            } }
            button type="submit" { "Show" }
            a href={ "usage.csv?by=" (by) "&since=" (query.period) } download={ "keychoir-usage-" (by) ".csv" } { "Download CSV" }
        }
        @match &rows {
            Err(error) => (history_unavailable(error)),
            Ok(rows) => {
                @if query.dimension.is_time() && query.is_drawable() { (time_chart(rows, &query)) }
                (table(rows, query.dimension))
            },
        }
    }
}

/// The credits of each day or hour, also of those without any.
fn time_chart(rows: &[UsageRow], query: &UsageQuery) -> Markup {
    let period = Duration::from_secs(if query.dimension == UsageDimension::Hour { 3_600 } else { 86_400 });
    let total = rows.iter().map(|row| row.sums.credits).fold(0, u64::saturating_add);
    let credits: HashMap<u64, u64> =
        rows.iter().filter_map(|row| Some((UnixMs::parse(&row.group)?.0, row.sums.credits))).collect();
    let period_ms = u64::try_from(period.as_millis()).unwrap_or(u64::MAX);
    let first = query.since.0 - query.since.0 % period_ms;
    let starts = (0..).map(|index| first + index * period_ms).take_while(|start| *start < query.until.0);
    let rows = starts.map(|start| (UnixMs(start), vec![Some(credits.get(&start).copied().unwrap_or(0))]));
    Chart {
        title: "Credits",
        description: format!("{} credits were used in this period.", grouped(total)),
        unit: ValueUnit::Credits,
        style: Style::StackedBars(period),
        series: vec!["credits".to_owned()],
        rows: rows.collect(),
    }
    .render()
}

fn table(rows: &[UsageRow], dimension: UsageDimension) -> Markup {
    let most = rows.iter().map(|row| row.sums.credits).max().unwrap_or_default();
    html! {
        div.scroll tabindex="0" role="region" aria-label="Table: Usage" {
            table {
                caption.hidden { "Usage by " (dimension.as_str()) }
                thead { tr {
                    th scope="col" { (dimension.as_str()) } th.number scope="col" { "Credits" } th scope="col" { span.hidden { "Share of the largest" } }
                    th.number scope="col" { "Attempts" } th.number scope="col" { "Served" } th.number scope="col" { "Failed" }
                    th.number scope="col" { "Characters" } th.number scope="col" { "Responses" }
                } }
                tbody {
                    @for row in rows {
                        @let sums = row.sums;
                        tr {
                            th scope="row" { (group(row, dimension)) }
                            td.number { (number(sums.credits)) }
                            td { progress max="100" value=(percent(sums.credits, most)) aria-label={ (percent(sums.credits, most)) " % of the largest" } {} }
                            td.number { (number(sums.attempts)) }
                            td.number { (number(sums.served)) }
                            td.number { (number(sums.attempts.saturating_sub(sums.served))) }
                            td.number { (number(sums.characters)) }
                            td.number { (size(sums.response_bytes)) }
                        }
                    }
                    @if rows.is_empty() { tr { td colspan="8" { "No attempts were recorded in this period." } } }
                }
            }
        }
        @if rows.len() == MAX_ROWS { p.muted { "The table ends after " (MAX_ROWS) " rows." } }
    }
}

fn group(row: &UsageRow, dimension: UsageDimension) -> Markup {
    match dimension {
        // A day is one of UTC, also for a viewer in another zone.
        UsageDimension::Day => return html! { (row.group.get(..10).unwrap_or(&row.group)) },
        UsageDimension::Hour => return time(&row.group),
        UsageDimension::Key
        | UsageDimension::Client
        | UsageDimension::User
        | UsageDimension::Region
        | UsageDimension::Model
        | UsageDimension::Route => {}
    }
    let name = row.key_name.as_deref().or(row.short_key.as_deref());
    match (name, row.group.as_str()) {
        (Some(name), _) => html! { (name) },
        (None, "") => html! { span.muted { "none" } },
        (None, "own") if dimension == UsageDimension::Key => html! { "keys of clients" },
        (None, group) => html! { (group) },
    }
}

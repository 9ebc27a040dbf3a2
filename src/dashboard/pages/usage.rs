//! Renders the page Usage: sums of attempts and credits by hour, day, key, client, user, region, model or route, and a
//! chart for hours and days. Also parses the query, which the CSV download has as well.

use std::collections::HashMap;
use std::time::Duration;

use maud::{Markup, html};

use super::render_history_error;
use crate::dashboard::PageRequest;
use crate::dashboard::chart::{Chart, ChartStyle, ValueUnit};
use crate::dashboard::form::Form;
use crate::dashboard::format::{format_number, format_size, percentage, render_number, render_time};
use crate::policy::units::UnixMs;
use crate::store::{UsageDimension, UsageFilter, UsageRow};

/// The periods that can be chosen, each with its value in the query, its name and its number of days.
const PERIODS: [(&str, &str, u64); 4] =
    [("1d", "24 hours", 1), ("7d", "7 days", 7), ("30d", "30 days", 30), ("365d", "1 year", 365)];
/// The period without a known value in the query.
const DEFAULT_PERIOD: (&str, &str, u64) = PERIODS[1];
/// Maximum number of rows of the table. It exceeds the 744 hours of a month.
const MAX_ROWS: usize = 1_000;

/// The query for the sums that the page or the CSV file contains.
pub(in crate::dashboard) struct UsageQuery {
    pub(in crate::dashboard) dimension: UsageDimension,
    /// The value of the period in the query, from [`PERIODS`].
    pub(in crate::dashboard) period: &'static str,
    since: UnixMs,
    until: UnixMs,
}

impl UsageQuery {
    /// Parses the parameters `by` and `since`. A missing or unknown value is replaced by `day` or [`DEFAULT_PERIOD`].
    pub(in crate::dashboard) fn parse(query: &Form, now: UnixMs) -> Self {
        let by = query.value("by").unwrap_or("day");
        let dimension = UsageDimension::ALL.into_iter().find(|dimension| dimension.as_str() == by);
        let since = query.value("since").unwrap_or(DEFAULT_PERIOD.0);
        let (period, _, days) =
            PERIODS.into_iter().find(|(period, ..)| *period == since).unwrap_or(DEFAULT_PERIOD);
        Self {
            dimension: dimension.unwrap_or(UsageDimension::Day),
            period,
            since: now.minus(Duration::from_secs(days * 86_400)),
            until: UnixMs(now.0.saturating_add(1)),
        }
    }

    /// Returns whether the bars of a chart are wide enough. The bars of the 8,760 hours of a year would be invisible.
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
pub(in crate::dashboard) async fn render_usage(request: &PageRequest<'_>) -> Markup {
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
            Err(error) => (render_history_error(error)),
            Ok(rows) => {
                @if query.dimension.is_time() && query.is_drawable() { (render_time_chart(rows, &query)) }
                (render_table(rows, query.dimension))
            },
        }
    }
}

/// Renders a chart of the credits of each day or hour, including days and hours without credits.
fn render_time_chart(rows: &[UsageRow], query: &UsageQuery) -> Markup {
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
        description: format!("{} credits were used in this period.", format_number(total)),
        unit: ValueUnit::Credits,
        style: ChartStyle::StackedBars(period),
        series: vec!["credits".to_owned()],
        rows: rows.collect(),
    }
    .render()
}

/// Renders the table of sums.
fn render_table(rows: &[UsageRow], dimension: UsageDimension) -> Markup {
    let max_credits = rows.iter().map(|row| row.sums.credits).max().unwrap_or_default();
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
                            th scope="row" { (render_group(row, dimension)) }
                            td.number { (render_number(sums.credits)) }
                            td { progress max="100" value=(percentage(sums.credits, max_credits)) aria-label={ (percentage(sums.credits, max_credits)) " % of the largest" } {} }
                            td.number { (render_number(sums.attempts)) }
                            td.number { (render_number(sums.served)) }
                            td.number { (render_number(sums.attempts.saturating_sub(sums.served))) }
                            td.number { (render_number(sums.characters)) }
                            td.number { (format_size(sums.response_bytes)) }
                        }
                    }
                    @if rows.is_empty() { tr { td colspan="8" { "No attempts were recorded in this period." } } }
                }
            }
        }
        @if rows.len() == MAX_ROWS { p.muted { "The table ends after " (MAX_ROWS) " rows." } }
    }
}

/// Renders the name of a group.
fn render_group(row: &UsageRow, dimension: UsageDimension) -> Markup {
    match dimension {
        // Days are in UTC, even for a viewer in another time zone, so the script must not change them.
        UsageDimension::Day => return html! { (row.group.get(..10).unwrap_or(&row.group)) },
        UsageDimension::Hour => return render_time(&row.group),
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

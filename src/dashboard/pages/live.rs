//! Renders the page Live: the requests that have ended, each with its attempts. Keychoir lists the latest requests of
//! the usage database, and the script adds requests that end later.

use maud::{Markup, html};

use super::render_history_error;
use crate::dashboard::PageRequest;
use crate::dashboard::format::{format_latency, render_number, render_time_of_day};
use crate::store::{AttemptFilter, StoredAttempt};

/// Maximum number of attempts whose requests the page lists when it is loaded.
const LISTED_ATTEMPTS: usize = 100;

/// A request with its recorded attempts, the first attempt first.
struct ListedRequest<'a> {
    attempts: Vec<&'a StoredAttempt>,
}

/// Renders the page.
pub(in crate::dashboard) async fn render_live(request: &PageRequest<'_>) -> Markup {
    let failed_only = request.query.value("failed").is_some();
    let filter = AttemptFilter { limit: LISTED_ATTEMPTS, before: None, request_id: None, failed_only };
    let page = request.admin.history.attempts(filter).await;
    html! {
        h1 { "Live" }
        p.muted { "Requests as they end, the latest first. The list contains no text and no identifiers of requests' resources." }
        form.filter method="get" action="live" data-live {
            label data-script hidden { "Filter" input name="q" type="search" placeholder="route, client, key, outcome" autocomplete="off"; }
            label.check { input type="checkbox" name="failed" value="1" checked[failed_only]; " Only attempts that failed" }
            button type="submit" { "Reload" }
            button type="button" data-pause data-script hidden aria-pressed="false" { "Pause" }
            span role="status" data-status {}
        }
        div.scroll tabindex="0" role="region" aria-label="Table: Requests" {
            table.live {
                caption.hidden { "Requests that have ended, the latest first" }
                thead { tr {
                    th scope="col" { "Time" } th scope="col" { "Route" } th scope="col" { "Client" } th scope="col" { "Key" }
                    th scope="col" { "Result" } th scope="col" { "Attempts" } th.number scope="col" { "Duration" } th.number scope="col" { "Credits" }
                } }
                tbody data-requests {
                    @if let Ok(page) = &page {
                        @for request in group_attempts(&page.attempts) { (render_row(&request)) }
                        @if page.attempts.is_empty() { tr data-empty { td colspan="8" { "No request has ended yet." } } }
                    }
                }
            }
        }
        @if let Err(error) = &page { (render_history_error(error)) }
    }
}

/// Groups attempts by their requests. `attempts` begins with the latest attempt, and the result begins with the request
/// of that attempt.
fn group_attempts(attempts: &[StoredAttempt]) -> Vec<ListedRequest<'_>> {
    let mut requests: Vec<ListedRequest<'_>> = Vec::new();
    for attempt in attempts {
        match requests.iter_mut().find(|request| request.attempts[0].request_id == attempt.request_id) {
            Some(request) => request.attempts.insert(0, attempt),
            None => requests.push(ListedRequest { attempts: vec![attempt] }),
        }
    }
    requests
}

/// Renders a request.
fn render_row(request: &ListedRequest<'_>) -> Markup {
    let Some(last) = request.attempts.last() else { return html! {} };
    let milliseconds = request.attempts.iter().map(|attempt| attempt.total_ms).sum();
    let credits = request.attempts.iter().map(|attempt| attempt.credits).sum();
    let earlier_attempts = &request.attempts[..request.attempts.len() - 1];
    let class = if last.outcome == "served" { "ok" } else { "bad" };
    html! {
        tr.(class) data-request=(last.request_id) {
            td { (render_time_of_day(last.started_at)) }
            td { code { (last.method) " " (last.route) } }
            td { (last.client) }
            td { (last.key_name.as_deref().or(last.short_key.as_deref()).unwrap_or("own key")) }
            td { @if let Some(status) = last.status { (status) " " } (last.outcome.replace('_', " ")) }
            td { (request.attempts.len())
                @if !earlier_attempts.is_empty() {
                    span.muted { " after " @for (index, attempt) in earlier_attempts.iter().enumerate() { @if index > 0 { ", " } (attempt.outcome.replace('_', " ")) } }
                } }
            td.number { (format_latency(std::time::Duration::from_millis(milliseconds))) }
            td.number { (render_number(credits)) }
        }
    }
}

//! Renders the page of one key: its state with the reason, its credits, its refusals, and the forms of its actions.
//! Also renders the notice with the result of a key check.

use maud::{Markup, html};
use serde_json::Value;

use super::overview::render_reason;
use crate::admin::{CheckDocument, KeyDocument};
use crate::dashboard::PageRequest;
use crate::dashboard::format::{
    render_credits_meter, render_number, render_number_or_dash, render_state, render_time,
    render_time_or_dash,
};

/// Renders the page.
pub(in crate::dashboard) fn render_key(request: &PageRequest<'_>) -> Markup {
    let id = request.query.value("id").unwrap_or_default();
    let keys = request.admin.keys(request.now);
    let Some(key) = keys.iter().find(|key| key.id == id) else {
        return html! { h1 { "Key" } p { "The pool has no such key. " a href="keys" { "All keys" } } };
    };
    html! {
        p { a href="keys" { "← All keys" } }
        h1 { (key.name.as_deref().unwrap_or(&key.short_key)) }
        dl.facts data-key=(key.id) {
            dt { "State" } dd { span data-cell="state" { (render_state(key.state)) } " " (render_reason(key, request.now)) }
            @if let Some(advice) = key.advice { dt { "What to do" } dd { (advice) } }
            @if let Some(since) = &key.since { dt { "Since" } dd { (render_time(since)) } }
            dt { "Credits" } dd data-cell="credits" { (render_credits_meter("This key", key.credits_used, key.credits_limit)) }
            dt { "Left" } dd { (render_number_or_dash(key.credits_remaining)) }
            dt { "Reserved" } dd { (render_number(key.reserved)) " by running requests" }
            dt { "Consumption" } dd { (render_number(key.credits_per_day)) " per day" }
            dt { "Runs out" } dd { @match &key.exhausted_at { Some(at) => (render_time(at)), None => "not before its reset at the current rate" } }
            dt { "Reset" } dd { (render_time_or_dash(key.resets_at.as_deref())) }
            dt { "Running requests" } dd data-cell="in_flight" { (render_number(key.in_flight.into())) }
            dt { "Short key" } dd { code { (key.short_key) } }
            dt { "Workspace" } dd { (key.workspace.as_deref().unwrap_or("its own")) }
            dt { "Plan" } dd { (key.plan.as_deref().unwrap_or("unknown")) }
            dt { "Source" } dd { (key.source) }
            @if let Some(url) = &key.base_url { dt { "Host" } dd { (url) } }
        }
        (render_refusals("Refusals of this key and its workspace", &key.evidence, &["at", "claim", "strength", "status", "message", "route", "request_id"]))
        (render_refusals("Operations that ElevenLabs refused for this key", &key.restrictions, &["limit", "verdict", "status", "message", "since", "until"]))
        (render_actions(key))
    }
}

/// Renders a table of refusals, unless there are none. `columns` are the members of `rows` that the table shows.
fn render_refusals(title: &str, rows: &[Value], columns: &[&str]) -> Markup {
    html! {
        @if !rows.is_empty() {
            section {
                h2 { (title) }
                div.scroll tabindex="0" role="region" aria-label={ "Table: " (title) } {
                    table {
                        caption.hidden { (title) }
                        thead { tr { @for column in columns { th scope="col" { (column.replace('_', " ")) } } } }
                        tbody { @for row in rows { tr { @for column in columns { td { (render_cell(column, &row[*column])) } } } } }
                    }
                }
            }
        }
    }
}

/// Renders a member of a refusal.
fn render_cell(column: &str, member: &Value) -> Markup {
    match member {
        Value::String(text) if matches!(column, "at" | "since" | "until") => render_time(text),
        Value::String(text) => html! { (text) },
        Value::Null => html! { span.muted { "–" } },
        Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_) => {
            html! { (member.to_string()) }
        }
    }
}

/// Renders the forms that pause, resume, check and remove a key.
fn render_actions(key: &KeyDocument) -> Markup {
    html! {
        section {
            h2 { "Actions" }
            @if key.paused {
                form.inline method="post" action="keys" {
                    input type="hidden" name="id" value=(key.id);
                    button name="action" value="resume" { "Resume" }
                }
            } @else {
                form.fields method="post" action="keys" {
                    input type="hidden" name="id" value=(key.id);
                    label { "Reason " span.muted { "(optional)" } input name="reason" maxlength="200"; }
                    label { "Duration " span.muted { "(optional)" } select name="for" {
                        option value="" { "until it is resumed" }
                        @for (value, text) in [("1h", "1 hour"), ("8h", "8 hours"), ("1d", "1 day"), ("7d", "7 days")] { option value=(value) { (text) } }
                    } }
                    button name="action" value="pause" { "Pause" }
                }
                p.muted { "A paused key gets no new request. Its running requests end normally." }
            }
            form.inline method="post" action="keys" {
                input type="hidden" name="id" value=(key.id);
                button name="action" value="check" { "Check at ElevenLabs" }
            }
            @if key.removable {
                details.danger {
                    summary { "Remove this key" }
                    form.inline method="post" action="keys" {
                        input type="hidden" name="id" value=(key.id);
                        p { "The key gets no new request, and its file is deleted. This cannot be undone." }
                        button.bad name="action" value="remove" { "Remove" }
                    }
                }
            } @else {
                p.muted { "This key comes from the configuration (" (key.source) "), and can be removed only there." }
            }
        }
    }
}

/// Renders the notice with the result of a check.
pub(in crate::dashboard) fn render_check(check: &CheckDocument) -> Markup {
    let name = check.name.as_deref().unwrap_or(&check.short_key);
    let permission = |is_granted: Option<bool>| match is_granted {
        Some(true) => "yes",
        Some(false) => "no",
        None => "unknown",
    };
    html! {
        p { strong { "Check of " (name) ": " (check.outcome.replace('_', " ")) }
            @if let Some(refusal) = &check.refusal { " · HTTP " (refusal.status) " · " (refusal.meaning) }
            @if let Some(reason) = &check.reason { " · " (reason) } }
        dl.facts {
            @if let Some(plan) = &check.plan { dt { "Plan" } dd { (plan) } }
            @if check.credits_limit.is_some() { dt { "Credits left" } dd { (render_number_or_dash(check.credits_remaining)) } }
            @if let Some(reset) = &check.resets_at { dt { "Reset" } dd { (render_time(reset)) } }
            dt { "May read its quota" } dd { (permission(check.permissions.user_read)) }
            dt { "May list models" } dd { (permission(check.permissions.models_read)) }
            @if let Some(maximum) = check.max_concurrent_speech { dt { "Concurrent speech requests" } dd { "at most " (maximum) } }
            dt { "Response after" } dd { (check.latency_ms) " ms" }
        }
    }
}

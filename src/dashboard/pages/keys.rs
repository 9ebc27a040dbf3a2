//! Renders the page Keys: the list of keys with a filter and the buttons of each key, 100 keys at a time, and the form
//! that adds a key.

use maud::{Markup, html};

use super::overview::render_reason;
use super::render_key_name;
use crate::admin::KeyDocument;
use crate::dashboard::PageRequest;
use crate::dashboard::format::{render_credits_meter, render_number, render_state, render_time_or_dash};

/// The number of keys on one page of the list. A browser would render a table of a thousand keys slowly.
const KEYS_PER_PAGE: usize = 100;

/// The states by which the list can be filtered.
const STATES: [&str; 6] = ["active", "near_limit", "rate_limited", "exhausted", "invalid", "paused"];

/// Renders the page.
pub(in crate::dashboard) fn render_keys(request: &PageRequest<'_>) -> Markup {
    let PageRequest { admin, now, ref query, .. } = *request;
    let (wanted_state, wanted_text) = (query.value("state"), query.value("q").unwrap_or_default());
    let all = admin.keys(now);
    let found: Vec<&KeyDocument> = all
        .iter()
        .filter(|key| {
            wanted_state.is_none_or(|wanted| key.state == wanted) && contains_text(key, wanted_text)
        })
        .collect();
    let pages = found.len().div_ceil(KEYS_PER_PAGE).max(1);
    let page = query.value("page").and_then(|page| page.parse::<usize>().ok()).unwrap_or(1).clamp(1, pages);
    let shown = found.iter().skip((page - 1) * KEYS_PER_PAGE).take(KEYS_PER_PAGE);
    let link = |page: usize| {
        let state =
            wanted_state.map(|state| format!("&state={}", encode_query_value(state))).unwrap_or_default();
        format!("keys?page={page}{state}&q={}", encode_query_value(wanted_text))
    };
    html! {
        h1 { "Keys" }
        form.filter method="get" action="keys" {
            label { "Name, short key, workspace" input name="q" value=(wanted_text) type="search"; }
            label { "State" select name="state" {
                option value="" { "all" }
                @for name in STATES { option value=(name) selected[wanted_state == Some(name)] { (name.replace('_', " ")) } }
            } }
            button type="submit" { "Filter" }
            span.muted { (found.len()) " of " (all.len()) " keys" }
            a href="#add" { "Add a key" }
        }
        div.scroll tabindex="0" role="region" aria-label="Table: Keys" {
            table.cards {
                caption.hidden { "Keys in the order of the pool" }
                thead { tr {
                    th scope="col" { "Key" } th scope="col" { "Workspace, plan" } th scope="col" { "State" } th scope="col" { "Credits" }
                    th scope="col" { "Reset" } th.number scope="col" { "Running" } th scope="col" { "Reason" } th scope="col" { "Actions" }
                } }
                tbody {
                    @for key in shown {
                        tr data-key=(key.id) {
                            th scope="row" { (render_key_name(key)) }
                            td data-label="Workspace" { @match &key.workspace { Some(name) => (name), None => span.muted { "own" } } @if let Some(plan) = &key.plan { span.muted { ", " (plan) } } }
                            td data-cell="state" { (render_state(key.state)) }
                            td data-cell="credits" { (render_credits_meter(key.name.as_deref().unwrap_or(&key.short_key), key.credits_used, key.credits_limit)) }
                            td data-label="Reset" { (render_time_or_dash(key.resets_at.as_deref())) }
                            td.number data-label="Running" data-cell="in_flight" { (render_number(key.in_flight.into())) }
                            td data-label="Reason" { (render_reason(key, now)) }
                            td { (render_actions(key)) }
                        }
                    }
                    @if found.is_empty() { tr { td colspan="8" { "No key matches the filter." } } }
                }
            }
        }
        @if pages > 1 {
            nav.pages aria-label="Pages of keys" {
                @if page > 1 { a href=(link(page - 1)) rel="prev" { "Previous" } }
                span { "Page " (page) " of " (pages) }
                @if page < pages { a href=(link(page + 1)) rel="next" { "Next" } }
            }
        }
        (render_add_form(request))
    }
}

/// Returns whether the name, the short key or the workspace of a key contains `text`. Upper and lower case are equal.
fn contains_text(key: &KeyDocument, text: &str) -> bool {
    let text = text.to_lowercase();
    let contains = |part: Option<&str>| part.is_some_and(|part| part.to_lowercase().contains(&text));
    contains(key.name.as_deref()) || contains(Some(&key.short_key)) || contains(key.workspace.as_deref())
}

/// Renders the buttons of a key. The button for a pause sets no reason and no end. The page of the key has fields for
/// both.
fn render_actions(key: &KeyDocument) -> Markup {
    let name = key.name.as_deref().unwrap_or(&key.short_key);
    html! {
        form.inline method="post" action="keys" {
            input type="hidden" name="id" value=(key.id);
            @if key.paused {
                button name="action" value="resume" aria-label={ "Resume " (name) } { "Resume" }
            } @else {
                button name="action" value="pause" aria-label={ "Pause " (name) } { "Pause" }
            }
            button name="action" value="check" aria-label={ "Check " (name) } { "Check" }
        }
    }
}

/// Renders the form that adds a key. The query may contain values for its fields.
fn render_add_form(request: &PageRequest<'_>) -> Markup {
    let prefilled = |name: &str| request.query.value(name).unwrap_or_default();
    html! {
        section #add {
            h2 { "Add a key" }
            form.fields method="post" action="keys" autocomplete="off" {
                label { "Name" input name="name" value=(prefilled("name")) required maxlength="64" pattern="[a-z0-9_\\-]+" title="a-z, 0-9, - and _"; }
                label { "API key" input name="key" type="password" required autocomplete="off" spellcheck="false"; }
                label { "Workspace " span.muted { "(optional: keys of one account share its credits)" } input name="workspace" value=(prefilled("workspace")); }
                label { "Base URL " span.muted { "(optional: only for another region)" } input name="base_url" type="url" value=(prefilled("base_url")); }
                button name="action" value="add" { "Add the key" }
            }
            p.muted { "The key is stored on this machine, in a file that only the user of Keychoir can read. No page shows it again." }
        }
    }
}

/// Encodes a text as a value of a query.
fn encode_query_value(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

//! Renders the page Clients: a table of the clients with their limits and use, and the forms that add a client, replace
//! its token and revoke it. Also renders the notice with a new token. `actions.rs` performs the actions.

use std::collections::HashMap;
use std::time::Duration;

use maud::{Markup, html};

use crate::admin::{ClientDocument, QuotaDocument};
use crate::dashboard::PageRequest;
use crate::dashboard::format::{percentage, render_number, render_time, render_usage_meter};
use crate::policy::units::UnixMs;

/// The time before now in which the last use of a client is searched.
const LAST_USE_SPAN: Duration = Duration::from_secs(30 * 86_400);

/// Renders the page.
pub(in crate::dashboard) async fn render_clients(request: &PageRequest<'_>) -> Markup {
    let clients = request.admin.clients(request.now);
    let since = request.now.minus(LAST_USE_SPAN);
    let last_hours: HashMap<String, UnixMs> =
        request.admin.history.last_hours_of_clients(since).await.unwrap_or_default().into_iter().collect();
    html! {
        h1 { "Clients" }
        @if clients.is_empty() {
            p { "No clients are configured, so every program on this machine may use the pool without a token. The first client makes tokens necessary." }
        } @else {
            div.scroll tabindex="0" role="region" aria-label="Table: Clients" {
                table.cards {
                    caption.hidden { "Clients by name" }
                    thead { tr {
                        th scope="col" { "Client" } th scope="col" { "Quota" } th scope="col" { "Rate limit" }
                        th.number scope="col" { "Requests today" } th.number scope="col" { "Credits today" } th.number scope="col" { "Credits this month" }
                        th scope="col" { "Last used" } th scope="col" { "Token" } th scope="col" { "Actions" }
                    } }
                    tbody { @for client in &clients { (render_row(client, last_hours.get(&client.name).copied())) } }
                }
            }
        }
        (render_add_form(request))
    }
}

/// Renders a client. `last_hour` is the start of the last hour in which the client was used.
fn render_row(client: &ClientDocument, last_hour: Option<UnixMs>) -> Markup {
    html! {
        tr {
            th scope="row" { (client.name) }
            td data-label="Quota" { @match &client.limits.quota { Some(quota) => (render_quota_meter(&client.name, quota)), None => span.muted { "none" } } }
            td data-label="Rate limit" { (client.limits.rate_limit.as_deref().unwrap_or("–"))
                @if let Some(maximum) = client.limits.max_concurrent { span.muted { ", at most " (maximum) " at once" } } }
            td.number data-label="Requests today" { (render_number(client.requests.day)) }
            td.number data-label="Credits today" { (render_number(client.credits.day)) }
            td.number data-label="Credits this month" { (render_number(client.credits.month)) }
            td data-label="Last used" { @match last_hour { Some(hour) => { "hour of " (render_time(&hour.rfc3339_seconds())) }, None => span.muted { "not in 30 days" } } }
            td data-label="Token" { @match &client.expires_at { Some(at) => { "until " (render_time(at)) }, None => "does not expire" }
                @if let Some(at) = &client.previous_token_expires_at { span.muted { "; previous token until " (render_time(at)) } } }
            td { (render_actions(client)) }
        }
    }
}

/// Renders the used part of a quota.
fn render_quota_meter(name: &str, quota: &QuotaDocument) -> Markup {
    let percent = percentage(quota.used, quota.amount);
    html! {
        (render_usage_meter(name, percent, "of the quota used"))
        span.small { (render_number(quota.used)) span.muted { " of " (quota.limit) } }
    }
}

/// Renders the form that replaces the token of a client or revokes the client.
fn render_actions(client: &ClientDocument) -> Markup {
    html! {
        details {
            summary { "Token" span.hidden { " of " (client.name) } }
            form.fields method="post" action="clients" {
                input type="hidden" name="name" value=(client.name);
                label { "The previous token stays valid for" select name="grace" {
                    @for (value, text) in [("0s", "no time"), ("1h", "1 hour"), ("1d", "1 day"), ("7d", "7 days")] { option value=(value) { (text) } }
                } }
                button name="action" value="rotate" { "Make a new token" }
                button.bad name="action" value="revoke" { "Revoke the client" }
            }
        }
    }
}

/// Renders the form that adds a client. The query may contain values for its fields.
fn render_add_form(request: &PageRequest<'_>) -> Markup {
    let prefilled = |name: &str| request.query.value(name).unwrap_or_default();
    html! {
        section #add {
            h2 { "Add a client" }
            form.fields method="post" action="clients" {
                label { "Name" input name="name" value=(prefilled("name")) required maxlength="64" pattern="[a-z0-9_\\-]+" title="a-z, 0-9, - and _"; }
                label { "Quota " span.muted { "(optional, such as 50 requests per day, or 10000 credits per month)" } input name="quota" value=(prefilled("quota")); }
                label { "Rate limit " span.muted { "(optional, such as 60 per minute)" } input name="rate_limit" value=(prefilled("rate_limit")); }
                button name="action" value="add" { "Add the client" }
            }
            p.muted { "The next page shows the token of the client, once." }
        }
    }
}

/// Renders the notice with the new token of a client.
pub(in crate::dashboard) fn render_new_token(client: &str, token: &str) -> Markup {
    html! {
        p { strong { "The new token of " (client) ". It is shown only now." } }
        p { code.secret data-copy { (token) } }
        p.muted { "The client sends it where it sent its ElevenLabs key, such as " code { "api_key" } " of an SDK." }
    }
}

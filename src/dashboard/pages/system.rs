//! The state of the program itself: version, usage store, mirror, replicas, changes of operators and settings.

use maud::{Markup, html};
use serde_json::Value;

use crate::admin::{KeyDocument, OverviewDocument};
use crate::dashboard::PageRequest;
use crate::dashboard::format::{number, state, time};
use crate::store::StoredChange;

/// The latest changes of operators on the page.
const LISTED_CHANGES: usize = 20;

/// Renders the page.
pub(in crate::dashboard) async fn system(request: &PageRequest<'_>) -> Markup {
    let admin = request.admin;
    let (overview, keys) = admin.overview_and_keys(request.now);
    let settings = admin.settings.load();
    let changes = admin.history.changes(None, LISTED_CHANGES).await;
    html! {
        h1 { "System" }
        @for warning in warnings(&keys, &overview) { p.notice.warn { span aria-hidden="true" { "▲ " } (warning) } }
        dl.facts {
            dt { "Version" } dd { (overview.version) }
            dt { "Started" } dd { (time(&overview.started_at)) }
            dt { "State" } dd { (state(overview.state)) }
            dt { "ElevenLabs" } dd { (state(overview.upstream)) }
            dt { "Usage store" } dd { (state(overview.usage_store.state)) " " (number(overview.usage_store.unwritten_records)) " records not written yet, " (number(overview.usage_store.lost_records)) " lost" }
            dt { "Mirror in Supabase" } dd { (state(overview.mirror.state)) @if overview.mirror.refused_rows > 0 { " " (number(overview.mirror.refused_rows)) " rows refused" } }
            dt { "Replicas" } dd { (state(overview.shared)) }
            dt { "Connections" } dd { (number(overview.connections)) }
        }
        form.inline method="post" action="system" { button name="action" value="reload" { "Read the configuration again" } }
        @if !overview.replicas.is_empty() {
            section {
                h2 { "Replicas" }
                div.scroll tabindex="0" role="region" aria-label="Table: Replicas" {
                    table {
                        caption.hidden { "Replicas that share the pool" }
                        thead { tr { th scope="col" { "Replica" } th scope="col" { "State" } th scope="col" { "Version" } th scope="col" { "Started" } th scope="col" { "Last seen" } th.number scope="col" { "Share" } } }
                        tbody { @for replica in &overview.replicas {
                            tr {
                                th scope="row" { code { (replica.id) } @if replica.is_self { " (this one)" } @if replica.is_leader { " (polls quotas)" } }
                                td { (state(if replica.is_live { "up" } else { "ended" })) }
                                td { (replica.version) } td { (time(&replica.started_at)) } td { (time(&replica.last_seen)) }
                                td.number { (format!("{:.0} %", replica.share * 100.0)) }
                            }
                        } }
                    }
                }
            }
        }
        section {
            h2 { "Changes of operators" }
            @match &changes {
                Ok(changes) => (change_list(changes)),
                Err(error) => (super::history_unavailable(error)),
            }
        }
        section { h2 { "Settings in force" } (setting_list(&settings)) }
    }
}

fn change_list(changes: &[StoredChange]) -> Markup {
    html! {
        @if changes.is_empty() { p.muted { "No changes were made at runtime." } }
        @else {
            div.scroll tabindex="0" role="region" aria-label="Table: Changes" {
                table {
                    caption.hidden { "The latest changes" }
                    thead { tr { th scope="col" { "Time" } th scope="col" { "Change" } th scope="col" { "Of" } th scope="col" { "By" } th scope="col" { "From" } } }
                    tbody { @for change in changes {
                        tr {
                            td { (time(&change.at.rfc3339())) }
                            td { (change.action.replace('_', " ")) }
                            td { (change.target.as_deref().unwrap_or("–")) }
                            td { (change.actor.replace('_', " ")) }
                            td { (change.address.as_deref().unwrap_or("–")) }
                        }
                    } }
                }
            }
        }
    }
}

/// The settings that the operator has set, and the defaults in a list that can be opened.
fn setting_list(settings: &Value) -> Markup {
    let settings = settings.as_array().map_or(&[][..], Vec::as_slice);
    let (defaults, set): (Vec<&Value>, Vec<&Value>) =
        settings.iter().partition(|setting| setting["source"] == "default" && setting["pending"].is_null());
    html! {
        @if set.is_empty() { p.muted { "All settings have their defaults." } }
        @else { (setting_table("Settings that are set", &set)) }
        details {
            summary { (defaults.len()) " settings with their defaults" }
            (setting_table("Settings with their defaults", &defaults))
        }
    }
}

fn setting_table(title: &str, settings: &[&Value]) -> Markup {
    let text = |setting: &Value, member: &str| setting[member].as_str().unwrap_or_default().to_owned();
    html! {
        div.scroll tabindex="0" role="region" aria-label={ "Table: " (title) } {
            table {
                caption.hidden { (title) }
                thead { tr { th scope="col" { "Setting" } th scope="col" { "Value" } th scope="col" { "Source" } } }
                tbody { @for setting in settings {
                    tr {
                        th scope="row" { code { (text(setting, "name")) } }
                        td { code { (text(setting, "value")) }
                            @if let Some(pending) = setting["pending"].as_str() { span.muted { " (after a restart: " code { (pending) } ")" } } }
                        td { (text(setting, "source")) }
                    }
                } }
            }
        }
    }
}

/// What an operator should know about the whole installation.
fn warnings(keys: &[KeyDocument], overview: &OverviewDocument) -> Vec<String> {
    let free_keys = keys.iter().filter(|key| key.plan.as_deref() == Some("free")).count();
    let mut warnings = Vec::new();
    if free_keys > 1 {
        warnings.push(format!(
            "{free_keys} keys are of free plans. ElevenLabs' terms do not allow several free accounts of one person, and it \
             locks such accounts."
        ));
    }
    if overview.clients == 0 {
        warnings
            .push("No clients are configured: every program on this machine can use the keys.".to_owned());
    }
    if overview.usage_store.lost_records > 0 {
        warnings.push(format!("{} usage records were lost.", overview.usage_store.lost_records));
    }
    if overview.shared == "alone" {
        warnings.push("Redis does not respond: this replica uses only its part of the pool.".to_owned());
    }
    warnings
}

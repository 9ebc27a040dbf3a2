//! Renders the page System: warnings, the version, and the states of the provider, the usage store, the mirror and the
//! replicas. Below them are a button that reloads the configuration, the last changes of operators, and the settings.

use maud::{Markup, html};
use serde_json::Value;

use crate::admin::{KeyDocument, OverviewDocument};
use crate::dashboard::PageRequest;
use crate::dashboard::format::{render_number, render_state, render_time};
use crate::store::StoredChange;

/// The number of changes of operators on the page.
const LISTED_CHANGES: usize = 20;

/// Renders the page.
pub(in crate::dashboard) async fn render_system(request: &PageRequest<'_>) -> Markup {
    let admin = request.admin;
    let (overview, keys) = admin.overview_and_keys(request.now);
    let settings = admin.settings.load();
    let changes = admin.history.changes(None, LISTED_CHANGES).await;
    html! {
        h1 { "System" }
        @for warning in collect_warnings(&keys, &overview) { p.notice.warn { span aria-hidden="true" { "▲ " } (warning) } }
        dl.facts {
            dt { "Version" } dd { (overview.version) }
            dt { "Started" } dd { (render_time(&overview.started_at)) }
            dt { "State" } dd { (render_state(overview.state)) }
            dt { "ElevenLabs" } dd { (render_state(overview.upstream)) }
            dt { "Usage store" } dd { (render_state(overview.usage_store.state)) " " (render_number(overview.usage_store.unwritten_records)) " records not written yet, " (render_number(overview.usage_store.lost_records)) " lost" }
            dt { "Mirror in Supabase" } dd { (render_state(overview.mirror.state)) @if overview.mirror.refused_rows > 0 { " " (render_number(overview.mirror.refused_rows)) " rows refused" } }
            dt { "Replicas" } dd { (render_state(overview.shared)) }
            dt { "Connections" } dd { (render_number(overview.connections)) }
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
                                td { (render_state(if replica.is_live { "up" } else { "ended" })) }
                                td { (replica.version) } td { (render_time(&replica.started_at)) } td { (render_time(&replica.last_seen)) }
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
                Ok(changes) => (render_changes(changes)),
                Err(error) => (super::render_history_error(error)),
            }
        }
        section { h2 { "Settings in force" } (render_settings(&settings)) }
    }
}

/// Renders a table of changes of operators.
fn render_changes(changes: &[StoredChange]) -> Markup {
    html! {
        @if changes.is_empty() { p.muted { "No changes were made at runtime." } }
        @else {
            div.scroll tabindex="0" role="region" aria-label="Table: Changes" {
                table {
                    caption.hidden { "The latest changes" }
                    thead { tr { th scope="col" { "Time" } th scope="col" { "Change" } th scope="col" { "Of" } th scope="col" { "By" } th scope="col" { "From" } } }
                    tbody { @for change in changes {
                        tr {
                            td { (render_time(&change.at.rfc3339())) }
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

/// Renders a table of the settings that the operator has set or that a restart will change, and a closed table of all
/// other settings, which have their defaults.
fn render_settings(settings: &Value) -> Markup {
    let settings = settings.as_array().map_or(&[][..], Vec::as_slice);
    let (defaults, set): (Vec<&Value>, Vec<&Value>) =
        settings.iter().partition(|setting| setting["source"] == "default" && setting["pending"].is_null());
    html! {
        @if set.is_empty() { p.muted { "All settings have their defaults." } }
        @else { (render_setting_table("Settings that are set", &set)) }
        details {
            summary { (defaults.len()) " settings with their defaults" }
            (render_setting_table("Settings with their defaults", &defaults))
        }
    }
}

/// Renders a table of settings.
fn render_setting_table(title: &str, settings: &[&Value]) -> Markup {
    let member = |setting: &Value, name: &str| setting[name].as_str().unwrap_or_default().to_owned();
    html! {
        div.scroll tabindex="0" role="region" aria-label={ "Table: " (title) } {
            table {
                caption.hidden { (title) }
                thead { tr { th scope="col" { "Setting" } th scope="col" { "Value" } th scope="col" { "Source" } } }
                tbody { @for setting in settings {
                    tr {
                        th scope="row" { code { (member(setting, "name")) } }
                        td { code { (member(setting, "value")) }
                            @if let Some(pending) = setting["pending"].as_str() { span.muted { " (after a restart: " code { (pending) } ")" } } }
                        td { (member(setting, "source")) }
                    }
                } }
            }
        }
    }
}

/// Returns the warnings about the installation.
fn collect_warnings(keys: &[KeyDocument], overview: &OverviewDocument) -> Vec<String> {
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

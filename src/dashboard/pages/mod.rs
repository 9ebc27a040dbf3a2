//! Renders the content of the pages. Each page has a file, except the login page and the page for an unknown path,
//! which are in this file with the parts that several pages contain. `layout.rs` renders the rest of a page.

mod clients;
mod connect;
mod key;
mod keys;
mod live;
mod overview;
mod system;
mod usage;

pub(super) use clients::{render_clients, render_new_token};
pub(super) use connect::render_connect;
pub(super) use key::{render_check, render_key};
pub(super) use keys::render_keys;
pub(super) use live::render_live;
use maud::{Markup, html};
pub(super) use overview::render_overview;
pub(super) use system::render_system;
pub(super) use usage::{UsageQuery, render_usage};

use super::layout;
use crate::admin::KeyDocument;
use crate::store::HistoryError;

/// Renders the page on which a one-time code starts a session, with the error of the last attempt.
pub(super) fn render_login(error: Option<&str>) -> Markup {
    layout::render_bare_page(
        "Sign in",
        &html! {
            div.login {
                h1 { "Sign in" }
                @if let Some(error) = error {
                    p.notice.bad role="alert" { span aria-hidden="true" { "✕ " } (error) }
                }
                p { "Run " code { "keychoir dashboard" } " on the machine of this server. It prints a link with a code that is valid once, for 10 minutes." }
                form method="post" action="login" data-login {
                    label for="code" { "Code" }
                    input #code name="code" autocomplete="off" autocapitalize="none" spellcheck="false" required placeholder="kcd_…";
                    button type="submit" { "Sign in" }
                }
            }
        },
    )
}

/// Renders the page for an unknown path.
pub(super) fn render_not_found() -> Markup {
    layout::render_bare_page(
        "Not found",
        &html! {
            h1 { "Not found" }
            p { "The dashboard has no such page. " a href="./" { "Go to the overview" } }
        },
    )
}

/// Renders the name of a key as a link to its page, with its short form. A key without a name has only its short form.
fn render_key_name(key: &KeyDocument) -> Markup {
    html! {
        a href={ "key?id=" (key.id) } { (key.name.as_deref().unwrap_or(&key.short_key)) }
        @if key.name.is_some() { " " code.muted { (key.short_key) } }
    }
}

/// Renders the reason why the records of the usage database are missing on a page.
fn render_history_error(error: &HistoryError) -> Markup {
    html! { p.notice.warn role="status" { span aria-hidden="true" { "▲ " } "The records cannot be shown: " (error) "." } }
}

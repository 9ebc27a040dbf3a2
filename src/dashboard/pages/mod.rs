//! The pages, one file each.

mod clients;
mod connect;
mod key;
mod keys;
mod live;
mod overview;
mod system;
mod usage;

pub(super) use clients::{clients, new_token};
pub(super) use connect::connect;
pub(super) use key::{check_result, key};
pub(super) use keys::keys;
pub(super) use live::live;
use maud::{Markup, html};
pub(super) use overview::overview;
pub(super) use system::system;
pub(super) use usage::{UsageQuery, usage};

use super::layout;
use crate::admin::KeyDocument;
use crate::store::HistoryError;

/// The page on which a one-time code starts a session.
pub(super) fn login(error: Option<&str>) -> Markup {
    layout::bare_page(
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

pub(super) fn not_found() -> Markup {
    layout::bare_page(
        "Not found",
        &html! {
            h1 { "Not found" }
            p { "The dashboard has no such page. " a href="./" { "Go to the overview" } }
        },
    )
}

/// The name of a key, and its short form if it has a name.
fn key_name(key: &KeyDocument) -> Markup {
    html! {
        a href={ "key?id=" (key.id) } { (key.name.as_deref().unwrap_or(&key.short_key)) }
        @if key.name.is_some() { " " code.muted { (key.short_key) } }
    }
}

/// Why records of the past are missing on a page.
fn history_unavailable(error: &HistoryError) -> Markup {
    html! { p.notice.warn role="status" { span aria-hidden="true" { "▲ " } "The records cannot be shown: " (error) "." } }
}

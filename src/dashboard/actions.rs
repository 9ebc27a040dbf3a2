//! Performs the actions of forms: changes of keys and clients, the check of a key, and a reload of the configuration. A
//! change is the same as that of a request to the admin API. A successful action redirects to its page, so that a
//! reload of the page does not repeat it. A failed action, a check and a new token show the page with a notice instead.

use std::net::IpAddr;

use http::{Method, Response, StatusCode};
use serde_json::{Map, Value};

use super::PageRequest;
use super::form::Form;
use super::layout::{Notice, Page};
use super::pages::{render_check, render_new_token};
use super::response::{html, redirect, text};
use crate::admin::{ActionError, ApiBody};
use crate::policy::quantity::duration;

/// Performs the action of a form that the page at `path` sent. `peer` is the address of the operator.
pub(super) async fn perform(
    request: &PageRequest<'_>,
    path: &str,
    form: &Form,
    peer: Option<IpAddr>,
) -> Response<ApiBody> {
    let action = form.value("action").unwrap_or_default();
    let target = form.value("id").or(form.value("name")).unwrap_or_default();
    // The id of a key and the name of a client become a segment of a path of the admin API.
    if target.contains(['/', '?', '#']) {
        return text(StatusCode::BAD_REQUEST, "The name is not valid.\n");
    }
    let change = |method: Method, api_path: String, members| async move {
        request.admin.make_dashboard_change(&method, &api_path, members, peer, request.now).await
    };
    let (post, no_members) = (Method::POST, Map::new());
    let location = match (path, action) {
        ("keys", "add") => {
            let members = form.members(&["name", "key", "workspace", "base_url"]);
            change(post, "keys".to_owned(), members).await.map(|_| "keys?done=added".to_owned())
        }
        ("keys", "pause") => {
            let mut members = form.members(&["reason"]);
            if let Some(pause) = form.value("for").and_then(|pause| duration::parse(pause).ok()) {
                members.insert("until".to_owned(), Value::from(request.now.plus(pause).rfc3339()));
            }
            change(post, format!("keys/{target}/pause"), members).await.map(|_| "keys?done=paused".to_owned())
        }
        ("keys", "resume") => change(post, format!("keys/{target}/resume"), no_members)
            .await
            .map(|_| "keys?done=resumed".to_owned()),
        ("keys", "remove") => change(Method::DELETE, format!("keys/{target}"), no_members)
            .await
            .map(|_| "keys?done=removed".to_owned()),
        ("keys", "check") => {
            return match request.admin.check_pool_key(target, request.now).await {
                Ok(check) => {
                    show(request, Page::Keys, StatusCode::OK, Notice::Content(render_check(&check).0)).await
                }
                Err(error) => show_error(request, Page::Keys, error).await,
            };
        }
        ("clients", "add" | "rotate") => {
            let (api_path, members) = if action == "add" {
                ("clients".to_owned(), form.members(&["name", "quota", "rate_limit"]))
            } else {
                (format!("clients/{target}/rotate"), form.members(&["grace"]))
            };
            match change(post, api_path, members).await {
                Ok(receipt) => {
                    let token = receipt.token.map(|token| render_new_token(target, token.expose()).0);
                    let notice = Notice::Content(token.unwrap_or_default());
                    return show(request, Page::Clients, StatusCode::OK, notice).await;
                }
                Err(error) => Err(error),
            }
        }
        ("clients", "revoke") => change(Method::DELETE, format!("clients/{target}"), no_members)
            .await
            .map(|_| "clients?done=revoked".to_owned()),
        ("system", "reload") => {
            change(post, "reload".to_owned(), no_members).await.map(|_| "system?done=reloaded".to_owned())
        }
        _ => return text(StatusCode::NOT_FOUND, "The dashboard has no such action.\n"),
    };
    let page = Page::from_path(path).unwrap_or(Page::Overview);
    match location {
        Ok(location) => redirect(StatusCode::SEE_OTHER, &location),
        Err(error) => show_error(request, page, error).await,
    }
}

/// Shows a page with the message of a failed action.
async fn show_error(request: &PageRequest<'_>, page: Page, error: ActionError) -> Response<ApiBody> {
    show(request, page, error.status, Notice::Failed(error.message)).await
}

/// Shows a page with a notice.
async fn show(
    request: &PageRequest<'_>,
    page: Page,
    status: StatusCode,
    notice: Notice,
) -> Response<ApiBody> {
    html(status, &request.render(page, Some(notice)).await)
}

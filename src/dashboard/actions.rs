//! The actions of forms. Each makes the change that the admin API would make, and then shows the page again: after a
//! redirect if it succeeded, so that a reload does not repeat it.

use std::net::IpAddr;

use http::{Method, Response, StatusCode};
use serde_json::{Map, Value};

use super::PageRequest;
use super::form::Form;
use super::layout::{Notice, Page};
use super::pages::{check_result, new_token};
use super::response::{found_elsewhere, html, text};
use crate::admin::{ActionError, ApiBody};
use crate::policy::quantity::duration;

/// Performs the action of a form.
pub(super) async fn perform(
    request: &PageRequest<'_>,
    path: &str,
    form: &Form,
    peer: Option<IpAddr>,
) -> Response<ApiBody> {
    let action = form.value("action").unwrap_or_default();
    let id = form.value("id").or(form.value("name")).unwrap_or_default();
    // The name of a client and the id of a key are segments of the API's paths.
    if id.contains(['/', '?', '#']) {
        return text(StatusCode::BAD_REQUEST, "The name is not valid.\n");
    }
    let call = |method: Method, path: String, members| async move {
        request.admin.make_dashboard_change(&method, &path, members, peer, request.now).await
    };
    let (post, none) = (Method::POST, Map::new());
    let result = match (path, action) {
        ("keys", "add") => {
            let members = form.members(&["name", "key", "workspace", "base_url"]);
            call(post, "keys".to_owned(), members).await.map(|_| "keys?done=added".to_owned())
        }
        ("keys", "pause") => {
            let mut members = form.members(&["reason"]);
            if let Some(pause) = form.value("for").and_then(|pause| duration::parse(pause).ok()) {
                members.insert("until".to_owned(), Value::from(request.now.plus(pause).rfc3339()));
            }
            call(post, format!("keys/{id}/pause"), members).await.map(|_| "keys?done=paused".to_owned())
        }
        ("keys", "resume") => {
            call(post, format!("keys/{id}/resume"), none).await.map(|_| "keys?done=resumed".to_owned())
        }
        ("keys", "remove") => {
            call(Method::DELETE, format!("keys/{id}"), none).await.map(|_| "keys?done=removed".to_owned())
        }
        ("keys", "check") => {
            return match request.admin.check_pool_key(id, request.now).await {
                Ok(check) => {
                    show(request, Page::Keys, StatusCode::OK, Notice::Content(check_result(&check).0)).await
                }
                Err(error) => failed(request, Page::Keys, error).await,
            };
        }
        ("clients", "add" | "rotate") => {
            let (path, members) = if action == "add" {
                ("clients".to_owned(), form.members(&["name", "quota", "rate_limit"]))
            } else {
                (format!("clients/{id}/rotate"), form.members(&["grace"]))
            };
            match call(post, path, members).await {
                Ok(receipt) => {
                    let token = receipt.token.map(|token| new_token(id, token.expose()).0);
                    let notice = Notice::Content(token.unwrap_or_default());
                    return show(request, Page::Clients, StatusCode::OK, notice).await;
                }
                Err(error) => Err(error),
            }
        }
        ("clients", "revoke") => call(Method::DELETE, format!("clients/{id}"), none)
            .await
            .map(|_| "clients?done=revoked".to_owned()),
        ("system", "reload") => {
            call(post, "reload".to_owned(), none).await.map(|_| "system?done=reloaded".to_owned())
        }
        _ => return text(StatusCode::NOT_FOUND, "The dashboard has no such action.\n"),
    };
    let page = Page::at(path).unwrap_or(Page::Overview);
    match result {
        Ok(location) => found_elsewhere(StatusCode::SEE_OTHER, &location),
        Err(error) => failed(request, page, error).await,
    }
}

async fn failed(request: &PageRequest<'_>, page: Page, error: ActionError) -> Response<ApiBody> {
    show(request, page, error.status, Notice::Failed(error.message)).await
}

async fn show(
    request: &PageRequest<'_>,
    page: Page,
    status: StatusCode,
    notice: Notice,
) -> Response<ApiBody> {
    html(status, &request.render(page, Some(notice)).await)
}

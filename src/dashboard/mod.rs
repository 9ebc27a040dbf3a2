//! The dashboard at `/_/`: pages on which operators see the state of the pool and change it.
//!
//! The pages are rendered here and work without JavaScript: links, forms and reloads. One script
//! (`assets/app.js`) adds live values, charts and times of the viewer's zone. Pages read snapshots, sums and short
//! lists only. Changes are the same as those of the admin API. A session opens the pages; `session` checks it.

mod actions;
mod assets;
mod chart;
mod client_url;
mod csv;
mod form;
mod format;
mod headline;
mod history_cache;
mod layout;
mod pages;
mod response;
mod session;
mod shared_render;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use bytes::Bytes;
use http::request::Parts;
use http::{Method, Request, Response, StatusCode};
use hyper::body::Body;
use maud::Markup;

use crate::admin::{Admin, ApiBody};
use crate::clock;
use crate::policy::units::UnixMs;
use crate::telemetry::EventSelection;
use form::Form;
use history_cache::HistoryCache;
use layout::Page;
use response::{found_elsewhere, html, method_not_allowed, text};
use shared_render::SharedRender;

/// The prefix of all paths of the dashboard.
const PREFIX: &str = "/_/";

/// The dashboard. Clones share its state.
#[derive(Clone, Debug)]
pub struct Dashboard(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    admin: Arc<Admin>,
    history: HistoryCache,
    overview: SharedRender,
    client_address: Option<SocketAddr>,
}

/// A request for a page, by an operator with a session.
struct PageRequest<'r> {
    admin: &'r Admin,
    history: &'r HistoryCache,
    overview: &'r SharedRender,
    query: Form,
    /// The base URL of the server as the browser sees it.
    base_url: String,
    client_address: Option<SocketAddr>,
    now: UnixMs,
}

impl Dashboard {
    /// Creates the dashboard of `admin`. `client_address` is `None` if clients use the same address as operators.
    #[must_use]
    pub fn new(admin: Arc<Admin>, client_address: Option<SocketAddr>) -> Self {
        Self(Arc::new(Inner {
            admin,
            history: HistoryCache::default(),
            overview: SharedRender::default(),
            client_address,
        }))
    }

    /// Returns whether the dashboard serves a path.
    #[must_use]
    pub fn serves(path: &str) -> bool {
        path.starts_with(PREFIX) || path == "/_"
    }

    /// Responds to a request for one of the paths of the dashboard. `is_foreign_page` is true if a web page of another
    /// origin sent the request.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future does not cancel a change that has been sent to its task.
    pub async fn respond<B>(
        &self,
        request: Request<B>,
        peer: Option<IpAddr>,
        is_foreign_page: bool,
    ) -> Response<ApiBody>
    where
        B: Body<Data = Bytes> + Unpin,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let (head, body) = request.into_parts();
        let mut response = if is_foreign_page {
            text(StatusCode::FORBIDDEN, "The dashboard does not serve web pages of other origins.\n")
        } else {
            self.route(&head, body, peer).await
        };
        response::secure(response.headers_mut());
        response
    }

    async fn route<B>(&self, head: &Parts, body: B, peer: Option<IpAddr>) -> Response<ApiBody>
    where
        B: Body<Data = Bytes> + Unpin,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let admin = &*self.0.admin;
        let Some(path) = head.uri.path().strip_prefix(PREFIX) else {
            // Relative, so that it is also right behind a prefix that another proxy removes.
            return found_elsewhere(StatusCode::PERMANENT_REDIRECT, "_/");
        };
        let is_read = head.method == Method::GET || head.method == Method::HEAD;
        if let Some(name) = path.strip_prefix("assets/") {
            return if is_read {
                assets::respond(name, &head.headers)
            } else {
                method_not_allowed("GET, HEAD")
            };
        }
        let now = clock::now();
        if !is_read {
            if head.method != Method::POST {
                return method_not_allowed("GET, HEAD, POST");
            }
            if !session::is_same_origin(&head.headers) {
                return text(StatusCode::FORBIDDEN, "Only a page of this dashboard may send this form.\n");
            }
        }
        if path == "login" {
            return if is_read {
                html(StatusCode::OK, &pages::login(None))
            } else {
                self.sign_in(head, body, peer).await
            };
        }
        let Some(token) = session::token(&head.headers).filter(|token| admin.sessions.record_use(token, now))
        else {
            return match path {
                "events" => text(StatusCode::UNAUTHORIZED, "The session has ended.\n"),
                // All pages are at one level. A deeper path leads to the login page as well.
                _ => found_elsewhere(StatusCode::SEE_OTHER, &format!("{}login", upwards(path))),
            };
        };
        if is_read {
            return self.page(path, head, token, now).await;
        }
        if path == "logout" {
            admin.sessions.end(token);
            return session::sign_out(&head.headers);
        }
        let form = match form::read(&head.headers, body, admin.form_timeout()).await {
            Ok(form) => form,
            Err(error) => return text(error.status(), error.message()),
        };
        actions::perform(&self.request(head, now), path, &form, peer).await
    }

    /// Responds to a page. Returns 404 for an unknown path.
    async fn page(&self, path: &str, head: &Parts, token: &str, now: UnixMs) -> Response<ApiBody> {
        let request = self.request(head, now);
        match path {
            "events" => {
                // The stream of a HEAD request would never be read.
                if head.method == Method::HEAD {
                    return text(StatusCode::OK, "");
                }
                let selection = match request.query.value("only") {
                    Some("state") => EventSelection::State,
                    Some("requests") => EventSelection::Requests,
                    Some(_) | None => EventSelection::All,
                };
                let keys = request.query.value("keys");
                let keys = keys.map(|ids| ids.split(',').map(str::to_owned).collect());
                request
                    .admin
                    .dashboard_events(&head.headers, token, selection, keys)
                    .await
                    .unwrap_or_else(|error| text(error.status, format!("{}\n", error.message)))
            }
            "usage.csv" => csv::respond(&request).await,
            _ => match Page::at(path) {
                Some(page) => html(StatusCode::OK, &request.render(page, None).await),
                // The links of a page are relative to the level of all pages.
                None if path.contains('/') => found_elsewhere(StatusCode::SEE_OTHER, &upwards(path)),
                None => html(StatusCode::NOT_FOUND, &pages::not_found()),
            },
        }
    }

    async fn sign_in<B>(&self, head: &Parts, body: B, peer: Option<IpAddr>) -> Response<ApiBody>
    where
        B: Body<Data = Bytes> + Unpin,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let admin = &*self.0.admin;
        let form = match form::read(&head.headers, body, admin.form_timeout()).await {
            Ok(form) => form,
            Err(error) => return text(error.status(), error.message()),
        };
        let now = clock::now();
        if admin.is_refused(peer, now) {
            let message = "Too many wrong codes came from this address. Wait a minute and try again.";
            return html(StatusCode::TOO_MANY_REQUESTS, &pages::login(Some(message)));
        }
        match admin.sessions.start(form.value("code").unwrap_or_default(), now) {
            Some(token) => session::sign_in(&head.headers, &token, admin.sessions.max_duration()),
            None => {
                admin.record_wrong_code(peer, now);
                let message = "This code is wrong, was used already, or has expired. Run `keychoir dashboard` for another one.";
                html(StatusCode::FORBIDDEN, &pages::login(Some(message)))
            }
        }
    }

    fn request(&self, head: &Parts, now: UnixMs) -> PageRequest<'_> {
        let admin = &*self.0.admin;
        PageRequest {
            admin,
            history: &self.0.history,
            overview: &self.0.overview,
            query: Form::parse(head.uri.query().unwrap_or_default()),
            base_url: admin.base_url(&head.uri, &head.headers, session::is_https(&head.headers)),
            client_address: self.0.client_address,
            now,
        }
    }
}

/// Returns the relative path from a path below the dashboard to the level of its pages.
fn upwards(path: &str) -> String {
    "../".repeat(path.matches('/').count())
}

impl PageRequest<'_> {
    /// Returns the base URL for clients.
    fn client_url(&self) -> String {
        client_url::client_url(&self.base_url, self.client_address, &self.admin.config.load().base_path)
    }

    /// Renders a page with a notice about the last action.
    async fn render(&self, page: Page, notice: Option<layout::Notice>) -> Markup {
        let notice = notice.or_else(|| self.query.value("done").and_then(layout::Notice::of_done));
        let content = match page {
            Page::Overview => pages::overview(self).await,
            Page::Keys => pages::keys(self),
            Page::Key => pages::key(self),
            Page::Live => pages::live(self).await,
            Page::Usage => pages::usage(self).await,
            Page::Clients => pages::clients(self).await,
            Page::Connect => pages::connect(self),
            Page::System => pages::system(self).await,
        };
        layout::page(page, notice.as_ref(), &content)
    }
}

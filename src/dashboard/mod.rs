//! Serves the dashboard at `/_/`: pages on which operators see the state of the pool and change it.
//!
//! Keychoir renders the pages, and their links and forms work without JavaScript. One script (`assets/app.js`) adds
//! live values, charts and times of the viewer's zone. To render a page, Keychoir reads only snapshots, sums and short
//! lists. Forms make the same changes as the admin API. Each request except those for the login page and the assets
//! needs a session of `admin`, whose token is in a cookie (`session.rs`).

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
use response::{html, method_not_allowed, redirect, text};
use shared_render::SharedRender;

/// The prefix of all paths of the dashboard.
const PREFIX: &str = "/_/";

/// The dashboard. All clones share its state.
#[derive(Clone, Debug)]
pub struct Dashboard(Arc<Inner>);

/// The state of the dashboard.
#[derive(Debug)]
struct Inner {
    admin: Arc<Admin>,
    history: HistoryCache,
    overview: SharedRender,
    /// The address for clients. It is `None` if clients and operators use the same address.
    client_address: Option<SocketAddr>,
}

/// A request of an operator with a session, and the data from which pages are rendered.
struct PageRequest<'r> {
    admin: &'r Admin,
    history: &'r HistoryCache,
    overview: &'r SharedRender,
    /// The parameters of the query.
    query: Form,
    /// The base URL at which the browser reached Keychoir.
    base_url: String,
    /// The address for clients. It is `None` if clients and operators use the same address.
    client_address: Option<SocketAddr>,
    /// The time of the request.
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

    /// Returns whether a path belongs to the dashboard.
    #[must_use]
    pub fn serves(path: &str) -> bool {
        path.starts_with(PREFIX) || path == "/_"
    }

    /// Responds to a request for a path of the dashboard. `peer` is the address of the browser, and `is_foreign_page`
    /// is true if a web page of another origin sent the request.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future does not cancel a change that was already submitted to the controller.
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
        response::set_security_headers(response.headers_mut());
        response
    }

    /// Responds to a request of this origin: files, the login, pages and forms.
    async fn route<B>(&self, head: &Parts, body: B, peer: Option<IpAddr>) -> Response<ApiBody>
    where
        B: Body<Data = Bytes> + Unpin,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let admin = &*self.0.admin;
        let Some(path) = head.uri.path().strip_prefix(PREFIX) else {
            // The location is relative, because another proxy may add a prefix to the path.
            return redirect(StatusCode::PERMANENT_REDIRECT, "_/");
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
                html(StatusCode::OK, &pages::render_login(None))
            } else {
                self.sign_in(head, body, peer).await
            };
        }
        let Some(token) =
            session::find_token(&head.headers).filter(|token| admin.sessions.record_use(token, now))
        else {
            return match path {
                "events" => text(StatusCode::UNAUTHORIZED, "The session has ended.\n"),
                // The login page is at the level of all pages, above a deeper path.
                _ => redirect(StatusCode::SEE_OTHER, &format!("{}login", relative_parent(path))),
            };
        };
        if is_read {
            return self.respond_with_page(path, head, token, now).await;
        }
        if path == "logout" {
            admin.sessions.end(token);
            return session::sign_out(&head.headers);
        }
        let form = match form::read_form(&head.headers, body, admin.form_timeout()).await {
            Ok(form) => form,
            Err(error) => return text(error.status(), error.message()),
        };
        actions::perform(&self.page_request(head, now), path, &form, peer).await
    }

    /// Responds with a page, the stream of events or the CSV file at `path`, or with 404.
    async fn respond_with_page(
        &self,
        path: &str,
        head: &Parts,
        token: &str,
        now: UnixMs,
    ) -> Response<ApiBody> {
        let request = self.page_request(head, now);
        match path {
            "events" => {
                // The response to a HEAD request has no body, so no stream is opened.
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
            _ => match Page::from_path(path) {
                Some(page) => html(StatusCode::OK, &request.render(page, None).await),
                // The relative links of a page would be wrong below the level of all pages.
                None if path.contains('/') => redirect(StatusCode::SEE_OTHER, &relative_parent(path)),
                None => html(StatusCode::NOT_FOUND, &pages::render_not_found()),
            },
        }
    }

    /// Starts a session if the form contains a valid one-time code.
    async fn sign_in<B>(&self, head: &Parts, body: B, peer: Option<IpAddr>) -> Response<ApiBody>
    where
        B: Body<Data = Bytes> + Unpin,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let admin = &*self.0.admin;
        let form = match form::read_form(&head.headers, body, admin.form_timeout()).await {
            Ok(form) => form,
            Err(error) => return text(error.status(), error.message()),
        };
        let now = clock::now();
        if admin.is_refused(peer, now) {
            let message = "Too many wrong codes came from this address. Wait a minute and try again.";
            return html(StatusCode::TOO_MANY_REQUESTS, &pages::render_login(Some(message)));
        }
        match admin.sessions.start(form.value("code").unwrap_or_default(), now) {
            Some(token) => session::sign_in(&head.headers, &token, admin.sessions.max_duration()),
            None => {
                admin.record_wrong_code(peer, now);
                let message = "This code is wrong, was used already, or has expired. Run `keychoir dashboard` for \
                               another one.";
                html(StatusCode::FORBIDDEN, &pages::render_login(Some(message)))
            }
        }
    }

    /// Returns the request with the data from which pages are rendered.
    fn page_request(&self, head: &Parts, now: UnixMs) -> PageRequest<'_> {
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

/// Returns the relative path from a path below the dashboard up to the level of all pages.
fn relative_parent(path: &str) -> String {
    "../".repeat(path.matches('/').count())
}

impl PageRequest<'_> {
    /// Returns the base URL that clients use.
    fn client_url(&self) -> String {
        client_url::client_url(&self.base_url, self.client_address, &self.admin.config.load().base_path)
    }

    /// Renders a page. If `notice` is `None`, the page has the notice for the parameter `done` of the query.
    async fn render(&self, page: Page, notice: Option<layout::Notice>) -> Markup {
        let notice = notice.or_else(|| self.query.value("done").and_then(layout::Notice::from_code));
        let content = match page {
            Page::Overview => pages::render_overview(self).await,
            Page::Keys => pages::render_keys(self),
            Page::Key => pages::render_key(self),
            Page::Live => pages::render_live(self).await,
            Page::Usage => pages::render_usage(self).await,
            Page::Clients => pages::render_clients(self).await,
            Page::Connect => pages::render_connect(self),
            Page::System => pages::render_system(self).await,
        };
        layout::render_page(page, notice.as_ref(), &content)
    }
}

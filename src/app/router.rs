//! Routes each request that the access rules of `proxy` accept: to the admin API, the dashboard, the other pages of
//! Keychoir, or `proxy`, which sends it to the provider. Refuses paths that the listener does not serve, answers CORS
//! preflight requests, and adds CORS headers.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use http::{Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;

use crate::admin::Admin;
use crate::clock;
use crate::dashboard::Dashboard;
use crate::policy::headers::forbid_sniffing;
use crate::policy::origin::{self, RequestOrigin};
use crate::proxy::{Proxy, ProxyResponse, ResponseBody};
use crate::server::{Reply, Service, Session};

/// The paths that a listener serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ListenerScope {
    /// All paths.
    All,
    /// The provider's paths, and Keychoir's own paths for clients and load balancers. Another listener serves
    /// Keychoir's paths for operators.
    Clients,
    /// All of Keychoir's own paths.
    Operators,
}

/// Routes requests to the admin API, the pages of Keychoir, the dashboard or the provider. Clones share their state.
#[derive(Clone, Debug)]
pub(super) struct Router(Arc<RouterParts>);

#[derive(Clone, Debug)]
struct RouterParts {
    admin: Arc<Admin>,
    dashboard: Dashboard,
    proxy: Arc<Proxy>,
    scope: ListenerScope,
}

impl Router {
    /// Creates the router. `client_address` is the address for clients, if operators use a separate address.
    pub(super) fn new(admin: Admin, proxy: Proxy, client_address: Option<SocketAddr>) -> Self {
        let (admin, proxy) = (Arc::new(admin), Arc::new(proxy));
        let dashboard = Dashboard::new(Arc::clone(&admin), client_address);
        Self(Arc::new(RouterParts { admin, dashboard, proxy, scope: ListenerScope::All }))
    }

    /// Returns a router for listeners with the given `scope`.
    pub(super) fn with_scope(&self, scope: ListenerScope) -> Self {
        Self(Arc::new(RouterParts { scope, ..RouterParts::clone(&self.0) }))
    }

    /// Returns a router with its own upstream connections for one of `cores` cores.
    pub(super) fn for_core(&self, cores: usize) -> Self {
        let proxy = Arc::new(self.0.proxy.for_core(cores));
        Self(Arc::new(RouterParts { proxy, ..RouterParts::clone(&self.0) }))
    }
}

impl Service for Router {
    type Body = ResponseBody;

    async fn respond(&self, mut request: Request<Incoming>, peer: Option<IpAddr>) -> Reply<ResponseBody> {
        let RouterParts { admin, dashboard, proxy, scope } = &*self.0;
        let origin = match proxy.check_access(&mut request, peer) {
            Ok(origin) => origin,
            Err(refusal) => return (*refusal).into(),
        };
        let is_dashboard = Dashboard::serves(request.uri().path());
        if *scope == ListenerScope::Clients && (is_dashboard || Admin::is_operator_path(request.uri().path()))
        {
            return Admin::served_elsewhere().map(ResponseBody::from).into();
        }
        let is_api = Admin::is_api_path(request.uri().path());
        if is_api || is_dashboard {
            // Web pages of other origins may send requests to the provider, but must not read or change the pool.
            let is_foreign_page = origin != RequestOrigin::Direct;
            let response = if is_api {
                Box::pin(admin.api(request, peer, is_foreign_page)).await
            } else {
                Box::pin(dashboard.respond(request, peer, is_foreign_page)).await
            };
            return response.map(|body| ResponseBody::Produced(body.boxed_unsync())).into();
        }
        if let RequestOrigin::Preflight(origin) = &origin {
            let mut response = Response::new(ResponseBody::Generated(Full::default()));
            (*response.status_mut(), *response.headers_mut()) =
                origin::preflight_response(request.headers(), origin);
            return response.into();
        }
        let mut session = None;
        let (method, uri, headers) = (request.method(), request.uri(), request.headers());
        let mut response = match admin.response(method, uri, headers, peer, clock::now()) {
            Some(mut page) => {
                forbid_sniffing(page.headers_mut());
                page.map(ResponseBody::from)
            }
            None if *scope == ListenerScope::Operators => Admin::not_proxied().map(ResponseBody::from),
            None => {
                let ProxyResponse { response, session: accepted } = proxy.exchange(request, peer).await;
                session = accepted.map(|accepted| -> Session {
                    Box::new(|stream, read_buf| Box::pin(accepted.run(stream, read_buf)))
                });
                response
            }
        };
        if let RequestOrigin::Page(origin) = &origin {
            origin::insert_cors_headers(response.headers_mut(), origin);
        }
        Reply { response, session }
    }
}

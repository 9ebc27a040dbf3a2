//! The service of a worker: checks the origin of a request, and routes it to the admin pages or to the proxy.

use std::net::IpAddr;
use std::sync::Arc;

use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;

use crate::admin::Admin;
use crate::clock;
use crate::policy::headers::forbid_sniffing;
use crate::policy::origin::{self, RequestOrigin};
use crate::proxy::{Proxy, ProxyResponse, ResponseBody};
use crate::server::{Reply, Service, Session};

/// Routes requests to the admin pages or the proxy. Clones share both.
#[derive(Clone, Debug)]
pub(super) struct Router(Arc<RouterParts>);

#[derive(Debug)]
struct RouterParts {
    admin: Arc<Admin>,
    proxy: Arc<Proxy>,
}

impl Router {
    pub(super) fn new(admin: Admin, proxy: Proxy) -> Self {
        Self(Arc::new(RouterParts { admin: Arc::new(admin), proxy: Arc::new(proxy) }))
    }

    /// Returns a router with its own upstream connections for one of `cores` cores.
    pub(super) fn for_core(&self, cores: usize) -> Self {
        let RouterParts { admin, proxy } = &*self.0;
        let (admin, proxy) = (Arc::clone(admin), Arc::new(proxy.for_core(cores)));
        Self(Arc::new(RouterParts { admin, proxy }))
    }
}

impl Service for Router {
    type Body = ResponseBody;

    async fn respond(&self, mut request: Request<Incoming>, peer: Option<IpAddr>) -> Reply<ResponseBody> {
        let RouterParts { admin, proxy } = &*self.0;
        let origin = match proxy.check_access(&mut request, peer) {
            Ok(origin) => origin,
            Err(refusal) => return (*refusal).into(),
        };
        if Admin::is_api_path(request.uri().path()) {
            // Pages of other origins may send requests to the provider, and never read or change the pool.
            let is_foreign_page = origin != RequestOrigin::Direct;
            let response = Box::pin(admin.api(request, peer, is_foreign_page)).await;
            return response.map(|body| ResponseBody::Generated(Full::new(body))).into();
        }
        if let RequestOrigin::Preflight(origin) = &origin {
            let mut response = Response::new(ResponseBody::Generated(Full::default()));
            (*response.status_mut(), *response.headers_mut()) =
                origin::preflight_response(request.headers(), origin);
            return response.into();
        }
        let mut session = None;
        let mut response =
            match admin.response(request.method(), request.uri(), request.headers(), clock::now()) {
                Some(mut page) => {
                    forbid_sniffing(page.headers_mut());
                    page.map(|body| ResponseBody::Generated(Full::new(body)))
                }
                None => {
                    let ProxyResponse { response, socket } = proxy.exchange(request, peer).await;
                    session = socket.map(|socket| -> Session {
                        Box::new(|stream, read_buf| Box::pin(socket.run(stream, read_buf)))
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

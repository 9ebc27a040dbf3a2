//! Which requests are ours and which are the provider's.

use std::sync::Arc;

use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;

use crate::admin::Admin;
use crate::clock;
use crate::proxy::{Proxy, ResponseBody};
use crate::server::Service;

/// The admin's pages before the proxy.
#[derive(Clone, Debug)]
pub(super) struct Front(Arc<(Admin, Proxy)>);

impl Front {
    pub(super) fn new(admin: Admin, proxy: Proxy) -> Self {
        Self(Arc::new((admin, proxy)))
    }
}

impl Service for Front {
    type Body = ResponseBody;

    async fn answer(&self, request: Request<Incoming>) -> Response<ResponseBody> {
        let (admin, proxy) = &*self.0;
        match admin.answer(request.method(), request.uri(), request.headers(), clock::now()) {
            Some(page) => page.map(|body| ResponseBody::Ours(Full::new(body))),
            None => proxy.exchange(request).await,
        }
    }
}

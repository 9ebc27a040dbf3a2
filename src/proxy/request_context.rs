//! The context of a request that is sent with keys of the pool: the data that all its attempts use, over HTTP
//! and in a WebSocket session.

use std::sync::Arc;

use hyper::body::Incoming;

use super::config::RuntimeConfig;
use super::request_meta::RequestMeta;
use super::retry_state::RetryState;
use crate::body::replay::Replay;
use crate::upstream::UpstreamRequestHead;

/// The context of a request that is sent with keys of the pool.
#[derive(Debug)]
pub(super) struct RequestContext {
    pub(super) config: Arc<RuntimeConfig>,
    pub(super) meta: RequestMeta,
    pub(super) retry: RetryState,
    pub(super) head: UpstreamRequestHead,
    pub(super) body: Replay<Incoming>,
}

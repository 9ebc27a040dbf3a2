//! Groups the data that all attempts of a request with keys of the pool use, for `exchange`. A WebSocket session
//! keeps the data for a failover.

use std::sync::Arc;

use hyper::body::Incoming;

use super::config::RuntimeConfig;
use super::request_meta::RequestMeta;
use super::retry_state::RetryState;
use crate::body::replay::Replay;
use crate::upstream::UpstreamRequestHead;

/// The data that all attempts of one request use.
#[derive(Debug)]
pub(super) struct RequestContext {
    pub(super) config: Arc<RuntimeConfig>,
    pub(super) meta: RequestMeta,
    pub(super) retry: RetryState,
    pub(super) head: UpstreamRequestHead,
    pub(super) body: Replay<Incoming>,
}

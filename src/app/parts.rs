//! What a program is made of.

use crate::policy::client::Clients;
use crate::upstream::Authority;
use crate::{pool, proxy, server, store, upstream, watch};

/// Everything that [`start`](super::start) needs.
#[derive(Clone, Debug)]
pub struct Parts {
    /// Who may ask.
    pub clients: Clients,
    /// The keys, in pool order.
    pub keys: Vec<pool::KeyEntry>,
    /// How the pool behaves.
    pub pool: pool::Settings,
    /// Where the provider is.
    pub authority: Authority,
    /// How its connections behave.
    pub upstream: upstream::Settings,
    /// Bounds of a request's way.
    pub proxy: proxy::Limits,
    /// Bounds of the listener.
    pub server: server::Limits,
    /// How quotas are asked for; `None` for not at all.
    pub watch: Option<watch::Settings>,
    /// Where the books are kept.
    pub books: store::Place,
    /// Records that wait to be written at the most.
    pub queue_max: usize,
}

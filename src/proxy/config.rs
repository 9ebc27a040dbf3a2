//! Defines the configuration with which requests are processed. A reload replaces it for later requests.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;

use super::client_usage::ClientUsage;
use super::socket_limits::SocketLimits;
use crate::body::budget::BufferBudget;
use crate::policy::client::Clients;
use crate::policy::headers::ForwardedHeaders;
use crate::policy::min_rate::MinRate;
use crate::policy::origin::AccessRules;

/// Limits and switches for the processing of requests.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Maximum number of requests in progress of all clients.
    pub max_requests: usize,
    /// Maximum number of requests in progress of a client without a configured limit.
    pub max_requests_per_client: u32,
    /// Credits charged to the client's quota if neither an estimate nor the response gives the price of a
    /// request.
    pub unpriced_credits: u64,
    /// Maximum number of requests of unknown price that a client, or a user, with a credit quota may have in progress.
    pub max_unpriced_requests: u32,
    /// Maximum number of users per client whose usage is kept in memory while they send no requests.
    pub max_cached_users: usize,
    /// Maximum pause of a client within a request body.
    pub request_body_timeout: Duration,
    /// Minimum rate at which a client must send a request body.
    pub min_request_body_rate: MinRate,
    /// Maximum number of attempts of one request.
    pub max_attempts: u32,
    /// Time after the arrival of the request body in which another attempt may start.
    pub retry_timeout: Duration,
    /// Maximum number of bytes of the body of an error response that are read to classify or redact it.
    pub max_error_body_size: usize,
    /// Maximum time for reading the body of a response before it is relayed.
    pub error_body_timeout: Duration,
    /// Maximum wait for the text of a request to estimate its cost. Zero disables the estimate.
    pub cost_estimate_timeout: Duration,
    /// Whether endpoints that could disable keys or manage the workspace are blocked.
    pub blocks_admin_endpoints: bool,
    /// Maximum number of bytes of a response that are searched for new identifiers.
    pub max_response_scan_size: usize,
    /// Time for which Keychoir caches that no account has a resource.
    pub not_found_ttl: Duration,
    /// Whether keys and the data of their account holders are redacted from responses.
    pub redacts: bool,
    /// Headers of reverse proxies in front of Keychoir that are forwarded to the provider.
    pub forwarded_headers: ForwardedHeaders,
    /// The memory budget for the buffers of requests, responses and WebSocket sessions.
    pub buffers: BufferBudget,
    /// The base URL that replaces the provider's base URL in WebSocket URLs within responses.
    pub socket_base: Option<Arc<str>>,
    /// Limits of WebSocket sessions.
    pub websocket: SocketLimits,
}

/// The configuration that a reload replaces for later requests.
#[derive(Clone, Debug)]
pub struct RuntimeConfig {
    /// The configured clients and their credentials.
    pub clients: Clients,
    /// The usage counters of the clients. A reload keeps them.
    pub client_usage: ClientUsage,
    /// Limits and switches for the processing of requests.
    pub limits: Limits,
    /// The host names of the proxy, and the web origins that may use it.
    pub access_rules: AccessRules,
    /// The prefix of all paths at this proxy, without a trailing slash. An empty string means no prefix.
    pub base_path: String,
}

/// The current configuration. A request loads it once and uses it until its end.
pub type SharedConfig = Arc<ArcSwap<RuntimeConfig>>;

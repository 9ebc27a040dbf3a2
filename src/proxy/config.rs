//! The settings with which requests are processed. A reload replaces them for the following requests.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;

use super::client_usage::ClientUsage;
use super::socket_limits::SocketLimits;
use crate::body::budget::BufferBudget;
use crate::policy::client::Clients;
use crate::policy::headers::Forwarded;
use crate::policy::min_rate::MinRate;
use crate::policy::origin::AccessRules;

/// Limits and switches for the processing of a request.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Maximum requests in progress at once.
    pub max_requests: usize,
    /// Maximum requests in progress of one client without a limit of its own.
    pub max_requests_per_client: u32,
    /// Credits that a request takes from its client's quota when neither an estimate nor its
    /// response names its price.
    pub unpriced_credits: u64,
    /// Maximum requests of unknown price that a client with a credit quota may have in progress.
    pub max_unpriced_requests: u32,
    /// Maximum pause of a client within a request body.
    pub request_body_timeout: Duration,
    /// Minimum rate at which a client must send a request body.
    pub min_request_body_rate: MinRate,
    /// Maximum attempts of one request.
    pub max_attempts: u32,
    /// No further attempt begins when this time has passed since the request body arrived.
    pub retry_timeout: Duration,
    /// Maximum bytes of an error response's body that are read to classify it.
    pub max_error_body_size: usize,
    /// Maximum time for reading that body.
    pub error_body_timeout: Duration,
    /// Maximum wait for a request's text to estimate its cost; zero disables the estimate by text.
    pub cost_estimate_timeout: Duration,
    /// Whether endpoints that could harm the pool are blocked.
    pub blocks_admin_endpoints: bool,
    /// Maximum bytes of a response that are searched for the identifiers it gives.
    pub max_response_scan_size: usize,
    /// The time for which a 404 of all accounts for a named resource is cached.
    pub not_found_ttl: Duration,
    /// Whether keys and the description of their owner are redacted from responses.
    pub redacts: bool,
    /// Headers of proxies in front that are forwarded to the provider.
    pub forwarded_headers: Forwarded,
    /// The memory budget for everything that is buffered for requests, responses and sockets.
    pub buffers: BufferBudget,
    /// The base that replaces the provider's host in socket addresses within responses.
    pub socket_base: Option<Arc<str>>,
    /// Limits of socket sessions.
    pub websocket: SocketLimits,
}

/// The settings that a reload replaces for the following requests: clients, their usage, and
/// limits.
#[derive(Clone, Debug)]
pub struct RuntimeConfig {
    /// The configured clients, and the credentials that identify them.
    pub clients: Clients,
    /// The usage counters of the clients, which a reload keeps.
    pub client_usage: ClientUsage,
    /// Limits and switches.
    pub limits: Limits,
    /// The host names of the proxy, and the web origins that may use it.
    pub access_rules: AccessRules,
    /// A path prefix of all the proxy's and the provider's paths, without a trailing slash; empty
    /// for none.
    pub base_path: String,
}

/// The current configuration. A request loads it once and keeps it until its end.
pub type SharedConfig = Arc<ArcSwap<RuntimeConfig>>;

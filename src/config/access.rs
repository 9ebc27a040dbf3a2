//! Defines the section `[access]`: the access rules that apply to all clients, the charge and limit for requests of
//! unknown cost, and the limit of end users in memory. It is separate from the sections of timeouts and sizes, because
//! its defaults decide who may use the keys.

/// The access rules and limits that apply to all clients.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccessConfig {
    /// Whether requests that could disable a key, create one or manage the workspace are refused.
    pub block_admin_endpoints: bool,
    /// Whether the pool's keys, and the data of their account holders, are redacted in responses.
    pub redact: bool,
    /// Credits charged to the client's quota when neither the estimate nor the response shows the
    /// cost of a request.
    pub unpriced_credits: usize,
    /// Maximum number of concurrent requests of unknown cost per client with a credit quota.
    pub max_unpriced_requests: usize,
    /// Maximum number of end users per client with a `user_quota` whose usage is kept in memory.
    pub max_cached_users: usize,
    /// Whether an unknown token is used as the client's own key of the provider.
    pub bring_your_own_key: bool,
    /// Host names by which clients may reach Keychoir, in addition to localhost and IP addresses. `*` allows any name.
    pub hosts: Vec<String>,
    /// Origins whose web pages may send requests.
    pub origins: Vec<String>,
    /// Headers of preceding proxies that are forwarded to the provider.
    pub forward_headers: Vec<String>,
}

impl Default for AccessConfig {
    fn default() -> Self {
        Self {
            block_admin_endpoints: true,
            redact: true,
            unpriced_credits: 1_000,
            max_unpriced_requests: 1,
            max_cached_users: 10_000,
            bring_your_own_key: false,
            hosts: Vec::new(),
            origins: Vec::new(),
            forward_headers: Vec::new(),
        }
    }
}

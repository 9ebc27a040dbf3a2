//! What clients may ask for, and what it takes from their quotas.

/// What clients may ask for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccessConfig {
    /// Whether requests that could disable a key, mint one or manage the workspace are denied.
    pub block_admin_endpoints: bool,
    /// Whether the pool's keys, and what describes their owner, are taken out of answers.
    pub redact: bool,
    /// Credits that a request takes from its client's quota when neither its estimate nor its response has a price.
    pub unpriced_credits: usize,
    /// Requests of unknown price that a client with a quota of credits may have under way.
    pub max_unpriced_requests: usize,
    /// Whether what is no client's token passes as the client's own key of the provider.
    pub bring_your_own_key: bool,
    /// Names in a `Host` header that are ours beside localhost and addresses; `*` for any.
    pub hosts: Vec<String>,
    /// Origins whose web pages may speak to us.
    pub origins: Vec<String>,
    /// Headers that are passed on upstream although proxies before us made them.
    pub forward_headers: Vec<String>,
}

impl Default for AccessConfig {
    fn default() -> Self {
        Self {
            block_admin_endpoints: true,
            redact: true,
            unpriced_credits: 1_000,
            max_unpriced_requests: 1,
            bring_your_own_key: false,
            hosts: Vec::new(),
            origins: Vec::new(),
            forward_headers: Vec::new(),
        }
    }
}

//! Defines an upstream authority: the scheme, host and port to which requests with an API key are sent, the prefix of
//! their paths, and the forward proxy through which the host is reached.

use std::fmt;
use std::sync::Arc;

use http::header::HeaderValue;

use super::forward_proxy::ForwardProxy;

/// The protocol of an authority.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scheme {
    /// HTTP without encryption, for a simulator or a gateway on the same machine.
    Http,
    /// HTTP in TLS.
    Https,
}

impl Scheme {
    /// Returns `http` or `https`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
        }
    }

    /// Returns the port of a URL that contains no port.
    #[must_use]
    pub fn default_port(self) -> u16 {
        match self {
            Self::Http => 80,
            Self::Https => 443,
        }
    }
}

/// A scheme, host and port with an optional path prefix, and the route to it: direct, or through a forward proxy.
/// The scheme and host of the client's request target are ignored, so that a client cannot choose where a key is sent.
/// Two authorities with different forward proxies differ, so they have separate idle connections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Authority {
    scheme: Scheme,
    host: String,
    port: u16,
    prefix: String,
    host_header: HeaderValue,
    proxy: Option<Arc<ForwardProxy>>,
}

impl Authority {
    /// Creates an authority with direct connections. `host` is a name or an address, without the brackets of an IPv6
    /// address. `prefix` is empty, or starts with a slash and does not end with a slash.
    ///
    /// # Errors
    ///
    /// Fails if `host` is not valid in a `Host` header.
    pub fn new(scheme: Scheme, host: &str, port: u16, prefix: &str) -> Result<Self, http::Error> {
        let url_host = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
        let host_header = if port == scheme.default_port() { url_host } else { format!("{url_host}:{port}") };
        Ok(Self {
            scheme,
            host: host.to_owned(),
            port,
            prefix: prefix.to_owned(),
            host_header: HeaderValue::from_str(&host_header)?,
            proxy: None,
        })
    }

    /// Returns the same authority with connections through the forward proxy `proxy`. `None` means direct connections.
    #[must_use]
    pub fn through(self, proxy: Option<Arc<ForwardProxy>>) -> Self {
        Self { proxy, ..self }
    }

    /// Returns the forward proxy through which connections are opened, or `None` for direct connections.
    #[must_use]
    pub fn proxy(&self) -> Option<&Arc<ForwardProxy>> {
        self.proxy.as_ref()
    }

    /// Returns the scheme of all requests to this authority.
    #[must_use]
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// Returns the host name or address, without the brackets of an IPv6 address.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Whether the host belongs to ElevenLabs, in any region.
    #[must_use]
    pub fn is_elevenlabs(&self) -> bool {
        const DOMAIN: &str = "elevenlabs.io";
        let host = self.host.to_ascii_lowercase();
        host.strip_suffix(DOMAIN).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    }

    /// Returns the port, even if it is the default port of the scheme.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Returns the value of the `Host` header.
    #[must_use]
    pub fn host_header(&self) -> &HeaderValue {
        &self.host_header
    }

    /// Returns the prefix that is added before the path of each request. It is empty, or starts with a slash.
    #[must_use]
    pub fn prefix(&self) -> &str {
        &self.prefix
    }
}

impl fmt::Display for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = self.scheme.as_str();
        write!(f, "{scheme}://{}{}", self.host_header.to_str().unwrap_or_default(), self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::forward_proxy::ProxyScheme;

    #[track_caller]
    fn check_display(scheme: Scheme, host: &str, port: u16, displayed: &str) {
        assert_eq!(Authority::new(scheme, host, port, "").unwrap().to_string(), displayed);
    }

    #[test]
    fn default_ports_are_omitted() {
        check_display(Scheme::Https, "api.elevenlabs.io", 443, "https://api.elevenlabs.io");
        check_display(Scheme::Http, "127.0.0.1", 8080, "http://127.0.0.1:8080");
        check_display(Scheme::Https, "::1", 8443, "https://[::1]:8443");
    }

    #[test]
    fn authorities_with_different_proxies_differ() {
        let authority = || Authority::new(Scheme::Http, "gate", 80, "").unwrap();
        let through = |port| {
            let proxy = ForwardProxy::new(ProxyScheme::Http, "proxy", port, None);
            authority().through(Some(Arc::new(proxy)))
        };
        assert_eq!(through(1), through(1));
        assert_ne!(through(1), through(2));
        assert_ne!(through(1), authority());
        assert_eq!(through(1).through(None), authority());
    }

    #[test]
    fn the_prefix_follows_the_host() {
        let authority = Authority::new(Scheme::Http, "gate", 80, "/eleven").unwrap();
        assert_eq!((authority.to_string().as_str(), authority.prefix()), ("http://gate/eleven", "/eleven"));
    }
}

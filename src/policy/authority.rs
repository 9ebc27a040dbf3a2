//! The provider's authority: the only scheme, host and port to which keys are sent.

use std::fmt;

use http::header::HeaderValue;

/// The protocol of an authority.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scheme {
    /// Clear text: for a simulator or a gateway on the same machine.
    Http,
    /// TLS.
    Https,
}

impl Scheme {
    /// `http` or `https`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
        }
    }

    /// The port when none is written.
    #[must_use]
    pub fn default_port(self) -> u16 {
        match self {
            Self::Http => 80,
            Self::Https => 443,
        }
    }
}

/// Scheme, host, port and an optional path prefix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Authority {
    scheme: Scheme,
    host: String,
    port: u16,
    prefix: String,
    host_header: HeaderValue,
}

impl Authority {
    /// An authority. `host` is a name or an address, an IPv6 address without brackets; `prefix` is
    /// empty or begins with a slash and does not end with one.
    ///
    /// # Errors
    ///
    /// When the host is not a valid value of a `Host` header.
    pub fn new(scheme: Scheme, host: &str, port: u16, prefix: &str) -> Result<Self, http::Error> {
        let bracketed = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
        let host_header =
            if port == scheme.default_port() { bracketed } else { format!("{bracketed}:{port}") };
        Ok(Self {
            scheme,
            host: host.to_owned(),
            port,
            prefix: prefix.to_owned(),
            host_header: HeaderValue::from_str(&host_header)?,
        })
    }

    /// `http` or `https`.
    #[must_use]
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// The host name or address; an IPv6 address without brackets.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Whether it is a host of ElevenLabs, in any region.
    #[must_use]
    pub fn is_elevenlabs(&self) -> bool {
        const DOMAIN: &[u8] = b"elevenlabs.io";
        let host = self.host.as_bytes();
        let Some((rest, end)) = host.len().checked_sub(DOMAIN.len()).map(|at| host.split_at(at)) else {
            return false;
        };
        end.eq_ignore_ascii_case(DOMAIN) && rest.last().is_none_or(|byte| *byte == b'.')
    }

    /// The port, also when it is the default one.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The value of the `Host` header.
    #[must_use]
    pub fn host_header(&self) -> &HeaderValue {
        &self.host_header
    }

    /// The path prefix, which is prepended to the client's path. Scheme and host of the client's target
    /// are ignored: a client cannot choose where a key is sent.
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

    #[track_caller]
    fn check(authority: (Scheme, &str, u16, &str), shown: &str) {
        let (scheme, host, port, prefix) = authority;
        let authority = Authority::new(scheme, host, port, prefix).unwrap();
        assert_eq!(authority.to_string(), shown);
        assert_eq!(authority.prefix(), prefix);
    }

    #[test]
    fn default_ports_are_left_out() {
        check((Scheme::Https, "api.elevenlabs.io", 443, ""), "https://api.elevenlabs.io");
        check((Scheme::Http, "127.0.0.1", 8080, ""), "http://127.0.0.1:8080");
        check((Scheme::Https, "::1", 8443, ""), "https://[::1]:8443");
    }

    #[test]
    fn a_prefix_comes_first() {
        check((Scheme::Http, "gate", 80, "/eleven"), "http://gate/eleven");
    }
}

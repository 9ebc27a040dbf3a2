//! Describes a forward proxy: a server through which connections to the provider are opened. Some networks require one.
//! Also formats its URL, and encodes and decodes the credentials in the URL.
//!
//! The forward proxy gets the name of the provider's host, resolves it, and relays bytes in both directions. A TLS
//! connection ends at the provider, so the forward proxy sees no request and no key of an `https` upstream.

use std::fmt;

use crate::secret::ProxyCredentials;

/// The protocol between Keychoir and a forward proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProxyScheme {
    /// The `CONNECT` method over HTTP/1.1.
    Http,
    /// The `CONNECT` method over HTTP/1.1 in TLS.
    Https,
    /// SOCKS5. The proxy resolves the host name.
    Socks5,
}

impl ProxyScheme {
    /// Returns the scheme in a URL.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
            Self::Socks5 => "socks5h",
        }
    }

    /// Returns the port of a URL that contains no port.
    #[must_use]
    pub fn default_port(self) -> u16 {
        match self {
            Self::Http => 80,
            Self::Https => 443,
            Self::Socks5 => 1080,
        }
    }
}

/// The address of a forward proxy and the credentials for it. `Display` and `Debug` print no credentials.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForwardProxy {
    scheme: ProxyScheme,
    host: String,
    port: u16,
    credentials: Option<ProxyCredentials>,
}

impl ForwardProxy {
    /// Creates a forward proxy. `host` is a name or an address, without the brackets of an IPv6 address.
    #[must_use]
    pub fn new(scheme: ProxyScheme, host: &str, port: u16, credentials: Option<ProxyCredentials>) -> Self {
        Self { scheme, host: host.to_owned(), port, credentials }
    }

    /// Returns the protocol between Keychoir and the forward proxy.
    #[must_use]
    pub fn scheme(&self) -> ProxyScheme {
        self.scheme
    }

    /// Returns the host name or address, without the brackets of an IPv6 address.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Returns the TCP port of the forward proxy.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Returns the user and password, if the forward proxy needs them.
    #[must_use]
    pub fn credentials(&self) -> Option<&ProxyCredentials> {
        self.credentials.as_ref()
    }

    /// Returns the URL with the credentials, for an HTTP client that takes a proxy as a URL.
    #[must_use]
    pub fn expose_url(&self) -> String {
        let userinfo = self.credentials.as_ref().map_or_else(String::new, |credentials| {
            let [user, password] =
                [credentials.expose_user(), credentials.expose_password()].map(percent_encode);
            format!("{user}:{password}@")
        });
        format!("{}://{userinfo}{}", self.scheme.as_str(), host_and_port(&self.host, self.port))
    }
}

/// The URL without credentials, for logs and errors.
impl fmt::Display for ForwardProxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.scheme.as_str(), host_and_port(&self.host, self.port))
    }
}

/// Formats a host and a port with a colon in between. An IPv6 address gets brackets.
#[must_use]
pub fn host_and_port(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

/// Encodes every byte that may not be part of a user or password in a URL.
fn percent_encode(text: &str) -> String {
    let encode = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => char::from(byte).to_string(),
        _ => format!("%{byte:02X}"),
    };
    text.bytes().map(encode).collect()
}

/// Decodes a user or password of a URL. Returns `None` if it contains an invalid escape, is not UTF-8 text, or contains
/// control characters, which could end a line of the request to the forward proxy.
#[must_use]
pub fn percent_decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut remaining_bytes = text.bytes();
    while let Some(byte) = remaining_bytes.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let mut digit = || char::from(remaining_bytes.next()?).to_digit(16);
        let decoded_byte = digit()? * 16 + digit()?;
        bytes.push(u8::try_from(decoded_byte).ok()?);
    }
    String::from_utf8(bytes).ok().filter(|decoded| !decoded.contains(char::is_control))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proxy(scheme: ProxyScheme, host: &str, port: u16) -> ForwardProxy {
        ForwardProxy::new(scheme, host, port, Some(ProxyCredentials::new("al:ice", "h@nter/2 \u{e4}")))
    }

    #[test]
    fn a_proxy_is_printed_without_its_credentials() {
        let http = proxy(ProxyScheme::Http, "proxy.corp", 3128);
        assert_eq!(http.to_string(), "http://proxy.corp:3128");
        let debug = format!("{http:?}{http:#?}");
        assert!(!debug.contains("ice") && !debug.contains("nter"), "no credential must be printed: {debug}");
        assert_eq!(proxy(ProxyScheme::Socks5, "::1", 1080).to_string(), "socks5h://[::1]:1080");
    }

    #[test]
    fn the_url_of_a_proxy_has_encoded_credentials() {
        assert_eq!(
            proxy(ProxyScheme::Https, "proxy.corp", 443).expose_url(),
            "https://al%3Aice:h%40nter%2F2%20%C3%A4@proxy.corp:443"
        );
        let without_credentials = ForwardProxy::new(ProxyScheme::Http, "::1", 1, None);
        assert_eq!(without_credentials.expose_url(), "http://[::1]:1");
    }

    #[test]
    fn encoded_text_is_decoded_and_invalid_escapes_are_refused() {
        for text in ["", "a", "h@nter/2 \u{e4}", "%", "100%25"] {
            assert_eq!(percent_decode(&percent_encode(text)).as_deref(), Some(text));
        }
        assert_eq!(percent_decode("a%2fb").as_deref(), Some("a/b"));
        for text in ["%", "%2", "%zz", "%+1", "%ff", "a%0d%0ab", "a\tb"] {
            assert_eq!(percent_decode(text), None, "{text:?} must be refused");
        }
    }
}

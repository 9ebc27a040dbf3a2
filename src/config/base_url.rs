//! Parses the provider's base URL and Keychoir's own base path strictly. A lenient URL library would accept a typo, and
//! requests with keys would go to an unintended host. The parsers of hosts and ports are also used for the URLs of
//! forward proxies and of Redis.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use super::mask::quote_masked;
use super::problem::ValueError;
use crate::policy::authority::Scheme;

/// A URL `https://host[:port][/prefix]`, or with `http`. It has no user, query, fragment or trailing slash.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct BaseUrl {
    scheme: Scheme,
    host: String,
    port: u16,
    path_prefix: String,
}

impl BaseUrl {
    /// Returns the scheme.
    #[must_use]
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// Returns the host in lowercase. An IPv6 address has no brackets, as DNS lookups and the server name of
    /// a TLS handshake require.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Returns the port, or the default port of the scheme if the URL has none.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Returns the prefix of every path: empty, or `/prefix` without a trailing slash.
    #[must_use]
    pub fn path_prefix(&self) -> &str {
        &self.path_prefix
    }

    /// Returns the value of the `Host` header: an IPv6 address has brackets, and the scheme's default port is
    /// omitted.
    #[must_use]
    pub fn authority(&self) -> String {
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        if self.port == self.scheme.default_port() { host } else { format!("{host}:{}", self.port) }
    }

    /// Returns whether the host is `localhost` or a loopback address. Host names are not looked up.
    #[must_use]
    pub fn is_loopback(&self) -> bool {
        self.host == "localhost"
            || self.host.parse::<Ipv4Addr>().is_ok_and(|address| address.is_loopback())
            || self.host.parse::<Ipv6Addr>().is_ok_and(|address| address.is_loopback())
    }
}

impl Default for BaseUrl {
    fn default() -> Self {
        Self {
            scheme: Scheme::Https,
            host: "api.elevenlabs.io".into(),
            port: 443,
            path_prefix: String::new(),
        }
    }
}

impl fmt::Display for BaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}{}", self.scheme.as_str(), self.authority(), self.path_prefix)
    }
}

impl FromStr for BaseUrl {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        if let Some(invalid) =
            text.chars().find(|character| !character.is_ascii_graphic() || *character == '\\')
        {
            return Err(ValueError::new(format!("{invalid:?} cannot be part of a URL")));
        }
        let (scheme, rest) = split_scheme(text)?;
        // These parts may contain a credential, so the message does not contain their value.
        for (delimiter, part) in [('?', "query"), ('#', "fragment"), ('@', "user name or password")] {
            if rest.contains(delimiter) {
                return Err(ValueError::new(format!("a base URL has no {part}"))
                    .advise(format!("remove the part with `{delimiter}`")));
            }
        }
        let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let (host, port) = split_port(authority, text)?;
        let url = Self {
            scheme,
            host: parse_host(host)?,
            port: port.unwrap_or_else(|| scheme.default_port()),
            path_prefix: parse_path_prefix(path)?,
        };
        if url.path_prefix == "/v1" {
            let without_version = Self { path_prefix: String::new(), ..url };
            return Err(ValueError::new(
                "the paths of the provider already begin with `/v1`, so it would be sent twice",
            )
            .suggest(Some(without_version)));
        }
        Ok(url)
    }
}

/// A path prefix that requests of clients may have (`server.base_path`). An empty string means that there is none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BasePath(String);

impl FromStr for BasePath {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let path = text.trim();
        if path.is_empty() || path.starts_with('/') {
            return parse_path_prefix(path).map(Self);
        }
        let error = ValueError::new(format!("{} does not begin with a slash", quote_masked(path)));
        Err(error.suggest(format!("/{path}").parse::<Self>().ok()))
    }
}

impl fmt::Display for BasePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn split_scheme(text: &str) -> Result<(Scheme, &str), ValueError> {
    let Some((scheme, rest)) = text.split_once("://") else {
        let error = ValueError::new(format!("{} has no http:// or https://", quote_masked(text)));
        let suggestion = format!("https://{text}");
        return Err(error.suggest(suggestion.parse::<BaseUrl>().ok()));
    };
    match scheme.to_ascii_lowercase().as_str() {
        "http" => Ok((Scheme::Http, rest)),
        "https" => Ok((Scheme::Https, rest)),
        other => {
            let error = ValueError::new(format!("{} is not http or https", quote_masked(scheme)));
            let suggestion = match other {
                "wss" => format!("https://{rest}"),
                "ws" => format!("http://{rest}"),
                _ => return Err(error.advise("write a URL like https://api.elevenlabs.io")),
            };
            Err(error.advise("WebSockets use the same base URL").suggest(suggestion.parse::<BaseUrl>().ok()))
        }
    }
}

/// Splits the authority of a URL into its host and its port. An error quotes `text`, the whole URL or address.
pub(super) fn split_port<'a>(authority: &'a str, text: &str) -> Result<(&'a str, Option<u16>), ValueError> {
    let after_brackets = authority.rfind(']').map_or(0, |bracket| bracket + 1);
    let Some(colon) = authority[after_brackets..].find(':').map(|index| after_brackets + index) else {
        return Ok((authority, None));
    };
    let (host, port) = (&authority[..colon], &authority[colon + 1..]);
    match port.parse() {
        Ok(number) if number > 0 && !port.starts_with('+') => Ok((host, Some(number))),
        _ => Err(ValueError::new(format!("{} has no valid port", quote_masked(text)))
            .advise("write a port from 1 to 65535, or no port")),
    }
}

/// Maximum number of characters of a host name (RFC 1035).
const MAX_HOST_CHARS: usize = 253;
/// Maximum number of characters of a label, which is a part of a host name between two dots (RFC 1035).
const MAX_LABEL_CHARS: usize = 63;

/// Parses a host name, an IPv4 address, or an IPv6 address in brackets. Returns it in lowercase and without brackets.
pub(super) fn parse_host(host: &str) -> Result<String, ValueError> {
    if let Some(inner) = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        return match inner.parse::<Ipv6Addr>() {
            Ok(address) => Ok(address.to_string()),
            Err(_) => Err(ValueError::new(format!("{} is not an IPv6 address", quote_masked(inner)))),
        };
    }
    let is_label = |label: &str| {
        (1..=MAX_LABEL_CHARS).contains(&label.len())
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
    };
    if host.is_empty() {
        return Err(ValueError::new("the URL has no host"));
    }
    if host.len() > MAX_HOST_CHARS || !host.split('.').all(is_label) {
        return Err(ValueError::new(format!("{} is not a valid host name", quote_masked(host))));
    }
    // Some parsers treat a name whose last label is a number as an IPv4 address.
    let ends_in_number =
        host.rsplit('.').next().is_some_and(|label| label.bytes().all(|byte| byte.is_ascii_digit()));
    if ends_in_number && host.parse::<Ipv4Addr>().is_err() {
        return Err(ValueError::new(format!("{} is not an IPv4 address", quote_masked(host))));
    }
    Ok(host.to_ascii_lowercase())
}

/// Parses a path prefix, and removes a trailing slash.
fn parse_path_prefix(path: &str) -> Result<String, ValueError> {
    let prefix = path.strip_suffix('/').unwrap_or(path);
    let is_valid_segment = |segment: &str| {
        !matches!(segment, "" | "." | "..")
            && segment.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=:".contains(&byte))
    };
    if prefix.is_empty() || prefix.split('/').skip(1).all(is_valid_segment) {
        return Ok(prefix.to_owned());
    }
    Err(ValueError::new(format!("{} is not a valid path prefix", quote_masked(path)))
        .advise("write letters, digits and `-._~` between single slashes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_url(text: &str, expected: &str) {
        let printed_text = match text.parse::<BaseUrl>() {
            Ok(url) => url.to_string(),
            Err(error) => format!("! {error}"),
        };
        assert_eq!(printed_text, expected);
    }

    #[test]
    fn a_url_is_printed_in_its_shortest_form() {
        check_url("https://api.elevenlabs.io", "https://api.elevenlabs.io");
        check_url("HTTPS://API.ElevenLabs.io/", "https://api.elevenlabs.io");
        check_url("https://host:443", "https://host");
        check_url("http://host:443", "http://host:443");
        check_url("http://127.0.0.1:8080/tts/eu/", "http://127.0.0.1:8080/tts/eu");
        check_url("http://[0:0::1]:9", "http://[::1]:9");
        assert_eq!(BaseUrl::default(), "https://api.elevenlabs.io".parse().unwrap());
    }

    #[test]
    fn a_url_is_split_into_its_parts() {
        let url: BaseUrl = "http://[::1]:9/a".parse().unwrap();
        assert_eq!((url.scheme(), url.host(), url.port(), url.path_prefix()), (Scheme::Http, "::1", 9, "/a"));
        assert_eq!(url.authority(), "[::1]:9");
        assert!(url.is_loopback());
        assert!(!BaseUrl::default().is_loopback());
    }

    #[test]
    fn a_url_with_a_scheme_is_suggested() {
        check_url(
            "api.elevenlabs.io",
            "! `api.elevenlabs.io` has no http:// or https://; did you mean `https://api.elevenlabs.io`?",
        );
        check_url(
            "wss://host",
            "! `wss` is not http or https; WebSockets use the same base URL; did you mean `https://host`?",
        );
        check_url("ftp://host", "! `ftp` is not http or https; write a URL like https://api.elevenlabs.io");
    }

    #[test]
    fn a_port_is_between_1_and_65535() {
        check_url("http://h:1", "http://h:1");
        check_url("http://h:65535", "http://h:65535");
        for text in ["http://h:0", "http://h:65536", "http://h:", "http://h:x", "http://h:+5", "http://::1"] {
            check_url(
                text,
                &format!("! `{text}` has no valid port; write a port from 1 to 65535, or no port"),
            );
        }
    }

    #[test]
    fn a_part_that_could_be_a_credential_is_refused_and_not_shown() {
        check_url(
            "https://me:hunter2@host",
            "! a base URL has no user name or password; remove the part with `@`",
        );
        check_url("https://h/?hunter2", "! a base URL has no query; remove the part with `?`");
        check_url("https://h#hunter2", "! a base URL has no fragment; remove the part with `#`");
    }

    #[test]
    fn an_invalid_host_or_path_is_refused() {
        check_url("https://", "! the URL has no host");
        check_url("https:///x", "! the URL has no host");
        check_url("https://a..b", "! `a..b` is not a valid host name");
        check_url("https://-a", "! `-a` is not a valid host name");
        check_url("https://1.2.3", "! `1.2.3` is not an IPv4 address");
        check_url("https://[::g]", "! `::g` is not an IPv6 address");
        check_url("https://a b", "! ' ' cannot be part of a URL");
        for path in ["/a//b", "/..", "/a/./b", "//", "/%2e"] {
            check_url(
                &format!("https://h{path}"),
                &format!(
                    "! `{path}` is not a valid path prefix; write letters, digits and `-._~` between single slashes"
                ),
            );
        }
    }

    #[test]
    fn the_api_version_is_not_part_of_the_base_url() {
        let error = "! the paths of the provider already begin with `/v1`, so it would be sent twice; did you mean `https://h`?";
        check_url("https://h/v1", error);
        check_url("https://h/v1/", error);
        check_url("https://h/proxy/v1", "https://h/proxy/v1");
    }

    #[track_caller]
    fn check_base_path(text: &str, expected: &str) {
        let printed_text = match text.parse::<BasePath>() {
            Ok(path) => path.to_string(),
            Err(error) => format!("! {error}"),
        };
        assert_eq!(printed_text, expected);
    }

    #[test]
    fn a_base_path_begins_with_a_slash_and_does_not_end_with_one() {
        check_base_path("", "");
        check_base_path("/", "");
        check_base_path("/eleven/labs/", "/eleven/labs");
        check_base_path("eleven", "! `eleven` does not begin with a slash; did you mean `/eleven`?");
        check_base_path(
            "/a//b",
            "! `/a//b` is not a valid path prefix; write letters, digits and `-._~` between single slashes",
        );
    }
}

//! Parses a TCP address to listen on: an IP address or `localhost`, with a port. Host names are refused,
//! because a change of their DNS entry could expose Keychoir to other machines. Also determines which hosts reach the
//! address, so that Keychoir does not send requests to itself.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use super::mask::quote_masked;
use super::problem::ValueError;

/// An address and port to listen on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HostPort {
    host: Host,
    port: u16,
}

/// The host of an address to listen on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Host {
    Localhost,
    Address(IpAddr),
}

impl HostPort {
    /// Returns the port. With 0, the operating system chooses one.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Returns the addresses to bind. Binding the first one must succeed.
    ///
    /// `localhost` has an IPv4 and an IPv6 address, so that clients that try `::1` first are served if
    /// the machine has IPv6. With port 0, the IPv6 address uses the port that the IPv4 address got.
    #[must_use]
    pub fn socket_addresses(&self) -> Vec<SocketAddr> {
        match self.host {
            Host::Localhost => vec![
                SocketAddr::new(Ipv4Addr::LOCALHOST.into(), self.port),
                SocketAddr::new(Ipv6Addr::LOCALHOST.into(), self.port),
            ],
            Host::Address(address) => vec![SocketAddr::new(address, self.port)],
        }
    }

    /// Returns whether only this machine can connect.
    #[must_use]
    pub fn is_loopback(&self) -> bool {
        match self.host {
            Host::Localhost => true,
            Host::Address(address) => address.to_canonical().is_loopback(),
        }
    }

    /// Returns whether a connection from this machine to `host` and `port` reaches this listener. `host` is
    /// `localhost` or an IP address. Host names are not looked up.
    #[must_use]
    pub fn is_reached_by(&self, host: &str, port: u16) -> bool {
        let addresses: Vec<IpAddr> = match host.parse() {
            Ok(address) => vec![address],
            Err(_) if host.eq_ignore_ascii_case("localhost") => {
                vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()]
            }
            Err(_) => return false,
        };
        let is_listener_reached = |listener: SocketAddr| {
            let listener = listener.ip().to_canonical();
            // The wildcard address includes every address of this machine, but only its loopback addresses are known
            // here.
            let reaches_listener = |address: &IpAddr| {
                let address = address.to_canonical();
                address == listener
                    || (address.is_unspecified() && listener.is_loopback())
                    || (listener.is_unspecified() && address.is_loopback())
            };
            addresses.iter().any(reaches_listener)
        };
        self.port != 0 && self.port == port && self.socket_addresses().into_iter().any(is_listener_reached)
    }
}

impl Default for HostPort {
    fn default() -> Self {
        // With a loopback address, no other machine can use the keys until the operator configures
        // another address.
        Self { host: Host::Address(Ipv4Addr::LOCALHOST.into()), port: 11011 }
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host {
            Host::Localhost => write!(f, "localhost:{}", self.port),
            Host::Address(address) => SocketAddr::new(address, self.port).fmt(f),
        }
    }
}

impl FromStr for HostPort {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        const NOTATION: &str = "write HOST:PORT, for example 127.0.0.1:11011";
        if let Some((_, rest)) = text.split_once("://") {
            let suggestion = rest.trim_end_matches('/').parse::<Self>().ok();
            return Err(ValueError::new(format!("{} is a URL", quote_masked(text)))
                .advise(NOTATION)
                .suggest(suggestion));
        }
        if let Ok(IpAddr::V6(address)) = text.parse::<IpAddr>() {
            let suggestion = format!("[{address}]:{}", Self::default().port);
            let error = ValueError::new(format!(
                "{} has no port, or no brackets around its address",
                quote_masked(text)
            ));
            return Err(error.advise(NOTATION).suggest(Some(suggestion)));
        }
        let Some((host, port)) = text.rsplit_once(':').filter(|_| !text.ends_with(']')) else {
            let suggestion = text.parse::<u16>().ok().map(|port| format!("127.0.0.1:{port}"));
            return Err(ValueError::new(format!("{} has no port", quote_masked(text)))
                .advise(NOTATION)
                .suggest(suggestion));
        };
        let Some(port) = port.parse::<u16>().ok().filter(|_| !port.starts_with('+')) else {
            let error = ValueError::new(format!("{} has no valid port", quote_masked(text)));
            return Err(error.advise("a port is a number from 0 (any free port) to 65535"));
        };
        let host = parse_host(host).map_err(|suggestion| {
            let suggestion = suggestion.map(|suggestion| format!("{suggestion}:{port}"));
            ValueError::new(format!("{} has neither an IP address nor localhost", quote_masked(text)))
                .advise(NOTATION)
                .suggest(suggestion)
        })?;
        Ok(Self { host, port })
    }
}

/// Parses a host. The error is the host to suggest, if any.
fn parse_host(host: &str) -> Result<Host, Option<&'static str>> {
    if host.eq_ignore_ascii_case("localhost") {
        return Ok(Host::Localhost);
    }
    if let Some(inner) = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        return inner.parse::<Ipv6Addr>().map(|address| Host::Address(address.into())).map_err(|_| None);
    }
    host.parse::<Ipv4Addr>().map(|address| Host::Address(address.into())).map_err(|_| match host {
        "" => Some("127.0.0.1"),
        "*" => Some("0.0.0.0"),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_to_any_form_of_its_address_reaches_a_listener() {
        for (listen, host, port, is_reached) in [
            ("127.0.0.1:11011", "127.0.0.1", 11011, true),
            ("127.0.0.1:11011", "localhost", 11011, true),
            ("127.0.0.1:11011", "LocalHost", 11011, true),
            ("127.0.0.1:11011", "::ffff:127.0.0.1", 11011, true),
            ("127.0.0.1:11011", "0.0.0.0", 11011, true),
            ("localhost:11011", "::1", 11011, true),
            ("0.0.0.0:11011", "127.0.0.1", 11011, true),
            ("[::]:11011", "localhost", 11011, true),
            ("192.0.2.1:11011", "192.0.2.1", 11011, true),
            ("127.0.0.1:11011", "127.0.0.1", 11012, false),
            ("127.0.0.1:11011", "127.0.0.2", 11011, false),
            ("127.0.0.1:11011", "192.0.2.1", 11011, false),
            ("127.0.0.1:11011", "gateway.example", 11011, false),
            ("192.0.2.1:11011", "127.0.0.1", 11011, false),
            ("127.0.0.1:0", "127.0.0.1", 0, false),
        ] {
            let listener: HostPort = listen.parse().unwrap();
            assert_eq!(
                listener.is_reached_by(host, port),
                is_reached,
                "the result must be right for a connection to {host}:{port} and the listener {listen}"
            );
        }
    }

    #[track_caller]
    fn check_address(text: &str, expected: &str) {
        let printed_text = match text.parse::<HostPort>() {
            Ok(listen) => listen.to_string(),
            Err(error) => format!("! {error}"),
        };
        assert_eq!(printed_text, expected);
    }

    #[test]
    fn addresses_and_localhost_are_parsed() {
        for text in ["127.0.0.1:11011", "0.0.0.0:0", "[::1]:65535", "localhost:80"] {
            check_address(text, text);
        }
        assert_eq!(HostPort::default().to_string(), "127.0.0.1:11011");
    }

    #[test]
    fn the_error_names_the_missing_part() {
        check_address("127.0.0.1", "! `127.0.0.1` has no port; write HOST:PORT, for example 127.0.0.1:11011");
        check_address(
            "8080",
            "! `8080` has no port; write HOST:PORT, for example 127.0.0.1:11011; did you mean `127.0.0.1:8080`?",
        );
        check_address(
            ":8080",
            "! `:8080` has neither an IP address nor localhost; write HOST:PORT, for example 127.0.0.1:11011; did you mean `127.0.0.1:8080`?",
        );
        check_address(
            "::1",
            "! `::1` has no port, or no brackets around its address; write HOST:PORT, for example 127.0.0.1:11011; did you mean `[::1]:11011`?",
        );
        check_address("[::1]", "! `[::1]` has no port; write HOST:PORT, for example 127.0.0.1:11011");
        check_address(
            "http://localhost:80/",
            "! `http://localhost:80/` is a URL; write HOST:PORT, for example 127.0.0.1:11011; did you mean `localhost:80`?",
        );
    }

    #[test]
    fn a_host_name_is_refused() {
        for text in ["example.com:80", "[::g]:80", "1.2.3:80"] {
            let notation = "write HOST:PORT, for example 127.0.0.1:11011";
            check_address(text, &format!("! `{text}` has neither an IP address nor localhost; {notation}"));
        }
    }

    #[test]
    fn a_port_is_between_0_and_65535() {
        check_address("127.0.0.1:65535", "127.0.0.1:65535");
        for text in ["127.0.0.1:65536", "127.0.0.1:", "127.0.0.1:+1", "127.0.0.1:-1", "127.0.0.1:http"] {
            let advice = "a port is a number from 0 (any free port) to 65535";
            check_address(text, &format!("! `{text}` has no valid port; {advice}"));
        }
    }

    #[test]
    fn only_this_machine_can_reach_a_loopback_address() {
        for text in ["127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "[::ffff:127.0.0.1]:1", "localhost:1"] {
            assert!(text.parse::<HostPort>().unwrap().is_loopback(), "{text} must be a loopback address");
        }
        for text in ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "128.0.0.1:1", "[::ffff:10.0.0.1]:1"] {
            assert!(
                !text.parse::<HostPort>().unwrap().is_loopback(),
                "{text} must not be a loopback address"
            );
        }
    }

    #[test]
    fn localhost_is_bound_to_its_ipv4_and_ipv6_address() {
        let addresses = "localhost:7".parse::<HostPort>().unwrap().socket_addresses();
        assert_eq!(addresses, ["127.0.0.1:7".parse().unwrap(), "[::1]:7".parse().unwrap()]);
    }
}

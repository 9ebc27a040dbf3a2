//! Parses the environment variable `NO_PROXY`, and decides which hosts are reached without a forward proxy. No standard
//! defines the variable, so this module accepts the notations of curl, Go and Python.

use std::net::IpAddr;

/// The hosts that are reached without a forward proxy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct NoProxy(Vec<Exemption>);

/// One entry of `NO_PROXY`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Exemption {
    hosts: ExemptHosts,
    /// The only exempt port. If it is `None`, all ports are exempt.
    port: Option<u16>,
}

/// The hosts that an entry exempts.
#[derive(Clone, Debug, PartialEq, Eq)]
enum ExemptHosts {
    /// All hosts, written as `*`.
    All,
    /// A domain in lower case, with its subdomains.
    Domain(String),
    /// The addresses whose first bits are equal to the first bits of `address`.
    Network { address: IpAddr, prefix_length: u32 },
}

impl NoProxy {
    /// Parses a list that is separated by commas or white space. Entries that are neither a host nor a network
    /// exempt nothing.
    pub(super) fn parse(list: &str) -> Self {
        let is_separator = |character: char| character == ',' || character.is_whitespace();
        let entries = list.split(is_separator).filter(|entry| !entry.is_empty());
        Self(entries.filter_map(Exemption::parse).collect())
    }

    /// Returns whether connections to `port` of `host` are direct. `host` is a name or an address, without the
    /// brackets of an IPv6 address.
    pub(super) fn exempts(&self, host: &str, port: u16) -> bool {
        let host = host.trim_end_matches('.').to_ascii_lowercase();
        let address = host.parse::<IpAddr>().ok().map(|address| address.to_canonical());
        self.0.iter().any(|exemption| {
            exemption.port.is_none_or(|exempt_port| exempt_port == port)
                && exemption.hosts.contains(&host, address)
        })
    }
}

impl Exemption {
    /// Parses `HOST`, `HOST:PORT`, an address or `ADDRESS/BITS`.
    fn parse(entry: &str) -> Option<Self> {
        let entry = entry.to_ascii_lowercase();
        if entry == "*" {
            return Some(Self { hosts: ExemptHosts::All, port: None });
        }
        if let Some(network) = parse_network(&entry) {
            return Some(Self { hosts: network, port: None });
        }
        let (host, port) = match entry.rsplit_once(':') {
            Some((host, port)) => (host, Some(port.parse::<u16>().ok()?)),
            None => (entry.as_str(), None),
        };
        let hosts = match parse_network(host) {
            Some(network) => network,
            None if host == "*" => ExemptHosts::All,
            None => {
                let domain = host.trim_start_matches("*.").trim_start_matches('.').trim_end_matches('.');
                let is_name = !domain.is_empty() && !domain.contains(['*', '/', ':', '[', ']']);
                is_name.then(|| ExemptHosts::Domain(domain.to_owned()))?
            }
        };
        Some(Self { hosts, port })
    }
}

/// Parses an address, which may be in brackets, or a network in the notation `ADDRESS/BITS`.
fn parse_network(text: &str) -> Option<ExemptHosts> {
    let (address, length) = match text.split_once('/') {
        Some((address, length)) => (address, Some(length.parse::<u32>().ok()?)),
        None => (text, None),
    };
    let address = address.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(address);
    let address: IpAddr = address.parse().ok()?;
    let max_length = if address.is_ipv4() { 32 } else { 128 };
    let prefix_length = length.unwrap_or(max_length);
    if prefix_length > max_length {
        return None;
    }
    // The IPv4 address in an IPv6 address begins after 96 bits.
    Some(match address.to_canonical() {
        canonical @ IpAddr::V4(_) if address.is_ipv6() && prefix_length >= 96 => {
            ExemptHosts::Network { address: canonical, prefix_length: prefix_length - 96 }
        }
        IpAddr::V4(_) | IpAddr::V6(_) => ExemptHosts::Network { address, prefix_length },
    })
}

impl ExemptHosts {
    /// Returns whether a host in lower case is one of the exempt hosts. `address` is the host as an address, if it is
    /// one.
    fn contains(&self, host: &str, address: Option<IpAddr>) -> bool {
        match self {
            Self::All => true,
            Self::Domain(domain) => {
                let subdomain = host.strip_suffix(domain.as_str());
                subdomain.is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
            }
            Self::Network { address: network, prefix_length } => {
                address.is_some_and(|address| has_prefix(address, *network, *prefix_length))
            }
        }
    }
}

/// Returns whether the first `length` bits of two addresses of one family are the same.
fn has_prefix(address: IpAddr, network: IpAddr, length: u32) -> bool {
    // The shift removes the bits that are not compared. `checked_shr` returns `None` if it would remove all bits.
    match (address, network) {
        (IpAddr::V4(address), IpAddr::V4(network)) => {
            let difference = address.to_bits() ^ network.to_bits();
            difference.checked_shr(32 - length).unwrap_or(0) == 0
        }
        (IpAddr::V6(address), IpAddr::V6(network)) => {
            let difference = address.to_bits() ^ network.to_bits();
            difference.checked_shr(128 - length).unwrap_or(0) == 0
        }
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_exemption(list: &str, host: &str, port: u16, is_exempt: bool) {
        let no_proxy = NoProxy::parse(list);
        assert_eq!(
            no_proxy.exempts(host, port),
            is_exempt,
            "the result must be right for {host}:{port} and the list {list:?}"
        );
    }

    #[test]
    fn a_domain_exempts_itself_and_its_subdomains() {
        for list in [
            "elevenlabs.io",
            ".elevenlabs.io",
            "*.elevenlabs.io",
            "ELEVENLABS.IO",
            "elevenlabs.io.",
            " a.example ,\televenlabs.io ",
            "a.example elevenlabs.io",
            ",,elevenlabs.io,",
        ] {
            check_exemption(list, "elevenlabs.io", 443, true);
            check_exemption(list, "api.elevenlabs.io", 443, true);
            check_exemption(list, "API.ElevenLabs.io.", 80, true);
            check_exemption(list, "notelevenlabs.io", 443, false);
            check_exemption(list, "elevenlabs.io.example", 443, false);
        }
        for list in ["", "*elevenlabs.io", "io.elevenlabs", "a.*.io", ".", "*.", ":443", "elevenlabs.io/path"]
        {
            check_exemption(list, "api.elevenlabs.io", 443, false);
        }
        check_exemption("*", "api.elevenlabs.io", 443, true);
        check_exemption("a.example, *", "10.0.0.1", 80, true);
    }

    #[test]
    fn a_port_limits_the_exemption() {
        for list in ["api.elevenlabs.io:443", ".elevenlabs.io:443", "*.elevenlabs.io:443", "*:443"] {
            check_exemption(list, "api.elevenlabs.io", 443, true);
            check_exemption(list, "api.elevenlabs.io", 8443, false);
        }
        for list in ["api.elevenlabs.io:", "api.elevenlabs.io:x", "api.elevenlabs.io:99999"] {
            check_exemption(list, "api.elevenlabs.io", 443, false);
        }
        check_exemption("10.1.2.3:443", "10.1.2.3", 443, true);
        check_exemption("10.1.2.3:443", "10.1.2.3", 80, false);
        check_exemption("10.0.0.0/8:443", "10.1.2.3", 443, true);
        check_exemption("[2001:db8::1]:443", "2001:db8::1", 443, true);
        check_exemption("[2001:db8::1]:443", "2001:db8::1", 80, false);
    }

    #[test]
    fn addresses_and_networks_are_compared_by_value() {
        check_exemption("10.1.2.3", "10.1.2.3", 443, true);
        check_exemption("10.1.2.3", "10.1.2.4", 443, false);
        check_exemption("10.0.0.0/8", "10.255.0.1", 443, true);
        check_exemption("10.0.0.0/8", "11.0.0.1", 443, false);
        check_exemption("10.1.2.3/32", "10.1.2.4", 443, false);
        check_exemption("0.0.0.0/0", "192.0.2.1", 443, true);
        check_exemption("0.0.0.0/0", "2001:db8::1", 443, false);
        check_exemption("10.0.0.0/33", "10.0.0.0", 443, false);
        check_exemption("10.0.0.0/x", "10.0.0.0", 443, false);
        check_exemption("10.0.0.0/8", "ten.example", 443, false);
        for list in ["2001:DB8::1", "[2001:db8::1]", "2001:db8::/32", "::/0"] {
            check_exemption(list, "2001:db8:0:0::1", 443, true);
            check_exemption(list, "10.0.0.1", 443, false);
        }
        check_exemption("2001:db8::/32", "2001:db9::1", 443, false);
        check_exemption("::ffff:10.0.0.0/104", "10.1.2.3", 443, true);
        check_exemption("10.0.0.0/8", "::ffff:10.1.2.3", 443, true);
    }
}

//! Parses the addresses of `server.listen` and the mode of Unix sockets. An address is a TCP address, the path of a
//! Unix socket, or `systemd` for all sockets that systemd passes. The list must not contain duplicates or conflicts. An
//! address of `admin.listen` has the same notation.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

use super::host_port::HostPort;
use super::mask::quote_masked;
use super::problem::ValueError;

/// An address to listen on.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ListenAddress {
    /// A TCP address and port.
    Tcp(HostPort),
    /// The absolute path of a Unix socket.
    Unix(PathBuf),
    /// Every socket that systemd passes.
    Systemd,
}

/// All addresses to listen on. The list is not empty, and contains no duplicates or conflicts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenAddresses(Vec<ListenAddress>);

/// The file mode of a Unix socket, which determines the users who may connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnixMode(u32);

/// Maximum number of bytes of a Unix socket's path on Linux, not counting the terminating zero.
const MAX_UNIX_PATH_BYTES: usize = 107;

impl ListenAddresses {
    /// Returns the list that contains only the sockets that systemd passes.
    pub(super) fn systemd() -> Self {
        Self(vec![ListenAddress::Systemd])
    }

    /// Parses a list, and checks that no address is listed twice and that no two addresses conflict.
    pub(crate) fn parse(texts: &[&str]) -> Result<Self, ValueError> {
        let mut addresses = Vec::with_capacity(texts.len());
        for text in texts {
            let address = text.parse::<ListenAddress>()?;
            if addresses.contains(&address) {
                return Err(ValueError::new(format!("{} is listed twice", quote_masked(text))));
            }
            if let Some(other) = addresses.iter().find(|other| address.conflicts_with(other)) {
                let message = format!("{address} and {other} use the same port of the same address");
                return Err(ValueError::new(message).advise("remove one of them"));
            }
            addresses.push(address);
        }
        if addresses.is_empty() {
            let error = ValueError::new("the list of addresses is empty");
            return Err(error.advise("write HOST:PORT, for example 127.0.0.1:11011"));
        }
        Ok(Self(addresses))
    }

    /// Returns the addresses in the configured order.
    pub fn iter(&self) -> std::slice::Iter<'_, ListenAddress> {
        self.0.iter()
    }

    /// Returns the TCP addresses.
    pub fn tcp_addresses(&self) -> impl Iterator<Item = &HostPort> {
        self.iter().filter_map(|address| match address {
            ListenAddress::Tcp(address) => Some(address),
            ListenAddress::Unix(_) | ListenAddress::Systemd => None,
        })
    }

    /// Returns the first TCP address whose port is not 0. This port is known before Keychoir listens.
    #[must_use]
    pub fn fixed_tcp_address(&self) -> Option<&HostPort> {
        self.tcp_addresses().find(|address| address.port() != 0)
    }

    /// Returns the first TCP address that other machines can reach. The sockets that systemd passes are
    /// checked when they are received.
    #[must_use]
    pub fn exposed_address(&self) -> Option<&HostPort> {
        self.tcp_addresses().find(|address| !address.is_loopback())
    }
}

impl ListenAddress {
    /// Returns whether both addresses use the same port of the same address. If `self` is `localhost`, only its IPv4
    /// address is compared, because its IPv6 address is optional.
    pub(super) fn conflicts_with(&self, other: &Self) -> bool {
        let (Self::Tcp(address), Self::Tcp(other)) = (self, other) else { return false };
        let Some(required) = address.socket_addresses().first().copied() else { return false };
        other.socket_addresses().into_iter().any(|other_address| {
            required.port() != 0
                && required.port() == other_address.port()
                && addresses_overlap(required.ip(), other_address.ip())
        })
    }
}

/// Returns whether two addresses are equal, or one of them is the wildcard address of the other's family.
fn addresses_overlap(first: IpAddr, other: IpAddr) -> bool {
    // The system determines whether the IPv6 wildcard includes IPv4, so only addresses of the same family are compared.
    let is_wildcard_of =
        |address: IpAddr, other: IpAddr| address.is_unspecified() && address.is_ipv4() == other.is_ipv4();
    first.to_canonical() == other.to_canonical()
        || is_wildcard_of(first, other)
        || is_wildcard_of(other, first)
}

impl Default for ListenAddresses {
    fn default() -> Self {
        Self(vec![ListenAddress::Tcp(HostPort::default())])
    }
}

/// Formats the addresses in TOML notation.
impl fmt::Display for ListenAddresses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let quoted_addresses =
            self.0.iter().map(|address| format!("\"{address}\"")).collect::<Vec<_>>().join(", ");
        if self.0.len() == 1 { f.write_str(&quoted_addresses) } else { write!(f, "[{quoted_addresses}]") }
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Systemd => f.write_str("systemd"),
        }
    }
}

impl FromStr for ListenAddress {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        const NOTATION: &str =
            "write unix: and an absolute path, for example unix:/run/keychoir/keychoir.sock";
        if text == "systemd" {
            return Ok(Self::Systemd);
        }
        let Some(path) = text.strip_prefix("unix:") else { return text.parse().map(Self::Tcp) };
        if !path.starts_with('/') || path.ends_with('/') {
            return Err(ValueError::new(format!("{} has no absolute path to a file", quote_masked(text)))
                .advise(NOTATION));
        }
        if path.len() > MAX_UNIX_PATH_BYTES {
            let count = path.len();
            let error = ValueError::new(format!("the path of the socket has {count} bytes"));
            return Err(error.advise(format!("the maximum is {MAX_UNIX_PATH_BYTES}")));
        }
        Ok(Self::Unix(PathBuf::from(path)))
    }
}

impl UnixMode {
    /// Returns the permission bits.
    #[must_use]
    pub fn bits(self) -> u32 {
        self.0
    }
}

impl Default for UnixMode {
    fn default() -> Self {
        Self(0o660)
    }
}

impl fmt::Display for UnixMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04o}", self.0)
    }
}

impl FromStr for UnixMode {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let is_octal =
            (3..=4).contains(&text.len()) && text.bytes().all(|byte| (b'0'..=b'7').contains(&byte));
        match u32::from_str_radix(text, 8) {
            Ok(bits) if is_octal && bits <= 0o777 => Ok(Self(bits)),
            Ok(_) | Err(_) => Err(ValueError::new(format!("{} is not a file mode", quote_masked(text)))
                .advise("write a zero and three octal digits, for example 0660")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_list(texts: &[&str], expected: &str) {
        let printed_text = match ListenAddresses::parse(texts) {
            Ok(addresses) => addresses.to_string(),
            Err(error) => format!("! {error}"),
        };
        assert_eq!(printed_text, expected);
    }

    #[test]
    fn every_kind_of_address_is_parsed() {
        check_list(&["127.0.0.1:1"], "\"127.0.0.1:1\"");
        check_list(
            &["localhost:1", "unix:/run/k.sock", "systemd"],
            "[\"localhost:1\", \"unix:/run/k.sock\", \"systemd\"]",
        );
    }

    #[test]
    fn one_invalid_address_makes_the_list_invalid() {
        check_list(&["127.0.0.1:1", "x"], "! `x` has no port; write HOST:PORT, for example 127.0.0.1:11011");
        check_list(&["systemd", "systemd"], "! `systemd` is listed twice");
        check_list(&[], "! the list of addresses is empty; write HOST:PORT, for example 127.0.0.1:11011");
    }

    #[test]
    fn a_port_of_an_address_is_listed_once() {
        let check_conflict = |first: &str, other: &str| {
            check_list(
                &[other, first],
                &format!("! {first} and {other} use the same port of the same address; remove one of them"),
            );
        };
        check_conflict("127.0.0.1:1", "localhost:1");
        check_conflict("localhost:1", "127.0.0.1:1");
        check_conflict("[::1]:1", "localhost:1");
        check_conflict("127.0.0.1:1", "0.0.0.0:1");
        check_conflict("0.0.0.0:1", "localhost:1");
        check_conflict("[::1]:1", "[::]:1");
        for pair in [
            ["127.0.0.1:1", "127.0.0.1:2"],
            ["127.0.0.1:1", "[::1]:1"],
            // The IPv6 address of `localhost` is optional.
            ["[::1]:1", "localhost:1"],
            ["127.0.0.1:1", "127.0.0.2:1"],
            ["127.0.0.1:0", "localhost:0"],
        ] {
            check_list(&pair, &format!("[\"{}\", \"{}\"]", pair[0], pair[1]));
        }
    }

    #[test]
    fn the_path_of_a_socket_is_absolute_and_at_most_107_bytes() {
        let advice = "write unix: and an absolute path, for example unix:/run/keychoir/keychoir.sock";
        for text in ["unix:", "unix:k.sock", "unix:/run/"] {
            check_list(&[text], &format!("! `{text}` has no absolute path to a file; {advice}"));
        }
        let path = |bytes: usize| format!("unix:/{}", "a".repeat(bytes - 1));
        assert!(path(107).parse::<ListenAddress>().is_ok());
        check_list(&[&path(108)], "! the path of the socket has 108 bytes; the maximum is 107");
    }

    #[test]
    fn only_tcp_addresses_other_than_loopback_are_exposed() {
        let exposed = |texts: &[&str]| {
            ListenAddresses::parse(texts).unwrap().exposed_address().map(ToString::to_string)
        };
        assert_eq!(exposed(&["127.0.0.1:1", "unix:/k", "systemd"]), None);
        assert_eq!(exposed(&["127.0.0.1:1", "0.0.0.0:2"]).as_deref(), Some("0.0.0.0:2"));
    }

    #[test]
    fn a_mode_is_octal() {
        for text in ["0660", "0600", "0777", "0000"] {
            assert_eq!(text.parse::<UnixMode>().unwrap().to_string(), text);
        }
        assert_eq!("660".parse::<UnixMode>().unwrap(), UnixMode::default());
        for text in ["", "66", "0668", "1777", "00660", "rw-rw----", "+660"] {
            assert!(text.parse::<UnixMode>().is_err(), "the mode {text:?} must be refused");
        }
    }
}

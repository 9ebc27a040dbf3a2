//! Parses the addresses of `server.listen`: TCP addresses, Unix sockets, and sockets passed by systemd.

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

/// All addresses to listen on. Never empty, and without duplicates or conflicts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenAddresses(Vec<ListenAddress>);

/// The file mode of a Unix socket, which determines the users who may connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnixMode(u32);

/// Maximum number of bytes of a Unix socket's path on Linux, without the terminating zero.
const MAX_UNIX_PATH_BYTES: usize = 107;

impl ListenAddresses {
    /// Listens only on the sockets that systemd passes.
    pub(super) fn systemd() -> Self {
        Self(vec![ListenAddress::Systemd])
    }

    pub(crate) fn parse(texts: &[&str]) -> Result<Self, ValueError> {
        let mut listens = Vec::with_capacity(texts.len());
        for text in texts {
            let listen = text.parse::<ListenAddress>()?;
            if listens.contains(&listen) {
                return Err(ValueError::new(format!("{} is listed twice", quote_masked(text))));
            }
            if let Some(other) = listens.iter().find(|other| listen.conflicts_with(other)) {
                return Err(ValueError::new(format!(
                    "{listen} and {other} are the same port of the same address"
                ))
                .advise("remove one of them"));
            }
            listens.push(listen);
        }
        if listens.is_empty() {
            let error = ValueError::new("the list of addresses is empty");
            return Err(error.advise("write HOST:PORT, for example 127.0.0.1:11011"));
        }
        Ok(Self(listens))
    }

    /// Returns the addresses in the configured order.
    pub fn iter(&self) -> std::slice::Iter<'_, ListenAddress> {
        self.0.iter()
    }

    /// Returns the TCP addresses.
    pub fn tcp_addresses(&self) -> impl Iterator<Item = &HostPort> {
        self.iter().filter_map(|listen| match listen {
            ListenAddress::Tcp(address) => Some(address),
            ListenAddress::Unix(_) | ListenAddress::Systemd => None,
        })
    }

    /// Returns the first TCP address with a port other than 0, which is known before Keychoir listens.
    #[must_use]
    pub fn fixed_port(&self) -> Option<&HostPort> {
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
    /// Whether both bind the same port of the same address. For `localhost`, only the IPv4 address of
    /// `self` is compared, because its IPv6 address is optional.
    pub(super) fn conflicts_with(&self, other: &Self) -> bool {
        let (Self::Tcp(address), Self::Tcp(other)) = (self, other) else { return false };
        let required = address.socket_addresses().into_iter().take(1);
        let mut pairs = required.flat_map(|required| {
            other.socket_addresses().into_iter().map(move |optional| (required, optional))
        });
        pairs.any(|(required, optional)| {
            required.port() != 0
                && required.port() == optional.port()
                && addresses_overlap(required.ip(), optional.ip())
        })
    }
}

/// Whether two addresses are equal, or one of them is the wildcard address of the other's family.
fn addresses_overlap(first: IpAddr, other: IpAddr) -> bool {
    // Whether the IPv6 wildcard includes IPv4 depends on the system.
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

/// Formats in TOML notation.
impl fmt::Display for ListenAddresses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let listed_names = self.0.iter().map(|listen| format!("\"{listen}\"")).collect::<Vec<_>>().join(", ");
        if self.0.len() == 1 { f.write_str(&listed_names) } else { write!(f, "[{listed_names}]") }
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
    fn check(texts: &[&str], expected: &str) {
        let printed = match ListenAddresses::parse(texts) {
            Ok(listens) => listens.to_string(),
            Err(error) => format!("! {error}"),
        };
        assert_eq!(printed, expected);
    }

    #[test]
    fn every_kind_of_address_is_parsed() {
        check(&["127.0.0.1:1"], "\"127.0.0.1:1\"");
        check(
            &["localhost:1", "unix:/run/k.sock", "systemd"],
            "[\"localhost:1\", \"unix:/run/k.sock\", \"systemd\"]",
        );
    }

    #[test]
    fn one_invalid_address_makes_the_list_invalid() {
        check(&["127.0.0.1:1", "x"], "! `x` has no port; write HOST:PORT, for example 127.0.0.1:11011");
        check(&["systemd", "systemd"], "! `systemd` is listed twice");
        check(&[], "! the list of addresses is empty; write HOST:PORT, for example 127.0.0.1:11011");
    }

    #[test]
    fn a_port_of_an_address_is_listed_once() {
        let conflict = |first: &str, other: &str| {
            check(
                &[other, first],
                &format!("! {first} and {other} are the same port of the same address; remove one of them"),
            );
        };
        conflict("127.0.0.1:1", "localhost:1");
        conflict("localhost:1", "127.0.0.1:1");
        conflict("[::1]:1", "localhost:1");
        conflict("127.0.0.1:1", "0.0.0.0:1");
        conflict("0.0.0.0:1", "localhost:1");
        conflict("[::1]:1", "[::]:1");
        for pair in [
            ["127.0.0.1:1", "127.0.0.1:2"],
            ["127.0.0.1:1", "[::1]:1"],
            // The second address of `localhost` is optional.
            ["[::1]:1", "localhost:1"],
            ["127.0.0.1:1", "127.0.0.2:1"],
            ["127.0.0.1:0", "localhost:0"],
        ] {
            check(&pair, &format!("[\"{}\", \"{}\"]", pair[0], pair[1]));
        }
    }

    #[test]
    fn the_path_of_a_socket_is_absolute_and_at_most_107_bytes() {
        let advice = "write unix: and an absolute path, for example unix:/run/keychoir/keychoir.sock";
        for text in ["unix:", "unix:k.sock", "unix:/run/"] {
            check(&[text], &format!("! `{text}` has no absolute path to a file; {advice}"));
        }
        let path = |bytes: usize| format!("unix:/{}", "a".repeat(bytes - 1));
        assert!(path(107).parse::<ListenAddress>().is_ok());
        check(&[&path(108)], "! the path of the socket has 108 bytes; the maximum is 107");
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
            assert!(text.parse::<UnixMode>().is_err(), "{text}");
        }
    }
}

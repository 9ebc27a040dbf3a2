//! Parses the listeners: TCP addresses, Unix sockets, and sockets passed by systemd.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

use super::host_port::HostPort;
use super::mask::shown;
use super::problem::WrongValue;

/// An address to listen on.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Listen {
    /// A TCP address and port.
    Port(HostPort),
    /// A Unix socket at this absolute path.
    Unix(PathBuf),
    /// Every socket that systemd passes.
    Systemd,
}

/// All listeners. Never empty, without duplicates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listens(Vec<Listen>);

/// The file mode of a Unix socket, which restricts the users who may connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnixMode(u32);

/// Maximum length of a Unix socket's path on Linux in bytes, without the final zero.
const MAX_UNIX_PATH_BYTES: usize = 107;

impl Listens {
    /// Only the sockets that systemd passes.
    pub(super) fn systemd() -> Self {
        Self(vec![Listen::Systemd])
    }

    pub(crate) fn parse(texts: &[&str]) -> Result<Self, WrongValue> {
        let mut listens = Vec::with_capacity(texts.len());
        for text in texts {
            let listen = text.parse::<Listen>()?;
            if listens.contains(&listen) {
                return Err(WrongValue::new(format!("{} is given twice", shown(text))));
            }
            if let Some(other) = listens.iter().find(|other| listen.conflicts_with(other)) {
                return Err(WrongValue::new(format!("{listen} and {other} are one port of one address"))
                    .advise("remove one of them"));
            }
            listens.push(listen);
        }
        if listens.is_empty() {
            let wrong = WrongValue::new("there is nothing to listen on");
            return Err(wrong.advise("write HOST:PORT, for example 127.0.0.1:11011"));
        }
        Ok(Self(listens))
    }

    /// The listeners in the configured order.
    pub fn iter(&self) -> std::slice::Iter<'_, Listen> {
        self.0.iter()
    }

    /// The first TCP listener that other machines can reach. Sockets of systemd are checked when
    /// they are received.
    #[must_use]
    pub fn exposed(&self) -> Option<&HostPort> {
        self.0.iter().find_map(|listen| match listen {
            Listen::Port(port) if !port.is_loopback() => Some(port),
            Listen::Port(_) | Listen::Unix(_) | Listen::Systemd => None,
        })
    }
}

impl Listen {
    /// The TCP address, if the listener is one.
    #[must_use]
    pub fn port(&self) -> Option<&HostPort> {
        match self {
            Self::Port(port) => Some(port),
            Self::Unix(_) | Self::Systemd => None,
        }
    }

    /// Whether both listeners bind the same port of the same address. Of `localhost`, only the IPv4
    /// address is compared, because its IPv6 address is optional.
    fn conflicts_with(&self, other: &Self) -> bool {
        let (Self::Port(port), Self::Port(other)) = (self, other) else { return false };
        let required = port.socket_addresses().into_iter().take(1);
        let mut pairs = required.flat_map(|required| {
            other.socket_addresses().into_iter().map(move |optional| (required, optional))
        });
        pairs.any(|(required, optional)| {
            required.port() != 0
                && required.port() == optional.port()
                && overlap(required.ip(), optional.ip())
        })
    }
}

/// Whether two addresses are equal, or one of them is the wildcard of the other's family.
fn overlap(first: IpAddr, other: IpAddr) -> bool {
    // The system decides whether the IPv6 wildcard includes IPv4.
    let is_wildcard_of =
        |address: IpAddr, other: IpAddr| address.is_unspecified() && address.is_ipv4() == other.is_ipv4();
    first.to_canonical() == other.to_canonical()
        || is_wildcard_of(first, other)
        || is_wildcard_of(other, first)
}

impl Default for Listens {
    fn default() -> Self {
        Self(vec![Listen::Port(HostPort::default())])
    }
}

/// Formats in TOML notation.
impl fmt::Display for Listens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let listed = self.0.iter().map(|listen| format!("\"{listen}\"")).collect::<Vec<_>>().join(", ");
        if self.0.len() == 1 { f.write_str(&listed) } else { write!(f, "[{listed}]") }
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Port(port) => port.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Systemd => f.write_str("systemd"),
        }
    }
}

impl FromStr for Listen {
    type Err = WrongValue;

    fn from_str(text: &str) -> Result<Self, WrongValue> {
        const NOTATION: &str = "write unix: and the whole path, for example unix:/run/keychoir/keychoir.sock";
        if text == "systemd" {
            return Ok(Self::Systemd);
        }
        let Some(path) = text.strip_prefix("unix:") else { return text.parse().map(Self::Port) };
        if !path.starts_with('/') || path.ends_with('/') {
            return Err(WrongValue::new(format!("{} has no whole path", shown(text))).advise(NOTATION));
        }
        if path.len() > MAX_UNIX_PATH_BYTES {
            let count = path.len();
            let wrong = WrongValue::new(format!("the path of the socket has {count} bytes"));
            return Err(wrong.advise(format!("the maximum is {MAX_UNIX_PATH_BYTES}")));
        }
        Ok(Self::Unix(PathBuf::from(path)))
    }
}

impl UnixMode {
    /// The permission bits.
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
    type Err = WrongValue;

    fn from_str(text: &str) -> Result<Self, WrongValue> {
        let is_octal = (3..=4).contains(&text.len()) && text.bytes().all(|b| (b'0'..=b'7').contains(&b));
        match u32::from_str_radix(text, 8) {
            Ok(bits) if is_octal && bits <= 0o777 => Ok(Self(bits)),
            Ok(_) | Err(_) => Err(WrongValue::new(format!("{} is no file mode", shown(text)))
                .advise("write three octal digits after a zero, for example 0660")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(texts: &[&str], expected: &str) {
        let printed = match Listens::parse(texts) {
            Ok(listens) => listens.to_string(),
            Err(wrong) => format!("! {wrong}"),
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
    fn one_wrong_address_refuses_the_list() {
        check(&["127.0.0.1:1", "x"], "! `x` has no port; write HOST:PORT, for example 127.0.0.1:11011");
        check(&["systemd", "systemd"], "! `systemd` is given twice");
        check(&[], "! there is nothing to listen on; write HOST:PORT, for example 127.0.0.1:11011");
    }

    #[test]
    fn one_port_of_one_address_is_listened_on_once() {
        let conflict = |first: &str, other: &str| {
            check(
                &[other, first],
                &format!("! {first} and {other} are one port of one address; remove one of them"),
            );
        };
        conflict("127.0.0.1:1", "localhost:1");
        conflict("localhost:1", "127.0.0.1:1");
        conflict("[::1]:1", "localhost:1");
        conflict("127.0.0.1:1", "0.0.0.0:1");
        conflict("0.0.0.0:1", "localhost:1");
        conflict("[::1]:1", "[::]:1");
        for two in [
            ["127.0.0.1:1", "127.0.0.1:2"],
            ["127.0.0.1:1", "[::1]:1"],
            // The second address of `localhost` is optional.
            ["[::1]:1", "localhost:1"],
            ["127.0.0.1:1", "127.0.0.2:1"],
            ["127.0.0.1:0", "localhost:0"],
        ] {
            check(&two, &format!("[\"{}\", \"{}\"]", two[0], two[1]));
        }
    }

    #[test]
    fn the_path_of_a_socket_is_whole_and_short() {
        let advice = "write unix: and the whole path, for example unix:/run/keychoir/keychoir.sock";
        for text in ["unix:", "unix:k.sock", "unix:/run/"] {
            check(&[text], &format!("! `{text}` has no whole path; {advice}"));
        }
        let path = |bytes: usize| format!("unix:/{}", "a".repeat(bytes - 1));
        assert!(path(107).parse::<Listen>().is_ok());
        check(&[&path(108)], "! the path of the socket has 108 bytes; the maximum is 107");
    }

    #[test]
    fn only_ports_beyond_loopback_are_exposed() {
        let exposed = |texts: &[&str]| Listens::parse(texts).unwrap().exposed().map(ToString::to_string);
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

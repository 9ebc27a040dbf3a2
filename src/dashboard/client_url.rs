//! Computes the base URL that clients use. The page Connect shows it in its examples.

use std::net::SocketAddr;

/// Returns the base URL for clients. `base_url` is the URL at which the browser reached Keychoir, and clients use it if
/// `address` is `None`. Otherwise, the URL consists of `address`, at which Keychoir serves clients, and of `base_path`.
/// A wildcard `address` is replaced by the host of `base_url`.
pub(super) fn client_url(base_url: &str, address: Option<SocketAddr>, base_path: &str) -> String {
    match address {
        None => base_url.to_owned(),
        // The URL begins with `http`, because every address also serves HTTP without TLS.
        Some(address) if address.ip().is_unspecified() => {
            format!("http://{}:{}{base_path}", host_of(base_url), address.port())
        }
        Some(address) => format!("http://{address}{base_path}"),
    }
}

/// Returns the host of a URL, without its port.
fn host_of(base_url: &str) -> &str {
    let authority = base_url.split_once("://").map_or(base_url, |(_, authority)| authority);
    let authority = authority.split('/').next().unwrap_or_default();
    match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => host,
        Some(_) | None => authority,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_address(address: &str, expected: &str) {
        let address = Some(address.parse().unwrap());
        assert_eq!(client_url("http://keys.lan:9000/speech", address, "/speech"), expected);
    }

    #[test]
    fn clients_use_the_url_of_the_browser_or_the_address_for_clients() {
        assert_eq!(client_url("https://keys.lan/speech", None, "/speech"), "https://keys.lan/speech");
        check_address("127.0.0.1:11011", "http://127.0.0.1:11011/speech");
        check_address("[::1]:11011", "http://[::1]:11011/speech");
        check_address("0.0.0.0:11011", "http://keys.lan:11011/speech");
        check_address("[::]:11011", "http://keys.lan:11011/speech");
    }

    #[test]
    fn a_wildcard_address_gets_the_host_of_the_browser() {
        let address = Some("0.0.0.0:80".parse().unwrap());
        assert_eq!(client_url("https://[::1]:9000", address, ""), "http://[::1]:80");
        assert_eq!(client_url("https://keys.lan", address, ""), "http://keys.lan:80");
    }
}

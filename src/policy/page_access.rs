//! Decides which credential the pages about the state of the pool require: the status, the details of the keys, and
//! the metrics.

use std::net::IpAddr;

/// The credential that a page requires. The admin token always opens the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageAccess {
    /// The page requires no credential.
    Open,
    /// The page requires a client token, if clients have tokens.
    Client,
    /// The page requires the admin token.
    Operator,
}

/// Decides which credential a page requires from a client at `peer`, which is `None` for a Unix socket.
///
/// The pages show the names of clients and keys, and their usage. Programs on this machine may read them
/// with a client token. Other machines need the admin token, unless the operator has made the page public.
#[must_use]
pub fn page_access(is_public: bool, peer: Option<IpAddr>) -> PageAccess {
    let is_local = peer.is_none_or(|address| address.to_canonical().is_loopback());
    match (is_public, is_local) {
        (true, _) => PageAccess::Open,
        (false, true) => PageAccess::Client,
        (false, false) => PageAccess::Operator,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_access(is_public: bool, peer: Option<&str>, expected: PageAccess) {
        let peer = peer.map(|address| address.parse().unwrap());
        assert_eq!(page_access(is_public, peer), expected, "a client at {peer:?} must need this credential");
    }

    #[test]
    fn other_machines_need_the_admin_token_for_pages_that_are_not_public() {
        for local in [None, Some("127.0.0.1"), Some("127.8.0.1"), Some("::1"), Some("::ffff:127.0.0.1")] {
            check_access(false, local, PageAccess::Client);
            check_access(true, local, PageAccess::Open);
        }
        for remote in [Some("10.0.0.7"), Some("192.0.2.1"), Some("2001:db8::1"), Some("::ffff:10.0.0.7")] {
            check_access(false, remote, PageAccess::Operator);
            check_access(true, remote, PageAccess::Open);
        }
    }
}

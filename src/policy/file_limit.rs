//! Computes the maximum number of client connections from the limit of open files. At the maximum, Keychoir stops
//! accepting connections, and clients wait in the backlog. Without this maximum, requests would fail with 502, because
//! no file is left for the upstream connection, and the database could not open its files.

/// Files for purposes other than client and upstream connections: the database with its logs, listeners,
/// event queues of the workers, name lookups, the mirror, and uploads on disk.
const RESERVED_FILES: u64 = 128;

/// The configured limits of connections and requests, for which files are needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestedLimits {
    /// Maximum number of client connections.
    pub connections: usize,
    /// Maximum number of requests in flight. Each has an upstream connection.
    pub requests: usize,
    /// Maximum number of idle upstream connections.
    pub idle_connections: usize,
}

/// Returns the maximum number of client connections if `file_limit` files may be open. This maximum is the configured
/// number if each connection can then have a request in flight. Otherwise it is lower, but at least one.
#[must_use]
pub fn max_connections(file_limit: u64, requested: RequestedLimits) -> usize {
    let usable_files = file_limit - RESERVED_FILES.min(file_limit / 2);
    let idle_files = (requested.idle_connections as u64).min(usable_files / 4);
    let request_files = usable_files - idle_files;
    // Every connection may need a second file for its request, up to the maximum number of requests.
    let max_clients = (request_files / 2).max(request_files.saturating_sub(requested.requests as u64)).max(1);
    requested.connections.min(usize::try_from(max_clients).unwrap_or(usize::MAX))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DEFAULT: RequestedLimits =
        RequestedLimits { connections: 10_000, requests: 5_000, idle_connections: 256 };

    #[track_caller]
    fn check_max_connections(limit: u64, requested: RequestedLimits, expected: usize) {
        assert_eq!(
            max_connections(limit, requested),
            expected,
            "{limit} files must allow this number of connections for {requested:?}"
        );
    }

    #[test]
    fn a_large_limit_allows_the_configured_connections() {
        check_max_connections(u64::MAX, DEFAULT, 10_000);
        check_max_connections(1_048_576, DEFAULT, 10_000);
        check_max_connections(15_384, DEFAULT, 10_000);
        check_max_connections(15_383, DEFAULT, 9_999);
        check_max_connections(1_024, RequestedLimits { connections: 100, ..DEFAULT }, 100);
    }

    #[test]
    fn a_small_limit_allows_fewer_connections() {
        check_max_connections(4_096, DEFAULT, 1_856);
        check_max_connections(1_024, DEFAULT, 336);
        check_max_connections(1_024, RequestedLimits { requests: 10, ..DEFAULT }, 662);
        check_max_connections(256, DEFAULT, 48);
        check_max_connections(1, DEFAULT, 1);
        check_max_connections(0, DEFAULT, 1);
    }

    proptest! {
        #[test]
        fn every_request_of_every_client_has_a_file(
            limit in 8..100_000_u64,
            connections in 1..50_000_usize,
            requests in 1..50_000_usize,
            idle_connections in 0..50_000_usize,
        ) {
            let requested = RequestedLimits { connections, requests, idle_connections };
            let max_clients = max_connections(limit, requested);
            prop_assert!((1..=connections).contains(&max_clients));
            prop_assert!((max_clients + max_clients.min(requests)) as u64 + RESERVED_FILES.min(limit / 2) <= limit);
        }
    }
}

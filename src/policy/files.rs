//! Computes the maximum number of client connections under a limit of open files. At the maximum,
//! accepting stops and clients wait in the backlog, because a request needs a file for its upstream
//! connection and would otherwise fail with a 502, and the database needs files as well.

/// Files for everything but client and upstream connections: the database with its logs, listeners, the
/// workers' event queues, name lookups, the mirror, uploads on disk.
const BASE: u64 = 128;

/// The configured limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestedLimits {
    /// Maximum client connections.
    pub connections: usize,
    /// Maximum requests in flight, each with an upstream connection.
    pub requests: usize,
    /// Maximum idle upstream connections.
    pub idle_connections: usize,
}

/// The maximum number of client connections when `limit` files may be open: as many as configured, if
/// each of them can have a request in flight. At least one.
#[must_use]
pub fn connections(limit: u64, requested: RequestedLimits) -> usize {
    let usable = limit - BASE.min(limit / 2);
    let idle = (requested.idle_connections as u64).min(usable / 4);
    let usable = usable - idle;
    // Half of the files if every client has a request, or all files that the maximum number of requests
    // leaves.
    let max_clients = (usable / 2).max(usable.saturating_sub(requested.requests as u64)).max(1);
    requested.connections.min(usize::try_from(max_clients).unwrap_or(usize::MAX))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DEFAULT: RequestedLimits =
        RequestedLimits { connections: 10_000, requests: 5_000, idle_connections: 256 };

    #[track_caller]
    fn check(limit: u64, requested: RequestedLimits, expected: usize) {
        assert_eq!(connections(limit, requested), expected, "{limit} files for {requested:?}");
    }

    #[test]
    fn the_configured_connections_are_accepted_where_they_fit() {
        check(u64::MAX, DEFAULT, 10_000);
        check(1_048_576, DEFAULT, 10_000);
        check(15_384, DEFAULT, 10_000);
        check(15_383, DEFAULT, 9_999);
        check(1_024, RequestedLimits { connections: 100, ..DEFAULT }, 100);
    }

    #[test]
    fn fewer_connections_are_accepted_under_a_small_limit() {
        check(4_096, DEFAULT, 1_856);
        check(1_024, DEFAULT, 336);
        check(1_024, RequestedLimits { requests: 10, ..DEFAULT }, 662);
        check(256, DEFAULT, 48);
        check(1, DEFAULT, 1);
        check(0, DEFAULT, 1);
    }

    proptest! {
        #[test]
        fn there_is_a_file_for_every_request_of_every_client(
            limit in 8..100_000_u64,
            connections in 1..50_000_usize,
            requests in 1..50_000_usize,
            idle_connections in 0..50_000_usize,
        ) {
            let requested = RequestedLimits { connections, requests, idle_connections };
            let clients = super::connections(limit, requested);
            prop_assert!((1..=connections).contains(&clients));
            prop_assert!((clients + clients.min(requests)) as u64 + BASE.min(limit / 2) <= limit);
        }
    }
}

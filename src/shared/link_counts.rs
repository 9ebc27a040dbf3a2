//! Counts the commands, the round trips and the failures of the connection to Redis, and adds them to the metrics.

use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use redis::RedisError;

use super::connect_error::{RedisConnectError, RedisRefusal};
use crate::telemetry::Histogram;

/// The upper bounds of the buckets in seconds: from the round trip to a Redis on the same machine (0.1 ms) to the
/// default of `redis.response_timeout` (1 s).
const ROUND_TRIP_BUCKETS: &[f64] =
    &[0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0];

/// The reason why a connection to Redis failed or could not be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LinkFault {
    /// The name of a host has no address.
    Name,
    /// No address of the host accepts a connection.
    Unreachable,
    /// Redis did not respond in time.
    Timeout,
    /// The TLS handshake failed.
    Tls,
    /// The connection was closed, or the server is not a Redis.
    Closed,
    /// Redis refused the login or a command.
    Refused,
    /// No sentinel returned the address of the master.
    Sentinel,
    /// The reply of a script has an unexpected form.
    Reply,
}

impl LinkFault {
    const ALL: [Self; 8] = [
        Self::Name,
        Self::Unreachable,
        Self::Timeout,
        Self::Tls,
        Self::Closed,
        Self::Refused,
        Self::Sentinel,
        Self::Reply,
    ];

    /// Returns the value of the label `reason`.
    fn as_str(self) -> &'static str {
        match self {
            Self::Name => "name_lookup",
            Self::Unreachable => "unreachable",
            Self::Timeout => "timeout",
            Self::Tls => "tls",
            Self::Closed => "closed",
            Self::Refused => "refused",
            Self::Sentinel => "sentinel",
            Self::Reply => "unexpected_reply",
        }
    }

    /// Returns the reason why a connection could not be opened.
    pub(super) fn of_connect(error: &RedisConnectError) -> Self {
        match error {
            RedisConnectError::Name { .. } => Self::Name,
            RedisConnectError::Unreachable { .. } => Self::Unreachable,
            RedisConnectError::Timeout { .. } => Self::Timeout,
            RedisConnectError::Tls { .. } => Self::Tls,
            RedisConnectError::Broken { .. } => Self::Closed,
            RedisConnectError::Refused { .. } => Self::Refused,
            RedisConnectError::UnknownMaster { .. } | RedisConnectError::NoSentinel(_) => Self::Sentinel,
        }
    }

    /// Returns the reason why a command failed.
    pub(super) fn of_command(error: &RedisError) -> Self {
        if RedisRefusal::from_error(error).is_some() { Self::Refused } else { Self::Closed }
    }
}

/// The counts of the connection to Redis. All clones share them.
#[derive(Clone, Debug)]
pub struct LinkCounts {
    commands: Counter,
    round_trip: Histogram,
    errors: Family<[(&'static str, &'static str); 1], Counter>,
}

impl Default for LinkCounts {
    fn default() -> Self {
        let errors = Family::default();
        // Each series exists with the value 0 from the start, so that a query sees its first increase.
        for fault in LinkFault::ALL {
            drop(errors.get_or_create(&labels(fault)));
        }
        Self { commands: Counter::default(), round_trip: Histogram::new(ROUND_TRIP_BUCKETS), errors }
    }
}

impl LinkCounts {
    /// Counts commands that were sent together.
    pub(super) fn record_commands(&self, commands: usize) {
        self.commands.inc_by(commands as u64);
    }

    /// Records the time from sending commands together to their last response.
    pub(super) fn record_round_trip(&self, duration: Duration) {
        self.round_trip.observe(duration);
    }

    /// Counts a connection that failed or could not be opened.
    pub(super) fn record_error(&self, fault: LinkFault) {
        self.errors.get_or_create(&labels(fault)).inc();
    }

    /// Adds the metrics to a registry.
    pub fn register(&self, registry: &mut Registry) {
        let help = "Commands that this replica sent to Redis";
        registry.register("redis_commands", help, self.commands.clone());
        let help = "From the commands of a beat or a change to the last response of Redis";
        registry.register("redis_round_trip_seconds", help, self.round_trip.clone());
        let help = "Connections to Redis that failed or could not be opened";
        registry.register("redis_errors", help, self.errors.clone());
    }
}

fn labels(fault: LinkFault) -> [(&'static str, &'static str); 1] {
    [("reason", fault.as_str())]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_a_separate_series_from_the_start() {
        let counts = LinkCounts::default();
        counts.record_error(LinkFault::Timeout);
        let mut registry = Registry::default();
        counts.register(&mut registry);
        let page = crate::telemetry::ExpositionFormat::OpenMetrics.write_page(&[&registry]);
        let series: Vec<&str> = page.lines().filter(|line| line.starts_with("redis_errors_total{")).collect();
        assert_eq!(series.len(), LinkFault::ALL.len(), "each reason must have one series in {page}");
        assert!(
            series.contains(&"redis_errors_total{reason=\"timeout\"} 1"),
            "the timeout must be counted in {page}"
        );
        let zero_count = series.iter().filter(|line| line.ends_with(" 0")).count();
        assert_eq!(zero_count, series.len() - 1, "all other reasons must have the value 0 in {page}");
    }

    #[test]
    fn a_refused_command_and_a_lost_connection_have_different_reasons() {
        let denied = redis::parse_redis_value(b"-NOPERM no permission\r\n").unwrap();
        let denied = denied.extract_error().unwrap_err();
        assert_eq!(LinkFault::of_command(&denied), LinkFault::Refused);
        let reset = RedisError::from(std::io::Error::from(std::io::ErrorKind::ConnectionReset));
        assert_eq!(LinkFault::of_command(&reset), LinkFault::Closed);
    }
}

//! Limits the wrong credentials that one address may send within a minute, so that the admin token cannot be guessed
//! and other addresses are not affected. All IPv6 addresses with the same 64-bit prefix count as one address.

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use super::units::UnixMs;

/// Maximum number of wrong credentials of an address within [`WINDOW`].
pub const MAX_FAILURES: usize = 10;
/// The time in which the failures of an address are counted.
pub const WINDOW: Duration = Duration::from_secs(60);
/// Maximum number of addresses in the table, which then takes about 200 kilobytes.
const MAX_ADDRESSES: usize = 1_024;

/// The times of recent wrong credentials, by address.
#[derive(Clone, Debug, Default)]
pub struct AuthFailures {
    /// The times of the last failures, oldest first. `None` stands for all clients of a Unix socket.
    by_address: HashMap<Option<IpAddr>, VecDeque<UnixMs>>,
}

impl AuthFailures {
    /// Returns the duration for which requests from `address` are refused from `now` on, or `None` if they are
    /// accepted.
    #[must_use]
    pub fn retry_after(&self, address: Option<IpAddr>, now: UnixMs) -> Option<Duration> {
        let failures = self.by_address.get(&client_network(address))?;
        // If the clock was set back, the times of failures may be in the future. Such failures do not count.
        let are_failures_past = failures.back().is_some_and(|last| *last <= now);
        let oldest = failures.front().filter(|_| are_failures_past && failures.len() >= MAX_FAILURES)?;
        let remaining = oldest.plus(WINDOW).since(now);
        (!remaining.is_zero()).then_some(remaining)
    }

    /// Records a wrong credential from `address` at `now`. Failures with a later time are removed, because
    /// the clock was set back, and they would refuse the address for longer than [`WINDOW`].
    pub fn record(&mut self, address: Option<IpAddr>, now: UnixMs) {
        let address = client_network(address);
        if !self.by_address.contains_key(&address) && self.by_address.len() >= MAX_ADDRESSES {
            self.remove_least_recent();
        }
        let failures = self.by_address.entry(address).or_default();
        failures.retain(|at| *at <= now);
        if failures.len() >= MAX_FAILURES {
            failures.pop_front();
        }
        failures.push_back(now);
    }

    /// Removes the address whose last failure is the oldest.
    fn remove_least_recent(&mut self) {
        let least_recent = self.by_address.iter().min_by_key(|(_, failures)| failures.back().copied());
        if let Some(address) = least_recent.map(|(address, _)| *address) {
            self.by_address.remove(&address);
        }
    }
}

/// Returns the network whose failures are counted together: an IPv4 address, or the 64-bit prefix of an IPv6 address,
/// because a host usually has all addresses of its prefix.
fn client_network(address: Option<IpAddr>) -> Option<IpAddr> {
    match address?.to_canonical() {
        IpAddr::V4(address) => Some(IpAddr::V4(address)),
        IpAddr::V6(address) => {
            let mut segments = address.segments();
            segments[4..].fill(0);
            Some(IpAddr::V6(Ipv6Addr::from(segments)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: UnixMs = UnixMs(1_000_000);

    fn address(text: &str) -> Option<IpAddr> {
        Some(text.parse().unwrap())
    }

    fn after(ms: u64) -> UnixMs {
        UnixMs(NOW.0 + ms)
    }

    #[test]
    fn ten_failures_in_a_minute_refuse_the_address_until_the_first_is_a_minute_old() {
        let mut failures = AuthFailures::default();
        for number in 0..10 {
            assert_eq!(failures.retry_after(address("10.0.0.1"), after(number)), None);
            failures.record(address("10.0.0.1"), after(number));
        }
        assert_eq!(failures.retry_after(address("10.0.0.1"), after(9)), Some(Duration::from_millis(59_991)));
        assert_eq!(failures.retry_after(address("10.0.0.1"), after(59_999)), Some(Duration::from_millis(1)));
        assert_eq!(failures.retry_after(address("10.0.0.1"), after(60_000)), None);
        failures.record(address("10.0.0.1"), after(60_000));
        assert!(
            failures.retry_after(address("10.0.0.1"), after(60_000)).is_some(),
            "the second failure must still count"
        );
    }

    #[test]
    fn a_clock_that_is_set_back_does_not_prolong_the_refusal() {
        const HOUR: u64 = 3_600_000;
        let mut failures = AuthFailures::default();
        for number in 0..10 {
            failures.record(address("10.0.0.1"), after(HOUR + number));
        }
        assert!(failures.retry_after(address("10.0.0.1"), after(HOUR + 9)).is_some());
        assert_eq!(failures.retry_after(address("10.0.0.1"), NOW), None, "later failures must not count");
        for _ in 0..9 {
            failures.record(address("10.0.0.1"), NOW);
            assert_eq!(failures.retry_after(address("10.0.0.1"), NOW), None);
        }
        failures.record(address("10.0.0.1"), NOW);
        assert_eq!(failures.retry_after(address("10.0.0.1"), NOW), Some(WINDOW));
    }

    #[test]
    fn other_addresses_are_not_affected() {
        let mut failures = AuthFailures::default();
        for _ in 0..10 {
            failures.record(address("2001:db8::1"), NOW);
            failures.record(address("::ffff:10.0.0.1"), NOW);
        }
        for (text, is_refused) in
            [("2001:db8::2", true), ("2001:db8:0:1::1", false), ("10.0.0.1", true), ("10.0.0.2", false)]
        {
            assert_eq!(
                failures.retry_after(address(text), NOW).is_some(),
                is_refused,
                "{text} must be refused only after ten failures in its network"
            );
        }
        assert_eq!(failures.retry_after(None, NOW), None);
    }

    #[test]
    fn a_full_table_removes_the_address_that_failed_longest_ago() {
        let mut failures = AuthFailures::default();
        for _ in 0..10 {
            failures.record(address("10.0.0.1"), NOW);
        }
        for number in 0..1_023_u32 {
            failures.record(Some(IpAddr::from(number.to_be_bytes())), after(1));
        }
        assert!(failures.retry_after(address("10.0.0.1"), after(2)).is_some());
        failures.record(address("11.0.0.1"), after(2));
        assert_eq!(failures.retry_after(address("10.0.0.1"), after(2)), None);
        assert_eq!(failures.by_address.len(), 1_024);
    }
}

//! Simulates a month of requests with each strategy, against a provider whose prices differ from the pool's estimates.
//! Tests that no strategy refuses a request while an account can pay for it, and that the provider refuses few
//! attempts. Also tests that the leases are counted correctly, and that `soonest-reset` lets the fewest credits expire.

#![allow(clippy::print_stdout, reason = "the test prints a table of its results")]

use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::elevenlabs::plan::Capabilities;
use crate::policy::client::ClientName;
use crate::policy::concurrency_group::ConcurrencyGroup;
use crate::policy::evidence::RefusalSource;
use crate::policy::select::Unavailable;
use crate::policy::strategy::{STRATEGIES, Strategy};
use crate::policy::verdict::{Shortfall, Verdict};
use crate::secret::ApiKey;

const HOUR_MS: u64 = 3_600_000;
const DAY_MS: u64 = 24 * HOUR_MS;
const START: UnixMs = UnixMs(20_000 * DAY_MS);
const DAYS: u64 = 30;
const CLIENTS: [&str; 4] = ["narrator", "phone", "game", "reader"];

/// A workspace of the simulated provider.
struct Account {
    /// Credits of each period.
    credits: u64,
    max_concurrent: u32,
    /// The price of a request in percent of the pool's estimate.
    price_percent: u64,
    remaining: u64,
    resets_at: UnixMs,
}

/// The index of the account of each key.
const KEY_ACCOUNTS: [usize; 8] = [0, 0, 1, 2, 2, 3, 4, 4];

fn accounts() -> Vec<Account> {
    let account = |credits, reset_day, max_concurrent, price_percent| Account {
        credits,
        max_concurrent,
        price_percent,
        remaining: credits,
        resets_at: UnixMs(START.0 + reset_day * DAY_MS),
    };
    vec![
        account(60_000, 25, 3, 100),
        account(200_000, 3, 5, 100),
        account(30_000, 12, 2, 50),
        account(400_000, 18, 10, 75),
        account(120_000, 7, 5, 100),
    ]
}

/// The result of a month with one strategy.
#[derive(Debug, Default)]
struct MonthResult {
    served_requests: u32,
    refused_requests: u32,
    /// Attempts that the provider refused for too few credits.
    refused_attempts: u32,
    /// Number of times that a request waited for the end of another request.
    waits: u32,
    /// Credits that were unspent at a reset.
    expired_credits: u64,
}

/// A pseudorandom sequence, which is the same in every run.
struct RandomSequence(u64);

impl RandomSequence {
    /// Returns the next number of a 64-bit xorshift generator, modulo `bound`.
    fn next_below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

/// A simulated month with one strategy.
struct Month {
    pool: Arc<Pool>,
    accounts: Vec<Account>,
    /// The leases of requests in flight, with the time at which each request ends.
    in_flight: Vec<(UnixMs, Lease)>,
    result: MonthResult,
}

impl Month {
    fn new(strategy: &'static Strategy) -> Self {
        let entry = |(number, workspace): (usize, &usize)| KeyEntry {
            workspace: Some(format!("w{workspace}")),
            ..ApiKey::new(&format!("sk_month_{number}")).unwrap().into()
        };
        let settings = Settings { strategy, quota_lag: Duration::from_secs(300), ..Settings::FOR_TESTS };
        let pool = Arc::new(Pool::new(KEY_ACCOUNTS.iter().enumerate().map(entry).collect(), settings));
        let mut month =
            Self { pool, accounts: accounts(), in_flight: Vec::new(), result: MonthResult::default() };
        let roster = month.pool.roster();
        for (key_index, account) in KEY_ACCOUNTS.into_iter().enumerate() {
            month.report_quota(key_index, START);
            roster.keys()[key_index]
                .workspace()
                .limiter(ConcurrencyGroup::SPEECH)
                .set_reported_max(month.accounts[account].max_concurrent);
        }
        month
    }

    /// Records the quota that the simulated provider reports for a key.
    fn report_quota(&mut self, key_index: usize, now: UnixMs) {
        let account = &self.accounts[KEY_ACCOUNTS[key_index]];
        let quota = Quota {
            count: account.credits - account.remaining,
            limit: Some(account.credits),
            resets_at: Some(account.resets_at),
            ..Quota::default()
        };
        let roster = self.pool.roster();
        let capabilities = Capabilities::default();
        let observation = Observation::Quota { quota, tier: None, is_paid: Some(true), capabilities };
        self.pool.observe(&roster, &roster.keys()[key_index], observation, now);
    }

    /// Ends the requests and the periods that end until `now`.
    fn advance_to(&mut self, now: UnixMs) {
        self.in_flight.retain(|(ends_at, _)| *ends_at > now);
        for index in 0..self.accounts.len() {
            let account = &mut self.accounts[index];
            if account.resets_at <= now {
                self.result.expired_credits += account.remaining;
                account.remaining = account.credits;
                account.resets_at = UnixMs(account.resets_at.0 + DAYS * DAY_MS);
                for key_index in (0..KEY_ACCOUNTS.len()).filter(|key_index| KEY_ACCOUNTS[*key_index] == index)
                {
                    self.report_quota(key_index, now);
                }
            }
        }
    }

    /// Sends a request with one key after the other, until an account serves it or no key is left. If all keys are
    /// busy, the request waits.
    fn send_speech(&mut self, client: &str, credits: u64, duration_ms: u64, mut now: UnixMs) {
        let roster = self.pool.roster();
        let mut request =
            KeyRequest::new(ClientName::new(client), Some(credits), Some(ConcurrencyGroup::SPEECH));
        loop {
            let reserved =
                match self.pool.try_reserve(&roster, &request, now).map_err(|blocked| blocked.reason) {
                    Ok(reserved) => reserved,
                    Err(Unavailable::Full { .. }) => {
                        // The request waits until the first request in flight ends.
                        self.result.waits += 1;
                        now = self
                            .in_flight
                            .iter()
                            .map(|(ends_at, _)| *ends_at)
                            .min()
                            .expect("a request must be in flight");
                        self.advance_to(now);
                        continue;
                    }
                    Err(_) => {
                        let can_pay =
                            self.accounts.iter().any(|account| account.cost(credits) <= account.remaining);
                        assert!(!can_pay, "a request must not be refused while an account can pay");
                        self.result.refused_requests += 1;
                        return;
                    }
                };
            let mut lease = reserved.lease;
            let key = Arc::clone(lease.key());
            assert_ne!(key.state(now).status().as_str(), "invalid", "an invalid key must not be selected");
            lease.mark_sent();
            let account = &mut self.accounts[KEY_ACCOUNTS[key.position()]];
            let cost = account.cost(credits);
            if cost <= account.remaining {
                account.remaining -= cost;
                self.pool.charge(&roster, &mut lease, cost, now);
                self.in_flight.push((UnixMs(now.0 + duration_ms), lease));
                self.result.served_requests += 1;
                return;
            }
            let shortfall = Shortfall {
                remaining: Some(account.remaining),
                required: Some(cost),
                ..Shortfall::default()
            };
            let verdict = Verdict::WorkspaceQuota(shortfall);
            let refused = RefusedAttempt {
                verdict,
                request: Some(&request),
                is_repeated_elsewhere: false,
                source: RefusalSource::default(),
            };
            self.pool.record_refusal(&roster, &key, refused, now);
            self.pool.charge(&roster, &mut lease, 0, now);
            request.tried.push(key.position());
            self.result.refused_attempts += 1;
        }
    }

    /// Checks that the pool counts exactly the requests in flight and no reserved credits.
    fn check_leases(&self) {
        let roster = self.pool.roster();
        for key in roster.keys() {
            let lease_count =
                self.in_flight.iter().filter(|(_, lease)| Arc::ptr_eq(lease.key(), key)).count();
            assert_eq!(key.in_flight() as usize, lease_count);
            // The response headers contain the price of a request, so requests in flight are charged already.
            assert_eq!(key.workspace().reserved(), 0);
            let (running, maximum) = key.workspace().concurrency(ConcurrencyGroup::SPEECH);
            assert!(
                running <= maximum.unwrap(),
                "{running} requests must not run with a maximum of {maximum:?}"
            );
        }
    }

    fn simulate(strategy: &'static Strategy) -> MonthResult {
        let mut month = Self::new(strategy);
        let mut random = RandomSequence(0x9e37_79b9_7f4a_7c15);
        let mut now = START;
        while now.0 < START.0 + DAYS * DAY_MS {
            // Requests are more frequent by day than by night.
            let hour = now.0 % DAY_MS / HOUR_MS;
            let max_pause_ms = if (8..20).contains(&hour) { 1_000_000 } else { 6_000_000 };
            now = UnixMs(now.0 + random.next_below(max_pause_ms) + 1);
            month.advance_to(now);
            let client = CLIENTS[usize::try_from(random.next_below(4)).unwrap()];
            let is_long_text = random.next_below(20) == 0;
            let credits =
                if is_long_text { 1_000 + random.next_below(4_000) } else { 20 + random.next_below(400) };
            let request_count = if random.next_below(50) == 0 { 30 } else { 1 };
            for _ in 0..request_count {
                month.send_speech(client, credits, credits * 60, now);
            }
            month.check_leases();
        }
        month.result
    }
}

impl Account {
    /// Returns the price of a request with this estimate.
    fn cost(&self, estimate: u64) -> u64 {
        (estimate * self.price_percent).div_ceil(100)
    }
}

#[test]
fn every_strategy_serves_a_month_of_requests() {
    println!("{:16} served refused wasted waited expired", "strategy");
    let mut expired_by_strategy = Vec::new();
    for strategy in &STRATEGIES {
        let result = Month::simulate(strategy);
        let MonthResult { served_requests, refused_requests, refused_attempts, waits, expired_credits } =
            result;
        println!(
            "{:16} {served_requests:6} {refused_requests:7} {refused_attempts:6} {waits:6} {expired_credits:7}",
            strategy.name
        );
        assert!(served_requests > 3_000, "{} must serve most requests: {result:?}", strategy.name);
        assert!(
            refused_attempts * 20 <= served_requests,
            "the provider must refuse at most one attempt per 20 served requests of {}: {result:?}",
            strategy.name
        );
        expired_by_strategy.push((strategy.name, expired_credits));
    }
    let expired_with = |strategy_name| {
        expired_by_strategy.iter().find(|(name, _)| *name == strategy_name).map(|(_, credits)| *credits)
    };
    let fewest = expired_by_strategy.iter().map(|(_, credits)| *credits).min();
    assert_eq!(
        expired_with("soonest-reset"),
        fewest,
        "soonest-reset must let the fewest credits expire: {expired_by_strategy:?}"
    );
}

//! What each client has used and has under way, in atomic words: taken up from the books at the
//! start, and kept when the configuration is reloaded.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::clock;
use crate::policy::allowance::{Allowance, Measure, Period, Spent, Tally};
use crate::policy::client::{ClientName, Clients, Rules};
use crate::policy::units::UnixMs;

/// What a client has used in the present periods, as the books have it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Used {
    /// Who.
    pub client: ClientName,
    /// Requests that were charged for and served: in each of [`Period::ALL`].
    pub requests: [u64; 3],
    /// Credits, in the same order.
    pub credits: [u64; 3],
}

/// All clients' accounts. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Accounts {
    by_name: Arc<HashMap<ClientName, Arc<Account>>>,
    /// From when the rates count their time.
    origin: Instant,
}

/// One client's account.
#[derive(Debug, Default)]
pub(super) struct Account {
    requests: Tallies,
    credits: Tallies,
    /// Until when its requests are booked, see [`Rate::book`](crate::policy::allowance::Rate::book).
    booked: AtomicU64,
    under_way: AtomicU32,
}

/// A tally for each period, so that an allowance may change its period while the program runs.
#[derive(Debug, Default)]
struct Tallies([AtomicU64; 3]);

impl Accounts {
    /// The accounts of `clients`, with what the books say was used at `now`.
    #[must_use]
    pub fn new(clients: &Clients, used: &[Used], now: UnixMs) -> Self {
        let mut by_name: HashMap<ClientName, Arc<Account>> = HashMap::new();
        for Used { client, requests, credits } in used {
            let account = by_name.entry(client.clone()).or_default();
            account.requests.add(requests, now);
            account.credits.add(credits, now);
        }
        Self { by_name: Arc::new(by_name), origin: clock::instant() }.following(clients)
    }

    /// The accounts of other clients. Those that were there stay as they are, also when their client
    /// is gone: it may come back.
    #[must_use]
    pub fn following(&self, clients: &Clients) -> Self {
        let mut by_name = (*self.by_name).clone();
        for name in clients.names() {
            by_name.entry(name.clone()).or_default();
        }
        Self { by_name: Arc::new(by_name), origin: self.origin }
    }

    /// Lets a request in, if `rules` leave room for it.
    pub(super) fn admit(
        &self,
        client: &ClientName,
        rules: &Rules,
        counts: Counts,
        now: UnixMs,
    ) -> Result<Admission, TurnedAway> {
        let account = self.by_name.get(client).cloned().unwrap_or_default();
        let under_way = account.under_way.fetch_add(1, Ordering::AcqRel);
        let mut admission = Admission { account, counted_at: None };
        let account = &admission.account;
        if let Some(max) = rules.concurrency.filter(|max| under_way >= *max) {
            return Err(TurnedAway::Concurrency { max });
        }
        let allowance = rules.allowance.filter(|_| counts == Counts::Yes);
        if let Some(allowance) = allowance {
            account.check(allowance, now)?;
        }
        if let Some(rate) = rules.rate {
            let moment = u64::try_from(clock::since(self.origin).as_nanos()).unwrap_or(u64::MAX);
            let mut wait = Duration::ZERO;
            let book = |booked| rate.book(booked, moment).map_err(|needed| wait = needed).ok();
            if account.booked.fetch_update(Ordering::AcqRel, Ordering::Acquire, book).is_err() {
                return Err(TurnedAway::Rate { wait });
            }
        }
        if counts == Counts::Yes {
            let before = account.requests.add(&[1; 3], now);
            admission.counted_at = Some(now);
            // Others may have been counted since it was looked at.
            if let Some(allowance) = allowance.filter(|allowance| allowance.measure == Measure::Requests)
                && let Err(spent) = allowance.check(before[index(allowance.period)], now)
            {
                admission.give_back();
                return Err(spent.into());
            }
        }
        Ok(admission)
    }
}

/// Whether a request counts against an allowance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Counts {
    /// It does: the pool pays.
    Yes,
    /// It costs nothing, or somebody else pays.
    No,
}

/// Why a client's request is not let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TurnedAway {
    /// It has as many under way as it may have.
    #[error("the client has {max} requests under way")]
    Concurrency {
        /// How many.
        max: u32,
    },
    /// It has begun as many as it may, and may begin another after this time.
    #[error("the client begins requests too fast")]
    Rate {
        /// How long.
        wait: Duration,
    },
    /// It has used what it may.
    #[error(transparent)]
    Spent(#[from] Spent),
}

impl Account {
    /// Whether what is still to be said on a session may cost more credits; that it runs was counted when
    /// it was let in.
    pub(super) fn may_spend(&self, rules: &Rules, now: UnixMs) -> bool {
        let credits = rules.allowance.filter(|allowance| allowance.measure == Measure::Credits);
        credits.is_none_or(|allowance| self.check(allowance, now).is_ok())
    }

    fn check(&self, allowance: Allowance, now: UnixMs) -> Result<(), Spent> {
        allowance.check(self.tallies(allowance.measure).used(allowance.period, now), now)
    }

    /// Counts what a request has cost.
    pub(super) fn spend(&self, credits: u64, now: UnixMs) {
        if credits > 0 {
            self.credits.add(&[credits; 3], now);
        }
    }

    /// Takes back credits that were counted at `then` for what was not served.
    pub(super) fn refund(&self, credits: u64, then: UnixMs) {
        self.credits.take_back(credits, then);
    }

    fn tallies(&self, measure: Measure) -> &Tallies {
        match measure {
            Measure::Requests => &self.requests,
            Measure::Credits => &self.credits,
        }
    }
}

fn index(period: Period) -> usize {
    match period {
        Period::Day => 0,
        Period::Month => 1,
        Period::Ever => 2,
    }
}

impl Tallies {
    fn used(&self, period: Period, now: UnixMs) -> u64 {
        Tally::of_word(self.0[index(period)].load(Ordering::Acquire)).used(period, now)
    }

    /// Adds so much to each period; returns what was used before.
    fn add(&self, amounts: &[u64; 3], now: UnixMs) -> [u64; 3] {
        let mut before = [0; 3];
        for period in Period::ALL {
            let at = index(period);
            before[at] = self.update(period, |tally| tally.plus(amounts[at], period, now)).used(period, now);
        }
        before
    }

    /// Takes back what was counted at `then`.
    fn take_back(&self, amount: u64, then: UnixMs) {
        for period in Period::ALL {
            self.update(period, |tally| tally.minus(amount, period, then));
        }
    }

    /// Returns what was there before.
    fn update(&self, period: Period, change: impl Fn(Tally) -> Tally) -> Tally {
        let changed = |word| Some(change(Tally::of_word(word)).word());
        let cell = &self.0[index(period)];
        // There is always a next value, so there is no error.
        let before = cell.fetch_update(Ordering::AcqRel, Ordering::Acquire, changed);
        Tally::of_word(before.unwrap_or_else(|word| word))
    }
}

/// A client's request under way. Dropping it makes room for another.
#[derive(Debug)]
pub(super) struct Admission {
    account: Arc<Account>,
    counted_at: Option<UnixMs>,
}

impl Admission {
    /// Nothing was served: it does not count.
    pub(super) fn give_back(&mut self) {
        if let Some(then) = self.counted_at.take() {
            self.account.requests.take_back(1, then);
        }
    }

    /// Whose it is.
    pub(super) fn account(&self) -> &Arc<Account> {
        &self.account
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        self.account.under_way.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use crate::policy::allowance::Rate;
    use crate::policy::client::{Client, Strangers};
    use crate::secret::TokenFingerprint;

    use super::*;

    const NOW: UnixMs = UnixMs(1_796_000_000_000);

    fn app() -> ClientName {
        ClientName::new("app")
    }

    fn clients(names: &[&str]) -> Clients {
        let client = |name: &&str| {
            let client = Client { name: ClientName::new(name), rules: Rules::default() };
            (client, TokenFingerprint::of(name))
        };
        Clients::new(names.iter().map(client).collect(), Strangers::Refused)
    }

    fn allowing(amount: u64, measure: Measure, period: Period) -> Rules {
        Rules { allowance: Some(Allowance { amount, measure, period }), ..Rules::default() }
    }

    fn enter(accounts: &Accounts, rules: &Rules) -> Result<Admission, TurnedAway> {
        accounts.admit(&app(), rules, Counts::Yes, NOW)
    }

    #[test]
    fn three_messages_are_three_and_what_was_not_served_does_not_count() {
        let accounts = Accounts::new(&clients(&["app"]), &[], NOW);
        let rules = allowing(3, Measure::Requests, Period::Ever);
        for _ in 0..2 {
            enter(&accounts, &rules).unwrap();
        }
        enter(&accounts, &rules).unwrap().give_back();
        let third = enter(&accounts, &rules);
        assert!(matches!(enter(&accounts, &rules), Err(TurnedAway::Spent(_))));
        drop(third);
        assert!(matches!(enter(&accounts, &rules), Err(TurnedAway::Spent(_))), "ending gives nothing back");
        assert!(accounts.admit(&app(), &rules, Counts::No, NOW).is_ok(), "what is free goes on");
    }

    #[test]
    fn credits_are_counted_when_they_are_known() {
        let accounts = Accounts::new(&clients(&["app"]), &[], NOW);
        let rules = allowing(10, Measure::Credits, Period::Day);
        enter(&accounts, &rules).unwrap().account().spend(9, NOW);
        enter(&accounts, &rules).unwrap().account().spend(9, NOW);
        assert!(matches!(enter(&accounts, &rules), Err(TurnedAway::Spent(_))));
        let tomorrow = Period::Day.end(NOW).unwrap();
        assert!(accounts.admit(&app(), &rules, Counts::Yes, tomorrow).is_ok());
    }

    #[test]
    fn as_many_as_may_are_under_way_and_a_refusal_leaves_no_trace() {
        let accounts = Accounts::new(&clients(&["app"]), &[], NOW);
        let rules = Rules { concurrency: Some(2), ..allowing(3, Measure::Requests, Period::Ever) };
        let (one, two) = (enter(&accounts, &rules).unwrap(), enter(&accounts, &rules).unwrap());
        for _ in 0..5 {
            assert_eq!(enter(&accounts, &rules).unwrap_err(), TurnedAway::Concurrency { max: 2 });
        }
        drop((one, two));
        assert!(enter(&accounts, &rules).is_ok());
        let other = accounts.by_name[&app()].under_way.load(Ordering::Acquire);
        assert_eq!(other, 0);
    }

    #[test]
    fn a_rate_that_is_used_up_says_how_long_to_wait() {
        let accounts = Accounts::new(&clients(&["app"]), &[], NOW);
        let span = Duration::from_secs(3_600);
        let rules =
            Rules { rate: Some(Rate { requests: 1, span }), ..allowing(2, Measure::Requests, Period::Ever) };
        enter(&accounts, &rules).unwrap();
        let Err(TurnedAway::Rate { wait }) = enter(&accounts, &rules) else { panic!("it was let in") };
        assert!(wait > span / 2 && wait <= span, "{wait:?}");
        assert_eq!(accounts.by_name[&app()].requests.used(Period::Ever, NOW), 1, "it was not counted");
    }

    #[test]
    fn a_reload_and_a_restart_forget_nothing() {
        let used = |client| Used { client, requests: [1, 2, 3], credits: [4, 5, 6] };
        let accounts = Accounts::new(&clients(&["app"]), &[used(app()), used(ClientName::new("gone"))], NOW);
        enter(&accounts, &Rules::default()).unwrap().account().spend(10, NOW);
        let accounts = accounts.following(&clients(&["other"])).following(&clients(&["app", "gone"]));
        let account = &accounts.by_name[&app()];
        assert_eq!(Period::ALL.map(|period| account.requests.used(period, NOW)), [2, 3, 4]);
        assert_eq!(Period::ALL.map(|period| account.credits.used(period, NOW)), [14, 15, 16]);
        let rules = allowing(3, Measure::Requests, Period::Ever);
        assert!(accounts.admit(&ClientName::new("gone"), &rules, Counts::Yes, NOW).is_err());
    }

    #[test]
    fn many_at_once_get_no_more_than_there_is() {
        let accounts = Accounts::new(&clients(&["app"]), &[], NOW);
        let rules = allowing(1_000, Measure::Requests, Period::Month);
        let let_in = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..300 {
                        if enter(&accounts, &rules).is_ok() {
                            let_in.fetch_add(1, Ordering::AcqRel);
                        }
                    }
                });
            }
        });
        assert_eq!(let_in.into_inner(), 1_000);
        assert_eq!(accounts.by_name[&app()].requests.used(Period::Month, NOW), 1_000);
    }
}

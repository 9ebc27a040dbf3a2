//! Polls the provider for the quota of each key: at the start in the background, and then rarely. The figures
//! return refused keys to the pool, and correct its count where other applications use the same credits.

mod ask;
mod conversations;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tracing::{debug, info, warn};

use crate::clock;
use crate::policy::authority::Authority;
use crate::policy::budget::Quota;
use crate::policy::forecast::Forecast;
use crate::policy::key_state::CooldownReason;
use crate::policy::poll_schedule::{PollOutcome, PollState, next_poll_at};
use crate::pool::{Key, Observation, Pool, Roster};
use crate::proxy::UsageSink;
use crate::secret::Fingerprint;
use crate::telemetry::{announce, announce_drift};
use crate::upstream::{Connect, Upstream};
use ask::ProviderClient;
pub use conversations::Conversations;

/// The settings of the poller.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The interval between two polls of a key whose state is normal.
    pub interval: Duration,
    /// Timeout of one response.
    pub answer_max: Duration,
    /// The regional hosts at which a key is tried that is refused as one of another region.
    pub regions: Arc<[Arc<Authority>]>,
}

/// Minimum interval between two polls of one key, whatever its requests encounter: polls are requests, too.
const POLL_PAUSE: Duration = Duration::from_secs(1);

/// Polls the quota of every key, round after round.
#[derive(Debug)]
pub struct QuotaPoller<C> {
    pool: Arc<Pool>,
    upstream: Upstream<C>,
    books: UsageSink,
    settings: watch::Receiver<Settings>,
}

/// Interval between two requests for the models: the provider has new ones a few times a year.
const MODELS_INTERVAL: Duration = Duration::from_secs(24 * 3_600);

/// The state of the poller between its polls.
#[derive(Debug, Default)]
struct PollMemory {
    /// When each key is polled next; a key without an entry was never polled.
    due: HashMap<Fingerprint, Instant>,
    /// When each key was polled last.
    asked_at: HashMap<Fingerprint, Instant>,
    /// Keys that were tried in all regions.
    looked_for: HashSet<Fingerprint>,
    /// Keys whose workspace is known, or cannot be read.
    placed: HashSet<Fingerprint>,
    models_at: Option<Instant>,
    /// The last forecast of the pool's credits.
    forecast: Option<Forecast>,
    alike: HashSet<[Fingerprint; 2]>,
}

impl<C: Connect> QuotaPoller<C> {
    /// A poller for `pool`. It polls every key again whenever it receives settings, also when they are
    /// unchanged: there may be new keys.
    pub fn new(
        pool: Arc<Pool>,
        upstream: Upstream<C>,
        books: UsageSink,
        settings: watch::Receiver<Settings>,
    ) -> Self {
        Self { pool, upstream, books, settings }
    }

    /// Polls forever, one key at a time. `rounds` is incremented each time new settings were received and every
    /// key was polled since.
    pub async fn run(mut self, rounds: watch::Sender<u64>) {
        let mut memory = PollMemory::default();
        let mut is_counted = false;
        loop {
            let settings = self.settings.borrow_and_update().clone();
            self.poll_due_keys(&mut memory, &settings).await;
            if !std::mem::replace(&mut is_counted, true) {
                rounds.send_modify(|rounds| *rounds += 1);
            }
            let next = memory
                .due
                .values()
                .min()
                .map_or(settings.interval, |due| due.saturating_duration_since(clock::instant()));
            // When the sender of the settings is dropped, only the due times count.
            let changed = async {
                if self.settings.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            };
            tokio::select! {
                () = tokio::time::sleep(next) => {}
                () = self.pool.poll_wanted() => {}
                () = changed => {
                    memory.due.clear();
                    memory.looked_for.clear();
                    is_counted = false;
                }
            }
        }
    }

    /// Polls every key that is due, one after the other: a burst of requests from one address looks like
    /// abuse.
    async fn poll_due_keys(&self, memory: &mut PollMemory, settings: &Settings) {
        let asking = ProviderClient { upstream: &self.upstream, answer_max: settings.answer_max };
        let roster = self.pool.roster();
        memory.keep_only(&roster);
        let mut asked = Vec::new();
        let mut figures = Vec::new();
        for key in roster.keys() {
            let print = key.api_key().fingerprint();
            let is_due = memory.due.get(&print).is_none_or(|due| *due <= clock::instant());
            let may_again = memory.asked_at.get(&print).map(|at| *at + POLL_PAUSE);
            if key.wants_poll()
                && let Some(at) = may_again.filter(|at| *at > clock::instant())
            {
                let due = memory.due.entry(print).or_insert(at);
                *due = at.min(*due);
                continue;
            }
            if is_due || key.wants_poll() {
                let mut told = self.ask(&asking, &roster, key, &mut figures).await;
                let is_elsewhere =
                    key.cooldown().is_some_and(|park| park.reason == CooldownReason::WrongHost);
                if is_elsewhere && memory.looked_for.insert(print) {
                    self.look_in_regions(&asking, key, &settings.regions).await;
                    told = PollOutcome::Figures;
                }
                self.place(&asking, key, told, memory).await;
                memory.asked_at.insert(print, clock::instant());
                let now = clock::now();
                let pause = next_poll_at(&look(&roster, key, told), settings.interval, fastrand::f64(), now);
                // A later poll can decide what lagging figures left open.
                let decides = Pool::poll_due_at(&roster, key).map(|at| at.since(now).max(POLL_PAUSE));
                memory.due.insert(print, clock::instant() + decides.map_or(pause, |at| at.min(pause)));
                asked.push(print);
            }
        }
        self.record_models(&asking, &roster, memory).await;
        if !asked.is_empty() {
            announce_drifts(&figures);
            self.tell_forecast(memory);
            // Some keys may have been assigned to one workspace meanwhile.
            let roster = self.pool.roster();
            for key in roster.keys().iter().filter(|key| asked.contains(&key.api_key().fingerprint())) {
                memory.tell_alike(key, &roster);
            }
            self.books.keys_changed();
        }
    }

    async fn ask<'k>(
        &self,
        asking: &ProviderClient<'_, C>,
        roster: &Roster,
        key: &'k Key,
        figures: &mut Vec<Figures<'k>>,
    ) -> PollOutcome {
        let Some(seen) = asking.quota(key).await else {
            debug!(key = key.api_key().short().as_str(), "the provider did not tell this key's quota");
            return PollOutcome::Silence;
        };
        let told = match &seen {
            Observation::Quota { quota, .. } => {
                figures.push(Figures { key, quota: *quota, drift_before: key.workspace().drift() });
                PollOutcome::Figures
            }
            Observation::Invalid { .. } => PollOutcome::Figures,
            Observation::Unreadable => PollOutcome::Nothing,
        };
        announce(&self.pool.observe(roster, key, seen, clock::now()));
        told
    }

    /// Tries a key of another region at each regional host; it is used at the host that accepts it. One
    /// request per region, and each is free.
    async fn look_in_regions(&self, asking: &ProviderClient<'_, C>, key: &Key, regions: &[Arc<Authority>]) {
        let name = key.api_key().short().as_str();
        for region in regions.iter().filter(|region| Some(*region) != key.authority()) {
            let seen = asking.quota_at(Some(region), key).await;
            let is_found = matches!(seen, Some(Observation::Quota { .. } | Observation::Unreadable));
            let Some(seen) = seen.filter(|_| is_found) else { continue };
            self.pool.record_region(key, region);
            let roster = self.pool.roster();
            let print = key.api_key().fingerprint();
            if let Some(moved) = roster.keys().iter().find(|key| key.api_key().fingerprint() == print) {
                announce(&self.pool.observe(&roster, moved, seen, clock::now()));
            }
            let event = "key_region_found";
            let host = region.host();
            info!(
                event,
                key = name,
                host,
                "Key {name} works at {host}; its requests go there. Write that host as its base_url"
            );
            return;
        }
    }

    /// Finds out, once, to which workspace a key belongs.
    async fn place(
        &self,
        asking: &ProviderClient<'_, C>,
        key: &Key,
        told: PollOutcome,
        memory: &mut PollMemory,
    ) {
        let print = key.api_key().fingerprint();
        if told != PollOutcome::Figures || memory.placed.contains(&print) {
            return;
        }
        if let Some(id) = asking.workspace(key).await
            && self.pool.record_workspace(key, &id)
        {
            debug!(key = key.api_key().short().as_str(), workspace = id, "the provider told its workspace");
        }
        memory.placed.insert(print);
    }

    async fn record_models(&self, asking: &ProviderClient<'_, C>, roster: &Roster, memory: &mut PollMemory) {
        if memory.models_at.is_some_and(|at| clock::since(at) < MODELS_INTERVAL) {
            return;
        }
        for key in roster.keys() {
            if let Some(models) = asking.models(key).await {
                self.pool.record_models(models);
                memory.models_at = Some(clock::instant());
                return;
            }
        }
    }

    /// Logs the forecast of the pool's credits, once per change.
    fn tell_forecast(&self, memory: &mut PollMemory) {
        let now = clock::now();
        let forecast = self.pool.forecast(now);
        let kind = |forecast: Option<Forecast>| forecast.map(|forecast| std::mem::discriminant(&forecast));
        if kind(memory.forecast) != kind(Some(forecast))
            && let Forecast::SpentBy(at) = forecast
        {
            let event = "pool_exhaustion_forecast";
            warn!(event, "At this rate all credits are spent by {}, before any come back", at.rfc3339());
        }
        memory.forecast = Some(forecast);
    }
}

impl PollMemory {
    fn keep_only(&mut self, roster: &Roster) {
        let known: HashSet<Fingerprint> =
            roster.keys().iter().map(|key| key.api_key().fingerprint()).collect();
        self.due.retain(|print, _| known.contains(print));
        self.asked_at.retain(|print, _| known.contains(print));
        self.looked_for.retain(|print| known.contains(print));
        self.placed.retain(|print| known.contains(print));
        self.alike.retain(|pair| pair.iter().all(|print| known.contains(print)));
    }

    /// Logs, once, which keys may belong to one workspace although the configuration does not say so.
    fn tell_alike(&mut self, key: &Key, roster: &Roster) {
        let now = clock::now();
        let quota = key.workspace().quota(now);
        for other in roster.keys() {
            let apart = !std::ptr::eq(key.workspace(), other.workspace());
            if !apart || !quota.is_twin(&other.workspace().quota(now)) {
                continue;
            }
            let mut pair = [key.api_key().fingerprint(), other.api_key().fingerprint()];
            pair.sort();
            if self.alike.insert(pair) {
                let (one, other) = (key.api_key().short(), other.api_key().short());
                let event = "keys_share_workspace";
                info!(
                    event,
                    "Keys {} and {} tell the same figures. If they are of one workspace, give both the same \
                     `workspace`",
                    one.as_str(),
                    other.as_str()
                );
            }
        }
    }
}

/// The figures that the provider reported for a key.
struct Figures<'a> {
    key: &'a Key,
    quota: Quota,
    /// The billing discrepancy of its workspace before this poll.
    drift_before: i64,
}

/// Logs the differences between the provider's figures and the pool's count, once all figures are known: two
/// workspaces with the same figures are the same one.
fn announce_drifts(told: &[Figures<'_>]) {
    for Figures { key, quota, drift_before } in told {
        // A new period starts at zero, and a discrepancy that was balanced needs no message.
        let after = key.workspace().drift();
        let drifted = after - drift_before;
        if drifted == 0 || after == 0 {
            continue;
        }
        let is_twin = |other: &&Figures<'_>| {
            other.quota.is_twin(quota) && !std::ptr::eq(other.key.workspace(), key.workspace())
        };
        announce_drift(key, drifted, told.iter().find(is_twin).map(|twin| twin.key));
    }
}

fn look(roster: &Roster, key: &Key, told: PollOutcome) -> PollState {
    let now = clock::now();
    let quota = key.workspace().quota(now);
    PollState {
        outcome: told,
        state: key.state(now),
        is_near_limit: roster.is_near_limit(&quota),
        resets_at: quota.resets_at,
    }
}

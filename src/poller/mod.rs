//! Polls the provider for the quota of each key: in the background at the start, and then rarely. A
//! quota makes a refused key usable again, and corrects the pool's count when other applications
//! use the same credits.

mod client;
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
use crate::telemetry::{log_discrepancy, log_transitions};
use crate::upstream::{Connect, Upstream};
use client::ProviderClient;
pub use conversations::Conversations;

/// The settings of the poller.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The interval between two polls of a key whose state is normal.
    pub interval: Duration,
    /// Timeout of one response.
    pub response_timeout: Duration,
    /// The regional hosts at which a key of another region is polled.
    pub regions: Arc<[Arc<Authority>]>,
}

/// Minimum interval between two polls of one key, even if its requests are refused: polls are rate
/// limited, too.
const MIN_POLL_INTERVAL: Duration = Duration::from_secs(1);

/// Polls the quota of every key in rounds.
#[derive(Debug)]
pub struct QuotaPoller<C> {
    pool: Arc<Pool>,
    upstream: Upstream<C>,
    usage: UsageSink,
    settings: watch::Receiver<Settings>,
}

/// Interval between two requests for the list of models. The provider adds models a few times a
/// year.
const MODELS_INTERVAL: Duration = Duration::from_secs(24 * 3_600);

/// The state of the poller between its polls.
#[derive(Debug, Default)]
struct PollMemory {
    /// Time of the next poll of each key. A key without an entry was never polled.
    due: HashMap<Fingerprint, Instant>,
    /// Time of the last poll of each key.
    polled_at: HashMap<Fingerprint, Instant>,
    /// Keys that were polled at all regional hosts.
    regions_tried: HashSet<Fingerprint>,
    /// Keys whose workspace is known or cannot be read.
    membership_checked: HashSet<Fingerprint>,
    models_at: Option<Instant>,
    /// The last forecast of the pool's credits.
    forecast: Option<Forecast>,
    pairs_reported: HashSet<[Fingerprint; 2]>,
}

impl<C: Connect> QuotaPoller<C> {
    /// Creates a poller for `pool`. It polls every key again whenever it receives settings, because
    /// the pool may have new keys.
    pub fn new(
        pool: Arc<Pool>,
        upstream: Upstream<C>,
        usage: UsageSink,
        settings: watch::Receiver<Settings>,
    ) -> Self {
        Self { pool, upstream, usage, settings }
    }

    /// Polls one key at a time and never returns. Increments `rounds` when every key was polled
    /// after new settings were received.
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
            // If the sender of the settings was dropped, only due times start a poll.
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
                    memory.regions_tried.clear();
                    is_counted = false;
                }
            }
        }
    }

    /// Polls every due key, one after the other. The provider could treat many simultaneous
    /// requests from one address as abuse.
    async fn poll_due_keys(&self, memory: &mut PollMemory, settings: &Settings) {
        let client = ProviderClient { upstream: &self.upstream, response_timeout: settings.response_timeout };
        let roster = self.pool.roster();
        memory.keep_only(&roster);
        let mut polled = Vec::new();
        let mut quotas = Vec::new();
        for key in roster.keys() {
            let fingerprint = key.api_key().fingerprint();
            let is_due = memory.due.get(&fingerprint).is_none_or(|due| *due <= clock::instant());
            let pollable_at = memory.polled_at.get(&fingerprint).map(|at| *at + MIN_POLL_INTERVAL);
            if key.wants_poll()
                && let Some(at) = pollable_at.filter(|at| *at > clock::instant())
            {
                let due = memory.due.entry(fingerprint).or_insert(at);
                *due = at.min(*due);
                continue;
            }
            if is_due || key.wants_poll() {
                let mut outcome = self.poll(&client, &roster, key, &mut quotas).await;
                let has_wrong_host =
                    key.cooldown().is_some_and(|cooldown| cooldown.reason == CooldownReason::WrongHost);
                if has_wrong_host && memory.regions_tried.insert(fingerprint) {
                    self.find_region(&client, key, &settings.regions).await;
                    outcome = PollOutcome::Figures;
                }
                self.find_workspace(&client, key, outcome, memory).await;
                memory.polled_at.insert(fingerprint, clock::instant());
                let now = clock::now();
                let delay =
                    next_poll_at(&poll_state(&roster, key, outcome), settings.interval, fastrand::f64(), now);
                // The figures may lag behind, so a later poll can decide about a refusal that this
                // poll could not.
                let deciding_poll_at =
                    Pool::poll_due_at(&roster, key).map(|at| at.since(now).max(MIN_POLL_INTERVAL));
                memory.due.insert(
                    fingerprint,
                    clock::instant() + deciding_poll_at.map_or(delay, |at| at.min(delay)),
                );
                polled.push(fingerprint);
            }
        }
        self.poll_models(&client, &roster, memory).await;
        if !polled.is_empty() {
            log_discrepancies(&quotas);
            self.log_forecast(memory);
            // Polls may have assigned several keys to one workspace.
            let roster = self.pool.roster();
            for key in roster.keys().iter().filter(|key| polled.contains(&key.api_key().fingerprint())) {
                memory.log_shared_workspace(key, &roster);
            }
            self.usage.keys_changed();
        }
    }

    async fn poll<'k>(
        &self,
        client: &ProviderClient<'_, C>,
        roster: &Roster,
        key: &'k Key,
        quotas: &mut Vec<PolledQuota<'k>>,
    ) -> PollOutcome {
        let Some(observation) = client.quota(key).await else {
            debug!(key = key.api_key().short().as_str(), "the provider returned no quota of this key");
            return PollOutcome::Silence;
        };
        let outcome = match &observation {
            Observation::Quota { quota, .. } => {
                quotas.push(PolledQuota { key, quota: *quota, drift_before: key.workspace().drift() });
                PollOutcome::Figures
            }
            Observation::Invalid { .. } => PollOutcome::Figures,
            Observation::Unreadable => PollOutcome::Nothing,
        };
        log_transitions(&self.pool.observe(roster, key, observation, clock::now()));
        outcome
    }

    /// Polls a key of another region at each regional host. The first host that accepts the key
    /// serves it from then on. One free request per host.
    async fn find_region(&self, client: &ProviderClient<'_, C>, key: &Key, regions: &[Arc<Authority>]) {
        let name = key.api_key().short().as_str();
        for region in regions.iter().filter(|region| Some(*region) != key.authority()) {
            let observation = client.quota_at(Some(region), key).await;
            let is_accepted =
                matches!(observation, Some(Observation::Quota { .. } | Observation::Unreadable));
            let Some(observation) = observation.filter(|_| is_accepted) else { continue };
            self.pool.record_region(key, region);
            let roster = self.pool.roster();
            let fingerprint = key.api_key().fingerprint();
            if let Some(regional_key) =
                roster.keys().iter().find(|key| key.api_key().fingerprint() == fingerprint)
            {
                log_transitions(&self.pool.observe(&roster, regional_key, observation, clock::now()));
            }
            let event = "key_region_found";
            let host = region.host();
            info!(
                event,
                key = name,
                host,
                "Key {name} works at {host}; its requests go there. Set that host as the base_url of the key"
            );
            return;
        }
    }

    /// Requests the key's workspace, once per key.
    async fn find_workspace(
        &self,
        client: &ProviderClient<'_, C>,
        key: &Key,
        outcome: PollOutcome,
        memory: &mut PollMemory,
    ) {
        let fingerprint = key.api_key().fingerprint();
        if outcome != PollOutcome::Figures || memory.membership_checked.contains(&fingerprint) {
            return;
        }
        if let Some(id) = client.workspace(key).await
            && self.pool.record_workspace(key, &id)
        {
            debug!(
                key = key.api_key().short().as_str(),
                workspace = id,
                "the provider returned the workspace of the key"
            );
        }
        memory.membership_checked.insert(fingerprint);
    }

    async fn poll_models(&self, client: &ProviderClient<'_, C>, roster: &Roster, memory: &mut PollMemory) {
        if memory.models_at.is_some_and(|at| clock::since(at) < MODELS_INTERVAL) {
            return;
        }
        for key in roster.keys() {
            if let Some(models) = client.models(key).await {
                self.pool.record_models(models);
                memory.models_at = Some(clock::instant());
                return;
            }
        }
    }

    /// Logs a forecast that the pool's credits run out before the next reset, once per change.
    fn log_forecast(&self, memory: &mut PollMemory) {
        let now = clock::now();
        let forecast = self.pool.forecast(now);
        let kind = |forecast: Option<Forecast>| forecast.map(|forecast| std::mem::discriminant(&forecast));
        if kind(memory.forecast) != kind(Some(forecast))
            && let Forecast::SpentBy(at) = forecast
        {
            let event = "pool_exhaustion_forecast";
            warn!(
                event,
                "At this rate all credits are spent by {}, before the next quota reset",
                at.rfc3339()
            );
        }
        memory.forecast = Some(forecast);
    }
}

impl PollMemory {
    fn keep_only(&mut self, roster: &Roster) {
        let configured: HashSet<Fingerprint> =
            roster.keys().iter().map(|key| key.api_key().fingerprint()).collect();
        self.due.retain(|fingerprint, _| configured.contains(fingerprint));
        self.polled_at.retain(|fingerprint, _| configured.contains(fingerprint));
        self.regions_tried.retain(|fingerprint| configured.contains(fingerprint));
        self.membership_checked.retain(|fingerprint| configured.contains(fingerprint));
        self.pairs_reported.retain(|pair| pair.iter().all(|fingerprint| configured.contains(fingerprint)));
    }

    /// Logs, once per pair, which keys may belong to one workspace although the configuration names
    /// different ones.
    fn log_shared_workspace(&mut self, key: &Key, roster: &Roster) {
        let now = clock::now();
        let quota = key.workspace().quota(now);
        for other in roster.keys() {
            let is_same_workspace = std::ptr::eq(key.workspace(), other.workspace());
            if is_same_workspace || !quota.is_twin(&other.workspace().quota(now)) {
                continue;
            }
            let mut pair = [key.api_key().fingerprint(), other.api_key().fingerprint()];
            pair.sort();
            if self.pairs_reported.insert(pair) {
                let (name, other_name) = (key.api_key().short(), other.api_key().short());
                let event = "keys_share_workspace";
                info!(
                    event,
                    "Keys {} and {} report the same quota. If they belong to one workspace, configure the same \
                     `workspace` for both",
                    name.as_str(),
                    other_name.as_str()
                );
            }
        }
    }
}

/// The quota that the provider reported for a key.
struct PolledQuota<'a> {
    key: &'a Key,
    quota: Quota,
    /// The billing discrepancy of its workspace before this poll.
    drift_before: i64,
}

/// Logs the differences between the provider's quotas and the pool's count. Runs after all polls,
/// because two workspaces with equal quotas are probably one workspace.
fn log_discrepancies(quotas: &[PolledQuota<'_>]) {
    for PolledQuota { key, quota, drift_before } in quotas {
        // The discrepancy of a new period is zero. A discrepancy that has disappeared is not logged
        // either.
        let drift = key.workspace().drift();
        let drift_change = drift - drift_before;
        if drift_change == 0 || drift == 0 {
            continue;
        }
        let is_twin = |other: &&PolledQuota<'_>| {
            other.quota.is_twin(quota) && !std::ptr::eq(other.key.workspace(), key.workspace())
        };
        log_discrepancy(key, drift_change, quotas.iter().find(is_twin).map(|twin| twin.key));
    }
}

fn poll_state(roster: &Roster, key: &Key, outcome: PollOutcome) -> PollState {
    let now = clock::now();
    let quota = key.workspace().quota(now);
    PollState {
        outcome,
        state: key.state(now),
        is_near_limit: roster.is_near_limit(&quota),
        resets_at: quota.resets_at,
    }
}

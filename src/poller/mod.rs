//! Polls the provider for the quota of each key, in the background. It polls at startup, at a long interval, after a
//! change of the settings, and after a refusal that a poll can confirm or refute. The quota also corrects the credits
//! that the pool has counted, if other applications spend the same credits.
//!
//! [`QuotaPoller`] also requests the workspace and the regional host of a key, and once a day the models.
//! [`ConversationPoller`] requests the costs of ended conversations, and [`KeyChecker`] checks a key for an operator.

mod client;
mod conversations;
mod discrepancies;
mod key_check;
mod sharing;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tracing::{debug, info, warn};

use crate::clock;
use crate::policy::authority::Authority;
use crate::policy::forecast::Forecast;
use crate::policy::key_state::CooldownReason;
use crate::policy::poll_schedule::{PollOutcome, PollState, next_poll_delay};
use crate::pool::{Key, Observation, Pool, Roster};
use crate::proxy::UsageSink;
use crate::secret::Fingerprint;
use crate::telemetry::log_transitions;
use crate::upstream::{Connect, Upstream};
use client::ProviderClient;
pub use conversations::ConversationPoller;
use discrepancies::{PolledQuota, log_discrepancies};
pub use key_check::{CheckInProgress, CheckOutcome, KeyCheck, KeyChecker};
pub use sharing::{OwnPoll, PollSharing, PollingRole};

/// The settings of the quota poller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Interval between two polls of a usable key. The intervals for other keys are multiples or parts of it.
    pub interval: Duration,
    /// Timeout from the start of a request to the end of its response.
    pub response_timeout: Duration,
    /// Regional hosts of the provider. If the default host refuses a key as a key of another region, the key is
    /// polled at each of them.
    pub regions: Arc<[Arc<Authority>]>,
}

/// Minimum interval between two polls of one key, even if refusals request more polls. The provider also limits the
/// rate of polls.
const MIN_POLL_INTERVAL: Duration = Duration::from_secs(1);

/// Interval between two requests for the list of models. The provider adds models a few times a year.
const MODELS_INTERVAL: Duration = Duration::from_secs(24 * 3_600);

/// A poller of the quotas of all keys. It works in rounds. Each round polls the keys whose poll is due.
#[derive(Debug)]
pub struct QuotaPoller<C> {
    pool: Arc<Pool>,
    upstream: Upstream<C>,
    usage: UsageSink,
    settings: watch::Receiver<Settings>,
    sharing: Option<PollSharing>,
}

/// The state of the poller between its rounds.
#[derive(Debug, Default)]
struct PollerState {
    keys: HashMap<Fingerprint, PolledKey>,
    models_polled_at: Option<Instant>,
    /// The last forecast of the pool's credits, or `None` before the first round that polled a key.
    forecast: Option<Forecast>,
    /// Pairs of keys that may share a workspace and were logged.
    logged_pairs: HashSet<[Fingerprint; 2]>,
}

/// The state of the poller for one key.
#[derive(Debug, Default)]
struct PolledKey {
    /// Time of the next poll, or `None` if it is due.
    next_poll_at: Option<Instant>,
    last_polled_at: Option<Instant>,
    /// The host and the forward proxy of the last poll, or `None` for the default host and proxy. If they change, the
    /// key is polled again, because it may be valid at the new host.
    destination: Option<Arc<Authority>>,
    /// Whether the key was polled at the regional hosts, until one of them accepted it.
    has_tried_regions: bool,
    /// Whether the provider has sent a final response to a request for the workspace of the key.
    has_checked_workspace: bool,
}

impl<C: Connect> QuotaPoller<C> {
    /// Creates a poller for `pool`. It polls every key again whenever it receives different settings.
    pub fn new(
        pool: Arc<Pool>,
        upstream: Upstream<C>,
        usage: UsageSink,
        settings: watch::Receiver<Settings>,
    ) -> Self {
        Self { pool, upstream, usage, settings, sharing: None }
    }

    /// With `sharing`, the poller polls only while this replica is the leader, and sends the results to the other
    /// replicas. Without `sharing`, the poller always polls.
    #[must_use]
    pub fn with_sharing(self, sharing: Option<PollSharing>) -> Self {
        Self { sharing, ..self }
    }

    fn role(&self) -> PollingRole {
        self.sharing.as_ref().map_or(PollingRole::Leader, |sharing| *sharing.role.borrow())
    }

    /// Polls one key at a time and never returns. Increments `rounds` after the first round that follows the start or a
    /// change of the settings. A follower polls no key in that round. New keys are polled when
    /// [`Pool::poll_requested`] completes.
    pub async fn run(mut self, rounds: watch::Sender<u64>) {
        let mut state = PollerState::default();
        let mut is_round_counted = false;
        let mut settings = self.settings.borrow().clone();
        loop {
            // The wait may have ended for another reason at the same time, so the settings are compared.
            let latest_settings = self.settings.borrow_and_update().clone();
            if latest_settings != settings {
                settings = latest_settings;
                for key in state.keys.values_mut() {
                    (key.next_poll_at, key.has_tried_regions) = (None, false);
                }
                is_round_counted = false;
            }
            let role = self.role();
            match role {
                PollingRole::Leader => self.poll_due_keys(&mut state, &settings).await,
                PollingRole::Follower | PollingRole::Undecided => {}
            }
            if role != PollingRole::Undecided && !std::mem::replace(&mut is_round_counted, true) {
                rounds.send_modify(|rounds| *rounds += 1);
            }
            let next_poll_at = state.keys.values().filter_map(|key| key.next_poll_at).min();
            let delay =
                next_poll_at.map_or(settings.interval, |at| at.saturating_duration_since(clock::instant()));
            // If the sender of the settings was dropped, the settings stay the same.
            let settings_changed = async {
                if self.settings.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            };
            let mut role_changes = self.sharing.as_ref().map(|sharing| sharing.role.clone());
            let role_changed = async {
                if let Some(changes) = &mut role_changes
                    && changes.wait_for(|current| *current != role).await.is_ok()
                {
                    return;
                }
                // Without other replicas, or after the sender of the role was dropped, the role stays the same.
                std::future::pending().await
            };
            tokio::select! {
                () = tokio::time::sleep(delay) => {}
                () = self.pool.poll_requested() => {}
                () = settings_changed => {}
                () = role_changed => {}
            }
        }
    }

    /// Polls every due key, one after the other, because the provider could treat many simultaneous
    /// requests from one address as abuse.
    async fn poll_due_keys(&self, state: &mut PollerState, settings: &Settings) {
        let client = ProviderClient { upstream: &self.upstream, response_timeout: settings.response_timeout };
        let roster = self.pool.roster();
        state.remove_unconfigured(&roster);
        let mut polled = Vec::new();
        let mut quotas = Vec::new();
        for key in roster.keys() {
            let fingerprint = key.api_key().fingerprint();
            let polled_key = state.keys.entry(fingerprint).or_default();
            if polled_key.last_polled_at.is_some() && polled_key.destination.as_ref() != key.destination() {
                *polled_key = PolledKey::default();
            }
            if !self.should_poll(key, polled_key, settings.interval) {
                continue;
            }
            let (mut outcome, mut observation) = self.poll_key(&client, &roster, key, &mut quotas).await;
            let has_wrong_host =
                key.cooldown().is_some_and(|cooldown| cooldown.reason == CooldownReason::WrongHost);
            if has_wrong_host && !std::mem::replace(&mut polled_key.has_tried_regions, true) {
                observation = self.find_region(&client, key, &settings.regions).await.or(observation);
                outcome = PollOutcome::Conclusive;
            }
            self.find_workspace(&client, key, outcome, polled_key).await;
            polled_key.last_polled_at = Some(clock::instant());
            // The poll may have found the region of the key.
            let current_roster = self.pool.roster();
            polled_key.destination = current_roster.find(fingerprint).unwrap_or(key).destination().cloned();
            if let Some((sharing, observation)) = self.sharing.as_ref().zip(observation) {
                let region = current_roster.find(fingerprint).and_then(|key| key.authority()).cloned();
                // If the queue is full because the other replicas cannot be reached, the result is dropped. The
                // result of the next poll replaces it.
                let _ = sharing.polls.try_send(OwnPoll {
                    key: fingerprint,
                    observation,
                    at: clock::now(),
                    region,
                });
            }
            let now = clock::now();
            let delay =
                next_poll_delay(&poll_state(&roster, key, outcome), settings.interval, fastrand::f64(), now);
            // The provider's quota may lag behind a refusal. A later poll can then confirm or refute the refusal,
            // which this poll could not.
            let deciding_delay =
                Pool::next_deciding_poll_at(&roster, key).map(|at| at.since(now).max(MIN_POLL_INTERVAL));
            let delay = deciding_delay.map_or(delay, |deciding| deciding.min(delay));
            polled_key.next_poll_at = Some(clock::instant() + delay);
            polled.push(fingerprint);
        }
        self.poll_models(&client, &roster, state).await;
        if !polled.is_empty() {
            log_discrepancies(&quotas);
            self.log_forecast(state);
            // The polls may have replaced the roster, because several keys belong to one workspace.
            let roster = self.pool.roster();
            for key in polled.iter().filter_map(|fingerprint| roster.find(*fingerprint)) {
                state.log_shared_workspace(key, &roster);
            }
            self.usage.request_key_state_write();
        }
    }

    /// Returns whether to poll `key` in this round. If not, sets the time of its next poll.
    fn should_poll(&self, key: &Key, polled_key: &mut PolledKey, interval: Duration) -> bool {
        let now = clock::instant();
        if key.is_poll_requested()
            && let Some(last) = polled_key.last_polled_at
            && last + MIN_POLL_INTERVAL > now
        {
            let allowed_at = last + MIN_POLL_INTERVAL;
            let next = polled_key.next_poll_at.map_or(allowed_at, |next| next.min(allowed_at));
            polled_key.next_poll_at = Some(next);
            return false;
        }
        if self.sharing.is_some() && polled_key.next_poll_at.is_none() {
            // The previous leader may have polled the key recently.
            let age = key.workspace().polled_at().map(|at| clock::now().since(at));
            polled_key.next_poll_at = age.and_then(|age| interval.checked_sub(age)).map(|rest| now + rest);
        }
        key.is_poll_requested() || polled_key.next_poll_at.is_none_or(|at| at <= now)
    }

    /// Requests the quota with `key`, and records the response in the pool. Adds a reported quota to `quotas`.
    async fn poll_key<'k>(
        &self,
        client: &ProviderClient<'_, C>,
        roster: &Roster,
        key: &'k Key,
        quotas: &mut Vec<PolledQuota<'k>>,
    ) -> (PollOutcome, Option<Observation>) {
        let Some(observation) = client.request_quota(key).await else {
            debug!(key = key.api_key().short().as_str(), "the provider returned no quota of this key");
            return (PollOutcome::NoResponse, None);
        };
        let outcome = match &observation {
            Observation::Quota { quota, .. } => {
                quotas.push(PolledQuota {
                    key,
                    quota: *quota,
                    discrepancy_before: key.workspace().discrepancy(),
                });
                PollOutcome::Conclusive
            }
            Observation::Invalid { .. } => PollOutcome::Conclusive,
            Observation::Unreadable => PollOutcome::Unreadable,
        };
        log_transitions(&self.pool.observe(roster, key, observation.clone(), clock::now()));
        (outcome, Some(observation))
    }

    /// Polls a key of another region at one regional host after the other, with one free request per host. Records
    /// the first host that accepts the key, so that requests with the key are sent to that host, and returns its
    /// response.
    async fn find_region(
        &self,
        client: &ProviderClient<'_, C>,
        key: &Key,
        regions: &[Arc<Authority>],
    ) -> Option<Observation> {
        let name = key.api_key().short().as_str();
        for region in regions.iter().map(|region| key.route_to(region)) {
            if Some(&region) == key.authority() {
                continue;
            }
            let observation = client.request_quota_at(Some(&region), key).await;
            let is_accepted =
                matches!(observation, Some(Observation::Quota { .. } | Observation::Unreadable));
            let Some(observation) = observation.filter(|_| is_accepted) else { continue };
            self.pool.record_region(key, &region);
            let roster = self.pool.roster();
            if let Some(regional_key) = roster.find(key.api_key().fingerprint()) {
                log_transitions(&self.pool.observe(&roster, regional_key, observation.clone(), clock::now()));
            }
            let event = "key_region_found";
            let host = region.host();
            info!(
                event,
                key = name,
                host,
                "Key {name} works at {host}; its requests go there. Set that host as the base_url of the key"
            );
            return Some(observation);
        }
        None
    }

    /// Requests the workspace of a key after each conclusive poll of the key, until the provider's response is final.
    async fn find_workspace(
        &self,
        client: &ProviderClient<'_, C>,
        key: &Key,
        outcome: PollOutcome,
        polled_key: &mut PolledKey,
    ) {
        if outcome != PollOutcome::Conclusive || polled_key.has_checked_workspace {
            return;
        }
        let Ok(response) = client.request_user(key).await else { return };
        polled_key.has_checked_workspace = response.is_final();
        if let Some(id) = response.workspace_id()
            && self.pool.record_workspace(key, &id)
        {
            debug!(
                key = key.api_key().short().as_str(),
                workspace = id,
                "the provider returned the workspace of the key"
            );
        }
    }

    /// Requests the models with one key after the other, until the provider returns them.
    async fn poll_models(&self, client: &ProviderClient<'_, C>, roster: &Roster, state: &mut PollerState) {
        if state.models_polled_at.is_some_and(|at| clock::elapsed_since(at) < MODELS_INTERVAL) {
            return;
        }
        for key in roster.keys() {
            if let Some(models) = client.request_models(key).await {
                self.pool.record_models(models);
                state.models_polled_at = Some(clock::instant());
                return;
            }
        }
    }

    /// Computes the forecast of the pool's credits. Logs it if the credits will run out before the next reset and
    /// the previous forecast was different.
    fn log_forecast(&self, state: &mut PollerState) {
        let now = clock::now();
        let forecast = self.pool.forecast(now);
        let forecast_kind =
            |forecast: Option<Forecast>| forecast.map(|forecast| std::mem::discriminant(&forecast));
        if forecast_kind(state.forecast) != forecast_kind(Some(forecast))
            && let Forecast::ExhaustedAt(at) = forecast
        {
            let event = "pool_exhaustion_forecast";
            warn!(
                event,
                "At this rate all credits are spent by {}, before the next quota reset",
                at.rfc3339()
            );
        }
        state.forecast = Some(forecast);
    }
}

impl PollerState {
    /// Removes the keys that are not in `roster`.
    fn remove_unconfigured(&mut self, roster: &Roster) {
        let is_configured = |fingerprint: &Fingerprint| roster.find(*fingerprint).is_some();
        self.keys.retain(|fingerprint, _| is_configured(fingerprint));
        self.logged_pairs.retain(|pair| pair.iter().all(is_configured));
    }

    /// Logs each key that reports the same quota as `key` although it is configured for another workspace. The two
    /// keys may belong to one workspace. Logs each pair of keys once.
    fn log_shared_workspace(&mut self, key: &Key, roster: &Roster) {
        let now = clock::now();
        let quota = key.workspace().quota(now);
        for other in roster.keys() {
            let is_known_to_share = std::ptr::eq(key.workspace(), other.workspace());
            if is_known_to_share || !quota.is_same_workspace(&other.workspace().quota(now)) {
                continue;
            }
            let mut pair = [key.api_key().fingerprint(), other.api_key().fingerprint()];
            pair.sort();
            if self.logged_pairs.insert(pair) {
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

/// Returns the inputs of the poll schedule for `key` after a poll with the given `outcome`.
fn poll_state(roster: &Roster, key: &Key, outcome: PollOutcome) -> PollState {
    let now = clock::now();
    let quota = key.workspace().quota(now);
    PollState {
        outcome,
        key_state: key.state(now),
        is_near_limit: roster.is_near_limit(&quota),
        resets_at: quota.resets_at,
    }
}

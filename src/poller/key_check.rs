//! Checks a key for an operator: requests its subscription and the models, which costs no credits. Returns the
//! classified response, its latency, the permissions that the responses show, and the maximum number of concurrent
//! speech requests. The response also updates the state of the key, like every poll. The admin API and `keychoir check
//! --online` use it.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::client::{NoProviderResponse, ProviderClient, ProviderResponse};
use crate::clock;
use crate::policy::concurrency_group::ConcurrencyGroup;
use crate::policy::quota::Quota;
use crate::policy::verdict::Verdict;
use crate::pool::{Key, Observation, Pool};
use crate::proxy::UsageSink;
use crate::secret::Fingerprint;
use crate::telemetry::log_transitions;
use crate::upstream::{Connect, Upstream};

/// A checker of keys. It runs at most one check per key at a time, and all its clones count the same checks.
#[derive(Clone, Debug)]
pub struct KeyChecker<C> {
    pool: Arc<Pool>,
    upstream: Upstream<C>,
    usage: UsageSink,
    timeout: Duration,
    running_checks: Arc<Mutex<HashSet<Fingerprint>>>,
}

/// The result of a check of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyCheck {
    /// The classified response of the provider.
    pub outcome: CheckOutcome,
    /// The time from the start of the request for the subscription to the end of its response.
    pub latency: Duration,
    /// Whether the key may read its account (`user_read`), if the response shows it.
    pub may_read_user: Option<bool>,
    /// Whether the key may read the models (`models_read`), if the response shows it.
    pub may_read_models: Option<bool>,
    /// The maximum concurrent speech requests of the workspace, if it is known.
    pub max_concurrent_speech: Option<u32>,
}

/// The classified response of the provider to a check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CheckOutcome {
    /// The key is valid, and this is the subscription of its workspace.
    Valid {
        /// The provider's name of the plan, or `None` if the response contains none.
        plan: Option<String>,
        /// The credits of the workspace.
        quota: Quota,
        /// Whether the latest invoice is paid, if the response shows it.
        is_paid: Option<bool>,
    },
    /// The key is valid, and may not read the subscription.
    QuotaUnreadable,
    /// The provider refused the key or the request, or failed.
    Refused {
        /// The status of the response.
        status: u16,
        /// The meaning of the response.
        verdict: Verdict,
    },
    /// No readable response arrived before the timeout, or the response is not a subscription.
    NoResponse {
        /// The cause, without secrets.
        reason: String,
    },
}

/// The error of a check that was refused because another check of the same key is running.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("another check of this key is running")]
pub struct CheckInProgress;

/// A running check. Dropping it removes its key from the set of running checks.
struct RunningCheck<'a> {
    running_checks: &'a Mutex<HashSet<Fingerprint>>,
    fingerprint: Fingerprint,
}

impl Drop for RunningCheck<'_> {
    fn drop(&mut self) {
        self.running_checks.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.fingerprint);
    }
}

impl CheckOutcome {
    /// Classifies the response to the request for the subscription. `observation` is the interpretation of the
    /// response, if it concerns the key.
    fn new(
        response: &Result<ProviderResponse, NoProviderResponse>,
        observation: Option<&Observation>,
    ) -> Self {
        match (response, observation) {
            (Err(error), _) => Self::NoResponse { reason: error.to_string() },
            (Ok(_), Some(Observation::Quota { quota, tier, is_paid, .. })) => {
                Self::Valid { plan: tier.clone(), quota: *quota, is_paid: *is_paid }
            }
            (Ok(_), Some(Observation::Unreadable)) => Self::QuotaUnreadable,
            // The provider always sends a subscription, so another server has sent the response.
            (Ok(response), None) if response.verdict == Verdict::Served => {
                Self::NoResponse { reason: "the response is not a subscription of ElevenLabs".to_owned() }
            }
            (Ok(response), Some(Observation::Invalid { .. }) | None) => {
                Self::Refused { status: response.status.as_u16(), verdict: response.verdict }
            }
        }
    }
}

impl<C: Connect> KeyChecker<C> {
    /// Creates a checker whose checks take at most `timeout`.
    pub fn new(pool: Arc<Pool>, upstream: Upstream<C>, usage: UsageSink, timeout: Duration) -> Self {
        Self { pool, upstream, usage, timeout, running_checks: Arc::default() }
    }

    /// Checks `key` at the provider.
    ///
    /// # Errors
    ///
    /// Fails when another check of the key is running.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future aborts the check.
    pub async fn check(&self, key: &Arc<Key>) -> Result<KeyCheck, CheckInProgress> {
        let fingerprint = key.api_key().fingerprint();
        if !self.running_checks.lock().unwrap_or_else(PoisonError::into_inner).insert(fingerprint) {
            return Err(CheckInProgress);
        }
        let _running_check = RunningCheck { running_checks: &self.running_checks, fingerprint };
        let started_at = clock::instant();
        let client = ProviderClient { upstream: &self.upstream, response_timeout: self.timeout };
        let subscription = client.request_subscription(key).await;
        let latency = clock::elapsed_since(started_at);
        let observation = subscription.as_ref().ok().and_then(|response| response.observation());
        let outcome = CheckOutcome::new(&subscription, observation.as_ref());
        if let Some(observation) = observation {
            log_transitions(&self.pool.observe(&self.pool.roster(), key, observation, clock::now()));
            self.usage.request_key_state_write();
        }
        let remaining_time = self.timeout.saturating_sub(clock::elapsed_since(started_at));
        let models_verdict = match outcome {
            CheckOutcome::Valid { .. } | CheckOutcome::QuotaUnreadable if !remaining_time.is_zero() => {
                let client = ProviderClient { upstream: &self.upstream, response_timeout: remaining_time };
                client.request_models_response(key).await.ok().map(|response| response.verdict)
            }
            CheckOutcome::Valid { .. }
            | CheckOutcome::QuotaUnreadable
            | CheckOutcome::Refused { .. }
            | CheckOutcome::NoResponse { .. } => None,
        };
        let subscription_verdict = subscription.ok().map(|response| response.verdict);
        let (_, max_concurrent_speech) = key.workspace().concurrency(ConcurrencyGroup::SPEECH);
        Ok(KeyCheck {
            outcome,
            latency,
            may_read_user: subscription_verdict.and_then(permission_from_verdict),
            may_read_models: models_verdict.and_then(permission_from_verdict),
            max_concurrent_speech,
        })
    }
}

/// Returns whether a key has the permission for a request, by the verdict on its response. Returns `None` after a
/// refusal for another reason.
fn permission_from_verdict(verdict: Verdict) -> Option<bool> {
    if verdict == Verdict::Served {
        return Some(true);
    }
    matches!(verdict, Verdict::MissingPermission(_)).then_some(false)
}

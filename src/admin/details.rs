//! Renders the document of `GET /api/keychoir-keys`. For each key, it contains the state with evidence and advice, the
//! operations that the key cannot serve, and the consumption and the forecast of its credits. The document is separate
//! from the status document, because apps rely on the fixed fields of the status document. The admin API uses the same
//! functions for the displayed state, the advice and the forecast.

use serde::Serialize;

use crate::policy::evidence::Evidence;
use crate::policy::forecast::Forecast;
use crate::policy::key_state::{CooldownReason, KeyState};
use crate::policy::units::UnixMs;
use crate::pool::{KeySnapshot, Pool, Restriction};

/// The document of `GET /api/keychoir-keys`, with the keys in the order of the pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct KeyDetailsDocument {
    /// The number of requests that are queued for a key.
    waiting: usize,
    /// The time at which all credits will be exhausted at the current rate. `None` if they last until their reset, or
    /// if the forecast is unknown.
    spent_by: Option<String>,
    keys: Vec<KeyDetail>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct KeyDetail {
    short_key: String,
    name: Option<String>,
    /// The configured workspace. A key without a configured workspace counts as a separate workspace.
    workspace: Option<String>,
    /// The provider's name of the plan.
    plan: Option<String>,
    /// A status of the status document, or `near_limit` or `paused`.
    state: &'static str,
    /// Whether an operator has paused the key.
    paused: bool,
    /// The reason why the key is not active: `exhausted`, `rate_limited`, `account_locked`, `invalid_key` or
    /// `wrong_host`. For a paused key, it is the operator's reason.
    reason: Option<String>,
    /// Advice for the operator.
    advice: Option<&'static str>,
    /// The start of the pause, or the time of the earliest evidence for the cooldown.
    since: Option<String>,
    /// The time at which the pause or the cooldown ends automatically.
    until: Option<String>,
    /// The operations that the key can still serve.
    possible: &'static str,
    /// The refusals of the key and of its workspace.
    evidence: Vec<EvidenceDetail>,
    /// Operations that the provider refused for the key or its plan. Requests for them use other keys first.
    cannot: Vec<RestrictionDetail>,
    /// The number of credits by which the provider's counts of this period exceeded the counts of Keychoir. It is
    /// negative if the provider has counted fewer credits.
    drift: i64,
    in_flight: u32,
    /// Credits of its workspace that are reserved for requests in flight.
    reserved: u64,
    /// Credits that its workspace uses per day at the rate of the last hours.
    spent_per_day: u64,
    /// The time at which the credits of the workspace will be exhausted at this rate. `None` if they last until their
    /// reset, or if the forecast is unknown.
    spent_by: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct EvidenceDetail {
    claim: &'static str,
    /// `numbers` or `message`.
    strength: &'static str,
    at: String,
    status: Option<u16>,
    /// The provider's message, without secrets.
    message: String,
    route: String,
    request_id: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct RestrictionDetail {
    what: String,
    verdict: &'static str,
    status: Option<u16>,
    message: String,
    request_id: String,
    since: String,
    until: String,
}

impl KeyDetailsDocument {
    /// Creates the document for the keys of `pool` at `now`.
    #[must_use]
    pub fn new(pool: &Pool, now: UnixMs) -> Self {
        let detail = |snapshot: &KeySnapshot| {
            let workspace = snapshot.key.workspace();
            let state = DisplayedState::new(snapshot);
            let evidence = snapshot.key_evidence.iter().chain(&snapshot.workspace_evidence);
            let cannot = pool.restrictions().for_key(&snapshot.key, now);
            let is_paused = snapshot.pause.is_some();
            KeyDetail {
                paused: is_paused,
                state: state.name,
                reason: state.reason,
                advice: state.cooldown.and_then(advice),
                since: state.since.map(UnixMs::rfc3339),
                until: state.until.map(UnixMs::rfc3339),
                possible: if is_paused { "nothing" } else { possible_operations(state.cooldown, &cannot) },
                evidence: evidence.map(EvidenceDetail::new).collect(),
                cannot: cannot.iter().map(RestrictionDetail::new).collect(),
                short_key: snapshot.key.api_key().short().to_string(),
                name: snapshot.key.name().map(str::to_owned),
                workspace: workspace.membership().name().map(str::to_owned),
                plan: workspace.tier().map(|tier| tier.to_string()),
                drift: workspace.discrepancy(),
                in_flight: snapshot.key.in_flight(),
                reserved: workspace.reserved(),
                spent_per_day: round_credits(workspace.spent_per_day(now)),
                spent_by: exhaustion_time(snapshot.forecast),
            }
        };
        Self {
            waiting: pool.queued_requests(),
            spent_by: exhaustion_time(pool.forecast(now)),
            keys: pool.snapshot(now).iter().map(detail).collect(),
        }
    }
}

/// The state of a key in the documents. A paused key has the state `paused`, whatever its other state is.
pub(super) struct DisplayedState {
    pub(super) name: &'static str,
    /// The operator's reason for the pause, or the reason for the cooldown.
    pub(super) reason: Option<String>,
    pub(super) since: Option<UnixMs>,
    pub(super) until: Option<UnixMs>,
    /// The reason for the cooldown, even if the key is paused.
    pub(super) cooldown: Option<CooldownReason>,
}

impl DisplayedState {
    pub(super) fn new(snapshot: &KeySnapshot) -> Self {
        let (cooldown, cooldown_end) = match snapshot.unpaused_state {
            KeyState::Usable | KeyState::Paused { .. } => (None, None),
            KeyState::CoolingDown { reason, until } => (Some(reason), until),
        };
        let (name, reason, since, until) = match (snapshot.pause.as_deref(), cooldown) {
            (Some(pause), _) => {
                ("paused", pause.reason.as_deref().map(str::to_owned), Some(pause.since), pause.until)
            }
            (None, Some(cooldown)) => {
                let evidence = snapshot.key_evidence.iter().chain(&snapshot.workspace_evidence);
                let start = evidence.map(|evidence| evidence.at).min();
                let reason = Some(cooldown.as_str().to_owned());
                (snapshot.state.status().as_str(), reason, start, cooldown_end)
            }
            (None, None) if snapshot.is_near_limit => ("near_limit", None, None, None),
            (None, None) => (snapshot.state.status().as_str(), None, None, None),
        };
        Self { name, reason, since, until, cooldown }
    }
}

impl EvidenceDetail {
    fn new(evidence: &Evidence) -> Self {
        let source = &evidence.source;
        Self {
            claim: evidence.claim.as_str(),
            strength: evidence.strength().as_str(),
            at: evidence.at.rfc3339(),
            status: source.status,
            message: source.message.to_string(),
            route: source.route.to_string(),
            request_id: source.request_id.to_string(),
        }
    }
}

impl RestrictionDetail {
    fn new(restriction: &Restriction) -> Self {
        let source = &restriction.record.source;
        Self {
            what: restriction.limit.to_string(),
            verdict: restriction.verdict,
            status: source.status,
            message: source.message.to_string(),
            request_id: source.request_id.to_string(),
            since: restriction.first_refused_at.rfc3339(),
            until: restriction.until.rfc3339(),
        }
    }
}

/// Returns advice for the operator about a key whose cooldown needs an action of the operator.
pub(super) fn advice(reason: CooldownReason) -> Option<&'static str> {
    match reason {
        CooldownReason::Exhausted | CooldownReason::RateLimited => None,
        CooldownReason::Billing => {
            Some("Sign in to ElevenLabs with this account: it is unpaid, locked or suspected of abuse.")
        }
        CooldownReason::Invalid => Some("Replace or remove this key: ElevenLabs does not know it."),
        CooldownReason::WrongHost => Some(
            "This key is for another region. Set base_url for it in [[keys]], for example \
             https://api.eu.residency.elevenlabs.io (also: in, sg), or name the region in upstream.region_base_urls.",
        ),
    }
}

/// Returns the operations that a key can still serve.
fn possible_operations(reason: Option<CooldownReason>, cannot: &[Restriction]) -> &'static str {
    match reason {
        None if cannot.is_empty() => "everything",
        None => "everything but what is listed in cannot",
        Some(CooldownReason::Exhausted | CooldownReason::Billing) => {
            "requests that cost no credits: reading what the account contains"
        }
        Some(CooldownReason::RateLimited) => {
            "requests of other concurrency groups, and requests that cost no credits"
        }
        Some(CooldownReason::Invalid | CooldownReason::WrongHost) => "nothing",
    }
}

/// Returns the time at which credits run out at the current rate. Returns `None` if they last until their reset, or if
/// the forecast is unknown.
pub(super) fn exhaustion_time(forecast: Forecast) -> Option<String> {
    match forecast {
        Forecast::ExhaustedAt(at) => Some(at.rfc3339()),
        Forecast::LastsUntilReset | Forecast::Unknown => None,
    }
}

/// Rounds credits to a whole number. Negative numbers become 0.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "the cast saturates")]
pub(super) fn round_credits(credits: f64) -> u64 {
    credits.round() as u64
}

//! The document of `GET /api/keychoir-keys`: details of the keys that the fixed status document has
//! no fields for.

use serde::Serialize;

use crate::policy::evidence::Evidence;
use crate::policy::forecast::Forecast;
use crate::policy::key_state::{CooldownReason, KeyState};
use crate::policy::units::UnixMs;
use crate::pool::{KeySnapshot, Pool, Restriction};

/// The whole document, in pool order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct KeyDetails {
    /// Number of requests that wait in the queue for a key.
    waiting: usize,
    /// When all credits will be used up at the current rate, if that is before the next reset.
    spent_by: Option<String>,
    keys: Vec<KeyDetail>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct KeyDetail {
    short_key: String,
    name: Option<String>,
    /// The configured workspace; a key without one is a workspace of its own.
    workspace: Option<String>,
    /// The plan's name at the provider.
    plan: Option<String>,
    /// The status of the status document, extended by `near_limit`.
    state: &'static str,
    /// Why the key is not active: `exhausted`, `rate_limited`, `account_locked`, `invalid_key` or
    /// `wrong_host`.
    reason: Option<&'static str>,
    /// Advice for the operator.
    advice: Option<&'static str>,
    /// When this state began, and when it ends by itself.
    since: Option<String>,
    until: Option<String>,
    /// The operations that the key can still serve.
    possible: &'static str,
    /// The refusals of the key and of its workspace.
    evidence: Vec<EvidenceDetail>,
    /// Operations refused to the key or its plan that other keys may serve; requests for them go to
    /// other keys first.
    cannot: Vec<RestrictionDetail>,
    /// Credits by which the provider's usage of this period exceeded the recorded usage, since the start.
    drift: i64,
    in_flight: u32,
    /// Credits of its workspace reserved by concurrent requests.
    reserved: u64,
    /// Credits per day that its workspace uses, at the rate of the last hours.
    spent_per_day: u64,
    /// When its workspace's credits will be used up at this rate, if that is before their reset.
    spent_by: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct EvidenceDetail {
    claim: &'static str,
    /// `figures` or `words`.
    strength: &'static str,
    at: String,
    status: Option<u16>,
    /// The provider's message, without secrets.
    words: String,
    route: String,
    request_id: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct RestrictionDetail {
    what: String,
    verdict: &'static str,
    status: Option<u16>,
    words: String,
    request_id: String,
    since: String,
    until: String,
}

impl KeyDetails {
    /// The document for the keys of `pool` at `now`.
    #[must_use]
    pub fn of(pool: &Pool, now: UnixMs) -> Self {
        let detail = |snapshot: &KeySnapshot| {
            let workspace = snapshot.key.workspace();
            let (reason, until) = match snapshot.state {
                KeyState::Usable => (None, None),
                KeyState::Resting { reason, until } => (Some(reason), until),
            };
            let evidence: Vec<&Evidence> = snapshot.of_key.iter().chain(&snapshot.of_workspace).collect();
            let since = evidence.iter().map(|known| known.at).min().filter(|_| reason.is_some());
            let cannot = pool.restrictions().of(&snapshot.key, now);
            KeyDetail {
                state: if reason.is_none() && snapshot.is_near_limit {
                    "near_limit"
                } else {
                    snapshot.state.status().word()
                },
                reason: reason.map(CooldownReason::word),
                advice: reason.and_then(advice),
                since: since.map(UnixMs::rfc3339),
                until: until.map(UnixMs::rfc3339),
                possible: possible(reason, &cannot),
                evidence: evidence.into_iter().map(EvidenceDetail::of).collect(),
                cannot: cannot.iter().map(RestrictionDetail::of).collect(),
                short_key: snapshot.key.api_key().short().to_string(),
                name: snapshot.key.name().map(str::to_owned),
                workspace: workspace.membership().name().map(str::to_owned),
                plan: workspace.tier().map(|tier| tier.to_string()),
                drift: workspace.drift(),
                in_flight: snapshot.key.in_flight(),
                reserved: workspace.reserved(),
                spent_per_day: whole(workspace.spent_per_day(now)),
                spent_by: date(snapshot.forecast),
            }
        };
        Self {
            waiting: pool.waiting(),
            spent_by: date(pool.forecast(now)),
            keys: pool.snapshot(now).iter().map(detail).collect(),
        }
    }
}

impl EvidenceDetail {
    fn of(evidence: &Evidence) -> Self {
        let source = &evidence.source;
        Self {
            claim: evidence.claim.word(),
            strength: evidence.strength().word(),
            at: evidence.at.rfc3339(),
            status: source.status,
            words: source.words.to_string(),
            route: source.route.to_string(),
            request_id: source.request_id.to_string(),
        }
    }
}

impl RestrictionDetail {
    fn of(restriction: &Restriction) -> Self {
        let source = &restriction.source;
        Self {
            what: restriction.limit.to_string(),
            verdict: restriction.verdict,
            status: source.status,
            words: source.words.to_string(),
            request_id: source.request_id.to_string(),
            since: restriction.since.rfc3339(),
            until: restriction.until.rfc3339(),
        }
    }
}

/// Advice for the operator about a key that does not serve.
fn advice(reason: CooldownReason) -> Option<&'static str> {
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

/// The operations that a key can still serve.
fn possible(reason: Option<CooldownReason>, cannot: &[Restriction]) -> &'static str {
    match reason {
        None if cannot.is_empty() => "everything",
        None => "everything but what is listed in cannot",
        Some(CooldownReason::Exhausted | CooldownReason::Billing) => {
            "what is free: reading what the account has"
        }
        Some(CooldownReason::RateLimited) => "requests of other concurrency groups, and what is free",
        Some(CooldownReason::Invalid | CooldownReason::WrongHost) => "nothing",
    }
}

fn date(forecast: Forecast) -> Option<String> {
    match forecast {
        Forecast::SpentBy(at) => Some(at.rfc3339()),
        Forecast::Lasts | Forecast::Unknown => None,
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rate for people, saturating")]
fn whole(credits: f64) -> u64 {
    credits.round() as u64
}

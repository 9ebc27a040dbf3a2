//! Builds the JSON documents about a pool key and about the result of a key check, with the sentences that describe a
//! refusal to the operator. Also computes the id of a key.

use serde::Serialize;
use serde_json::{Value, json};

use crate::admin::details::{DisplayedState, advice, exhaustion_time, round_credits};
use crate::policy::evidence::Evidence;
use crate::policy::key_state::{CooldownReason, KeyOrigin};
use crate::policy::quota::Quota;
use crate::policy::shared_id::SharedId;
use crate::policy::units::UnixMs;
use crate::policy::verdict::Verdict;
use crate::poller::{CheckOutcome, KeyCheck};
use crate::pool::{Key, KeySnapshot, Pool, Restriction};

/// Returns the id of the key in the admin API, which consists of the first digits of its fingerprint.
pub(in crate::admin::api) fn key_id(key: &Key) -> String {
    key.api_key().fingerprint().key_id()
}

/// The document about a key of the pool.
#[derive(Debug, PartialEq, Serialize)]
#[cfg_attr(test, derive(Default))]
pub(crate) struct KeyDocument {
    pub(crate) id: String,
    pub(crate) name: Option<String>,
    pub(crate) short_key: String,
    pub(crate) workspace: Option<String>,
    /// The identifier of the workspace, which also exists if the workspace has no name. The dashboard groups keys by
    /// it.
    #[serde(skip)]
    pub(crate) workspace_id: Option<SharedId>,
    pub(crate) plan: Option<String>,
    /// `active`, `near_limit`, `rate_limited`, `exhausted`, `invalid` or `paused`.
    pub(crate) state: &'static str,
    pub(crate) paused: bool,
    /// The operator's reason for the pause, or the reason for the cooldown.
    pub(crate) reason: Option<String>,
    /// The start of the pause, or the time of the earliest evidence for the cooldown. `None` for any other state.
    pub(crate) since: Option<String>,
    /// The time at which the cooldown or pause ends automatically, or `None` if there is no such time.
    pub(crate) until: Option<String>,
    /// The origin of the key: `environment`, `file` or `managed`.
    pub(crate) source: &'static str,
    pub(crate) removable: bool,
    pub(crate) base_url: Option<String>,
    pub(crate) weight: u32,
    pub(crate) credits_used: u64,
    pub(crate) credits_limit: Option<u64>,
    pub(crate) credits_remaining: Option<u64>,
    pub(crate) resets_at: Option<String>,
    pub(crate) in_flight: u32,
    /// Credits of the workspace that are reserved for requests in flight.
    pub(crate) reserved: u64,
    /// Credits that the workspace uses per day at the rate of the last hours.
    pub(crate) credits_per_day: u64,
    /// The time at which the credits will be exhausted at this rate. `None` if they last until their reset, or if the
    /// forecast is unknown.
    pub(crate) exhausted_at: Option<String>,
    pub(crate) evidence: Vec<Value>,
    pub(crate) restrictions: Vec<Value>,
    pub(crate) advice: Option<&'static str>,
}

impl KeyDocument {
    /// Returns whether a member differs from `earlier`. The two forecasts are ignored, because they also change without
    /// requests.
    pub(in crate::admin::api) fn has_changed_since(&self, earlier: Self) -> bool {
        let Self { credits_per_day, exhausted_at, .. } = self;
        *self != Self { credits_per_day: *credits_per_day, exhausted_at: exhausted_at.clone(), ..earlier }
    }
}

/// Returns the document for a key, with its state at `now`.
pub(in crate::admin::api) fn key_document(pool: &Pool, snapshot: &KeySnapshot, now: UnixMs) -> KeyDocument {
    let KeySnapshot { key, quota, .. } = snapshot;
    let workspace = key.workspace();
    let state = DisplayedState::new(snapshot);
    let evidence = snapshot.key_evidence.iter().chain(&snapshot.workspace_evidence);
    let restrictions = pool.restrictions().for_key(key, now);
    KeyDocument {
        id: key_id(key),
        name: key.name().map(str::to_owned),
        short_key: key.api_key().short().to_string(),
        workspace: workspace.membership().name().map(str::to_owned),
        workspace_id: Some(workspace.shared_id()),
        plan: workspace.tier().map(|tier| tier.to_string()),
        state: state.name,
        paused: snapshot.pause.is_some(),
        reason: state.reason,
        since: state.since.map(UnixMs::rfc3339),
        until: state.until.map(UnixMs::rfc3339),
        source: key.origin().as_str(),
        removable: key.origin() == KeyOrigin::Managed,
        base_url: key.authority().map(|authority| authority.to_string()),
        weight: key.weight(),
        credits_used: quota.count,
        credits_limit: quota.limit,
        credits_remaining: remaining_credits(quota),
        resets_at: quota.resets_at.map(UnixMs::rfc3339),
        in_flight: key.in_flight(),
        reserved: workspace.reserved(),
        credits_per_day: round_credits(workspace.spent_per_day(now)),
        exhausted_at: exhaustion_time(snapshot.forecast),
        evidence: evidence.map(evidence_document).collect(),
        restrictions: restrictions.iter().map(restriction_document).collect(),
        advice: state.cooldown.and_then(advice),
    }
}

/// Returns the document for a refusal of the key or of its workspace. The message is from the provider, without
/// secrets.
fn evidence_document(evidence: &Evidence) -> Value {
    let source = &evidence.source;
    json!({
        "claim": evidence.claim.as_str(),
        "strength": evidence.strength().as_str(),
        "at": evidence.at.rfc3339(),
        "status": source.status,
        "message": &*source.message,
        "route": &*source.route,
        "request_id": &*source.request_id,
    })
}

/// Returns the document for an operation that the provider refused for the key or its plan.
fn restriction_document(restriction: &Restriction) -> Value {
    let source = &restriction.record.source;
    json!({
        "limit": restriction.limit.to_string(),
        "verdict": restriction.verdict,
        "status": source.status,
        "message": &*source.message,
        "request_id": &*source.request_id,
        "since": restriction.first_refused_at.rfc3339(),
        "until": restriction.until.rfc3339(),
    })
}

/// Returns the remaining credits, or `None` if the limit is unknown.
fn remaining_credits(quota: &Quota) -> Option<u64> {
    quota.limit.map(|_| quota.remaining())
}

/// The document about the result of a key check.
#[derive(Serialize)]
pub(crate) struct CheckDocument {
    pub(crate) id: String,
    pub(crate) name: Option<String>,
    pub(crate) short_key: String,
    /// `valid`, `quota_unreadable`, `refused` or `no_response`.
    pub(crate) outcome: &'static str,
    pub(crate) plan: Option<String>,
    pub(crate) is_paid: Option<bool>,
    pub(crate) credits_used: Option<u64>,
    pub(crate) credits_limit: Option<u64>,
    pub(crate) credits_remaining: Option<u64>,
    pub(crate) resets_at: Option<String>,
    pub(crate) permissions: Permissions,
    /// The maximum number of concurrent speech requests.
    pub(crate) max_concurrent_speech: Option<u32>,
    pub(crate) latency_ms: u64,
    pub(crate) refusal: Option<CheckRefusal>,
    /// The error that prevented a response, for the outcome `no_response`.
    pub(crate) reason: Option<String>,
}

/// The permissions that the check tested. `None` means that the result is unknown.
#[derive(Serialize)]
pub(crate) struct Permissions {
    pub(crate) user_read: Option<bool>,
    pub(crate) models_read: Option<bool>,
}

/// The response with which the provider refused the check.
#[derive(Serialize)]
pub(crate) struct CheckRefusal {
    pub(crate) status: u16,
    /// The name of the verdict, as in logs.
    pub(crate) code: &'static str,
    /// The meaning of the refusal and advice for the operator.
    pub(crate) meaning: &'static str,
}

/// Returns the document for the result of a key check.
pub(in crate::admin::api) fn check_document(key: &Key, result: &KeyCheck) -> CheckDocument {
    let mut document = CheckDocument {
        id: key_id(key),
        name: key.name().map(str::to_owned),
        short_key: key.api_key().short().to_string(),
        outcome: "no_response",
        plan: None,
        is_paid: None,
        credits_used: None,
        credits_limit: None,
        credits_remaining: None,
        resets_at: None,
        permissions: Permissions { user_read: result.may_read_user, models_read: result.may_read_models },
        max_concurrent_speech: result.max_concurrent_speech,
        latency_ms: u64::try_from(result.latency.as_millis()).unwrap_or(u64::MAX),
        refusal: None,
        reason: None,
    };
    match &result.outcome {
        CheckOutcome::Valid { plan, quota, is_paid } => {
            document.outcome = "valid";
            (document.plan, document.is_paid) = (plan.clone(), *is_paid);
            document.credits_used = Some(quota.count);
            (document.credits_limit, document.credits_remaining) = (quota.limit, remaining_credits(quota));
            document.resets_at = quota.resets_at.map(UnixMs::rfc3339);
        }
        CheckOutcome::QuotaUnreadable => document.outcome = "quota_unreadable",
        CheckOutcome::Refused { status, verdict } => {
            document.outcome = "refused";
            document.refusal = Some(CheckRefusal {
                status: *status,
                code: verdict.as_str(),
                meaning: describe_refusal(*verdict),
            });
        }
        CheckOutcome::NoResponse { reason } => document.reason = Some(reason.clone()),
    }
    document
}

/// Returns sentences for the operator that describe a refusal and, where there is a remedy, name it.
#[must_use]
pub fn describe_refusal(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::InvalidKey => {
            advice(CooldownReason::Invalid).unwrap_or("ElevenLabs does not know this key.")
        }
        Verdict::WrongHost => advice(CooldownReason::WrongHost).unwrap_or("This key is for another region."),
        Verdict::Billing | Verdict::Abuse => {
            advice(CooldownReason::Billing).unwrap_or("The account is unpaid or locked.")
        }
        Verdict::WorkspaceQuota(_) | Verdict::KeyQuota(_) => "No credits are left.",
        Verdict::RateLimited(_) | Verdict::Concurrency { .. } => "Too many requests: check again later.",
        Verdict::Busy | Verdict::ServerError => "ElevenLabs is overloaded or failing: check again later.",
        Verdict::MissingPermission(_) => "The key lacks a permission.",
        Verdict::Served
        | Verdict::PlanFeature(_)
        | Verdict::Slots
        | Verdict::Unexplained(_)
        | Verdict::NotFound
        | Verdict::RequestError
        | Verdict::Unreadable => "ElevenLabs refused the request without a known reason.",
    }
}

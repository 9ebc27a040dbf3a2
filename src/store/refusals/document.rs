//! Converts a refusal to the JSON that the database stores and other replicas receive, and back. The format is JSON
//! because a refusal is always read as a whole, and operators can read it.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::elevenlabs::affinity::IdentifierHash;
use crate::elevenlabs::endpoint::Route;
use crate::elevenlabs::features::RequestFeatures;
use crate::policy::permission::Permission;
use crate::policy::replay::Effect;
use crate::policy::units::UnixMs;
use crate::policy::verdict::{Shortfall, Subject, UnexplainedRefusal, Verdict};
use crate::pool::{OwnerId, RefusalHistory, RefusalRecord};
use crate::secret::Fingerprint;
use crate::store::source::StoredSource;

/// The JSON of a refusal. Members with a `rename` attribute keep the names that existing files contain.
#[derive(Serialize, Deserialize)]
struct RefusalDocument {
    key: String,
    workspace: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    plan: Option<String>,
    /// Whether the restriction applies to all workspaces with the same plan.
    #[serde(rename = "of_plan", default, skip_serializing_if = "std::ops::Not::not")]
    applies_to_plan: bool,
    verdict: VerdictDocument,
    at_ms: u64,
    /// Whether another account refused the same request with the same message.
    #[serde(rename = "agreed", default, skip_serializing_if = "std::ops::Not::not")]
    is_repeated_elsewhere: bool,
    /// Whether the request is in a concurrency group.
    #[serde(rename = "in_concurrency_group", default, skip_serializing_if = "std::ops::Not::not")]
    is_in_group: bool,
    #[serde(rename = "earlier", default, skip_serializing_if = "Option::is_none")]
    history: Option<HistoryDocument>,
    request: FeaturesDocument,
    #[serde(default)]
    source: StoredSource,
}

/// A verdict, and the details that the classification extracted from the response.
#[derive(Default, Serialize, Deserialize)]
struct VerdictDocument {
    #[serde(rename = "word")]
    name: String,
    /// The feature that the plan lacks.
    #[serde(rename = "about", default, skip_serializing_if = "Option::is_none")]
    subject: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    permission: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    retry_after_ms: Option<u64>,
    /// Maximum number of concurrent requests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    maximum: Option<u32>,
    /// Credits that were left.
    #[serde(rename = "left", default, skip_serializing_if = "Option::is_none")]
    remaining: Option<u64>,
    /// Credits that the request needs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    required: Option<u64>,
    /// The size of the quota in credits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    quota: Option<u64>,
}

/// The earlier refusals with the same restriction.
#[derive(Serialize, Deserialize)]
struct HistoryDocument {
    #[serde(rename = "since_ms")]
    first_refused_at_ms: u64,
    /// Length of the shortest refused text in characters, or 0 if the refusals were not about a length.
    #[serde(default)]
    from_characters: u64,
}

/// The features of the refused request.
#[derive(Serialize, Deserialize)]
struct FeaturesDocument {
    route: String,
    has_effect: bool,
    /// The hash of the voice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    voice: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    model: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    output_format: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    characters: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    permission: Option<String>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    adds_voice: bool,
}

/// Serializes a refusal.
pub(super) fn to_json(record: &RefusalRecord) -> String {
    let RefusalRecord { features, source, .. } = record;
    let document = RefusalDocument {
        key: record.key.to_string(),
        workspace: record.workspace.as_str().to_owned(),
        plan: record.tier.as_deref().map(str::to_owned),
        applies_to_plan: record.applies_to_plan,
        verdict: verdict_document(record.verdict),
        at_ms: record.at.0,
        is_repeated_elsewhere: record.is_repeated_elsewhere,
        is_in_group: record.is_in_group,
        history: record.history.map(|history| HistoryDocument {
            first_refused_at_ms: history.first_refused_at.0,
            from_characters: history.from_characters,
        }),
        request: FeaturesDocument {
            route: features.route.to_string(),
            has_effect: features.effect == Effect::Some,
            voice: features.voice.map(|voice| format!("{:032x}", u128::from_be_bytes(*voice.bytes()))),
            model: features.model.as_deref().map(str::to_owned),
            output_format: features.output_format.as_deref().map(str::to_owned),
            characters: features.characters,
            permission: features.permission.map(|permission| permission.name().to_owned()),
            adds_voice: features.adds_voice,
        },
        source: StoredSource::from(&**source),
    };
    // Numbers and strings always serialize.
    serde_json::to_string(&document).unwrap_or_else(|_| "{}".to_owned())
}

/// Parses a refusal. Returns `None` if it is unreadable or of a verdict that restricts nothing.
pub(super) fn from_json(json: &str) -> Option<RefusalRecord> {
    let document: RefusalDocument = serde_json::from_str(json).ok()?;
    let FeaturesDocument { voice, permission, .. } = &document.request;
    let voice = match voice {
        Some(digits) => {
            Some(IdentifierHash::from_bytes(u128::from_str_radix(digits, 16).ok()?.to_be_bytes()))
        }
        None => None,
    };
    let permission = match permission {
        Some(name) => Some(Permission::parse(name)?),
        None => None,
    };
    Some(RefusalRecord {
        key: Fingerprint::parse(&document.key)?,
        workspace: OwnerId::from_stored(&document.workspace),
        tier: document.plan.map(Into::into),
        applies_to_plan: document.applies_to_plan,
        features: RequestFeatures {
            route: Route::parse(&document.request.route),
            effect: if document.request.has_effect { Effect::Some } else { Effect::None },
            voice,
            model: document.request.model.map(Into::into),
            output_format: document.request.output_format.map(Into::into),
            characters: document.request.characters,
            permission,
            adds_voice: document.request.adds_voice,
        },
        verdict: parse_verdict(&document.verdict)?,
        is_in_group: document.is_in_group,
        is_repeated_elsewhere: document.is_repeated_elsewhere,
        at: UnixMs(document.at_ms),
        history: document.history.map(|history| RefusalHistory {
            first_refused_at: UnixMs(history.first_refused_at_ms),
            from_characters: history.from_characters,
        }),
        source: Arc::new(document.source.into()),
    })
}

/// Returns the name of a verdict with the details that the variant contains.
fn verdict_document(verdict: Verdict) -> VerdictDocument {
    let mut document = VerdictDocument { name: verdict.as_str().to_owned(), ..VerdictDocument::default() };
    match verdict {
        Verdict::WorkspaceQuota(shortfall) | Verdict::KeyQuota(shortfall) => {
            document.remaining = shortfall.remaining;
            document.required = shortfall.required;
            document.quota = shortfall.quota;
        }
        Verdict::MissingPermission(permission) => {
            document.permission = permission.map(|permission| permission.name().to_owned());
        }
        Verdict::PlanFeature(subject) => document.subject = Some(subject.as_str().to_owned()),
        Verdict::RateLimited(retry_after)
        | Verdict::Unexplained(UnexplainedRefusal::TooMany(retry_after)) => {
            document.retry_after_ms =
                retry_after.map(|duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX));
        }
        Verdict::Concurrency { maximum } => document.maximum = maximum,
        Verdict::Served
        | Verdict::InvalidKey
        | Verdict::WrongHost
        | Verdict::Slots
        | Verdict::Billing
        | Verdict::Abuse
        | Verdict::Busy
        | Verdict::Unexplained(
            UnexplainedRefusal::Unauthorized
            | UnexplainedRefusal::PaymentRequired
            | UnexplainedRefusal::Forbidden
            | UnexplainedRefusal::Bodiless,
        )
        | Verdict::NotFound
        | Verdict::RequestError
        | Verdict::ServerError
        | Verdict::Unreadable => {}
    }
    document
}

/// Parses a verdict. Returns `None` for unknown verdicts and for verdicts that restrict nothing.
fn parse_verdict(document: &VerdictDocument) -> Option<Verdict> {
    let retry_after = document.retry_after_ms.map(Duration::from_millis);
    Some(match &*document.name {
        "workspace_quota" => Verdict::WorkspaceQuota(Shortfall {
            remaining: document.remaining,
            required: document.required,
            quota: document.quota,
        }),
        "missing_permission" => Verdict::MissingPermission(match &document.permission {
            Some(name) => Some(Permission::parse(name)?),
            None => None,
        }),
        "plan_feature" => Verdict::PlanFeature(Subject::parse(document.subject.as_deref()?)?),
        "slots" => Verdict::Slots,
        "rate_limited" => Verdict::RateLimited(retry_after),
        "too_many_requests" => Verdict::Unexplained(UnexplainedRefusal::TooMany(retry_after)),
        "concurrency" => Verdict::Concurrency { maximum: document.maximum },
        "unauthorized" => Verdict::Unexplained(UnexplainedRefusal::Unauthorized),
        "payment_required" => Verdict::Unexplained(UnexplainedRefusal::PaymentRequired),
        "forbidden" => Verdict::Unexplained(UnexplainedRefusal::Forbidden),
        "unexplained" => Verdict::Unexplained(UnexplainedRefusal::Bodiless),
        "invalid_key" => Verdict::InvalidKey,
        "wrong_host" => Verdict::WrongHost,
        "billing" => Verdict::Billing,
        "abuse" => Verdict::Abuse,
        _ => return None,
    })
}

//! Converts the evidence about a key and its workspace to the JSON in the row of the key, and back. The format is JSON
//! because the evidence is always read as a whole, and operators can read it. The conclusions from the evidence are not
//! stored, because a later version may draw other conclusions.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::source::StoredSource;
use crate::policy::concurrency_group::ConcurrencyGroup;
use crate::policy::evidence::{ClaimedFault, Evidence};
use crate::policy::units::UnixMs;

/// The evidence in the row of a key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct StoredEvidence {
    /// Evidence about the key itself.
    pub(super) key_evidence: Vec<Evidence>,
    /// Evidence about the workspace of the key.
    pub(super) workspace_evidence: Vec<Evidence>,
}

/// The JSON of the evidence.
#[derive(Serialize, Deserialize)]
struct EvidenceDocument {
    #[serde(default)]
    key: Vec<EvidenceEntry>,
    #[serde(default)]
    workspace: Vec<EvidenceEntry>,
}

/// The JSON of one piece of evidence. Members with a `rename` attribute keep the names that existing files contain.
#[derive(Serialize, Deserialize)]
struct EvidenceEntry {
    claim: String,
    at_ms: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    retry_after_ms: Option<u64>,
    /// Whether another account refused the same request with the same message.
    #[serde(rename = "agreed", default, skip_serializing_if = "std::ops::Not::not")]
    is_repeated_elsewhere: bool,
    /// Credits that were left, as the provider reported.
    #[serde(rename = "left", default, skip_serializing_if = "Option::is_none")]
    remaining: Option<u64>,
    /// Credits that the request needs, as the provider reported.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    required: Option<u64>,
    /// The remaining credits, scaled to the cost estimates of Keychoir, or `None` if the provider reported no credits.
    #[serde(rename = "left_by_estimate", default, skip_serializing_if = "Option::is_none")]
    scaled_remaining: Option<u64>,
    /// The index of the group of models that share a concurrency limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    concurrency_group: Option<usize>,
    #[serde(flatten)]
    source: StoredSource,
}

/// Serializes the evidence.
pub(super) fn to_json(key_evidence: &[Evidence], workspace_evidence: &[Evidence]) -> String {
    if key_evidence.is_empty() && workspace_evidence.is_empty() {
        return "{}".to_owned();
    }
    let entries = |evidence: &[Evidence]| evidence.iter().map(to_entry).collect();
    let document = EvidenceDocument { key: entries(key_evidence), workspace: entries(workspace_evidence) };
    // Numbers and strings always serialize.
    serde_json::to_string(&document).unwrap_or_else(|_| "{}".to_owned())
}

/// Parses the evidence. Unreadable entries are skipped, because the provider will refuse the key again.
pub(super) fn from_json(json: &str) -> StoredEvidence {
    let Ok(document) = serde_json::from_str::<EvidenceDocument>(json) else {
        return StoredEvidence::default();
    };
    let evidence = |entries: Vec<EvidenceEntry>| entries.into_iter().filter_map(from_entry).collect();
    StoredEvidence { key_evidence: evidence(document.key), workspace_evidence: evidence(document.workspace) }
}

fn to_entry(evidence: &Evidence) -> EvidenceEntry {
    let Evidence { claim, at, retry_after, is_repeated_elsewhere, source } = evidence;
    let (mut reported_credits, mut stored_scaled_remaining, mut concurrency_group) = (None, None, None);
    match claim {
        ClaimedFault::Credits { reported, scaled_remaining } => {
            reported_credits = *reported;
            stored_scaled_remaining = reported.map(|_| *scaled_remaining);
        }
        ClaimedFault::RateLimited(group) => concurrency_group = Some(group.index()),
        ClaimedFault::Locked
        | ClaimedFault::Suspected
        | ClaimedFault::InvalidKey
        | ClaimedFault::WrongHost => {}
    }
    EvidenceEntry {
        claim: claim.as_str().to_owned(),
        at_ms: at.0,
        retry_after_ms: retry_after
            .map(|retry_after| u64::try_from(retry_after.as_millis()).unwrap_or(u64::MAX)),
        is_repeated_elsewhere: *is_repeated_elsewhere,
        remaining: reported_credits.map(|(remaining, _)| remaining),
        required: reported_credits.map(|(_, required)| required),
        scaled_remaining: stored_scaled_remaining,
        concurrency_group,
        source: source.into(),
    }
}

fn from_entry(entry: EvidenceEntry) -> Option<Evidence> {
    let group = || ConcurrencyGroup::all().nth(entry.concurrency_group?);
    let claim = match &*entry.claim {
        "credits" => ClaimedFault::Credits {
            reported: entry.remaining.zip(entry.required),
            scaled_remaining: entry.scaled_remaining.unwrap_or(0),
        },
        "rate_limited" => ClaimedFault::RateLimited(group()?),
        "locked" => ClaimedFault::Locked,
        "suspected" => ClaimedFault::Suspected,
        "invalid_key" => ClaimedFault::InvalidKey,
        "wrong_host" => ClaimedFault::WrongHost,
        _ => return None,
    };
    Some(Evidence {
        claim,
        at: UnixMs(entry.at_ms),
        retry_after: entry.retry_after_ms.map(Duration::from_millis),
        is_repeated_elsewhere: entry.is_repeated_elsewhere,
        source: entry.source.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::evidence::RefusalSource;

    #[test]
    fn evidence_is_read_as_it_was_written() {
        let source = RefusalSource {
            status: Some(401),
            message: "quota_exceeded: \"x\"".into(),
            route: "/v1/user".into(),
            request_id: "r".into(),
        };
        let evidence = |claim| Evidence {
            claim,
            at: UnixMs(5),
            retry_after: Some(Duration::from_secs(7)),
            is_repeated_elsewhere: true,
            source: source.clone(),
        };
        let key_evidence = [
            ClaimedFault::InvalidKey,
            ClaimedFault::WrongHost,
            ClaimedFault::Credits { reported: Some((3, 9)), scaled_remaining: 4 },
            ClaimedFault::Credits { reported: None, scaled_remaining: 0 },
        ]
        .map(evidence);
        let workspace_evidence = [
            ClaimedFault::Locked,
            ClaimedFault::Suspected,
            ClaimedFault::RateLimited(ConcurrencyGroup::MUSIC),
        ]
        .map(evidence);
        let stored_evidence = from_json(&to_json(&key_evidence, &workspace_evidence));
        assert_eq!(
            (stored_evidence.key_evidence, stored_evidence.workspace_evidence),
            (key_evidence.into(), workspace_evidence.into())
        );
    }

    #[test]
    fn an_unreadable_column_is_read_as_no_evidence() {
        for json in ["", "{}", "[]", "{\"key\":7}", r#"{"key":[{"claim":"new","at_ms":1}]}"#] {
            assert_eq!(from_json(json), StoredEvidence::default(), "{json:?} must be read as no evidence");
        }
        assert_eq!(to_json(&[], &[]), "{}");
    }
}

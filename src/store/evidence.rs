//! Serializes the evidence about keys and workspaces as JSON in the row of the key, because it is
//! read as a whole, also by operators who debug. The conclusions are not stored, because a later
//! version may draw others.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::source::StoredSource;
use crate::policy::concurrency_group::ConcurrencyGroup;
use crate::policy::evidence::{ClaimedFault, Evidence};
use crate::policy::units::UnixMs;

/// The refusals of a key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Stored {
    /// Evidence about the key itself.
    pub(super) of_key: Vec<Evidence>,
    /// Evidence about its workspace.
    pub(super) of_workspace: Vec<Evidence>,
}

#[derive(Serialize, Deserialize)]
struct EvidenceDocument {
    #[serde(default)]
    key: Vec<Entry>,
    #[serde(default)]
    workspace: Vec<Entry>,
}

#[derive(Serialize, Deserialize)]
struct Entry {
    claim: String,
    at_ms: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    retry_after_ms: Option<u64>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    agreed: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    left: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    required: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    left_by_estimate: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    concurrency_group: Option<usize>,
    #[serde(flatten)]
    source: StoredSource,
}

/// Serializes the evidence for its column.
pub(super) fn write(of_key: &[Evidence], of_workspace: &[Evidence]) -> String {
    if of_key.is_empty() && of_workspace.is_empty() {
        return "{}".to_owned();
    }
    let entries = |evidence: &[Evidence]| evidence.iter().map(entry).collect();
    let document = EvidenceDocument { key: entries(of_key), workspace: entries(of_workspace) };
    // Numbers and strings always serialize.
    serde_json::to_string(&document).unwrap_or_else(|_| "{}".to_owned())
}

/// Parses a column. Unreadable entries are skipped: the provider refuses again.
pub(super) fn read(text: &str) -> Stored {
    let Ok(document) = serde_json::from_str::<EvidenceDocument>(text) else { return Stored::default() };
    let evidence = |entries: Vec<Entry>| entries.into_iter().filter_map(of_entry).collect();
    Stored { of_key: evidence(document.key), of_workspace: evidence(document.workspace) }
}

fn entry(evidence: &Evidence) -> Entry {
    let Evidence { claim, at, named_span, is_agreed, source } = evidence;
    let (mut figures, mut by_estimate, mut group) = (None, None, None);
    match claim {
        ClaimedFault::Credits { figures: known, left_by_estimate } => {
            (figures, by_estimate) = (*known, known.map(|_| *left_by_estimate));
        }
        ClaimedFault::RateLimited(limited) => group = Some(limited.index()),
        ClaimedFault::Locked
        | ClaimedFault::Suspected
        | ClaimedFault::InvalidKey
        | ClaimedFault::WrongHost => {}
    }
    Entry {
        claim: claim.word().to_owned(),
        at_ms: at.0,
        retry_after_ms: named_span.map(|span| u64::try_from(span.as_millis()).unwrap_or(u64::MAX)),
        agreed: *is_agreed,
        left: figures.map(|(left, _)| left),
        required: figures.map(|(_, required)| required),
        left_by_estimate: by_estimate,
        concurrency_group: group,
        source: source.into(),
    }
}

fn of_entry(entry: Entry) -> Option<Evidence> {
    let group = || ConcurrencyGroup::all().nth(entry.concurrency_group?);
    let claim = match &*entry.claim {
        "credits" => ClaimedFault::Credits {
            figures: entry.left.zip(entry.required),
            left_by_estimate: entry.left_by_estimate.unwrap_or(0),
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
        named_span: entry.retry_after_ms.map(Duration::from_millis),
        is_agreed: entry.agreed,
        source: entry.source.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::evidence::RefusalSource;

    #[test]
    fn evidence_survives_the_file() {
        let source = RefusalSource {
            status: Some(401),
            words: "quota_exceeded: \"x\"".into(),
            route: "/v1/user".into(),
            request_id: "r".into(),
        };
        let evidence = |claim| Evidence {
            claim,
            at: UnixMs(5),
            named_span: Some(Duration::from_secs(7)),
            is_agreed: true,
            source: source.clone(),
        };
        let of_key = [
            ClaimedFault::InvalidKey,
            ClaimedFault::WrongHost,
            ClaimedFault::Credits { figures: Some((3, 9)), left_by_estimate: 4 },
            ClaimedFault::Credits { figures: None, left_by_estimate: 0 },
        ]
        .map(evidence);
        let of_workspace = [
            ClaimedFault::Locked,
            ClaimedFault::Suspected,
            ClaimedFault::RateLimited(ConcurrencyGroup::MUSIC),
        ]
        .map(evidence);
        let stored = read(&write(&of_key, &of_workspace));
        assert_eq!((stored.of_key, stored.of_workspace), (of_key.into(), of_workspace.into()));
    }

    #[test]
    fn an_unreadable_column_is_no_evidence() {
        for text in ["", "{}", "[]", "{\"key\":7}", r#"{"key":[{"claim":"new","at_ms":1}]}"#] {
            assert_eq!(read(text), Stored::default(), "{text}");
        }
        assert_eq!(write(&[], &[]), "{}");
    }
}

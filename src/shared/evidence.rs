//! Formats and parses evidence as an entry of the map of evidence. The name of an entry contains the claim of a
//! refusal, and the key or workspace that the refusal is about. Its value contains the amounts and the circumstances of
//! the refusal, or marks the evidence as refuted.
//!
//! The name of a workspace is the digest of one of its keys, because not all replicas know the workspace's identifier.
//! The entry does not contain the provider's message, which may contain data of a client.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::policy::concurrency_group::ConcurrencyGroup;
use crate::policy::evidence::{ClaimedFault, Evidence, RefusalSource};
use crate::policy::shared_id::{SharedId, SharedKind};
use crate::policy::units::UnixMs;
use crate::secret::Fingerprint;

/// The value of an entry whose evidence is refuted.
pub(super) const REFUTED: &str = "-";

/// Returns the digest by which replicas name a key in Redis.
pub(super) fn key_id(fingerprint: Fingerprint) -> SharedId {
    SharedId::new(SharedKind::Key, &[fingerprint.to_string().as_bytes()])
}

/// The name of an entry: a claim about a key or a workspace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct EvidenceName {
    /// The digest of the key.
    pub(super) key: SharedId,
    /// Whether the claim is about the key and not about its workspace.
    pub(super) is_about_key: bool,
    claim: ClaimName,
}

/// The kind of a claim, without its amounts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum ClaimName {
    Credits,
    RateLimited(ConcurrencyGroup),
    Locked,
    Suspected,
    InvalidKey,
    WrongHost,
}

impl EvidenceName {
    pub(super) fn new(key: Fingerprint, is_about_key: bool, claim: ClaimedFault) -> Self {
        let claim = match claim {
            ClaimedFault::Credits { .. } => ClaimName::Credits,
            ClaimedFault::RateLimited(group) => ClaimName::RateLimited(group),
            ClaimedFault::Locked => ClaimName::Locked,
            ClaimedFault::Suspected => ClaimName::Suspected,
            ClaimedFault::InvalidKey => ClaimName::InvalidKey,
            ClaimedFault::WrongHost => ClaimName::WrongHost,
        };
        Self { key: key_id(key), is_about_key, claim }
    }

    /// Whether `evidence` contains a claim of this kind.
    pub(super) fn matches(&self, evidence: &Evidence) -> bool {
        match (self.claim, evidence.claim) {
            (ClaimName::Credits, ClaimedFault::Credits { .. })
            | (ClaimName::Locked, ClaimedFault::Locked)
            | (ClaimName::Suspected, ClaimedFault::Suspected)
            | (ClaimName::InvalidKey, ClaimedFault::InvalidKey)
            | (ClaimName::WrongHost, ClaimedFault::WrongHost) => true,
            (ClaimName::RateLimited(expected), ClaimedFault::RateLimited(group)) => expected == group,
            (
                ClaimName::Credits
                | ClaimName::RateLimited(_)
                | ClaimName::Locked
                | ClaimName::Suspected
                | ClaimName::InvalidKey
                | ClaimName::WrongHost,
                _,
            ) => false,
        }
    }

    /// Parses a name in the format of its `Display` implementation.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split(':');
        let is_about_key = match parts.next()? {
            "key" => true,
            "workspace" => false,
            _ => return None,
        };
        let key = SharedId::parse(parts.next()?)?;
        let claim = match (parts.next()?, parts.next()) {
            ("credits", None) => ClaimName::Credits,
            ("rate_limited", Some(number)) => {
                let number: usize = number.parse().ok()?;
                ClaimName::RateLimited(ConcurrencyGroup::all().nth(number)?)
            }
            ("locked", None) => ClaimName::Locked,
            ("suspected", None) => ClaimName::Suspected,
            ("invalid_key", None) => ClaimName::InvalidKey,
            ("wrong_host", None) => ClaimName::WrongHost,
            _ => return None,
        };
        Some(Self { key, is_about_key, claim })
    }
}

impl std::fmt::Display for EvidenceName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let scope = if self.is_about_key { "key" } else { "workspace" };
        write!(f, "{scope}:{}:", self.key)?;
        match self.claim {
            ClaimName::Credits => f.write_str("credits"),
            ClaimName::RateLimited(group) => write!(f, "rate_limited:{}", group.index()),
            ClaimName::Locked => f.write_str("locked"),
            ClaimName::Suspected => f.write_str("suspected"),
            ClaimName::InvalidKey => f.write_str("invalid_key"),
            ClaimName::WrongHost => f.write_str("wrong_host"),
        }
    }
}

/// The value of an entry as JSON: the amounts of the claim, and the circumstances of the refusal.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct SharedEvidence {
    /// The remaining credits that the refusal reported.
    #[serde(skip_serializing_if = "Option::is_none")]
    remaining: Option<u64>,
    /// The required credits that the refusal reported.
    #[serde(skip_serializing_if = "Option::is_none")]
    required: Option<u64>,
    /// The remaining credits, scaled to the cost estimates of Keychoir.
    #[serde(skip_serializing_if = "Option::is_none")]
    scaled_remaining: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    retry_after_ms: Option<u64>,
    /// Whether another account refused the same request with the same message.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    is_repeated_elsewhere: bool,
    /// The HTTP status of the refusal.
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<u16>,
}

/// Formats evidence without its kind of claim and its time, which are in the name and the stamp of the entry.
pub(super) fn format_evidence(evidence: &Evidence) -> String {
    let (reported, scaled_remaining) = match evidence.claim {
        ClaimedFault::Credits { reported, scaled_remaining } => (reported, Some(scaled_remaining)),
        ClaimedFault::RateLimited(_)
        | ClaimedFault::Locked
        | ClaimedFault::Suspected
        | ClaimedFault::InvalidKey
        | ClaimedFault::WrongHost => (None, None),
    };
    let document = SharedEvidence {
        remaining: reported.map(|(remaining, _)| remaining),
        required: reported.map(|(_, required)| required),
        scaled_remaining,
        retry_after_ms: evidence
            .retry_after
            .map(|delay| u64::try_from(delay.as_millis()).unwrap_or(u64::MAX)),
        is_repeated_elsewhere: evidence.is_repeated_elsewhere,
        status: evidence.source.status,
    };
    // Formatting numbers and booleans as JSON cannot fail.
    serde_json::to_string(&document).unwrap_or_default()
}

/// Parses the evidence of another replica. `at` is the local time of the refusal, and `replica` is the id of that
/// replica.
pub(super) fn parse_evidence(name: &EvidenceName, text: &str, at: UnixMs, replica: &str) -> Option<Evidence> {
    let document: SharedEvidence = serde_json::from_str(text).ok()?;
    let claim = match name.claim {
        ClaimName::Credits => ClaimedFault::Credits {
            reported: document.remaining.zip(document.required),
            scaled_remaining: document.scaled_remaining.unwrap_or(0),
        },
        ClaimName::RateLimited(group) => ClaimedFault::RateLimited(group),
        ClaimName::Locked => ClaimedFault::Locked,
        ClaimName::Suspected => ClaimedFault::Suspected,
        ClaimName::InvalidKey => ClaimedFault::InvalidKey,
        ClaimName::WrongHost => ClaimedFault::WrongHost,
    };
    let source = RefusalSource {
        status: document.status,
        message: format!("reported by the replica {replica}").into(),
        route: Arc::default(),
        request_id: Arc::default(),
    };
    Some(Evidence {
        claim,
        at,
        retry_after: document.retry_after_ms.map(Duration::from_millis),
        is_repeated_elsewhere: document.is_repeated_elsewhere,
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::ApiKey;

    fn fingerprint() -> Fingerprint {
        ApiKey::new("sk_0123456789abcdef").unwrap().fingerprint()
    }

    #[test]
    fn evidence_is_parsed_as_it_was_formatted() {
        let claims = [
            ClaimedFault::Credits { reported: Some((3, 10)), scaled_remaining: 6 },
            ClaimedFault::Credits { reported: None, scaled_remaining: 0 },
            ClaimedFault::RateLimited(ConcurrencyGroup::from_number(7)),
            ClaimedFault::Locked,
            ClaimedFault::Suspected,
            ClaimedFault::InvalidKey,
            ClaimedFault::WrongHost,
        ];
        for claim in claims {
            let evidence = Evidence {
                claim,
                at: UnixMs(1_000),
                retry_after: Some(Duration::from_millis(1_500)),
                is_repeated_elsewhere: true,
                source: RefusalSource {
                    status: Some(429),
                    message: "a secret text of the client".into(),
                    route: "/v1/text-to-speech/{voice_id}".into(),
                    request_id: "id".into(),
                },
            };
            let name = EvidenceName::new(fingerprint(), false, claim);
            assert_eq!(EvidenceName::parse(&name.to_string()), Some(name), "{name} must be parsed");
            assert!(name.matches(&evidence), "{name} must match its evidence");
            let text = format_evidence(&evidence);
            assert!(
                !text.contains("secret") && !text.contains("id\""),
                "{text} must not contain the message or the request id"
            );
            let received = parse_evidence(&name, &text, evidence.at, "r1").unwrap();
            let source = RefusalSource { status: Some(429), ..received.source.clone() };
            assert_eq!(received, Evidence { source, ..evidence }, "{text} must contain the evidence");
        }
    }

    #[test]
    fn unknown_names_and_values_are_refused() {
        let id = key_id(fingerprint());
        for name in [
            String::new(),
            "key".to_owned(),
            format!("account:{id}:locked"),
            format!("key:{id}:unknown"),
            format!("key:{id}:rate_limited:16"),
            format!("key:{id}:rate_limited"),
            "key:0:locked".to_owned(),
        ] {
            assert_eq!(EvidenceName::parse(&name), None, "{name:?} must be refused");
        }
        let name = EvidenceName::new(fingerprint(), true, ClaimedFault::Locked);
        assert_eq!(parse_evidence(&name, REFUTED, UnixMs(0), "r1"), None);
    }
}

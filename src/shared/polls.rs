//! Formats and parses the result of a poll, which is the value of an entry in the map of polls. One replica polls the
//! provider, and all replicas apply its results.

use serde::{Deserialize, Serialize};

use crate::elevenlabs::plan::Capabilities;
use crate::policy::evidence::RefusalSource;
use crate::policy::quota::{Extension, Quota};
use crate::policy::shared_id::SharedId;
use crate::policy::verdict::Verdict;
use crate::pool::Observation;

/// The result of a poll of one key, as all replicas receive it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SharedPoll {
    pub(super) observation: Observation,
    /// The digest of the workspace that the provider reported, or `None` if it has reported none.
    pub(super) workspace: Option<SharedId>,
    /// The host of the key's region, or `None` for the default region.
    pub(super) region: Option<String>,
}

/// A [`SharedPoll`] as JSON.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct PollDocument {
    /// The kind of the observation: [`QUOTA`], [`UNREADABLE`], [`INVALID`] or [`WRONG_HOST`].
    result: String,
    /// The credits that were spent in this period, or 0 if the observation is not a quota.
    count: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    limit: Option<u64>,
    /// The credits that may be spent beyond the limit. `None` if there are none, or an unlimited number.
    #[serde(skip_serializing_if = "Option::is_none")]
    extension: Option<u64>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    has_unlimited_extension: bool,
    /// The time at which the provider resets the count.
    #[serde(skip_serializing_if = "Option::is_none")]
    resets_at_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tier: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    is_paid: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    can_clone: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    voices_left: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    workspace: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    region: Option<String>,
}

const QUOTA: &str = "quota";
const UNREADABLE: &str = "unreadable";
const INVALID: &str = "invalid";
const WRONG_HOST: &str = "wrong_host";

/// Formats the result of a poll. The time of the reset is that of the provider, so it needs no conversion to the clock
/// of Redis.
pub(super) fn format_poll(poll: &SharedPoll) -> String {
    let workspace = poll.workspace.map(|id| id.to_string());
    let region = poll.region.clone();
    let document = match &poll.observation {
        Observation::Quota { quota, tier, is_paid, capabilities } => PollDocument {
            result: QUOTA.to_owned(),
            count: quota.count,
            limit: quota.limit,
            extension: match quota.extension {
                Extension::Credits(credits) => Some(credits),
                Extension::None | Extension::Unlimited => None,
            },
            has_unlimited_extension: quota.extension == Extension::Unlimited,
            resets_at_ms: quota.resets_at.map(|at| at.0),
            tier: tier.clone(),
            is_paid: *is_paid,
            can_clone: capabilities.can_clone,
            voices_left: capabilities.voices_left,
            workspace,
            region,
        },
        Observation::Unreadable => {
            PollDocument { result: UNREADABLE.to_owned(), workspace, region, ..PollDocument::default() }
        }
        Observation::Invalid { verdict, .. } => {
            let result = if *verdict == Verdict::WrongHost { WRONG_HOST } else { INVALID };
            PollDocument { result: result.to_owned(), workspace, region, ..PollDocument::default() }
        }
    };
    // Formatting texts, numbers and booleans as JSON cannot fail.
    serde_json::to_string(&document).unwrap_or_default()
}

/// Parses the result of a poll by `replica`. Returns `None` for a text of an unknown form.
pub(super) fn parse_poll(text: &str, replica: &str) -> Option<SharedPoll> {
    let document: PollDocument = serde_json::from_str(text).ok()?;
    let workspace = document.workspace.as_deref().and_then(SharedId::parse);
    let refusal = |verdict| Observation::Invalid {
        verdict,
        source: RefusalSource {
            message: format!("reported by the replica {replica}").into(),
            ..RefusalSource::default()
        },
    };
    let observation = match document.result.as_str() {
        QUOTA => Observation::Quota {
            quota: Quota {
                count: document.count,
                limit: document.limit,
                extension: match (document.has_unlimited_extension, document.extension) {
                    (true, _) => Extension::Unlimited,
                    (false, Some(credits)) => Extension::Credits(credits),
                    (false, None) => Extension::None,
                },
                resets_at: document.resets_at_ms.map(crate::policy::units::UnixMs),
            },
            tier: document.tier,
            is_paid: document.is_paid,
            capabilities: Capabilities { can_clone: document.can_clone, voices_left: document.voices_left },
        },
        UNREADABLE => Observation::Unreadable,
        INVALID => refusal(Verdict::InvalidKey),
        WRONG_HOST => refusal(Verdict::WrongHost),
        _ => return None,
    };
    Some(SharedPoll { observation, workspace, region: document.region })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::units::UnixMs;

    #[test]
    fn a_poll_is_parsed_as_it_was_formatted() {
        let quota = |extension| Observation::Quota {
            quota: Quota { count: 7, limit: Some(10), extension, resets_at: Some(UnixMs(1_796_000_000_000)) },
            tier: Some("creator".to_owned()),
            is_paid: Some(false),
            capabilities: Capabilities { can_clone: Some(true), voices_left: Some(3) },
        };
        for observation in [
            quota(Extension::None),
            quota(Extension::Credits(0)),
            quota(Extension::Credits(5)),
            quota(Extension::Unlimited),
            Observation::Unreadable,
        ] {
            let poll = SharedPoll {
                observation,
                workspace: SharedId::parse(&"0a".repeat(16)),
                region: Some("api.eu.residency.elevenlabs.io".to_owned()),
            };
            assert_eq!(parse_poll(&format_poll(&poll), "r1"), Some(poll));
        }
        for verdict in [Verdict::InvalidKey, Verdict::WrongHost] {
            let source = RefusalSource { message: "a text".into(), ..RefusalSource::default() };
            let poll = SharedPoll {
                observation: Observation::Invalid { verdict, source },
                workspace: None,
                region: None,
            };
            let text = format_poll(&poll);
            assert!(!text.contains("a text"), "{text} must not contain the message of the provider");
            let Some(SharedPoll { observation: Observation::Invalid { verdict: received, .. }, .. }) =
                parse_poll(&text, "r1")
            else {
                panic!("{text} must be parsed")
            };
            assert_eq!(received, verdict);
        }
    }

    #[test]
    fn texts_of_an_unknown_form_are_refused() {
        for text in ["", "-", "{}", r#"{"result":"other"}"#, r#"{"result":"quota","count":-1}"#] {
            assert_eq!(parse_poll(text, "r1"), None, "{text:?} must be refused");
        }
    }
}

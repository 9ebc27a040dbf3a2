//! A refusal as the database stores it.
//!
//! Restrictions are computed from it, when it is received and again when the program starts, so
//! that improved rules also apply to refusals that an earlier version stored.

use std::sync::Arc;

use super::key::Key;
use super::ownership_index::OwnerId;
use super::record::Refused;
use super::restrictions::Restriction;
use super::roster::Roster;
use crate::elevenlabs::features::RequestFeatures;
use crate::policy::evidence::RefusalSource;
use crate::policy::units::UnixMs;
use crate::policy::verdict::Verdict;
use crate::secret::Fingerprint;

/// A refusal, with all inputs of its restriction besides the settings. It contains no text, identifier or
/// key, only hashes and lengths of these.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefusalRecord {
    /// The fingerprint of the key that was refused.
    pub key: Fingerprint,
    /// The identity of that key's workspace.
    pub workspace: OwnerId,
    /// The plan of that workspace at the time, when it was known.
    pub tier: Option<Arc<str>>,
    /// Whether the restriction applies to other workspaces with the same plan, and not to the key or the
    /// workspace itself.
    pub is_of_plan: bool,
    /// The features of the request.
    pub features: RequestFeatures,
    /// The classification of the response.
    pub verdict: Verdict,
    /// Whether the request was in a concurrency group.
    pub is_in_group: bool,
    /// Whether other accounts have refused the same request with the same message.
    pub is_agreed: bool,
    /// Time of the refusal.
    pub at: UnixMs,
    /// The refusals before it for the same reason; `None` for the first refusal.
    pub earlier: Option<Earlier>,
    /// Route, status and message of the response.
    pub source: Arc<RefusalSource>,
}

/// A summary of the refusals before the last one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Earlier {
    /// Time of the first of them.
    pub since: UnixMs,
    /// Length of the shortest refused text in characters; 0 when they were not about a length.
    pub from_characters: u64,
}

impl RefusalRecord {
    pub(super) fn new(key: &Key, features: &RequestFeatures, refused: &Refused<'_>, at: UnixMs) -> Self {
        let Refused { verdict, request, is_agreed, source } = refused;
        let workspace = key.workspace();
        Self {
            key: key.api_key().fingerprint(),
            workspace: workspace.identity().clone(),
            tier: workspace.tier().map(|tier| tier.as_str().into()),
            is_of_plan: false,
            features: features.clone(),
            verdict: *verdict,
            is_in_group: request.is_some_and(|request| request.group.is_some()),
            is_agreed: *is_agreed,
            at,
            earlier: None,
            source: Arc::new(source.clone()),
        }
    }

    /// Returns the record with the current identity of its workspace, dated `now` at the latest:
    /// the clock may have been set back.
    pub(super) fn restored(mut self, roster: &Roster, now: UnixMs) -> Self {
        self.at = self.at.min(now);
        if let Some(earlier) = &mut self.earlier {
            earlier.since = earlier.since.min(self.at);
        }
        self.workspace = self.workspace_in(roster).unwrap_or(self.workspace);
        self
    }

    /// The identity of its workspace in `roster`; `None` when no key of that workspace is left.
    pub(super) fn workspace_in(&self, roster: &Roster) -> Option<OwnerId> {
        let key = roster.keys().iter().find(|key| key.api_key().fingerprint() == self.key);
        key.map(|key| key.workspace().identity()).or_else(|| roster.identity_of(&self.workspace)).cloned()
    }
}

impl Earlier {
    pub(super) fn of(restriction: &Restriction) -> Self {
        Self { since: restriction.since, from_characters: restriction.limit.from_characters }
    }
}

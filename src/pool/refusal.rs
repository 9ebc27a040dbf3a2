//! A refusal as the database keeps it. Restrictions are computed from it, when it is met and again when
//! the program starts, so that a better rule changes what was stored by an earlier version.

use std::sync::Arc;

use super::key::Key;
use super::learn::Refused;
use super::ownership_index::OwnerId;
use super::restrictions::{Force, Restriction};
use super::roster::Roster;
use crate::policy::classify::Verdict;
use crate::policy::evidence::Source;
use crate::policy::features::RequestFeatures;
use crate::policy::units::UnixMs;
use crate::secret::Fingerprint;

/// A refusal, with all that its restriction is computed from beside the settings. It has no text, no
/// identifier and no key: of these only hashes and lengths.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefusalRecord {
    /// The key that was refused.
    pub key: Fingerprint,
    /// The workspace of that key.
    pub workspace: OwnerId,
    /// The plan of that workspace at the time, when it was known.
    pub tier: Option<Arc<str>>,
    /// Whether the restriction is that of other workspaces with the plan, and not the key's or the
    /// workspace's own.
    pub is_of_plan: bool,
    /// What the request needed.
    pub features: RequestFeatures,
    /// What the refusal means.
    pub verdict: Verdict,
    /// Whether the request was one of a concurrency group.
    pub is_in_group: bool,
    /// Whether other accounts have said the same of the same request.
    pub is_agreed: bool,
    /// When it was refused.
    pub at: UnixMs,
    /// What was refused before it for the same reason; `None` for the first refusal.
    pub earlier: Option<Earlier>,
    /// Where it was met.
    pub source: Arc<Source>,
}

/// What counts of the refusals before the last one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Earlier {
    /// When the first of them came.
    pub since: UnixMs,
    /// The characters of the shortest text that they were about; 0 when they were not about a length.
    pub from_characters: u64,
    /// Whether the last of them was put down to the whole account.
    pub is_noted: bool,
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

    /// The record as it is used from `now` on: a clock that was set back must not make it younger than it
    /// is.
    pub(super) fn restored(mut self, roster: &Roster, now: UnixMs) -> Self {
        self.at = self.at.min(now);
        if let Some(earlier) = &mut self.earlier {
            earlier.since = earlier.since.min(self.at);
        }
        self.workspace = self.workspace_in(roster).unwrap_or(self.workspace);
        self
    }

    /// What its workspace is known by in `roster`; `None` when no key opens that any more.
    pub(super) fn workspace_in(&self, roster: &Roster) -> Option<OwnerId> {
        let key = roster.keys().iter().find(|key| key.api_key().fingerprint() == self.key);
        key.map(|key| key.workspace().identity()).or_else(|| roster.identity_of(&self.workspace)).cloned()
    }
}

impl Earlier {
    pub(super) fn of(restriction: &Restriction) -> Self {
        Self {
            since: restriction.since,
            from_characters: restriction.limit.from_characters,
            is_noted: restriction.force == Force::Noted,
        }
    }
}

//! Computes the restriction that follows from a refusal (which keys are tried last, or later, for a kind of request),
//! and defines the refusal as the database stores it.
//!
//! The restriction is computed when the provider or another replica sends the refusal, and again when Keychoir starts.
//! Changed rules therefore also apply to refusals that an earlier version of Keychoir has stored.

use std::sync::Arc;
use std::time::Duration;

use super::Settings;
use super::key::Key;
use super::ownership_index::OwnerId;
use super::record::RefusedAttempt;
use super::restrictions::{Restriction, RestrictionEffect, RestrictionScope};
use super::roster::Roster;
use crate::elevenlabs::features::{RequestFeatures, RestrictionKind};
use crate::policy::evidence::RefusalSource;
use crate::policy::units::UnixMs;
use crate::policy::verdict::Verdict;
use crate::secret::Fingerprint;

/// A refusal, with all inputs of its restriction except the settings. The key, and the texts and identifiers of the
/// request, are stored only as hashes or lengths.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefusalRecord {
    /// The fingerprint of the key that was refused.
    pub key: Fingerprint,
    /// The identity of the key's workspace.
    pub workspace: OwnerId,
    /// The plan of the workspace at the time of the refusal, if it was known.
    pub tier: Option<Arc<str>>,
    /// Whether the restriction applies to all workspaces with the same plan, instead of the key or its own workspace.
    pub applies_to_plan: bool,
    /// The features of the request.
    pub features: RequestFeatures,
    /// The classification of the response.
    pub verdict: Verdict,
    /// Whether the request was in a concurrency group.
    pub is_in_group: bool,
    /// Whether other accounts have refused the same request with the same message.
    pub is_repeated_elsewhere: bool,
    /// Time of the refusal.
    pub at: UnixMs,
    /// A summary of the earlier refusals for the same reason, or `None` for the first refusal.
    pub history: Option<RefusalHistory>,
    /// Route, status and message of the response.
    pub source: Arc<RefusalSource>,
}

/// A summary of the refusals of a restriction before its last refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RefusalHistory {
    /// Time of the first refusal.
    pub first_refused_at: UnixMs,
    /// Length of the shortest refused text in characters, or 0 if the refusals were not about a length.
    pub from_characters: u64,
}

impl RefusalRecord {
    pub(super) fn new(
        key: &Key,
        features: &RequestFeatures,
        refused: &RefusedAttempt<'_>,
        at: UnixMs,
    ) -> Self {
        let RefusedAttempt { verdict, request, is_repeated_elsewhere, source } = refused;
        let workspace = key.workspace();
        Self {
            key: key.api_key().fingerprint(),
            workspace: workspace.identity().clone(),
            tier: workspace.tier().map(|tier| tier.as_str().into()),
            applies_to_plan: false,
            features: features.clone(),
            verdict: *verdict,
            is_in_group: request.is_some_and(|request| request.group.is_some()),
            is_repeated_elsewhere: *is_repeated_elsewhere,
            at,
            history: None,
            source: Arc::new(source.clone()),
        }
    }

    /// Returns a stored or received record with the current identity of its workspace, and with times that are not
    /// after `now`, because the clock may have been set back.
    pub(super) fn restored(mut self, roster: &Roster, now: UnixMs) -> Self {
        self.at = self.at.min(now);
        if let Some(history) = &mut self.history {
            history.first_refused_at = history.first_refused_at.min(self.at);
        }
        self.workspace = self.workspace_in(roster).unwrap_or(self.workspace);
        self
    }

    /// Returns the identity of the key's workspace in `roster`, or `None` if the roster has no key of that
    /// workspace.
    pub(super) fn workspace_in(&self, roster: &Roster) -> Option<OwnerId> {
        let key = roster.find(self.key);
        key.map(|key| key.workspace().identity()).or_else(|| roster.identity_of(&self.workspace)).cloned()
    }

    /// Computes the restriction that follows from the refusal. Returns `None` if no restriction follows.
    pub(super) fn into_restriction(self, settings: &Settings) -> Option<Restriction> {
        let (limit, kind) = self.features.proven_limit(self.verdict)?;
        let rate_limited_cooldown = |retry_after: Option<Duration>| {
            retry_after.unwrap_or(settings.rate_limited_cooldown).min(settings.max_retry_after)
        };
        let (duration, proven_effect) = match kind {
            RestrictionKind::RateLimit(_) | RestrictionKind::Concurrency if self.is_in_group => return None,
            RestrictionKind::RateLimit(retry_after) | RestrictionKind::Throttle(retry_after) => {
                (rate_limited_cooldown(retry_after), RestrictionEffect::Strict)
            }
            RestrictionKind::Concurrency => (settings.concurrency_cooldown, RestrictionEffect::Strict),
            RestrictionKind::Permission => (settings.permission_cooldown, RestrictionEffect::Refused),
            RestrictionKind::Plan | RestrictionKind::Slots => {
                (settings.feature_cooldown, RestrictionEffect::Refused)
            }
            RestrictionKind::Endpoint => (settings.endpoint_cooldown, RestrictionEffect::Refused),
            RestrictionKind::Unproven => (settings.unproven_cooldown, RestrictionEffect::Refused),
        };
        let effect = if kind == RestrictionKind::Unproven && !self.is_repeated_elsewhere {
            RestrictionEffect::None
        } else if self.is_repeated_elsewhere && matches!(self.verdict, Verdict::Unexplained(_)) {
            RestrictionEffect::Suspected
        } else {
            proven_effect
        };
        let scope = match kind {
            RestrictionKind::Plan if self.applies_to_plan => RestrictionScope::Plan(self.tier.clone()?),
            _ if self.applies_to_plan => return None,
            RestrictionKind::Permission => RestrictionScope::Key(self.key),
            RestrictionKind::Plan
            | RestrictionKind::Slots
            | RestrictionKind::Endpoint
            | RestrictionKind::Unproven
            | RestrictionKind::RateLimit(_)
            | RestrictionKind::Throttle(_)
            | RestrictionKind::Concurrency => RestrictionScope::Workspace(self.workspace.clone()),
        };
        let history = self.history;
        let mut restriction = Restriction {
            sequence_number: 0,
            scope,
            limit,
            verdict: self.verdict.as_str(),
            first_refused_at: self.at,
            refused_at: self.at,
            until: self.at.plus(duration),
            effect,
            record: Arc::new(self),
        };
        if let Some(history) = history {
            restriction.continue_history(history);
        }
        Some(restriction)
    }
}

impl RefusalHistory {
    /// Returns the history that the next refusal for the same reason continues.
    pub(super) fn up_to(restriction: &Restriction) -> Self {
        Self {
            first_refused_at: restriction.first_refused_at,
            from_characters: restriction.limit.from_characters,
        }
    }
}

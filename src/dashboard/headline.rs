//! The answer to the first question of an operator: can requests still be served, and until when?

use std::collections::HashSet;

use super::format::{grouped, span};
use crate::admin::{KeyDocument, OverviewDocument};
use crate::policy::units::UnixMs;

/// The credits of the workspaces whose limits are known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct KnownCredits {
    pub(super) used: u64,
    pub(super) limit: u64,
    pub(super) remaining: u64,
    /// Whether the limits of all workspaces are known.
    pub(super) is_complete: bool,
}

impl KnownCredits {
    /// Adds the credits of all keys. Keys of one named workspace share its credits.
    pub(super) fn new(keys: &[KeyDocument]) -> Self {
        let mut counted = HashSet::new();
        let mut sum = Self { is_complete: true, ..Self::default() };
        for key in keys {
            if key.workspace.as_ref().is_some_and(|workspace| !counted.insert(workspace)) {
                continue;
            }
            match (key.credits_limit, key.credits_remaining) {
                (Some(limit), Some(remaining)) => {
                    sum.used = sum.used.saturating_add(key.credits_used);
                    sum.limit = sum.limit.saturating_add(limit);
                    sum.remaining = sum.remaining.saturating_add(remaining);
                }
                (None, _) | (_, None) => sum.is_complete = false,
            }
        }
        sum
    }
}

/// How urgent a headline is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Urgency {
    Good,
    Warning,
    Bad,
}

impl Urgency {
    pub(super) fn class(self) -> &'static str {
        match self {
            Self::Good => "ok",
            Self::Warning => "warn",
            Self::Bad => "bad",
        }
    }

    pub(super) fn icon(self) -> &'static str {
        match self {
            Self::Good => "●",
            Self::Warning => "▲",
            Self::Bad => "■",
        }
    }
}

/// One sentence about the whole pool, and one about its credits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Headline {
    pub(super) urgency: Urgency,
    pub(super) title: String,
    pub(super) detail: String,
}

impl Headline {
    pub(super) fn new(overview: &OverviewDocument, keys: &[KeyDocument], now: UnixMs) -> Self {
        let counts = &overview.keys;
        let usable = keys.iter().filter(|key| matches!(key.state, "active" | "near_limit")).count();
        let next_reset = earliest(keys.iter().filter_map(|key| key.resets_at.as_deref()), now);
        let end = earliest(keys.iter().filter_map(|key| key.until.as_deref()), now);
        let reset = next_reset.map(|at| format!("The next reset of credits is in {}.", span(at.since(now))));
        let (urgency, title) = if counts.total == 0 {
            (Urgency::Bad, "No: the pool has no keys.".to_owned())
        } else if overview.draining {
            (Urgency::Warning, "Keychoir is shutting down.".to_owned())
        } else if overview.upstream == "unreachable" {
            (Urgency::Bad, "No: ElevenLabs cannot be reached.".to_owned())
        } else if usable == 0 {
            let reason = if counts.paused == counts.total {
                "all keys are paused"
            } else if counts.exhausted == counts.total {
                "all keys are exhausted"
            } else if counts.invalid == counts.total {
                "all keys are invalid"
            } else {
                "no key is active"
            };
            (Urgency::Bad, format!("No: {reason}."))
        } else if usable < counts.total || counts.near_limit > 0 {
            (Urgency::Warning, format!("Yes: {usable} of {} keys can serve requests.", counts.total))
        } else {
            let keys = if usable == 1 { "the key".to_owned() } else { format!("all {usable} keys") };
            (Urgency::Good, format!("Yes: {keys} can serve requests."))
        };
        let credits = KnownCredits::new(keys);
        let detail = match (usable, &overview.credits.exhausted_at) {
            (0, _) => match (end, reset) {
                (Some(end), _) => format!("The first key can be used again in {}.", span(end.since(now))),
                (None, Some(reset)) => reset,
                (None, None) => "See below for the reason of each key.".to_owned(),
            },
            (_, Some(at)) => match UnixMs::parse(at).filter(|at| *at > now) {
                Some(at) => format!(
                    "At the current rate, the credits run out in {}, before their reset.",
                    span(at.since(now))
                ),
                None => "At the current rate, the credits run out now.".to_owned(),
            },
            (_, None) if credits.limit == 0 => "The number of credits is not known yet.".to_owned(),
            (_, None) => match reset {
                Some(reset) => format!(
                    "{} credits are left, and last until their reset at the current rate. {reset}",
                    grouped(credits.remaining)
                ),
                None => format!("{} credits are left.", grouped(credits.remaining)),
            },
        };
        Self { urgency, title, detail }
    }
}

/// Returns the earliest time after `now`.
pub(super) fn earliest<'t>(times: impl Iterator<Item = &'t str>, now: UnixMs) -> Option<UnixMs> {
    times.filter_map(UnixMs::parse).filter(|time| *time > now).min()
}

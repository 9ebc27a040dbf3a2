//! The answer to the first question of an operator: can requests still be served, and until when?

use super::format::{grouped, span};
use crate::admin::{KeyDocument, OverviewDocument};
use crate::policy::units::UnixMs;

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
        let detail = match (usable, &overview.credits.exhausted_at, overview.credits.remaining) {
            (0, ..) => match (end, reset) {
                (Some(end), _) => format!("The first key can be used again in {}.", span(end.since(now))),
                (None, Some(reset)) => reset,
                (None, None) => "See below for the reason of each key.".to_owned(),
            },
            (_, Some(at), _) => match UnixMs::parse(at).filter(|at| *at > now) {
                Some(at) => format!(
                    "At the current rate, the credits run out in {}, before their reset.",
                    span(at.since(now))
                ),
                None => "At the current rate, the credits run out now.".to_owned(),
            },
            (_, None, Some(remaining)) => {
                let lasting = format!("{} credits are left", grouped(remaining));
                match reset {
                    Some(reset) => {
                        format!("{lasting}, and last until their reset at the current rate. {reset}")
                    }
                    None => format!("{lasting}."),
                }
            }
            (_, None, None) => "The number of credits is not known yet.".to_owned(),
        };
        Self { urgency, title, detail }
    }
}

/// Returns the earliest time after `now`.
pub(super) fn earliest<'t>(times: impl Iterator<Item = &'t str>, now: UnixMs) -> Option<UnixMs> {
    times.filter_map(UnixMs::parse).filter(|time| *time > now).min()
}

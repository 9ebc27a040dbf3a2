//! Makes the headline of the overview from the states and credits of the keys: one sentence about whether requests can
//! be served, and one about how long the credits last.

use std::collections::HashSet;

use super::format::{format_duration, format_number};
use crate::admin::{KeyDocument, OverviewDocument};
use crate::policy::units::UnixMs;

/// The sums of the credits of all workspaces with known limits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct KnownCredits {
    pub(super) used: u64,
    pub(super) limit: u64,
    pub(super) remaining: u64,
    /// Whether the limits of all workspaces are known.
    pub(super) is_complete: bool,
}

impl KnownCredits {
    /// Adds up the credits of the workspaces of `keys`. The credits of several keys of one workspace count once.
    pub(super) fn new(keys: &[KeyDocument]) -> Self {
        let mut counted_workspaces = HashSet::new();
        let mut sum = Self { is_complete: true, ..Self::default() };
        for key in keys {
            if key.workspace_id.is_some_and(|workspace| !counted_workspaces.insert(workspace)) {
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

/// The urgency of a headline. It determines the color and the icon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Urgency {
    /// All keys are active, and none is near its limit.
    Good,
    /// Keychoir is shutting down, or requests can be served although a key is not active or is near its limit.
    Warning,
    /// No request can be served, because the pool has no keys, no key is usable, or the provider cannot be reached.
    Bad,
}

impl Urgency {
    /// Returns the CSS class.
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

/// The two sentences at the top of the overview.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Headline {
    pub(super) urgency: Urgency,
    /// The sentence about whether requests can be served.
    pub(super) title: String,
    /// The sentences about the credits. If no key is usable, they are about the time at which a key can be used again,
    /// or refer to the reason of each key.
    pub(super) detail: String,
}

impl Headline {
    pub(super) fn new(overview: &OverviewDocument, keys: &[KeyDocument], now: UnixMs) -> Self {
        let counts = &overview.keys;
        let usable = keys.iter().filter(|key| matches!(key.state, "active" | "near_limit")).count();
        let next_reset = earliest_after(keys.iter().filter_map(|key| key.resets_at.as_deref()), now);
        let next_usable = earliest_after(keys.iter().filter_map(|key| key.until.as_deref()), now);
        let reset = next_reset
            .map(|at| format!("The next reset of credits is in {}.", format_duration(at.since(now))));
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
            (0, _) => match (next_usable, reset) {
                (Some(end), _) => {
                    format!("The first key can be used again in {}.", format_duration(end.since(now)))
                }
                (None, Some(reset)) => reset,
                (None, None) => "See below for the reason of each key.".to_owned(),
            },
            (_, Some(at)) => match UnixMs::parse(at).filter(|at| *at > now) {
                Some(at) => format!(
                    "At the current rate, the credits run out in {}, before their reset.",
                    format_duration(at.since(now))
                ),
                None => "At the current rate, the credits run out now.".to_owned(),
            },
            (_, None) if credits.limit == 0 => "The number of credits is not known yet.".to_owned(),
            (_, None) => match reset {
                Some(reset) => format!(
                    "{} credits are left, and last until their reset at the current rate. {reset}",
                    format_number(credits.remaining)
                ),
                None => format!("{} credits are left.", format_number(credits.remaining)),
            },
        };
        Self { urgency, title, detail }
    }
}

/// Returns the earliest of these RFC 3339 times that is after `now`.
pub(super) fn earliest_after<'t>(times: impl Iterator<Item = &'t str>, now: UnixMs) -> Option<UnixMs> {
    times.filter_map(UnixMs::parse).filter(|time| *time > now).min()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::shared_id::{SharedId, SharedKind};

    const NOW: &str = "2026-11-30T12:00:00Z";
    const IN_3_HOURS: &str = "2026-11-30T15:00:00Z";
    const IN_5_DAYS: &str = "2026-12-05T12:00:00Z";
    const BEFORE: &str = "2026-11-30T11:00:00Z";

    /// Returns a key in the given state that has 600 of 1,000 credits left, with a reset of the credits in five days.
    fn key(state: &'static str) -> KeyDocument {
        KeyDocument {
            state,
            credits_used: 400,
            credits_limit: Some(1_000),
            credits_remaining: Some(600),
            resets_at: Some(IN_5_DAYS.to_owned()),
            ..KeyDocument::default()
        }
    }

    fn overview(keys: &[KeyDocument]) -> OverviewDocument {
        let count = |state: &str| keys.iter().filter(|key| key.state == state).count();
        let mut overview = OverviewDocument { upstream: "reachable", ..OverviewDocument::default() };
        overview.keys.total = keys.len();
        overview.keys.active = count("active") + count("near_limit");
        overview.keys.near_limit = count("near_limit");
        overview.keys.rate_limited = count("rate_limited");
        overview.keys.exhausted = count("exhausted");
        overview.keys.invalid = count("invalid");
        overview.keys.paused = count("paused");
        overview
    }

    /// Asserts the headline of these keys after `change` was applied to the overview.
    #[track_caller]
    fn check_changed_headline(
        change: impl FnOnce(&mut OverviewDocument),
        keys: &[KeyDocument],
        urgency: Urgency,
        title: &str,
        detail: &str,
    ) {
        let mut overview = overview(keys);
        change(&mut overview);
        let headline = Headline::new(&overview, keys, UnixMs::parse(NOW).unwrap());
        assert_eq!((headline.urgency, &*headline.title, &*headline.detail), (urgency, title, detail));
    }

    /// Asserts the headline of these keys.
    #[track_caller]
    fn check_headline(keys: &[KeyDocument], urgency: Urgency, title: &str, detail: &str) {
        check_changed_headline(|_| {}, keys, urgency, title, detail);
    }

    const LASTING: &str = "600 credits are left, and last until their reset at the current rate. \
                           The next reset of credits is in 5 d.";
    const LASTING_OF_TWO: &str = "1,200 credits are left, and last until their reset at the current rate. \
                           The next reset of credits is in 5 d.";
    const RESET: &str = "The next reset of credits is in 5 d.";

    #[test]
    fn active_keys_serve_requests() {
        check_headline(&[key("active")], Urgency::Good, "Yes: the key can serve requests.", LASTING);
        check_headline(
            &[key("active"), key("active")],
            Urgency::Good,
            "Yes: all 2 keys can serve requests.",
            LASTING_OF_TWO,
        );
    }

    #[test]
    fn a_key_that_needs_attention_is_a_warning() {
        let title = "Yes: 2 of 2 keys can serve requests.";
        check_headline(&[key("active"), key("near_limit")], Urgency::Warning, title, LASTING_OF_TWO);
        for state in ["rate_limited", "exhausted", "invalid", "paused"] {
            let title = "Yes: 1 of 2 keys can serve requests.";
            check_headline(&[key("active"), key(state)], Urgency::Warning, title, LASTING_OF_TWO);
        }
    }

    #[test]
    fn without_an_active_key_the_reason_and_the_next_usable_time_are_named() {
        let usable_at = |state, time: &str| KeyDocument { until: Some(time.to_owned()), ..key(state) };
        let first = "The first key can be used again in 3 h.";
        let exhausted = [usable_at("exhausted", IN_5_DAYS), usable_at("exhausted", IN_3_HOURS)];
        check_headline(&exhausted, Urgency::Bad, "No: all keys are exhausted.", first);
        check_headline(&[key("paused"), key("paused")], Urgency::Bad, "No: all keys are paused.", RESET);
        let invalid = KeyDocument { resets_at: None, ..key("invalid") };
        let detail = "See below for the reason of each key.";
        check_headline(&[invalid], Urgency::Bad, "No: all keys are invalid.", detail);
        let mixed = [key("paused"), usable_at("rate_limited", IN_3_HOURS)];
        check_headline(&mixed, Urgency::Bad, "No: no key is active.", first);
        // A time in the past must not appear in the headline.
        check_headline(&[usable_at("rate_limited", BEFORE)], Urgency::Bad, "No: no key is active.", RESET);
    }

    #[test]
    fn an_empty_pool_an_unreachable_provider_and_a_shutdown_have_their_own_titles() {
        let detail = "See below for the reason of each key.";
        check_headline(&[], Urgency::Bad, "No: the pool has no keys.", detail);
        let unreachable = |overview: &mut OverviewDocument| overview.upstream = "unreachable";
        check_changed_headline(
            unreachable,
            &[key("active")],
            Urgency::Bad,
            "No: ElevenLabs cannot be reached.",
            LASTING,
        );
        let draining = |overview: &mut OverviewDocument| overview.draining = true;
        check_changed_headline(
            draining,
            &[key("active")],
            Urgency::Warning,
            "Keychoir is shutting down.",
            LASTING,
        );
    }

    #[test]
    fn the_time_at_which_the_credits_run_out_is_named() {
        let title = "Yes: the key can serve requests.";
        let check_end = |exhausted_at: &str, detail: &str| {
            let change = |overview: &mut OverviewDocument| {
                overview.credits.exhausted_at = Some(exhausted_at.to_owned());
            };
            check_changed_headline(change, &[key("active")], Urgency::Good, title, detail);
        };
        check_end(IN_3_HOURS, "At the current rate, the credits run out in 3 h, before their reset.");
        check_end(NOW, "At the current rate, the credits run out now.");
        check_end(BEFORE, "At the current rate, the credits run out now.");
        let unknown = KeyDocument { credits_limit: None, credits_remaining: None, ..key("active") };
        check_headline(&[unknown], Urgency::Good, title, "The number of credits is not known yet.");
        let without_reset = KeyDocument { resets_at: None, ..key("active") };
        check_headline(&[without_reset], Urgency::Good, title, "600 credits are left.");
    }

    #[test]
    fn the_credits_of_a_workspace_with_several_keys_count_once() {
        let workspace_id = Some(SharedId::new(SharedKind::Workspace, &[b"studio"]));
        let shared = || KeyDocument { workspace_id, ..key("active") };
        let credits = KnownCredits::new(&[shared(), shared(), key("active")]);
        let expected = KnownCredits { used: 800, limit: 2_000, remaining: 1_200, is_complete: true };
        assert_eq!(credits, expected);
        let unknown = KeyDocument { credits_limit: None, ..key("active") };
        let credits = KnownCredits::new(&[key("active"), unknown]);
        assert_eq!((credits.limit, credits.is_complete), (1_000, false));
    }
}

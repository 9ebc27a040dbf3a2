//! Decides whether a request is retried, its response relayed, or the request failed.
//!
//! A retry depends on the progress of the attempt, not on its error: a request that may have been charged
//! is never sent twice.

use std::time::Duration;

use super::select::Unavailable;
use super::verdict::{Concern, Verdict};

/// The progress of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Nothing was written: DNS, connect or TLS failed, or a reused connection returned the request
    /// unsent.
    Unsent,
    /// Some bytes were written, and no complete response head was received. The provider may have done
    /// the work.
    Unanswered,
    /// A complete response head was received, with this classification.
    Answered(Verdict),
}

/// Whether sending a request twice does more than sending it once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// `GET`, `HEAD`, `OPTIONS`: nothing is changed or charged.
    None,
    /// Any other method.
    Some,
}

/// Whether the request's body can be sent again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Replayable {
    /// Everything received so far is buffered.
    Whole,
    /// The body exceeded the replay buffer, or was relayed in part: only this attempt has it.
    Lost,
}

/// Inputs of the decision.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// The progress of this attempt.
    pub progress: Progress,
    /// Whether a resource that was not found here may be in another account that was not tried yet.
    pub may_be_elsewhere: bool,
    /// The effect of the method.
    pub effect: Effect,
    /// Whether the body can be sent again.
    pub body: Replayable,
    /// Whether the time for further attempts is over.
    pub is_late: bool,
    /// Number of attempts, including this one.
    pub attempts: u32,
    /// Maximum number of attempts of a request.
    pub max_attempts: u32,
    /// Retries so far that were not caused by a key: transport errors, overload, failures of the
    /// provider.
    pub blameless_replays: u32,
    /// Workspaces that returned the same ambiguous verdict for this request, including this one.
    pub ambiguous_workspaces: u32,
    /// Workspaces of the same plan that were called abusive for this request, including this one. The
    /// provider also judges the client address, so trying more workspaces makes it worse.
    pub suspected_of_plan: u32,
}

/// The decision after an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// The response is relayed to the client unchanged.
    Relay,
    /// The request is retried with the next key.
    NextKey,
    /// The request is retried after a pause, with the key that is selected then.
    Again {
        /// The minimum pause; the caller adds up to the same time of jitter.
        pause: Duration,
    },
    /// No response can be relayed: the client gets an error of the proxy.
    Fail,
}

/// Maximum number of retries of a request whose cause is not its key. A second one would multiply the
/// load on an overloaded provider.
const BLAMELESS_REPLAYS_MAX: u32 = 1;
/// When two workspaces return the same verdict, the cause is the request itself.
const AMBIGUOUS_WORKSPACES_MAX: u32 = 2;
/// Pause before a retry of a request that an overloaded provider refused.
const BUSY_PAUSE: Duration = Duration::from_millis(250);

/// Decides how a request continues after an attempt.
#[must_use]
pub fn decide(facts: &Facts) -> Decision {
    let may_send = facts.body == Replayable::Whole && !facts.is_late && facts.attempts < facts.max_attempts;
    let may_retry_once = may_send && facts.blameless_replays < BLAMELESS_REPLAYS_MAX;
    let next_key_if = |condition: bool| if condition { Decision::NextKey } else { Decision::Relay };
    let retry_if = |condition: bool, pause: Duration, otherwise: Decision| {
        if condition { Decision::Again { pause } } else { otherwise }
    };
    match facts.progress {
        Progress::Unsent => retry_if(may_retry_once, Duration::ZERO, Decision::Fail),
        // Sending it again could charge two keys for one answer.
        Progress::Unanswered => {
            retry_if(may_retry_once && facts.effect == Effect::None, Duration::ZERO, Decision::Fail)
        }
        // A not-found has no effect and costs nothing; each account is tried once.
        Progress::Answered(Verdict::NotFound) => next_key_if(may_send && facts.may_be_elsewhere),
        Progress::Answered(verdict) => match verdict.concern() {
            Concern::Nothing | Concern::Request => Decision::Relay,
            Concern::Capability if verdict == Verdict::Abuse => {
                next_key_if(may_send && facts.suspected_of_plan < AMBIGUOUS_WORKSPACES_MAX)
            }
            Concern::Key | Concern::Capability => next_key_if(may_send),
            Concern::Unclear => {
                next_key_if(may_send && facts.ambiguous_workspaces < AMBIGUOUS_WORKSPACES_MAX)
            }
            Concern::Refusing => retry_if(may_retry_once, BUSY_PAUSE, Decision::Relay),
            Concern::Failing => {
                retry_if(may_retry_once && facts.effect == Effect::None, BUSY_PAUSE, Decision::Relay)
            }
        },
    }
}

/// The sender of the response to a request for which no key is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LastWord {
    /// The provider's last response, unchanged.
    Theirs,
    /// An error of the proxy about the whole pool.
    Ours,
}

/// Selects the response to a request whose last attempt was classified as `verdict` and for which
/// `unavailable` prevents another attempt. It is an error of the proxy only when both are about the keys,
/// because the provider's response describes an error of the request better.
#[must_use]
pub fn last_word(verdict: Verdict, unavailable: Unavailable) -> LastWord {
    match unavailable {
        Unavailable::Exhausted { .. }
        | Unavailable::Cooling { .. }
        | Unavailable::Full { .. }
        | Unavailable::Invalid
            if verdict.concern() == Concern::Key =>
        {
            LastWord::Ours
        }
        Unavailable::Tried
        | Unavailable::Outdated
        | Unavailable::Exhausted { .. }
        | Unavailable::Cooling { .. }
        | Unavailable::Full { .. }
        | Unavailable::Invalid => LastWord::Theirs,
    }
}

#[cfg(test)]
mod tests {
    use super::super::verdict::{Refusal, Shortfall, Subject};
    use super::*;

    const FRESH: Facts = Facts {
        progress: Progress::Unsent,
        may_be_elsewhere: false,
        effect: Effect::Some,
        body: Replayable::Whole,
        is_late: false,
        attempts: 1,
        max_attempts: 16,
        blameless_replays: 0,
        ambiguous_workspaces: 1,
        suspected_of_plan: 1,
    };
    const AT_ONCE: Decision = Decision::Again { pause: Duration::ZERO };
    const AFTER_A_PAUSE: Decision = Decision::Again { pause: BUSY_PAUSE };

    const KEY_REFUSALS: [Verdict; 7] = [
        Verdict::WrongHost,
        Verdict::WorkspaceQuota(Shortfall { remaining: None, required: None, quota: None }),
        Verdict::KeyQuota(Shortfall { remaining: None, required: None, quota: None }),
        Verdict::InvalidKey,
        Verdict::Billing,
        Verdict::RateLimited(None),
        Verdict::Concurrency { maximum: None },
    ];
    const CAPABILITIES: [Verdict; 4] = [
        Verdict::Abuse,
        Verdict::MissingPermission(None),
        Verdict::PlanFeature(Subject::Voice),
        Verdict::Slots,
    ];
    const AMBIGUOUS: [Verdict; 4] = [
        Verdict::Unexplained(Refusal::Unauthorized),
        Verdict::Unexplained(Refusal::PaymentRequired),
        Verdict::Unexplained(Refusal::Forbidden),
        Verdict::Unexplained(Refusal::TooMany(None)),
    ];

    fn answered(verdict: Verdict) -> Facts {
        Facts { progress: Progress::Answered(verdict), ..FRESH }
    }

    #[track_caller]
    fn check(facts: Facts, expected: Decision) {
        assert_eq!(decide(&facts), expected, "{facts:?}");
    }

    #[test]
    fn an_unsent_request_is_sent_once_more() {
        check(FRESH, AT_ONCE);
        check(Facts { effect: Effect::None, ..FRESH }, AT_ONCE);
        check(Facts { blameless_replays: 1, ..FRESH }, Decision::Fail);
    }

    #[test]
    fn an_unanswered_request_is_sent_again_only_without_effect() {
        let unanswered = Facts { progress: Progress::Unanswered, ..FRESH };
        check(unanswered, Decision::Fail);
        check(Facts { effect: Effect::None, ..unanswered }, AT_ONCE);
        check(Facts { effect: Effect::None, blameless_replays: 1, ..unanswered }, Decision::Fail);
    }

    #[test]
    fn a_refused_key_is_replaced_for_every_method() {
        for verdict in KEY_REFUSALS {
            check(answered(verdict), Decision::NextKey);
            check(Facts { effect: Effect::None, ..answered(verdict) }, Decision::NextKey);
            check(
                Facts { blameless_replays: 9, ambiguous_workspaces: 9, ..answered(verdict) },
                Decision::NextKey,
            );
        }
    }

    #[test]
    fn an_ambiguous_refusal_is_retried_in_one_more_workspace() {
        for verdict in AMBIGUOUS {
            check(answered(verdict), Decision::NextKey);
            check(Facts { ambiguous_workspaces: 2, ..answered(verdict) }, Decision::Relay);
        }
    }

    #[test]
    fn a_request_that_an_account_cannot_serve_is_sent_to_the_next() {
        for verdict in CAPABILITIES {
            check(answered(verdict), Decision::NextKey);
            check(Facts { ambiguous_workspaces: 9, ..answered(verdict) }, Decision::NextKey);
        }
        check(Facts { suspected_of_plan: 2, ..answered(Verdict::Abuse) }, Decision::Relay);
        check(Facts { suspected_of_plan: 2, ..answered(Verdict::Slots) }, Decision::NextKey);
    }

    #[test]
    fn a_request_to_an_overloaded_provider_is_sent_once_more_after_a_pause() {
        check(answered(Verdict::Busy), AFTER_A_PAUSE);
        check(Facts { blameless_replays: 1, ..answered(Verdict::Busy) }, Decision::Relay);
    }

    #[test]
    fn a_failed_request_is_sent_again_only_without_effect() {
        check(answered(Verdict::ServerError), Decision::Relay);
        check(Facts { effect: Effect::None, ..answered(Verdict::ServerError) }, AFTER_A_PAUSE);
        check(
            Facts { effect: Effect::None, blameless_replays: 1, ..answered(Verdict::ServerError) },
            Decision::Relay,
        );
    }

    #[test]
    fn a_response_and_an_error_of_the_request_are_relayed() {
        for verdict in [Verdict::Served, Verdict::NotFound, Verdict::RequestError, Verdict::Unreadable] {
            check(answered(verdict), Decision::Relay);
            check(Facts { effect: Effect::None, ..answered(verdict) }, Decision::Relay);
        }
    }

    #[test]
    fn a_missing_resource_is_looked_up_in_other_accounts() {
        let missing = Facts { may_be_elsewhere: true, ..answered(Verdict::NotFound) };
        check(missing, Decision::NextKey);
        check(Facts { blameless_replays: 9, ambiguous_workspaces: 9, ..missing }, Decision::NextKey);
        check(Facts { body: Replayable::Lost, ..missing }, Decision::Relay);
        check(Facts { attempts: 16, ..missing }, Decision::Relay);
        check(Facts { may_be_elsewhere: true, ..answered(Verdict::RequestError) }, Decision::Relay);
    }

    #[test]
    fn no_request_is_sent_again_without_its_body_too_late_or_too_often() {
        let changes: [fn(Facts) -> Facts; 3] = [
            |facts| Facts { body: Replayable::Lost, ..facts },
            |facts| Facts { is_late: true, ..facts },
            |facts| Facts { attempts: 16, ..facts },
        ];
        for change in changes {
            check(change(FRESH), Decision::Fail);
            check(
                change(Facts { progress: Progress::Unanswered, effect: Effect::None, ..FRESH }),
                Decision::Fail,
            );
            for verdict in KEY_REFUSALS
                .into_iter()
                .chain(AMBIGUOUS)
                .chain(CAPABILITIES)
                .chain([Verdict::Busy, Verdict::ServerError])
            {
                check(change(Facts { effect: Effect::None, ..answered(verdict) }), Decision::Relay);
            }
        }
        check(Facts { attempts: 15, ..answered(Verdict::InvalidKey) }, Decision::NextKey);
    }

    #[test]
    fn an_error_about_the_pool_is_sent_only_when_the_keys_are_the_cause() {
        let empty = Unavailable::Exhausted { resets_at: None, left: None };
        for verdict in KEY_REFUSALS {
            assert_eq!(last_word(verdict, empty), LastWord::Ours);
            assert_eq!(last_word(verdict, Unavailable::Invalid), LastWord::Ours);
            assert_eq!(last_word(verdict, Unavailable::Tried), LastWord::Theirs);
        }
        for verdict in AMBIGUOUS.into_iter().chain(CAPABILITIES).chain([Verdict::Busy, Verdict::ServerError])
        {
            assert_eq!(last_word(verdict, empty), LastWord::Theirs);
        }
    }
}

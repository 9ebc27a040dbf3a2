//! Whether a request is sent again, relayed as answered, or given up. A replay is a question of
//! progress, not of failure: what may have been charged is never sent twice.

use std::time::Duration;

use super::classify::{Concern, Verdict};
use super::select::Unavailable;

/// How far an attempt got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Nothing was written: no name, no connection, no TLS, or handed back by a reused connection.
    Unsent,
    /// Something was written and no complete head came back. The work may have been done.
    Unanswered,
    /// A complete head came back, with this meaning.
    Answered(Verdict),
}

/// Whether sending a request twice does more than sending it once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// `GET`, `HEAD`, `OPTIONS`: nothing is changed or charged.
    None,
    /// Anything else.
    Some,
}

/// Whether the request's body can be sent again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Replayable {
    /// All that has arrived is held.
    Whole,
    /// It grew past its bound, or was relayed in part: only this attempt has it.
    Lost,
}

/// What the decision looks at.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// How far this attempt got.
    pub progress: Progress,
    /// Whether what was not found here may be in another account that was not asked yet.
    pub may_be_elsewhere: bool,
    /// What the method does.
    pub effect: Effect,
    /// Whether the body can be sent again.
    pub body: Replayable,
    /// Whether the span for further attempts is over.
    pub is_late: bool,
    /// Attempts so far, this one included.
    pub attempts: u32,
    /// Attempts that a request may have.
    pub attempts_max: u32,
    /// Replays so far that were not the key's fault: transport, overload, failure.
    pub blameless_replays: u32,
    /// Workspaces that answered this request with the same ambiguous verdict, this one included.
    pub ambiguous_workspaces: u32,
    /// Workspaces of the same plan that were called abusive for this request, this one included: the
    /// provider judges the address as well, so asking more of them makes it worse.
    pub suspected_of_plan: u32,
}

/// What is done next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// The answer goes to the client as it is.
    Relay,
    /// The request goes to the next key.
    NextKey,
    /// The request goes out once more after a pause, with whichever key is first then.
    Again {
        /// How long to wait at the least; the shell adds as much again by chance.
        pause: Duration,
    },
    /// There is no answer to relay: the client gets an error of ours.
    Fail,
}

/// One more try for what is nobody's fault; two would multiply a storm.
const BLAMELESS_REPLAYS_MAX: u32 = 1;
/// Two workspaces that say the same make it the request's own matter.
const AMBIGUOUS_WORKSPACES_MAX: u32 = 2;
/// An overloaded provider gets a breath.
const BUSY_PAUSE: Duration = Duration::from_millis(250);

/// Decides.
#[must_use]
pub fn decide(facts: &Facts) -> Decision {
    let may_send = facts.body == Replayable::Whole && !facts.is_late && facts.attempts < facts.attempts_max;
    let once_more = may_send && facts.blameless_replays < BLAMELESS_REPLAYS_MAX;
    let next_key_if = |is_sensible: bool| if is_sensible { Decision::NextKey } else { Decision::Relay };
    let again_if = |is_sensible: bool, pause: Duration, otherwise: Decision| {
        if is_sensible { Decision::Again { pause } } else { otherwise }
    };
    match facts.progress {
        Progress::Unsent => again_if(once_more, Duration::ZERO, Decision::Fail),
        // Sending it again could charge two keys for one answer.
        Progress::Unanswered => {
            again_if(once_more && facts.effect == Effect::None, Duration::ZERO, Decision::Fail)
        }
        // A not-found did nothing and cost nothing; each account is asked once.
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
            Concern::Refusing => again_if(once_more, BUSY_PAUSE, Decision::Relay),
            Concern::Failing => {
                again_if(once_more && facts.effect == Effect::None, BUSY_PAUSE, Decision::Relay)
            }
        },
    }
}

/// Whose words end a request that no key is left for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LastWord {
    /// The provider's last answer, as it is.
    Theirs,
    /// An answer of ours about the whole pool.
    Ours,
}

/// Whose words end a request, when its last answer was `verdict` and `unavailable` stands in the
/// way of another attempt. Ours only when both are about the keys: what is wrong with the request
/// itself is better told by the provider.
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
    use super::super::classify::{Refusal, Shortfall, Subject};
    use super::*;

    const FRESH: Facts = Facts {
        progress: Progress::Unsent,
        may_be_elsewhere: false,
        effect: Effect::Some,
        body: Replayable::Whole,
        is_late: false,
        attempts: 1,
        attempts_max: 16,
        blameless_replays: 0,
        ambiguous_workspaces: 1,
        suspected_of_plan: 1,
    };
    const AT_ONCE: Decision = Decision::Again { pause: Duration::ZERO };
    const AFTER_A_BREATH: Decision = Decision::Again { pause: BUSY_PAUSE };

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
    fn what_was_not_sent_is_sent_once_more() {
        check(FRESH, AT_ONCE);
        check(Facts { effect: Effect::None, ..FRESH }, AT_ONCE);
        check(Facts { blameless_replays: 1, ..FRESH }, Decision::Fail);
    }

    #[test]
    fn what_was_not_answered_is_sent_again_only_without_effect() {
        let unanswered = Facts { progress: Progress::Unanswered, ..FRESH };
        check(unanswered, Decision::Fail);
        check(Facts { effect: Effect::None, ..unanswered }, AT_ONCE);
        check(Facts { effect: Effect::None, blameless_replays: 1, ..unanswered }, Decision::Fail);
    }

    #[test]
    fn a_refused_key_is_replaced_whatever_the_method() {
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
    fn an_ambiguous_refusal_asks_one_more_workspace() {
        for verdict in AMBIGUOUS {
            check(answered(verdict), Decision::NextKey);
            check(Facts { ambiguous_workspaces: 2, ..answered(verdict) }, Decision::Relay);
        }
    }

    #[test]
    fn what_an_account_cannot_do_is_asked_of_the_next() {
        for verdict in CAPABILITIES {
            check(answered(verdict), Decision::NextKey);
            check(Facts { ambiguous_workspaces: 9, ..answered(verdict) }, Decision::NextKey);
        }
        check(Facts { suspected_of_plan: 2, ..answered(Verdict::Abuse) }, Decision::Relay);
        check(Facts { suspected_of_plan: 2, ..answered(Verdict::Slots) }, Decision::NextKey);
    }

    #[test]
    fn an_overloaded_provider_is_asked_once_more_after_a_breath() {
        check(answered(Verdict::Busy), AFTER_A_BREATH);
        check(Facts { blameless_replays: 1, ..answered(Verdict::Busy) }, Decision::Relay);
    }

    #[test]
    fn a_failure_may_have_done_the_work() {
        check(answered(Verdict::ServerError), Decision::Relay);
        check(Facts { effect: Effect::None, ..answered(Verdict::ServerError) }, AFTER_A_BREATH);
        check(
            Facts { effect: Effect::None, blameless_replays: 1, ..answered(Verdict::ServerError) },
            Decision::Relay,
        );
    }

    #[test]
    fn an_answer_and_the_clients_own_mistake_are_relayed() {
        for verdict in [Verdict::Served, Verdict::NotFound, Verdict::RequestError, Verdict::Unreadable] {
            check(answered(verdict), Decision::Relay);
            check(Facts { effect: Effect::None, ..answered(verdict) }, Decision::Relay);
        }
    }

    #[test]
    fn what_is_not_here_may_be_elsewhere() {
        let missing = Facts { may_be_elsewhere: true, ..answered(Verdict::NotFound) };
        check(missing, Decision::NextKey);
        check(Facts { blameless_replays: 9, ambiguous_workspaces: 9, ..missing }, Decision::NextKey);
        check(Facts { body: Replayable::Lost, ..missing }, Decision::Relay);
        check(Facts { attempts: 16, ..missing }, Decision::Relay);
        check(Facts { may_be_elsewhere: true, ..answered(Verdict::RequestError) }, Decision::Relay);
    }

    #[test]
    fn nothing_is_sent_again_without_its_body_too_late_or_too_often() {
        let ends: [fn(Facts) -> Facts; 3] = [
            |facts| Facts { body: Replayable::Lost, ..facts },
            |facts| Facts { is_late: true, ..facts },
            |facts| Facts { attempts: 16, ..facts },
        ];
        for end in ends {
            check(end(FRESH), Decision::Fail);
            check(
                end(Facts { progress: Progress::Unanswered, effect: Effect::None, ..FRESH }),
                Decision::Fail,
            );
            for verdict in KEY_REFUSALS
                .into_iter()
                .chain(AMBIGUOUS)
                .chain(CAPABILITIES)
                .chain([Verdict::Busy, Verdict::ServerError])
            {
                check(end(Facts { effect: Effect::None, ..answered(verdict) }), Decision::Relay);
            }
        }
        check(Facts { attempts: 15, ..answered(Verdict::InvalidKey) }, Decision::NextKey);
    }

    #[test]
    fn the_pool_speaks_of_itself_only_when_the_keys_are_the_matter() {
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

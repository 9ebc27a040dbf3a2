//! Decides after each attempt whether the request is retried, its response relayed, or an error returned. When no key
//! is left for another attempt, decides between the last response and an error of Keychoir.
//!
//! The decision depends on the progress of the attempt, not on the kind of error, so that a request that may have been
//! charged is never sent twice.

use std::time::Duration;

use super::select::Unavailable;
use super::verdict::{Concern, Verdict};

/// The progress of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// No byte was written: DNS, connect or TLS failed, or a reused connection returned the request unsent.
    Unsent,
    /// No byte was written, because the forward proxy refused Keychoir's credentials. It would also refuse them for
    /// other keys and in a retry, until an operator corrects them.
    ProxyAuthenticationFailed,
    /// Some bytes were written and no complete response head was received. The provider may have processed
    /// the request.
    NoResponse,
    /// A complete response head was received and classified.
    Responded(Verdict),
}

impl Progress {
    /// Whether the provider may have received a part of the request.
    #[must_use]
    pub fn is_sent(self) -> bool {
        match self {
            Self::Unsent | Self::ProxyAuthenticationFailed => false,
            Self::NoResponse | Self::Responded(_) => true,
        }
    }
}

/// Whether the method of a request has a side effect that sending it twice would repeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// `GET`, `HEAD` or `OPTIONS`, which change and cost nothing.
    None,
    /// Any other method.
    Some,
}

/// Whether the request's body can be sent again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplayableBody {
    /// All bytes of the body that have arrived are buffered. The rest may still arrive.
    Buffered,
    /// The body exceeded the replay buffer, or was sent without being buffered.
    Unavailable,
}

/// The facts about an attempt and its request on which the decision depends.
#[derive(Clone, Copy, Debug)]
pub struct AttemptFacts {
    /// The progress of this attempt.
    pub progress: Progress,
    /// Whether the request may use a key with another route, which no attempt has used: another forward proxy, or
    /// another host of the provider.
    pub has_other_route: bool,
    /// Whether a resource that was not found may be in an account that this request has not tried.
    pub may_be_elsewhere: bool,
    /// Whether sending the request twice would repeat a side effect.
    pub effect: Effect,
    /// Whether the body can be sent again.
    pub body: ReplayableBody,
    /// Whether the retry timeout has passed.
    pub is_past_deadline: bool,
    /// Number of attempts, including the latest attempt.
    pub attempts: u32,
    /// Maximum number of attempts of a request.
    pub max_attempts: u32,
    /// Number of retries whose cause was not the key: transport errors, overload, failures of the provider.
    pub non_key_retries: u32,
    /// Number of workspaces that returned the same ambiguous verdict (a refusal without a known reason) for this
    /// request, including the workspace of the latest attempt.
    pub ambiguous_workspaces: u32,
    /// Number of workspaces of the same plan that were suspected of abuse for this request, including the workspace of
    /// the latest attempt. The provider also rates the client address, so more attempts would increase the suspicion.
    pub abuse_suspicions: u32,
}

/// The decision after an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Relay the response to the client.
    Relay,
    /// Retry with the next key.
    NextKey,
    /// Retry after a pause, with the key that is selected then.
    RetryAfter {
        /// The minimum pause. The caller adds jitter of up to the same duration.
        pause: Duration,
    },
    /// Return an error of Keychoir, because no response was received.
    Fail,
}

/// Maximum number of retries per request whose cause is not the key. More retries would multiply the load on an
/// overloaded provider.
const MAX_NON_KEY_RETRIES: u32 = 1;
/// Number of workspaces after which a request is not retried, if all of them returned the same ambiguous verdict or
/// suspected abuse. The cause is then probably the request.
const MAX_AMBIGUOUS_WORKSPACES: u32 = 2;
/// Pause before a retry if the provider is overloaded.
const OVERLOAD_PAUSE: Duration = Duration::from_millis(250);

/// Decides how a request continues after an attempt.
#[must_use]
pub fn decide(attempt: &AttemptFacts) -> Decision {
    let may_retry = attempt.body == ReplayableBody::Buffered
        && !attempt.is_past_deadline
        && attempt.attempts < attempt.max_attempts;
    let may_retry_non_key_failure = may_retry && attempt.non_key_retries < MAX_NON_KEY_RETRIES;
    let next_key_if = |condition: bool| if condition { Decision::NextKey } else { Decision::Relay };
    let retry_if = |condition: bool, pause: Duration, otherwise: Decision| {
        if condition { Decision::RetryAfter { pause } } else { otherwise }
    };
    match attempt.progress {
        // A failure to connect concerns only the keys with this route.
        Progress::Unsent | Progress::ProxyAuthenticationFailed if may_retry && attempt.has_other_route => {
            Decision::NextKey
        }
        Progress::Unsent => retry_if(may_retry_non_key_failure, Duration::ZERO, Decision::Fail),
        Progress::ProxyAuthenticationFailed => Decision::Fail,
        // A second attempt could charge two keys for one response.
        Progress::NoResponse => retry_if(
            may_retry_non_key_failure && attempt.effect == Effect::None,
            Duration::ZERO,
            Decision::Fail,
        ),
        // A 404 response has no side effect and costs no credits, so each account is tried once.
        Progress::Responded(Verdict::NotFound) => next_key_if(may_retry && attempt.may_be_elsewhere),
        Progress::Responded(verdict) => match verdict.concern() {
            Concern::Nothing | Concern::Request => Decision::Relay,
            Concern::Capability if verdict == Verdict::Abuse => {
                next_key_if(may_retry && attempt.abuse_suspicions < MAX_AMBIGUOUS_WORKSPACES)
            }
            Concern::Key | Concern::Capability => next_key_if(may_retry),
            Concern::Unclear => {
                next_key_if(may_retry && attempt.ambiguous_workspaces < MAX_AMBIGUOUS_WORKSPACES)
            }
            Concern::Overload => retry_if(may_retry_non_key_failure, OVERLOAD_PAUSE, Decision::Relay),
            Concern::Failure => retry_if(
                may_retry_non_key_failure && attempt.effect == Effect::None,
                OVERLOAD_PAUSE,
                Decision::Relay,
            ),
        },
    }
}

/// The source of the response that the client receives if no further key can serve its request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResponseSource {
    /// The last response of the provider.
    Upstream,
    /// An error of Keychoir about the pool.
    Proxy,
}

/// Chooses the response to a request whose last attempt got `verdict` and whose next attempt is prevented by
/// `unavailable`. Keychoir returns its own error only if both are about the keys, because the provider's response
/// describes an error of the request better.
#[must_use]
pub fn choose_response_source(verdict: Verdict, unavailable: Unavailable) -> ResponseSource {
    match unavailable {
        Unavailable::Exhausted { .. }
        | Unavailable::Cooling { .. }
        | Unavailable::Full { .. }
        | Unavailable::Invalid
        | Unavailable::Paused { .. }
            if verdict.concern() == Concern::Key =>
        {
            ResponseSource::Proxy
        }
        Unavailable::Tried
        | Unavailable::Outdated
        | Unavailable::Exhausted { .. }
        | Unavailable::Cooling { .. }
        | Unavailable::Full { .. }
        | Unavailable::Invalid
        | Unavailable::Paused { .. } => ResponseSource::Upstream,
    }
}

#[cfg(test)]
mod tests {
    use super::super::verdict::{Shortfall, Subject, UnexplainedRefusal};
    use super::*;

    const FIRST_ATTEMPT: AttemptFacts = AttemptFacts {
        progress: Progress::Unsent,
        has_other_route: false,
        may_be_elsewhere: false,
        effect: Effect::Some,
        body: ReplayableBody::Buffered,
        is_past_deadline: false,
        attempts: 1,
        max_attempts: 16,
        non_key_retries: 0,
        ambiguous_workspaces: 1,
        abuse_suspicions: 1,
    };
    const IMMEDIATE_RETRY: Decision = Decision::RetryAfter { pause: Duration::ZERO };
    const RETRY_AFTER_PAUSE: Decision = Decision::RetryAfter { pause: OVERLOAD_PAUSE };

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
        Verdict::Unexplained(UnexplainedRefusal::Unauthorized),
        Verdict::Unexplained(UnexplainedRefusal::PaymentRequired),
        Verdict::Unexplained(UnexplainedRefusal::Forbidden),
        Verdict::Unexplained(UnexplainedRefusal::TooMany(None)),
    ];

    fn responded_attempt(verdict: Verdict) -> AttemptFacts {
        AttemptFacts { progress: Progress::Responded(verdict), ..FIRST_ATTEMPT }
    }

    #[track_caller]
    fn check_decision(facts: AttemptFacts, expected: Decision) {
        assert_eq!(decide(&facts), expected, "the decision must follow from the facts: {facts:?}");
    }

    #[test]
    fn an_unsent_request_is_retried_once() {
        check_decision(FIRST_ATTEMPT, IMMEDIATE_RETRY);
        check_decision(AttemptFacts { effect: Effect::None, ..FIRST_ATTEMPT }, IMMEDIATE_RETRY);
        check_decision(AttemptFacts { non_key_retries: 1, ..FIRST_ATTEMPT }, Decision::Fail);
    }

    #[test]
    fn no_key_is_tried_again_at_a_forward_proxy_that_refuses_the_credentials() {
        let refused = AttemptFacts { progress: Progress::ProxyAuthenticationFailed, ..FIRST_ATTEMPT };
        check_decision(refused, Decision::Fail);
        check_decision(AttemptFacts { effect: Effect::None, ..refused }, Decision::Fail);
        assert!(!Progress::ProxyAuthenticationFailed.is_sent() && !Progress::Unsent.is_sent());
        assert!(Progress::NoResponse.is_sent());
    }

    #[test]
    fn a_key_with_another_route_is_tried_after_a_failure_to_connect() {
        for progress in [Progress::Unsent, Progress::ProxyAuthenticationFailed] {
            let failed = AttemptFacts { progress, has_other_route: true, ..FIRST_ATTEMPT };
            check_decision(failed, Decision::NextKey);
            check_decision(AttemptFacts { non_key_retries: 9, ..failed }, Decision::NextKey);
            check_decision(AttemptFacts { attempts: 16, ..failed }, Decision::Fail);
            check_decision(AttemptFacts { body: ReplayableBody::Unavailable, ..failed }, Decision::Fail);
            check_decision(AttemptFacts { is_past_deadline: true, ..failed }, Decision::Fail);
        }
        check_decision(
            AttemptFacts { progress: Progress::NoResponse, has_other_route: true, ..FIRST_ATTEMPT },
            Decision::Fail,
        );
    }

    #[test]
    fn a_request_without_a_response_is_retried_only_if_it_has_no_effect() {
        let no_response = AttemptFacts { progress: Progress::NoResponse, ..FIRST_ATTEMPT };
        check_decision(no_response, Decision::Fail);
        check_decision(AttemptFacts { effect: Effect::None, ..no_response }, IMMEDIATE_RETRY);
        check_decision(
            AttemptFacts { effect: Effect::None, non_key_retries: 1, ..no_response },
            Decision::Fail,
        );
    }

    #[test]
    fn a_refused_key_is_replaced_for_every_method() {
        for verdict in KEY_REFUSALS {
            check_decision(responded_attempt(verdict), Decision::NextKey);
            check_decision(
                AttemptFacts { effect: Effect::None, ..responded_attempt(verdict) },
                Decision::NextKey,
            );
            check_decision(
                AttemptFacts { non_key_retries: 9, ambiguous_workspaces: 9, ..responded_attempt(verdict) },
                Decision::NextKey,
            );
        }
    }

    #[test]
    fn an_ambiguous_refusal_is_retried_in_one_more_workspace() {
        for verdict in AMBIGUOUS {
            check_decision(responded_attempt(verdict), Decision::NextKey);
            check_decision(
                AttemptFacts { ambiguous_workspaces: 2, ..responded_attempt(verdict) },
                Decision::Relay,
            );
        }
    }

    #[test]
    fn a_request_that_an_account_cannot_serve_is_retried_with_the_next_key() {
        for verdict in CAPABILITIES {
            check_decision(responded_attempt(verdict), Decision::NextKey);
            check_decision(
                AttemptFacts { ambiguous_workspaces: 9, ..responded_attempt(verdict) },
                Decision::NextKey,
            );
        }
        check_decision(
            AttemptFacts { abuse_suspicions: 2, ..responded_attempt(Verdict::Abuse) },
            Decision::Relay,
        );
        check_decision(
            AttemptFacts { abuse_suspicions: 2, ..responded_attempt(Verdict::Slots) },
            Decision::NextKey,
        );
    }

    #[test]
    fn a_request_to_an_overloaded_provider_is_retried_once_after_a_pause() {
        check_decision(responded_attempt(Verdict::Busy), RETRY_AFTER_PAUSE);
        check_decision(
            AttemptFacts { non_key_retries: 1, ..responded_attempt(Verdict::Busy) },
            Decision::Relay,
        );
    }

    #[test]
    fn a_failed_request_is_retried_only_if_it_has_no_effect() {
        check_decision(responded_attempt(Verdict::ServerError), Decision::Relay);
        check_decision(
            AttemptFacts { effect: Effect::None, ..responded_attempt(Verdict::ServerError) },
            RETRY_AFTER_PAUSE,
        );
        check_decision(
            AttemptFacts {
                effect: Effect::None,
                non_key_retries: 1,
                ..responded_attempt(Verdict::ServerError)
            },
            Decision::Relay,
        );
    }

    #[test]
    fn a_response_and_an_error_of_the_request_are_relayed() {
        for verdict in [Verdict::Served, Verdict::NotFound, Verdict::RequestError, Verdict::Unreadable] {
            check_decision(responded_attempt(verdict), Decision::Relay);
            check_decision(
                AttemptFacts { effect: Effect::None, ..responded_attempt(verdict) },
                Decision::Relay,
            );
        }
    }

    #[test]
    fn a_missing_resource_is_looked_up_in_other_accounts() {
        let not_found = AttemptFacts { may_be_elsewhere: true, ..responded_attempt(Verdict::NotFound) };
        check_decision(not_found, Decision::NextKey);
        check_decision(
            AttemptFacts { non_key_retries: 9, ambiguous_workspaces: 9, ..not_found },
            Decision::NextKey,
        );
        check_decision(AttemptFacts { body: ReplayableBody::Unavailable, ..not_found }, Decision::Relay);
        check_decision(AttemptFacts { attempts: 16, ..not_found }, Decision::Relay);
        check_decision(
            AttemptFacts { may_be_elsewhere: true, ..responded_attempt(Verdict::RequestError) },
            Decision::Relay,
        );
    }

    #[test]
    fn the_body_the_timeout_and_the_attempts_limit_every_retry() {
        let changes: [fn(AttemptFacts) -> AttemptFacts; 3] = [
            |facts| AttemptFacts { body: ReplayableBody::Unavailable, ..facts },
            |facts| AttemptFacts { is_past_deadline: true, ..facts },
            |facts| AttemptFacts { attempts: 16, ..facts },
        ];
        for change in changes {
            check_decision(change(FIRST_ATTEMPT), Decision::Fail);
            check_decision(
                change(AttemptFacts {
                    progress: Progress::NoResponse,
                    effect: Effect::None,
                    ..FIRST_ATTEMPT
                }),
                Decision::Fail,
            );
            for verdict in KEY_REFUSALS
                .into_iter()
                .chain(AMBIGUOUS)
                .chain(CAPABILITIES)
                .chain([Verdict::Busy, Verdict::ServerError])
            {
                check_decision(
                    change(AttemptFacts { effect: Effect::None, ..responded_attempt(verdict) }),
                    Decision::Relay,
                );
            }
        }
        check_decision(
            AttemptFacts { attempts: 15, ..responded_attempt(Verdict::InvalidKey) },
            Decision::NextKey,
        );
    }

    #[test]
    fn an_error_about_the_pool_is_sent_only_when_the_keys_are_the_cause() {
        let exhausted = Unavailable::Exhausted { resets_at: None, left: None };
        for verdict in KEY_REFUSALS {
            assert_eq!(choose_response_source(verdict, exhausted), ResponseSource::Proxy);
            assert_eq!(choose_response_source(verdict, Unavailable::Invalid), ResponseSource::Proxy);
            assert_eq!(choose_response_source(verdict, Unavailable::Tried), ResponseSource::Upstream);
        }
        for verdict in AMBIGUOUS.into_iter().chain(CAPABILITIES).chain([Verdict::Busy, Verdict::ServerError])
        {
            assert_eq!(choose_response_source(verdict, exhausted), ResponseSource::Upstream);
        }
    }
}

//! Tests the effect of each kind of evidence, its end, the polls and served requests that refute it, when a poll is
//! requested, and the scale of the remaining credits.

use super::*;

const AT: UnixMs = UnixMs(1_000_000);
const RESET: UnixMs = UnixMs(9_000_000_000);
const COOLDOWNS: Cooldowns = Cooldowns {
    unproven: Duration::from_secs(60),
    rate_limited: Duration::from_secs(60),
    max_retry_after: Duration::from_secs(300),
    exhausted: Duration::from_secs(3_600),
    billing: Duration::from_secs(1_800),
    invalid_confirm: Duration::from_secs(45),
    invalid: Duration::from_secs(86_400),
    quota_lag: Duration::from_secs(120),
};

fn evidence(claim: ClaimedFault) -> Evidence {
    Evidence {
        claim,
        at: AT,
        retry_after: None,
        is_repeated_elsewhere: false,
        source: RefusalSource::default(),
    }
}

fn credits(reported: Option<(u64, u64)>) -> Evidence {
    evidence(ClaimedFault::credits(
        Shortfall {
            remaining: reported.map(|(remaining, _)| remaining),
            required: reported.map(|(_, required)| required),
            ..Shortfall::default()
        },
        None,
    ))
}

/// Returns the time that is `seconds` after the evidence.
fn after(seconds: u64) -> UnixMs {
    AT.plus(Duration::from_secs(seconds))
}

fn poll(seconds: u64, result: PollResult) -> Option<Poll> {
    Some(Poll { at: after(seconds), result })
}

fn remaining(credits: u64) -> PollResult {
    PollResult::Quota { spendable: Some(credits), is_paid: None }
}

fn cooldown(reason: CooldownReason, until: UnixMs, may_probe: bool) -> EvidenceEffect {
    EvidenceEffect::Cooldown { cooldown: Cooldown { reason, until }, may_probe }
}

/// A row of the table in `docs/refusals.md`.
struct TableRow {
    name: &'static str,
    evidence: Evidence,
    last_poll: Option<Poll>,
    /// The effect one second after the refusal.
    effect: EvidenceEffect,
}

#[test]
fn evidence_has_the_effect_of_its_table_row() {
    let exhausted = |until, may_probe| cooldown(CooldownReason::Exhausted, until, may_probe);
    let invalid = |until, may_probe| cooldown(CooldownReason::Invalid, until, may_probe);
    let limited = Evidence {
        retry_after: Some(Duration::from_secs(86_400)),
        ..evidence(ClaimedFault::RateLimited(ConcurrencyGroup::SPEECH))
    };
    let group = |seconds, may_probe| EvidenceEffect::GroupCooldown {
        group: ConcurrencyGroup::SPEECH,
        until: after(seconds),
        may_probe,
    };
    let repeated = Evidence { is_repeated_elsewhere: true, ..limited.clone() };
    let unpaid = PollResult::Quota { spendable: None, is_paid: Some(false) };
    let paid = PollResult::Quota { spendable: None, is_paid: Some(true) };
    let row = |name, evidence, last_poll, effect| TableRow { name, evidence, last_poll, effect };
    let rows = [
        row("no remaining credits, with numbers", credits(Some((0, 43))), None, exhausted(RESET, false)),
        row(
            "no remaining credits, with numbers, and a poll that may lag",
            credits(Some((0, 43))),
            poll(1, remaining(500)),
            exhausted(RESET, false),
        ),
        row(
            "too few remaining credits for the request",
            credits(Some((8_950, 9_500))),
            None,
            EvidenceEffect::CostLimit { max_cost: 8_950, until: RESET },
        ),
        row(
            "numbers that contradict the refusal",
            credits(Some((20_000, 400))),
            None,
            exhausted(after(60), true),
        ),
        row("no remaining credits, with a message only", credits(None), None, exhausted(after(60), true)),
        row(
            "no remaining credits, with a message only, and a poll with credits",
            credits(None),
            poll(1, remaining(500)),
            EvidenceEffect::Nothing,
        ),
        row(
            "no remaining credits, with a message only, and a poll without credits",
            credits(None),
            poll(1, remaining(0)),
            exhausted(after(60), true),
        ),
        row(
            "no remaining credits, with a message only, and a poll without a limit",
            credits(None),
            poll(1, PollResult::Quota { spendable: None, is_paid: Some(true) }),
            EvidenceEffect::Nothing,
        ),
        row(
            "no remaining credits, with a message only, and a key that may not read its quota",
            credits(None),
            poll(1, PollResult::Unreadable),
            exhausted(after(60), true),
        ),
        row(
            "a rate limit",
            evidence(ClaimedFault::RateLimited(ConcurrencyGroup::SPEECH)),
            None,
            group(60, true),
        ),
        row("a rate limit with a Retry-After of a day", limited, None, group(300, false)),
        row(
            "a rate limit that another account reports with the same message",
            repeated,
            None,
            group(300, true),
        ),
        row(
            "a locked account",
            evidence(ClaimedFault::Locked),
            None,
            cooldown(CooldownReason::Billing, after(60), true),
        ),
        row(
            "a locked account with an unpaid bill",
            evidence(ClaimedFault::Locked),
            poll(1, unpaid),
            cooldown(CooldownReason::Billing, after(1_800), false),
        ),
        row(
            "a locked account with a paid bill",
            evidence(ClaimedFault::Locked),
            poll(1, paid),
            EvidenceEffect::Nothing,
        ),
        row(
            "a suspected account with a paid bill",
            evidence(ClaimedFault::Suspected),
            poll(1, paid),
            cooldown(CooldownReason::Billing, after(1_800), true),
        ),
        row("an invalid key", evidence(ClaimedFault::InvalidKey), None, invalid(after(45), true)),
        row(
            "an invalid key that a poll confirms",
            evidence(ClaimedFault::InvalidKey),
            poll(1, PollResult::Invalid),
            invalid(after(86_401), false),
        ),
        row(
            "an invalid key that a poll accepts",
            evidence(ClaimedFault::InvalidKey),
            poll(1, PollResult::Unreadable),
            EvidenceEffect::Nothing,
        ),
        row(
            "a key of another region",
            evidence(ClaimedFault::WrongHost),
            None,
            cooldown(CooldownReason::WrongHost, after(45), true),
        ),
        row(
            "a key of another region that a poll accepts",
            evidence(ClaimedFault::WrongHost),
            poll(1, remaining(5)),
            EvidenceEffect::Nothing,
        ),
    ];
    for TableRow { name, evidence, last_poll, effect } in rows {
        let evaluated = evaluate(&evidence, last_poll, Some(RESET), &COOLDOWNS, after(1));
        assert_eq!(evaluated, effect, "the effect must be as in the table for this case: {name}");
    }
}

#[test]
fn a_poll_overrides_the_credits_of_a_refusal_after_the_lag() {
    let effect_after = |evidence: &Evidence, seconds, credits| {
        evaluate(evidence, poll(seconds, remaining(credits)), Some(RESET), &COOLDOWNS, after(seconds))
    };
    assert_ne!(effect_after(&credits(Some((0, 43))), 119, 500), EvidenceEffect::Nothing);
    assert_eq!(effect_after(&credits(Some((0, 43))), 120, 500), EvidenceEffect::Nothing);
    assert_ne!(effect_after(&credits(Some((0, 43))), 120, 0), EvidenceEffect::Nothing);
    assert_eq!(
        effect_after(&credits(Some((5, 43))), 120, 5),
        EvidenceEffect::Nothing,
        "a poll after the lag must replace the reported credits"
    );
}

#[test]
fn every_cooldown_ends() {
    for (claim, seconds) in [
        (credits(None).claim, 60),
        (ClaimedFault::RateLimited(ConcurrencyGroup::SPEECH), 60),
        (ClaimedFault::Locked, 60),
        (ClaimedFault::Suspected, 1_800),
        (ClaimedFault::InvalidKey, 45),
        (ClaimedFault::WrongHost, 45),
    ] {
        let effect_after = |seconds| evaluate(&evidence(claim), None, None, &COOLDOWNS, after(seconds));
        assert_ne!(effect_after(seconds - 1), EvidenceEffect::Nothing, "{claim:?} must last {seconds} s");
        assert_eq!(effect_after(seconds), EvidenceEffect::Nothing, "{claim:?} must end after {seconds} s");
    }
    // Without a reset date, the cooldown of an exhausted account ends as configured.
    let exhausted = |seconds| evaluate(&credits(Some((0, 1))), None, None, &COOLDOWNS, after(seconds));
    assert_ne!(exhausted(3_599), EvidenceEffect::Nothing);
    assert_eq!(exhausted(3_600), EvidenceEffect::Nothing);
    let with_reset_date = |now| evaluate(&credits(Some((0, 1))), None, Some(RESET), &COOLDOWNS, now);
    assert_ne!(with_reset_date(UnixMs(RESET.0 - 1)), EvidenceEffect::Nothing);
    assert_eq!(with_reset_date(RESET), EvidenceEffect::Nothing);
}

#[test]
fn remaining_credits_are_scaled_to_the_cost_estimate() {
    let claim = |estimate| {
        ClaimedFault::credits(
            Shortfall { remaining: Some(5), required: Some(10), ..Shortfall::default() },
            estimate,
        )
    };
    for (estimate, scaled_remaining) in [(Some(20), 10), (Some(10), 5), (None, 5), (Some(0), 5)] {
        assert_eq!(claim(estimate), ClaimedFault::Credits { reported: Some((5, 10)), scaled_remaining });
    }
}

#[test]
fn a_poll_is_requested_only_if_it_can_confirm_or_refute_evidence() {
    let decisive_at = |evidence: &Evidence, poll| decisive_poll_at(evidence, poll, &COOLDOWNS);
    assert_eq!(decisive_at(&credits(None), None), Some(AT));
    assert_eq!(decisive_at(&credits(None), poll(1, remaining(0))), None);
    assert_eq!(decisive_at(&credits(Some((0, 1))), None), Some(after(120)));
    assert_eq!(decisive_at(&credits(Some((0, 1))), poll(1, remaining(7))), Some(after(120)));
    assert_eq!(decisive_at(&credits(Some((0, 1))), poll(120, remaining(7))), None);
    assert_eq!(
        decisive_at(&evidence(ClaimedFault::InvalidKey), poll(0, remaining(7))),
        Some(AT),
        "a poll at the time of the refusal must not count"
    );
    assert_eq!(decisive_at(&evidence(ClaimedFault::RateLimited(ConcurrencyGroup::SPEECH)), None), None);
}

#[test]
fn a_served_request_refutes_evidence_in_its_scope() {
    let is_refuted = |evidence: &Evidence, seconds: u64, is_charged, group| {
        is_refuted_by_service(evidence, UnixMs(AT.0 - 1_000 + seconds * 1_000), is_charged, group)
    };
    let speech = Some(ConcurrencyGroup::SPEECH);
    assert!(is_refuted(&credits(None), 1, true, speech));
    assert!(!is_refuted(&credits(None), 0, true, speech), "an earlier request must not refute the refusal");
    assert!(!is_refuted(&credits(None), 1, false, None), "a free request must not refute the refusal");
    assert!(
        !is_refuted(&credits(Some((5, 43))), 1, true, speech),
        "a request that may have been cheaper must not refute the refusal"
    );
    assert!(is_refuted(&credits(Some((0, 43))), 1, true, speech));
    let limited = evidence(ClaimedFault::RateLimited(ConcurrencyGroup::SPEECH));
    assert!(
        is_refuted(&limited, 1, true, speech)
            && !is_refuted(&limited, 1, true, Some(ConcurrencyGroup::MUSIC))
    );
    assert!(is_refuted(&evidence(ClaimedFault::InvalidKey), 0, false, None));
}

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
    Evidence { claim, at: AT, named_span: None, is_agreed: false, source: RefusalSource::default() }
}

fn credits(figures: Option<(u64, u64)>) -> Evidence {
    evidence(ClaimedFault::credits(
        Shortfall {
            remaining: figures.map(|(left, _)| left),
            required: figures.map(|(_, need)| need),
            ..Shortfall::default()
        },
        None,
    ))
}

fn after(seconds: u64) -> UnixMs {
    AT.plus(Duration::from_secs(seconds))
}

fn poll(seconds: u64, result: PollResult) -> Option<Poll> {
    Some(Poll { at: after(seconds), result })
}

fn left(credits: u64) -> PollResult {
    PollResult::Figures { left: Some(credits), is_paid: None }
}

fn cooldown(reason: CooldownReason, until: UnixMs, is_probable: bool) -> Meaning {
    Meaning::Cooldown { cooldown: Cooldown { reason, until }, is_probable }
}

/// The table of `docs/refusals.md`, row by row: evidence, the last poll, and the meaning one second
/// later.
#[test]
fn evidence_has_the_meaning_of_its_table_row() {
    let exhausted = |until, is_probable| cooldown(CooldownReason::Exhausted, until, is_probable);
    let invalid = |until, is_probable| cooldown(CooldownReason::Invalid, until, is_probable);
    let limited = Evidence {
        named_span: Some(Duration::from_secs(86_400)),
        ..evidence(ClaimedFault::RateLimited(ConcurrencyGroup::SPEECH))
    };
    let group = |seconds, is_probable| Meaning::GroupCooldown {
        group: ConcurrencyGroup::SPEECH,
        until: after(seconds),
        is_probable,
    };
    let agreed = Evidence { is_agreed: true, ..limited.clone() };
    let unpaid = PollResult::Figures { left: None, is_paid: Some(false) };
    let paid = PollResult::Figures { left: None, is_paid: Some(true) };
    let rows: Vec<(&str, Evidence, Option<Poll>, Meaning)> = vec![
        ("spent, by figures", credits(Some((0, 43))), None, exhausted(RESET, false)),
        ("and a poll that may lag", credits(Some((0, 43))), poll(1, left(500)), exhausted(RESET, false)),
        (
            "short for its size",
            credits(Some((8_950, 9_500))),
            None,
            Meaning::Short { left: 8_950, until: RESET },
        ),
        ("figures that contradict it", credits(Some((20_000, 400))), None, exhausted(after(60), true)),
        ("quota in words", credits(None), None, exhausted(after(60), true)),
        ("and credits in the poll", credits(None), poll(1, left(500)), Meaning::Nothing),
        ("and none in the poll", credits(None), poll(1, left(0)), exhausted(after(60), true)),
        (
            "and an account without a limit",
            credits(None),
            poll(1, PollResult::Figures { left: None, is_paid: Some(true) }),
            Meaning::Nothing,
        ),
        (
            "and a key that may not read",
            credits(None),
            poll(1, PollResult::Unreadable),
            exhausted(after(60), true),
        ),
        (
            "rate limited",
            evidence(ClaimedFault::RateLimited(ConcurrencyGroup::SPEECH)),
            None,
            group(60, true),
        ),
        ("with a span of a day", limited, None, group(300, false)),
        ("and another account says the same", agreed, None, group(300, true)),
        ("locked", evidence(ClaimedFault::Locked), None, cooldown(CooldownReason::Billing, after(60), true)),
        (
            "and unpaid",
            evidence(ClaimedFault::Locked),
            poll(1, unpaid),
            cooldown(CooldownReason::Billing, after(1_800), false),
        ),
        ("and paid", evidence(ClaimedFault::Locked), poll(1, paid), Meaning::Nothing),
        (
            "suspected, and paid",
            evidence(ClaimedFault::Suspected),
            poll(1, paid),
            cooldown(CooldownReason::Billing, after(1_800), true),
        ),
        ("invalid", evidence(ClaimedFault::InvalidKey), None, invalid(after(45), true)),
        (
            "confirmed",
            evidence(ClaimedFault::InvalidKey),
            poll(1, PollResult::Invalid),
            invalid(after(86_401), false),
        ),
        (
            "known to the poll",
            evidence(ClaimedFault::InvalidKey),
            poll(1, PollResult::Unreadable),
            Meaning::Nothing,
        ),
        (
            "wrong host",
            evidence(ClaimedFault::WrongHost),
            None,
            cooldown(CooldownReason::WrongHost, after(45), true),
        ),
        ("accepted elsewhere", evidence(ClaimedFault::WrongHost), poll(1, left(5)), Meaning::Nothing),
    ];
    for (name, evidence, poll, expected) in rows {
        assert_eq!(meaning(&evidence, poll, Some(RESET), &COOLDOWNS, after(1)), expected, "{name}");
    }
}

#[test]
fn polled_figures_replace_those_of_a_refusal_after_the_lag() {
    let of = |evidence: &Evidence, seconds, credits| {
        meaning(evidence, poll(seconds, left(credits)), Some(RESET), &COOLDOWNS, after(seconds))
    };
    assert_ne!(of(&credits(Some((0, 43))), 119, 500), Meaning::Nothing);
    assert_eq!(of(&credits(Some((0, 43))), 120, 500), Meaning::Nothing);
    assert_ne!(of(&credits(Some((0, 43))), 120, 0), Meaning::Nothing);
    assert_eq!(
        of(&credits(Some((5, 43))), 120, 5),
        Meaning::Nothing,
        "the quota itself has the figure by then"
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
        let at = |seconds| meaning(&evidence(claim), None, None, &COOLDOWNS, after(seconds));
        assert_ne!(at(seconds - 1), Meaning::Nothing, "{claim:?}");
        assert_eq!(at(seconds), Meaning::Nothing, "{claim:?}");
    }
    // Without a reset date, an exhausted account is tried again after its cooldown.
    let spent = |seconds| meaning(&credits(Some((0, 1))), None, None, &COOLDOWNS, after(seconds));
    assert_ne!(spent(3_599), Meaning::Nothing);
    assert_eq!(spent(3_600), Meaning::Nothing);
    let dated = |now| meaning(&credits(Some((0, 1))), None, Some(RESET), &COOLDOWNS, now);
    assert_ne!(dated(UnixMs(RESET.0 - 1)), Meaning::Nothing);
    assert_eq!(dated(RESET), Meaning::Nothing);
}

#[test]
fn remaining_credits_are_scaled_to_our_estimates() {
    let of = |estimate| {
        ClaimedFault::credits(
            Shortfall { remaining: Some(5), required: Some(10), ..Shortfall::default() },
            estimate,
        )
    };
    for (estimate, left_by_estimate) in [(Some(20), 10), (Some(10), 5), (None, 5), (Some(0), 5)] {
        assert_eq!(of(estimate), ClaimedFault::Credits { figures: Some((5, 10)), left_by_estimate });
    }
}

#[test]
fn a_poll_is_requested_where_it_can_decide() {
    let at = |evidence: &Evidence, poll| poll_decides_at(evidence, poll, &COOLDOWNS);
    assert_eq!(at(&credits(None), None), Some(AT));
    assert_eq!(at(&credits(None), poll(1, left(0))), None);
    assert_eq!(at(&credits(Some((0, 1))), None), Some(after(120)));
    assert_eq!(at(&credits(Some((0, 1))), poll(1, left(7))), Some(after(120)));
    assert_eq!(at(&credits(Some((0, 1))), poll(120, left(7))), None);
    assert_eq!(
        at(&evidence(ClaimedFault::InvalidKey), poll(0, left(7))),
        Some(AT),
        "that poll was before it"
    );
    assert_eq!(at(&evidence(ClaimedFault::RateLimited(ConcurrencyGroup::SPEECH)), None), None);
}

#[test]
fn a_served_request_refutes_evidence_in_its_scope() {
    let check = |evidence: &Evidence, seconds: u64, is_charged, group| {
        is_refuted_by_service(evidence, UnixMs(AT.0 - 1_000 + seconds * 1_000), is_charged, group)
    };
    let speech = Some(ConcurrencyGroup::SPEECH);
    assert!(check(&credits(None), 1, true, speech));
    assert!(!check(&credits(None), 0, true, speech), "the request began before the refusal");
    assert!(!check(&credits(None), 1, false, None), "reading costs nothing");
    assert!(!check(&credits(Some((5, 43))), 1, true, speech), "the served request was smaller");
    assert!(check(&credits(Some((0, 43))), 1, true, speech));
    let limited = evidence(ClaimedFault::RateLimited(ConcurrencyGroup::SPEECH));
    assert!(check(&limited, 1, true, speech) && !check(&limited, 1, true, Some(ConcurrencyGroup::MUSIC)));
    assert!(check(&evidence(ClaimedFault::InvalidKey), 0, false, None));
}

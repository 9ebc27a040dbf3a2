//! Tests cooldowns: which refusals start them, which times, polls and served requests end them, and which keys may be
//! probed. Also tests restricted keys, restored evidence, and steps of the clock.

use super::*;

#[test]
fn the_first_key_serves_until_it_is_refused() {
    let pool = separate_keys(3);
    assert_eq!(pool.select(&[], NOW), Ok(0));
    pool.record_verdict(0, quota_refusal(), NOW);
    assert_eq!(pool.select(&[], NOW), Ok(1));
}

#[test]
fn a_rate_limited_key_is_usable_after_its_cooldown() {
    let pool = separate_keys(2);
    pool.record_verdict(0, Verdict::RateLimited(None), NOW);
    assert_eq!(pool.select(&[], later(59)), Ok(1));
    assert_eq!(pool.select(&[], later(60)), Ok(0));
    pool.record_verdict(0, Verdict::RateLimited(Some(Duration::from_secs(7))), later(60));
    assert_eq!(pool.select(&[], later(66)), Ok(1));
    assert_eq!(pool.select(&[], later(67)), Ok(0));
}

#[test]
fn a_concurrency_refusal_starts_a_short_cooldown() {
    let pool = separate_keys(2);
    pool.record_verdict(0, Verdict::Concurrency { maximum: Some(4) }, NOW);
    assert_eq!(pool.select(&[], later(1)), Ok(1));
    assert_eq!(pool.select(&[], later(2)), Ok(0));
}

#[test]
fn an_exhausted_workspace_is_usable_at_its_reset_date() {
    let pool = separate_keys(1);
    pool.report_quota(0, 10, 100, NOW);
    pool.record_verdict(0, quota_refusal(), NOW);
    let reset = UnixMs(9_000_000);
    assert_eq!(
        pool.select(&[], UnixMs(8_999_999)),
        Err(Unavailable::Exhausted { resets_at: Some(reset), left: None })
    );
    assert_eq!(pool.select(&[], reset), Ok(0));
    assert_eq!(pool.snapshot(reset)[0].quota.count, 0);
}

#[test]
fn an_exhausted_workspace_without_a_reset_date_is_usable_after_its_cooldown() {
    let pool = separate_keys(1);
    pool.record_verdict(0, quota_refusal(), NOW);
    assert!(pool.select(&[], later(29)).is_err());
    assert_eq!(pool.select(&[], later(3_600)), Ok(0));
}

#[test]
fn a_workspace_cooldown_applies_to_its_keys_only() {
    let pool = pool(&[Some("a"), Some("b"), Some("a")]);
    let transitions = pool.record_verdict(0, quota_refusal(), NOW);
    assert_eq!(transitions.len(), 2);
    assert_eq!(pool.select(&[], NOW), Ok(1));
    assert_eq!(pool.select(&[1], NOW), Err(Unavailable::Tried));
}

#[test]
fn a_key_whose_own_quota_is_used_up_leaves_its_workspace_usable() {
    let pool = pool(&[Some("a"), Some("a")]);
    pool.record_verdict(
        0,
        Verdict::KeyQuota(Shortfall { remaining: Some(0), required: Some(1), ..Shortfall::default() }),
        NOW,
    );
    assert_eq!(pool.select(&[], NOW), Ok(1));
}

#[test]
fn a_refusal_about_the_request_starts_no_cooldown_of_the_key() {
    let pool = separate_keys(1);
    for verdict in [
        Verdict::Served,
        Verdict::PlanFeature(Subject::Voice),
        Verdict::Slots,
        Verdict::Busy,
        Verdict::Unexplained(UnexplainedRefusal::Forbidden),
        Verdict::Unexplained(UnexplainedRefusal::Unauthorized),
        Verdict::NotFound,
        Verdict::RequestError,
        Verdict::ServerError,
        Verdict::Unreadable,
    ] {
        assert!(pool.record_verdict(0, verdict, NOW).is_empty(), "{verdict:?} must not change the key");
        assert_eq!(pool.select(&[], NOW), Ok(0), "{verdict:?} must not start a cooldown");
    }
}

#[test]
fn a_rate_limit_applies_to_its_concurrency_group() {
    let pool = separate_keys(1);
    pool.record_verdict(0, Verdict::RateLimited(Some(Duration::from_secs(20))), NOW);
    assert_eq!(pool.select(&[], NOW), Err(Unavailable::Cooling { until: later(20) }));
    assert_eq!(pool.snapshot(NOW)[0].state.status().as_str(), "rate_limited");
    let transcription = KeyRequest { group: Some(ConcurrencyGroup::TRANSCRIPTION), ..speech_request(1, &[]) };
    assert!(pool.try_lease(&transcription, NOW).is_ok());
    assert!(pool.try_lease(&KeyRequest { group: None, ..speech_request(0, &[]) }, NOW).is_ok());
    // A long `Retry-After` is limited to `max_retry_after`.
    pool.record_verdict(0, Verdict::RateLimited(Some(Duration::from_secs(86_400))), later(20));
    assert_eq!(pool.select(&[], later(21)), Err(Unavailable::Cooling { until: later(320) }));
}

#[test]
fn a_key_with_too_few_credits_for_one_request_is_not_exhausted() {
    let pool = separate_keys(1);
    pool.report_quota(0, 50, 9_000, NOW);
    let short = Verdict::WorkspaceQuota(Shortfall {
        remaining: Some(8_950),
        required: Some(9_500),
        ..Shortfall::default()
    });
    let roster = pool.roster();
    let large_request = speech_request(9_500, &[]);
    record_attempt(&pool, &roster, &roster.keys()[0], short, Some(&large_request), NOW);
    assert_eq!(pool.snapshot(NOW)[0].state.status().as_str(), "active");
    assert!(pool.try_lease(&speech_request(50, &[]), NOW).is_ok());
    assert!(matches!(pool.try_lease(&large_request, NOW), Err(Unavailable::Exhausted { .. })));
}

#[test]
fn a_refused_key_is_usable_when_the_provider_accepts_it() {
    let pool = separate_keys(1);
    pool.record_verdict(0, Verdict::InvalidKey, NOW);
    assert_eq!(pool.select(&[], NOW), Err(Unavailable::Invalid));
    let roster = pool.roster();
    let transitions = pool.observe(&roster, &roster.keys()[0], Observation::Unreadable, later(1));
    assert_eq!(changes(&transitions), [(0, StateChange::CooldownEnded)]);
    assert_eq!(pool.select(&[], later(1)), Ok(0));
}

#[test]
fn only_a_poll_makes_a_key_invalid_for_long() {
    let pool = separate_keys(1);
    let roster = pool.roster();
    let key = &roster.keys()[0];
    for at in [NOW, later(600), later(1_200)] {
        pool.record_verdict(0, Verdict::InvalidKey, at);
        assert!(key.is_poll_requested());
        assert_eq!(pool.select(&[], at.plus(Duration::from_secs(29))), Err(Unavailable::Invalid));
        // Only one request may probe the key.
        let probe = at.plus(Duration::from_secs(30));
        assert_eq!(pool.select(&[], probe), Ok(0));
        assert_eq!(pool.select(&[], probe), Err(Unavailable::Invalid));
    }
    pool.observe(&roster, key, invalid_observation(), later(1_201));
    assert!(!key.is_poll_requested());
    assert_eq!(pool.select(&[], later(1_201 + 86_399)), Err(Unavailable::Invalid));
    pool.observe(&roster, key, Observation::Unreadable, later(1_300));
    assert_eq!(pool.select(&[], later(1_300)), Ok(0));
}

#[test]
fn a_poll_refutes_an_exhaustion_by_a_new_limit_or_after_the_lag() {
    let pool = separate_keys(1);
    pool.report_quota(0, 90, 100, NOW);
    pool.record_verdict(0, quota_refusal(), NOW);
    pool.report_quota(0, 90, 100, later(1));
    assert!(pool.select(&[], later(1)).is_err());
    pool.report_quota(0, 90, 1_000, later(2));
    assert_eq!(pool.select(&[], later(2)), Ok(0));
    // A poll that follows the refusal by more than the lag also refutes it.
    pool.record_verdict(0, quota_refusal(), later(3));
    pool.report_quota(0, 90, 1_000, later(302));
    assert!(pool.select(&[], later(302)).is_err());
    pool.report_quota(0, 90, 1_000, later(303));
    assert_eq!(pool.select(&[], later(303)), Ok(0));
}

#[test]
fn a_locked_workspace_is_usable_when_its_bill_is_paid() {
    let pool = separate_keys(1);
    pool.record_verdict(0, Verdict::Billing, NOW);
    let roster = pool.roster();
    let key = &roster.keys()[0];
    let poll = |is_paid| quota_observation(Quota::default(), is_paid);
    assert!(pool.observe(&roster, key, poll(Some(false)), later(1)).is_empty());
    assert_eq!(
        changes(&pool.observe(&roster, key, poll(Some(true)), later(2))),
        [(0, StateChange::CooldownEnded)]
    );
}

#[test]
fn a_served_request_ends_the_cooldown_of_its_key() {
    let pool = separate_keys(1);
    pool.record_verdict(0, Verdict::InvalidKey, NOW);
    pool.record_verdict(0, Verdict::Served, NOW);
    assert!(pool.roster().keys()[0].evidence().is_empty());
    assert_eq!(pool.select(&[], NOW), Ok(0));
}

#[test]
fn a_key_in_an_unproven_cooldown_is_probed_only_when_no_other_key_can_serve() {
    let pool = separate_keys(2);
    pool.record_verdict(0, Verdict::WorkspaceQuota(Shortfall::default()), NOW);
    assert_eq!(pool.select(&[], later(31)), Ok(1));
    // For a request that the second key has refused, only the first key remains.
    assert_eq!(pool.select(&[1], later(31)), Ok(0));
    // The served request refutes the refusal.
    pool.record_verdict(0, Verdict::Served, later(31));
    assert_eq!(pool.select(&[], later(31)), Ok(0));
}

#[test]
fn a_key_in_two_unproven_cooldowns_may_be_probed() {
    for verdicts in [[Verdict::Abuse, Verdict::Billing], [Verdict::Billing, Verdict::Abuse]] {
        let pool = separate_keys(1);
        verdicts.into_iter().for_each(|verdict| drop(pool.record_verdict(0, verdict, NOW)));
        assert!(pool.select(&[], later(29)).is_err(), "the cooldowns must last after {verdicts:?}");
        assert_eq!(pool.select(&[], later(30)), Ok(0), "the key must be probed after {verdicts:?}");
    }
}

#[test]
fn a_restricted_key_is_tried_last_and_a_refused_key_only_as_the_first_attempt() {
    let pool = separate_keys(3);
    let restricted = |levels: &[(usize, RestrictionLevel)]| KeyRequest {
        restricted: levels.to_vec(),
        ..speech_request(0, &[])
    };
    let select =
        |request: &KeyRequest| pool.try_lease(request, NOW).map(|reserved| reserved.lease.key().position());
    let (inferred, refused) = (RestrictionLevel::Inferred, RestrictionLevel::Refused);
    assert_eq!(select(&restricted(&[(0, refused), (1, inferred)])), Ok(2));
    assert_eq!(select(&restricted(&[(0, refused), (1, inferred), (2, refused)])), Ok(1));
    let all = restricted(&[(0, refused), (1, refused), (2, refused)]);
    assert_eq!(select(&all), Ok(0));
    assert_eq!(select(&KeyRequest { was_refused: true, ..all }), Err(Unavailable::Tried));
    let longest = restricted(&[(0, refused), (1, RestrictionLevel::RefusedLongest), (2, refused)]);
    assert_eq!(select(&longest), Ok(1));
    assert_eq!(select(&KeyRequest { was_refused: true, ..longest }), Err(Unavailable::Tried));
    let until = RestrictionLevel::Until(later(9));
    let cooling = restricted(&[(0, until), (1, until), (2, until)]);
    assert_eq!(select(&cooling), Err(Unavailable::Cooling { until: later(9) }));
}

#[test]
fn restored_evidence_takes_effect_again() {
    let pool = separate_keys(3);
    let fingerprints: Vec<Fingerprint> =
        pool.roster().keys().iter().map(|key| key.api_key().fingerprint()).collect();
    let quota = Quota { count: 5, limit: Some(10), extension: Extension::None, resets_at: Some(later(50)) };
    let evidence = |claim, at| {
        vec![Evidence {
            claim,
            at,
            retry_after: None,
            is_repeated_elsewhere: false,
            source: RefusalSource::default(),
        }]
    };
    let proven = ClaimedFault::Credits { reported: Some((0, 7)), scaled_remaining: 0 };
    let unproven = ClaimedFault::Credits { reported: None, scaled_remaining: 0 };
    let restored_key = |fingerprint, workspace_evidence| RestoredKey {
        fingerprint,
        quota,
        tier: None,
        key_evidence: vec![],
        workspace_evidence,
    };
    pool.restore(
        &[
            restored_key(fingerprints[0], evidence(proven, NOW)),
            // The cooldown after a refusal without numbers is over.
            restored_key(fingerprints[1], evidence(unproven, UnixMs(NOW.0 - 60_000))),
            restored_key(Fingerprint::new("removed"), vec![]),
        ],
        NOW,
    );
    assert_eq!(pool.select(&[], NOW), Ok(1));
    assert_eq!(pool.select(&[], later(50)), Ok(0));
    assert_eq!(pool.snapshot(NOW)[1].quota, quota);
    assert_eq!(pool.snapshot(NOW)[2].quota, Quota::default());
}

#[test]
fn a_clock_step_resets_credits_once_and_ends_every_cooldown() {
    let pool = separate_keys(1);
    pool.report_quota(0, 100, 100, NOW);
    let reset = UnixMs(9_000_000);
    assert!(pool.select(&[], NOW).is_err());
    // A step beyond the reset date starts a new period once.
    assert_eq!(pool.select(&[], reset), Ok(0));
    pool.charge_key(0, 7, reset);
    // After a step back, the credits of the new period stay spent.
    assert_eq!(pool.select(&[], NOW), Ok(0));
    assert_eq!(pool.snapshot(NOW)[0].quota.count, 7);
    // If the clock was set back, the time of the evidence is in the future. A later poll refutes it.
    pool.record_verdict(0, Verdict::InvalidKey, later(86_400));
    assert_eq!(pool.select(&[], NOW), Err(Unavailable::Invalid));
    pool.report_quota(0, 7, 100, later(86_401));
    assert_eq!(pool.select(&[], NOW), Ok(0));
}

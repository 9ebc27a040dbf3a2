//! Tests the roster: the state of keys and workspaces, requests in flight and settings after a reload, and workspaces
//! after the provider has reported an identifier.

use super::*;

/// Returns a pool of three keys, whose state a reload must keep. The last two keys share a workspace.
fn pool_with_history() -> Arc<Pool> {
    let entries = vec![entry(0, None, None), entry(1, None, Some("w")), entry(2, Some("two"), Some("w"))];
    let pool = Arc::new(Pool::new(entries, SETTINGS));
    pool.report_quota(0, 10, 100, NOW);
    pool.report_quota(1, 20, 100, NOW);
    pool.record_verdict(0, Verdict::InvalidKey, NOW);
    pool.record_verdict(2, Verdict::RateLimited(None), NOW);
    pool
}

#[test]
fn a_reload_in_another_order_keeps_the_state_of_every_key() {
    let pool = pool_with_history();
    let old_roster = pool.roster();
    pool.reload(vec![entry(2, Some("two"), Some("w")), entry(0, None, None)], SETTINGS);
    let new_roster = pool.roster();
    assert!(Arc::ptr_eq(&new_roster.keys()[0], &old_roster.keys()[2]));
    assert!(Arc::ptr_eq(&new_roster.keys()[1], &old_roster.keys()[0]));
    assert_eq!(new_roster.keys().iter().map(|key| key.position()).collect::<Vec<_>>(), [0, 1]);
    // Both keys are still in cooldown.
    assert!(pool.try_reserve(&new_roster, &speech_request(0, &[]), NOW).is_err());
    assert_eq!(pool.select(&[], later(60)), Ok(0));
}

#[test]
fn a_request_in_flight_keeps_its_roster() {
    let pool = separate_keys(2);
    let roster_before = pool.roster();
    pool.reload(vec![entry(1, None, None), entry(0, None, None)], SETTINGS);
    let reserved = pool.try_reserve(&roster_before, &speech_request(0, &[]), NOW).unwrap();
    assert_eq!(roster_before.position_of(reserved.lease.key()), Some(0));
    assert_eq!(reserved.lease.key().position(), 1, "the key must have its position in the latest roster");
    let other = pool.try_reserve(&roster_before, &speech_request(0, &[0]), NOW).unwrap();
    assert_eq!(roster_before.position_of(other.lease.key()), Some(1));
    // The results of requests in flight are still recorded for a removed key.
    pool.reload(vec![entry(1, None, None)], SETTINGS);
    record_attempt(&pool, &roster_before, reserved.lease.key(), quota_refusal(), None, NOW);
    assert_eq!(pool.roster().position_of(reserved.lease.key()), None);
    assert_eq!(pool.snapshot(NOW).len(), 1);
}

#[test]
fn a_renamed_key_keeps_its_state() {
    let pool = pool_with_history();
    let old_roster = pool.roster();
    pool.reload(vec![entry(0, Some("zero"), None), entry(1, None, Some("w"))], SETTINGS);
    let new_roster = pool.roster();
    assert_eq!(new_roster.keys()[0].name(), Some("zero"));
    assert_eq!(new_roster.keys()[0].state(NOW), old_roster.keys()[0].state(NOW));
    assert!(std::ptr::eq(new_roster.keys()[0].workspace(), old_roster.keys()[0].workspace()));
}

#[test]
fn a_new_key_of_a_known_workspace_shares_its_credits() {
    let pool = pool_with_history();
    let summary = pool.reload(vec![entry(3, None, Some("w")), entry(1, None, Some("w"))], SETTINGS);
    assert_eq!(summary, ReloadSummary { keys: 2, added: 1, removed: 2 });
    let keys = pool.roster().keys().to_vec();
    assert!(std::ptr::eq(keys[0].workspace(), keys[1].workspace()));
    assert_eq!(keys[0].workspace().quota(NOW).count, 20);
}

#[test]
fn a_key_moved_to_another_workspace_keeps_neither_its_credits_nor_its_rate_limit() {
    let pool = pool_with_history();
    pool.reload(vec![entry(2, Some("two"), Some("elsewhere"))], SETTINGS);
    let key = Arc::clone(&pool.roster().keys()[0]);
    assert!(key.cooldown().is_none(), "the rate limit must stay with the previous workspace");
    assert_eq!(key.workspace().quota(NOW), Quota::default());
}

#[test]
fn new_settings_apply_from_the_next_roster_on() {
    let pool = separate_keys(1);
    let roster_before = pool.roster();
    pool.reload(
        vec![entry(0, None, None)],
        Settings { rate_limited_cooldown: Duration::from_secs(5), ..SETTINGS },
    );
    let cooldown_until = |roster: &Roster| {
        record_attempt(
            &pool,
            roster,
            &roster.keys()[0],
            Verdict::RateLimited(None),
            Some(&speech_request(1, &[])),
            NOW,
        );
        roster.keys()[0].workspace().speech_limited_until(NOW).unwrap()
    };
    assert_eq!(cooldown_until(&pool.roster()), later(5));
    assert_eq!(cooldown_until(&roster_before), later(60));
}

#[test]
fn a_new_position_of_the_key_in_use_is_not_reported() {
    let pool = separate_keys(2);
    assert_eq!(pool.try_lease(&speech_request(0, &[]), NOW).unwrap().transitions.len(), 1);
    pool.reload(vec![entry(2, None, None), entry(0, None, None)], SETTINGS);
    assert!(pool.try_lease(&speech_request(0, &[0]), NOW).unwrap().transitions.is_empty());
}

#[test]
fn keys_with_the_same_workspace_identifier_share_credits() {
    let pool = separate_keys(3);
    for (position, count) in [(0, 10), (1, 10), (2, 70)] {
        pool.report_quota(position, count, 100, NOW);
    }
    let roster_before = pool.roster();
    assert!(pool.record_workspace(&roster_before.keys()[1], "ws_1"));
    assert!(pool.record_workspace(&roster_before.keys()[0], "ws_1"));
    assert!(!pool.record_workspace(&roster_before.keys()[0], "ws_1"));
    let keys = pool.roster().keys().to_vec();
    assert!(std::ptr::eq(keys[0].workspace(), keys[1].workspace()));
    assert!(!std::ptr::eq(keys[0].workspace(), keys[2].workspace()));
    assert_eq!(keys[0].workspace().quota(NOW).count, 10);
    assert_eq!(keys[1].workspace().identity(), keys[0].workspace().identity());
    pool.record_verdict(0, quota_refusal(), NOW);
    assert_eq!(pool.select(&[], NOW), Ok(2));
    // The workspace and its evidence survive a reload.
    pool.reload(vec![entry(2, None, None), entry(1, Some("one"), None), entry(0, None, None)], SETTINGS);
    let keys = pool.roster().keys().to_vec();
    assert!(std::ptr::eq(keys[1].workspace(), keys[2].workspace()));
    assert_eq!(keys[0].workspace().quota(NOW).count, 70);
}

#[test]
fn an_identifier_of_one_key_applies_to_its_configured_workspace() {
    let pool = pool(&[Some("w"), Some("w"), None]);
    pool.report_quota(0, 10, 100, NOW);
    pool.record_workspace(&pool.roster().keys()[1], "ws_1");
    pool.record_workspace(&pool.roster().keys()[2], "ws_1");
    let keys = pool.roster().keys().to_vec();
    assert!(keys.iter().all(|key| std::ptr::eq(key.workspace(), keys[0].workspace())));
    assert_eq!(keys[2].workspace().quota(NOW).count, 10);
}

#[test]
fn a_workspace_that_is_named_later_is_identified_by_its_key() {
    let entry = |key: &str, workspace: Option<&str>| KeyEntry {
        workspace: workspace.map(str::to_owned),
        ..ApiKey::new(key).unwrap().into()
    };
    let pool = Pool::new(vec![entry("sk_a", None), entry("sk_b", None)], Settings::FOR_TESTS);
    let old_roster = pool.roster();
    assert!(old_roster.has_several_workspaces());
    let identity_before = old_roster.keys()[0].workspace().identity().clone();
    pool.reload(vec![entry("sk_c", Some("studio")), entry("sk_a", Some("studio"))], Settings::FOR_TESTS);
    let new_roster = pool.roster();
    let studio = new_roster.keys()[0].workspace().identity();
    assert_eq!(new_roster.identity_of(&identity_before), Some(studio));
    assert_eq!(new_roster.identity_of(studio), Some(studio));
    assert_eq!(
        new_roster.identity_of(old_roster.keys()[1].workspace().identity()),
        None,
        "the roster must contain no key of that workspace"
    );
    assert!(!new_roster.has_several_workspaces());
}

#[test]
fn an_identified_workspace_takes_its_configured_name() {
    let pool = separate_keys(1);
    pool.record_workspace(&pool.roster().keys()[0], "ws_1");
    pool.reload(vec![entry(0, None, Some("studio"))], SETTINGS);
    let named_roster = pool.roster();
    assert_eq!(named_roster.keys()[0].workspace().membership().name(), Some("studio"));
    pool.reload(vec![entry(0, None, Some("studio"))], SETTINGS);
    assert!(
        Arc::ptr_eq(&named_roster.keys()[0], &pool.roster().keys()[0]),
        "a reload without a change must keep the key"
    );
}

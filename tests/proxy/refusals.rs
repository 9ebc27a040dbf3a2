//! A refusal restricts only what it proves: each known way in which one request could disable keys
//! for others, through the whole program, and over a restart.

use std::time::Duration;

use crate::support::{
    FIRST_KEY, SECOND_KEY, SPEECH_PATH, THIRD_KEY, TestProxy, VOICE_ID, assert_proxy_error, join_all,
    start_proxy, start_proxy_in, start_proxy_with, wait_until,
};
use keychoir::config::KeyConfig;
use keychoir::secret::{ApiKey, Fingerprint};
use keychoir::simulator::{Fault, KeyPlan, Plan, ReportedLimit, Simulator, WorkspacePlan};
use serde_json::{Value, json};

const KEYS: [&str; 3] = [FIRST_KEY, SECOND_KEY, THIRD_KEY];

fn rich() -> Plan {
    Plan::of(KEYS.map(|key| (key, 100_000)))
}

/// Keys of workspaces with these plans, in this order, each with `credits`.
fn of_plans(tiers: &[&str], credits: u64) -> Plan {
    tiers.iter().zip(KEYS).enumerate().fold(Plan::of([]), |plan, (number, (tier, key))| {
        let name = format!("ws_{number}");
        let workspace = WorkspacePlan { tier: (*tier).to_owned(), ..WorkspacePlan::new(&name, credits) };
        plan.with_workspace(workspace).with_key(KeyPlan { workspace: Some(name), ..KeyPlan::new(key, 0) })
    })
}

fn fault(text: &str) -> Option<Fault> {
    Some(text.parse().unwrap_or_else(|error| panic!("{text}: {error}")))
}

/// Asserts that plain speech is served, every key is active, and the program is ready.
async fn assert_unharmed(proxy: &TestProxy, case: &str) {
    assert_eq!(proxy.request_speech(10).await.status(), 200, "{case}");
    assert_eq!(proxy.key_statuses().await, vec!["active"; proxy.key_statuses().await.len()], "{case}");
    assert_eq!(proxy.get("/readyz").await.status(), 200, "{case}");
}

/// Restarts the program with the same database.
async fn restarted(proxy: TestProxy, plan: Plan) -> TestProxy {
    let folder = proxy.close_unchecked().await;
    start_proxy_in(folder, plan, |_| {}).await
}

const DUBBING: &str = "/v1/dubbing";

/// Every account refuses one request, on a route that no other request uses.
#[tokio::test]
async fn one_request_that_every_account_refuses_makes_no_key_unusable() {
    let refusals = [
        r#"answer=402/{"detail":{"type":"x","code":"payment_required","message":"This feature needs payment."}}"#,
        r#"answer=402/{"detail":{"type":"payment_required","code":"","message":"Payment is required."}}"#,
        r#"answer=402/{"detail":"Payment required"}"#,
        r#"answer=402/{"detail":{"code":"insufficient_credits","message":"No."}}"#,
        r#"answer=401/{"detail":{"status":"quota_exceeded","message":"You have spent it."}}"#,
        r#"answer=401/{"detail":{"status":"sign_in_required","message":"Sign in."}}"#,
        r#"answer=401/{"detail":{"code":"invalid_api_key","message":"Invalid API key"}}"#,
        r#"answer=403/{"detail":{"code":"forbidden","message":"Forbidden"}}"#,
        r#"answer=403/{"detail":{"code":"a_new_one","message":"Whatever."}}"#,
        r#"answer=429/{"detail":{"code":"rate_limit_exceeded","message":"Slow down."}}"#,
        r#"answer=429[retry-after: 86400]/{"detail":{"code":"rate_limit_exceeded","message":"Slow down."}}"#,
        "answer=429/",
        "answer=401/",
        "answer=402/",
        "voice_limit_reached",
        "quota_slots",
        "quota_words",
        "payment_required_plan",
        "invalid_workspace_type",
    ];
    let check = |refusal: &'static str| async move {
        let refusal = fault(refusal).unwrap();
        let proxy = start_proxy(rich()).await;
        proxy.simulator.for_all_requests_on(DUBBING, Some(refusal.clone()));
        let answer = proxy.post(DUBBING, &json!({"name": "x"})).await;
        let case = refusal.to_string();
        assert!(answer.status().is_client_error(), "{case}: {}", answer.status());
        // Some keys are being polled, and a request without a usable key waits for the result.
        assert_eq!(proxy.request_speech(10).await.status(), 200, "{case}");
        until_statuses(&proxy, &["active"; 3], &case).await;
        let proxy = restarted(proxy, rich()).await;
        assert_unharmed(&proxy, &case).await;
    };
    join_all(refusals.into_iter().map(check)).await;
}

/// The same repeatedly, without polls: a refusal by all accounts is no evidence against the account
/// that is tried next.
#[tokio::test]
async fn a_request_that_every_account_refuses_takes_no_key_at_any_repetition() {
    let refusals = [
        r#"answer=402/{"detail":{"code":"insufficient_credits","message":"No."}}"#,
        r#"answer=402/{"detail":"Payment Required"}"#,
        r#"answer=401/{"detail":{"status":"quota_exceeded","message":"You have spent it."}}"#,
        r#"answer=429/{"detail":{"status":"quota_exceeded","message":"You have spent it."}}"#,
        r#"answer=401/{"detail":{"status":"quota_exceeded","message":"This request exceeds your quota of 10. You have 0 credits remaining, while 3 credits are required for this request."}}"#,
        r#"answer=401/{"detail":{"status":"quota_exceeded","message":"You have 90 credits remaining, while 3 credits are required for this request."}}"#,
        r#"answer=401/{"detail":{"code":"invalid_api_key","message":"Invalid API key"}}"#,
        "payment_issue",
        "unusual_activity",
        "wrong_host",
    ];
    let check = |refusal: &'static str| async move {
        let proxy = start_proxy(rich()).await;
        proxy.simulator.for_all_requests_on(DUBBING, fault(refusal));
        for number in 0..6 {
            let answer = proxy.post(DUBBING, &json!({"name": "x"})).await;
            assert!(answer.status().is_client_error(), "{refusal}: {}", answer.status());
            // At first all keys may really be unknown to the provider: then Keychoir responds
            // itself.
            let may_be_ours = number == 0 && (refusal.contains("invalid_api_key") || refusal == "wrong_host");
            assert!(may_be_ours || !answer.headers().contains_key("x-keychoir-error"), "{refusal}");
            assert_unharmed(&proxy, refusal).await;
        }
        let asked = proxy.simulator.ledger().requests_to(DUBBING).count();
        assert!(asked <= 3 + 5 * 2, "{refusal}: {asked} attempts for six requests");
    };
    join_all(refusals.into_iter().map(check)).await;
}

/// Two accounts refuse all speech in unknown words; the third serves it from the second request on.
#[tokio::test]
async fn a_third_account_serves_a_request_with_two_unexplained_refusals() {
    let refusals = [
        r#"answer=403/{"detail":{"code":"forbidden","message":"Your IP address is not allowed."}}"#,
        r#"answer=401/{"detail":"Unauthorized"}"#,
        r#"answer=401/{"detail":{"code":"api_key_expired","message":"Expired."}}"#,
        "answer=403/",
        "answer=402/",
        "answer=429/error code: 1015",
        "garbled",
        "huge",
    ];
    let check = |refusal: &'static str| async move {
        let proxy = start_proxy(rich()).await;
        for key in [FIRST_KEY, SECOND_KEY] {
            proxy.set_fault(key, refusal);
        }
        proxy.request_speech(10).await;
        for _ in 0..5 {
            assert_eq!(proxy.request_speech(10).await.status(), 200, "{refusal}");
        }
        assert_eq!(proxy.request_counts(&[THIRD_KEY]), [5], "{refusal}");
        // A request that only they can serve is still sent to them.
        proxy.simulator.always(FIRST_KEY, None);
        proxy.set_fault(THIRD_KEY, "quota_words");
        assert_eq!(proxy.request_speech(10).await.status(), 200, "{refusal}");
    };
    join_all(refusals.into_iter().map(check)).await;
}

/// An account refuses one kind of request in words about the whole account, and each poll
/// contradicts it: it is tried for that kind once more, and then no longer.
#[tokio::test]
async fn an_account_that_polls_contradict_is_not_retried_for_ever() {
    let refusals = [
        "quota_words",
        "insufficient_credits",
        "payment_issue",
        r#"answer=401/{"detail":{"status":"quota_exceeded","message":"You have 90 credits remaining, while 3 credits are required for this request."}}"#,
        r#"answer=401/{"detail":{"code":"invalid_api_key","message":"Invalid API key"}}"#,
    ];
    let check = |refusal: &'static str| async move {
        let proxy = start_proxy(rich()).await;
        proxy.simulator.always_on(FIRST_KEY, SPEECH_PATH, fault(refusal));
        for _ in 0..4 {
            assert_eq!(proxy.request_speech(10).await.status(), 200, "{refusal}");
            until_statuses(&proxy, &["active"; 3], refusal).await;
        }
        assert_eq!(proxy.request_counts(&[FIRST_KEY, SECOND_KEY]), [2, 4], "{refusal}");
    };
    join_all(refusals.into_iter().map(check)).await;
}

/// A refusal of one account that cannot be parsed does not end the retries.
#[tokio::test]
async fn an_unreadable_refusal_is_replaced() {
    for refusal in ["garbled", "huge"] {
        let proxy = start_proxy(rich()).await;
        proxy.set_fault(FIRST_KEY, refusal);
        for _ in 0..3 {
            assert_eq!(proxy.request_speech(10).await.status(), 200, "{refusal}");
        }
        assert_eq!(proxy.request_counts(&[FIRST_KEY, SECOND_KEY]), [1, 3], "{refusal}");
    }
}

/// One model is rate limited everywhere: one request tries speech with others, and the rest of a
/// burst is served as soon as that one is.
#[tokio::test]
async fn a_burst_waits_for_the_try_of_one_and_is_served() {
    const ODD: &str = "/v1/text-to-speech/AVoiceThatIsRefused0";
    let proxy = start_proxy_with(rich(), |config| config.pool.queue_timeout = Duration::from_secs(20)).await;
    proxy.simulator.for_all_requests_on(ODD, fault("rate_limit=86400"));
    assert_eq!(proxy.post(ODD, &json!({"text": "hello"})).await.status(), 429);
    let answers = join_all((0..8).map(|_| proxy.request_speech(10))).await;
    assert_eq!(answers.iter().map(|answer| answer.status().as_u16()).collect::<Vec<_>>(), [200; 8]);
}

/// Polls until the keys have this status.
async fn until_statuses(proxy: &TestProxy, expected: &[&str], case: &str) {
    let looking = async {
        while proxy.key_statuses().await != expected {
            tokio::task::yield_now().await;
        }
    };
    let stands = tokio::time::timeout(Duration::from_secs(20), looking).await;
    assert!(stands.is_ok(), "{case}: {:?}", proxy.key_statuses().await);
}

/// The same for speech with one voice: speech with other voices is served at once.
#[tokio::test]
async fn one_speech_that_every_account_refuses_takes_no_speech_from_others() {
    const ODD: &str = "/v1/text-to-speech/AVoiceThatIsRefused0";
    let refusals = [
        "quota_words",
        "insufficient_credits",
        "payment_issue",
        "unusual_activity",
        "invalid",
        "wrong_host",
        "rate_limit",
        "rate_limit=86400",
        "concurrency",
        "paid_plan_required",
        "voice_limit_reached",
        "missing_permissions",
        "forbidden",
        "unauthorized",
        "system_busy",
        "server_error",
        "huge",
        "garbled",
    ];
    let check = |refusal: &'static str| async move {
        let proxy =
            start_proxy_with(rich(), |config| config.pool.queue_timeout = Duration::from_secs(20)).await;
        proxy.simulator.for_all_requests_on(ODD, fault(refusal));
        let answer = proxy.post(ODD, &json!({"text": "hello"})).await;
        assert_ne!(answer.status(), 200, "{refusal}");
        for _ in 0..3 {
            assert_eq!(proxy.request_speech(10).await.status(), 200, "{refusal}");
        }
        assert_eq!(proxy.get("/readyz").await.status(), 200, "{refusal}");
        proxy.close_unchecked().await;
    };
    join_all(refusals.into_iter().map(check)).await;
}

#[tokio::test]
async fn twelve_accounts_are_not_taken_by_one_client() {
    let keys: Vec<String> = (0..12).map(|number| format!("sk_of_twelve_{number:037}")).collect();
    let proxy = start_proxy(Plan::of(keys.iter().map(|key| (key.as_str(), 1_000_000)))).await;
    let refusal = r#"answer=402/{"detail":{"type":"x","code":"payment_required","message":"This feature needs payment."}}"#;
    proxy.simulator.for_all_requests_on(DUBBING, fault(refusal));
    let answer = proxy.post(DUBBING, &json!({})).await;
    assert_eq!(answer.status(), 402);
    assert!(!answer.headers().contains_key("x-keychoir-error"));
    let status = proxy.status().await;
    assert_eq!((&status["activeKeys"], &status["exhaustedKeys"]), (&json!(12), &json!(0)));
    assert_eq!(proxy.get("/readyz").await.status(), 200);
    // A similar request tries one account, not twelve again.
    let before: usize = hits(&proxy, &keys);
    assert_eq!(proxy.post(DUBBING, &json!({})).await.status(), 402);
    assert_eq!(hits(&proxy, &keys) - before, 1);
}

fn hits(proxy: &TestProxy, keys: &[String]) -> usize {
    proxy.request_counts(&keys.iter().map(String::as_str).collect::<Vec<_>>()).iter().sum()
}

#[tokio::test]
async fn a_key_short_of_one_text_is_not_exhausted_before_and_after_a_restart() {
    let plan = || Plan::of([(FIRST_KEY, 9_000)]);
    let proxy = start_proxy(plan()).await;
    assert_eq!(proxy.request_speech(50).await.status(), 200);
    let answer = proxy.request_speech(9_500).await;
    assert_eq!(answer.status(), 401);
    assert_eq!(proxy.request_speech(50).await.status(), 200);
    let left = |status: &Value| status["keys"][0]["remainingCharacters"].clone();
    let status = proxy.status().await;
    assert_eq!((&status["activeKeys"], left(&status)), (&json!(1), json!(8_900)), "{status}");
    assert_eq!(status["totalRemainingCharacters"], 8_900);
    assert_eq!(proxy.get("/readyz").await.status(), 200);
    // The same text is not sent again.
    let answer = proxy.request_speech(9_500).await;
    assert_proxy_error(&answer, 401, "all_keys_exhausted");
    let message = answer.json::<Value>().await.unwrap()["detail"]["message"].to_string();
    assert!(message.contains("has left are 8,900"), "{message}");
    assert_eq!(proxy.request_counts(&[FIRST_KEY]), [3]);

    let used = WorkspacePlan { used: 100, ..WorkspacePlan::new("ws", 9_000) };
    let plan = Plan::of([]).with_workspace(used);
    let plan = plan.with_key(KeyPlan { workspace: Some("ws".to_owned()), ..KeyPlan::new(FIRST_KEY, 0) });
    let proxy = restarted(proxy, plan).await;
    assert_eq!(proxy.request_speech(50).await.status(), 200);
    assert_eq!(proxy.key_statuses().await, ["active"]);
    assert_eq!(left(&proxy.status().await), json!(8_850));
}

#[tokio::test]
async fn a_rate_limit_concerns_only_the_limited_endpoint() {
    for (refusal, path) in [
        ("answer=429/", "/v1/similar-voices"),
        ("rate_limit", "/v1/similar-voices"),
        ("rate_limit=86400", "/v1/similar-voices"),
        ("rate_limit", "/v1/sound-generation"),
        ("rate_limit=86400", "/v1/sound-generation"),
        ("rate_limit", "/v1/voices/add"),
    ] {
        let proxy = start_proxy(rich()).await;
        proxy.simulator.for_all_requests_on(path, fault(refusal));
        let answer = proxy.post(path, &json!({"text": "rain"})).await;
        assert_eq!(answer.status(), 429, "{refusal} {path}");
        assert_eq!(proxy.request_speech(10).await.status(), 200, "{refusal} {path}");
        assert_eq!(proxy.get("/v1/voices").await.status(), 200, "{refusal} {path}");
        assert_eq!(proxy.get("/readyz").await.status(), 200, "{refusal} {path}");
        // A similar request gets a final response within a bounded time.
        let again = proxy.post(path, &json!({"text": "rain"})).await;
        assert_eq!(again.status(), 429, "{refusal} {path}");
        if again.headers().contains_key("x-keychoir-error") {
            let seconds: u64 = again.headers()["retry-after"].to_str().unwrap().parse().unwrap();
            assert!((1..=300).contains(&seconds), "{refusal} {path}: {seconds}");
        }
    }
}

#[tokio::test]
async fn a_fresh_poll_with_credits_ends_a_cooldown_for_quota() {
    let proxy = start_proxy(rich()).await;
    proxy.simulator.script(FIRST_KEY, vec![fault("quota_words").unwrap()]);
    assert_eq!(proxy.request_speech(10).await.status(), 200);
    until_statuses(&proxy, &["active"; 3], "the poll finds 100,000 credits").await;
    assert_eq!(proxy.request_speech(10).await.status(), 200);
    assert_eq!(proxy.request_counts(&KEYS), [2, 1, 0]);
    proxy.close().await;
}

#[tokio::test]
async fn a_restriction_is_recorded_for_its_account_and_operation() {
    for refusal in
        ["workspace_access_denied", "forbidden", "subscription_required", "unauthorized", "page=403"]
    {
        let proxy = start_proxy(rich()).await;
        proxy.simulator.always_on(FIRST_KEY, "/v1/text-to-speech", fault(refusal));
        for _ in 0..30 {
            assert_eq!(proxy.request_speech(10).await.status(), 200, "{refusal}");
        }
        assert_eq!(proxy.request_counts(&KEYS), [1, 30, 0], "{refusal}");
        let details: Value = proxy.get("/api/keychoir-keys").await.json().await.unwrap();
        let cannot = details["keys"][0]["cannot"].as_array().unwrap();
        assert_eq!(cannot.len(), 1, "{refusal}: {details}");
        assert_eq!(details["keys"][1]["cannot"], json!([]), "{refusal}");
        // The key still serves all other requests.
        assert_eq!(proxy.get("/v1/models").await.status(), 200, "{refusal}");
        proxy.close().await;
    }
}

#[tokio::test]
async fn a_plan_feature_is_requested_of_accounts_that_may_have_it() {
    const LIBRARY: &str = "LibraryVoice00000001";
    let mut plan = of_plans(&["free", "free", "creator"], 100_000);
    plan.library = vec![LIBRARY.to_owned()];
    let proxy = start_proxy(plan).await;
    let path = format!("/v1/text-to-speech/{LIBRARY}");
    let body = json!({"text": "hello", "model_id": "eleven_multilingual_v2"});
    let speak = || proxy.post(&path, &body);
    assert_eq!(speak().await.status(), 200);
    assert_eq!(proxy.request_counts(&KEYS), [1, 0, 1], "one of each plan before a second of the same");
    assert_eq!(speak().await.status(), 200);
    assert_eq!(proxy.request_counts(&KEYS), [1, 0, 2], "the second goes to the right one first");
    // Free accounts speak with the voices that they have.
    assert_eq!(proxy.request_speech(10).await.status(), 200);
    assert_eq!(proxy.request_counts(&KEYS), [2, 0, 2]);
    proxy.close().await;
}

#[tokio::test]
async fn an_output_format_is_requested_of_a_plan_that_has_it() {
    let proxy = start_proxy(of_plans(&["free", "creator", "pro"], 100_000)).await;
    for (format, hits) in
        [("mp3_44100_192", [0, 1, 0]), ("pcm_44100", [0, 1, 1]), ("mp3_44100_128", [1, 1, 1])]
    {
        let path = format!("{SPEECH_PATH}?output_format={format}");
        assert_eq!(proxy.post(&path, &json!({"text": "hello"})).await.status(), 200, "{format}");
        assert_eq!(proxy.request_counts(&KEYS), hits, "{format}");
    }
    proxy.close().await;
}

#[tokio::test]
async fn a_plans_refusal_is_replaced_in_every_form_it_has() {
    let check = |refusal: &'static str| async move {
        let proxy = start_proxy(of_plans(&["free", "free", "creator"], 100_000)).await;
        proxy.set_fault(FIRST_KEY, refusal);
        proxy.set_fault(SECOND_KEY, refusal);
        for _ in 0..3 {
            assert_eq!(proxy.request_speech(10).await.status(), 200, "{refusal}");
        }
        let hits = proxy.request_counts(&KEYS);
        assert!(hits[0] == 1 && hits[1] <= 1 && hits[2] == 3, "{refusal}: {hits:?}");
        assert_eq!(proxy.key_statuses().await, ["active"; 3], "{refusal}");
        proxy.close().await;
    };
    join_all(
        [
            "paid_plan_required",
            "payment_required_plan",
            "output_format_not_allowed",
            "free_users_not_allowed",
            "invalid_workspace_type",
            "cloning_not_allowed",
            "voice_limit_reached",
            "subscription_required",
            "text_too_long",
        ]
        .into_iter()
        .map(check),
    )
    .await;
}

/// Figures that a fresh poll contradicts count as words: they disable no account, and the client of
/// the odd request receives the refusal.
#[tokio::test]
async fn figures_that_a_poll_contradicts_take_no_account() {
    let refusal = |left: u64, needed: u64| {
        format!(
            r#"answer=401/{{"detail":{{"status":"quota_exceeded","message":"This request exceeds your quota of 1000000. You have {left} credits remaining, while {needed} credits are required for this request."}}}}"#
        )
    };
    for keys in [1, 3] {
        for (left, needed) in [(0, 43), (5, 17), (100, 900)] {
            let proxy = start_proxy(Plan::of(KEYS.into_iter().take(keys).map(|key| (key, 1_000_000)))).await;
            proxy.simulator.for_all_requests_on("/v1/sound-generation", fault(&refusal(left, needed)));
            for _ in 0..2 {
                let answer = proxy.post("/v1/sound-generation", &json!({"text": "rain"})).await;
                assert_eq!(answer.status(), 401, "{left} {keys}");
                assert!(keys == 1 || !answer.headers().contains_key("x-keychoir-error"), "{left} {keys}");
                assert_eq!(proxy.request_speech(1_000).await.status(), 200, "{left} {keys}");
            }
            assert_unharmed(&proxy, &format!("{left} {keys}")).await;
            proxy.close().await;
        }
    }
}

/// A cap that all keys report is tried again after a while, whatever the accounts' reset dates are.
#[tokio::test]
async fn a_cap_that_every_key_names_ends() {
    let refusal = r#"answer=401/{"detail":{"status":"quota_exceeded","message":"This request exceeds your API key (prod) quota of 5. You have 0 credits remaining, while 43 credits are required for this request."}}"#;
    let proxy = start_proxy_with(rich(), |config| config.pool.probe_after = Duration::from_millis(1)).await;
    proxy.simulator.for_all_requests_on("/v1/sound-generation", fault(refusal));
    assert_eq!(proxy.post("/v1/sound-generation", &json!({"text": "rain"})).await.status(), 401);
    assert_eq!(proxy.request_speech(10).await.status(), 200, "the cap of the first key is tried");
    assert_eq!(proxy.key_statuses().await[0], "active");
    assert_eq!(proxy.get("/readyz").await.status(), 200);
    proxy.close().await;
}

/// A rate limit that every account reports for one text ends for all of them when one serves the
/// next text.
#[tokio::test]
async fn a_rate_limit_of_one_text_ends_for_all_accounts_when_one_serves() {
    const ODD: &str = "/v1/text-to-speech/AVoiceThatIsRefused0";
    let proxy = start_proxy(rich()).await;
    proxy.simulator.for_all_requests_on(ODD, fault("rate_limit"));
    assert_eq!(proxy.post(ODD, &json!({"text": "hello"})).await.status(), 429);
    assert_eq!(proxy.request_speech(10).await.status(), 200);
    assert_eq!(proxy.key_statuses().await, ["active"; 3]);
    proxy.close().await;
}

/// B2: a request that waits for a busy key goes to a key whose rate limit for it ends meanwhile.
#[tokio::test]
async fn a_waiting_request_returns_to_the_key_that_was_rate_limited_for_it() {
    let plan = [FIRST_KEY, SECOND_KEY].into_iter().fold(Plan::of([]), |plan, key| {
        let workspace = WorkspacePlan { concurrency_max: Some(1), ..WorkspacePlan::new(key, 100_000) };
        plan.with_workspace(workspace)
            .with_key(KeyPlan { workspace: Some(key.to_owned()), ..KeyPlan::new(key, 0) })
    });
    let proxy = start_proxy(plan).await;
    // The account's concurrency limit is known from its first response.
    assert_eq!(proxy.request_speech(10).await.status(), 200);
    proxy.simulator.script(FIRST_KEY, vec!["stall=3600s".parse().unwrap()]);
    proxy.simulator.script(SECOND_KEY, vec!["rate_limit=1".parse().unwrap()]);
    let served = {
        let busy = proxy.request_speech(10);
        let waiting = async {
            wait_until(|| proxy.simulator.ledger().totals.in_flight == 1).await;
            proxy.request_speech(10).await
        };
        tokio::select! {
            biased;
            answer = busy => panic!("{answer:?}"),
            answer = waiting => answer,
        }
    };
    assert_eq!(served.status(), 200);
    assert_eq!(proxy.request_counts(&[SECOND_KEY]), [2]);
    let folder = proxy.close_unchecked().await;
    let file = rusqlite::Connection::open(folder.path().join("keychoir.db")).unwrap();
    let mut statement = file
        .prepare("SELECT started_at_ms, total_ms FROM attempts WHERE key_hash = ?1 ORDER BY number")
        .unwrap();
    let rows =
        statement.query_map([Fingerprint::new(SECOND_KEY).to_string()], |row| Ok((row.get(0)?, row.get(1)?)));
    let rows: Vec<(i64, i64)> = rows.unwrap().map(Result::unwrap).collect();
    let [(refused_at, refused_for), (served_at, _)] = rows[..] else { panic!("{rows:?}") };
    // The wait of a second is between the attempts, and no part of the first.
    assert!(served_at - (refused_at + refused_for) >= 500, "{rows:?}");
}

/// A restriction that a served request has refuted is not derived again from similar requests.
#[tokio::test]
async fn a_refuted_refusal_does_not_come_back() {
    const ODD: &str = "/v1/text-to-speech/AVoiceThatIsRefused0";
    let proxy = start_proxy(Plan::of([(FIRST_KEY, 1_000_000)])).await;
    proxy.simulator.for_all_requests_on(ODD, fault("unusual_activity"));
    for _ in 0..3 {
        assert_eq!(proxy.post(ODD, &json!({"text": "hello"})).await.status(), 401);
        assert_eq!(proxy.request_speech(10).await.status(), 200);
    }
    assert_eq!(proxy.post(ODD, &json!({"text": "hello"})).await.status(), 401);
    assert_unharmed(&proxy, "after the fourth").await;
    proxy.close().await;
}

async fn add_voice(proxy: &TestProxy) -> reqwest::Response {
    let form = "--b\r\ncontent-disposition: form-data; name=\"name\"\r\n\r\nmine\r\n--b\r\ncontent-disposition: form-data; \
                name=\"files\"; filename=\"a.mp3\"\r\n\r\nsound\r\n--b--\r\n";
    let request = proxy.client.post(format!("{}/v1/voices/add", proxy.url));
    let request = request.header("content-type", "multipart/form-data; boundary=b").body(form);
    request.send().await.unwrap()
}

/// Adding a voice costs no credits, so an account without credits serves it.
#[tokio::test]
async fn a_free_request_is_served_without_credits() {
    let proxy = start_proxy(Plan::of([(FIRST_KEY, 10)])).await;
    assert_eq!(proxy.request_speech(10).await.status(), 200);
    assert_proxy_error(&proxy.request_speech(10).await, 401, "all_keys_exhausted");
    assert_eq!(add_voice(&proxy).await.status(), 200);
    assert_eq!(proxy.get("/v1/voices").await.status(), 200);
    proxy.close().await;
}

#[tokio::test]
async fn an_account_with_full_slots_is_skipped_for_a_free_one() {
    let mut plan = of_plans(&["creator", "creator", "creator"], 100_000);
    plan.workspaces[0].voice_limit = Some(0);
    let proxy = start_proxy(plan).await;
    assert_eq!(add_voice(&proxy).await.status(), 200);
    assert_eq!(proxy.request_counts(&KEYS), [0, 1, 0], "its subscription says that it has no room");
    proxy.close().await;
}

#[tokio::test]
async fn keys_are_tried_while_the_refusal_is_about_a_permission() {
    let mut plan = rich();
    for key in &mut plan.keys[..2] {
        key.permissions = Some(vec!["text_to_speech".to_owned()]);
    }
    let proxy = start_proxy(plan).await;
    assert_eq!(proxy.get("/v1/voices").await.status(), 200);
    assert_eq!(proxy.request_counts(&KEYS), [1, 1, 1]);
    assert_eq!(proxy.get("/v1/voices").await.status(), 200);
    assert_eq!(proxy.request_counts(&KEYS), [1, 1, 2]);
    proxy.close().await;
}

/// Two keys, and a host that reports the first one as a key of another region.
fn without_one() -> Plan {
    let plan = Plan::of([(SECOND_KEY, 100_000), (THIRD_KEY, 100_000)]);
    Plan { other_region_keys: vec![FIRST_KEY.to_owned()], ..plan }
}

#[tokio::test]
async fn a_key_of_another_region_is_found_in_its_own() {
    let region = Simulator::start(crate::support::bind_loopback().await, Plan::of([(FIRST_KEY, 1_000)]))
        .await
        .unwrap();
    let url = region.base_url();
    let proxy = start_proxy_with(without_one(), |config| {
        config.keys.insert(0, KeyConfig::from(ApiKey::new(FIRST_KEY).unwrap()));
        config.upstream.region_base_urls = vec![url];
    })
    .await;
    assert_eq!(proxy.key_statuses().await, ["active"; 3], "the first poll has found it");
    assert_eq!(proxy.request_speech(10).await.status(), 200);
    assert_eq!(region.ledger().key(FIRST_KEY).unwrap().charged, 10);
    assert_eq!(proxy.request_counts(&KEYS), [0, 0, 0]);
}

#[tokio::test]
async fn a_key_of_an_unknown_region_is_explained() {
    let proxy = start_proxy_with(without_one(), |config| {
        config.keys.insert(0, KeyConfig::from(ApiKey::new(FIRST_KEY).unwrap()));
    })
    .await;
    assert_eq!(proxy.request_speech(10).await.status(), 200);
    let details: Value = proxy.get("/api/keychoir-keys").await.json().await.unwrap();
    assert_eq!(details["keys"][0]["reason"], "wrong_host", "{details}");
    let advice = details["keys"][0]["advice"].as_str().unwrap();
    assert!(advice.contains("base_url") && advice.contains("region"), "{advice}");
    proxy.close().await;
}

#[tokio::test]
async fn a_missing_resource_is_requested_of_one_account_the_next_time() {
    let proxy = start_proxy(rich()).await;
    let path = "/v1/text-to-speech/AVoiceThatNobodyHas0";
    assert_eq!(proxy.post(path, &json!({"text": "hello"})).await.status(), 404);
    assert_eq!(proxy.request_counts(&KEYS), [1, 1, 1]);
    for seen in 4..8 {
        assert_eq!(proxy.post(path, &json!({"text": "hello"})).await.status(), 404);
        assert_eq!(proxy.request_counts(&KEYS).iter().sum::<usize>(), seen);
    }
    proxy.close().await;
}

#[tokio::test]
async fn a_missing_path_is_requested_of_one_account() {
    let proxy = start_proxy(rich()).await;
    proxy.simulator.for_all_requests_on(SPEECH_PATH, fault(r#"answer=404/{"detail":"Not Found"}"#));
    for seen in 1..4 {
        assert_eq!(proxy.request_speech(10).await.status(), 404);
        assert_eq!(proxy.request_counts(&KEYS).iter().sum::<usize>(), seen);
    }
    proxy.close().await;
}

#[tokio::test]
async fn an_account_without_a_limit_is_never_spent() {
    for reported_limit in [ReportedLimit::Zero, ReportedLimit::Absent] {
        let workspace =
            WorkspacePlan { tier: "payg".to_owned(), reported_limit, ..WorkspacePlan::new("ws", 9_000) };
        let plan = Plan::of([]).with_workspace(workspace);
        let proxy = start_proxy(
            plan.with_key(KeyPlan { workspace: Some("ws".to_owned()), ..KeyPlan::new(FIRST_KEY, 0) }),
        )
        .await;
        assert_eq!(proxy.request_speech(50).await.status(), 200);
        assert_eq!(proxy.key_statuses().await, ["active"]);
        assert_eq!(proxy.get("/readyz").await.status(), 200);
        proxy.close().await;
    }
}

#[tokio::test]
async fn the_figures_of_a_refusal_end_with_its_cooldown() {
    let mut plan = Plan::of([(FIRST_KEY, 1_000)]);
    plan.keys[0].permissions = Some(vec!["text_to_speech".to_owned()]);
    let proxy = start_proxy_with(plan, |config| {
        config.pool.exhausted_cooldown = Duration::from_millis(50);
        config.pool.queue_timeout = Duration::from_millis(200);
    })
    .await;
    proxy.simulator.script(FIRST_KEY, vec![fault("quota").unwrap()]);
    assert_eq!(proxy.request_speech(10).await.status(), 401);
    let served = async { while proxy.request_speech(10).await.status() != 200 {} };
    tokio::time::timeout(Duration::from_secs(10), served).await.expect("it is asked again");
    assert_eq!(proxy.request_counts(&[FIRST_KEY]), [2], "once");
    proxy.close().await;
}

#[tokio::test]
async fn a_client_with_unknown_refusals_takes_no_key_from_others() {
    let check = |refusal: &'static str| async move {
        let proxy = start_proxy(rich()).await;
        proxy.simulator.for_all_requests_on("/v1/convai", fault(refusal));
        for _ in 0..5 {
            let before: usize = proxy.request_counts(&KEYS).iter().sum();
            assert_eq!(proxy.get("/v1/convai/agents").await.status(), 401, "{refusal}");
            assert_eq!(
                proxy.request_counts(&KEYS).iter().sum::<usize>() - before,
                2,
                "{refusal}: two accounts at most"
            );
            assert_unharmed(&proxy, refusal).await;
            let spoken: usize = proxy.request_counts(&KEYS).iter().sum::<usize>() - before - 2;
            assert_eq!(spoken, 1, "{refusal}");
        }
        proxy.close().await;
    };
    join_all(
        [
            "sign_in_required",
            "unauthorized",
            r#"answer=401/{"detail":{"code":"unauthorized","message":"No."}}"#,
            r#"answer=401/{"detail":{"code":"unheard_of","message":"No."}}"#,
            "answer=401/",
        ]
        .into_iter()
        .map(check),
    )
    .await;
}

#[tokio::test]
async fn a_429_of_an_intermediary_is_attributed_by_contrast() {
    let check = |refusal: &'static str| async move {
        let proxy = start_proxy(rich()).await;
        proxy.simulator.for_all_requests_on(SPEECH_PATH, fault(refusal));
        assert_eq!(proxy.request_speech(10).await.status(), 429, "{refusal}");
        assert_eq!(proxy.request_counts(&KEYS), [1, 1, 0], "{refusal}");
        proxy.simulator.for_all_requests_on(SPEECH_PATH, None);
        assert_unharmed(&proxy, refusal).await;
        proxy.close().await;
        // A single account refuses: the restriction is that account's, on that route.
        let proxy = crate::support::start_proxy(rich()).await;
        proxy.simulator.always_on(FIRST_KEY, SPEECH_PATH, fault(refusal));
        for _ in 0..3 {
            assert_eq!(proxy.request_speech(10).await.status(), 200, "{refusal}");
        }
        let hits = proxy.request_counts(&KEYS);
        assert_eq!(hits, [1, 3, 0], "{refusal}");
        proxy.close().await;
    };
    join_all(["answer=429/", "answer=429/error code: 1015", "page=429"].into_iter().map(check)).await;
}

#[tokio::test]
async fn an_overloaded_account_is_replaced_by_another() {
    let proxy = start_proxy(rich()).await;
    proxy.set_fault(FIRST_KEY, "system_busy");
    assert_eq!(proxy.request_speech(10).await.status(), 200);
    assert_eq!(proxy.request_counts(&KEYS), [1, 1, 0]);
    assert_eq!(proxy.key_statuses().await, ["active"; 3]);
    proxy.close().await;
}

#[tokio::test]
async fn a_request_waits_for_a_cooldown_that_ends_before_a_slot_is_free() {
    let one = WorkspacePlan { concurrency_max: Some(1), ..WorkspacePlan::new("ws_0", 100_000) };
    let mut plan = of_plans(&["creator", "creator"], 100_000);
    plan.workspaces[0] = one;
    let proxy =
        start_proxy_with(plan, |config| config.pool.rate_limited_cooldown = Duration::from_millis(100)).await;
    proxy.set_fault(FIRST_KEY, "slow_body=600000");
    let held = proxy.request_speech(500).await;
    assert_eq!(held.status(), 200);
    proxy.simulator.script(SECOND_KEY, vec![fault("rate_limit").unwrap()]);
    let fresh = async {
        wait_until(|| proxy.request_counts(&[SECOND_KEY]) == [1]).await;
        let answer = tokio::time::timeout(Duration::from_secs(10), proxy.request_speech(10)).await;
        assert_eq!(answer.expect("the cooldown wakes it").status(), 200);
        assert_eq!(proxy.request_counts(&[SECOND_KEY]), [2]);
        drop(held);
    };
    // The limited request waits for the other account.
    let (limited, ()) = tokio::join!(proxy.request_speech(10), fresh);
    assert_eq!(limited.status(), 200);
}

/// A text above the free plan's limit goes to an account whose plan permits it.
#[tokio::test]
async fn a_long_text_is_sent_with_a_plan_that_allows_it() {
    let proxy = start_proxy(of_plans(&["free", "creator"], 100_000)).await;
    // The model list contains the limit of a free account; the free one is not tried.
    let text = "a".repeat(5_001);
    let body = json!({"text": text, "model_id": "eleven_multilingual_v2"});
    let answer = proxy.post(&format!("/v1/text-to-speech/{VOICE_ID}"), &body).await;
    assert_eq!(answer.status(), 200);
    let hits = proxy.request_counts(&[FIRST_KEY, SECOND_KEY]);
    assert_eq!(hits[1], 1, "{hits:?}");
    answer.bytes().await.unwrap();
    wait_until(|| proxy.simulator.ledger().totals.in_flight == 0).await;
    proxy.close().await;
}

//! Simulates a month of traffic in seconds: four clients use eight keys of five workspaces, with quota resets, a
//! revoked key, a workspace with an unpaid bill and a burst. A second month has mixed plans, where a request
//! for a plan feature needs a key of a plan that includes it. Every request must be served, and at most 2 % of the
//! requests may be retried.

use std::time::Duration;

use crate::support::{CLIENT_TOKEN, SPEECH_PATH, TestProxy, join_all, start_proxy_with};
use keychoir::clock;
use keychoir::config::{ClientConfig, Config};
use keychoir::policy::client::Rules;
use keychoir::policy::units::UnixMs;
use keychoir::secret::TokenFingerprint;
use keychoir::simulator::{KeyPlan, Ledger, Plan, WorkspacePlan};
use serde_json::{Value, json};

/// The name, the token and the number of concurrent requests of each client.
const CLIENTS: [(&str, &str, usize); 4] = [
    ("narrator", CLIENT_TOKEN, 3),
    ("phone", "token-of-the-phone-0000000002", 2),
    ("game", "token-of-the-game-00000000003", 2),
    ("reader", "token-of-the-reader-000000004", 1),
];
/// The name, the credits per period, the concurrency limit and the period in seconds of each workspace. The
/// last one has enough credits for all requests, so that every request can be served.
const WORKSPACES: [(&str, u64, u32, Option<u64>); 5] = [
    ("ws_a", 1_500, 2, Some(1)),
    ("ws_b", 2_500, 3, Some(2)),
    ("ws_c", 100_000, 5, None),
    ("ws_d", 4_000, 3, None),
    ("ws_e", 10_000_000, 5, None),
];
/// The index of the workspace of each key.
const KEYS: [(&str, usize); 8] = [
    ("sk_month_a1_000000000000000000000000000000000001", 0),
    ("sk_month_a2_000000000000000000000000000000000002", 0),
    ("sk_month_b1_000000000000000000000000000000000003", 1),
    ("sk_month_c1_000000000000000000000000000000000004", 2),
    ("sk_month_c2_000000000000000000000000000000000005", 2),
    ("sk_month_d1_000000000000000000000000000000000006", 3),
    ("sk_month_e1_000000000000000000000000000000000007", 4),
    ("sk_month_e2_000000000000000000000000000000000008", 4),
];
const REVOKED_KEY: &str = KEYS[2].0;
const PAST_DUE_KEYS: [&str; 2] = [KEYS[3].0, KEYS[4].0];

/// The number of requests in each of the six phases of the month.
const REQUESTS_PER_PHASE: usize = 280;
/// The number of concurrent requests between the last two phases.
const BURST_REQUESTS: usize = 40;
/// The maximum average number of attempts. At most 2 % of the requests may be retried.
const MAX_ATTEMPTS_PER_REQUEST: f64 = 1.02;

fn plan() -> Plan {
    // The provider reports dates in whole seconds.
    let next_second = UnixMs((clock::now().0 / 1_000 + 2) * 1_000);
    let workspaces = WORKSPACES.map(|(name, credits, concurrency, period)| WorkspacePlan {
        max_concurrent: Some(concurrency),
        tier: "custom".to_owned(),
        reset: period.map(|_| next_second),
        period: period.map(Duration::from_secs),
        ..WorkspacePlan::new(name, credits)
    });
    let keys = KEYS.map(|(key, workspace)| KeyPlan {
        workspace: Some(WORKSPACES[workspace].0.to_owned()),
        ..KeyPlan::new(key, 0)
    });
    let mut plan = Plan { keys: keys.into(), workspaces: workspaces.into(), ..Plan::default() };
    for (_, token, _) in &CLIENTS[1..] {
        plan = plan.with_forbidden_text(token);
    }
    plan
}

fn configure_proxy(config: &mut Config) {
    let client = |(name, token, _): (&str, &str, _)| {
        ClientConfig::new(name.to_owned(), TokenFingerprint::new(token), Rules::default())
    };
    config.clients = CLIENTS.map(client).into();
    // A second of the test represents a week.
    config.quota_polling.interval = Duration::from_secs(1);
    config.quota_polling.quota_lag = Duration::from_secs(1);
    config.pool.concurrency_cooldown = Duration::from_millis(20);
}

/// A deterministic pseudorandom sequence (xorshift64).
struct Random(u64);

impl Random {
    fn number_below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

/// The path of a request, and the body if it is a POST.
type PlannedRequest = (String, Option<Value>);

fn speech_body(text: &str, model: &str) -> Option<Value> {
    Some(json!({"text": text, "model_id": model}))
}

/// Returns a random request: mostly speech of varying length and model, and sometimes a sound effect or the list of
/// voices.
fn next_ordinary_request(random: &mut Random) -> PlannedRequest {
    let text = "a".repeat(usize::try_from(3 + random.number_below(40)).unwrap());
    match random.number_below(10) {
        0 => ("/v1/voices".to_owned(), None),
        1 => {
            let seconds = 0.5 + random.number_below(2) as f64 / 4.0;
            ("/v1/sound-generation".to_owned(), Some(json!({"text": "rain", "duration_seconds": seconds})))
        }
        2..5 => (format!("{SPEECH_PATH}/stream"), speech_body(&text, "eleven_flash_v2_5")),
        _ => (SPEECH_PATH.to_owned(), speech_body(&text, "eleven_multilingual_v2")),
    }
}

/// Returns an ordinary request or one that needs a feature which the free or the creator plan lacks.
fn next_plan_dependent_request(random: &mut Random) -> PlannedRequest {
    let text = "a".repeat(usize::try_from(3 + random.number_below(40)).unwrap());
    let multilingual = |text: &str| speech_body(text, "eleven_multilingual_v2");
    match random.number_below(20) {
        0 | 1 => (format!("/v1/text-to-speech/{LIBRARY_VOICE}"), multilingual(&text)),
        2 => (SPEECH_PATH.to_owned(), multilingual(&"a".repeat(2_501))),
        3 | 4 => (format!("{SPEECH_PATH}?output_format=mp3_44100_192"), multilingual(&text)),
        5 => (format!("{SPEECH_PATH}?output_format=pcm_44100"), multilingual(&text)),
        _ => next_ordinary_request(random),
    }
}

/// Sends a planned request with the token of a client.
///
/// # Errors
///
/// Describes the response if its status is not 200 or if its body is incomplete.
async fn send_request(proxy: &TestProxy, token: &str, (path, body): PlannedRequest) -> Result<(), String> {
    let url = format!("{}{path}", proxy.url);
    let request = match &body {
        Some(body) => proxy.client.post(url).json(body),
        None => proxy.client.get(url),
    };
    let response = request.header("xi-api-key", token).send().await.unwrap();
    let status = response.status();
    let text = response.bytes().await.map_err(|error| error.to_string())?;
    if status == 200 { Ok(()) } else { Err(format!("{path}: {status}: {}", String::from_utf8_lossy(&text))) }
}

/// Sends `requests` requests, which the clients share by their concurrency. All requests must be served.
async fn send_requests(
    proxy: &TestProxy,
    requests: usize,
    seed: u64,
    next_request: fn(&mut Random) -> PlannedRequest,
) {
    let concurrency: usize = CLIENTS.iter().map(|(_, _, concurrency)| concurrency).sum();
    let tokens = CLIENTS.iter().flat_map(|(_, token, concurrency)| std::iter::repeat_n(*token, *concurrency));
    let requests_per_connection = requests / concurrency;
    assert_eq!(requests_per_connection * concurrency, requests, "the connections must share all requests");
    let send_in_sequence = |(number, token): (u64, &'static str)| async move {
        let mut random = Random(seed * 1_000 + number + 1);
        for _ in 0..requests_per_connection {
            send_request(proxy, token, next_request(&mut random)).await?;
        }
        Ok::<(), String>(())
    };
    let results = join_all((0..).zip(tokens).map(send_in_sequence)).await;
    assert_eq!(results.into_iter().collect::<Result<Vec<()>, String>>().map(|_| ()), Ok(()));
}

/// Waits until the provider has reset the credits of the workspace. The clients send no requests during the wait, so
/// only a poll can detect the reset.
async fn wait_for_reset(proxy: &TestProxy, workspace: &str) {
    let is_reset = |ledger: &Ledger| ledger.workspace(workspace).unwrap().used == 0;
    let waiting = proxy.simulator.wait_for_ledger(is_reset);
    tokio::time::timeout(Duration::from_secs(30), waiting).await.unwrap();
}

fn charged_credits(ledger: &Ledger, workspace: &str) -> u64 {
    ledger.keys.iter().filter(|key| key.workspace == workspace).map(|key| key.charged).sum()
}

#[tokio::test]
async fn every_request_of_a_simulated_month_is_served() {
    let proxy = start_proxy_with(plan(), configure_proxy).await;
    // In the first days, the keys are exhausted one after the other.
    send_requests(&proxy, REQUESTS_PER_PHASE, 1, next_ordinary_request).await;
    send_requests(&proxy, REQUESTS_PER_PHASE, 2, next_ordinary_request).await;
    // The first two workspaces are reset and exhausted again.
    for workspace in ["ws_a", "ws_b"] {
        wait_for_reset(&proxy, workspace).await;
    }
    send_requests(&proxy, REQUESTS_PER_PHASE, 3, next_ordinary_request).await;
    // The revoked key is selected when the first workspace is exhausted again.
    wait_for_reset(&proxy, "ws_b").await;
    proxy.set_fault(REVOKED_KEY, "invalid");
    // Polls with the key fail without a refusal of the key, so that only a request of a client can detect that the key
    // is revoked.
    proxy.simulator.set_route_fault(REVOKED_KEY, POLL_PATH, Some("server_error".parse().unwrap()));
    send_requests(&proxy, REQUESTS_PER_PHASE, 4, next_ordinary_request).await;
    proxy.simulator.set_route_fault(REVOKED_KEY, POLL_PATH, None);
    for key in PAST_DUE_KEYS {
        proxy.set_fault(key, "payment_issue");
    }
    send_requests(&proxy, REQUESTS_PER_PHASE, 5, next_ordinary_request).await;
    let burst =
        (0..BURST_REQUESTS).map(|number| {
            let token = CLIENTS[number % CLIENTS.len()].1;
            let proxy = &proxy;
            async move {
                send_request(proxy, token, next_ordinary_request(&mut Random(7_000 + number as u64))).await
            }
        });
    assert_eq!(join_all(burst).await.into_iter().collect::<Result<Vec<()>, String>>().map(|_| ()), Ok(()));
    // The first workspace is reset once more.
    let charged_before = charged_credits(&proxy.simulator.ledger(), "ws_a");
    wait_for_reset(&proxy, "ws_a").await;
    send_requests(&proxy, REQUESTS_PER_PHASE, 6, next_ordinary_request).await;
    let charged_after = charged_credits(&proxy.simulator.ledger(), "ws_a");
    assert!(charged_after > charged_before, "credits must be spent after their reset");

    let statuses = proxy.key_statuses().await;
    assert_eq!(statuses[2], "invalid");
    assert_eq!(proxy.app.queued_requests(), 0);
    let (ledger, directory) = proxy.close().await;
    println!("{} credits", ledger.totals.charged);
    for ((name, credits, concurrency, period), workspace) in WORKSPACES.iter().zip(&ledger.workspaces) {
        assert!(
            workspace.running == 0 && workspace.peak_running <= *concurrency,
            "the workspace must stay within its concurrency limit and have no open requests: {workspace:?}"
        );
        let charged_credits = charged_credits(&ledger, name);
        assert!(
            charged_credits > 0 && (period.is_some() || charged_credits <= *credits),
            "{name} must be charged at most its credits, and not {charged_credits}"
        );
    }
    let attempts = AttemptRecords::open(&directory);
    assert_eq!(attempts.count("count(DISTINCT request_id)"), 6 * REQUESTS_PER_PHASE + BURST_REQUESTS);
    assert_eq!(attempts.count("count(DISTINCT client)"), 4);
    for verdict in ["invalid_key", "billing"] {
        let refusals = attempts.count(&format!("count(*) FILTER (WHERE verdict = '{verdict}')"));
        assert!(refusals > 0, "{verdict}: the provider must have refused a request");
    }
    attempts.assert_few_retries();
}

/// The usage records of all attempts.
struct AttemptRecords(rusqlite::Connection);

impl AttemptRecords {
    fn open(directory: &tempfile::TempDir) -> Self {
        Self(rusqlite::Connection::open(directory.path().join("keychoir.db")).unwrap())
    }

    fn count(&self, expression: &str) -> usize {
        let count: i64 =
            self.0.query_row(&format!("SELECT {expression} FROM attempts"), [], |row| row.get(0)).unwrap();
        usize::try_from(count).unwrap()
    }

    /// Asserts that there were on average fewer than [`MAX_ATTEMPTS_PER_REQUEST`] attempts per request.
    fn assert_few_retries(&self) {
        let (requests, attempts) = (self.count("count(DISTINCT request_id)"), self.count("count(*)"));
        let ratio = attempts as f64 / requests as f64;
        println!("{requests} requests, {attempts} attempts: {ratio:.4} attempts per request");
        assert!(ratio < MAX_ATTEMPTS_PER_REQUEST, "{requests} requests must not need {attempts} attempts");
    }
}

/// The path that the quota poller requests.
const POLL_PATH: &str = "/v1/user/subscription";

/// A voice of the library, which free plans may not use.
const LIBRARY_VOICE: &str = "HuLbOdhRlvQQN8oPP0AJ";

/// The plan, the credits per period, the concurrency limit and the period in seconds of workspaces with one
/// key each. The last one can serve every request and has enough credits for all of them.
const MIXED_WORKSPACES: [(&str, u64, u32, Option<u64>); 6] = [
    ("free", 3_000, 2, Some(2)),
    ("free", 3_000, 2, Some(3)),
    ("free", 3_000, 2, None),
    ("creator", 40_000, 5, None),
    ("creator", 60_000, 5, None),
    ("pro", 10_000_000, 10, None),
];

fn mixed_plan() -> Plan {
    let next_second = UnixMs((clock::now().0 / 1_000 + 2) * 1_000);
    let mut plan = Plan { library: vec![LIBRARY_VOICE.to_owned()], ..Plan::with_keys([]) };
    for (number, (tier, credits, concurrency, period)) in MIXED_WORKSPACES.into_iter().enumerate() {
        let name = format!("ws_{number}");
        plan = plan.with_workspace(WorkspacePlan {
            max_concurrent: Some(concurrency),
            reset: period.map(|_| next_second),
            period: period.map(Duration::from_secs),
            ..WorkspacePlan::of_tier(&name, credits, tier)
        });
        let key = format!("sk_mixed_{number}_00000000000000000000000000000000000");
        plan = plan.with_key(KeyPlan { workspace: Some(name), ..KeyPlan::new(&key, 0) });
    }
    CLIENTS[1..].iter().fold(plan, |plan, (_, token, _)| plan.with_forbidden_text(token))
}

#[tokio::test]
async fn every_request_of_a_simulated_month_with_mixed_plans_is_served() {
    let proxy = start_proxy_with(mixed_plan(), configure_proxy).await;
    for seed in 1..=4 {
        send_requests(&proxy, REQUESTS_PER_PHASE, seed, next_plan_dependent_request).await;
    }
    let (ledger, directory) = proxy.close().await;
    for number in [0, 3, 5] {
        let name = format!("ws_{number}");
        assert!(charged_credits(&ledger, &name) > 0, "{name} must have served requests");
    }
    let attempts = AttemptRecords::open(&directory);
    let refused_attempts = attempts.count("count(*) FILTER (WHERE verdict = 'plan_feature')");
    println!("{refused_attempts} attempts were refused because of a plan feature");
    // After one free account has refused a feature, the proxy requests it from no other free account. Only requests
    // that are sent before this refusal can be refused as well.
    assert!(refused_attempts <= 8, "plan features must refuse at most 8 attempts, not {refused_attempts}");
    attempts.assert_few_retries();
}

//! A month in seconds: eight keys of five workspaces, four clients, resets, a revoked key, a
//! workspace past due and a burst, through the whole program. And one of mixed plans: requests for
//! features of a plan go to a key of such a plan.

use std::time::Duration;

use crate::support::{CLIENT_TOKEN, SPEECH_PATH, TestProxy, join_all, start_proxy_with};
use keychoir::clock;
use keychoir::config::{ClientConfig, Config};
use keychoir::policy::client::Rules;
use keychoir::policy::units::UnixMs;
use keychoir::secret::TokenFingerprint;
use keychoir::simulator::{KeyPlan, Ledger, Plan, WorkspacePlan};
use serde_json::{Value, json};

/// The clients, the token of each, and its number of concurrent requests.
const CLIENTS: [(&str, &str, usize); 4] = [
    ("narrator", CLIENT_TOKEN, 3),
    ("phone", "token-of-the-phone-0000000002", 2),
    ("game", "token-of-the-game-00000000003", 2),
    ("reader", "token-of-the-reader-000000004", 1),
];
/// The workspaces: credits of a period, concurrency limit, the length of a period in seconds. The
/// last one never runs out, so one key can always serve.
const WORKSPACES: [(&str, u64, u32, Option<u64>); 5] = [
    ("ws_a", 1_500, 2, Some(1)),
    ("ws_b", 2_500, 3, Some(2)),
    ("ws_c", 100_000, 5, None),
    ("ws_d", 4_000, 3, None),
    ("ws_e", 10_000_000, 5, None),
];
/// The workspace of each key.
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
const REVOKED: &str = KEYS[2].0;
const PAST_DUE: [&str; 2] = [KEYS[3].0, KEYS[4].0];

/// Requests of a part of the month; there are six parts, and the burst.
const PART: usize = 280;
const STORM: usize = 40;
/// Maximum attempts per request: at most 2 % of them may be retried.
const ATTEMPTS_MAX: f64 = 1.02;

fn plan() -> Plan {
    // The provider reports dates in whole seconds.
    let next_second = UnixMs((clock::now().0 / 1_000 + 2) * 1_000);
    let workspaces = WORKSPACES.map(|(name, credits, places, period)| WorkspacePlan {
        concurrency_max: Some(places),
        tier: "a plan of its own".to_owned(),
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
        plan = plan.forbidding(token);
    }
    plan
}

fn settings(config: &mut Config) {
    let client = |(name, token, _): (&str, &str, _)| ClientConfig {
        name: name.to_owned(),
        token: TokenFingerprint::new(token),
        rules: Rules::default(),
    };
    config.clients = CLIENTS.map(client).into();
    // A second stands for a week.
    config.quota_polling.interval = Duration::from_secs(1);
    config.quota_polling.quota_lag = Duration::from_secs(1);
    config.pool.concurrency_cooldown = Duration::from_millis(20);
}

/// A deterministic pseudorandom sequence.
struct Chance(u64);

impl Chance {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

/// A path, and a body to post.
type Wanted = (String, Option<Value>);

fn speech(text: &str, model: &str) -> Option<Value> {
    Some(json!({"text": text, "model_id": model}))
}

/// Mostly speech of varying length, format and model; sometimes a sound effect, or the list of
/// voices.
fn ordinary(chance: &mut Chance) -> Wanted {
    let text = "a".repeat(usize::try_from(3 + chance.below(40)).unwrap());
    match chance.below(10) {
        0 => ("/v1/voices".to_owned(), None),
        1 => {
            let seconds = 0.5 + chance.below(2) as f64 / 4.0;
            ("/v1/sound-generation".to_owned(), Some(json!({"text": "rain", "duration_seconds": seconds})))
        }
        2..5 => (format!("{SPEECH_PATH}/stream"), speech(&text, "eleven_flash_v2_5")),
        _ => (SPEECH_PATH.to_owned(), speech(&text, "eleven_multilingual_v2")),
    }
}

/// The same, mixed with features that the free or creator plan lacks.
fn demanding(chance: &mut Chance) -> Wanted {
    let text = "a".repeat(usize::try_from(3 + chance.below(40)).unwrap());
    let multilingual = |text: &str| speech(text, "eleven_multilingual_v2");
    match chance.below(20) {
        0 | 1 => (format!("/v1/text-to-speech/{LIBRARY_VOICE}"), multilingual(&text)),
        2 => (SPEECH_PATH.to_owned(), multilingual(&"a".repeat(2_501))),
        3 | 4 => (format!("{SPEECH_PATH}?output_format=mp3_44100_192"), multilingual(&text)),
        5 => (format!("{SPEECH_PATH}?output_format=pcm_44100"), multilingual(&text)),
        _ => ordinary(chance),
    }
}

/// Sends a request; returns the deviation of its response.
async fn ask(proxy: &TestProxy, token: &str, (path, body): Wanted) -> Result<(), String> {
    let url = format!("{}{path}", proxy.url);
    let request = match &body {
        Some(body) => proxy.client.post(url).json(body),
        None => proxy.client.get(url),
    };
    let answer = request.header("xi-api-key", token).send().await.unwrap();
    let status = answer.status();
    let text = answer.bytes().await.map_err(|error| error.to_string())?;
    if status == 200 { Ok(()) } else { Err(format!("{path}: {status}: {}", String::from_utf8_lossy(&text))) }
}

/// All clients send requests up to this total. Every request is served.
async fn traffic(proxy: &TestProxy, requests: usize, seed: u64, wanted: fn(&mut Chance) -> Wanted) {
    let at_once: usize = CLIENTS.iter().map(|(_, _, at_once)| at_once).sum();
    let each = CLIENTS.iter().flat_map(|(_, token, at_once)| std::iter::repeat_n(*token, *at_once));
    let share = requests / at_once;
    assert_eq!(share * at_once, requests);
    let row = |(number, token): (u64, &'static str)| async move {
        let mut chance = Chance(seed * 1_000 + number + 1);
        for _ in 0..share {
            ask(proxy, token, wanted(&mut chance)).await?;
        }
        Ok::<(), String>(())
    };
    let ended = join_all((0..).zip(each).map(row)).await;
    assert_eq!(ended.into_iter().collect::<Result<Vec<()>, String>>().map(|_| ()), Ok(()));
}

/// Waits until the credits of the workspace were reset.
async fn reset(proxy: &TestProxy, workspace: &str) {
    let is_new = |ledger: &Ledger| ledger.workspace(workspace).unwrap().used == 0;
    let waiting = proxy.simulator.until(is_new);
    // Without requests only the poller detects the reset.
    tokio::time::timeout(Duration::from_secs(30), waiting).await.unwrap();
}

fn charged(ledger: &Ledger, workspace: &str) -> u64 {
    ledger.keys.iter().filter(|key| key.workspace == workspace).map(|key| key.charged).sum()
}

#[tokio::test]
async fn a_month_in_seconds() {
    let proxy = start_proxy_with(plan(), settings).await;
    // The first days: the keys are exhausted one after the other.
    traffic(&proxy, PART, 1, ordinary).await;
    traffic(&proxy, PART, 2, ordinary).await;
    // The first two are reset, and exhausted again.
    for workspace in ["ws_a", "ws_b"] {
        reset(&proxy, workspace).await;
    }
    traffic(&proxy, PART, 3, ordinary).await;
    // It is selected when the first is exhausted again.
    reset(&proxy, "ws_b").await;
    proxy.set_fault(REVOKED, "invalid");
    // No poll finds that before a request does.
    proxy.simulator.always_on(REVOKED, POLL, Some("server_error".parse().unwrap()));
    traffic(&proxy, PART, 4, ordinary).await;
    proxy.simulator.always_on(REVOKED, POLL, None);
    for key in PAST_DUE {
        proxy.set_fault(key, "payment_issue");
    }
    traffic(&proxy, PART, 5, ordinary).await;
    // Forty concurrent requests.
    let storm = (0..STORM).map(|number| {
        let token = CLIENTS[number % CLIENTS.len()].1;
        let proxy = &proxy;
        async move { ask(proxy, token, ordinary(&mut Chance(7_000 + number as u64))).await }
    });
    assert_eq!(join_all(storm).await.into_iter().collect::<Result<Vec<()>, String>>().map(|_| ()), Ok(()));
    // A day later the first is reset once more.
    let before = charged(&proxy.simulator.ledger(), "ws_a");
    reset(&proxy, "ws_a").await;
    traffic(&proxy, PART, 6, ordinary).await;
    let after = charged(&proxy.simulator.ledger(), "ws_a");
    assert!(after > before, "credits that have come back are spent");

    let stands = proxy.key_statuses().await;
    assert_eq!(stands[2], "invalid");
    assert_eq!(proxy.app.waiting(), 0);
    let (ledger, folder) = proxy.close().await;
    println!("{} credits", ledger.totals.charged);
    for ((name, credits, places, period), workspace) in WORKSPACES.iter().zip(&ledger.workspaces) {
        assert!(workspace.running == 0 && workspace.running_max <= *places, "{workspace:?}");
        let charged = charged(&ledger, name);
        assert!(charged > 0 && (period.is_some() || charged <= *credits), "{name}: {charged}");
    }
    let attempts = Attempts::in_books(&folder);
    assert_eq!(attempts.count("count(DISTINCT request_id)"), 6 * PART + STORM);
    assert_eq!(attempts.count("count(DISTINCT client)"), 4);
    for verdict in ["invalid_key", "billing"] {
        let met = attempts.count(&format!("count(*) FILTER (WHERE verdict = '{verdict}')"));
        assert!(met > 0, "{verdict}: a key was asked while it was refused");
    }
    attempts.assert_few();
}

/// The usage records of all attempts.
struct Attempts(rusqlite::Connection);

impl Attempts {
    fn in_books(folder: &tempfile::TempDir) -> Self {
        Self(rusqlite::Connection::open(folder.path().join("keychoir.db")).unwrap())
    }

    fn count(&self, what: &str) -> usize {
        let count: i64 =
            self.0.query_row(&format!("SELECT {what} FROM attempts"), [], |row| row.get(0)).unwrap();
        usize::try_from(count).unwrap()
    }

    fn assert_few(&self) {
        let (requests, attempts) = (self.count("count(DISTINCT request_id)"), self.count("count(*)"));
        let ratio = attempts as f64 / requests as f64;
        println!("{requests} requests, {attempts} attempts: {ratio:.4} each");
        assert!(ratio < ATTEMPTS_MAX, "{attempts} attempts of {requests} requests");
    }
}

/// The path that polls ask.
const POLL: &str = "/v1/user/subscription";

/// A voice of the library, which free plans may not use.
const LIBRARY_VOICE: &str = "HuLbOdhRlvQQN8oPP0AJ";

/// Plans, credits, concurrency limits and periods of workspaces with a key each. The last one
/// serves every request and never runs out.
const MIXED: [(&str, u64, u32, Option<u64>); 6] = [
    ("free", 3_000, 2, Some(2)),
    ("free", 3_000, 2, Some(3)),
    ("free", 3_000, 2, None),
    ("creator", 40_000, 5, None),
    ("creator", 60_000, 5, None),
    ("pro", 10_000_000, 10, None),
];

fn mixed_plan() -> Plan {
    let next_second = UnixMs((clock::now().0 / 1_000 + 2) * 1_000);
    let mut plan = Plan { library: vec![LIBRARY_VOICE.to_owned()], ..Plan::of([]) };
    for (number, (tier, credits, places, period)) in MIXED.into_iter().enumerate() {
        let name = format!("ws_{number}");
        plan = plan.with_workspace(WorkspacePlan {
            concurrency_max: Some(places),
            reset: period.map(|_| next_second),
            period: period.map(Duration::from_secs),
            ..WorkspacePlan::of_tier(&name, credits, tier)
        });
        let key = format!("sk_mixed_{number}_00000000000000000000000000000000000");
        plan = plan.with_key(KeyPlan { workspace: Some(name), ..KeyPlan::new(&key, 0) });
    }
    CLIENTS[1..].iter().fold(plan, |plan, (_, token, _)| plan.forbidding(token))
}

#[tokio::test]
async fn a_month_of_mixed_plans() {
    let proxy = start_proxy_with(mixed_plan(), settings).await;
    for seed in 1..=4 {
        traffic(&proxy, PART, seed, demanding).await;
    }
    let (ledger, folder) = proxy.close().await;
    for number in [0, 3, 5] {
        let name = format!("ws_{number}");
        assert!(charged(&ledger, &name) > 0, "{name} has served");
    }
    let attempts = Attempts::in_books(&folder);
    let refused = attempts.count("count(*) FILTER (WHERE verdict = 'plan_feature')");
    println!("{refused} attempts met what a plan does not have");
    // The library voice is refused by one free account: the others are then known to lack it.
    assert!(refused <= 8, "{refused}: as many as may be under way when it is learned");
    attempts.assert_few();
}

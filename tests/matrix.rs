//! Every refusal that the provider knows × the moment it comes × every strategy: what the client
//! sees, how the refused key stands afterwards, and how often the provider was asked. One table,
//! [`CLASSES`], says all of it.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends at its first surprise"
)]

mod house;

use std::time::Duration;

use house::{ONE, SPEECH, THREE, TWO, house_with, join_all};
use keychoir::clock;
use keychoir::simulator::{KeyPlan, Plan, WorkspacePlan};
use serde_json::json;

const KEYS: [&str; 3] = [ONE, TWO, THREE];

/// What becomes of a request whose first key is refused.
#[derive(Clone, Copy, Debug)]
enum Outcome {
    /// The next key serves it, and the refused one stands so.
    Replaced(&'static str),
    /// The refusal is the client's answer, with this status, and nobody else is asked.
    Relayed(u16),
    /// It is the provider's trouble and not the key's: whoever is first then is asked once more. A
    /// strategy that takes turns asks another one, all others the same.
    Again(u16),
}
use Outcome::{Again, Relayed, Replaced};

const CLASSES: [(&str, Outcome); 30] = [
    // Out of credits: the workspace, or the key by its own cap.
    ("quota", Replaced("exhausted")),
    ("key_cap", Replaced("exhausted")),
    ("insufficient_credits", Replaced("exhausted")),
    ("quota_403", Replaced("exhausted")),
    // Locked: a person must look.
    ("payment_issue", Replaced("exhausted")),
    ("unusual_activity", Replaced("exhausted")),
    // No key of the provider's.
    ("invalid", Replaced("invalid")),
    ("invalid_400", Replaced("invalid")),
    // Too many in a span of time.
    ("rate_limit", Replaced("rate_limited")),
    ("rate_limit=30", Replaced("rate_limited")),
    // Too many at once, which is no fault of the key.
    ("concurrency", Replaced("active")),
    // The key may not do this, or its plan has it not: it is as good for everything else.
    ("missing_permissions", Replaced("active")),
    ("missing_permissions=unheard_of", Replaced("active")),
    ("paid_plan_required", Replaced("active")),
    ("subscription_required", Replaced("active")),
    ("workspace_access_denied", Replaced("active")),
    // Without a reason. Another key was served the same, so it was the key, but for 403.
    ("needs_authorization", Replaced("invalid")),
    ("page=401", Replaced("invalid")),
    ("page=402", Replaced("exhausted")),
    ("page=403", Replaced("active")),
    ("forbidden", Replaced("active")),
    ("page=429", Replaced("rate_limited")),
    // Not in this account, perhaps in another.
    ("voice_not_found", Replaced("active")),
    // The client's own mistake.
    ("model_not_found", Relayed(400)),
    ("text_too_long", Relayed(400)),
    ("unprocessable", Relayed(422)),
    // The work may have been done.
    ("server_error", Relayed(500)),
    ("page=502", Relayed(502)),
    // The provider has no time, whoever asks.
    ("system_busy", Again(429)),
    ("maintenance", Again(503)),
];

/// When the refusal comes, in the words of the simulator: as soon as the head is read, in the middle
/// of the body, after all of it, and then compressed.
const STAGES: [&str; 4] = ["early:", "mid=200:", "", "gzip:"];

/// Of the text: its middle is far from its ends, and its sound is soon made.
const CHARACTERS: usize = 400;

/// Each strategy, and the key that it asks first of [`plan`].
const STRATEGIES: [(&str, &str); 5] = [
    ("fill-first", ONE),
    ("round-robin", ONE),
    ("most-remaining", TWO),
    ("least-busy", ONE),
    ("soonest-reset", THREE),
];

/// Cases that run at once.
const AT_ONCE: usize = 10;

/// Three workspaces with a key each: the second is the richest, the third's credits expire first.
fn plan() -> Plan {
    let workspace = |name: &str, credits, days: u64| WorkspacePlan {
        reset: Some(clock::now().plus(Duration::from_secs(days * 86_400))),
        ..WorkspacePlan::new(name, credits)
    };
    let key = |key: &str, workspace: &str| KeyPlan {
        workspace: Some(workspace.to_owned()),
        ..KeyPlan::new(key, 0)
    };
    Plan { keys: vec![key(ONE, "ws_1"), key(TWO, "ws_2"), key(THREE, "ws_3")], ..Plan::default() }
        .with_workspace(workspace("ws_1", 20_000, 20))
        .with_workspace(workspace("ws_2", 90_000, 25))
        .with_workspace(workspace("ws_3", 50_000, 5))
}

/// What the client hears, how the refused key stands, and how often the provider was asked in all.
fn expected(outcome: Outcome, strategy: &str) -> (u16, &'static str, usize) {
    match outcome {
        Replaced(status) => (200, status, 2),
        Relayed(status) => (status, "active", 1),
        Again(_) if strategy == "round-robin" => (200, "active", 2),
        Again(status) => (status, "active", 2),
    }
}

async fn check(strategy: &str, first: &str, stage: &str, class: &str, outcome: Outcome) {
    let case = format!("{strategy}, {stage}{class}");
    let house = house_with(plan(), |config| config.pool.strategy = strategy.parse().unwrap()).await;
    house.always(first, &format!("{stage}{class}"));
    let body = json!({"text": "a".repeat(CHARACTERS), "model_id": "eleven_multilingual_v2"});
    let answer = house.post(SPEECH, &body).await;
    let status = answer.status().as_u16();
    let is_ours = answer.headers().contains_key("x-keychoir-error");
    assert!(answer.bytes().await.is_ok(), "{case}");
    let position = KEYS.iter().position(|key| *key == first).unwrap();
    let stands = house.statuses().await;
    let hits = house.hits(&KEYS);
    let seen = (status, &*stands[position], hits.iter().sum::<usize>());
    assert_eq!(seen, expected(outcome, strategy), "{case}: {hits:?}");
    assert!(hits[position] >= 1 && !is_ours, "{case}: {hits:?}");
    let mut others = stands.iter().enumerate().filter(|(at, _)| *at != position);
    assert!(others.all(|(_, stands)| stands == "active"), "{case}: {stands:?}");
    let served = u64::from(status == 200);
    let (ledger, _) = house.close().await;
    assert_eq!(ledger.totals.charged, served * u64::try_from(CHARACTERS).unwrap(), "{case}");
}

async fn check_all(strategy: &str) {
    let (strategy, first) = STRATEGIES.into_iter().find(|(word, _)| *word == strategy).unwrap();
    let mut cases =
        STAGES.into_iter().flat_map(|stage| CLASSES.map(|(class, outcome)| (stage, class, outcome)));
    loop {
        let some: Vec<_> = cases.by_ref().take(AT_ONCE).collect();
        if some.is_empty() {
            break;
        }
        let checks =
            some.into_iter().map(|(stage, class, outcome)| check(strategy, first, stage, class, outcome));
        join_all(checks).await;
    }
}

#[tokio::test]
async fn fill_first_meets_every_refusal() {
    check_all("fill-first").await;
}

#[tokio::test]
async fn round_robin_meets_every_refusal() {
    check_all("round-robin").await;
}

#[tokio::test]
async fn most_remaining_meets_every_refusal() {
    check_all("most-remaining").await;
}

#[tokio::test]
async fn least_busy_meets_every_refusal() {
    check_all("least-busy").await;
}

#[tokio::test]
async fn soonest_reset_meets_every_refusal() {
    check_all("soonest-reset").await;
}

//! Restrictions survive a restart: the same request first tries the account that served it, and the
//! status of every key is the same.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends at its first surprise"
)]

mod house;

use house::{House, ONE, SPEECH, THREE, TWO, house, house_in, house_with, join_all, until};
use keychoir::simulator::{Fault, KeyPlan, Plan, WorkspacePlan};
use serde_json::{Value, json};

const FOUR: &str = "sk_key_number_four_00000000000000000000000000000004";
const KEYS: [&str; 4] = [ONE, TWO, THREE, FOUR];

const REGION_BLOCKED: &str =
    r#"answer=403/{"detail":{"status":"region_blocked","message":"Not available here."}}"#;

/// Four keys of workspaces with these plans.
fn of_plans(tiers: [&str; 4]) -> Plan {
    tiers.iter().zip(KEYS).enumerate().fold(Plan::of([]), |plan, (number, (tier, key))| {
        let name = format!("ws_{number}");
        let workspace = WorkspacePlan { tier: (*tier).to_owned(), ..WorkspacePlan::new(&name, 100_000) };
        plan.with_workspace(workspace).with_key(KeyPlan { workspace: Some(name), ..KeyPlan::new(key, 0) })
    })
}

/// A kind of request.
#[derive(Clone, Copy, Debug)]
enum Request {
    Speech,
    Wave,
    Voices,
    AddVoice,
    Sound,
}

impl Request {
    async fn status(self, house: &House) -> u16 {
        let answer = match self {
            Self::Speech => house.speak(40).await,
            Self::Wave => house.post(&format!("{SPEECH}?output_format=wav_16000"), &text()).await,
            Self::Voices => house.get("/v1/voices").await,
            Self::AddVoice => add_voice(house).await,
            Self::Sound => house.post("/v1/sound-generation", &json!({"text": "rain"})).await,
        };
        let status = answer.status().as_u16();
        answer.bytes().await.unwrap();
        status
    }

    fn path(self) -> &'static str {
        match self {
            Self::Speech | Self::Wave => "/v1/text-to-speech",
            Self::Voices => "/v1/voices",
            Self::AddVoice => "/v1/voices/add",
            Self::Sound => "/v1/sound-generation",
        }
    }
}

fn text() -> Value {
    json!({"text": "hello", "model_id": "eleven_multilingual_v2"})
}

async fn add_voice(house: &House) -> reqwest::Response {
    let form = "--b\r\ncontent-disposition: form-data; name=\"name\"\r\n\r\nmine\r\n--b\r\ncontent-disposition: form-data; \
                name=\"files\"; filename=\"a.mp3\"\r\n\r\nsound\r\n--b--\r\n";
    let request = house.client.post(format!("{}/v1/voices/add", house.url));
    let request = request.header("content-type", "multipart/form-data; boundary=b").body(form);
    request.send().await.unwrap()
}

/// The parts of each key's status that do not change by themselves.
async fn said(house: &House) -> Vec<Value> {
    let details: Value = house.get("/api/keychoir-keys").await.json().await.unwrap();
    let of = |key: &Value| {
        let words =
            ["shortKey", "plan", "state", "reason", "since", "until", "possible", "evidence", "cannot"];
        words.iter().map(|word| ((*word).to_owned(), key[*word].clone())).collect::<serde_json::Map<_, _>>()
    };
    details["keys"].as_array().unwrap().iter().map(|key| Value::Object(of(key))).collect()
}

/// The status of the response, and the attempts with each key.
async fn asked(house: &House, request: Request) -> (u16, [usize; 4]) {
    let before = house.hits(&KEYS);
    let status = request.status(house).await;
    let after = house.hits(&KEYS);
    (status, std::array::from_fn(|at| after[at] - before[at]))
}

/// Sends requests until only those keys are tried, which serve: each refusal restricts an account.
async fn until_asked(house: &House, request: Request, expected: [usize; 4]) {
    for _ in 0..4 {
        if asked(house, request).await == (200, expected) {
            return;
        }
    }
    panic!("{request:?} does not go to {expected:?}");
}

/// The first three accounts refuse the request, and the last one serves it, before and after a
/// restart.
async fn check(house: House, request: Request, case: &str) {
    until_asked(&house, request, [0, 0, 0, 1]).await;
    let before = said(&house).await;
    assert!(before[..3].iter().any(|key| key["cannot"] != json!([])), "{case}: {before:?}");
    assert_eq!(before[3]["cannot"], json!([]), "{case}: {before:?}");
    let house = house.restarted().await;
    assert_eq!(said(&house).await, before, "{case}");
    assert_eq!(asked(&house, request).await, (200, [0, 0, 0, 1]), "{case}: after");
    // A second restart: reading the restrictions loses none of them.
    let house = house.restarted().await;
    assert_eq!(said(&house).await, before, "{case}");
    assert_eq!(asked(&house, request).await, (200, [0, 0, 0, 1]), "{case}: after another");
    house.abandon().await;
}

#[tokio::test]
async fn what_accounts_were_refused_for_is_known_after_a_restart() {
    let free = ["free", "free", "free", "creator"];
    let paid = ["creator"; 4];
    let cases = [
        (REGION_BLOCKED, paid, Request::Speech),
        ("forbidden", paid, Request::Speech),
        ("unauthorized", paid, Request::Voices),
        ("answer=402/", paid, Request::Speech),
        ("workspace_access_denied", paid, Request::Sound),
        ("missing_permissions", paid, Request::Voices),
        ("paid_plan_required", free, Request::Speech),
        ("output_format_not_allowed", free, Request::Wave),
        ("text_too_long", free, Request::Speech),
        ("subscription_required", free, Request::Speech),
    ];
    let check = |(refusal, tiers, request): (&'static str, [&'static str; 4], Request)| async move {
        let fault: Fault = refusal.parse().unwrap();
        let house = house(of_plans(tiers)).await;
        for key in &KEYS[..3] {
            house.simulator.always_on(key, request.path(), Some(fault.clone()));
        }
        check(house, request, &format!("{refusal} of {request:?}")).await;
    };
    join_all(cases.into_iter().map(check)).await;
}

#[tokio::test]
async fn missing_permissions_are_known_after_a_restart() {
    let mut plan = of_plans(["creator"; 4]);
    for key in &mut plan.keys[..3] {
        key.permissions = Some(vec!["text_to_speech".to_owned(), "user_read".to_owned()]);
    }
    check(house(plan).await, Request::Voices, "permissions").await;
}

/// Their subscriptions cannot be read, so no poll reports their slots.
#[tokio::test]
async fn full_slots_are_known_after_a_restart() {
    let mut plan = of_plans(["creator"; 4]);
    for key in &mut plan.keys[..3] {
        key.permissions = Some(vec!["create_instant_voice_clone".to_owned(), "text_to_speech".to_owned()]);
    }
    plan.workspaces[..3].iter_mut().for_each(|workspace| workspace.voice_limit = Some(0));
    check(house(plan).await, Request::AddVoice, "slots").await;
}

/// A rate limit of an endpoint without a concurrency group; polling is off.
#[tokio::test]
async fn a_rate_limit_of_an_endpoint_is_known_after_a_restart() {
    let house = house_with(of_plans(["creator"; 4]), |config| config.quota_polling.enabled = false).await;
    for key in &KEYS[..3] {
        house.always(key, "rate_limit=200");
    }
    check(house, Request::Voices, "a rate limit").await;
}

/// A restriction refuted by a served request does not come back with a restart.
#[tokio::test]
async fn what_was_refuted_stays_refuted() {
    let house = house(of_plans(["creator"; 4])).await;
    house.simulator.always_on(ONE, SPEECH, Some("forbidden".parse().unwrap()));
    assert_eq!(asked(&house, Request::Speech).await, (200, [1, 1, 0, 0]));
    assert_ne!(said(&house).await[0]["cannot"], json!([]));
    let house = house.restarted().await;
    assert_eq!(asked(&house, Request::Speech).await, (200, [0, 1, 0, 0]));
    // The others refuse it now, and the first one serves it.
    for key in &KEYS[1..] {
        house.simulator.always_on(key, SPEECH, Some("workspace_access_denied".parse().unwrap()));
    }
    house.simulator.always_on(ONE, SPEECH, None);
    until_asked(&house, Request::Speech, [1, 0, 0, 0]).await;
    assert_eq!(said(&house).await[0]["cannot"], json!([]));
    let before = said(&house).await;
    let house = house.restarted().await;
    assert_eq!(said(&house).await, before);
    assert_eq!(asked(&house, Request::Speech).await, (200, [1, 0, 0, 0]));
    house.abandon().await;
}

/// A refused plan applies to other accounts with it, also before the first poll.
#[tokio::test]
async fn plans_are_known_after_a_restart() {
    let plan = || of_plans(["free", "free", "free", "creator"]);
    let refuse = |house: &House| {
        for key in &KEYS[..3] {
            house.simulator.always_on(key, SPEECH, Some("paid_plan_required".parse().unwrap()));
        }
    };
    let house = house(plan()).await;
    refuse(&house);
    assert_eq!(asked(&house, Request::Speech).await, (200, [1, 0, 0, 1]), "one of each plan");
    let folder = house.abandon().await;
    let house = house_in(folder, plan(), |config| config.quota_polling.enabled = false).await;
    refuse(&house);
    assert_eq!(asked(&house, Request::Speech).await, (200, [0, 0, 0, 1]));
    assert_eq!(said(&house).await[1]["plan"], "free");
    house.abandon().await;
}

/// A killed program has written them, too.
#[tokio::test]
async fn refusals_are_written_while_the_program_runs() {
    let house = house(of_plans(["creator"; 4])).await;
    house.simulator.always_on(ONE, SPEECH, Some("forbidden".parse().unwrap()));
    let rows = || -> i64 {
        let file = rusqlite::Connection::open(house.books()).unwrap();
        file.query_row("SELECT count(*) FROM refusals", [], |row| row.get(0)).unwrap()
    };
    assert_eq!(asked(&house, Request::Speech).await, (200, [1, 1, 0, 0]));
    until(|| rows() == 1).await;
    // The only account left serves it again.
    house.simulator.always_on(ONE, SPEECH, None);
    for key in &KEYS[1..] {
        house.simulator.always_on(key, SPEECH, Some("workspace_access_denied".parse().unwrap()));
    }
    until_asked(&house, Request::Speech, [1, 0, 0, 0]).await;
    until(|| rows() == 3).await;
    house.abandon().await;
}

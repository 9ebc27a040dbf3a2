//! Restrictions survive a restart: the same request first tries the account that served it, and the
//! status of every key is the same.

use crate::support::{
    FIRST_KEY, SECOND_KEY, SPEECH_PATH, THIRD_KEY, TestProxy, join_all, start_proxy, start_proxy_in,
    start_proxy_with, wait_until,
};
use keychoir::simulator::{Fault, KeyPlan, Plan, WorkspacePlan};
use serde_json::{Value, json};

const FOUR: &str = "sk_key_number_four_00000000000000000000000000000004";
const KEYS: [&str; 4] = [FIRST_KEY, SECOND_KEY, THIRD_KEY, FOUR];

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
    async fn status(self, proxy: &TestProxy) -> u16 {
        let answer = match self {
            Self::Speech => proxy.request_speech(40).await,
            Self::Wave => proxy.post(&format!("{SPEECH_PATH}?output_format=wav_16000"), &text()).await,
            Self::Voices => proxy.get("/v1/voices").await,
            Self::AddVoice => add_voice(proxy).await,
            Self::Sound => proxy.post("/v1/sound-generation", &json!({"text": "rain"})).await,
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

async fn add_voice(proxy: &TestProxy) -> reqwest::Response {
    let form = "--b\r\ncontent-disposition: form-data; name=\"name\"\r\n\r\nmine\r\n--b\r\ncontent-disposition: form-data; \
                name=\"files\"; filename=\"a.mp3\"\r\n\r\nsound\r\n--b--\r\n";
    let request = proxy.client.post(format!("{}/v1/voices/add", proxy.url));
    let request = request.header("content-type", "multipart/form-data; boundary=b").body(form);
    request.send().await.unwrap()
}

/// The parts of each key's status that do not change by themselves.
async fn said(proxy: &TestProxy) -> Vec<Value> {
    let details: Value = proxy.get("/api/keychoir-keys").await.json().await.unwrap();
    let of = |key: &Value| {
        let words =
            ["shortKey", "plan", "state", "reason", "since", "until", "possible", "evidence", "cannot"];
        words.iter().map(|word| ((*word).to_owned(), key[*word].clone())).collect::<serde_json::Map<_, _>>()
    };
    details["keys"].as_array().unwrap().iter().map(|key| Value::Object(of(key))).collect()
}

/// The status of the response, and the attempts with each key.
async fn asked(proxy: &TestProxy, request: Request) -> (u16, [usize; 4]) {
    let before = proxy.request_counts(&KEYS);
    let status = request.status(proxy).await;
    let after = proxy.request_counts(&KEYS);
    (status, std::array::from_fn(|at| after[at] - before[at]))
}

/// Sends requests until only those keys are tried, which serve: each refusal restricts an account.
async fn until_asked(proxy: &TestProxy, request: Request, expected: [usize; 4]) {
    for _ in 0..4 {
        if asked(proxy, request).await == (200, expected) {
            return;
        }
    }
    panic!("{request:?} does not go to {expected:?}");
}

/// The first three accounts refuse the request, and the last one serves it, before and after a
/// restart.
async fn check(proxy: TestProxy, request: Request, case: &str) {
    until_asked(&proxy, request, [0, 0, 0, 1]).await;
    let before = said(&proxy).await;
    assert!(before[..3].iter().any(|key| key["cannot"] != json!([])), "{case}: {before:?}");
    assert_eq!(before[3]["cannot"], json!([]), "{case}: {before:?}");
    let proxy = proxy.restart().await;
    assert_eq!(said(&proxy).await, before, "{case}");
    assert_eq!(asked(&proxy, request).await, (200, [0, 0, 0, 1]), "{case}: after");
    // A second restart: reading the restrictions loses none of them.
    let proxy = proxy.restart().await;
    assert_eq!(said(&proxy).await, before, "{case}");
    assert_eq!(asked(&proxy, request).await, (200, [0, 0, 0, 1]), "{case}: after another");
    proxy.close_unchecked().await;
}

#[tokio::test]
async fn restrictions_are_known_after_a_restart() {
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
        let proxy = start_proxy(of_plans(tiers)).await;
        for key in &KEYS[..3] {
            proxy.simulator.always_on(key, request.path(), Some(fault.clone()));
        }
        check(proxy, request, &format!("{refusal} of {request:?}")).await;
    };
    join_all(cases.into_iter().map(check)).await;
}

#[tokio::test]
async fn missing_permissions_are_known_after_a_restart() {
    let mut plan = of_plans(["creator"; 4]);
    for key in &mut plan.keys[..3] {
        key.permissions = Some(vec!["text_to_speech".to_owned(), "user_read".to_owned()]);
    }
    check(start_proxy(plan).await, Request::Voices, "permissions").await;
}

/// Their subscriptions cannot be read, so no poll reports their slots.
#[tokio::test]
async fn full_slots_are_known_after_a_restart() {
    let mut plan = of_plans(["creator"; 4]);
    for key in &mut plan.keys[..3] {
        key.permissions = Some(vec!["create_instant_voice_clone".to_owned(), "text_to_speech".to_owned()]);
    }
    plan.workspaces[..3].iter_mut().for_each(|workspace| workspace.voice_limit = Some(0));
    check(start_proxy(plan).await, Request::AddVoice, "slots").await;
}

/// A rate limit of an endpoint without a concurrency group; polling is off.
#[tokio::test]
async fn a_rate_limit_of_an_endpoint_is_known_after_a_restart() {
    let proxy =
        start_proxy_with(of_plans(["creator"; 4]), |config| config.quota_polling.enabled = false).await;
    for key in &KEYS[..3] {
        proxy.set_fault(key, "rate_limit=200");
    }
    check(proxy, Request::Voices, "a rate limit").await;
}

/// A restriction refuted by a served request does not come back with a restart.
#[tokio::test]
async fn a_refuted_restriction_stays_refuted() {
    let proxy = start_proxy(of_plans(["creator"; 4])).await;
    proxy.simulator.always_on(FIRST_KEY, SPEECH_PATH, Some("forbidden".parse().unwrap()));
    assert_eq!(asked(&proxy, Request::Speech).await, (200, [1, 1, 0, 0]));
    assert_ne!(said(&proxy).await[0]["cannot"], json!([]));
    let proxy = proxy.restart().await;
    assert_eq!(asked(&proxy, Request::Speech).await, (200, [0, 1, 0, 0]));
    // The others refuse it now, and the first one serves it.
    for key in &KEYS[1..] {
        proxy.simulator.always_on(key, SPEECH_PATH, Some("workspace_access_denied".parse().unwrap()));
    }
    proxy.simulator.always_on(FIRST_KEY, SPEECH_PATH, None);
    until_asked(&proxy, Request::Speech, [1, 0, 0, 0]).await;
    assert_eq!(said(&proxy).await[0]["cannot"], json!([]));
    let before = said(&proxy).await;
    let proxy = proxy.restart().await;
    assert_eq!(said(&proxy).await, before);
    assert_eq!(asked(&proxy, Request::Speech).await, (200, [1, 0, 0, 0]));
    proxy.close_unchecked().await;
}

/// A refused plan applies to other accounts with it, also before the first poll.
#[tokio::test]
async fn plans_are_known_after_a_restart() {
    let plan = || of_plans(["free", "free", "free", "creator"]);
    let refuse = |proxy: &TestProxy| {
        for key in &KEYS[..3] {
            proxy.simulator.always_on(key, SPEECH_PATH, Some("paid_plan_required".parse().unwrap()));
        }
    };
    let proxy = start_proxy(plan()).await;
    refuse(&proxy);
    assert_eq!(asked(&proxy, Request::Speech).await, (200, [1, 0, 0, 1]), "one of each plan");
    let folder = proxy.close_unchecked().await;
    let proxy = start_proxy_in(folder, plan(), |config| config.quota_polling.enabled = false).await;
    refuse(&proxy);
    assert_eq!(asked(&proxy, Request::Speech).await, (200, [0, 0, 0, 1]));
    assert_eq!(said(&proxy).await[1]["plan"], "free");
    proxy.close_unchecked().await;
}

/// A killed program has written them, too.
#[tokio::test]
async fn refusals_are_written_while_the_program_runs() {
    let proxy = start_proxy(of_plans(["creator"; 4])).await;
    proxy.simulator.always_on(FIRST_KEY, SPEECH_PATH, Some("forbidden".parse().unwrap()));
    let rows = || -> i64 {
        let file = rusqlite::Connection::open(proxy.database()).unwrap();
        file.query_row("SELECT count(*) FROM refusals", [], |row| row.get(0)).unwrap()
    };
    assert_eq!(asked(&proxy, Request::Speech).await, (200, [1, 1, 0, 0]));
    wait_until(|| rows() == 1).await;
    // The only account left serves it again.
    proxy.simulator.always_on(FIRST_KEY, SPEECH_PATH, None);
    for key in &KEYS[1..] {
        proxy.simulator.always_on(key, SPEECH_PATH, Some("workspace_access_denied".parse().unwrap()));
    }
    until_asked(&proxy, Request::Speech, [1, 0, 0, 0]).await;
    wait_until(|| rows() == 3).await;
    proxy.close_unchecked().await;
}

//! Access rules and limits of clients, and the responses when they are exceeded.

use std::path::Path;
use std::time::Duration;

use crate::support::program::{Program, keychoir_command, read_all_files, run, stderr};
use crate::support::{
    CLIENT_TOKEN, FIRST_KEY, SECOND_KEY, SPEECH_PATH, THIRD_KEY, TestProxy, bind_loopback, start_proxy_in,
    start_proxy_with, wait_until,
};
use keychoir::config::{ClientConfig, Config};
use keychoir::policy::client::{AllowedKeys, Rules};
use keychoir::policy::client_quota::{ClientQuota, Period, QuotaUnit, RateLimit};
use keychoir::secret::{Fingerprint, TokenFingerprint};
use keychoir::simulator::{Plan, Simulator};
use serde_json::{Value, json};

fn plan() -> Plan {
    Plan::of([(FIRST_KEY, 100_000), (SECOND_KEY, 100_000)])
}

/// The client of the tests with these rules, and another one without.
fn with(rules: Rules) -> impl FnOnce(&mut Config) {
    let client = |name: &str, token: &str, rules| ClientConfig {
        name: name.to_owned(),
        token: TokenFingerprint::new(token),
        rules,
    };
    let clients = vec![client("app", CLIENT_TOKEN, rules), client("other", "other", Rules::default())];
    |config| config.clients = clients
}

fn three_messages() -> Rules {
    let quota = ClientQuota { amount: 3, unit: QuotaUnit::Requests, period: Period::Total };
    Rules { quota: Some(quota), ..Rules::default() }
}

/// The status of a response and Keychoir's error code.
fn told(answer: &reqwest::Response) -> (u16, &str) {
    let code = answer.headers().get("x-keychoir-error").map_or("", |code| code.to_str().unwrap());
    (answer.status().as_u16(), code)
}

const USED: (u16, &str) = (402, "client_quota_exceeded");

#[tokio::test]
async fn three_messages_are_charged_once_each_across_a_failover() {
    let proxy = start_proxy_with(plan(), with(three_messages())).await;
    assert_eq!(proxy.request_speech(10).await.status(), 200);
    // Reads and refused requests do not count as messages.
    assert_eq!(proxy.get("/v1/voices").await.status(), 200);
    assert_eq!(proxy.post(SPEECH_PATH, &json!({"texxt": "a"})).await.status(), 422);
    assert_eq!(proxy.request_speech(10).await.status(), 200);
    assert_eq!(proxy.request_speech(10).await.status(), 200);
    let answer = proxy.request_speech(10).await;
    assert_eq!(told(&answer), USED);
    let body: Value = answer.json().await.unwrap();
    assert_eq!(body["detail"]["status"], "insufficient_credits");
    assert_eq!(body["detail"]["message"], "This client has used its quota of 3 requests.");
    assert_eq!(proxy.get("/v1/voices").await.status(), 200);
    let other = proxy.client.post(format!("{}{SPEECH_PATH}", proxy.url)).header("xi-api-key", "other");
    assert_eq!(other.json(&json!({"text": "a"})).send().await.unwrap().status(), 200);
    proxy.close().await;
}

#[tokio::test]
async fn a_quota_survives_a_restart() {
    let first = start_proxy_with(plan(), with(three_messages())).await;
    assert_eq!(first.request_speech(10).await.status(), 200);
    assert_eq!(first.get("/v1/voices").await.status(), 200);
    assert_eq!(first.request_speech(10).await.status(), 200);
    let (_, folder) = first.close().await;
    let second = start_proxy_in(folder, plan(), with(three_messages())).await;
    assert_eq!(second.request_speech(10).await.status(), 200);
    assert_eq!(told(&second.request_speech(10).await), USED);
}

#[tokio::test]
async fn a_quota_may_be_of_credits() {
    let quota = ClientQuota { amount: 25, unit: QuotaUnit::Credits, period: Period::Month };
    let proxy = start_proxy_with(plan(), with(Rules { quota: Some(quota), ..Rules::default() })).await;
    assert_eq!(proxy.request_speech(10).await.status(), 200);
    assert_eq!(proxy.request_speech(10).await.status(), 200);
    let answer = proxy.request_speech(10).await;
    assert_eq!(told(&answer), USED);
    assert!(answer.text().await.unwrap().contains(
        "has 5 of its quota of 25 credits per month left, and this request may need 10. It resets at "
    ));
    proxy.close().await;
}

#[tokio::test]
async fn a_rate_limited_client_is_told_when_to_retry() {
    let rate = RateLimit { requests: 1, span: Duration::from_secs(3_600) };
    let proxy = start_proxy_with(plan(), with(Rules { rate_limit: Some(rate), ..Rules::default() })).await;
    assert_eq!(proxy.get("/v1/voices").await.status(), 200);
    let answer = proxy.get("/v1/voices").await;
    assert_eq!(told(&answer), (429, "client_rate_limited"));
    let seconds: u64 = answer.headers()["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((3_500..=3_600).contains(&seconds), "{seconds}");
    proxy.close().await;
}

#[tokio::test]
async fn a_client_has_at_most_its_maximum_of_requests() {
    let proxy = start_proxy_with(plan(), with(Rules { max_concurrent: Some(1), ..Rules::default() })).await;
    proxy.simulator.script(FIRST_KEY, vec!["slow_body=3600s".parse().unwrap()]);
    let mut answer = proxy.post(&format!("{SPEECH_PATH}/stream"), &json!({"text": "a".repeat(100)})).await;
    assert!(answer.chunk().await.unwrap().is_some());
    let refused = proxy.get("/v1/voices").await;
    assert_eq!(
        (told(&refused), &refused.headers()["retry-after"]),
        ((429, "client_concurrency_exceeded"), &"1".parse().unwrap())
    );
    drop(answer);
    wait_until(|| proxy.simulator.ledger().totals.in_flight == 0).await;
    proxy.wait_until_served("/v1/voices").await;
    proxy.close().await;
}

#[tokio::test]
async fn a_client_may_use_its_paths_only() {
    let paths = vec!["/v1/text-to-speech".to_owned(), "/v1/voices/{id}".to_owned()];
    let proxy = start_proxy_with(plan(), with(Rules { paths, ..Rules::default() })).await;
    assert_eq!(proxy.request_speech(10).await.status(), 200);
    assert_eq!(proxy.get(&format!("/v1/voices/{}", crate::support::VOICE_ID)).await.status(), 200);
    for (path, refusal) in [
        ("/v1/voices", (403, "path_not_allowed")),
        ("/v1/user", (403, "path_not_allowed")),
        ("/user", (403, "path_not_allowed")),
        // This client library resolves dots itself.
        ("/v1/text-to-speech/../user", (403, "path_not_allowed")),
        ("/v1/text-to-speech%2f..%2fuser", (400, "ambiguous_path")),
        ("/v1/text-to-speech/..;/user", (400, "ambiguous_path")),
    ] {
        let request = proxy.client.get(format!("{}{path}", proxy.url)).header("xi-api-key", CLIENT_TOKEN);
        assert_eq!(told(&request.send().await.unwrap()), refusal, "{path}");
    }
    assert_eq!(proxy.request_counts(&[FIRST_KEY, SECOND_KEY]), [2, 0]);
    proxy.close().await;
}

#[tokio::test]
async fn a_client_is_served_by_its_keys_only() {
    let allowed_keys = AllowedKeys { keys: vec!["second".to_owned()], workspaces: Vec::new() };
    let rules = Rules { allowed_keys, ..Rules::default() };
    let proxy = start_proxy_with(plan(), |config| {
        with(rules)(config);
        config.keys[1].name = Some("second".to_owned());
    })
    .await;
    assert_eq!(proxy.request_speech(10).await.status(), 200);
    assert_eq!(proxy.request_counts(&[FIRST_KEY, SECOND_KEY]), [0, 1]);
    proxy.set_fault(SECOND_KEY, "quota");
    for _ in 0..2 {
        assert_eq!(
            told(&proxy.request_speech(10).await),
            (401, "all_keys_exhausted"),
            "the first key is not for it"
        );
    }
    assert_eq!(proxy.request_counts(&[FIRST_KEY]), [0]);
    proxy.close().await;
}

/// A request with a token in its own header, and a client's own key.
async fn with_own(proxy: &TestProxy, method: &str, path: &str, token: Option<&str>) -> reqwest::Response {
    let request = proxy.client.request(method.parse().unwrap(), format!("{}{path}", proxy.url));
    let request = request.header("xi-api-key", THIRD_KEY).json(&json!({"text": "hello"}));
    let request = token.into_iter().fold(request, |request, token| request.header("x-keychoir-token", token));
    request.send().await.unwrap()
}

/// A proxy whose provider knows a third key, which is not in the pool.
async fn house_beside_own(credits: u64, change: impl FnOnce(&mut Config)) -> TestProxy {
    let plan = Plan::of([(FIRST_KEY, 100_000), (SECOND_KEY, 100_000), (THIRD_KEY, credits)]);
    start_proxy_with(plan, |config| {
        config.keys.pop();
        change(config);
    })
    .await
}

#[tokio::test]
async fn a_client_that_brings_its_own_key_pays_itself() {
    let rules = Rules { may_bring_key: true, max_concurrent: Some(1), ..three_messages() };
    let proxy = house_beside_own(0, with(rules)).await;
    for _ in 0..5 {
        // The account of the own key is exhausted, which affects no key of the pool: no other key
        // is tried, and none enters a cooldown.
        let answer = with_own(&proxy, "POST", SPEECH_PATH, Some(CLIENT_TOKEN)).await;
        assert_eq!(told(&answer), (401, ""));
        // Reads to the end: until then the request is concurrent, and the limit is one.
        answer.bytes().await.unwrap();
    }
    let user: Value = with_own(&proxy, "GET", "/v1/user", Some(CLIENT_TOKEN)).await.json().await.unwrap();
    assert_eq!(user["first_name"], "Simulator", "it is its own account");
    assert_eq!(
        proxy.request_counts(&[FIRST_KEY, SECOND_KEY, THIRD_KEY]),
        [0, 0, 5],
        "and the question for the user"
    );
    assert_eq!(proxy.key_statuses().await, ["active", "active"]);
    // Without its own key the client uses the pool, with its whole quota.
    for _ in 0..3 {
        let answer = proxy.request_speech(10).await;
        assert_eq!(answer.status(), 200);
        answer.bytes().await.unwrap();
    }
    assert_eq!(told(&proxy.request_speech(10).await), USED);
    let (ledger, folder) = proxy.close().await;
    assert_eq!(ledger.violations, [""; 0]);
    let path = folder.path().join("keychoir.db");
    let books = rusqlite::Connection::open(&path).unwrap();
    let own: (i64, String) = books
        .query_row("SELECT count(*), min(client) FROM attempts WHERE key_hash = 'own'", [], |row| {
            Ok((row.get(0)?, row.get(1)?))
        })
        .unwrap();
    assert_eq!(own, (6, "app".to_owned()));
    let heap = std::fs::read(path).unwrap();
    for secret in [THIRD_KEY, &Fingerprint::new(THIRD_KEY).to_string()] {
        assert!(!heap.windows(secret.len()).any(|bytes| bytes == secret.as_bytes()));
    }
}

#[tokio::test]
async fn a_client_without_permission_brings_no_key() {
    let proxy = house_beside_own(100, with(Rules::default())).await;
    assert_eq!(told(&with_own(&proxy, "GET", "/v1/voices", None).await), (401, "client_token_wrong"));
    assert_eq!(
        told(&with_own(&proxy, "GET", "/v1/voices", Some("wrong")).await),
        (401, "client_token_wrong")
    );
    assert_eq!(with_own(&proxy, "GET", "/v1/voices", Some(CLIENT_TOKEN)).await.status(), 200);
    assert_eq!(proxy.request_counts(&[FIRST_KEY, SECOND_KEY, THIRD_KEY]), [1, 0, 0]);
    proxy.close().await;
}

#[tokio::test]
async fn clients_with_own_keys_are_served_without_the_pool() {
    let proxy = house_beside_own(100, |config| {
        with(Rules::default())(config);
        config.access.bring_your_own_key = true;
    })
    .await;
    assert_eq!(with_own(&proxy, "GET", "/v1/voices", None).await.status(), 200);
    assert_eq!(
        told(&with_own(&proxy, "GET", "/api/elevenlabs-status", None).await),
        (401, "client_token_wrong")
    );
    assert_eq!(proxy.get("/v1/voices").await.status(), 200);
    assert_eq!(proxy.request_counts(&[FIRST_KEY, SECOND_KEY, THIRD_KEY]), [1, 0, 1]);
    let clients: Vec<String> = proxy.into_records().await.into_iter().map(|record| record.client).collect();
    assert_eq!(clients, ["own", "app"]);
}

/// Runs `keychoir clients` with these arguments and a file; returns its exit code, data and
/// messages.
fn clients(words: &[&str], file: &Path) -> (Option<i32>, String, String) {
    let words = [&["clients"], words, &["--config", file.to_str().unwrap()]].concat();
    let output = run(keychoir_command(&words).env("HOME", file.parent().unwrap()));
    let said = stderr(&output);
    (output.status.code(), String::from_utf8(output.stdout).unwrap(), said)
}

#[tokio::test]
async fn a_client_is_added_served_and_revoked_while_it_runs() {
    let simulator = Simulator::start(bind_loopback().await, plan()).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keychoir.toml");
    std::fs::write(&file, "# mine\n[server]\nlisten = \"0.0.0.0:0\"\nreload_interval = \"0s\"\n").unwrap();
    let (code, token, said) =
        clients(&["add", "app", "--allowance", "1 request", "--concurrency", "4"], &file);
    let token = token.trim();
    assert_eq!((code, token.len()), (Some(0), 51), "{said}");
    assert!(!said.contains(token));
    let (code, _, said) = clients(&["add", "app"], &file);
    assert_eq!(code, Some(78), "{said}");
    let (code, _, said) = clients(&["add", "other", "--rate", "fast"], &file);
    assert!(code == Some(78) && said.contains("`fast` is not a rate limit"), "{said}");
    let (_, list, _) = clients(&["list"], &file);
    assert_eq!(list, "app  1 request, 4 concurrent requests\n");
    let (_, list, _) = clients(&["list", "--json"], &file);
    let list: Value = serde_json::from_str(&list).unwrap();
    assert_eq!((&list[0]["name"], &list[0]["maxConcurrent"]), (&json!("app"), &json!(4)));

    let mut command = keychoir_command(&["serve", "--config", file.to_str().unwrap()]);
    command
        .env("ELEVENLABS_API_KEYS", format!("{FIRST_KEY},{SECOND_KEY}"))
        .env("KEYCHOIR_STORAGE__PATH", folder.path().join("keychoir.db"))
        .env("KEYCHOIR_UPSTREAM__BASE_URL", simulator.base_url())
        .env("KEYCHOIR_LOG__LEVEL", "trace")
        .env("KEYCHOIR_LOG__FORMAT", "json");
    let mut program = Program::start(&mut command);
    let port = program.wait_for_address().rsplit(':').next().unwrap().to_owned();
    let url = format!("http://127.0.0.1:{port}");
    let client = keychoir::upstream::http_client().unwrap().build().unwrap();
    let get = async |token: &str| {
        let request = client.get(format!("{url}/v1/voices")).header("xi-api-key", token);
        request.send().await.unwrap().status().as_u16()
    };
    assert_eq!((get(token).await, get("other").await), (200, 401));

    let (code, second, said) = clients(&["add", "second", "--bring-your-own-key", "--json"], &file);
    assert_eq!(code, Some(0), "{said}");
    let second: Value = serde_json::from_str(&second).unwrap();
    let second = second["token"].as_str().unwrap();
    assert_eq!(clients(&["revoke", "app"], &file).0, Some(0));
    assert_eq!(clients(&["revoke", "app"], &file).0, Some(78));
    let (code, _, said) = clients(&["revoke", "second"], &file);
    assert!(code == Some(78) && said.contains("open to other machines"), "{said}");
    program.send_signal("HUP");
    program.wait_for_event("reloaded");
    assert_eq!((get(token).await, get(second).await), (401, 200));
    // An own key that the provider does not know.
    let own = "sk_own_canary_000011112222333344445555666677778888";
    let request = client.get(format!("{url}/v1/voices")).header("xi-api-key", own);
    assert_eq!(request.header("x-keychoir-token", second).send().await.unwrap().status(), 401);

    let (code, said) = program.terminate();
    assert_eq!(code, Some(0));
    let heap = read_all_files(folder.path());
    for secret in [token, second, own, &Fingerprint::new(own).to_string()] {
        assert!(!said.contains(secret), "it is in the log");
        assert!(!heap.windows(secret.len()).any(|bytes| bytes == secret.as_bytes()), "it is in a file");
    }
    assert!(std::fs::read_to_string(&file).unwrap().starts_with("# mine\n[server]\n"));
}

//! Tests the rules of clients: their quotas, rate limits, maximum concurrency, allowed paths and allowed keys. Also
//! tests requests with a client's own ElevenLabs key instead of a key of the pool, and the `keychoir clients` commands.

use std::path::Path;
use std::time::Duration;

use crate::support::program::{Program, keychoir_command, read_all_files, run, stderr};
use crate::support::{
    CLIENT_TOKEN, FIRST_KEY, SECOND_KEY, SPEECH_PATH, THIRD_KEY, TestProxy, VOICE_ID, bind_loopback,
    client_config, start_proxy_in, start_proxy_with, wait_until,
};
use keychoir::config::Config;
use keychoir::policy::client::{AllowedKeys, Rules};
use keychoir::policy::client_quota::{ClientQuota, Period, QuotaUnit, RateLimit};
use keychoir::secret::Fingerprint;
use keychoir::simulator::{Plan, Simulator};
use reqwest::Method;
use serde_json::{Value, json};

fn plan() -> Plan {
    Plan::with_keys([(FIRST_KEY, 100_000), (SECOND_KEY, 100_000)])
}

/// Configures a client with the given `rules`, and another client without rules.
fn configure_clients(rules: Rules) -> impl FnOnce(&mut Config) {
    let clients =
        vec![client_config("app", CLIENT_TOKEN, rules), client_config("other", "other", Rules::default())];
    |config| config.clients = clients
}

fn quota_of_three_requests() -> Rules {
    let quota = ClientQuota { amount: 3, unit: QuotaUnit::Requests, period: Period::Total };
    Rules { quota: Some(quota), ..Rules::default() }
}

/// Returns the status of a response and the error code of the proxy, or `""` for a response of the provider.
fn status_and_code(response: &reqwest::Response) -> (u16, &str) {
    let code = response.headers().get("x-keychoir-error").map_or("", |code| code.to_str().unwrap());
    (response.status().as_u16(), code)
}

const QUOTA_EXCEEDED: (u16, &str) = (402, "client_quota_exceeded");

#[tokio::test]
async fn a_quota_of_requests_counts_served_and_charged_requests_only() {
    let proxy = start_proxy_with(plan(), configure_clients(quota_of_three_requests())).await;
    assert_eq!(proxy.request_speech(10).await.status(), 200);
    // Reads and refused requests are not counted.
    assert_eq!(proxy.get("/v1/voices").await.status(), 200);
    assert_eq!(proxy.post(SPEECH_PATH, &json!({"texxt": "a"})).await.status(), 422);
    assert_eq!(proxy.request_speech(10).await.status(), 200);
    assert_eq!(proxy.request_speech(10).await.status(), 200);
    let response = proxy.request_speech(10).await;
    assert_eq!(status_and_code(&response), QUOTA_EXCEEDED);
    let body: Value = response.json().await.unwrap();
    assert_eq!(body["detail"]["status"], "insufficient_credits");
    assert_eq!(body["detail"]["message"], "This client has used its quota of 3 requests.");
    assert_eq!(proxy.get("/v1/voices").await.status(), 200);
    let request = proxy.request(Method::POST, SPEECH_PATH, "other").json(&json!({"text": "a"}));
    assert_eq!(request.send().await.unwrap().status(), 200, "the quota must not apply to another client");
    proxy.close().await;
}

#[tokio::test]
async fn a_quota_survives_a_restart() {
    let first = start_proxy_with(plan(), configure_clients(quota_of_three_requests())).await;
    assert_eq!(first.request_speech(10).await.status(), 200);
    assert_eq!(first.get("/v1/voices").await.status(), 200);
    assert_eq!(first.request_speech(10).await.status(), 200);
    let (_, directory) = first.close().await;
    let second = start_proxy_in(directory, plan(), configure_clients(quota_of_three_requests())).await;
    assert_eq!(second.request_speech(10).await.status(), 200);
    assert_eq!(status_and_code(&second.request_speech(10).await), QUOTA_EXCEEDED);
}

#[tokio::test]
async fn a_client_is_refused_when_its_quota_of_credits_is_exceeded() {
    let quota = ClientQuota { amount: 25, unit: QuotaUnit::Credits, period: Period::Month };
    let proxy =
        start_proxy_with(plan(), configure_clients(Rules { quota: Some(quota), ..Rules::default() })).await;
    assert_eq!(proxy.request_speech(10).await.status(), 200);
    assert_eq!(proxy.request_speech(10).await.status(), 200);
    let response = proxy.request_speech(10).await;
    assert_eq!(status_and_code(&response), QUOTA_EXCEEDED);
    assert!(response.text().await.unwrap().contains(
        "has 5 of its quota of 25 credits per month left, and this request may need 10. It resets at "
    ));
    proxy.close().await;
}

#[tokio::test]
async fn a_rate_limited_client_receives_a_retry_after_header() {
    let rate = RateLimit { requests: 1, interval: Duration::from_secs(3_600) };
    let proxy =
        start_proxy_with(plan(), configure_clients(Rules { rate_limit: Some(rate), ..Rules::default() }))
            .await;
    assert_eq!(proxy.get("/v1/voices").await.status(), 200);
    let response = proxy.get("/v1/voices").await;
    assert_eq!(status_and_code(&response), (429, "client_rate_limited"));
    let seconds: u64 = response.headers()["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((3_500..=3_600).contains(&seconds), "the wait must be at most an hour, and it is {seconds} s");
    proxy.close().await;
}

#[tokio::test]
async fn a_client_is_refused_beyond_its_maximum_of_concurrent_requests() {
    let proxy =
        start_proxy_with(plan(), configure_clients(Rules { max_concurrent: Some(1), ..Rules::default() }))
            .await;
    proxy.simulator.queue_faults(FIRST_KEY, vec!["slow_body=3600s".parse().unwrap()]);
    let mut response = proxy.post(&format!("{SPEECH_PATH}/stream"), &json!({"text": "a".repeat(100)})).await;
    assert!(response.chunk().await.unwrap().is_some());
    let refused_response = proxy.get("/v1/voices").await;
    assert_eq!(
        (status_and_code(&refused_response), &refused_response.headers()["retry-after"]),
        ((429, "client_concurrency_exceeded"), &"1".parse().unwrap())
    );
    drop(response);
    wait_until(|| proxy.simulator.ledger().totals.in_flight == 0).await;
    proxy.wait_until_served("/v1/voices").await;
    proxy.close().await;
}

#[tokio::test]
async fn a_client_may_request_its_allowed_paths_only() {
    let paths = vec!["/v1/text-to-speech".to_owned(), "/v1/voices/{id}".to_owned()];
    let proxy = start_proxy_with(plan(), configure_clients(Rules { paths, ..Rules::default() })).await;
    assert_eq!(proxy.request_speech(10).await.status(), 200);
    assert_eq!(proxy.get(&format!("/v1/voices/{VOICE_ID}")).await.status(), 200);
    for (path, expected) in [
        ("/v1/voices", (403, "path_not_allowed")),
        ("/v1/user", (403, "path_not_allowed")),
        ("/user", (403, "path_not_allowed")),
        // reqwest resolves the dots before it sends the request.
        ("/v1/text-to-speech/../user", (403, "path_not_allowed")),
        ("/v1/text-to-speech%2f..%2fuser", (400, "ambiguous_path")),
        ("/v1/text-to-speech/..;/user", (400, "ambiguous_path")),
    ] {
        let request = proxy.request(Method::GET, path, CLIENT_TOKEN);
        assert_eq!(
            status_and_code(&request.send().await.unwrap()),
            expected,
            "{path}: the response must have the status and the code {expected:?}"
        );
    }
    assert_eq!(proxy.request_counts(&[FIRST_KEY, SECOND_KEY]), [2, 0]);
    proxy.close().await;
}

#[tokio::test]
async fn a_client_is_served_with_its_allowed_keys_only() {
    let allowed_keys = AllowedKeys { keys: vec!["second".to_owned()], workspaces: Vec::new() };
    let rules = Rules { allowed_keys, ..Rules::default() };
    let proxy = start_proxy_with(plan(), |config| {
        configure_clients(rules)(config);
        config.keys[1].name = Some("second".to_owned());
    })
    .await;
    assert_eq!(proxy.request_speech(10).await.status(), 200);
    assert_eq!(proxy.request_counts(&[FIRST_KEY, SECOND_KEY]), [0, 1]);
    proxy.set_fault(SECOND_KEY, "quota");
    for _ in 0..2 {
        assert_eq!(
            status_and_code(&proxy.request_speech(10).await),
            (401, "all_keys_exhausted"),
            "the client must not use the first key"
        );
    }
    assert_eq!(proxy.request_counts(&[FIRST_KEY]), [0]);
    proxy.close().await;
}

/// Sends a request with the client's own key, and with the token, if any, in the `x-keychoir-token` header.
async fn send_with_own_key(
    proxy: &TestProxy,
    method: Method,
    path: &str,
    token: Option<&str>,
) -> reqwest::Response {
    let request = proxy.request(method, path, THIRD_KEY).json(&json!({"text": "hello"}));
    let request = token.into_iter().fold(request, |request, token| request.header("x-keychoir-token", token));
    request.send().await.unwrap()
}

/// Starts a proxy whose provider knows a third key, which is not in the pool.
async fn start_proxy_with_own_key(credits: u64, change: impl FnOnce(&mut Config)) -> TestProxy {
    let plan = Plan::with_keys([(FIRST_KEY, 100_000), (SECOND_KEY, 100_000), (THIRD_KEY, credits)]);
    start_proxy_with(plan, |config| {
        config.keys.pop();
        change(config);
    })
    .await
}

#[tokio::test]
async fn a_request_with_its_own_key_does_not_use_the_pool_or_the_quota() {
    let rules = Rules { may_bring_key: true, max_concurrent: Some(1), ..quota_of_three_requests() };
    let proxy = start_proxy_with_own_key(0, configure_clients(rules)).await;
    for _ in 0..5 {
        // The account of the client's key is exhausted. The request is not retried with a key of the pool, and the
        // keys of the pool do not enter a cooldown.
        let response = send_with_own_key(&proxy, Method::POST, SPEECH_PATH, Some(CLIENT_TOKEN)).await;
        assert_eq!(status_and_code(&response), (401, ""));
        // The request counts as concurrent until its response is read, and the maximum is one.
        response.bytes().await.unwrap();
    }
    let user: Value =
        send_with_own_key(&proxy, Method::GET, "/v1/user", Some(CLIENT_TOKEN)).await.json().await.unwrap();
    assert_eq!(user["first_name"], "Simulator", "the account of the client's own key must serve the request");
    assert_eq!(
        proxy.request_counts(&[FIRST_KEY, SECOND_KEY, THIRD_KEY]),
        [0, 0, 5],
        "the pool must not serve a request with the client's own key"
    );
    assert_eq!(proxy.key_statuses().await, ["active", "active"]);
    // Without its own key, the client uses the pool and has its whole quota.
    for _ in 0..3 {
        let response = proxy.request_speech(10).await;
        assert_eq!(response.status(), 200);
        response.bytes().await.unwrap();
    }
    assert_eq!(status_and_code(&proxy.request_speech(10).await), QUOTA_EXCEEDED);
    let (ledger, directory) = proxy.close().await;
    assert_eq!(ledger.violations, [""; 0]);
    let path = directory.path().join("keychoir.db");
    let connection = rusqlite::Connection::open(&path).unwrap();
    let own_key_records: (i64, String) = connection
        .query_row("SELECT count(*), min(client) FROM attempts WHERE key_hash = 'own'", [], |row| {
            Ok((row.get(0)?, row.get(1)?))
        })
        .unwrap();
    assert_eq!(own_key_records, (6, "app".to_owned()));
    let database = std::fs::read(path).unwrap();
    for secret in [THIRD_KEY, &Fingerprint::new(THIRD_KEY).to_string()] {
        let is_in_database = database.windows(secret.len()).any(|bytes| bytes == secret.as_bytes());
        assert!(!is_in_database, "the database must not contain the client's own key");
    }
}

#[tokio::test]
async fn a_clients_own_key_is_not_used_without_permission() {
    let proxy = start_proxy_with_own_key(100, configure_clients(Rules::default())).await;
    assert_eq!(
        status_and_code(&send_with_own_key(&proxy, Method::GET, "/v1/voices", None).await),
        (401, "client_token_wrong")
    );
    assert_eq!(
        status_and_code(&send_with_own_key(&proxy, Method::GET, "/v1/voices", Some("wrong")).await),
        (401, "client_token_wrong")
    );
    assert_eq!(send_with_own_key(&proxy, Method::GET, "/v1/voices", Some(CLIENT_TOKEN)).await.status(), 200);
    assert_eq!(proxy.request_counts(&[FIRST_KEY, SECOND_KEY, THIRD_KEY]), [1, 0, 0]);
    proxy.close().await;
}

#[tokio::test]
async fn clients_without_a_token_are_served_with_their_own_keys() {
    let proxy = start_proxy_with_own_key(100, |config| {
        configure_clients(Rules::default())(config);
        config.access.bring_your_own_key = true;
    })
    .await;
    assert_eq!(send_with_own_key(&proxy, Method::GET, "/v1/voices", None).await.status(), 200);
    assert_eq!(
        status_and_code(&send_with_own_key(&proxy, Method::GET, "/api/elevenlabs-status", None).await),
        (401, "client_token_wrong")
    );
    assert_eq!(proxy.get("/v1/voices").await.status(), 200);
    assert_eq!(proxy.request_counts(&[FIRST_KEY, SECOND_KEY, THIRD_KEY]), [1, 0, 1]);
    let clients: Vec<String> = proxy.into_records().await.into_iter().map(|record| record.client).collect();
    assert_eq!(clients, ["own", "app"]);
}

/// The result of a `keychoir clients` command.
struct CommandResult {
    exit_code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl CommandResult {
    /// Asserts that the command was refused with this exit code and a message that contains `expected`.
    #[track_caller]
    fn assert_refused(&self, exit_code: i32, expected: &str) {
        assert_eq!(self.exit_code, Some(exit_code), "the command must be refused: {}", self.stderr);
        assert!(
            self.stderr.contains(expected),
            "the error message must contain {expected:?}: {}",
            self.stderr
        );
    }
}

/// Runs `keychoir clients` with the given `arguments` and a configuration file.
fn run_clients(arguments: &[&str], file: &Path) -> CommandResult {
    let arguments = [&["clients"], arguments, &["--config", file.to_str().unwrap()]].concat();
    let directory = file.parent().unwrap();
    let mut command = keychoir_command(&arguments);
    let output = run(command.env("KEYCHOIR_STORAGE__PATH", directory.join("keychoir.db")));
    let stderr = stderr(&output);
    CommandResult {
        exit_code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr,
    }
}

/// Adds and lists the client `app` while Keychoir is not running. Returns its token.
fn add_client_while_stopped(file: &Path) -> String {
    let added = run_clients(&["add", "app", "--quota", "1 request", "--max-concurrent", "4"], file);
    let token = added.stdout.trim().to_owned();
    let expected = (Some(0), 51);
    assert_eq!(
        (added.exit_code, token.len()),
        expected,
        "the command must print a token of 51 characters: {}",
        added.stderr
    );
    assert!(!added.stderr.contains(&token), "the token must be printed only to the standard output");
    assert_eq!(run_clients(&["add", "app"], file).exit_code, Some(1), "a name must be used only once");
    run_clients(&["add", "web", "--rate-limit", "fast"], file)
        .assert_refused(78, "`fast` is not a rate limit");
    assert_eq!(run_clients(&["list"], file).stdout, "app  1 request, 4 concurrent requests\n");
    let list: Value = serde_json::from_str(&run_clients(&["list", "--json"], file).stdout).unwrap();
    assert_eq!(
        (&list["clients"][0]["name"], &list["clients"][0]["max_concurrent"]),
        (&json!("app"), &json!(4))
    );
    token
}

#[tokio::test]
async fn a_client_is_added_and_revoked_while_the_program_runs() {
    let simulator = Simulator::start(bind_loopback().await, plan()).await.unwrap();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("keychoir.toml");
    let text = "# mine\n[server]\nlisten = \"0.0.0.0:0\"\nreload_interval = \"0s\"\n";
    std::fs::write(&file, text).unwrap();
    let token = add_client_while_stopped(&file);
    let token = token.as_str();

    let mut command = keychoir_command(&["serve", "--config", file.to_str().unwrap()]);
    command
        .env("ELEVENLABS_API_KEYS", format!("{FIRST_KEY},{SECOND_KEY}"))
        .env("KEYCHOIR_STORAGE__PATH", directory.path().join("keychoir.db"))
        .env("KEYCHOIR_UPSTREAM__BASE_URL", simulator.base_url())
        .env("KEYCHOIR_LOG__LEVEL", "trace")
        .env("KEYCHOIR_LOG__FORMAT", "json");
    let mut program = Program::start(&mut command);
    let port = program.wait_for_address().rsplit(':').next().unwrap().to_owned();
    let url = format!("http://127.0.0.1:{port}");
    let client = keychoir::upstream::http_client().unwrap().build().unwrap();
    let get_voices = async |token: &str| {
        let request = client.get(format!("{url}/v1/voices")).header("xi-api-key", token);
        request.send().await.unwrap().status().as_u16()
    };
    assert_eq!((get_voices(token).await, get_voices("other").await), (200, 401));

    // The configured port is 0, so the command does not know the port of the running server.
    run_clients(&["add", "second"], &file).assert_refused(1, "name its address with --url");
    let run_online = |arguments: &[&str]| run_clients(&[arguments, &["--url", &url]].concat(), &file);
    let added = run_online(&["add", "second", "--bring-your-own-key", "--json"]);
    assert_eq!(added.exit_code, Some(0), "the client must be added: {}", added.stderr);
    let added: Value = serde_json::from_str(&added.stdout).unwrap();
    let second_token = added["token"].as_str().unwrap();
    assert_eq!(run_online(&["revoke", "app"]).exit_code, Some(0));
    assert_eq!(run_online(&["revoke", "app"]).exit_code, Some(1), "a client must be revoked only once");
    run_online(&["revoke", "second"]).assert_refused(1, "the only client");
    assert_eq!((get_voices(token).await, get_voices(second_token).await), (401, 200));
    // The provider does not know this key of the client.
    let own_key = "sk_own_canary_000011112222333344445555666677778888";
    let request = client.get(format!("{url}/v1/voices")).header("xi-api-key", own_key);
    assert_eq!(request.header("x-keychoir-token", second_token).send().await.unwrap().status(), 401);

    let (code, log) = program.terminate();
    assert_eq!(code, Some(0));
    let files = read_all_files(directory.path());
    for secret in [token, second_token, own_key, &Fingerprint::new(own_key).to_string()] {
        assert!(!log.contains(secret), "the log must contain no secret");
        let is_in_file = files.windows(secret.len()).any(|bytes| bytes == secret.as_bytes());
        assert!(!is_in_file, "the files must contain no secret");
    }
    let text_after = std::fs::read_to_string(&file).unwrap();
    assert_eq!(text_after, text, "the commands must not change the configuration file");
}

//! Tests the proxy with providers whose responses are malformed, too long, too short, badly timed or wrongly encoded,
//! or contain API keys or impossible numbers. One test runs each case of a table, another one responds to polls of the
//! subscription, and a third one runs random mutations of the cases. After each response, the proxy must serve valid
//! requests if a key is usable, and its usage records must be plausible.

use std::time::Duration;

use crate::hostile::clients::{AfterSending, exchange};
use crate::hostile::escape_bytes;
use crate::hostile::mutation::{Random, Seeds, mutate_and_split};
use crate::hostile::providers::{
    self, ConnectionEnd, Provider, ProviderCase, RequestKind, ResponseOutcome, SPEECH_BODY, ScriptedResponse,
    VALID_REQUEST_MARK, VOICES_BODY, request,
};
use crate::support::{FIRST_KEY, SECOND_KEY, TestProxy, read_usage_records, start_proxy_with};
use keychoir::config::Config;
use keychoir::policy::key_state::KeyStatus;
use keychoir::simulator::Plan;

const KEYS: [&str; 2] = [FIRST_KEY, SECOND_KEY];

/// The time that the proxy waits for the head of a response.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(1);

/// The lowest recorded usage that is implausible, in credits. No request costs as much.
const IMPLAUSIBLE_CREDITS: u64 = 1_000_000_001;

async fn start_proxy(provider: &Provider, change: impl FnOnce(&mut Config)) -> TestProxy {
    start_proxy_with(Plan::with_keys(KEYS.map(|key| (key, 100_000))), |config| {
        config.upstream.base_url = provider.url.parse().unwrap();
        config.upstream.response_timeout = RESPONSE_TIMEOUT;
        change(config);
    })
    .await
}

/// Checks that the proxy serves each valid request with the response to this request.
async fn check_valid_requests_are_served(proxy: &TestProxy) -> Result<(), String> {
    for (request_kind, body) in [(RequestKind::Voices, VOICES_BODY), (RequestKind::Speech, SPEECH_BODY)] {
        let received_bytes = exchange(
            proxy.app.address(),
            &[request(request_kind, VALID_REQUEST_MARK)],
            AfterSending::ReadToEnd,
        )
        .await?;
        providers::check_outcome(&received_bytes, ResponseOutcome::Body(200, body))
            .map_err(|failure| format!("a valid {request_kind:?} request failed: {failure}"))?;
    }
    Ok(())
}

/// Sends a request, and makes the provider send the scripted response. Returns the bytes that the client received, and
/// a message for each failed check.
async fn run_case(
    proxy: &TestProxy,
    provider: &Provider,
    request_kind: RequestKind,
    script: ScriptedResponse,
) -> (Vec<u8>, Vec<String>) {
    let after_response = script.after_response.clone();
    provider.set_script(script);
    // An accepted WebSocket stays open until the client closes it.
    let after_sending =
        if request_kind == RequestKind::Socket { AfterSending::HalfClose } else { AfterSending::ReadToEnd };
    let (received, mut case_failures) =
        match exchange(proxy.app.address(), &[request(request_kind, "")], after_sending).await {
            Ok(received) => (received, Vec::new()),
            Err(failure) => (Vec::new(), vec![failure]),
        };
    provider.set_script(ScriptedResponse::default());
    // The provider must finish this response before the next request arrives.
    crate::support::wait_until(|| provider.is_idle()).await;
    if !after_response.is_empty() {
        provider.send_to_all(&after_response).await;
    }
    case_failures.extend(providers::find_leaks(&received, &KEYS));
    case_failures.extend(
        provider
            .malformed_requests()
            .into_iter()
            .map(|failure| format!("the provider received a malformed request: {failure}")),
    );
    (received, case_failures)
}

/// Stops the proxy. Returns a message for each usage record whose credits are negative or implausible.
async fn check_usage_records(proxy: TestProxy) -> Vec<String> {
    let directory = proxy.close_unchecked().await;
    let records = read_usage_records(&directory.path().join("keychoir.db"));
    let is_plausible =
        |credits: i64| u64::try_from(credits).is_ok_and(|credits| credits < IMPLAUSIBLE_CREDITS);
    let implausible_records = records.iter().filter(|record| !is_plausible(record.credits));
    implausible_records.map(|record| format!("implausible credits in the usage record {record:?}")).collect()
}

fn count_unusable_keys(proxy: &TestProxy) -> usize {
    proxy.app.keys().iter().filter(|key| key.state.status() != KeyStatus::Active).count()
}

#[tokio::test]
async fn each_hostile_response_has_the_expected_outcome() {
    let mut failures = Vec::new();
    // A refusal changes the state of keys, so each case with a refusal is run with a new proxy.
    let (state_changing, independent): (Vec<ProviderCase>, Vec<ProviderCase>) =
        providers::cases(FIRST_KEY).into_iter().partition(|case| case.changes_key_state);
    failures.extend(run_cases(independent).await);
    for case in state_changing {
        failures.extend(run_cases(vec![case]).await);
    }
    assert!(
        failures.is_empty(),
        "no check may fail, and {} failed:\n{}",
        failures.len(),
        failures.join("\n")
    );
}

/// Runs the cases one after the other with one proxy. Returns a message for each failed check.
async fn run_cases(cases: Vec<ProviderCase>) -> Vec<String> {
    let provider = Provider::start().await;
    let proxy = start_proxy(&provider, |_| {}).await;
    let mut failures = Vec::new();
    for ProviderCase { name, request_kind, script, outcome, max_unusable_keys, .. } in cases {
        let (received, mut case_failures) = run_case(&proxy, &provider, request_kind, script).await;
        if case_failures.is_empty() {
            case_failures.extend(providers::check_outcome(&received, outcome).err());
        }
        let unusable_count = count_unusable_keys(&proxy);
        if unusable_count > max_unusable_keys {
            case_failures
                .push(format!("at most {max_unusable_keys} keys may be unusable, and {unusable_count} are"));
        }
        if unusable_count < KEYS.len() {
            case_failures.extend(check_valid_requests_are_served(&proxy).await.err());
        }
        let used_credits: Vec<u64> = proxy.app.keys().iter().map(|key| key.quota.count).collect();
        if used_credits.iter().any(|count| *count >= IMPLAUSIBLE_CREDITS) {
            case_failures.push(format!("the recorded usage is implausible: {used_credits:?} credits"));
        }
        failures.extend(case_failures.iter().map(|failure| format!("{name}: {failure}")));
    }
    failures.extend(check_usage_records(proxy).await);
    failures
}

#[tokio::test]
async fn impossible_numbers_in_a_subscription_do_not_make_a_key_unusable() {
    let mut failures = Vec::new();
    for (name, response) in providers::account_responses() {
        let provider = Provider::start().await;
        provider.set_subscription_script(ScriptedResponse {
            chunks: vec![response],
            end: ConnectionEnd::Close,
            ..ScriptedResponse::default()
        });
        let proxy = start_proxy(&provider, |_| {}).await;
        let mut case_failures: Vec<String> =
            check_valid_requests_are_served(&proxy).await.err().into_iter().collect();
        let status = proxy.get("/api/elevenlabs-status").await;
        if status.status() != 200 || status.json::<serde_json::Value>().await.is_err() {
            case_failures.push("/api/elevenlabs-status does not return a JSON document".to_owned());
        }
        if count_unusable_keys(&proxy) > 0 {
            case_failures.push(format!("{} keys are unusable", count_unusable_keys(&proxy)));
        }
        case_failures.extend(check_usage_records(proxy).await);
        failures.extend(case_failures.iter().map(|failure| format!("{name}: {failure}")));
    }
    assert!(
        failures.is_empty(),
        "no check may fail, and {} failed:\n{}",
        failures.len(),
        failures.join("\n")
    );
}

#[tokio::test]
async fn mutated_responses_do_not_affect_valid_requests() {
    let cases = providers::cases(FIRST_KEY);
    let responses: Vec<Vec<u8>> = cases.iter().map(|case| case.script.chunks.concat()).collect();
    let provider = Provider::start().await;
    let proxy = start_proxy(&provider, |config| {
        // A mutation may turn a response into a refusal, whose cooldown must end before the next request.
        for cooldown in [
            &mut config.pool.rate_limited_cooldown,
            &mut config.pool.concurrency_cooldown,
            &mut config.pool.exhausted_cooldown,
            &mut config.pool.invalid_confirm_cooldown,
            &mut config.pool.invalid_cooldown,
            &mut config.pool.permission_cooldown,
            &mut config.pool.feature_cooldown,
            &mut config.pool.endpoint_cooldown,
            &mut config.pool.unproven_cooldown,
            &mut config.pool.max_retry_after,
            &mut config.pool.probe_after,
            &mut config.pool.billing_cooldown,
        ] {
            *cooldown = Duration::from_millis(1);
        }
    })
    .await;
    let seeds = Seeds::from_environment();
    for seed in seeds.iter() {
        let mut random = Random::new(seed);
        let index = random.index_below(cases.len());
        let case = &cases[index];
        let chunks = mutate_and_split(&mut random, &responses[index], &responses);
        // The provider always closes the connection, because a mutated head may announce a body that never ends.
        let end = random.choose(&[ConnectionEnd::Close, ConnectionEnd::Close, ConnectionEnd::Reset]).clone();
        let script = ScriptedResponse {
            chunks: chunks.clone(),
            end,
            is_early: case.script.is_early,
            after_response: Vec::new(),
        };
        let (received, mut case_failures) =
            run_case(&proxy, &provider, case.request_kind, script.clone()).await;
        if !received.is_empty() && !received.starts_with(b"HTTP/1.1 ") {
            case_failures.push(format!("the response is not HTTP: {}", escape_bytes(&received)));
        }
        case_failures.extend(check_valid_requests_are_served(&proxy).await.err());
        let format_chunks = || chunks.iter().map(|chunk| escape_bytes(chunk)).collect::<Vec<_>>().join("\n");
        assert!(
            case_failures.is_empty(),
            "{}\nafter a mutation of \"{}\" that ends with {:?} and consists of these chunks:\n{}\n{}",
            case_failures.join("\n"),
            case.name,
            script.end,
            format_chunks(),
            seeds.reproduction_hint(seed)
        );
    }
    crate::support::wait_until(|| proxy.app.queued_requests() == 0).await;
    let record_failures = check_usage_records(proxy).await;
    assert!(
        record_failures.is_empty(),
        "the usage records must be plausible:\n{}",
        record_failures.join("\n")
    );
}

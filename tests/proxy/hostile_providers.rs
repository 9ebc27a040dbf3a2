//! Tests the proxy with providers that send malformed HTTP, too much or too little, at the wrong moment, in invalid codings, with
//! keys in any part of a response, or with impossible numbers. First each case of a table is run, then
//! mutations of the cases. After each response, valid requests are served.

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

/// The timeout of response heads.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(1);

/// A number of credits that no request costs.
const IMPLAUSIBLE_CREDITS: u64 = 1_000_000_001;

async fn start_proxy(provider: &Provider, change: impl FnOnce(&mut Config)) -> TestProxy {
    start_proxy_with(Plan::with_keys(KEYS.map(|key| (key, 100_000))), |config| {
        config.upstream.base_url = provider.url.parse().unwrap();
        config.upstream.response_timeout = RESPONSE_TIMEOUT;
        change(config);
    })
    .await
}

/// Checks that valid requests are served with the responses that belong to them.
async fn check_valid_requests_are_served(proxy: &TestProxy) -> Result<(), String> {
    for (request_kind, body) in [(RequestKind::Voices, VOICES_BODY), (RequestKind::Speech, SPEECH_BODY)] {
        let received_bytes = exchange(
            proxy.app.address(),
            &[request(request_kind, VALID_REQUEST_MARK)],
            AfterSending::ReadToEnd,
        )
        .await?;
        providers::check(&received_bytes, ResponseOutcome::Body(200, body))
            .map_err(|deviation| format!("a valid {request_kind:?} request: {deviation}"))?;
    }
    Ok(())
}

/// Sends a request, to which the provider sends the scripted response. Returns the bytes that the client
/// received, and all deviations.
async fn run_case(
    proxy: &TestProxy,
    provider: &Provider,
    request_kind: RequestKind,
    script: ScriptedResponse,
) -> (Vec<u8>, Vec<String>) {
    let after_response = script.after_response.clone();
    provider.set_script(script);
    // The client closes a WebSocket that is open.
    let after_sending =
        if request_kind == RequestKind::Socket { AfterSending::HalfClose } else { AfterSending::ReadToEnd };
    let (received, mut case_deviations) =
        match exchange(proxy.app.address(), &[request(request_kind, "")], after_sending).await {
            Ok(received) => (received, Vec::new()),
            Err(deviation) => (Vec::new(), vec![deviation]),
        };
    provider.set_script(ScriptedResponse::default());
    // The provider must not send the rest of its response to the next request.
    crate::support::wait_until(|| provider.is_idle()).await;
    if !after_response.is_empty() {
        provider.send_to_all(&after_response).await;
    }
    case_deviations.extend(providers::find_leaks(&received, &KEYS));
    case_deviations.extend(
        provider
            .malformed_requests()
            .into_iter()
            .map(|deviation| format!("the provider received a malformed request: {deviation}")),
    );
    (received, case_deviations)
}

/// Returns the usage records whose credits are negative or implausible.
async fn check_usage_records(proxy: TestProxy) -> Vec<String> {
    let directory = proxy.close_unchecked().await;
    let records = read_usage_records(&directory.path().join("keychoir.db"));
    let is_plausible =
        |credits: i64| u64::try_from(credits).is_ok_and(|credits| credits < IMPLAUSIBLE_CREDITS);
    let deviations = records.iter().filter(|record| !is_plausible(record.credits));
    deviations.map(|record| format!("the usage record is implausible: {record:?}")).collect()
}

fn count_unusable_keys(proxy: &TestProxy) -> usize {
    proxy.app.keys().iter().filter(|key| key.state.status() != KeyStatus::Active).count()
}

#[tokio::test]
async fn each_hostile_response_has_its_outcome() {
    let mut deviations = Vec::new();
    // A refusal changes the state of keys, so each of these cases is run with a new proxy.
    let (state_changing, independent): (Vec<ProviderCase>, Vec<ProviderCase>) =
        providers::cases(FIRST_KEY).into_iter().partition(|case| case.changes_key_state);
    deviations.extend(run_cases(independent).await);
    for case in state_changing {
        deviations.extend(run_cases(vec![case]).await);
    }
    assert!(deviations.is_empty(), "{} deviations:\n{}", deviations.len(), deviations.join("\n"));
}

async fn run_cases(cases: Vec<ProviderCase>) -> Vec<String> {
    let provider = Provider::start().await;
    let proxy = start_proxy(&provider, |_| {}).await;
    let mut deviations = Vec::new();
    for ProviderCase { name, request_kind, script, outcome, max_unusable_keys, .. } in cases {
        let (received, mut case_deviations) = run_case(&proxy, &provider, request_kind, script).await;
        if case_deviations.is_empty() {
            case_deviations.extend(providers::check(&received, outcome).err());
        }
        let unusable_count = count_unusable_keys(&proxy);
        if unusable_count > max_unusable_keys {
            case_deviations.push(format!("{unusable_count} keys are unusable, not {max_unusable_keys}"));
        }
        if unusable_count < KEYS.len() {
            case_deviations.extend(check_valid_requests_are_served(&proxy).await.err());
        }
        let used_credits: Vec<u64> = proxy.app.keys().iter().map(|key| key.quota.count).collect();
        if used_credits.iter().any(|count| *count >= IMPLAUSIBLE_CREDITS) {
            case_deviations.push(format!("the recorded usage is implausible: {used_credits:?} credits"));
        }
        deviations.extend(case_deviations.iter().map(|deviation| format!("{name}: {deviation}")));
    }
    deviations.extend(check_usage_records(proxy).await);
    deviations
}

#[tokio::test]
async fn impossible_numbers_of_a_subscription_do_not_make_a_key_unusable() {
    let mut deviations = Vec::new();
    for (name, bytes) in providers::account_responses() {
        let provider = Provider::start().await;
        provider.set_subscription_script(ScriptedResponse {
            chunks: vec![bytes],
            end: ConnectionEnd::Close,
            ..ScriptedResponse::default()
        });
        let proxy = start_proxy(&provider, |_| {}).await;
        let mut case_deviations: Vec<String> =
            check_valid_requests_are_served(&proxy).await.err().into_iter().collect();
        let status = proxy.get("/api/elevenlabs-status").await;
        if status.status() != 200 || status.json::<serde_json::Value>().await.is_err() {
            case_deviations.push("the status document is not valid".to_owned());
        }
        if count_unusable_keys(&proxy) > 0 {
            case_deviations.push(format!("{} keys are unusable", count_unusable_keys(&proxy)));
        }
        case_deviations.extend(check_usage_records(proxy).await);
        deviations.extend(case_deviations.iter().map(|deviation| format!("{name}: {deviation}")));
    }
    assert!(deviations.is_empty(), "{} deviations:\n{}", deviations.len(), deviations.join("\n"));
}

#[tokio::test]
async fn mutated_responses_do_not_affect_valid_requests() {
    let cases = providers::cases(FIRST_KEY);
    let texts: Vec<Vec<u8>> = cases.iter().map(|case| case.script.chunks.concat()).collect();
    let provider = Provider::start().await;
    let proxy = start_proxy(&provider, |config| {
        // A mutation may be a refusal. Its cooldown ends before the next request.
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
        let (case, text) = (&cases[index], &texts[index]);
        let chunks = mutate_and_split(&mut random, text, &texts);
        // The provider always closes the connection, because a mutation may be the head of an endless response.
        let end = random.choose(&[ConnectionEnd::Close, ConnectionEnd::Close, ConnectionEnd::Reset]).clone();
        let script = ScriptedResponse {
            chunks: chunks.clone(),
            end,
            is_early: case.script.is_early,
            after_response: Vec::new(),
        };
        let (received, mut case_deviations) =
            run_case(&proxy, &provider, case.request_kind, script.clone()).await;
        if !received.is_empty() && !received.starts_with(b"HTTP/1.1 ") {
            case_deviations.push(format!("the response is not HTTP: {}", escape_bytes(&received)));
        }
        case_deviations.extend(check_valid_requests_are_served(&proxy).await.err());
        let sent_chunks = || chunks.iter().map(|chunk| escape_bytes(chunk)).collect::<Vec<_>>().join("\n");
        assert!(
            case_deviations.is_empty(),
            "{}\nafter \"{}\" {:?}\n{}\n{}",
            case_deviations.join("\n"),
            case.name,
            script.end,
            sent_chunks(),
            seeds.reproduction_hint(seed)
        );
    }
    crate::support::wait_until(|| proxy.app.queued_requests() == 0).await;
    let case_deviations = check_usage_records(proxy).await;
    assert!(case_deviations.is_empty(), "{}", case_deviations.join("\n"));
}

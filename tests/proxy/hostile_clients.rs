//! Tests the proxy with clients that send malformed, ambiguous or forbidden requests, or send too much, too little or
//! too slowly. One test runs each case of a table, and another test runs random mutations of these cases. After each
//! case, a valid request must be served, and no client may have received a key. A tap parses the requests between the
//! proxy and its provider strictly.

use std::time::Duration;

use crate::hostile::clients::{
    self, AfterSending, ClientCase, ClientOutcome, Forwarded, TOKEN, exchange, valid_request,
};
use crate::hostile::http_parser::{self, RequestHead};
use crate::hostile::mutation::{Random, Seeds, mutate_and_split};
use crate::hostile::tap::{ForwardedRequests, Tap, TapRecord};
use crate::hostile::{contains, escape_bytes};
use crate::support::{FIRST_KEY, SECOND_KEY, TestProxy, start_proxy_with};
use keychoir::config::ClientConfig;
use keychoir::policy::client::Rules;
use keychoir::policy::key_state::KeyStatus;
use keychoir::secret::TokenFingerprint;
use keychoir::simulator::Plan;

const KEYS: [&str; 2] = [FIRST_KEY, SECOND_KEY];

/// The timeouts of request heads and of pauses in a body. Cases with stalled requests wait for them to expire.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(1);

/// Starts a proxy with a tap on its connections to the provider. The proxy has one client, or no client if
/// `needs_no_token`.
async fn start_tapped_proxy(needs_no_token: bool) -> (TestProxy, TapRecord) {
    let tap = Tap::new(&KEYS).await;
    let mut record = None;
    let proxy = start_proxy_with(Plan::with_keys(KEYS.map(|key| (key, 1_000_000))), |config| {
        let provider = config.upstream.base_url.to_string();
        let provider = provider.trim_start_matches("http://").trim_end_matches('/').parse().unwrap();
        config.upstream.base_url = tap.url().parse().unwrap();
        record = Some(tap.start_forwarding(provider));
        config.quota_polling.enabled = false;
        config.server.request_headers_timeout = CLIENT_TIMEOUT;
        config.server.request_body_timeout = CLIENT_TIMEOUT;
        let (name, token) = ("app".to_owned(), TokenFingerprint::new(TOKEN));
        let client = ClientConfig::new(name, token, Rules::default());
        config.clients = (!needs_no_token).then_some(client).into_iter().collect();
    })
    .await;
    (proxy, record.unwrap())
}

/// Sends a valid request on a new connection and checks that it is served.
async fn check_valid_request_is_served(proxy: &TestProxy) -> Result<(), String> {
    let request = valid_request("/v1/voices?valid=1", "connection: close\r\n").into_bytes();
    let received_bytes = exchange(proxy.app.address(), &[request], AfterSending::ReadToEnd).await?;
    clients::check_outcome(&received_bytes, ClientOutcome::Responses(&[200]), AfterSending::ReadToEnd)
        .map_err(|failure| format!("a valid request: {failure}"))
}

/// Waits until the proxy has no request, lease, session or connection, except the connection of this check.
async fn wait_until_idle(proxy: &TestProxy) {
    let gauges = ["requests_in_flight", "requests_queued", "websocket_sessions", "key_requests_in_flight"];
    let polling = async {
        loop {
            let request = valid_request("/metrics", "connection: close\r\n").into_bytes();
            let received_bytes =
                exchange(proxy.app.address(), &[request], AfterSending::ReadToEnd).await.unwrap();
            let page =
                String::from_utf8(http_parser::parse_responses(&received_bytes).unwrap().remove(0).body)
                    .unwrap();
            let value = |line: &str| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap();
            let sum_of = |name: &str| {
                let name = format!("keychoir_{name}");
                let lines = page.lines().filter(|line| line.split([' ', '{']).next() == Some(&name));
                lines.map(value).sum::<f64>()
            };
            let (remaining, connections) = (gauges.map(sum_of), sum_of("connections"));
            if remaining == [0.0; 4] && connections <= 1.0 {
                return;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(30), polling)
        .await
        .expect("the proxy must release all resources of the hostile clients");
}

#[tokio::test]
async fn each_hostile_client_observes_its_outcome_and_receives_no_key() {
    let mut failures = Vec::new();
    for needs_no_token in [false, true] {
        let (proxy, record) = start_tapped_proxy(needs_no_token).await;
        for case in clients::cases().into_iter().filter(|case| case.needs_no_token == needs_no_token) {
            let case_failures = run_case(&proxy, &record, &case).await;
            failures.extend(
                case_failures
                    .iter()
                    .map(|failure| format!("{} ({:?}): {failure}", case.name, case.after_sending)),
            );
        }
        wait_until_idle(&proxy).await;
        assert!(
            proxy.app.keys().iter().all(|key| key.state.status() == KeyStatus::Active),
            "no hostile client may change the status of a key"
        );
        proxy.close().await;
    }
    assert!(
        failures.is_empty(),
        "no check may fail, and {} failed:\n{}",
        failures.len(),
        failures.join("\n")
    );
}

/// Runs a case. Returns a message for each difference from its expected outcome.
async fn run_case(proxy: &TestProxy, record: &TapRecord, case: &ClientCase) -> Vec<String> {
    let (received, mut case_failures) =
        match exchange(proxy.app.address(), &case.chunks, case.after_sending).await {
            Ok(received) => (received, Vec::new()),
            Err(failure) => (Vec::new(), vec![failure]),
        };
    if case_failures.is_empty() {
        case_failures.extend(clients::check_outcome(&received, case.outcome, case.after_sending).err());
    }
    case_failures.extend(
        KEYS.iter().filter(|key| contains(&received, key)).map(|_| "the client received a key".to_owned()),
    );
    case_failures.extend(check_valid_request_is_served(proxy).await.err());
    let ForwardedRequests { heads, complete_count } = match record.take() {
        Ok(forwarded_requests) => forwarded_requests,
        Err(failure) => return [case_failures, vec![failure]].concat(),
    };
    let has_token = |head: &&RequestHead| contains(&head.bytes, TOKEN);
    case_failures.extend(
        heads
            .iter()
            .filter(has_token)
            .map(|head| format!("the provider received the client token: {}", escape_bytes(&head.bytes))),
    );
    // The valid request after the case is not counted.
    let (started_count, complete_count) = (heads.len() - 1, complete_count - 1);
    let is_expected = match (case.forwarded, case.outcome) {
        (Forwarded::Nothing, _) => started_count == 0,
        (Forwarded::Complete(max_count), ClientOutcome::NotRead) => started_count <= max_count,
        (Forwarded::Complete(count), _) => (started_count, complete_count) == (count, count),
        (Forwarded::Partial, _) => started_count <= 1 && complete_count == 0,
    };
    if !is_expected {
        case_failures.push(format!(
            "the provider must receive {:?}, not {started_count} requests, {complete_count} of them complete",
            case.forwarded
        ));
    }
    case_failures
}

#[tokio::test]
async fn mutated_requests_do_not_affect_valid_requests() {
    let cases: Vec<Vec<u8>> = clients::cases().into_iter().map(|case| case.chunks.concat()).collect();
    let (proxy, record) = start_tapped_proxy(false).await;
    let seeds = Seeds::from_environment();
    for seed in seeds.iter() {
        let mut random = Random::new(seed);
        let case = random.choose(&cases).clone();
        let chunks = mutate_and_split(&mut random, &case, &cases);
        let after_sending = *random.choose(&[
            AfterSending::HalfClose,
            AfterSending::HalfClose,
            AfterSending::HalfClose,
            AfterSending::Disconnect,
            AfterSending::Reset,
        ]);
        let mut case_failures = Vec::new();
        let received =
            exchange(proxy.app.address(), &chunks, after_sending).await.unwrap_or_else(|failure| {
                case_failures.push(failure);
                Vec::new()
            });
        if !clients::is_allowed_response(&received) {
            case_failures.push(format!("the response is not allowed: {}", escape_bytes(&received)));
        }
        case_failures.extend(
            KEYS.iter()
                .filter(|key| contains(&received, key))
                .map(|_| "the client received a key".to_owned()),
        );
        case_failures.extend(check_valid_request_is_served(&proxy).await.err());
        case_failures.extend(record.take().err());
        let sent_chunks = || chunks.iter().map(|chunk| escape_bytes(chunk)).collect::<Vec<_>>().join("\n");
        assert!(
            case_failures.is_empty(),
            "{}\n{after_sending:?} after\n{}\n{}",
            case_failures.join("\n"),
            sent_chunks(),
            seeds.reproduction_hint(seed)
        );
    }
    wait_until_idle(&proxy).await;
    record.take().unwrap();
    proxy.close().await;
}

//! Tests the proxy with a provider whose responses are pseudorandom and reproducible: each account has a status, a
//! body and a `Retry-After` for each route, some of which change after half of the requests. A request must be served
//! if an account has the credits and does not refuse it. The documented exceptions are a refusal about the
//! request, two accounts that refuse with an unknown message or because of abuse, two failures of the provider, an
//! operation that may have been executed, a rate limit that applies to every account that could serve, and accounts
//! that refused such requests earlier, of which each request tries only one.
//!
//! With the environment variable `KEYCHOIR_PROVIDERS=1000`, a test run has 1,000 providers and a random seed.

use keychoir::policy::strategy::STRATEGIES;
use std::time::Duration;

use crate::support::routes::Route;
use crate::support::{CLIENT_TOKEN, TestProxy, join_all, start_proxy_with};
use keychoir::config::{ClientConfig, Config};
use keychoir::policy::client::Rules;
use keychoir::secret::TokenFingerprint;
use keychoir::simulator::{Fault, KeyPlan, Ledger, Plan, WorkspacePlan};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config as ProptestConfig, RngSeed, TestRunner};

/// The entity whose fault or limit a refusal or failure reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RefusalSubject {
    /// The response is no refusal, because the request is served.
    Served,
    /// The account or its key is at fault, and Keychoir knows the message.
    Account,
    /// The provider suspects abuse by the account or by the address of the proxy.
    Abuse,
    /// The account lacks a capability, and Keychoir knows the message.
    Capability,
    /// The request rate or the concurrency exceeds a limit, and Keychoir knows the message.
    Load,
    /// Keychoir does not know the message, so the subject is unknown.
    Unknown,
    /// The request is at fault.
    Request,
    /// The provider is overloaded and did not execute the request.
    Overload,
    /// The provider failed and may have executed the request.
    Failure,
}

/// The body of a scripted response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RefusalBody {
    /// A code and a message that Keychoir knows, and the subject that they report.
    Known(&'static str, &'static str, RefusalSubject),
    /// A code that Keychoir does not know.
    UnknownCode,
    Empty,
    Html,
    /// Bytes that are not text.
    Binary,
    /// More than the proxy reads of a refusal.
    Huge,
}

const REFUSAL_BODIES: [RefusalBody; 18] = [
    RefusalBody::Known("quota_exceeded", "You have spent it.", RefusalSubject::Account),
    RefusalBody::Known("insufficient_credits", "You do not have enough credits.", RefusalSubject::Account),
    RefusalBody::Known("payment_issue", "Your last invoice is unpaid.", RefusalSubject::Account),
    RefusalBody::Known("invalid_api_key", "Invalid API key", RefusalSubject::Account),
    RefusalBody::Known(
        "invalid_api_key",
        "The API key used is for a data residency stack.",
        RefusalSubject::Account,
    ),
    RefusalBody::Known("detected_unusual_activity", "Unusual activity detected.", RefusalSubject::Abuse),
    RefusalBody::Known(
        "missing_permissions",
        "The API key is missing a permission.",
        RefusalSubject::Capability,
    ),
    RefusalBody::Known("workspace_access_denied", "Not this workspace.", RefusalSubject::Capability),
    RefusalBody::Known(
        "feature_not_available",
        "Your subscription does not include it.",
        RefusalSubject::Capability,
    ),
    RefusalBody::Known(
        "voice_limit_reached",
        "You have as many as you may have.",
        RefusalSubject::Capability,
    ),
    RefusalBody::Known("rate_limit_exceeded", "Slow down.", RefusalSubject::Load),
    RefusalBody::Known("too_many_concurrent_requests", "Too many concurrent requests.", RefusalSubject::Load),
    RefusalBody::Known("system_busy", "Try again later.", RefusalSubject::Overload),
    RefusalBody::UnknownCode,
    RefusalBody::Empty,
    RefusalBody::Html,
    RefusalBody::Binary,
    RefusalBody::Huge,
];

/// The response of an account to every request of a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ScriptedResponse {
    status: u16,
    body: RefusalBody,
    retry_after: Option<&'static str>,
}

impl ScriptedResponse {
    fn subject(self) -> RefusalSubject {
        match (self.status, self.body) {
            (..400, _) => RefusalSubject::Served,
            (503, _) => RefusalSubject::Overload,
            (500.., _) => RefusalSubject::Failure,
            // The proxy reads the body only for these statuses.
            (404, RefusalBody::Known("feature_not_available", ..)) => RefusalSubject::Request,
            (400..=404 | 429, RefusalBody::Known(_, _, subject)) => subject,
            (401..=403 | 429, _) => RefusalSubject::Unknown,
            _ => RefusalSubject::Request,
        }
    }

    fn fault(self) -> Fault {
        let known_body = |code: &str, message: &str| {
            format!(r#"{{"detail":{{"code":"{code}","status":"{code}","message":"{message}"}}}}"#)
                .into_bytes()
        };
        let body = match self.body {
            RefusalBody::Known(code, message, _) => known_body(code, message),
            RefusalBody::UnknownCode => known_body("unheard_of", "Whatever."),
            RefusalBody::Empty => Vec::new(),
            RefusalBody::Html => b"<!doctype html><title>Blocked</title>".to_vec(),
            RefusalBody::Binary => vec![0xff, 0xfe, 0x00, 0xc3, 0x28],
            RefusalBody::Huge => {
                [known_body("quota_exceeded", "You have spent it."), vec![b' '; 100_000]].concat()
            }
        };
        // Without an executed operation, the response costs nothing.
        let mut headers = vec![("character-cost".to_owned(), "0".to_owned())];
        headers.extend(self.retry_after.map(|value| ("retry-after".to_owned(), value.to_owned())));
        Fault::Respond { status: self.status, headers, body: body.into() }
    }
}

/// An account and its responses.
#[derive(Clone, Debug)]
struct ScriptedAccount {
    tier: &'static str,
    credits: u64,
    /// The response to each of [`ROUTE_KINDS`] in the first half of the requests. `None` is the regular
    /// response.
    first_half: [Option<ScriptedResponse>; ROUTE_KINDS.len()],
    /// The response to each of [`ROUTE_KINDS`] in the second half.
    second_half: [Option<ScriptedResponse>; ROUTE_KINDS.len()],
}

/// A request of one of the [`CLIENTS`].
#[derive(Clone, Copy, Debug)]
struct ScriptedRequest {
    client: usize,
    route: Route,
    characters: usize,
}

/// A provider and the requests that are sent to it.
#[derive(Clone, Debug)]
struct ProviderScript {
    strategy: &'static str,
    accounts: Vec<ScriptedAccount>,
    requests: Vec<ScriptedRequest>,
}

/// The routes for which an account has separate responses.
const ROUTE_KINDS: [Route; 5] =
    [Route::Speech, Route::SoundEffect, Route::Transcription, Route::Voices, Route::VoiceAddition];
const SPEECH_KIND: usize = 0;

fn route_kind(route: Route) -> usize {
    let route = if route == Route::SpeechStream { Route::Speech } else { route };
    ROUTE_KINDS.iter().position(|route_kind| *route_kind == route).unwrap()
}

fn any_response() -> impl Strategy<Value = ScriptedResponse> {
    let status = prop_oneof![
        12 => prop::sample::select(vec![400_u16, 401, 402, 403, 404, 429]),
        2 => 405..429_u16,
        1 => prop::sample::select(vec![200_u16, 500, 503]),
    ];
    let retry_after = prop::option::weighted(0.3, prop::sample::select(vec!["0", "5", "86400", "soon"]));
    (status, prop::sample::select(REFUSAL_BODIES.to_vec()), retry_after)
        .prop_map(|(status, body, retry_after)| ScriptedResponse { status, body, retry_after })
}

fn any_account(is_serving_speech: bool) -> impl Strategy<Value = ScriptedAccount> {
    let tier = prop::sample::select(vec!["free", "starter", "creator", "pro", "custom"]);
    let credits = prop::sample::select(vec![0_u64, 30, 400, 5_000, 100_000]);
    let responses = || prop::array::uniform5(prop::option::weighted(0.4, any_response()));
    (tier, credits, responses(), responses(), prop::array::uniform5(prop::bool::weighted(0.3))).prop_map(
        move |(tier, credits, mut first_half, mut second_half, changes)| {
            if is_serving_speech {
                (first_half[SPEECH_KIND], second_half[SPEECH_KIND]) = (None, None);
            }
            for (index, changes) in changes.into_iter().enumerate() {
                second_half[index] = if changes { second_half[index] } else { first_half[index] };
            }
            ScriptedAccount { tier, credits, first_half, second_half }
        },
    )
}

fn any_script() -> impl Strategy<Value = ProviderScript> {
    let routes = [
        (6, Route::Speech),
        (2, Route::SpeechStream),
        (2, Route::SoundEffect),
        (1, Route::Transcription),
        (1, Route::Voices),
        (1, Route::VoiceAddition),
    ];
    let route =
        prop::strategy::Union::new_weighted(routes.map(|(weight, route)| (weight, Just(route))).into());
    let request = (0..2_usize, route, prop::sample::select(vec![1_usize, 20, 300]));
    let request =
        request.prop_map(|(client, route, characters)| ScriptedRequest { client, route, characters });
    let strategies: Vec<&str> = STRATEGIES.iter().map(|strategy| strategy.name).collect();
    any::<bool>().prop_flat_map(move |serves_speech| {
        let accounts = prop::collection::vec(any_account(serves_speech), 3..=6);
        let requests = prop::collection::vec(request.clone(), 60..=120);
        (prop::sample::select(strategies.clone()), accounts, requests)
            .prop_map(|(strategy, accounts, requests)| ProviderScript { strategy, accounts, requests })
    })
}

/// The cost of the most expensive request, in credits.
const MAX_REQUEST_COST: u64 = 300;

const CLIENTS: [&str; 2] = [CLIENT_TOKEN, "token-of-the-phone-0000000002"];

fn key(position: usize) -> String {
    format!("sk_random_{position}_00000000000000000000000000000000000")
}

fn configure_proxy(config: &mut Config, strategy: &str) {
    config.pool.strategy = strategy.parse().unwrap();
    config.server.workers = 1;
    // Unproven refusals and concurrency refusals are retried after 5 ms.
    config.pool.probe_after = Duration::from_millis(5);
    config.pool.concurrency_cooldown = Duration::from_millis(5);
    let client = |(number, token): (usize, &&str)| {
        ClientConfig::new(format!("client-{number}"), TokenFingerprint::new(token), Rules::default())
    };
    config.clients = CLIENTS.iter().enumerate().map(client).collect();
}

/// The proxy and the provider while the requests of a script are sent.
struct ScriptRun<'a> {
    script: &'a ProviderScript,
    proxy: TestProxy,
    is_second_half: bool,
    /// For each kind of route, the number of requests that were refused in the second half although an
    /// account could serve them, because it had refused such requests in the first half.
    documented_misses: [usize; ROUTE_KINDS.len()],
}

/// The account of an attempt, and its scripted response. `None` is the regular response.
type ScriptedAttempt = (usize, Option<ScriptedResponse>);

/// The parts of a response to the client that are checked.
struct ClientResponse {
    status: u16,
    is_proxy_error: bool,
    retry_after: Option<u64>,
}

impl ScriptRun<'_> {
    fn scripted_response(&self, account: usize, route_kind: usize) -> Option<ScriptedResponse> {
        let account = &self.script.accounts[account];
        if self.is_second_half { account.second_half[route_kind] } else { account.first_half[route_kind] }
    }

    fn set_faults(&self) {
        for account in 0..self.script.accounts.len() {
            for (index, route) in ROUTE_KINDS.into_iter().enumerate() {
                let fault = self.scripted_response(account, index).map(ScriptedResponse::fault);
                self.proxy.simulator.set_route_fault(&key(account), route.fault_route(), fault);
            }
        }
    }

    /// Returns whether the provider would serve the request with the given `account`.
    fn could_serve(&self, account: usize, request: ScriptedRequest, ledger: &Ledger) -> bool {
        let ScriptedAccount { tier, .. } = self.script.accounts[account];
        let is_regular = self.scripted_response(account, route_kind(request.route)).is_none();
        // Refused accounts are polled, and a poll during a request may count the request twice for a short time.
        let ScriptedAccount { first_half, second_half, .. } = self.script.accounts[account];
        let is_polled = first_half.iter().chain(&second_half).any(Option::is_some);
        let remaining =
            ledger.keys[account].remaining.saturating_sub(if is_polled { MAX_REQUEST_COST } else { 0 });
        let can_pay = match request.route {
            Route::Speech | Route::SpeechStream => remaining >= u64::try_from(request.characters).unwrap(),
            Route::SoundEffect => remaining >= 10,
            Route::Transcription => remaining >= 1,
            Route::Voices => true,
            // The request costs nothing, but an account without credits is not tried for it.
            Route::VoiceAddition => tier != "free" && remaining > 0,
            Route::Dubbing => false,
        };
        is_regular && can_pay
    }

    /// Sends one request and checks its result.
    async fn send_and_check(&mut self, request: ScriptedRequest) -> Result<(), String> {
        let ledger_before = self.proxy.simulator.ledger();
        let able_accounts: Vec<usize> = (0..self.script.accounts.len())
            .filter(|account| self.could_serve(*account, request, &ledger_before))
            .collect();
        let response =
            request.route.send_request(&self.proxy, CLIENTS[request.client], request.characters).await;
        let client_response = ClientResponse {
            status: response.status().as_u16(),
            is_proxy_error: response.headers().contains_key("x-keychoir-error"),
            retry_after: response
                .headers()
                .get("retry-after")
                .and_then(|value| value.to_str().ok()?.parse().ok()),
        };
        let body = response.bytes().await.map_err(|error| error.to_string())?;
        let ledger_after = self.proxy.simulator.ledger();
        let attempts = self.scripted_attempts(&ledger_before, &ledger_after, request.route);
        if attempts.len() > 16 {
            return Err(format!("{request:?} must make at most 16 attempts, and it made {}", attempts.len()));
        }
        if client_response.status < 400
            || able_accounts.is_empty()
            || self.is_documented_refusal(request, &client_response, &attempts, &able_accounts)
        {
            return Ok(());
        }
        let text = String::from_utf8_lossy(&body[..body.len().min(200)]).into_owned();
        let details = self.proxy.get("/api/keychoir-keys").await.text().await.unwrap_or_default();
        Err(format!(
            "{request:?} got {} ({}), although {able_accounts:?} could serve it. Its attempts were {attempts:?}: {text}\n{details}",
            client_response.status,
            if client_response.is_proxy_error { "of the proxy" } else { "of the provider" },
        ))
    }

    /// Returns the accounts that were tried, in order, and the scripted response of each.
    fn scripted_attempts(&self, before: &Ledger, after: &Ledger, route: Route) -> Vec<ScriptedAttempt> {
        let is_poll = |path: &str| path.starts_with("/v1/user") || path == "/v1/models";
        let new_requests = after.requests[before.requests.len()..].iter();
        let client_requests = new_requests.filter(|request| !is_poll(&request.path_and_query));
        let account = |name: &str| (0..self.script.accounts.len()).find(|index| key(*index) == name);
        let accounts = client_requests.filter_map(|request| account(request.key.as_deref()?));
        accounts.map(|account| (account, self.scripted_response(account, route_kind(route)))).collect()
    }

    /// Returns whether the documentation makes the refusal of the last attempt final, so that no further account is
    /// tried.
    fn is_final_refusal(
        &self,
        request: ScriptedRequest,
        received: &ClientResponse,
        attempts: &[ScriptedAttempt],
    ) -> bool {
        let ProviderScript { accounts, .. } = self.script;
        let subjects: Vec<RefusalSubject> = attempts
            .iter()
            .map(|(_, response)| response.map_or(RefusalSubject::Served, ScriptedResponse::subject))
            .collect();
        let count_accounts = |predicate: &dyn Fn(usize, ScriptedResponse) -> bool| {
            let mut refusing_accounts: Vec<usize> = attempts
                .iter()
                .filter_map(|(account, response)| {
                    response.filter(|response| predicate(*account, *response)).map(|_| *account)
                })
                .collect();
            refusing_accounts.sort_unstable();
            refusing_accounts.dedup();
            refusing_accounts.len()
        };
        let last = attempts.last().and_then(|(account, response)| Some((*account, (*response)?)));
        match last.map(|(_, response)| response.subject()) {
            Some(RefusalSubject::Request) => true,
            Some(RefusalSubject::Failure) if request.route != Route::Voices => true,
            Some(RefusalSubject::Failure | RefusalSubject::Overload) => {
                let is_provider_error = |subject: &&RefusalSubject| {
                    matches!(subject, RefusalSubject::Failure | RefusalSubject::Overload)
                };
                subjects.iter().filter(is_provider_error).count() > 1
            }
            Some(RefusalSubject::Unknown) => {
                count_accounts(&|_, response| {
                    response.subject() == RefusalSubject::Unknown && response.status == received.status
                }) > 1
            }
            Some(RefusalSubject::Abuse) => {
                let tier = last.map(|(account, _)| accounts[account].tier);
                count_accounts(&|account, response| {
                    response.subject() == RefusalSubject::Abuse && Some(accounts[account].tier) == tier
                }) > 1
            }
            Some(
                RefusalSubject::Served
                | RefusalSubject::Account
                | RefusalSubject::Capability
                | RefusalSubject::Load,
            )
            | None => false,
        }
    }

    /// Returns whether the documentation permits the refusal although some accounts could serve the request.
    fn is_documented_refusal(
        &mut self,
        request: ScriptedRequest,
        received: &ClientResponse,
        attempts: &[ScriptedAttempt],
        able_accounts: &[usize],
    ) -> bool {
        let ProviderScript { accounts, .. } = self.script;
        let route_kind = route_kind(request.route);
        if self.is_final_refusal(request, received, attempts) {
            return true;
        }
        // The documentation permits a rate limit that applies to every account that could serve.
        let is_rate_limited = |account: &usize| {
            let responses =
                [accounts[*account].first_half[route_kind], accounts[*account].second_half[route_kind]];
            responses.into_iter().flatten().any(|response| {
                matches!(response.subject(), RefusalSubject::Load | RefusalSubject::Unknown)
                    && response.status == 429
                    || response.subject() == RefusalSubject::Load
            })
        };
        let has_valid_retry_after = received.retry_after.is_some_and(|seconds| (1..=300).contains(&seconds));
        if received.status == 429
            && received.is_proxy_error
            && has_valid_retry_after
            && able_accounts.iter().all(is_rate_limited)
        {
            return true;
        }
        // Each request tries only one of the accounts that refused such requests in the first half.
        let has_refused = |account: &usize| accounts[*account].first_half[route_kind].is_some();
        if self.is_second_half && able_accounts.iter().all(has_refused) {
            self.documented_misses[route_kind] += 1;
            // Speech has two routes, whose restrictions are separate.
            return self.documented_misses[route_kind] <= 2 * accounts.len();
        }
        false
    }
}

async fn run_script(script: &ProviderScript) -> Result<(), String> {
    let plan = script.accounts.iter().enumerate().fold(Plan::with_keys([]), |plan, (position, account)| {
        let name = format!("ws_{position}");
        let workspace = WorkspacePlan {
            voice_limit: Some(1_000),
            ..WorkspacePlan::of_tier(&name, account.credits, account.tier)
        };
        let key = KeyPlan { workspace: Some(name), ..KeyPlan::new(&key(position), 0) };
        plan.with_workspace(workspace).with_key(key)
    });
    let plan = plan.with_forbidden_text(CLIENTS[1]);
    let proxy = start_proxy_with(plan, |config| configure_proxy(config, script.strategy)).await;
    let mut run =
        ScriptRun { script, proxy, is_second_half: false, documented_misses: [0; ROUTE_KINDS.len()] };
    run.set_faults();
    for (number, request) in script.requests.iter().enumerate() {
        if number == script.requests.len() / 2 {
            run.is_second_half = true;
            run.set_faults();
        }
        run.send_and_check(*request).await.map_err(|failure| format!("request {number}: {failure}"))?;
    }
    let ledger = run.proxy.simulator.ledger();
    run.proxy.close_unchecked().await;
    if ledger.violations.is_empty() { Ok(()) } else { Err(format!("{:?}", ledger.violations)) }
}

/// The maximum number of scripts that are run to shrink a failing script.
const MAX_SHRINK_STEPS: usize = 60;

/// Shrinks a failing script in at most [`MAX_SHRINK_STEPS`] steps. Returns the smallest one and its failure.
async fn shrink<T: ValueTree<Value = ProviderScript>>(
    mut tree: T,
    failure: String,
) -> (ProviderScript, String) {
    let mut smallest_failure = (tree.current(), failure);
    for _ in 0..MAX_SHRINK_STEPS {
        match run_script(&tree.current()).await {
            Err(failure) => {
                smallest_failure = (tree.current(), failure);
                if !tree.simplify() {
                    break;
                }
            }
            Ok(()) => {
                if !tree.complicate() {
                    break;
                }
            }
        }
    }
    smallest_failure
}

/// The number of providers of a test run without `KEYCHOIR_PROVIDERS`.
const DEFAULT_PROVIDER_COUNT: usize = 16;
/// The maximum number of providers that run concurrently.
const MAX_CONCURRENT_RUNS: usize = 8;

#[tokio::test]
async fn every_request_that_an_account_could_serve_is_served() {
    let configured_count = std::env::var("KEYCHOIR_PROVIDERS").ok().and_then(|text| text.parse().ok());
    let rng_seed = if configured_count.is_some() { RngSeed::Random } else { RngSeed::Fixed(20_261_129) };
    let mut runner = TestRunner::new(ProptestConfig { rng_seed, ..ProptestConfig::default() });
    let mut remaining = configured_count.unwrap_or(DEFAULT_PROVIDER_COUNT);
    let scripts = any_script();
    while remaining > 0 {
        let batch = remaining.min(MAX_CONCURRENT_RUNS);
        remaining -= batch;
        let trees: Vec<_> = (0..batch).map(|_| scripts.new_tree(&mut runner).unwrap()).collect();
        let runs = trees.into_iter().map(|tree| async move {
            let script = tree.current();
            (run_script(&script).await, tree)
        });
        for (result, tree) in join_all(runs).await {
            if let Err(failure) = result {
                let (script, failure) = shrink(tree, failure).await;
                panic!("every request that an account could serve must be served: {script:#?}\n{failure}");
            }
        }
    }
}

//! Tests every refusal of the simulator, by one key and by all keys: on each kind of route with the strategies
//! fill-first and round-robin, and on speech with the other strategies. Each case checks the client's response, the
//! number of attempts, the statuses of the keys, and that ordinary speech is served after the refusal. With
//! fill-first, each case is also checked after a restart. Another test sends the refusals at other stages of a speech
//! request, and two tests check that the tables contain every refusal of the simulator and every strategy.
//!
//! [`REFUSALS`] lists the subject of each refusal, and [`expected_consequences`] defines the consequences of each
//! subject.

use std::time::Duration;

use crate::support::routes::{ROUTES, Route};
use crate::support::{CLIENT_TOKEN, FIRST_KEY, SECOND_KEY, THIRD_KEY, TestProxy, join_all, start_proxy_with};
use keychoir::clock;
use keychoir::config::Config;
use keychoir::simulator::{Fault, KeyPlan, Ledger, Plan, WorkspacePlan};

const KEYS: [&str; 3] = [FIRST_KEY, SECOND_KEY, THIRD_KEY];

/// The entity whose fault or limit a refusal reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RefusalSubject {
    /// The refusal reports that the account has 0 remaining credits, and polls contradict it. The account is at fault
    /// if another account serves the request. If all accounts refuse, the request is at fault.
    NoCredits,
    /// The refusal reports that the key's own quota has 0 remaining credits.
    KeyQuota,
    /// The refusal reports that the account's credits do not suffice for this request.
    TooFewCredits,
    /// The account has too few credits. The refusal does not report their number, so a poll decides whether the account
    /// is exhausted.
    UnreportedCredits,
    /// The account has an unpaid bill or unaccepted terms. A poll decides whether the account is unusable.
    Billing,
    /// The provider suspects abuse by the account or by the address of the proxy, so only two accounts of a plan are
    /// tried.
    Abuse,
    /// The provider does not know the key. A poll decides whether the key is invalid.
    InvalidKey,
    /// The key belongs to another region. A poll decides whether the key is unusable.
    WrongRegion,
    /// The request rate of the concurrency group exceeds its limit.
    RateLimit,
    /// The concurrent requests of the concurrency group exceed their limit.
    Concurrency,
    /// The key, the plan or the workspace lacks a capability.
    Capability,
    /// Keychoir does not know the message, so the subject is unknown. If two accounts send the same refusal, the
    /// request is at fault.
    Unexplained,
    /// The account does not have the requested resource.
    Resource,
    /// The request is invalid for every account.
    InvalidRequest,
    /// The provider is overloaded and did not execute the request.
    ProviderOverload,
    /// The provider failed and may have executed the request.
    ProviderFailure,
}
use RefusalSubject::{
    Abuse, Billing, Capability, Concurrency, InvalidKey, InvalidRequest, KeyQuota, NoCredits,
    ProviderFailure, ProviderOverload, RateLimit, Resource, TooFewCredits, Unexplained, UnreportedCredits,
    WrongRegion,
};

/// The name, the status and the subject of each refusal. All accounts have a paid plan, so a
/// text that is too long for one account is too long for all.
static REFUSALS: [(&str, u16, RefusalSubject); 83] = [
    ("quota", 401, NoCredits),
    ("quota_402", 402, NoCredits),
    ("quota_403", 403, NoCredits),
    ("key_cap", 401, KeyQuota),
    ("quota_short", 401, TooFewCredits),
    ("insufficient_credits", 402, UnreportedCredits),
    ("quota_words", 401, UnreportedCredits),
    ("payment_issue", 401, Billing),
    ("unaccepted_terms", 403, Billing),
    ("unusual_activity", 401, Abuse),
    ("invalid", 401, InvalidKey),
    ("invalid_400", 400, InvalidKey),
    ("wrong_host", 401, WrongRegion),
    ("rate_limit", 429, RateLimit),
    ("rate_limit=30", 429, RateLimit),
    ("concurrency", 429, Concurrency),
    ("missing_permissions", 401, Capability),
    ("missing_permissions=unheard_of", 401, Capability),
    ("paid_plan_required", 402, Capability),
    ("subscription_required", 403, Capability),
    ("workspace_access_denied", 403, Capability),
    ("invalid_workspace_type", 400, Capability),
    ("library_voice", 402, Capability),
    ("payment_required_plan", 402, Capability),
    ("free_users_not_allowed", 400, Capability),
    ("output_format_not_allowed", 403, Capability),
    ("model_access_denied", 403, Capability),
    ("feature_not_available", 403, Capability),
    ("only_for_creator", 403, Capability),
    ("cloning_not_allowed", 400, Capability),
    ("cloning_not_allowed_402", 402, Capability),
    ("cloning_not_allowed_old", 400, Capability),
    ("professional_cloning_not_allowed", 403, Capability),
    ("voice_limit_reached", 400, Capability),
    ("quota_slots", 401, Capability),
    ("needs_authorization", 401, Unexplained),
    ("unauthorized", 401, Unexplained),
    ("sign_in_required", 401, Unexplained),
    ("forbidden", 403, Unexplained),
    ("page=401", 401, Unexplained),
    ("page=402", 402, Unexplained),
    ("page=403", 403, Unexplained),
    ("page=429", 429, Unexplained),
    ("voice_not_found", 404, Resource),
    ("voice_not_found_400", 400, Resource),
    ("voice_does_not_exist", 400, Resource),
    ("dubbing_not_found", 404, Resource),
    ("dubbing_language_not_found", 404, Resource),
    ("project_not_found", 404, Resource),
    ("model_not_found", 400, InvalidRequest),
    ("model_not_found_404", 404, InvalidRequest),
    ("invalid_uid", 400, InvalidRequest),
    ("dubbing_not_dubbed", 425, InvalidRequest),
    ("text_too_long", 400, InvalidRequest),
    ("max_character_limit_exceeded", 400, InvalidRequest),
    ("unprocessable", 422, InvalidRequest),
    ("page=404", 404, InvalidRequest),
    ("page=413", 413, InvalidRequest),
    ("system_busy", 429, ProviderOverload),
    ("maintenance", 503, ProviderOverload),
    ("page=503", 503, ProviderOverload),
    ("server_error", 500, ProviderFailure),
    ("page=502", 502, ProviderFailure),
    ("key_cap_words", 401, KeyQuota),
    ("concurrency_words", 429, Concurrency),
    ("busy_words", 429, ProviderOverload),
    ("rate_limit_words", 429, RateLimit),
    ("missing_permissions_403", 403, Capability),
    ("invalid_words", 401, InvalidKey),
    ("auth_error", 401, InvalidKey),
    ("unusual_activity_words", 401, Abuse),
    ("payment_issue_words", 401, Billing),
    ("voice_limit_words", 400, Capability),
    ("voice_access_denied", 403, Capability),
    ("plan_words", 403, Capability),
    ("payment_required_plan_words", 402, Capability),
    ("pay_for_plan_words", 402, Capability),
    ("payment_required_words", 402, UnreportedCredits),
    ("pay_words", 402, UnreportedCredits),
    ("missing_words", 404, Resource),
    ("not_found_403", 403, Resource),
    ("invalid_parameters", 401, InvalidRequest),
    ("authentication_required", 401, Unexplained),
];

/// Each strategy, and the keys of [`plan`] in the order in which it selects them.
const STRATEGIES: [(&str, [usize; 3]); 5] = [
    ("fill-first", [0, 1, 2]),
    ("round-robin", [0, 1, 2]),
    ("most-remaining", [1, 2, 0]),
    ("least-requests", [0, 1, 2]),
    ("soonest-reset", [2, 0, 1]),
];

#[test]
fn every_strategy_has_a_row() {
    let names = keychoir::policy::strategy::STRATEGIES.each_ref().map(|strategy| strategy.name);
    assert_eq!(STRATEGIES.map(|(name, _)| name), names);
}

/// The keys whose requests the provider refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RefusedKeys {
    FirstKey,
    AllKeys,
}

/// The expected status of the keys.
#[derive(Clone, Copy, Debug)]
enum ExpectedStatuses {
    /// Each key has this status.
    Exactly([&'static str; 3]),
    /// One key is active again, and the other two have exhausted their caps.
    OneActive,
}

impl ExpectedStatuses {
    fn matches(&self, statuses: &[String]) -> bool {
        match self {
            Self::Exactly(expected) => statuses == expected,
            Self::OneActive => {
                let count = |wanted: &str| statuses.iter().filter(|status| *status == wanted).count();
                (count("active"), count("exhausted")) == (1, 2)
            }
        }
    }
}

/// The consequences of a refusal.
#[derive(Debug)]
struct ExpectedConsequences {
    /// The status that the client receives.
    status: u16,
    /// The number of attempts, or `None` if it depends on the waits for free slots.
    attempts: Option<usize>,
    /// The statuses of the keys after the polls.
    statuses: ExpectedStatuses,
    /// Whether the refused key is polled immediately, because a poll decides whether the refusal is right.
    is_polled: bool,
    /// The status of ordinary speech after the refusal.
    speech_status: u16,
    /// The statuses of the keys after that speech.
    statuses_after_speech: ExpectedStatuses,
    /// Whether the same request is served after a restart.
    is_served_after_restart: bool,
}

/// Returns the consequences of a refusal with this subject and status. `order` contains the indices of the keys in the
/// order in which they are selected.
fn expected_consequences(
    subject: RefusalSubject,
    status: u16,
    route: Route,
    scope: RefusedKeys,
    order: [usize; 3],
) -> ExpectedConsequences {
    let is_speech = matches!(route, Route::Speech | Route::SpeechStream);
    let refuses_all = scope == RefusedKeys::AllKeys;
    let refused_status = match subject {
        KeyQuota => "exhausted",
        NoCredits if !refuses_all => "exhausted",
        // The status document reports an account that cannot be used as exhausted. If a second account
        // sends the same refusal, the request is at fault.
        Abuse if !refuses_all => "exhausted",
        // The status document reports rate limits of speech only.
        RateLimit if is_speech => "rate_limited",
        Abuse | NoCredits | RateLimit | TooFewCredits | UnreportedCredits | Billing | InvalidKey
        | WrongRegion | Concurrency | Capability | Unexplained | Resource | InvalidRequest
        | ProviderOverload | ProviderFailure => "active",
    };
    let mut statuses = ["active"; 3];
    for index in &order[..if refuses_all { 3 } else { 1 }] {
        statuses[*index] = refused_status;
    }
    let (status_if_first, attempts_if_first, status_if_all, attempts_if_all) = match subject {
        KeyQuota | InvalidKey | WrongRegion => (200, 2, 401, 3),
        NoCredits | TooFewCredits | UnreportedCredits | Billing | Capability => (200, 2, status, 3),
        Abuse | Unexplained => (200, 2, status, 2),
        RateLimit | Concurrency => (200, 2, 429, 3),
        // Only speech requests name the voice that the refusal is about.
        Resource if is_speech => (200, 2, status, 3),
        Resource | InvalidRequest => (status, 1, status, 1),
        ProviderOverload => (200, 2, status, 2),
        // A GET has no effect, so another account is tried.
        ProviderFailure if route == Route::Voices => (200, 2, status, 2),
        ProviderFailure => (status, 1, status, 1),
    };
    // If a second account sends the same refusal, the cooldown is cleared without a poll.
    let is_polled = !refuses_all && matches!(subject, Billing | WrongRegion | InvalidKey | UnreportedCredits);
    // If all accounts send the same refusal, one speech request probes an account. The served request clears the
    // cooldown.
    let statuses_after_speech = match refused_status {
        // A rate limit that all accounts report for one request is cleared for all of them.
        "rate_limited" if refuses_all => ExpectedStatuses::Exactly(["active"; 3]),
        "exhausted" if refuses_all => ExpectedStatuses::OneActive,
        _ => ExpectedStatuses::Exactly(statuses),
    };
    // Requests about voices have no concurrency group, so all accounts are rate limited for the endpoint
    // until the cooldown ends. A restart does not end it.
    let is_endpoint_limit = subject == RateLimit && matches!(route, Route::Voices | Route::VoiceAddition);
    ExpectedConsequences {
        status: if refuses_all { status_if_all } else { status_if_first },
        attempts: (!(refuses_all && subject == Concurrency)).then_some(if refuses_all {
            attempts_if_all
        } else {
            attempts_if_first
        }),
        statuses: ExpectedStatuses::Exactly(statuses),
        is_polled,
        speech_status: 200,
        statuses_after_speech,
        is_served_after_restart: !(refuses_all && is_endpoint_limit),
    }
}

/// Returns a plan of three workspaces with one key each. The second has the most credits, and the third is reset first.
fn plan() -> Plan {
    let workspace = |name: &str, credits, days: u64| WorkspacePlan {
        reset: Some(clock::now().plus(Duration::from_secs(days * 86_400))),
        ..WorkspacePlan::new(name, credits)
    };
    let key = |key: &str, workspace: &str| KeyPlan {
        workspace: Some(workspace.to_owned()),
        ..KeyPlan::new(key, 0)
    };
    Plan {
        keys: vec![key(FIRST_KEY, "ws_1"), key(SECOND_KEY, "ws_2"), key(THIRD_KEY, "ws_3")],
        ..Plan::default()
    }
    .with_workspace(workspace("ws_1", 20_000, 20))
    .with_workspace(workspace("ws_2", 90_000, 25))
    .with_workspace(workspace("ws_3", 50_000, 5))
}

fn configure_proxy(config: &mut Config, strategy: &str) {
    config.pool.strategy = strategy.parse().unwrap();
    // A request that all accounts refuse for concurrency makes 16 attempts, with a cooldown between them.
    config.pool.concurrency_cooldown = Duration::from_millis(20);
    config.server.workers = 1;
}

/// Returns the number of successful quota polls with a key.
fn count_polls(ledger: &Ledger, index: usize) -> usize {
    let is_poll = |path: &str| path == "/v1/user/subscription";
    let key_requests = ledger.requests.iter().filter(|request| request.key.as_deref() == Some(KEYS[index]));
    key_requests.filter(|request| is_poll(&request.path_and_query) && request.status == Some(200)).count()
}

/// Waits for the expected statuses. A quota poll changes a status shortly after its response.
async fn wait_for_statuses(proxy: &TestProxy, expected: &ExpectedStatuses, case: &str) {
    let polling = async {
        while !expected.matches(&proxy.key_statuses().await) {
            tokio::task::yield_now().await;
        }
    };
    let result = tokio::time::timeout(Duration::from_secs(20), polling).await;
    assert!(
        result.is_ok(),
        "{case}: the statuses must be {expected:?}, and they are {:?}",
        proxy.key_statuses().await
    );
}

/// A refusal on one route with one strategy, which one key or all keys receive.
#[derive(Clone, Copy, Debug)]
struct MatrixCase {
    strategy: &'static str,
    order: [usize; 3],
    /// The stage of the refusal, in the simulator's syntax.
    stage: &'static str,
    refusal: &'static str,
    status: u16,
    subject: RefusalSubject,
    route: Route,
    scope: RefusedKeys,
    characters: usize,
}

impl MatrixCase {
    fn name(&self) -> String {
        let Self { strategy, stage, refusal, route, scope, .. } = self;
        format!("{strategy}, {stage}{refusal}, {route:?}, {scope:?}")
    }

    fn set_fault(&self, proxy: &TestProxy, fault: Option<Fault>) {
        match self.scope {
            RefusedKeys::FirstKey => {
                proxy.simulator.set_route_fault(KEYS[self.order[0]], self.route.fault_route(), fault)
            }
            RefusedKeys::AllKeys => proxy.simulator.set_route_fault_for_all(self.route.fault_route(), fault),
        }
    }

    /// Sends the request while the provider refuses it.
    async fn send_refused_request(&self, proxy: &TestProxy, expected: &ExpectedConsequences) {
        let case = self.name();
        self.set_fault(proxy, Some(format!("{}{}", self.stage, self.refusal).parse().unwrap()));
        let response = self.route.send_request(proxy, CLIENT_TOKEN, self.characters).await;
        let status = response.status().as_u16();
        assert!(response.bytes().await.is_ok(), "{case}: the response must be complete");
        self.set_fault(proxy, None);
        assert_eq!(status, expected.status, "{case}: the client must receive the status {}", expected.status);
        let request_counts = proxy.request_counts(&KEYS);
        if let Some(attempts) = expected.attempts {
            assert_eq!(
                request_counts.iter().sum::<usize>(),
                attempts,
                "{case}: the request must have {attempts} attempts, and it has {request_counts:?}"
            );
        }
        assert!(
            request_counts[self.order[0]] >= 1,
            "{case}: the first selected key must be tried: {request_counts:?}"
        );
        let has_polled = |ledger: &Ledger| !expected.is_polled || count_polls(ledger, self.order[0]) > 1;
        let polling =
            tokio::time::timeout(Duration::from_secs(30), proxy.simulator.wait_for_ledger(has_polled));
        assert!(polling.await.is_ok(), "{case}: the refused key must be polled");
        wait_for_statuses(proxy, &expected.statuses, &case).await;
    }

    /// Sends ordinary speech after the refusal.
    async fn send_speech(&self, proxy: &TestProxy, expected: &ExpectedConsequences) {
        let case = self.name();
        let response = proxy.request_speech(1).await;
        assert_eq!(
            response.status(),
            expected.speech_status,
            "{case}: ordinary speech must receive the status {}",
            expected.speech_status
        );
        response.bytes().await.unwrap();
        wait_for_statuses(proxy, &expected.statuses_after_speech, &case).await;
    }

    /// Stops the proxy. Responses do not report the cost of a dubbing, so its usage records differ from the
    /// provider's ledger.
    async fn close(&self, proxy: TestProxy) {
        if self.route == Route::Dubbing {
            proxy.close_unchecked().await;
        } else {
            proxy.close().await;
        }
    }

    async fn run(self) {
        let Self { strategy, order, subject, status, route, scope, .. } = self;
        let proxy = start_proxy_with(plan(), |config| configure_proxy(config, strategy)).await;
        let expected = expected_consequences(subject, status, route, scope, order);
        self.send_refused_request(&proxy, &expected).await;
        self.send_speech(&proxy, &expected).await;
        if strategy != STRATEGIES[0].0 || !self.stage.is_empty() {
            self.close(proxy).await;
            return;
        }
        let proxy = proxy.restart().await;
        wait_for_statuses(&proxy, &expected.statuses_after_speech, &self.name()).await;
        self.send_speech(&proxy, &expected).await;
        if expected.is_served_after_restart {
            let response = route.send_request(&proxy, CLIENT_TOKEN, self.characters).await;
            assert_eq!(
                response.status(),
                200,
                "{}: the same request must be served after the restart",
                self.name()
            );
            response.bytes().await.unwrap();
        }
        self.close(proxy).await;
    }
}

/// The maximum number of concurrent cases. Some of them wait a second for a poll.
const MAX_CONCURRENT_CASES: usize = 16;

/// Runs all cases, at most [`MAX_CONCURRENT_CASES`] at a time.
async fn run_all(cases: impl Iterator<Item = MatrixCase>) {
    let mut cases = cases.peekable();
    while cases.peek().is_some() {
        let batch: Vec<MatrixCase> = cases.by_ref().take(MAX_CONCURRENT_CASES).collect();
        join_all(batch.into_iter().map(MatrixCase::run)).await;
    }
}

/// Checks every refusal on `routes`.
async fn check_refusals(strategy: &str, routes: &[Route]) {
    let (strategy, order) = STRATEGIES.into_iter().find(|(name, _)| *name == strategy).unwrap();
    let cases = routes.iter().flat_map(|route| {
        let scopes = [RefusedKeys::FirstKey, RefusedKeys::AllKeys].into_iter();
        scopes.flat_map(move |scope| {
            REFUSALS.iter().copied().map(move |(refusal, status, subject)| MatrixCase {
                strategy,
                order,
                stage: "",
                refusal,
                status,
                subject,
                route: *route,
                scope,
                characters: 40,
            })
        })
    });
    run_all(cases).await;
}

#[tokio::test]
async fn fill_first_handles_every_refusal_of_speech() {
    check_refusals("fill-first", &ROUTES[..2]).await;
}

#[tokio::test]
async fn fill_first_handles_every_refusal_of_other_billable_requests() {
    check_refusals("fill-first", &ROUTES[2..5]).await;
}

#[tokio::test]
async fn fill_first_handles_every_refusal_of_free_requests() {
    check_refusals("fill-first", &ROUTES[5..]).await;
}

#[tokio::test]
async fn round_robin_handles_every_refusal() {
    check_refusals("round-robin", &ROUTES).await;
}

#[tokio::test]
async fn most_remaining_handles_every_refusal() {
    check_refusals("most-remaining", &ROUTES[..2]).await;
}

#[tokio::test]
async fn least_requests_handles_every_refusal() {
    check_refusals("least-requests", &ROUTES[..2]).await;
}

#[tokio::test]
async fn soonest_reset_handles_every_refusal() {
    check_refusals("soonest-reset", &ROUTES[..2]).await;
}

/// The stages of a refusal, in the simulator's syntax: after the head, in the middle of the body, and after
/// the whole body with a compressed response.
const STAGES: [&str; 3] = ["early:", "mid=200:", "gzip:"];

/// The length of a text that is much longer than 200 bytes, the position of the refusal in the body.
const LONG_TEXT: usize = 400;

#[tokio::test]
async fn a_refusal_has_the_same_consequences_at_every_stage() {
    let (strategy, order) = STRATEGIES[0];
    let cases = STAGES.into_iter().flat_map(|stage| {
        REFUSALS.iter().copied().map(move |(refusal, status, subject)| MatrixCase {
            strategy,
            order,
            stage,
            refusal,
            status,
            subject,
            route: Route::Speech,
            scope: RefusedKeys::FirstKey,
            characters: LONG_TEXT,
        })
    });
    run_all(cases).await;
}

#[test]
fn every_refusal_of_the_simulator_is_in_the_table() {
    let error = "none".parse::<Fault>().unwrap_err().to_string();
    let (_, names) = error.split_once("the names are ").unwrap();
    let (names, _) = names.split_once(';').unwrap();
    for name in names.split(", ") {
        let name = name.split('[').next().unwrap();
        let has_name = |refusal: &str| refusal.split('=').next() == Some(name);
        assert!(REFUSALS.iter().any(|(refusal, ..)| has_name(refusal)), "{name} must be in the table");
    }
}

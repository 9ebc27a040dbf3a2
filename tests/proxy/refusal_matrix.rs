//! Every refusal of the simulator's catalogue × the kind of refused route × every strategy × one
//! refused key or all of them × a restart: the client's response, the number of attempts, the
//! status of the keys afterwards, and whether plain speech is served once the provider refuses
//! nothing any more. Two tables define all of it: [`REFUSALS`], the subject of each refusal, and
//! [`expected`], its consequences.

use std::time::Duration;

use crate::support::routes::{ROUTES, Route};
use crate::support::{CLIENT_TOKEN, FIRST_KEY, SECOND_KEY, THIRD_KEY, TestProxy, join_all, start_proxy_with};
use keychoir::clock;
use keychoir::config::Config;
use keychoir::simulator::{Fault, KeyPlan, Ledger, Plan, WorkspacePlan};

const KEYS: [&str; 3] = [FIRST_KEY, SECOND_KEY, THIRD_KEY];

/// The subject of a refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Subject {
    /// The account's credits: figures say that none are left, and polls contradict them. One account is believed
    /// when another serves the request; when all say so, it is about the request.
    NoCredits,
    /// The key's own cap: figures say that none is left of it.
    Cap,
    /// The account's credits: figures say that they do not suffice for this request.
    FewCredits,
    /// The account's credits, in words without figures: a poll decides.
    CreditsInWords,
    /// The account's bill or its terms: a poll decides.
    Bill,
    /// Abuse. The provider also judges by address, so only two accounts of a plan are tried.
    Abuse,
    /// The key, which the provider does not know: a poll decides.
    Key,
    /// The key, which belongs to another region: a poll decides.
    Region,
    /// The rate of the concurrency group.
    Rate,
    /// The concurrent requests in the concurrency group.
    Concurrency,
    /// A capability of the key, the plan or the workspace.
    Capability,
    /// An unknown text. Two accounts with the same refusal mean that the request is at fault.
    Unknown,
    /// An object that is not in this account.
    Thing,
    /// The request itself.
    Request,
    /// The provider, which has not executed the request.
    Overload,
    /// The provider, which may have executed the request.
    Failure,
}
use Subject::{
    Abuse, Bill, Cap, Capability, Concurrency, CreditsInWords, Failure, FewCredits, Key, NoCredits, Overload,
    Rate, Region, Request, Thing, Unknown,
};

/// The catalogue, with the status of each refusal. The accounts are on a paid plan, so a text that
/// is too long for one is too long for all.
static REFUSALS: [(&str, u16, Subject); 83] = [
    ("quota", 401, NoCredits),
    ("quota_402", 402, NoCredits),
    ("quota_403", 403, NoCredits),
    ("key_cap", 401, Cap),
    ("quota_short", 401, FewCredits),
    ("insufficient_credits", 402, CreditsInWords),
    ("quota_words", 401, CreditsInWords),
    ("payment_issue", 401, Bill),
    ("unaccepted_terms", 403, Bill),
    ("unusual_activity", 401, Abuse),
    ("invalid", 401, Key),
    ("invalid_400", 400, Key),
    ("wrong_host", 401, Region),
    ("rate_limit", 429, Rate),
    ("rate_limit=30", 429, Rate),
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
    ("needs_authorization", 401, Unknown),
    ("unauthorized", 401, Unknown),
    ("sign_in_required", 401, Unknown),
    ("forbidden", 403, Unknown),
    ("page=401", 401, Unknown),
    ("page=402", 402, Unknown),
    ("page=403", 403, Unknown),
    ("page=429", 429, Unknown),
    ("voice_not_found", 404, Thing),
    ("voice_not_found_400", 400, Thing),
    ("voice_does_not_exist", 400, Thing),
    ("dubbing_not_found", 404, Thing),
    ("dubbing_language_not_found", 404, Thing),
    ("project_not_found", 404, Thing),
    ("model_not_found", 400, Request),
    ("model_not_found_404", 404, Request),
    ("invalid_uid", 400, Request),
    ("dubbing_not_dubbed", 425, Request),
    ("text_too_long", 400, Request),
    ("max_character_limit_exceeded", 400, Request),
    ("unprocessable", 422, Request),
    ("page=404", 404, Request),
    ("page=413", 413, Request),
    ("system_busy", 429, Overload),
    ("maintenance", 503, Overload),
    ("page=503", 503, Overload),
    ("server_error", 500, Failure),
    ("page=502", 502, Failure),
    ("key_cap_words", 401, Cap),
    ("concurrency_words", 429, Concurrency),
    ("busy_words", 429, Overload),
    ("rate_limit_words", 429, Rate),
    ("missing_permissions_403", 403, Capability),
    ("invalid_words", 401, Key),
    ("auth_error", 401, Key),
    ("unusual_activity_words", 401, Abuse),
    ("payment_issue_words", 401, Bill),
    ("voice_limit_words", 400, Capability),
    ("voice_access_denied", 403, Capability),
    ("plan_words", 403, Capability),
    ("payment_required_plan_words", 402, Capability),
    ("pay_for_plan_words", 402, Capability),
    ("payment_required_words", 402, CreditsInWords),
    ("pay_words", 402, CreditsInWords),
    ("missing_words", 404, Thing),
    ("not_found_403", 403, Thing),
    ("invalid_parameters", 401, Request),
    ("authentication_required", 401, Unknown),
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

/// The refused keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scope {
    First,
    All,
}

/// The expected status of the keys.
#[derive(Clone, Copy, Debug)]
enum Stands {
    /// The status of each key.
    So([&'static str; 3]),
    /// One of them is active again, and the others are at their caps.
    OneIsBack,
}

impl Stands {
    fn is(&self, seen: &[String]) -> bool {
        match self {
            Self::So(words) => seen == words,
            Self::OneIsBack => {
                let count = |word: &str| seen.iter().filter(|seen| *seen == word).count();
                (count("active"), count("exhausted")) == (1, 2)
            }
        }
    }
}

/// The consequences of a refusal.
#[derive(Debug)]
struct Expected {
    /// The status that the client receives.
    status: u16,
    /// The number of attempts; `None` if it depends on the waits for free slots.
    attempts: Option<usize>,
    /// The status of the keys after the polls that decide on it.
    stands: Stands,
    /// Whether the refused key is polled at once, because a poll decides.
    is_polled: bool,
    /// The status of plain speech afterwards.
    speech: u16,
    /// The status of the keys after that.
    stands_after: Stands,
    /// Whether the same request is served after a restart.
    is_served_again: bool,
}

fn expected(subject: Subject, status: u16, route: Route, scope: Scope, order: [usize; 3]) -> Expected {
    let is_speech = matches!(route, Route::Speech | Route::SpeechStream);
    let is_all = scope == Scope::All;
    // The status of the refused keys.
    let word = match subject {
        Cap => "exhausted",
        NoCredits if !is_all => "exhausted",
        // The word of the contract for an account that cannot pay. A second account that says the same
        // makes it the request's matter.
        Abuse if !is_all => "exhausted",
        // The status document is about speech.
        Rate if is_speech => "rate_limited",
        Abuse | NoCredits | Rate | FewCredits | CreditsInWords | Bill | Key | Region | Concurrency
        | Capability | Unknown | Thing | Request | Overload | Failure => "active",
    };
    let mut stands = ["active"; 3];
    for position in &order[..if is_all { 3 } else { 1 }] {
        stands[*position] = word;
    }
    let (one_status, attempts, all_status, all_attempts) = match subject {
        Cap | Key | Region => (200, 2, 401, 3),
        NoCredits | FewCredits | CreditsInWords | Bill | Capability => (200, 2, status, 3),
        Abuse | Unknown => (200, 2, status, 2),
        Rate | Concurrency => (200, 2, 429, 3),
        // Only speech names the voice that the refusal is about.
        Thing if is_speech => (200, 2, status, 3),
        Thing | Request => (status, 1, status, 1),
        Overload => (200, 2, status, 2),
        // A read has no effect, so another account is tried.
        Failure if route == Route::Voices => (200, 2, status, 2),
        Failure => (status, 1, status, 1),
    };
    // A second account with the same refusal clears the cooldown at once.
    let is_polled = !is_all && matches!(subject, Bill | Region | Key | CreditsInWords);
    // What all say is no proof against one: a request tries, is served, and lifts it.
    let stands_after = match word {
        // A rate limit that all name for one request ends for all of them.
        "rate_limited" if is_all => Stands::So(["active"; 3]),
        "exhausted" if is_all => Stands::OneIsBack,
        _ => Stands::So(stands),
    };
    // Requests about voices are of no concurrency group: all accounts are limited for that endpoint until the
    // cooldown is over, which a restart does not shorten.
    let is_limit_of_endpoint = subject == Rate && matches!(route, Route::Voices | Route::VoiceAddition);
    Expected {
        status: if is_all { all_status } else { one_status },
        attempts: (!(is_all && subject == Concurrency)).then_some(if is_all {
            all_attempts
        } else {
            attempts
        }),
        stands: Stands::So(stands),
        is_polled,
        speech: 200,
        stands_after,
        is_served_again: !(is_all && is_limit_of_endpoint),
    }
}

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
    Plan {
        keys: vec![key(FIRST_KEY, "ws_1"), key(SECOND_KEY, "ws_2"), key(THIRD_KEY, "ws_3")],
        ..Plan::default()
    }
    .with_workspace(workspace("ws_1", 20_000, 20))
    .with_workspace(workspace("ws_2", 90_000, 25))
    .with_workspace(workspace("ws_3", 50_000, 5))
}

fn settings(config: &mut Config, strategy: &str) {
    config.pool.strategy = strategy.parse().unwrap();
    // Sixteen attempts of a request refused by all for concurrency end soon.
    config.pool.concurrency_cooldown = Duration::from_millis(20);
    config.server.workers = 1;
}

fn polls(ledger: &Ledger, position: usize) -> usize {
    let is_poll = |path: &str| path == "/v1/user/subscription";
    let of_key = ledger.requests.iter().filter(|request| request.key.as_deref() == Some(KEYS[position]));
    of_key.filter(|request| is_poll(&request.path_and_query) && request.status == Some(200)).count()
}

/// Polls until the keys have this status: a poll is applied a moment after its response.
async fn until_stands(proxy: &TestProxy, expected: &Stands, case: &str) {
    let looking = async {
        while !expected.is(&proxy.key_statuses().await) {
            tokio::task::yield_now().await;
        }
    };
    let stands = tokio::time::timeout(Duration::from_secs(20), looking).await;
    assert!(stands.is_ok(), "{case}: {:?}, not {expected:?}", proxy.key_statuses().await);
}

/// A case of the table.
#[derive(Clone, Copy, Debug)]
struct Case {
    strategy: &'static str,
    order: [usize; 3],
    /// The stage of the refusal, in the simulator's syntax.
    stage: &'static str,
    refusal: &'static str,
    status: u16,
    subject: Subject,
    route: Route,
    scope: Scope,
    characters: usize,
}

impl Case {
    fn name(&self) -> String {
        let Self { strategy, stage, refusal, route, scope, .. } = self;
        format!("{strategy}, {stage}{refusal}, {route:?}, {scope:?}")
    }

    fn set(&self, proxy: &TestProxy, fault: Option<Fault>) {
        match self.scope {
            Scope::First => proxy.simulator.always_on(KEYS[self.order[0]], self.route.fault_route(), fault),
            Scope::All => proxy.simulator.for_all_requests_on(self.route.fault_route(), fault),
        }
    }

    /// Sends the request while the provider refuses it.
    async fn refuse(&self, proxy: &TestProxy, expected: &Expected) {
        let case = self.name();
        self.set(proxy, Some(format!("{}{}", self.stage, self.refusal).parse().unwrap()));
        let answer = self.route.send_request(proxy, CLIENT_TOKEN, self.characters).await;
        let status = answer.status().as_u16();
        assert!(answer.bytes().await.is_ok(), "{case}");
        self.set(proxy, None);
        assert_eq!(status, expected.status, "{case}");
        let hits = proxy.request_counts(&KEYS);
        if let Some(attempts) = expected.attempts {
            assert_eq!(hits.iter().sum::<usize>(), attempts, "{case}: {hits:?}");
        }
        assert!(hits[self.order[0]] >= 1, "{case}: {hits:?}");
        let has_polled = |ledger: &Ledger| !expected.is_polled || polls(ledger, self.order[0]) > 1;
        let polling = tokio::time::timeout(Duration::from_secs(30), proxy.simulator.until(has_polled));
        assert!(polling.await.is_ok(), "{case}: no poll");
        until_stands(proxy, &expected.stands, &case).await;
    }

    async fn speak(&self, proxy: &TestProxy, expected: &Expected) {
        let case = self.name();
        let answer = proxy.request_speech(1).await;
        assert_eq!(answer.status(), expected.speech, "{case}: plain speech");
        answer.bytes().await.unwrap();
        until_stands(proxy, &expected.stands_after, &case).await;
    }

    /// Ends the test. No response contains the cost of a dubbing, so the records differ from the
    /// provider's ledger.
    async fn end(&self, proxy: TestProxy) {
        if self.route == Route::Dubbing {
            proxy.close_unchecked().await;
        } else {
            proxy.close().await;
        }
    }

    async fn check(self) {
        let Self { strategy, order, subject, status, route, scope, .. } = self;
        let proxy = start_proxy_with(plan(), |config| settings(config, strategy)).await;
        let expected = expected(subject, status, route, scope, order);
        self.refuse(&proxy, &expected).await;
        self.speak(&proxy, &expected).await;
        if strategy != STRATEGIES[0].0 || !self.stage.is_empty() {
            self.end(proxy).await;
            return;
        }
        let proxy = proxy.restart().await;
        until_stands(&proxy, &expected.stands_after, &self.name()).await;
        self.speak(&proxy, &expected).await;
        if expected.is_served_again {
            let answer = route.send_request(&proxy, CLIENT_TOKEN, self.characters).await;
            assert_eq!(answer.status(), 200, "{}: the same again", self.name());
            answer.bytes().await.unwrap();
        }
        self.end(proxy).await;
    }
}

/// Cases that run at once: some wait a second for a poll.
const AT_ONCE: usize = 16;

async fn check_all(cases: impl Iterator<Item = Case>) {
    let mut cases = cases.peekable();
    while cases.peek().is_some() {
        let some: Vec<Case> = cases.by_ref().take(AT_ONCE).collect();
        join_all(some.into_iter().map(Case::check)).await;
    }
}

/// The whole catalogue on some routes.
async fn check_catalogue(strategy: &str, routes: &[Route]) {
    let (strategy, order) = STRATEGIES.into_iter().find(|(word, _)| *word == strategy).unwrap();
    let cases = routes.iter().flat_map(|route| {
        let scopes = [Scope::First, Scope::All].into_iter();
        scopes.flat_map(move |scope| {
            REFUSALS.iter().copied().map(move |(refusal, status, subject)| Case {
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
    check_all(cases).await;
}

#[tokio::test]
async fn fill_first_meets_every_refusal_of_speech() {
    check_catalogue("fill-first", &ROUTES[..2]).await;
}

#[tokio::test]
async fn fill_first_meets_every_refusal_of_work() {
    check_catalogue("fill-first", &ROUTES[2..5]).await;
}

#[tokio::test]
async fn fill_first_meets_every_refusal_of_free_requests() {
    check_catalogue("fill-first", &ROUTES[5..]).await;
}

#[tokio::test]
async fn round_robin_meets_every_refusal() {
    check_catalogue("round-robin", &ROUTES).await;
}

#[tokio::test]
async fn most_remaining_meets_every_refusal() {
    check_catalogue("most-remaining", &ROUTES[..2]).await;
}

#[tokio::test]
async fn least_busy_meets_every_refusal() {
    check_catalogue("least-requests", &ROUTES[..2]).await;
}

#[tokio::test]
async fn soonest_reset_meets_every_refusal() {
    check_catalogue("soonest-reset", &ROUTES[..2]).await;
}

/// The stages of a refusal, in the simulator's syntax: after the head, in the middle of the body,
/// and after all of it and compressed.
const STAGES: [&str; 3] = ["early:", "mid=200:", "gzip:"];

/// The length of a text whose middle is far from its ends.
const LONG: usize = 400;

#[tokio::test]
async fn a_refusal_has_the_same_result_at_every_stage() {
    let (strategy, order) = STRATEGIES[0];
    let cases = STAGES.into_iter().flat_map(|stage| {
        REFUSALS.iter().copied().map(move |(refusal, status, subject)| Case {
            strategy,
            order,
            stage,
            refusal,
            status,
            subject,
            route: Route::Speech,
            scope: Scope::First,
            characters: LONG,
        })
    });
    check_all(cases).await;
}

#[test]
fn the_table_has_the_whole_catalogue() {
    let catalogue = "none".parse::<Fault>().unwrap_err().to_string();
    let (_, names) = catalogue.split_once("the names are ").unwrap();
    let (names, _) = names.split_once(';').unwrap();
    for name in names.split(", ") {
        let name = name.split('[').next().unwrap();
        let is_it = |refusal: &str| refusal.split('=').next() == Some(name);
        assert!(REFUSALS.iter().any(|(refusal, ..)| is_it(refusal)), "{name} is not in the table");
    }
}

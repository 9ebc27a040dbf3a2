//! A provider with pseudorandom, reproducible responses: for each account and route any status, any
//! text and any `Retry-After`, some of which change half-way. A request is served if an account can
//! pay and does not refuse it, with these documented exceptions: a refusal that blames the request,
//! one of two accounts in unknown words, an operation that may have been executed, and a rate limit
//! that holds.
//!
//! `KEYCHOIR_PROVIDERS=1000` runs this number of providers, other ones each time.

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
use proptest::test_runner::{Config as Proptest, RngSeed, TestRunner};

/// The subject of a refusal or failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Subject {
    /// A served request.
    Served,
    /// The account or its key, in known words.
    Account,
    /// Abuse, which the provider also judges by address.
    Abuse,
    /// A capability of the account, in known words.
    Capability,
    /// The rate or the concurrency, in known words.
    Load,
    /// An unknown text.
    Unknown,
    /// The request.
    Request,
    /// The provider, which has not executed the request.
    Overload,
    /// The provider, which may have executed the request.
    Failure,
}

/// The body of a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Words {
    /// A code and a message of the provider.
    Known(&'static str, &'static str, Subject),
    /// An unknown code.
    New,
    Empty,
    Html,
    /// Bytes that are not text.
    Binary,
    /// More than the proxy reads of a refusal.
    Huge,
}

const WORDS: [Words; 18] = [
    Words::Known("quota_exceeded", "You have spent it.", Subject::Account),
    Words::Known("insufficient_credits", "You do not have enough credits.", Subject::Account),
    Words::Known("payment_issue", "Your last invoice is unpaid.", Subject::Account),
    Words::Known("invalid_api_key", "Invalid API key", Subject::Account),
    Words::Known("invalid_api_key", "The API key used is for a data residency stack.", Subject::Account),
    Words::Known("detected_unusual_activity", "Unusual activity detected.", Subject::Abuse),
    Words::Known("missing_permissions", "The API key is missing a permission.", Subject::Capability),
    Words::Known("workspace_access_denied", "Not this workspace.", Subject::Capability),
    Words::Known("feature_not_available", "Your subscription does not include it.", Subject::Capability),
    Words::Known("voice_limit_reached", "You have as many as you may have.", Subject::Capability),
    Words::Known("rate_limit_exceeded", "Slow down.", Subject::Load),
    Words::Known("too_many_concurrent_requests", "Too many concurrent requests.", Subject::Load),
    Words::Known("system_busy", "Try again later.", Subject::Overload),
    Words::New,
    Words::Empty,
    Words::Html,
    Words::Binary,
    Words::Huge,
];

/// The response of an account to every request of a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Reply {
    status: u16,
    words: Words,
    retry_after: Option<&'static str>,
}

impl Reply {
    fn subject(self) -> Subject {
        match (self.status, self.words) {
            (..400, _) => Subject::Served,
            (503, _) => Subject::Overload,
            (500.., _) => Subject::Failure,
            // The text is only read for these statuses.
            (404, Words::Known("feature_not_available", ..)) => Subject::Request,
            (400..=404 | 429, Words::Known(_, _, subject)) => subject,
            (401..=403 | 429, _) => Subject::Unknown,
            _ => Subject::Request,
        }
    }

    fn fault(self) -> Fault {
        let known = |code: &str, message: &str| {
            format!(r#"{{"detail":{{"code":"{code}","status":"{code}","message":"{message}"}}}}"#)
                .into_bytes()
        };
        let body = match self.words {
            Words::Known(code, message, _) => known(code, message),
            Words::New => known("unheard_of", "Whatever."),
            Words::Empty => Vec::new(),
            Words::Html => b"<!doctype html><title>Blocked</title>".to_vec(),
            Words::Binary => vec![0xff, 0xfe, 0x00, 0xc3, 0x28],
            Words::Huge => [known("quota_exceeded", "You have spent it."), vec![b' '; 100_000]].concat(),
        };
        // A response without an executed operation costs nothing.
        let mut headers = vec![("character-cost".to_owned(), "0".to_owned())];
        headers.extend(self.retry_after.map(|value| ("retry-after".to_owned(), value.to_owned())));
        Fault::Respond { status: self.status, headers, body: body.into() }
    }
}

#[derive(Clone, Debug)]
struct Account {
    tier: &'static str,
    credits: u64,
    /// The response to each of [`KINDS`]; `None` for the regular one.
    replies: [Option<Reply>; KINDS.len()],
    /// The same in the second half.
    later: [Option<Reply>; KINDS.len()],
}

#[derive(Clone, Copy, Debug)]
struct Asked {
    client: usize,
    route: Route,
    characters: usize,
}

/// A provider, and the requests sent to it.
#[derive(Clone, Debug)]
struct Script {
    strategy: &'static str,
    accounts: Vec<Account>,
    requests: Vec<Asked>,
}

/// Routes with separate responses.
const KINDS: [Route; 5] =
    [Route::Speech, Route::SoundEffect, Route::Transcription, Route::Voices, Route::VoiceAddition];
const SPEECH_PATH: usize = 0;

fn kind(route: Route) -> usize {
    let route = if route == Route::SpeechStream { Route::Speech } else { route };
    KINDS.iter().position(|kind| *kind == route).unwrap()
}

fn reply() -> impl Strategy<Value = Reply> {
    let status = prop_oneof![
        12 => prop::sample::select(vec![400_u16, 401, 402, 403, 404, 429]),
        2 => 405..429_u16,
        1 => prop::sample::select(vec![200_u16, 500, 503]),
    ];
    let retry_after = prop::option::weighted(0.3, prop::sample::select(vec!["0", "5", "86400", "soon"]));
    (status, prop::sample::select(WORDS.to_vec()), retry_after)
        .prop_map(|(status, words, retry_after)| Reply { status, words, retry_after })
}

fn account(is_speech_well: bool) -> impl Strategy<Value = Account> {
    let tier = prop::sample::select(vec!["free", "starter", "creator", "pro", "a plan of its own"]);
    let credits = prop::sample::select(vec![0_u64, 30, 400, 5_000, 100_000]);
    let replies = || prop::array::uniform5(prop::option::weighted(0.4, reply()));
    (tier, credits, replies(), replies(), prop::array::uniform5(prop::bool::weighted(0.3))).prop_map(
        move |(tier, credits, mut replies, mut later, changes)| {
            if is_speech_well {
                (replies[SPEECH_PATH], later[SPEECH_PATH]) = (None, None);
            }
            for (at, changes) in changes.into_iter().enumerate() {
                later[at] = if changes { later[at] } else { replies[at] };
            }
            Account { tier, credits, replies, later }
        },
    )
}

fn script() -> impl Strategy<Value = Script> {
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
    let asked = (0..2_usize, route, prop::sample::select(vec![1_usize, 20, 300]));
    let asked = asked.prop_map(|(client, route, characters)| Asked { client, route, characters });
    let strategies: Vec<&str> = STRATEGIES.iter().map(|strategy| strategy.name).collect();
    any::<bool>().prop_flat_map(move |is_speech_well| {
        let accounts = prop::collection::vec(account(is_speech_well), 3..=6);
        let requests = prop::collection::vec(asked.clone(), 60..=120);
        (prop::sample::select(strategies.clone()), accounts, requests)
            .prop_map(|(strategy, accounts, requests)| Script { strategy, accounts, requests })
    })
}

/// Credits of the most expensive request.
const DEAREST: u64 = 300;

const CLIENTS: [&str; 2] = [CLIENT_TOKEN, "token-of-the-phone-0000000002"];

fn key(position: usize) -> String {
    format!("sk_random_{position}_00000000000000000000000000000000000")
}

fn settings(config: &mut Config, strategy: &str) {
    config.pool.strategy = strategy.parse().unwrap();
    config.server.workers = 1;
    // Unproven refusals and concurrency limits are retried immediately.
    config.pool.probe_after = Duration::from_millis(5);
    config.pool.concurrency_cooldown = Duration::from_millis(5);
    let client = |(number, token): (usize, &&str)| ClientConfig {
        name: format!("client-{number}"),
        token: TokenFingerprint::new(token),
        rules: Rules::default(),
    };
    config.clients = CLIENTS.iter().enumerate().map(client).collect();
}

/// A running script.
struct Play<'a> {
    script: &'a Script,
    proxy: TestProxy,
    is_later: bool,
    /// Per kind of route, the requests refused since the change although an account could serve
    /// them that had refused such requests before.
    missed: [usize; KINDS.len()],
}

/// A response that the client received.
struct Got {
    status: u16,
    is_ours: bool,
    retry_after: Option<u64>,
}

impl Play<'_> {
    fn reply(&self, account: usize, kind: usize) -> Option<Reply> {
        let account = &self.script.accounts[account];
        if self.is_later { account.later[kind] } else { account.replies[kind] }
    }

    fn set_replies(&self) {
        for account in 0..self.script.accounts.len() {
            for (at, route) in KINDS.into_iter().enumerate() {
                let fault = self.reply(account, at).map(Reply::fault);
                self.proxy.simulator.always_on(&key(account), route.fault_route(), fault);
            }
        }
    }

    /// Whether the provider would serve the request with that account.
    fn could_serve(&self, account: usize, asked: Asked, ledger: &Ledger) -> bool {
        let Account { tier, .. } = self.script.accounts[account];
        let is_well = self.reply(account, kind(asked.route)).is_none();
        // A poll during a request may count that request twice, until the numbers settle; polls
        // follow refusals.
        let Account { replies, later, .. } = self.script.accounts[account];
        let is_polled = replies.iter().chain(&later).any(Option::is_some);
        let left = ledger.keys[account].remaining.saturating_sub(if is_polled { DEAREST } else { 0 });
        let can_pay = match asked.route {
            Route::Speech | Route::SpeechStream => left >= u64::try_from(asked.characters).unwrap(),
            Route::SoundEffect => left >= 10,
            Route::Transcription => left >= 1,
            Route::Voices => true,
            // It costs nothing, but an account without credits is not tried for it.
            Route::VoiceAddition => tier != "free" && left > 0,
            Route::Dubbing => false,
        };
        is_well && can_pay
    }

    /// Sends one request and checks its result.
    async fn ask(&mut self, asked: Asked) -> Result<(), String> {
        let before = self.proxy.simulator.ledger();
        let able: Vec<usize> = (0..self.script.accounts.len())
            .filter(|account| self.could_serve(*account, asked, &before))
            .collect();
        let answer = asked.route.send_request(&self.proxy, CLIENTS[asked.client], asked.characters).await;
        let got = Got {
            status: answer.status().as_u16(),
            is_ours: answer.headers().contains_key("x-keychoir-error"),
            retry_after: answer
                .headers()
                .get("retry-after")
                .and_then(|value| value.to_str().ok()?.parse().ok()),
        };
        let body = answer.bytes().await.map_err(|error| error.to_string())?;
        let after = self.proxy.simulator.ledger();
        let met = self.met(&before, &after, asked.route);
        if met.len() > 16 {
            return Err(format!("{asked:?}: {} attempts", met.len()));
        }
        if got.status < 400 || able.is_empty() || self.is_documented(asked, &got, &met, &able) {
            return Ok(());
        }
        let text = String::from_utf8_lossy(&body[..body.len().min(200)]).into_owned();
        let details = self.proxy.get("/api/keychoir-keys").await.text().await.unwrap_or_default();
        Err(format!(
            "{asked:?} got {} ({}), although {able:?} could serve it; it was answered by {met:?}: {text}\n{details}",
            got.status,
            if got.is_ours { "ours" } else { "theirs" },
        ))
    }

    /// The accounts tried, in order, and the response of each.
    fn met(&self, before: &Ledger, after: &Ledger, route: Route) -> Vec<(usize, Option<Reply>)> {
        let is_polled = |path: &str| path.starts_with("/v1/user") || path == "/v1/models";
        let new = after.requests[before.requests.len()..].iter();
        let of_clients = new.filter(|request| !is_polled(&request.path_and_query));
        let account = |name: &str| (0..self.script.accounts.len()).find(|at| key(*at) == name);
        let accounts = of_clients.filter_map(|request| account(request.key.as_deref()?));
        accounts.map(|account| (account, self.reply(account, kind(route)))).collect()
    }

    /// Whether no other account is tried after this refusal.
    fn is_documented(
        &mut self,
        asked: Asked,
        got: &Got,
        met: &[(usize, Option<Reply>)],
        able: &[usize],
    ) -> bool {
        let Script { accounts, .. } = self.script;
        let kind = kind(asked.route);
        let subjects: Vec<Subject> =
            met.iter().map(|(_, reply)| reply.map_or(Subject::Served, Reply::subject)).collect();
        let count = |is: &dyn Fn(usize, Reply) -> bool| {
            let mut who: Vec<usize> = met
                .iter()
                .filter_map(|(account, reply)| reply.filter(|reply| is(*account, *reply)).map(|_| *account))
                .collect();
            who.sort_unstable();
            who.dedup();
            who.len()
        };
        let last = met.last().and_then(|(account, reply)| Some((*account, (*reply)?)));
        let is_final = match last.map(|(_, reply)| reply.subject()) {
            Some(Subject::Request) => true,
            Some(Subject::Failure) if asked.route != Route::Voices => true,
            Some(Subject::Failure | Subject::Overload) => {
                let is_trouble = |subject: &&Subject| matches!(subject, Subject::Failure | Subject::Overload);
                subjects.iter().filter(is_trouble).count() > 1
            }
            Some(Subject::Unknown) => {
                count(&|_, reply| reply.subject() == Subject::Unknown && reply.status == got.status) > 1
            }
            Some(Subject::Abuse) => {
                let tier = last.map(|(account, _)| accounts[account].tier);
                count(&|at, reply| reply.subject() == Subject::Abuse && Some(accounts[at].tier) == tier) > 1
            }
            Some(Subject::Served | Subject::Account | Subject::Capability | Subject::Load) | None => false,
        };
        if is_final {
            return true;
        }
        // A rate limit that holds for all accounts that could serve.
        let is_limited = |account: &usize| {
            let replies = [accounts[*account].replies[kind], accounts[*account].later[kind]];
            replies.into_iter().flatten().any(|reply| {
                matches!(reply.subject(), Subject::Load | Subject::Unknown) && reply.status == 429
                    || reply.subject() == Subject::Load
            })
        };
        let is_honest = got.retry_after.is_some_and(|seconds| (1..=300).contains(&seconds));
        if got.status == 429 && got.is_ours && is_honest && able.iter().all(is_limited) {
            return true;
        }
        // An account that refused such requests before the change is tried again, one per request.
        let has_refused = |account: &usize| accounts[*account].replies[kind].is_some();
        if self.is_later && able.iter().all(has_refused) {
            self.missed[kind] += 1;
            // Speech has two routes, with separate restrictions.
            return self.missed[kind] <= 2 * accounts.len();
        }
        false
    }
}

async fn play(script: &Script) -> Result<(), String> {
    let plan = script.accounts.iter().enumerate().fold(Plan::of([]), |plan, (position, account)| {
        let name = format!("ws_{position}");
        let workspace = WorkspacePlan {
            voice_limit: Some(1_000),
            ..WorkspacePlan::of_tier(&name, account.credits, account.tier)
        };
        let key = KeyPlan { workspace: Some(name), ..KeyPlan::new(&key(position), 0) };
        plan.with_workspace(workspace).with_key(key)
    });
    let plan = plan.forbidding(CLIENTS[1]);
    let proxy = start_proxy_with(plan, |config| settings(config, script.strategy)).await;
    let mut play = Play { script, proxy, is_later: false, missed: [0; KINDS.len()] };
    play.set_replies();
    for (number, asked) in script.requests.iter().enumerate() {
        if number == script.requests.len() / 2 {
            play.is_later = true;
            play.set_replies();
        }
        play.ask(*asked).await.map_err(|fault| format!("request {number}: {fault}"))?;
    }
    let ledger = play.proxy.simulator.ledger();
    play.proxy.close_unchecked().await;
    if ledger.violations.is_empty() { Ok(()) } else { Err(format!("{:?}", ledger.violations)) }
}

/// Searches for a shorter script that fails, too, within a number of steps.
async fn shrink<T: ValueTree<Value = Script>>(mut tree: T, fault: String) -> (Script, String) {
    let mut found = (tree.current(), fault);
    for _ in 0..60 {
        match play(&tree.current()).await {
            Err(fault) => {
                found = (tree.current(), fault);
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
    found
}

/// Number of providers per test run, and of concurrent ones.
const PROVIDERS: usize = 16;
const AT_ONCE: usize = 8;

#[tokio::test]
async fn every_request_that_an_account_could_serve_is_served() {
    let wanted = std::env::var("KEYCHOIR_PROVIDERS").ok().and_then(|text| text.parse().ok());
    let rng_seed = if wanted.is_some() { RngSeed::Random } else { RngSeed::Fixed(20_261_129) };
    let mut runner = TestRunner::new(Proptest { rng_seed, ..Proptest::default() });
    let mut left = wanted.unwrap_or(PROVIDERS);
    let scripts = script();
    while left > 0 {
        let some = left.min(AT_ONCE);
        left -= some;
        let trees: Vec<_> = (0..some).map(|_| scripts.new_tree(&mut runner).unwrap()).collect();
        let played = trees.into_iter().map(|tree| async move {
            let script = tree.current();
            (play(&script).await, tree)
        });
        for (outcome, tree) in join_all(played).await {
            if let Err(fault) = outcome {
                let (script, fault) = shrink(tree, fault).await;
                panic!("{script:#?}\n{fault}");
            }
        }
    }
}

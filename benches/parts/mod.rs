//! The pure parts of a request's path, each as a repeatable operation whose cost is measured in
//! nanoseconds (`pure`), in instructions (`cost`) and in allocations (`tests/allocations.rs`).

#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a measurement ends at its first surprise, and each uses its own of these"
)]

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::hint::black_box;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use http::request::Parts;
use http::{HeaderMap, Method, Request, StatusCode};
use http_body::Body;
use http_body_util::Full;
use keychoir::body::budget::{BufferBudget, BufferLimits, BufferShare};
use keychoir::body::inspect::{BodyInspector, Inspect};
use keychoir::body::redacted_body::{RedactedBody, redact_headers};
use keychoir::body::replay::Replay;
use keychoir::clock;
use keychoir::elevenlabs::affinity::{self, RequestIdentifiers};
use keychoir::elevenlabs::cost::ReportedCost;
use keychoir::elevenlabs::endpoint::{Operation, Route, lookup};
use keychoir::elevenlabs::estimate::estimate_credits;
use keychoir::elevenlabs::models::Models;
use keychoir::elevenlabs::plan::Capabilities;
use keychoir::elevenlabs::refusal::{ErrorBody, classify};
use keychoir::elevenlabs::request_body::RequestBodyFeatures;
use keychoir::policy::budget::{Extension, Quota};
use keychoir::policy::client::{AnonymousAccess, Client, ClientName, Clients, Rules, authenticate};
use keychoir::policy::client_quota::{Period, Tally};
use keychoir::policy::concurrency_group::ConcurrencyGroup;
use keychoir::policy::headers::{ForwardedHeaders, is_searched, strip_response};
use keychoir::policy::origin::{AccessRules, check_origin};
use keychoir::policy::path::strip_base_path;
use keychoir::policy::strategy::Strategy;
use keychoir::policy::units::UnixMs;
use keychoir::policy::verdict::Verdict;
use keychoir::pool::{
    KeyEntry, KeyRequest, Lease, Observation, Pool, Reserved, Roster, ServedAttempt, Settings,
};
use keychoir::proxy::{route, sanitize};
use keychoir::secret::{ApiKey, Redactor, TokenFingerprint};
use keychoir::upstream::UpstreamBodyError;

/// A measured operation.
#[derive(Clone, Copy)]
pub struct Part {
    pub name: &'static str,
    /// Sets up the data that all its calls share.
    pub set_up: fn() -> Stage,
}

/// Given a number of calls, prepares a closure that executes them.
pub type Stage = Box<dyn Fn(usize) -> Box<dyn FnOnce()>>;

/// All parts, in the order of a request's path.
pub const PARTS: &[Part] = &[
    Part { name: "origin", set_up: || stage(|n| heads(n, What::Voices), |head| origin(&head)) },
    Part { name: "identify, one of 10 clients", set_up: || identifying(10) },
    Part { name: "identify, one of 10000 clients", set_up: || identifying(10_000) },
    Part { name: "look up, GET", set_up: || looking_up(What::Voices) },
    Part { name: "look up, TTS", set_up: || looking_up(What::Speech) },
    Part { name: "look up, any", set_up: || looking_up(What::Anything) },
    Part { name: "names, GET", set_up: || naming(What::Voices) },
    Part { name: "names, TTS", set_up: || naming(What::Speech) },
    Part { name: "names, any", set_up: || naming(What::Anything) },
    Part { name: "account, TTS", set_up: || accounting() },
    Part { name: "strip, GET", set_up: || stripping(What::Voices) },
    Part { name: "strip, TTS", set_up: || stripping(What::Speech) },
    Part { name: "estimate, TTS", set_up: || estimating() },
    Part { name: "owner, 1000 keys", set_up: || owning(1_000) },
    Part { name: "choose, 1 key", set_up: || choosing(1, Strategy::DEFAULT, Spread::Alone) },
    Part { name: "choose, 100 keys", set_up: || choosing(100, Strategy::DEFAULT, Spread::Alone) },
    Part { name: "choose, 1000 keys", set_up: || choosing(1_000, Strategy::DEFAULT, Spread::Alone) },
    Part {
        name: "choose, 1000 keys of one workspace",
        set_up: || choosing(1_000, Strategy::DEFAULT, Spread::Together),
    },
    Part {
        name: "choose, 1000 keys, only the last can pay",
        set_up: || choosing(1_000, Strategy::DEFAULT, Spread::OnlyLast),
    },
    Part {
        name: "choose, 1000 keys, round-robin",
        set_up: || choosing(1_000, Strategy::by_name("round-robin").unwrap(), Spread::Alone),
    },
    Part {
        name: "choose, 1000 keys, most-remaining",
        set_up: || choosing(1_000, Strategy::by_name("most-remaining").unwrap(), Spread::Alone),
    },
    Part {
        name: "choose, 1000 keys, least-requests",
        set_up: || choosing(1_000, Strategy::by_name("least-requests").unwrap(), Spread::Alone),
    },
    Part {
        name: "choose, 1000 keys, soonest-reset",
        set_up: || choosing(1_000, Strategy::by_name("soonest-reset").unwrap(), Spread::Alone),
    },
    Part { name: "classify, served", set_up: || stage(answers, |head| classify_served(&head)) },
    Part { name: "classify, refused", set_up: || stage(nothing, |()| classify_refused()) },
    Part { name: "strip answer", set_up: || stripping_answers() },
    Part { name: "tee up, 16 KiB", set_up: || teeing_up() },
    Part { name: "tee down, 16 KiB of sound", set_up: || teeing_down(None) },
    Part { name: "tee down, 16 KiB of text", set_up: || teeing_down(Some(redactor())) },
    Part {
        name: "tee down, 16 KiB of text, 1000 keys",
        set_up: || {
            teeing_down(Some(Arc::new(Redactor::new((0..1_000).map(digits).collect::<Vec<_>>().iter()))))
        },
    },
    Part { name: "way, GET", set_up: || going(What::Voices) },
    Part { name: "way, TTS", set_up: || going(What::Speech) },
];

/// The kind of request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// The list of voices.
    Voices,
    /// A sentence of speech.
    Speech,
    /// A path that is not in the provider's documents, with escapes.
    Anything,
}

/// The distribution of keys and credits over workspaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spread {
    Alone,
    Together,
    OnlyLast,
}

const TEXT: &[u8] = br#"{"text":"The first move is what sets everything in motion, and what follows is the rest of a sentence that is long enough to be one.","model_id":"eleven_multilingual_v2"}"#;
const REFUSAL: &[u8] = br#"{"detail":{"status":"quota_exceeded","message":"This request exceeds your quota of 10000. You have 12 credits remaining, while 134 credits are required for this request."}}"#;
const PIECE: usize = 16 * 1024;

/// An operation on each of the prepared `items`.
fn stage<T: 'static>(items: impl Fn(usize) -> Vec<T> + 'static, each: impl Fn(T) + 'static) -> Stage {
    let each = Rc::new(each);
    Box::new(move |count| {
        let (items, each) = (items(count), Rc::clone(&each));
        Box::new(move || items.into_iter().for_each(|item| each(item)))
    })
}

fn nothing(count: usize) -> Vec<()> {
    vec![(); count]
}

/// The request head of the provider's Python SDK.
fn head(what: What) -> Parts {
    let (method, target) = match what {
        What::Voices => (Method::GET, "/v1/voices"),
        What::Speech => (Method::POST, "/v1/text-to-speech/21m00Tcm4TlvDq8ikWAM?output_format=mp3_44100_128"),
        What::Anything => (Method::GET, "/v1/what%20comes/next/12345678?page=3&q=a%20word"),
    };
    let mut request = Request::builder()
        .method(method)
        .uri(target)
        .header("host", "127.0.0.1:11011")
        .header("accept", "*/*")
        .header("accept-encoding", "gzip, deflate")
        .header("connection", "keep-alive")
        .header("user-agent", "python-httpx/0.28.1")
        .header("x-fern-language", "Python")
        .header("x-fern-sdk-name", "elevenlabs")
        .header("x-fern-sdk-version", "2.78.0")
        .header("xi-api-key", "keychoir-token-number-3");
    if what == What::Speech {
        request = request.header("content-type", "application/json").header("content-length", TEXT.len());
    }
    request.body(()).unwrap().into_parts().0
}

fn heads(count: usize, what: What) -> Vec<Parts> {
    (0..count).map(|_| head(what)).collect()
}

fn answers(count: usize) -> Vec<HeaderMap> {
    let answer: HeaderMap = [
        ("date", "Tue, 05 Aug 2026 10:00:00 GMT"),
        ("server", "uvicorn"),
        ("content-type", "audio/mpeg"),
        ("transfer-encoding", "chunked"),
        ("connection", "keep-alive"),
        ("access-control-expose-headers", "request-id, history-item-id"),
        ("character-cost", "134"),
        ("current-concurrent-requests", "1"),
        ("maximum-concurrent-requests", "10"),
        ("request-id", "f1a2b3c4d5e6f7a8b9c0"),
        ("history-item-id", "VW7YKqPnjY4h39yTbx2L"),
        ("x-trace-id", "0123456789abcdef0123456789abcdef"),
    ]
    .into_iter()
    .map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()))
    .collect();
    vec![answer; count]
}

fn clients(count: usize) -> Clients {
    let client = |number: usize| {
        let name = ClientName::new(&format!("client-{number}"));
        let token = TokenFingerprint::new(&format!("keychoir-token-number-{number}"));
        (Client { name, rules: Rules::default() }, token)
    };
    Clients::new((0..count).map(client).collect(), AnonymousAccess::Refused)
}

fn origin(head: &Parts) {
    let doors = AccessRules::default();
    black_box(strip_base_path(&head.uri, ""));
    black_box(check_origin(&doors, false, &head.method, &head.headers)).unwrap();
}

fn identifying(count: usize) -> Stage {
    let clients = clients(count);
    stage(
        move |n| heads(n, What::Voices),
        move |head| {
            black_box(authenticate(&clients, &head.headers, head.uri.query())).unwrap();
            std::mem::forget(head);
        },
    )
}

fn looking_up(what: What) -> Stage {
    stage(
        move |n| heads(n, what),
        |mut head| {
            black_box(route(&mut head, true)).unwrap();
            std::mem::forget(head);
        },
    )
}

fn naming(what: What) -> Stage {
    let route_of = |head: &Parts| lookup(&head.method, head.uri.path()).unwrap().route;
    let with_routes = move |count| {
        let routed = |head: Parts| {
            let route = route_of(&head);
            (head, route)
        };
        heads(count, what).into_iter().map(routed).collect::<Vec<_>>()
    };
    stage(with_routes, |(head, route)| {
        black_box(name(&head, &route));
        std::mem::forget(head);
    })
}

/// The account affinity of a request, as far as its head shows.
fn name(head: &Parts, route: &Route) -> RequestIdentifiers {
    black_box(affinity::response_ownership(&head.method, route));
    black_box(affinity::is_speech(route));
    RequestIdentifiers::parse(head.uri.path(), head.uri.query())
}

/// Counts a request and its credits in the periods of its client.
fn accounting() -> Stage {
    let tallies = Cell::new([Tally::default(); 6]);
    stage(nothing, move |()| {
        let (mut counted, now) = (tallies.get(), black_box(UnixMs(1_796_000_000_000)));
        for (tally, period) in counted.iter_mut().zip(Period::ALL.into_iter().cycle()) {
            *tally = tally.add(1, period, now);
            black_box(tally.used(period, now));
        }
        tallies.set(counted);
    })
}

fn stripping(what: What) -> Stage {
    stage(
        move |n| heads(n, what),
        |head| {
            std::mem::forget(black_box(sanitize(head, None, &ForwardedHeaders::default())).unwrap());
        },
    )
}

fn estimating() -> Stage {
    let models = Models::default();
    stage(nothing, move |()| {
        let asked = RequestBodyFeatures::parse(black_box(TEXT), true);
        black_box(estimate_credits(black_box(Operation::Speech), &asked, Some(TEXT.len() as u64), &models));
    })
}

fn classify_served(headers: &HeaderMap) {
    black_box(classify(black_box(StatusCode::OK), None, None));
    black_box(ReportedCost::from_headers(headers));
}

fn classify_refused() {
    let body = ErrorBody::parse(black_box(REFUSAL));
    let verdict = classify(black_box(StatusCode::UNAUTHORIZED), Some(&body), None);
    assert!(matches!(verdict, Verdict::WorkspaceQuota(_)));
}

fn redactor() -> Arc<Redactor> {
    let keys: Vec<ApiKey> = (0..10).map(key).collect();
    Arc::new(Redactor::new(keys.iter()))
}

fn stripping_answers() -> Stage {
    let redactor = redactor();
    stage(answers, move |mut headers| {
        strip_response(&mut headers);
        redact_headers(&mut headers, &redactor);
        black_box(is_searched(&headers));
        std::mem::forget(headers);
    })
}

fn budget() -> BufferBudget {
    BufferBudget::new(&BufferLimits {
        max_body_memory: 1 << 20,
        max_total_memory: 1 << 40,
        max_body_disk: 0,
        max_total_disk: 0,
        min_disk_free_percent: 10,
        directory: "/nowhere".into(),
    })
}

fn frame<B: Body<Data = Bytes> + Unpin>(body: &mut B) -> Bytes
where
    B::Error: std::fmt::Debug,
{
    match Pin::new(body).poll_frame(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(Some(frame)) => frame.unwrap().into_data().unwrap(),
        other @ (Poll::Ready(None) | Poll::Pending) => panic!("no piece: {other:?}"),
    }
}

fn piece(is_text: bool) -> Bytes {
    let text = b"what is said in a document, \"and\" how: ";
    (0..PIECE)
        .map(|at| if is_text { text[at % text.len()] } else { (at * 7) as u8 })
        .collect::<Vec<u8>>()
        .into()
}

fn teeing_up() -> Stage {
    let (room, piece) = (budget(), piece(false));
    stage(nothing, move |()| {
        let replay = Replay::new(Full::new(piece.clone()), &room);
        let mut attempt = replay.start_attempt();
        assert_eq!(frame(&mut attempt).len(), PIECE);
        attempt.upload().release();
    })
}

struct NoInspector;

impl BodyInspector for NoInspector {
    fn inspect(self, _: &[u8]) {}
}

/// An endless body.
struct Endless(Bytes);

impl Body for Endless {
    type Data = Bytes;
    type Error = UpstreamBodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Bytes>, UpstreamBodyError>>> {
        Poll::Ready(Some(Ok(http_body::Frame::data(self.0.clone()))))
    }
}

fn teeing_down(redactor: Option<Arc<Redactor>>) -> Stage {
    let heard: Inspect<Endless, NoInspector> =
        Inspect::new(Endless(piece(redactor.is_some())), None, 0, BufferShare::default());
    let relayed = RefCell::new(RedactedBody::new(heard, redactor));
    stage(nothing, move |()| {
        // A few bytes are held back until the next ones are known.
        assert!(black_box(frame(&mut *relayed.borrow_mut())).len() > PIECE / 2);
    })
}

/// A key in the provider's format.
fn digits(number: u128) -> ApiKey {
    ApiKey::new(&format!("sk_{:048x}", (number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835)))
        .unwrap()
}

fn key(number: usize) -> ApiKey {
    ApiKey::new(&format!("sk_bench_key_number_{number:06}_of_the_pool_of_keys")).unwrap()
}

/// A pool with credits, and the needs of a speech request.
pub struct Keys {
    pub pool: Arc<Pool>,
    pub request: KeyRequest,
}

impl Keys {
    pub fn new(count: usize, strategy: &'static Strategy, spread: Spread) -> Self {
        const HOUR: Duration = Duration::from_secs(3_600);
        let entries = (0..count).map(|number| KeyEntry {
            workspace: (spread == Spread::Together).then(|| "studio".to_owned()),
            ..KeyEntry::from(key(number))
        });
        let settings = Settings {
            strategy,
            // No queue: a full pool refuses at once.
            queue_timeout: Duration::ZERO,
            max_queued: 0,
            near_limit_ratio: 0.8,
            rate_limited_cooldown: HOUR,
            concurrency_cooldown: HOUR,
            exhausted_cooldown: HOUR,
            billing_cooldown: HOUR,
            invalid_confirm_cooldown: HOUR,
            invalid_cooldown: HOUR,
            permission_cooldown: HOUR,
            feature_cooldown: HOUR,
            endpoint_cooldown: HOUR,
            unproven_cooldown: HOUR,
            max_retry_after: HOUR,
            probe_after: HOUR,
            quota_lag: HOUR,
        };
        let pool = Arc::new(Pool::new(entries.collect(), settings));
        let roster = pool.roster();
        for (number, key) in roster.keys().iter().enumerate() {
            let can_pay = spread != Spread::OnlyLast || number + 1 == count;
            let quota = Quota {
                count: 1_000,
                limit: Some(if can_pay { 1_000_000_000_000 } else { 1_000 }),
                extension: Extension::None,
                resets_at: Some(clock::now().plus(HOUR)),
            };
            let capabilities = Capabilities::default();
            let seen = Observation::Quota { quota, tier: None, is_paid: Some(true), capabilities };
            pool.observe(&roster, key, seen, clock::now());
        }
        let request = KeyRequest::new(ClientName::new("app"), Some(200), Some(ConcurrencyGroup::SPEECH));
        Self { pool, request }
    }

    /// One request's use of the pool, from the roster to the release.
    pub fn serve(&self) {
        let roster = self.pool.roster();
        let (mut lease, roster) = (self.reserve(&roster, &self.request), roster);
        lease.mark_sent();
        let served =
            ServedAttempt { request: Some(&self.request), began_at: lease.reserved_at(), is_charged: true };
        black_box(self.pool.record_service(&roster, lease.key(), served, clock::now()));
        black_box(self.pool.charge(&roster, &mut lease, 150, clock::now()));
    }

    fn reserve(&self, roster: &Arc<Roster>, request: &KeyRequest) -> Lease {
        let reserving = pin!(self.pool.reserve(roster, request));
        match reserving.poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(Ok(Reserved { lease, transitions })) => {
                black_box(transitions);
                lease
            }
            other @ (Poll::Ready(Err(_)) | Poll::Pending) => panic!("no key: {other:?}"),
        }
    }
}

/// Resolves the account of the identifiers in a request.
fn owning(keys: usize) -> Stage {
    let roster = Keys::new(keys, Strategy::DEFAULT, Spread::Alone).pool.roster();
    let owner = roster.keys()[keys - 1].workspace().identity().clone();
    stage(nothing, move |()| {
        assert!(roster.has_several_workspaces());
        assert_eq!(roster.identity_of(black_box(&owner)), Some(&owner));
    })
}

fn choosing(keys: usize, strategy: &'static Strategy, spread: Spread) -> Stage {
    let keys = Keys::new(keys, strategy, spread);
    stage(nothing, move |()| keys.serve())
}

/// All steps of a request between reading the client's head and writing the provider's, and the
/// processing of its response; without its body, its usage record and its log line.
struct Way {
    clients: Clients,
    keys: Keys,
    models: Models,
    redactor: Arc<Redactor>,
}

impl Way {
    fn new() -> Self {
        let keys = Keys::new(10, Strategy::DEFAULT, Spread::Alone);
        Self { clients: clients(10), keys, models: Models::default(), redactor: redactor() }
    }

    fn go(&self, (mut head, mut answer): (Parts, HeaderMap)) {
        let (pool, now) = (&self.keys.pool, clock::now());
        origin(&head);
        let caller = authenticate(&self.clients, &head.headers, head.uri.query()).unwrap();
        let (endpoint, names, _) = route(&mut head, true).unwrap();
        black_box(affinity::response_ownership(&head.method, &endpoint.route));
        black_box(affinity::is_speech(&endpoint.route));
        let outbound = sanitize(head, endpoint.socket, &ForwardedHeaders::default()).unwrap();
        let asked = if endpoint.operation.has_text() {
            RequestBodyFeatures::parse(TEXT, true)
        } else {
            RequestBodyFeatures::default()
        };
        let credits = estimate_credits(endpoint.operation, &asked, None, &self.models);
        let group = ConcurrencyGroup::for_operation(endpoint.operation);
        let request = KeyRequest::new(caller.client.name.clone(), credits, group);
        let roster = pool.roster();
        let mut lease = self.keys.reserve(&roster, &request);
        lease.mark_sent();
        // The response has been received.
        assert_eq!(classify(StatusCode::OK, None, None), Verdict::Served);
        let served =
            ServedAttempt { request: Some(&request), began_at: lease.reserved_at(), is_charged: true };
        black_box(pool.record_service(&roster, lease.key(), served, now));
        let told = ReportedCost::from_headers(&answer);
        lease.record_concurrency_limit(told.concurrency_max.unwrap());
        black_box(pool.charge(&roster, &mut lease, told.credits.unwrap(), now));
        strip_response(&mut answer);
        redact_headers(&mut answer, &self.redactor);
        black_box(is_searched(&answer));
        black_box((names, outbound, answer));
    }
}

fn going(what: What) -> Stage {
    let way = Way::new();
    let requests = move |count| heads(count, what).into_iter().zip(answers(count)).collect::<Vec<_>>();
    stage(requests, move |request| way.go(request))
}

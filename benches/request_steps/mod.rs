//! Defines the steps of the request path that do no I/O, each as a repeatable operation. Their costs are measured in
//! nanoseconds (`benches/pure.rs`), in instructions (`benches/cost`) and in allocations (`tests/allocations.rs`).

#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a measurement panics if an expectation fails, and each target uses a part of this module"
)]

#[path = "../pool_settings/mod.rs"]
mod pool_settings;
mod request_path;

use std::cell::{Cell, RefCell};
use std::hint::black_box;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use http::request::Parts;
use http::{HeaderMap, Method, Request, StatusCode};
use http_body::Body;
use http_body_util::Full;
use keychoir::body::budget::{BufferBudget, BufferLimits, BufferReservation};
use keychoir::body::inspect::{BodyInspector, InspectedBody};
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
use keychoir::policy::client::{AnonymousAccess, Client, ClientName, Clients, Rules, authenticate};
use keychoir::policy::client_quota::{Period, Tally};
use keychoir::policy::concurrency_group::ConcurrencyGroup;
use keychoir::policy::headers::{ForwardedHeaders, is_searched, strip_response};
use keychoir::policy::origin::{AccessRules, check_origin};
use keychoir::policy::path::strip_base_path;
use keychoir::policy::quota::{Extension, Quota};
use keychoir::policy::strategy::Strategy;
use keychoir::policy::units::UnixMs;
use keychoir::policy::verdict::Verdict;
use keychoir::pool::{
    CreditShare, KeyEntry, KeyRequest, Lease, Observation, Pool, PoolChange, Reserved, Roster, ServedAttempt,
};
use keychoir::proxy::{route, sanitize};
use keychoir::secret::{ApiKey, Redactor, TokenFingerprint};
use keychoir::upstream::UpstreamBodyError;
use pool_settings::{HOUR, pool_settings};
use request_path::prepare_request_path;
use tokio::sync::mpsc;

/// A step of the request path that the benchmarks measure.
#[derive(Clone, Copy)]
pub struct Step {
    pub name: &'static str,
    /// Creates the data that all calls share, and returns a function that prepares calls.
    pub set_up: fn() -> PrepareCalls,
}

/// Prepares the inputs of a given number of calls, and returns a closure that makes these calls.
pub type PrepareCalls = Box<dyn Fn(usize) -> Box<dyn FnOnce()>>;

/// All steps, in the order of the request path.
pub const STEPS: &[Step] = &[
    Step {
        name: "origin",
        set_up: || {
            prepare(|count| request_heads(count, RequestKind::Voices), |head| check_request_origin(&head))
        },
    },
    Step { name: "authenticate, one of 10 clients", set_up: || prepare_authentication(10) },
    Step { name: "authenticate, one of 10000 clients", set_up: || prepare_authentication(10_000) },
    Step { name: "look up, GET", set_up: || prepare_endpoint_lookup(RequestKind::Voices) },
    Step { name: "look up, TTS", set_up: || prepare_endpoint_lookup(RequestKind::Speech) },
    Step { name: "look up, unknown path", set_up: || prepare_endpoint_lookup(RequestKind::UnknownPath) },
    Step { name: "identifiers, GET", set_up: || prepare_identifiers(RequestKind::Voices) },
    Step { name: "identifiers, TTS", set_up: || prepare_identifiers(RequestKind::Speech) },
    Step { name: "identifiers, unknown path", set_up: || prepare_identifiers(RequestKind::UnknownPath) },
    Step { name: "client quota, TTS", set_up: || prepare_client_quota() },
    Step { name: "sanitize, GET", set_up: || prepare_request_sanitizing(RequestKind::Voices) },
    Step { name: "sanitize, TTS", set_up: || prepare_request_sanitizing(RequestKind::Speech) },
    Step { name: "estimate, TTS", set_up: || prepare_estimate() },
    Step { name: "owner, 1000 keys", set_up: || prepare_owner_lookup(1_000) },
    Step {
        name: "select, 1 key",
        set_up: || prepare_key_selection(1, Strategy::DEFAULT, Spread::WorkspacePerKey),
    },
    Step {
        name: "select, 100 keys",
        set_up: || prepare_key_selection(100, Strategy::DEFAULT, Spread::WorkspacePerKey),
    },
    Step {
        name: "select, 1000 keys",
        set_up: || prepare_key_selection(1_000, Strategy::DEFAULT, Spread::WorkspacePerKey),
    },
    Step {
        name: "select, 1000 keys of one workspace",
        set_up: || prepare_key_selection(1_000, Strategy::DEFAULT, Spread::OneWorkspace),
    },
    Step {
        name: "select, 1000 keys, only the last has credits",
        set_up: || prepare_key_selection(1_000, Strategy::DEFAULT, Spread::OnlyLastHasCredits),
    },
    Step {
        name: "select, 1000 keys, round-robin",
        set_up: || {
            prepare_key_selection(1_000, Strategy::by_name("round-robin").unwrap(), Spread::WorkspacePerKey)
        },
    },
    Step {
        name: "select, 1000 keys, most-remaining",
        set_up: || {
            prepare_key_selection(
                1_000,
                Strategy::by_name("most-remaining").unwrap(),
                Spread::WorkspacePerKey,
            )
        },
    },
    Step {
        name: "select, 1000 keys, least-requests",
        set_up: || {
            prepare_key_selection(
                1_000,
                Strategy::by_name("least-requests").unwrap(),
                Spread::WorkspacePerKey,
            )
        },
    },
    Step {
        name: "select, 1000 keys, soonest-reset",
        set_up: || {
            prepare_key_selection(1_000, Strategy::by_name("soonest-reset").unwrap(), Spread::WorkspacePerKey)
        },
    },
    Step { name: "classify, served", set_up: || prepare(response_heads, |head| classify_served(&head)) },
    Step { name: "classify, refused", set_up: || prepare(no_items, |()| classify_refused()) },
    Step { name: "sanitize response", set_up: || prepare_response_sanitizing() },
    Step { name: "buffer 16 KiB of an upload", set_up: || prepare_upload() },
    Step { name: "relay 16 KiB of audio", set_up: || prepare_relay(None) },
    Step { name: "relay 16 KiB of text", set_up: || prepare_relay(Some(redactor())) },
    Step {
        name: "relay 16 KiB of text, 1000 keys",
        set_up: || {
            prepare_relay(Some(Arc::new(Redactor::new(
                (0..1_000).map(provider_key).collect::<Vec<_>>().iter(),
            ))))
        },
    },
    Step {
        name: "request path, GET",
        set_up: || prepare_request_path(RequestKind::Voices, ClientLimits::None),
    },
    Step {
        name: "request path, TTS",
        set_up: || prepare_request_path(RequestKind::Speech, ClientLimits::None),
    },
    Step { name: GET_WITH_QUOTA, set_up: || prepare_request_path(RequestKind::Voices, ClientLimits::Quota) },
    Step { name: TTS_WITH_QUOTA, set_up: || prepare_request_path(RequestKind::Speech, ClientLimits::Quota) },
    Step { name: GET_OF_REPLICA, set_up: || prepare_request_path(RequestKind::Voices, ClientLimits::Shared) },
    Step { name: TTS_OF_REPLICA, set_up: || prepare_request_path(RequestKind::Speech, ClientLimits::Shared) },
];

/// The names of the steps for requests of a client with a quota, without other replicas.
pub const GET_WITH_QUOTA: &str = "request path, GET, quota";
pub const TTS_WITH_QUOTA: &str = "request path, TTS, quota";
/// The names of the steps for the same requests at a replica that holds a part of the pool's credits and slots, and of
/// the client's quota.
pub const GET_OF_REPLICA: &str = "request path, GET, quota, replica";
pub const TTS_OF_REPLICA: &str = "request path, TTS, quota, replica";

/// A request whose steps are measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestKind {
    /// The list of voices.
    Voices,
    /// A request for speech with one sentence.
    Speech,
    /// A request whose path contains escapes and is not in the provider's documentation.
    UnknownPath,
}

/// The distribution of keys and credits over workspaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spread {
    /// Each key has a separate workspace with credits.
    WorkspacePerKey,
    /// All keys belong to one workspace.
    OneWorkspace,
    /// Each key has a separate workspace, and only the workspace of the last key has credits.
    OnlyLastHasCredits,
}

/// The limits of the clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientLimits {
    None,
    /// A monthly quota of credits.
    Quota,
    /// The same quota, of which this replica holds a grant. The pool is divided between replicas as well.
    Shared,
}

/// The body of a speech request.
const SPEECH_BODY: &[u8] = br#"{"text":"The first move is what sets everything in motion, and what follows is the rest of a sentence that is long enough to be one.","model_id":"eleven_multilingual_v2"}"#;
/// The body of a response that refuses a request, because the credits do not suffice.
const REFUSAL: &[u8] = br#"{"detail":{"status":"quota_exceeded","message":"This request exceeds your quota of 10000. You have 12 credits remaining, while 134 credits are required for this request."}}"#;
const CHUNK_BYTES: usize = 16 * 1024;

/// Returns a [`PrepareCalls`] that runs `operation` once for each of the `items` that it prepares.
fn prepare<T: 'static>(
    items: impl Fn(usize) -> Vec<T> + 'static,
    operation: impl Fn(T) + 'static,
) -> PrepareCalls {
    let operation = Rc::new(operation);
    Box::new(move |count| {
        let (items, operation) = (items(count), Rc::clone(&operation));
        Box::new(move || items.into_iter().for_each(|item| operation(item)))
    })
}

fn no_items(count: usize) -> Vec<()> {
    vec![(); count]
}

/// Returns the request head of the provider's Python SDK.
fn request_head(kind: RequestKind) -> Parts {
    let (method, target) = match kind {
        RequestKind::Voices => (Method::GET, "/v1/voices"),
        RequestKind::Speech => {
            (Method::POST, "/v1/text-to-speech/21m00Tcm4TlvDq8ikWAM?output_format=mp3_44100_128")
        }
        RequestKind::UnknownPath => (Method::GET, "/v1/what%20comes/next/12345678?page=3&q=a%20word"),
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
    if kind == RequestKind::Speech {
        request =
            request.header("content-type", "application/json").header("content-length", SPEECH_BODY.len());
    }
    request.body(()).unwrap().into_parts().0
}

fn request_heads(count: usize, kind: RequestKind) -> Vec<Parts> {
    (0..count).map(|_| request_head(kind)).collect()
}

fn response_heads(count: usize) -> Vec<HeaderMap> {
    let response_headers: HeaderMap = [
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
    vec![response_headers; count]
}

/// Creates clients with tokens. The request heads contain the token of the fourth one.
fn create_clients(count: usize, rules: &Rules) -> Clients {
    let client = |number: usize| {
        let name = ClientName::new(&format!("client-{number}"));
        let token = TokenFingerprint::new(&format!("keychoir-token-number-{number}"));
        (Client { name, rules: rules.clone() }, token.into())
    };
    Clients::new((0..count).map(client).collect(), AnonymousAccess::Refused)
}

fn check_request_origin(head: &Parts) {
    let access_rules = AccessRules::default();
    black_box(strip_base_path(&head.uri, ""));
    black_box(check_origin(&access_rules, false, &head.method, &head.headers)).unwrap();
}

fn prepare_authentication(count: usize) -> PrepareCalls {
    let clients = create_clients(count, &Rules::default());
    prepare(
        move |count| request_heads(count, RequestKind::Voices),
        move |head| {
            black_box(authenticate(&clients, &head.headers, head.uri.query(), UnixMs(0))).unwrap();
            std::mem::forget(head);
        },
    )
}

fn prepare_endpoint_lookup(kind: RequestKind) -> PrepareCalls {
    prepare(
        move |count| request_heads(count, kind),
        |mut head| {
            black_box(route(&mut head, true)).unwrap();
            std::mem::forget(head);
        },
    )
}

fn prepare_identifiers(kind: RequestKind) -> PrepareCalls {
    let heads_with_routes = move |count| {
        let add_route = |head: Parts| {
            let route = lookup(&head.method, head.uri.path()).unwrap().route;
            (head, route)
        };
        request_heads(count, kind).into_iter().map(add_route).collect::<Vec<_>>()
    };
    prepare(heads_with_routes, |(head, route)| {
        black_box(identify_request(&head, &route));
        std::mem::forget(head);
    })
}

/// Parses the identifiers in a request head that determine its account affinity.
fn identify_request(head: &Parts, route: &Route) -> RequestIdentifiers {
    black_box(affinity::response_ownership(&head.method, route));
    black_box(affinity::is_speech(route));
    RequestIdentifiers::parse(head.uri.path(), head.uri.query())
}

/// Counts a request and its credits in the periods of its client.
fn prepare_client_quota() -> PrepareCalls {
    let tallies = Cell::new([Tally::default(); 6]);
    prepare(no_items, move |()| {
        let (mut period_tallies, now) = (tallies.get(), black_box(UnixMs(1_796_000_000_000)));
        for (tally, period) in period_tallies.iter_mut().zip(Period::ALL.into_iter().cycle()) {
            *tally = tally.add(1, period, now);
            black_box(tally.used(period, now));
        }
        tallies.set(period_tallies);
    })
}

fn prepare_request_sanitizing(kind: RequestKind) -> PrepareCalls {
    prepare(
        move |count| request_heads(count, kind),
        |head| {
            std::mem::forget(black_box(sanitize(head, None, &ForwardedHeaders::default())).unwrap());
        },
    )
}

fn prepare_estimate() -> PrepareCalls {
    let models = Models::default();
    prepare(no_items, move |()| {
        let features = RequestBodyFeatures::parse(black_box(SPEECH_BODY), true);
        black_box(estimate_credits(
            black_box(Operation::Speech),
            &features,
            Some(SPEECH_BODY.len() as u64),
            &models,
        ));
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
    let keys: Vec<ApiKey> = (0..10).map(pool_key).collect();
    Arc::new(Redactor::new(keys.iter()))
}

fn prepare_response_sanitizing() -> PrepareCalls {
    let redactor = redactor();
    prepare(response_heads, move |mut headers| {
        strip_response(&mut headers);
        redact_headers(&mut headers, &redactor);
        black_box(is_searched(&headers));
        std::mem::forget(headers);
    })
}

fn buffer_budget() -> BufferBudget {
    BufferBudget::new(&BufferLimits {
        max_body_memory: 1 << 20,
        max_total_memory: 1 << 40,
        max_body_disk: 0,
        max_total_disk: 0,
        min_disk_free_percent: 10,
        directory: "/nowhere".into(),
    })
}

/// Polls the next data frame, which must be ready.
fn next_frame<B: Body<Data = Bytes> + Unpin>(body: &mut B) -> Bytes
where
    B::Error: std::fmt::Debug,
{
    match Pin::new(body).poll_frame(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(Some(frame)) => frame.unwrap().into_data().unwrap(),
        other @ (Poll::Ready(None) | Poll::Pending) => panic!("the body must have a frame: {other:?}"),
    }
}

fn body_chunk(is_text: bool) -> Bytes {
    let text = b"what is said in a document, \"and\" how: ";
    (0..CHUNK_BYTES)
        .map(|index| if is_text { text[index % text.len()] } else { (index * 7) as u8 })
        .collect::<Vec<u8>>()
        .into()
}

fn prepare_upload() -> PrepareCalls {
    let (budget, chunk) = (buffer_budget(), body_chunk(false));
    prepare(no_items, move |()| {
        let replay = Replay::new(Full::new(chunk.clone()), &budget);
        let mut attempt = replay.start_attempt();
        assert_eq!(next_frame(&mut attempt).len(), CHUNK_BYTES);
        attempt.upload().release();
    })
}

/// An inspector that ignores the body.
struct NoInspector;

impl BodyInspector for NoInspector {
    fn inspect(self, _: &[u8]) {}
}

/// A body that repeats the same chunk without end.
struct EndlessBody(Bytes);

impl Body for EndlessBody {
    type Data = Bytes;
    type Error = UpstreamBodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Bytes>, UpstreamBodyError>>> {
        Poll::Ready(Some(Ok(http_body::Frame::data(self.0.clone()))))
    }
}

fn prepare_relay(redactor: Option<Arc<Redactor>>) -> PrepareCalls {
    let inspected_body: InspectedBody<EndlessBody, NoInspector> = InspectedBody::new(
        EndlessBody(body_chunk(redactor.is_some())),
        None,
        0,
        BufferReservation::default(),
    );
    let relayed_body = RefCell::new(RedactedBody::new(inspected_body, redactor));
    prepare(no_items, move |()| {
        // The redactor holds back a few bytes until it has seen the following bytes.
        assert!(black_box(next_frame(&mut *relayed_body.borrow_mut())).len() > CHUNK_BYTES / 2);
    })
}

/// Returns a key in the provider's format.
fn provider_key(number: u128) -> ApiKey {
    ApiKey::new(&format!("sk_{:048x}", (number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835)))
        .unwrap()
}

fn pool_key(number: usize) -> ApiKey {
    ApiKey::new(&format!("sk_bench_key_number_{number:06}_of_the_pool_of_keys")).unwrap()
}

/// A pool of keys with credits, and the key request of a speech request.
pub struct PoolWithCredits {
    pub pool: Arc<Pool>,
    pub request: KeyRequest,
}

impl PoolWithCredits {
    pub fn new(count: usize, strategy: &'static Strategy, spread: Spread) -> Self {
        let entries = (0..count).map(|number| KeyEntry {
            workspace: (spread == Spread::OneWorkspace).then(|| "studio".to_owned()),
            ..KeyEntry::from(pool_key(number))
        });
        let pool = Arc::new(Pool::new(entries.collect(), pool_settings(strategy)));
        let roster = pool.roster();
        for (number, key) in roster.keys().iter().enumerate() {
            let has_credits = spread != Spread::OnlyLastHasCredits || number + 1 == count;
            let quota = Quota {
                count: 1_000,
                limit: Some(if has_credits { 1_000_000_000_000 } else { 1_000 }),
                extension: Extension::None,
                resets_at: Some(clock::now().plus(HOUR)),
            };
            let capabilities = Capabilities::default();
            let observation = Observation::Quota { quota, tier: None, is_paid: Some(true), capabilities };
            pool.observe(&roster, key, observation, clock::now());
        }
        let request = KeyRequest::new(ClientName::new("app"), Some(200), Some(ConcurrencyGroup::SPEECH));
        Self { pool, request }
    }

    /// Gives this replica a part of the credits and of the concurrent requests, which suffices for all calls. Returns
    /// the receiver of the changes for the other replicas, which must be kept.
    pub fn divide(&self) -> mpsc::Receiver<PoolChange> {
        let (sender, receiver) = mpsc::channel(64);
        self.pool.send_changes_to(sender);
        let roster = self.pool.roster();
        for workspace in roster.workspaces() {
            let foreign = workspace.credit_use().foreign;
            let share = CreditShare { foreign, granted: Some(1 << 36), may_overcommit: false };
            self.pool.divide_credits(workspace, share, clock::now());
            for group in ConcurrencyGroup::all() {
                self.pool.divide_slots(workspace, group, Some(5), clock::now());
            }
        }
        receiver
    }

    /// Runs the pool operations of a served request, from loading the roster to the release.
    pub fn serve(&self) {
        let roster = self.pool.roster();
        let mut lease = self.reserve(&roster, &self.request);
        lease.mark_sent();
        let served =
            ServedAttempt { request: Some(&self.request), began_at: lease.reserved_at(), is_charged: true };
        black_box(self.pool.record_service(&roster, lease.key(), served, clock::now()));
        black_box(self.pool.charge(&roster, &mut lease, 150, clock::now()));
    }

    fn reserve(&self, roster: &Arc<Roster>, request: &KeyRequest) -> Lease {
        let reservation = pin!(self.pool.reserve(roster, request));
        match reservation.poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(Ok(Reserved { lease, transitions })) => {
                black_box(transitions);
                lease
            }
            other @ (Poll::Ready(Err(_)) | Poll::Pending) => panic!("a key must be available: {other:?}"),
        }
    }
}

/// Looks up the account that owns the identifiers in a request.
fn prepare_owner_lookup(keys: usize) -> PrepareCalls {
    let roster = PoolWithCredits::new(keys, Strategy::DEFAULT, Spread::WorkspacePerKey).pool.roster();
    let owner = roster.keys()[keys - 1].workspace().identity().clone();
    prepare(no_items, move |()| {
        assert!(roster.has_several_workspaces());
        assert_eq!(roster.identity_of(black_box(&owner)), Some(&owner));
    })
}

fn prepare_key_selection(keys: usize, strategy: &'static Strategy, spread: Spread) -> PrepareCalls {
    let pool_with_credits = PoolWithCredits::new(keys, strategy, spread);
    prepare(no_items, move |()| pool_with_credits.serve())
}

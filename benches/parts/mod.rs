//! The pure parts of a request's way, each as something that is done so many times: what they cost
//! is measured in nanoseconds (`pure`), in instructions (`cost`) and in allocations
//! (`tests/allocations.rs`).

#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a measurement ends at its first surprise, and each uses its own of these"
)]

use std::convert::Infallible;
use std::future::Future;
use std::hint::black_box;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use http::request::Parts;
use http::{HeaderMap, Method, Request, StatusCode};
use http_body::Body;
use http_body_util::Full;
use keychoir::body::redacted::{Redacted, redact_headers};
use keychoir::body::replay::Replay;
use keychoir::body::room::{Bounds, Room};
use keychoir::body::tap::{Listen, Tap};
use keychoir::clock;
use keychoir::policy::affinity::{self, Names};
use keychoir::policy::allowance::{Period, Tally};
use keychoir::policy::asked::Asked;
use keychoir::policy::budget::{Extension, Quota};
use keychoir::policy::classify::{ErrorBody, Verdict, classify};
use keychoir::policy::client::{Client, ClientName, Clients, Rules, Strangers, identify};
use keychoir::policy::cost;
use keychoir::policy::endpoint::{Route, Work, lookup};
use keychoir::policy::estimate::estimate;
use keychoir::policy::headers::{is_plain_text, strip_answer};
use keychoir::policy::lane::Lane;
use keychoir::policy::mend::without_base;
use keychoir::policy::models::Models;
use keychoir::policy::origin::{Doors, admit};
use keychoir::policy::permission::Permission;
use keychoir::policy::strategy::{FillFirst, LeastBusy, MostRemaining, RoundRobin, SoonestReset, Strategy};
use keychoir::pool::{Ask, KeyEntry, Lease, Observation, Pool, Reserved, Roster, Settings};
use keychoir::proxy::{look_up, strip};
use keychoir::secret::{ApiKey, Fingerprint, Redactor};

/// Something that is measured. `prepare` is told how often it will be done, and what comes back does
/// it that often.
#[derive(Clone, Copy)]
pub struct Part {
    pub name: &'static str,
    pub prepare: fn(usize) -> Box<dyn FnOnce()>,
}

/// All of them, in the order of a request's way.
pub const PARTS: &[Part] = &[
    Part { name: "origin", prepare: |n| over(heads(n, What::Voices), |head| origin(&head)) },
    Part { name: "identify, one of 10 clients", prepare: |n| identifying(n, What::Voices) },
    Part { name: "look up, GET", prepare: |n| looking_up(n, What::Voices) },
    Part { name: "look up, TTS", prepare: |n| looking_up(n, What::Speech) },
    Part { name: "look up, any", prepare: |n| looking_up(n, What::Anything) },
    Part { name: "names, GET", prepare: |n| naming(n, What::Voices) },
    Part { name: "names, TTS", prepare: |n| naming(n, What::Speech) },
    Part { name: "names, any", prepare: |n| naming(n, What::Anything) },
    Part { name: "account, TTS", prepare: |n| accounting(n) },
    Part { name: "strip, GET", prepare: |n| stripping(n, What::Voices) },
    Part { name: "strip, TTS", prepare: |n| stripping(n, What::Speech) },
    Part { name: "estimate, TTS", prepare: |n| estimating(n) },
    Part { name: "choose, 1 key", prepare: |n| choosing(n, 1, &FillFirst, Spread::Alone) },
    Part { name: "choose, 100 keys", prepare: |n| choosing(n, 100, &FillFirst, Spread::Alone) },
    Part { name: "choose, 1000 keys", prepare: |n| choosing(n, 1_000, &FillFirst, Spread::Alone) },
    Part {
        name: "choose, 1000 keys of one workspace",
        prepare: |n| choosing(n, 1_000, &FillFirst, Spread::Together),
    },
    Part {
        name: "choose, 1000 keys, only the last can pay",
        prepare: |n| choosing(n, 1_000, &FillFirst, Spread::OnlyLast),
    },
    Part {
        name: "choose, 1000 keys, round-robin",
        prepare: |n| choosing(n, 1_000, &RoundRobin, Spread::Alone),
    },
    Part {
        name: "choose, 1000 keys, most-remaining",
        prepare: |n| choosing(n, 1_000, &MostRemaining, Spread::Alone),
    },
    Part {
        name: "choose, 1000 keys, least-busy",
        prepare: |n| choosing(n, 1_000, &LeastBusy, Spread::Alone),
    },
    Part {
        name: "choose, 1000 keys, soonest-reset",
        prepare: |n| choosing(n, 1_000, &SoonestReset, Spread::Alone),
    },
    Part { name: "classify, served", prepare: |n| over(answers(n), |head| classify_served(&head)) },
    Part {
        name: "classify, refused",
        prepare: |n| over((0..n).map(|_| ()).collect(), |()| classify_refused()),
    },
    Part { name: "strip answer", prepare: |n| stripping_answers(n) },
    Part { name: "tee up, 16 KiB", prepare: |n| teeing_up(n) },
    Part { name: "tee down, 16 KiB of sound", prepare: |n| teeing_down(n, false) },
    Part { name: "tee down, 16 KiB of text", prepare: |n| teeing_down(n, true) },
    Part { name: "way, GET", prepare: |n| going(n, What::Voices) },
    Part { name: "way, TTS", prepare: |n| going(n, What::Speech) },
];

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// The list of voices.
    Voices,
    /// A sentence of speech.
    Speech,
    /// Something that is not in the provider's documents, escaped.
    Anything,
}

/// How keys and credits are spread over workspaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spread {
    Alone,
    Together,
    OnlyLast,
}

const TEXT: &[u8] = br#"{"text":"The first move is what sets everything in motion, and what follows is the rest of a sentence that is long enough to be one.","model_id":"eleven_multilingual_v2"}"#;
const REFUSAL: &[u8] = br#"{"detail":{"status":"quota_exceeded","message":"This request exceeds your quota of 10000. You have 12 credits remaining, while 134 credits are required for this request."}}"#;
const PIECE: usize = 16 * 1024;

/// A thing done to each of `items`.
fn over<T: 'static>(items: Vec<T>, each: impl Fn(T) + 'static) -> Box<dyn FnOnce()> {
    Box::new(move || items.into_iter().for_each(each))
}

/// The head that the provider's Python SDK sends.
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

fn clients() -> Clients {
    let client = |number: usize| {
        let name = ClientName::new(&format!("client-{number}"));
        let token = Fingerprint::of(&format!("keychoir-token-number-{number}"));
        (Client { name, rules: Rules::default() }, token)
    };
    Clients::new((0..10).map(client).collect(), Strangers::Refused)
}

fn origin(head: &Parts) {
    let doors = Doors::default();
    black_box(without_base(&head.uri, ""));
    black_box(admit(&doors, false, &head.method, &head.headers)).unwrap();
}

fn identifying(count: usize, what: What) -> Box<dyn FnOnce()> {
    let clients = clients();
    over(heads(count, what), move |head| {
        black_box(identify(&clients, &head.headers, head.uri.query())).unwrap();
        std::mem::forget(head);
    })
}

fn looking_up(count: usize, what: What) -> Box<dyn FnOnce()> {
    over(heads(count, what), |mut head| {
        black_box(look_up(&mut head, true)).unwrap();
        std::mem::forget(head);
    })
}

fn naming(count: usize, what: What) -> Box<dyn FnOnce()> {
    let routes: Vec<(Parts, Route)> = heads(count, what)
        .into_iter()
        .map(|head| {
            let route = lookup(&head.method, head.uri.path()).route;
            (head, route)
        })
        .collect();
    over(routes, |(head, route)| {
        black_box(name(&head, &route));
        std::mem::forget(head);
    })
}

/// What binds a request to an account, as far as its head says.
fn name(head: &Parts, route: &Route) -> Names {
    black_box(affinity::gives(&head.method, route));
    black_box(affinity::is_speech(route));
    Names::of(head.uri.path(), head.uri.query())
}

/// A request and its credits, in the periods of its client.
fn accounting(count: usize) -> Box<dyn FnOnce()> {
    Box::new(move || {
        let (mut tallies, now) = ([Tally::default(); 6], clock::now());
        for _ in 0..count {
            for (tally, period) in tallies.iter_mut().zip(Period::ALL.into_iter().cycle()) {
                *tally = black_box(*tally).plus(1, period, now);
                black_box(tally.used(period, now));
            }
        }
    })
}

fn stripping(count: usize, what: What) -> Box<dyn FnOnce()> {
    over(heads(count, what), |head| {
        std::mem::forget(black_box(strip(head, None)).unwrap());
    })
}

fn estimating(count: usize) -> Box<dyn FnOnce()> {
    let models = Models::default();
    Box::new(move || {
        for _ in 0..count {
            let asked = Asked::of(black_box(TEXT), true);
            black_box(estimate(black_box(Work::Speech), &asked, Some(TEXT.len() as u64), &models));
        }
    })
}

fn classify_served(headers: &HeaderMap) {
    black_box(classify(black_box(StatusCode::OK), None, None));
    black_box(cost::told(headers));
    black_box(cost::concurrency_max(headers));
}

fn classify_refused() {
    let body = ErrorBody::read(black_box(REFUSAL));
    let verdict = classify(black_box(StatusCode::UNAUTHORIZED), Some(&body), None);
    assert!(matches!(verdict, Verdict::WorkspaceQuota(_)));
}

fn redactor() -> Arc<Redactor> {
    let keys: Vec<ApiKey> = (0..10).map(key).collect();
    Arc::new(Redactor::new(keys.iter()))
}

fn stripping_answers(count: usize) -> Box<dyn FnOnce()> {
    let redactor = redactor();
    over(answers(count), move |mut headers| {
        strip_answer(&mut headers);
        redact_headers(&mut headers, &redactor);
        black_box(is_plain_text(&headers));
        std::mem::forget(headers);
    })
}

fn room() -> Room {
    Room::new(&Bounds {
        memory_bytes_max: 1 << 20,
        memory_total_bytes_max: 1 << 40,
        disk_bytes_max: 0,
        disk_total_bytes_max: 0,
        disk_free_percent_min: 10,
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

fn teeing_up(count: usize) -> Box<dyn FnOnce()> {
    let (room, piece) = (room(), piece(false));
    Box::new(move || {
        for _ in 0..count {
            let replay = Replay::hold(Full::new(piece.clone()), &room);
            let mut attempt = replay.attempt();
            assert_eq!(frame(&mut attempt).len(), PIECE);
            attempt.upload().release();
        }
    })
}

struct Nobody;

impl Listen for Nobody {
    fn heard(self, _: &[u8]) {}
}

/// A body that goes on and on.
struct Endless(Bytes);

impl Body for Endless {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Bytes>, Infallible>>> {
        Poll::Ready(Some(Ok(http_body::Frame::data(self.0.clone()))))
    }
}

fn teeing_down(count: usize, is_text: bool) -> Box<dyn FnOnce()> {
    let heard: Tap<Endless, Nobody> = Tap::new(Endless(piece(is_text)), None, 0);
    let mut relayed = Redacted::new(heard, is_text.then(redactor));
    Box::new(move || {
        for _ in 0..count {
            // A few bytes wait for what may follow them.
            assert!(black_box(frame(&mut relayed)).len() > PIECE / 2);
        }
    })
}

fn key(number: usize) -> ApiKey {
    ApiKey::new(&format!("sk_bench_key_number_{number:06}_of_the_pool_of_keys")).unwrap()
}

/// A pool with credits, and what a speech needs of it.
pub struct Keys {
    pub pool: Arc<Pool>,
    pub ask: Ask,
}

impl Keys {
    pub fn new(count: usize, strategy: &'static dyn Strategy, spread: Spread) -> Self {
        const HOUR: Duration = Duration::from_secs(3_600);
        let entries = (0..count).map(|number| KeyEntry {
            workspace: (spread == Spread::Together).then(|| "studio".to_owned()),
            ..KeyEntry::from(key(number))
        });
        let settings = Settings {
            strategy,
            // Nobody waits: a full pool refuses at once.
            wait_max: Duration::ZERO,
            waiting_max: 0,
            near_limit_ratio: 0.8,
            rate_limited_cooldown: HOUR,
            concurrency_cooldown: HOUR,
            exhausted_cooldown: HOUR,
            billing_cooldown: HOUR,
            invalid_confirm: HOUR,
            invalid_cooldown: HOUR,
            permission_cooldown: HOUR,
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
            pool.observe(&roster, key, Observation::Quota { quota, tier: None, is_paid: true }, clock::now());
        }
        let ask = Ask::new(
            ClientName::new("app"),
            Some(200),
            Some(Lane::SPEECH),
            Permission::parse("text_to_speech"),
        );
        Self { pool, ask }
    }

    /// One request's use of the pool, from the roster to the release.
    pub fn serve(&self) {
        let roster = self.pool.roster();
        let (mut lease, roster) = (self.reserve(&roster, &self.ask), roster);
        lease.begin();
        black_box(self.pool.judge(&roster, lease.key(), Verdict::Served, Some(&self.ask), clock::now()));
        black_box(self.pool.settle(&roster, &mut lease, 150, clock::now()));
    }

    fn reserve(&self, roster: &Arc<Roster>, ask: &Ask) -> Lease {
        let reserving = pin!(self.pool.reserve(roster, ask));
        match reserving.poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(Ok(Reserved { lease, news })) => {
                black_box(news);
                lease
            }
            other @ (Poll::Ready(Err(_)) | Poll::Pending) => panic!("no key: {other:?}"),
        }
    }
}

fn choosing(count: usize, keys: usize, strategy: &'static dyn Strategy, spread: Spread) -> Box<dyn FnOnce()> {
    let keys = Keys::new(keys, strategy, spread);
    Box::new(move || (0..count).for_each(|_| keys.serve()))
}

/// All that a request meets between the head that was read and the head that is written, and what is
/// looked at of its answer; but for its body, its record and its log line.
pub struct Way {
    what: What,
    clients: Clients,
    keys: Keys,
    models: Models,
    redactor: Arc<Redactor>,
}

impl Way {
    pub fn new(what: What) -> Self {
        let keys = Keys::new(10, &FillFirst, Spread::Alone);
        Self { what, clients: clients(), keys, models: Models::default(), redactor: redactor() }
    }

    /// What it takes in so many times.
    pub fn requests(&self, count: usize) -> Vec<(Parts, HeaderMap)> {
        heads(count, self.what).into_iter().zip(answers(count)).collect()
    }

    pub fn go(&self, (mut head, mut answer): (Parts, HeaderMap)) {
        let (pool, now) = (&self.keys.pool, clock::now());
        origin(&head);
        let caller = identify(&self.clients, &head.headers, head.uri.query()).unwrap();
        let (endpoint, names, _) = look_up(&mut head, true).unwrap();
        black_box(affinity::gives(&head.method, &endpoint.route));
        black_box(affinity::is_speech(&endpoint.route));
        let outbound = strip(head, endpoint.socket).unwrap();
        let asked = if endpoint.work.has_text() { Asked::of(TEXT, true) } else { Asked::default() };
        let credits = estimate(endpoint.work, &asked, None, &self.models);
        let lane = Lane::of_work(endpoint.work);
        let ask = Ask::new(caller.client.name.clone(), credits, lane, endpoint.permission);
        let roster = pool.roster();
        let mut lease = self.keys.reserve(&roster, &ask);
        lease.begin();
        // The answer has come.
        let verdict = classify(StatusCode::OK, None, None);
        black_box(pool.judge(&roster, lease.key(), verdict, Some(&ask), now));
        lease.learn_room(cost::concurrency_max(&answer).unwrap());
        black_box(pool.settle(&roster, &mut lease, cost::told(&answer).unwrap(), now));
        strip_answer(&mut answer);
        redact_headers(&mut answer, &self.redactor);
        black_box(is_plain_text(&answer));
        black_box((names, outbound, answer));
    }
}

fn going(count: usize, what: What) -> Box<dyn FnOnce()> {
    let way = Way::new(what);
    over(way.requests(count), move |request| way.go(request))
}

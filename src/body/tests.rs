//! Tests of the buffer budget: the behavior of each holder of a buffer when the budget is used up,
//! and the return of all memory.

use std::io::Write;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use http_body::{Body, Frame};
use http_body_util::BodyExt;

use super::Withheld;
use super::budget::{BufferBudget, BufferLimits, BufferShare};
use super::decode::Coding;
use super::inspect::{BodyInspector, Inspect};
use super::peek::Peeked;
use super::redacted::Redacted;
use super::replay::Replay;
use crate::policy::replay::Replayable as Holding;
use crate::secret::{ApiKey, Redactor};

const MEBI: usize = 1024 * 1024;
const LONG: Duration = Duration::from_secs(60);
const KEY: &str = "sk_6c036526aaaabbbbccccddddeeeeffff0000111122223333d452b";

fn budget(memory: usize, disk: usize) -> BufferBudget {
    BufferBudget::new(&BufferLimits {
        memory_bytes_max: u64::MAX,
        memory_total_bytes_max: memory as u64,
        disk_bytes_max: disk as u64,
        disk_total_bytes_max: disk as u64,
        disk_free_percent_min: 0,
        directory: std::env::temp_dir(),
    })
}

/// A body of pieces of 8 KiB, the size of a read.
struct Pieces {
    rest: Bytes,
}

impl Pieces {
    fn of(text: impl Into<Bytes>) -> Self {
        Self { rest: text.into() }
    }
}

impl Body for Pieces {
    type Data = Bytes;
    type Error = Withheld;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Withheld>>> {
        let length = self.rest.len().min(8 * 1024);
        let piece = self.rest.split_to(length);
        Poll::Ready((!piece.is_empty()).then(|| Ok(Frame::data(piece))))
    }
}

/// Counts calls of the inspector.
#[derive(Clone, Default)]
struct CountingInspector(Arc<AtomicUsize>);

impl BodyInspector for CountingInspector {
    fn inspect(self, _: &[u8]) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

fn redactor() -> Option<Arc<Redactor>> {
    Some(Arc::new(Redactor::new([ApiKey::new(KEY).unwrap()].iter())))
}

/// Text that hardly compresses.
fn noise(bytes: usize) -> Vec<u8> {
    let mut state = 1_u64;
    let next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    std::iter::repeat_with(next).take(bytes).collect()
}

fn gzip(text: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(text).unwrap();
    encoder.finish().unwrap()
}

async fn upload(budget: &BufferBudget) -> (Holding, u64) {
    let replay = Replay::hold(Pieces::of(noise(MEBI)), budget);
    for _ in 0..2 {
        assert_eq!(replay.attempt().collect().await.unwrap().to_bytes(), noise(MEBI));
    }
    (replay.holding(), budget.disk_bytes())
}

async fn read_ahead(budget: &BufferBudget) -> (usize, bool) {
    let replay = Replay::hold(Pieces::of(noise(MEBI)), budget);
    let (start, is_whole) = replay.peek_body(MEBI, LONG).await;
    assert_eq!(replay.attempt().collect().await.unwrap().to_bytes(), noise(MEBI));
    (start.len(), is_whole)
}

async fn inspected(budget: &BufferBudget) -> usize {
    let inspector = CountingInspector::default();
    let inspect =
        Inspect::new(Pieces::of(noise(MEBI)), Some(inspector.clone()), MEBI, budget.share(BufferShare::FREE));
    assert_eq!(inspect.collect().await.unwrap().to_bytes(), noise(MEBI), "the body is relayed in any case");
    inspector.0.load(Ordering::Relaxed)
}

async fn peeked(budget: &BufferBudget) -> (bool, bool) {
    let (peeked, whole) = Peeked::read(Pieces::of(noise(MEBI)), MEBI, LONG, Some(budget)).await;
    let is_over_budget = peeked.is_over_budget();
    assert_eq!(peeked.collect().await.unwrap().to_bytes(), noise(MEBI), "the body is relayed in any case");
    (whole.is_some(), is_over_budget)
}

/// A possible start of a key, followed by many bytes that decode to nothing: they are held in memory.
async fn searched(budget: &BufferBudget) -> Result<bool, Withheld> {
    let body = [gzip(&KEY.as_bytes()[..20]), gzip(b"").repeat(7_000)].concat();
    let codings = Some(vec![Coding::Gzip]);
    let searched = Redacted::coded(Pieces::of(body.clone()), redactor(), codings, budget);
    Ok(searched.collect().await?.to_bytes() == body)
}

#[tokio::test]
async fn every_holder_buffers_within_the_budget() {
    let budget = budget(16 * MEBI, 0);
    assert_eq!(upload(&budget).await, (Holding::Whole, 0));
    assert_eq!(read_ahead(&budget).await, (MEBI, true));
    assert_eq!(inspected(&budget).await, 1);
    assert_eq!(peeked(&budget).await, (true, false));
    assert_eq!(searched(&budget).await, Ok(true));
    assert_eq!(budget.memory_bytes(), 0);
}

#[tokio::test]
async fn no_holder_buffers_without_memory() {
    let budget = budget(0, 16 * MEBI);
    let (holding, on_disk) = upload(&budget).await;
    assert_eq!((holding, on_disk), (Holding::Whole, (MEBI - 16 * 1024) as u64), "the rest is on disk");
    let (start, is_whole) = read_ahead(&budget).await;
    assert!(!is_whole && start <= 3 * BufferShare::FREE, "{start}");
    assert_eq!(inspected(&budget).await, 0);
    assert_eq!(peeked(&budget).await, (false, true));
    // The body cannot be searched for a key, so it is not forwarded.
    assert_eq!(searched(&budget).await, Err(Withheld::NoMemory));
    assert_eq!((budget.memory_bytes(), budget.disk_bytes()), (0, 0));
}

#[tokio::test]
async fn an_upload_without_memory_and_disk_loses_only_its_replay() {
    let budget = budget(0, 0);
    let replay = Replay::hold(Pieces::of(noise(MEBI)), &budget);
    assert_eq!(replay.attempt().collect().await.unwrap().to_bytes(), noise(MEBI));
    assert_eq!(replay.holding(), Holding::Lost);
}

#[tokio::test]
async fn a_small_body_needs_no_budget() {
    let budget = budget(0, 0);
    let text = noise(BufferShare::FREE / 4);
    let (_, whole) = Peeked::read(Pieces::of(text.clone()), MEBI, LONG, Some(&budget)).await;
    assert_eq!(whole, Some(text.clone()));
    let inspector = CountingInspector::default();
    let inspect = Inspect::new(
        Pieces::of(text.clone()),
        Some(inspector.clone()),
        MEBI,
        budget.share(BufferShare::FREE),
    );
    inspect.collect().await.unwrap();
    assert_eq!(inspector.0.load(Ordering::Relaxed), 1);
    let replay = Replay::hold(Pieces::of(text.clone()), &budget);
    replay.attempt().collect().await.unwrap();
    assert_eq!(replay.holding(), Holding::Whole);
    let codings = Some(vec![Coding::Gzip]);
    let body = gzip(&noise(16 * 1024));
    let searched = Redacted::coded(Pieces::of(body.clone()), redactor(), codings, &budget);
    assert_eq!(searched.collect().await.unwrap().to_bytes(), body);
}

#[tokio::test]
async fn a_cancelled_body_returns_all_its_memory() {
    let budget = budget(64 * MEBI, 0);
    for pieces in [1, 3, 50, 127] {
        let replay = Replay::hold(Pieces::of(noise(MEBI)), &budget);
        let mut attempt = replay.attempt();
        let share = || budget.share(BufferShare::FREE);
        let mut inspect =
            Inspect::new(Pieces::of(noise(MEBI)), Some(CountingInspector::default()), MEBI, share());
        for _ in 0..pieces {
            attempt.frame().await.unwrap().unwrap();
            inspect.frame().await.unwrap().unwrap();
        }
        let (peeked, _) = Peeked::read(Pieces::of(noise(MEBI)), pieces * 8 * 1024, LONG, Some(&budget)).await;
        assert!(pieces == 1 || budget.memory_bytes() > 0);
        drop((replay, attempt, inspect, peeked));
        assert_eq!(budget.memory_bytes(), 0, "{pieces}");
    }
}

#[test]
fn thousands_of_responses_never_exceed_the_budget() {
    const RESPONSES: usize = 3_000;
    let budget = budget(4 * MEBI, 0);
    let inspector = CountingInspector::default();
    let text = Bytes::from(noise(MEBI / 4));
    let inspect = |text: &Bytes| {
        Inspect::new(Pieces::of(text.clone()), Some(inspector.clone()), MEBI, budget.share(BufferShare::FREE))
    };
    let mut inspects: Vec<_> = (0..RESPONSES).map(|_| inspect(&text)).collect();
    let mut cx = Context::from_waker(Waker::noop());
    for _ in 0..20 {
        for inspect in &mut inspects {
            assert!(matches!(Pin::new(inspect).poll_frame(&mut cx), Poll::Ready(Some(Ok(_)))));
        }
        assert!(budget.memory_bytes() <= budget.memory_max());
        let copied: usize = inspects.iter().map(Inspect::copied_bytes).sum();
        assert!(copied <= 4 * MEBI + RESPONSES * BufferShare::FREE, "{copied}");
    }
    // The first few bodies are copied completely.
    for inspect in &mut inspects {
        while let Poll::Ready(Some(_)) = Pin::new(&mut *inspect).poll_frame(&mut cx) {}
    }
    let inspected_bodies = inspector.0.load(Ordering::Relaxed);
    assert!((8..=64).contains(&inspected_bodies), "{inspected_bodies}");
    drop(inspects);
    assert_eq!(budget.memory_bytes(), 0);
}

#[tokio::test]
async fn padding_for_many_keys_is_sent_in_pieces() {
    let text = Bytes::from(KEY.repeat(5_000));
    let full = http_body_util::Full::new(text.clone()).map_err(|never| -> Withheld { match never {} });
    let mut body = Redacted::new(full, redactor());
    let (mut bytes, mut largest) = (0, 0);
    body.frame().await.unwrap().unwrap();
    bytes += 5_000 * "sk_6c036526...d452b".len();
    while let Some(frame) = body.frame().await {
        let padding = frame.unwrap().into_data().unwrap();
        largest = largest.max(padding.len());
        bytes += padding.len();
    }
    assert!(largest <= 16 * 1024, "{largest}");
    assert!(body.is_end_stream() && bytes <= text.len());
}

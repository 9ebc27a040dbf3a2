//! Tests the buffer budget with the body adapters that buffer: their behavior with enough memory and when the budget is
//! exhausted, and that they return all memory. Also tests that the padding of a redacted body is sent in frames of
//! bounded size.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame};
use http_body_util::BodyExt;

use super::WithholdReason;
use super::budget::{BufferBudget, BufferLimits, BufferReservation};
use super::decode::Coding;
use super::decode::tests::gzip;
use super::inspect::{BodyInspector, InspectedBody};
use super::peek::PeekedBody;
use super::redacted_body::RedactedBody;
use super::replay::{BodyStart, Replay};
use crate::policy::replay::ReplayableBody;
use crate::secret::{ApiKey, Redactor};

const MIB: usize = 1024 * 1024;
const READ_TIMEOUT: Duration = Duration::from_secs(60);
const KEY: &str = "sk_6c036526aaaabbbbccccddddeeeeffff0000111122223333d452b";

/// Returns a budget of `memory_bytes` in memory and `disk_bytes` on disk.
fn budget(memory_bytes: usize, disk_bytes: usize) -> BufferBudget {
    BufferBudget::new(&BufferLimits {
        max_body_memory: u64::MAX,
        max_total_memory: memory_bytes as u64,
        max_body_disk: disk_bytes as u64,
        max_total_disk: disk_bytes as u64,
        min_disk_free_percent: 0,
        directory: std::env::temp_dir(),
    })
}

/// The size of the chunks of a [`ChunkedBody`], which is the size of a read.
const CHUNK_SIZE: usize = 8 * 1024;

/// A body in chunks of [`CHUNK_SIZE`].
struct ChunkedBody {
    remaining: Bytes,
}

impl ChunkedBody {
    fn new(data: impl Into<Bytes>) -> Self {
        Self { remaining: data.into() }
    }
}

impl Body for ChunkedBody {
    type Data = Bytes;
    type Error = WithholdReason;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, WithholdReason>>> {
        let length = self.remaining.len().min(CHUNK_SIZE);
        let chunk = self.remaining.split_to(length);
        Poll::Ready((!chunk.is_empty()).then(|| Ok(Frame::data(chunk))))
    }
}

/// Counts the inspected bodies.
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

/// Returns pseudorandom bytes, which hardly compress. The constants are from the PCG generator.
fn random_bytes(count: usize) -> Vec<u8> {
    let mut generator_state = 1_u64;
    let next_byte = || {
        generator_state =
            generator_state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (generator_state >> 56) as u8
    };
    std::iter::repeat_with(next_byte).take(count).collect()
}

/// Sends a body twice. Returns whether it could be sent again, and the number of its bytes on disk.
async fn upload_twice(budget: &BufferBudget) -> (ReplayableBody, u64) {
    let replay = Replay::new(ChunkedBody::new(random_bytes(MIB)), budget);
    for _ in 0..2 {
        assert_eq!(replay.start_attempt().collect().await.unwrap().to_bytes(), random_bytes(MIB));
    }
    (replay.replayable_body(), budget.disk_bytes())
}

/// Reads a body ahead, and checks that it is sent completely. Returns the start that was read ahead.
async fn read_ahead(budget: &BufferBudget) -> BodyStart {
    let replay = Replay::new(ChunkedBody::new(random_bytes(MIB)), budget);
    let body_start = replay.peek_body(MIB, READ_TIMEOUT).await;
    assert_eq!(replay.start_attempt().collect().await.unwrap().to_bytes(), random_bytes(MIB));
    body_start
}

/// Relays a body with an inspector. Returns the number of inspected bodies.
async fn inspect(budget: &BufferBudget) -> usize {
    let inspector = CountingInspector::default();
    let inspected = InspectedBody::new(
        ChunkedBody::new(random_bytes(MIB)),
        Some(inspector.clone()),
        MIB,
        budget.reservation(BufferReservation::UNBUDGETED_BYTES),
    );
    assert_eq!(
        inspected.collect().await.unwrap().to_bytes(),
        random_bytes(MIB),
        "the body must be relayed unchanged"
    );
    inspector.0.load(Ordering::Relaxed)
}

/// Reads a body completely if the budget has the memory, and relays it.
async fn peek(budget: &BufferBudget) -> PeekOutcome {
    let (peeked, whole_body) =
        PeekedBody::read(ChunkedBody::new(random_bytes(MIB)), MIB, READ_TIMEOUT, Some(budget)).await;
    let is_over_budget = peeked.is_over_budget();
    assert_eq!(
        peeked.collect().await.unwrap().to_bytes(),
        random_bytes(MIB),
        "the body must be relayed unchanged"
    );
    PeekOutcome { is_complete: whole_body.is_some(), is_over_budget }
}

#[derive(Debug, PartialEq, Eq)]
struct PeekOutcome {
    is_complete: bool,
    is_over_budget: bool,
}

/// Relays a compressed body that starts with the beginning of a key, followed by many bytes that decode to an empty
/// text and are held in memory. Returns whether the body was relayed unchanged.
async fn search_compressed(budget: &BufferBudget) -> Result<bool, WithholdReason> {
    let body = [gzip(&KEY.as_bytes()[..20]), gzip(b"").repeat(7_000)].concat();
    let codings = Some(vec![Coding::Gzip]);
    let redacted_body =
        RedactedBody::with_codings(ChunkedBody::new(body.clone()), redactor(), codings, budget);
    Ok(redacted_body.collect().await?.to_bytes() == body)
}

#[tokio::test]
async fn every_adapter_buffers_within_the_budget() {
    let budget = budget(16 * MIB, 0);
    assert_eq!(upload_twice(&budget).await, (ReplayableBody::Buffered, 0));
    let body_start = read_ahead(&budget).await;
    assert!(body_start.is_complete && body_start.bytes.len() == MIB, "the whole body must be read ahead");
    assert_eq!(inspect(&budget).await, 1);
    assert_eq!(peek(&budget).await, PeekOutcome { is_complete: true, is_over_budget: false });
    assert_eq!(search_compressed(&budget).await, Ok(true));
    assert_eq!(budget.memory_bytes(), 0);
}

#[tokio::test]
async fn no_adapter_buffers_without_memory() {
    let budget = budget(0, 16 * MIB);
    let (replayable_body, disk_bytes) = upload_twice(&budget).await;
    assert_eq!(
        (replayable_body, disk_bytes),
        (ReplayableBody::Buffered, (MIB - 16 * 1024) as u64),
        "all bytes except the first 16 KiB must be on disk"
    );
    let BodyStart { bytes, is_complete } = read_ahead(&budget).await;
    assert!(
        !is_complete && bytes.len() <= 3 * BufferReservation::UNBUDGETED_BYTES,
        "few bytes must be read ahead, but there are {}",
        bytes.len()
    );
    assert_eq!(inspect(&budget).await, 0);
    assert_eq!(peek(&budget).await, PeekOutcome { is_complete: false, is_over_budget: true });
    // The body cannot be searched for a key, so it is not forwarded.
    assert_eq!(search_compressed(&budget).await, Err(WithholdReason::NoMemory));
    assert_eq!((budget.memory_bytes(), budget.disk_bytes()), (0, 0));
}

#[tokio::test]
async fn an_upload_without_memory_and_disk_is_sent_once() {
    let budget = budget(0, 0);
    let replay = Replay::new(ChunkedBody::new(random_bytes(MIB)), &budget);
    assert_eq!(replay.start_attempt().collect().await.unwrap().to_bytes(), random_bytes(MIB));
    assert_eq!(replay.replayable_body(), ReplayableBody::Unavailable);
}

#[tokio::test]
async fn a_small_body_needs_no_budget() {
    let budget = budget(0, 0);
    let data = random_bytes(BufferReservation::UNBUDGETED_BYTES / 4);
    let (_, whole_body) =
        PeekedBody::read(ChunkedBody::new(data.clone()), MIB, READ_TIMEOUT, Some(&budget)).await;
    assert_eq!(whole_body, Some(data.clone()));
    let inspector = CountingInspector::default();
    let inspected = InspectedBody::new(
        ChunkedBody::new(data.clone()),
        Some(inspector.clone()),
        MIB,
        budget.reservation(BufferReservation::UNBUDGETED_BYTES),
    );
    inspected.collect().await.unwrap();
    assert_eq!(inspector.0.load(Ordering::Relaxed), 1);
    let replay = Replay::new(ChunkedBody::new(data.clone()), &budget);
    replay.start_attempt().collect().await.unwrap();
    assert_eq!(replay.replayable_body(), ReplayableBody::Buffered);
    let codings = Some(vec![Coding::Gzip]);
    let body = gzip(&random_bytes(16 * 1024));
    let redacted_body =
        RedactedBody::with_codings(ChunkedBody::new(body.clone()), redactor(), codings, &budget);
    assert_eq!(redacted_body.collect().await.unwrap().to_bytes(), body);
}

#[tokio::test]
async fn a_cancelled_body_returns_all_its_memory() {
    let budget = budget(64 * MIB, 0);
    for chunk_count in [1, 3, 50, 127] {
        let replay = Replay::new(ChunkedBody::new(random_bytes(MIB)), &budget);
        let mut attempt = replay.start_attempt();
        let reservation = || budget.reservation(BufferReservation::UNBUDGETED_BYTES);
        let mut inspected = InspectedBody::new(
            ChunkedBody::new(random_bytes(MIB)),
            Some(CountingInspector::default()),
            MIB,
            reservation(),
        );
        for _ in 0..chunk_count {
            attempt.frame().await.unwrap().unwrap();
            inspected.frame().await.unwrap().unwrap();
        }
        let (peeked, _) = PeekedBody::read(
            ChunkedBody::new(random_bytes(MIB)),
            chunk_count * CHUNK_SIZE,
            READ_TIMEOUT,
            Some(&budget),
        )
        .await;
        assert!(
            chunk_count == 1 || budget.memory_bytes() > 0,
            "bodies of {chunk_count} chunks must use the budget"
        );
        drop((replay, attempt, inspected, peeked));
        assert_eq!(
            budget.memory_bytes(),
            0,
            "dropped bodies of {chunk_count} chunks must return their memory"
        );
    }
}

#[test]
fn thousands_of_responses_never_exceed_the_budget() {
    const RESPONSES: usize = 3_000;
    let budget = budget(4 * MIB, 0);
    let inspector = CountingInspector::default();
    let data = Bytes::from(random_bytes(MIB / 4));
    let new_body = || {
        InspectedBody::new(
            ChunkedBody::new(data.clone()),
            Some(inspector.clone()),
            MIB,
            budget.reservation(BufferReservation::UNBUDGETED_BYTES),
        )
    };
    let mut bodies: Vec<_> = (0..RESPONSES).map(|_| new_body()).collect();
    let mut cx = Context::from_waker(Waker::noop());
    for _ in 0..20 {
        for body in &mut bodies {
            assert!(matches!(Pin::new(body).poll_frame(&mut cx), Poll::Ready(Some(Ok(_)))));
        }
        assert!(budget.memory_bytes() <= budget.max_memory(), "the memory in use must not exceed the budget");
        let copied_bytes: usize = bodies.iter().map(InspectedBody::copy_capacity).sum();
        assert!(
            copied_bytes <= 4 * MIB + RESPONSES * BufferReservation::UNBUDGETED_BYTES,
            "the copies must not exceed the budget and the unbudgeted bytes, but have {copied_bytes} bytes"
        );
    }
    // The first few bodies are copied completely.
    for body in &mut bodies {
        while let Poll::Ready(Some(_)) = Pin::new(&mut *body).poll_frame(&mut cx) {}
    }
    let inspected_bodies = inspector.0.load(Ordering::Relaxed);
    assert!(
        (8..=64).contains(&inspected_bodies),
        "the bodies that fit the budget must be inspected, but {inspected_bodies} were inspected"
    );
    drop(bodies);
    assert_eq!(budget.memory_bytes(), 0);
}

#[tokio::test]
async fn padding_for_many_keys_is_sent_in_bounded_frames() {
    let text = Bytes::from(KEY.repeat(5_000));
    let source =
        http_body_util::Full::new(text.clone()).map_err(|never| -> WithholdReason { match never {} });
    let mut body = RedactedBody::new(source, redactor());
    body.frame().await.unwrap().unwrap();
    let (mut sent_bytes, mut largest_frame) = (5_000 * "sk_6c036526...d452b".len(), 0);
    while let Some(frame) = body.frame().await {
        let padding = frame.unwrap().into_data().unwrap();
        largest_frame = largest_frame.max(padding.len());
        sent_bytes += padding.len();
    }
    assert!(largest_frame <= 16 * 1024, "a frame of padding must not have {largest_frame} bytes");
    assert!(
        body.is_end_stream() && sent_bytes <= text.len(),
        "the redacted body must not be longer than the original"
    );
}

//! Tests the replay of a request body: the bytes and the declared length of each attempt, the reading ahead, and the
//! limits of the buffer in memory and on disk. Also tests bodies that fail or are released, trailers, the event for
//! which an upload waits, and the timeouts for slow clients.

use std::collections::VecDeque;
use std::task::Waker;

use http_body_util::BodyExt;
use proptest::prelude::*;

use super::super::budget::BufferLimits;
use super::*;

/// A timeout that no test with a scripted body reaches.
const READ_TIMEOUT: Duration = Duration::from_secs(60);

/// A body that returns the scripted poll results one after another.
#[derive(Debug)]
struct ScriptedBody {
    polls: VecDeque<Poll<Result<Frame<Bytes>, &'static str>>>,
    /// The declared length.
    length: Option<u64>,
}

impl Body for ScriptedBody {
    type Data = Bytes;
    type Error = &'static str;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, &'static str>>> {
        match self.polls.pop_front() {
            None => Poll::Ready(None),
            Some(Poll::Pending) => {
                cx.waker().wake_by_ref();
                Poll::Pending
            }
            Some(Poll::Ready(frame)) => Poll::Ready(Some(frame)),
        }
    }

    fn size_hint(&self) -> SizeHint {
        self.length.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

fn scripted_body(chunks: &[&str]) -> ScriptedBody {
    ScriptedBody {
        polls: chunks
            .iter()
            .map(|chunk| Poll::Ready(Ok(Frame::data(Bytes::copy_from_slice(chunk.as_bytes())))))
            .collect(),
        length: None,
    }
}

/// Returns a budget with limits for one body in memory and on disk.
fn budget(max_body_memory: u64, max_body_disk: u64) -> BufferBudget {
    BufferBudget::new(&BufferLimits {
        max_body_memory,
        max_total_memory: 1_000_000,
        max_body_disk,
        max_total_disk: 1_000_000,
        min_disk_free_percent: 0,
        directory: std::env::temp_dir(),
    })
}

/// Returns a budget without disk space.
fn memory_budget() -> BufferBudget {
    budget(1_000, 0)
}

/// Polls an attempt once.
fn poll_attempt(attempt: &mut AttemptBody<ScriptedBody>) -> Poll<Option<Result<Bytes, AttemptBodyError>>> {
    let frame = Pin::new(attempt).poll_frame(&mut Context::from_waker(Waker::noop()));
    frame.map(|frame| frame.map(|frame| frame.map(|frame| frame.into_data().unwrap())))
}

/// Returns the result of a poll that returns `text`.
fn ready_chunk(text: &'static str) -> Poll<Option<Result<Bytes, AttemptBodyError>>> {
    Poll::Ready(Some(Ok(Bytes::from_static(text.as_bytes()))))
}

fn complete_start(text: &'static str) -> BodyStart {
    BodyStart { bytes: Bytes::from_static(text.as_bytes()), is_complete: true }
}

fn partial_start(text: &'static str) -> BodyStart {
    BodyStart { bytes: Bytes::from_static(text.as_bytes()), is_complete: false }
}

async fn read_all(attempt: AttemptBody<ScriptedBody>) -> Bytes {
    attempt.collect().await.unwrap().to_bytes()
}

#[tokio::test]
async fn every_attempt_sends_the_same_bytes() {
    let replay = Replay::new(scripted_body(&["hello ", "world"]), &memory_budget());
    for _ in 0..3 {
        assert_eq!(read_all(replay.start_attempt()).await, "hello world");
        assert_eq!(replay.replayable_body(), ReplayableBody::Buffered);
    }
}

#[test]
fn a_later_attempt_continues_with_the_bytes_that_still_arrive() {
    let mut source = scripted_body(&["a", "b", "c"]);
    source.polls.insert(2, Poll::Pending);
    let replay = Replay::new(source, &memory_budget());
    let mut first_attempt = replay.start_attempt();
    assert_eq!(poll_attempt(&mut first_attempt), ready_chunk("a"));
    assert_eq!(poll_attempt(&mut first_attempt), ready_chunk("b"));
    assert_eq!(poll_attempt(&mut first_attempt), Poll::Pending);
    let mut second_attempt = replay.start_attempt();
    assert_eq!(poll_attempt(&mut first_attempt), Poll::Ready(Some(Err(AttemptBodyError::Superseded))));
    for text in ["a", "b", "c"] {
        assert_eq!(poll_attempt(&mut second_attempt), ready_chunk(text));
    }
    assert_eq!(poll_attempt(&mut second_attempt), Poll::Ready(None));
}

#[tokio::test]
async fn the_buffered_start_of_a_body_is_returned() {
    let replay = Replay::new(scripted_body(&["hello", " ", "world"]), &memory_budget());
    let mut attempt = replay.start_attempt();
    let upload = attempt.upload();
    assert_eq!(upload.buffered_start(99), partial_start(""));
    assert_eq!(poll_attempt(&mut attempt), ready_chunk("hello"));
    assert_eq!(upload.buffered_start(99), partial_start("hello"));
    assert_eq!(upload.buffered_start(4), partial_start("hell"));
    assert_eq!(read_all(attempt).await, " world");
    assert_eq!(upload.buffered_start(99), complete_start("hello world"));
    assert_eq!(upload.buffered_start(11), complete_start("hello world"));
    assert_eq!(upload.buffered_start(10), partial_start("hello worl"));
    upload.release();
    assert_eq!(upload.buffered_start(99), partial_start(""));
}

#[tokio::test]
async fn a_body_that_was_read_ahead_is_sent_completely() {
    for limit in [100, 7, 5, 0] {
        let budget = budget(limit, 0);
        let replay = Replay::new(scripted_body(&["hello", " ", "world"]), &budget);
        let body_start = replay.peek_body(99, READ_TIMEOUT).await;
        let is_kept = limit == 100;
        assert_eq!(
            body_start.is_complete, is_kept,
            "a start must be complete only if the memory of {limit} bytes holds the body"
        );
        assert!(
            b"hello world".starts_with(&body_start.bytes),
            "a start must begin with the first byte with a memory of {limit} bytes"
        );
        let attempt = replay.start_attempt();
        assert!(!attempt.is_end_stream());
        assert_eq!(
            read_all(attempt).await,
            "hello world",
            "the attempt must send the whole body with a memory of {limit} bytes"
        );
        assert_eq!(
            replay.replayable_body(),
            if is_kept { ReplayableBody::Buffered } else { ReplayableBody::Unavailable }
        );
    }
    // Reading stops with the chunk that exceeds the requested bytes.
    let replay = Replay::new(scripted_body(&["hello", " ", "world"]), &memory_budget());
    assert_eq!(replay.peek_body(4, READ_TIMEOUT).await, partial_start("hell"));
    assert_eq!(read_all(replay.start_attempt()).await, "hello world");
    assert_eq!(read_all(replay.start_attempt()).await, "hello world");
}

#[tokio::test]
async fn a_body_beyond_its_limit_is_sent_once() {
    for (limit, expected) in [(10, ReplayableBody::Buffered), (9, ReplayableBody::Unavailable)] {
        let budget = budget(limit, 0);
        let replay = Replay::new(scripted_body(&["hello", "world"]), &budget);
        assert_eq!(read_all(replay.start_attempt()).await, "helloworld");
        assert_eq!(replay.replayable_body(), expected);
    }
}

#[tokio::test]
async fn all_bodies_share_the_total_limit() {
    let budget = BufferBudget::new(&BufferLimits {
        max_body_memory: 1_000_000,
        max_total_memory: 64 * 1024,
        max_body_disk: 0,
        max_total_disk: 0,
        min_disk_free_percent: 0,
        directory: std::env::temp_dir(),
    });
    let text = "x".repeat(BufferReservation::UNBUDGETED_BYTES);
    let [first, second, third, small] =
        [&text, &text, &text, ""].map(|text| Replay::new(scripted_body(&[text, "12345"]), &budget));
    for replay in [&first, &second, &small] {
        assert!(read_all(replay.start_attempt()).await.ends_with(b"12345"));
    }
    let replayable = [first.replayable_body(), second.replayable_body(), small.replayable_body()];
    assert_eq!(replayable, [ReplayableBody::Buffered, ReplayableBody::Unavailable, ReplayableBody::Buffered]);
    drop(first);
    assert_eq!(budget.memory_bytes(), 0);
    assert!(read_all(third.start_attempt()).await.ends_with(b"12345"));
    assert_eq!(third.replayable_body(), ReplayableBody::Buffered);
}

#[test]
fn a_body_that_fails_is_not_replayable() {
    let mut source = scripted_body(&["a"]);
    source.polls.push_back(Poll::Ready(Err("reset")));
    let replay = Replay::new(source, &memory_budget());
    let mut first_attempt = replay.start_attempt();
    assert_eq!(poll_attempt(&mut first_attempt), ready_chunk("a"));
    assert_eq!(poll_attempt(&mut first_attempt), Poll::Ready(Some(Err(AttemptBodyError::ClientBodyFailed))));
    assert_eq!(
        (replay.replayable_body(), first_attempt.upload().waits_for()),
        (ReplayableBody::Unavailable, UploadWait::Failed)
    );
}

#[tokio::test]
async fn trailers_are_dropped() {
    let mut source = scripted_body(&["a"]);
    let trailers = http::HeaderMap::from_iter([("xi-api-key".parse().unwrap(), "k".parse().unwrap())]);
    source.polls.push_back(Poll::Ready(Ok(Frame::trailers(trailers))));
    let collected_body = Replay::new(source, &memory_budget()).start_attempt().collect().await.unwrap();
    assert_eq!(collected_body.trailers(), None);
    assert_eq!(collected_body.to_bytes(), "a");
}

#[test]
fn every_attempt_declares_the_remaining_length() {
    let replay =
        Replay::new(ScriptedBody { length: Some(3), ..scripted_body(&["a", "bc"]) }, &memory_budget());
    let mut first_attempt = replay.start_attempt();
    assert_eq!(first_attempt.size_hint().exact(), Some(3));
    assert_eq!(poll_attempt(&mut first_attempt), ready_chunk("a"));
    assert_eq!(first_attempt.size_hint().exact(), Some(2));
    assert_eq!(replay.start_attempt().size_hint().exact(), Some(3));
}

#[test]
fn an_empty_body_is_complete_before_it_is_read() {
    let replay = Replay::new(http_body_util::Empty::<Bytes>::new(), &memory_budget());
    assert!(replay.start_attempt().is_end_stream());
    assert_eq!(replay.start_attempt().upload().waits_for(), UploadWait::ForResponse);
}

#[test]
fn an_upload_reports_the_event_that_it_waits_for() {
    let mut source = scripted_body(&["a"]);
    source.polls.push_front(Poll::Pending);
    let replay = Replay::new(source, &memory_budget());
    let mut attempt = replay.start_attempt();
    let upload = attempt.upload();
    assert_eq!(upload.waits_for(), UploadWait::ForUpstream);
    assert_eq!(poll_attempt(&mut attempt), Poll::Pending);
    assert_eq!(upload.waits_for(), UploadWait::ForClient);
    assert_eq!(poll_attempt(&mut attempt), ready_chunk("a"));
    assert_eq!(poll_attempt(&mut attempt), Poll::Ready(None));
    assert_eq!(upload.waits_for(), UploadWait::ForResponse);
}

#[test]
fn a_released_body_is_discarded_once_it_is_sent() {
    let budget = memory_budget();
    let replay = Replay::new(scripted_body(&["ab", "c", "d"]), &budget);
    let mut first_attempt = replay.start_attempt();
    for text in ["ab", "c"] {
        assert_eq!(poll_attempt(&mut first_attempt), ready_chunk(text));
    }
    let mut second_attempt = replay.start_attempt();
    let upload = second_attempt.upload();
    assert_eq!(poll_attempt(&mut second_attempt), ready_chunk("ab"));
    upload.release();
    assert_eq!((upload.buffered_start(9).bytes, upload.polled_bytes()), ("abc".into(), 2));
    assert_eq!(poll_attempt(&mut second_attempt), ready_chunk("c"));
    assert_eq!(upload.buffered_start(9).bytes, "");
    assert_eq!(poll_attempt(&mut second_attempt), ready_chunk("d"));
    assert_eq!((upload.polled_bytes(), replay.replayable_body()), (4, ReplayableBody::Unavailable));
}

/// Returns a body of `chunks`. `None` makes the body pending once.
fn scripted_body_with_pauses(chunks: &[Option<Vec<u8>>]) -> ScriptedBody {
    let polls = chunks.iter().cloned().map(|chunk| match chunk {
        Some(data) => Poll::Ready(Ok(Frame::data(Bytes::from(data)))),
        None => Poll::Pending,
    });
    ScriptedBody { polls: polls.collect(), length: None }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().build().unwrap()
}

proptest! {
    #[test]
    fn every_attempt_of_any_chunking_sends_the_same_bytes(
        chunks in prop::collection::vec(prop::option::of(prop::collection::vec(any::<u8>(), 0..20)), 0..30),
        reads_per_attempt in prop::collection::vec(0_usize..20, 0..6),
        memory_bytes in 0_u64..400,
    ) {
        let body_bytes: Vec<u8> = chunks.iter().flatten().flatten().copied().collect();
        let budget = budget(memory_bytes, 1_000);
        let replay = Replay::new(scripted_body_with_pauses(&chunks), &budget);
        let received_body = runtime().block_on(async {
            for reads in reads_per_attempt {
                let mut attempt = replay.start_attempt();
                for _ in 0..reads {
                    let _ = attempt.frame().await;
                }
            }
            read_all(replay.start_attempt()).await
        });
        prop_assert_eq!(received_body, body_bytes);
        prop_assert_eq!(replay.replayable_body(), ReplayableBody::Buffered);
        drop(replay);
        prop_assert_eq!((budget.memory_bytes(), budget.disk_bytes()), (0, 0));
    }

    #[test]
    fn every_body_is_sent_completely_with_any_buffer_limits(
        chunks in prop::collection::vec(prop::option::of(prop::collection::vec(any::<u8>(), 0..20)), 0..30),
        memory_bytes in 0_u64..100,
        disk_bytes in 0_u64..100,
    ) {
        let body_bytes: Vec<u8> = chunks.iter().flatten().flatten().copied().collect();
        let budget = budget(memory_bytes, disk_bytes);
        let replay = Replay::new(scripted_body_with_pauses(&chunks), &budget);
        prop_assert_eq!(runtime().block_on(read_all(replay.start_attempt())), body_bytes);
        prop_assert!(budget.disk_bytes() <= disk_bytes);
    }
}

#[tokio::test]
async fn a_body_that_exceeds_the_memory_is_sent_again_from_the_disk() {
    let budget = budget(2, 1_000_000);
    let chunk = "x".repeat(100_000);
    let replay = Replay::new(scripted_body(&["ab", &chunk, "y", &chunk]), &budget);
    for _ in 0..3 {
        assert_eq!(read_all(replay.start_attempt()).await, format!("ab{chunk}y{chunk}"));
    }
    assert_eq!(budget.disk_bytes(), 200_001);
    drop(replay);
    assert_eq!((budget.memory_bytes(), budget.disk_bytes()), (0, 0));
}

/// Checks that a body is sent once, although its buffer is lost with the limits that `change_limits` sets.
async fn check_loss(change_limits: impl Fn(&mut BufferLimits), expected: ReplayLoss) {
    let mut limits = BufferLimits {
        max_body_memory: 2,
        max_total_memory: 1_000,
        max_body_disk: 1_000_000,
        max_total_disk: 1_000_000,
        min_disk_free_percent: 0,
        directory: std::env::temp_dir(),
    };
    change_limits(&mut limits);
    let budget = BufferBudget::new(&limits);
    // The chunks are larger than the write queue, so that each write is polled before the next chunk.
    let large_chunk = "x".repeat(300_000);
    let replay = Replay::new(scripted_body(&["ab", &large_chunk, &large_chunk, "ef"]), &budget);
    assert_eq!(
        read_all(replay.start_attempt()).await,
        format!("ab{large_chunk}{large_chunk}ef"),
        "the body must be sent completely"
    );
    assert_eq!((replay.replayable_body(), replay.loss()), (ReplayableBody::Unavailable, Some(expected)));
    assert_eq!((budget.memory_bytes(), budget.disk_bytes()), (0, 0));
}

#[tokio::test]
async fn a_full_or_failing_disk_loses_only_the_replay_buffer() {
    check_loss(|limits| limits.max_body_disk = 3, ReplayLoss::TooLarge).await;
    check_loss(|limits| limits.max_total_disk = 3, ReplayLoss::TooLarge).await;
    check_loss(|limits| limits.min_disk_free_percent = 100, ReplayLoss::DiskFull).await;
    check_loss(|limits| limits.directory = "/nonexistent".into(), ReplayLoss::DiskFailed).await;
}

#[tokio::test]
async fn every_attempt_starts_with_the_bytes_read_ahead() {
    let mut source = scripted_body(&["hello", " ", "world"]);
    source.polls.insert(1, Poll::Pending);
    let budget = memory_budget();
    let replay = Replay::new(source, &budget);
    assert_eq!(replay.peek_body(99, READ_TIMEOUT).await, complete_start("hello world"));
    let mut attempt = replay.start_attempt();
    assert!(!attempt.is_end_stream());
    assert_eq!(poll_attempt(&mut attempt), ready_chunk("hello"));
    assert_eq!(read_all(attempt).await, " world");
    assert_eq!(read_all(replay.start_attempt()).await, "hello world");
    assert_eq!(replay.replayable_body(), ReplayableBody::Buffered);
}

#[tokio::test]
async fn bytes_read_ahead_may_exceed_the_memory() {
    for (max_bytes, memory, expected) in [
        (6, 1_000, partial_start("hello ")),
        (99, 6, complete_start("hello world!")),
        (1, 1_000, partial_start("h")),
    ] {
        let budget = budget(memory, 1_000);
        let replay = Replay::new(scripted_body(&["hello", " ", "world", "!"]), &budget);
        assert_eq!(replay.peek_body(max_bytes, READ_TIMEOUT).await, expected);
        for _ in 0..2 {
            assert_eq!(read_all(replay.start_attempt()).await, "hello world!");
        }
    }
    // A body that could not be buffered is still sent once.
    let replay = Replay::new(scripted_body(&["hello", " world"]), &budget(0, 0));
    replay.peek_body(99, READ_TIMEOUT).await;
    assert_eq!(read_all(replay.start_attempt()).await, "hello world");
    assert_eq!(replay.replayable_body(), ReplayableBody::Unavailable);
}

#[tokio::test]
async fn an_error_during_read_ahead_fails_the_attempt() {
    let mut source = scripted_body(&["hello"]);
    source.polls.push_back(Poll::Ready(Err("reset")));
    let replay = Replay::new(source, &memory_budget());
    assert_eq!(replay.peek_body(99, READ_TIMEOUT).await, partial_start("hello"));
    let mut attempt = replay.start_attempt();
    assert_eq!(poll_attempt(&mut attempt), ready_chunk("hello"));
    assert_eq!(poll_attempt(&mut attempt), Poll::Ready(Some(Err(AttemptBodyError::ClientBodyFailed))));
}

/// Returns a body of `length` bytes that arrive one by one, one per `interval`.
fn slow_body(length: u64, interval: Duration) -> impl Body<Data = Bytes, Error = &'static str> + Unpin {
    let frames = futures_util::stream::unfold(0, move |sent_bytes| async move {
        if sent_bytes == length {
            return None;
        }
        tokio::time::sleep(interval).await;
        Some((Ok(Frame::data(Bytes::from_static(b"x"))), sent_bytes + 1))
    });
    BodyWithLength { body: http_body_util::StreamBody::new(Box::pin(frames)), length }
}

/// A body with a declared length.
struct BodyWithLength<B> {
    body: B,
    length: u64,
}

impl<B: Body + Unpin> Body for BodyWithLength<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.length)
    }
}

/// Waits for a body of `length` bytes, one per `interval_ms`, with the minimum rate `bytes_per_second`. Compares the
/// result and the duration of the wait with the expected ones.
#[track_caller]
fn check_short_body(
    length: u64,
    interval_ms: u64,
    bytes_per_second: u32,
    expected: Result<(), SlowUploadError>,
    expected_seconds: u64,
) {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    let result_and_seconds = runtime.block_on(async {
        let body = Replay::new(slow_body(length, Duration::from_millis(interval_ms)), &budget(1_000, 0));
        let start = clock::instant();
        let rate = MinRate { bytes_per_second };
        let wait_result = body.wait_for_short_body(100, Duration::from_secs(60), rate).await;
        (wait_result, clock::elapsed_since(start).as_secs())
    });
    assert_eq!(
        result_and_seconds,
        (expected, expected_seconds),
        "the wait for {length} bytes, one every {interval_ms} ms, must have the expected end"
    );
}

#[test]
fn a_short_body_is_read_ahead_until_a_timeout() {
    check_short_body(10, 1_000, 1, Ok(()), 10);
    // A longer body is not read ahead.
    check_short_body(101, 1_000, 1, Ok(()), 0);
    check_short_body(100, 61_000, 0, Err(SlowUploadError::Stalled), 60);
    check_short_body(100, 59_000, 0, Ok(()), 5_900);
    // At one byte per second, the client has 20 s and one more second for each received byte.
    check_short_body(100, 2_000, 1, Err(SlowUploadError::BelowMinRate), 39);
    check_short_body(15, 2_000, 1, Ok(()), 30);
}

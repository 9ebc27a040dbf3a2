//! Tests of the replay of a request body: attempts, bounds of the buffer, and slow clients.

use std::collections::VecDeque;
use std::task::Waker;

use http_body_util::BodyExt;
use proptest::prelude::*;

use super::super::budget::BufferLimits;
use super::*;

/// A client that has sent some chunks, with `None` for a moment at which no bytes have arrived.
#[derive(Debug)]
struct Script {
    steps: VecDeque<Option<Result<Frame<Bytes>, &'static str>>>,
    length: Option<u64>,
}

impl Body for Script {
    type Data = Bytes;
    type Error = &'static str;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, &'static str>>> {
        match self.steps.pop_front() {
            None => Poll::Ready(None),
            Some(None) => {
                cx.waker().wake_by_ref();
                Poll::Pending
            }
            Some(Some(frame)) => Poll::Ready(Some(frame)),
        }
    }

    fn size_hint(&self) -> SizeHint {
        self.length.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

fn script(chunks: &[&str]) -> Script {
    Script {
        steps: chunks
            .iter()
            .map(|chunk| Some(Ok(Frame::data(Bytes::copy_from_slice(chunk.as_bytes())))))
            .collect(),
        length: None,
    }
}

/// A budget with these bounds for one body in memory and on disk.
fn budget(memory_bytes_max: u64, disk_bytes_max: u64) -> BufferBudget {
    BufferBudget::new(&BufferLimits {
        memory_bytes_max,
        memory_total_bytes_max: 1_000_000,
        disk_bytes_max,
        disk_total_bytes_max: 1_000_000,
        disk_free_percent_min: 0,
        directory: std::env::temp_dir(),
    })
}

fn ample_budget() -> BufferBudget {
    budget(1_000, 0)
}

/// The next frame of an attempt, polled once.
fn poll(attempt: &mut AttemptBody<Script>) -> Poll<Option<Result<Bytes, Interrupted>>> {
    let frame = Pin::new(attempt).poll_frame(&mut Context::from_waker(Waker::noop()));
    frame.map(|frame| frame.map(|frame| frame.map(|frame| frame.into_data().unwrap())))
}

fn chunk(text: &'static str) -> Poll<Option<Result<Bytes, Interrupted>>> {
    Poll::Ready(Some(Ok(Bytes::from_static(text.as_bytes()))))
}

async fn all(attempt: AttemptBody<Script>) -> Bytes {
    attempt.collect().await.unwrap().to_bytes()
}

#[tokio::test]
async fn every_attempt_sends_the_same_bytes() {
    let replay = Replay::hold(script(&["hello ", "world"]), &ample_budget());
    for _ in 0..3 {
        assert_eq!(all(replay.attempt()).await, "hello world");
        assert_eq!(replay.holding(), Replayable::Whole);
    }
}

#[test]
fn a_later_attempt_continues_with_the_bytes_that_still_arrive() {
    let mut source = script(&["a", "b", "c"]);
    source.steps.insert(2, None);
    let replay = Replay::hold(source, &ample_budget());
    let mut first = replay.attempt();
    assert_eq!(poll(&mut first), chunk("a"));
    assert_eq!(poll(&mut first), chunk("b"));
    assert_eq!(poll(&mut first), Poll::Pending);
    let mut second = replay.attempt();
    assert_eq!(poll(&mut first), Poll::Ready(Some(Err(Interrupted::Superseded))));
    for text in ["a", "b", "c"] {
        assert_eq!(poll(&mut second), chunk(text));
    }
    assert_eq!(poll(&mut second), Poll::Ready(None));
}

#[tokio::test]
async fn the_start_of_a_body_is_returned_and_whether_it_is_complete() {
    let replay = Replay::hold(script(&["hello", " ", "world"]), &ample_budget());
    let mut attempt = replay.attempt();
    let upload = attempt.upload();
    assert_eq!(upload.start(99), (Bytes::new(), false));
    assert_eq!(poll(&mut attempt), chunk("hello"));
    assert_eq!(upload.start(99), ("hello".into(), false));
    assert_eq!(upload.start(4), ("hell".into(), false));
    assert_eq!(all(attempt).await, " world");
    assert_eq!(upload.start(99), ("hello world".into(), true));
    assert_eq!(upload.start(11), ("hello world".into(), true));
    assert_eq!(upload.start(10), ("hello worl".into(), false));
    upload.release();
    assert_eq!(upload.start(99), (Bytes::new(), false));
}

#[tokio::test]
async fn a_body_that_was_read_ahead_is_sent_completely() {
    for bound in [100, 7, 5, 0] {
        let memory = budget(bound, 0);
        let replay = Replay::hold(script(&["hello", " ", "world"]), &memory);
        let (start, is_whole) = replay.peek_body(99, Duration::from_secs(60)).await;
        let is_kept = bound == 100;
        assert_eq!(is_whole, is_kept, "{bound}");
        assert!(b"hello world".starts_with(&start), "{bound}");
        let attempt = replay.attempt();
        assert!(!attempt.is_end_stream());
        assert_eq!(all(attempt).await, "hello world", "{bound}");
        assert_eq!(replay.holding(), if is_kept { Replayable::Whole } else { Replayable::Lost });
    }
    // The requested bytes, and the piece that exceeds them.
    let replay = Replay::hold(script(&["hello", " ", "world"]), &ample_budget());
    assert_eq!(replay.peek_body(4, Duration::from_secs(60)).await, ("hell".into(), false));
    assert_eq!(all(replay.attempt()).await, "hello world");
    assert_eq!(all(replay.attempt()).await, "hello world");
}

#[tokio::test]
async fn a_body_beyond_its_bound_loses_only_its_replay() {
    for (bound, expected) in [(10, Replayable::Whole), (9, Replayable::Lost)] {
        let memory = budget(bound, 0);
        let replay = Replay::hold(script(&["hello", "world"]), &memory);
        assert_eq!(all(replay.attempt()).await, "helloworld");
        assert_eq!(replay.holding(), expected);
    }
}

#[tokio::test]
async fn all_bodies_share_one_bound() {
    let memory = BufferBudget::new(&BufferLimits {
        memory_bytes_max: 1_000_000,
        memory_total_bytes_max: 64 * 1024,
        disk_bytes_max: 0,
        disk_total_bytes_max: 0,
        disk_free_percent_min: 0,
        directory: std::env::temp_dir(),
    });
    let text = "x".repeat(BufferShare::FREE);
    let [one, two, three, small] =
        [&text, &text, &text, ""].map(|text| Replay::hold(script(&[text, "12345"]), &memory));
    for replay in [&one, &two, &small] {
        assert!(all(replay.attempt()).await.ends_with(b"12345"));
    }
    let holding = [one.holding(), two.holding(), small.holding()];
    assert_eq!(holding, [Replayable::Whole, Replayable::Lost, Replayable::Whole]);
    drop(one);
    assert_eq!(memory.memory_bytes(), 0);
    assert!(all(three.attempt()).await.ends_with(b"12345"));
    assert_eq!(three.holding(), Replayable::Whole);
}

#[test]
fn a_body_that_breaks_off_is_broken_for_every_attempt() {
    let mut source = script(&["a"]);
    source.steps.push_back(Some(Err("reset")));
    let replay = Replay::hold(source, &ample_budget());
    let mut first = replay.attempt();
    assert_eq!(poll(&mut first), chunk("a"));
    assert_eq!(poll(&mut first), Poll::Ready(Some(Err(Interrupted::ClientBroke))));
    assert_eq!((replay.holding(), first.upload().waiting()), (Replayable::Lost, UploadWait::Never));
}

#[tokio::test]
async fn trailers_are_dropped() {
    let mut source = script(&["a"]);
    let trailers = http::HeaderMap::from_iter([("xi-api-key".parse().unwrap(), "k".parse().unwrap())]);
    source.steps.push_back(Some(Ok(Frame::trailers(trailers))));
    let collected = Replay::hold(source, &ample_budget()).attempt().collect().await.unwrap();
    assert_eq!(collected.trailers(), None);
    assert_eq!(collected.to_bytes(), "a");
}

#[test]
fn an_announced_length_is_announced_again() {
    let replay = Replay::hold(Script { length: Some(3), ..script(&["a", "bc"]) }, &ample_budget());
    let mut first = replay.attempt();
    assert_eq!(first.size_hint().exact(), Some(3));
    assert_eq!(poll(&mut first), chunk("a"));
    assert_eq!(first.size_hint().exact(), Some(2));
    assert_eq!(replay.attempt().size_hint().exact(), Some(3));
}

#[test]
fn an_empty_body_has_ended_before_it_is_read() {
    let replay = Replay::hold(http_body_util::Empty::<Bytes>::new(), &ample_budget());
    assert!(replay.attempt().is_end_stream());
    assert_eq!(replay.attempt().upload().waiting(), UploadWait::ForResponse);
}

#[test]
fn an_upload_reports_what_it_waits_for() {
    let mut source = script(&["a"]);
    source.steps.push_front(None);
    let replay = Replay::hold(source, &ample_budget());
    let mut attempt = replay.attempt();
    let upload = attempt.upload();
    assert_eq!(upload.waiting(), UploadWait::ForUpstream);
    assert_eq!(poll(&mut attempt), Poll::Pending);
    assert_eq!(upload.waiting(), UploadWait::ForClient);
    assert_eq!(poll(&mut attempt), chunk("a"));
    assert_eq!(poll(&mut attempt), Poll::Ready(None));
    assert_eq!(upload.waiting(), UploadWait::ForResponse);
}

#[test]
fn a_released_body_is_discarded_once_it_is_sent() {
    let memory = ample_budget();
    let replay = Replay::hold(script(&["ab", "c", "d"]), &memory);
    let mut first = replay.attempt();
    for text in ["ab", "c"] {
        assert_eq!(poll(&mut first), chunk(text));
    }
    let mut second = replay.attempt();
    let upload = second.upload();
    assert_eq!(poll(&mut second), chunk("ab"));
    upload.release();
    assert_eq!((upload.start(9).0, upload.passed_bytes()), ("abc".into(), 2));
    assert_eq!(poll(&mut second), chunk("c"));
    assert_eq!(upload.start(9).0, "");
    assert_eq!(poll(&mut second), chunk("d"));
    assert_eq!((upload.passed_bytes(), replay.holding()), (4, Replayable::Lost));
}

/// A client that sends these pieces, waiting before some of them.
fn pieces(pieces: &[Option<Vec<u8>>]) -> Script {
    let steps = pieces.iter().cloned().map(|piece| piece.map(|piece| Ok(Frame::data(Bytes::from(piece)))));
    Script { steps: steps.collect(), length: None }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().build().unwrap()
}

proptest! {
    #[test]
    fn every_attempt_of_any_chunking_sends_the_same_bytes(
        chunks in prop::collection::vec(prop::option::of(prop::collection::vec(any::<u8>(), 0..20)), 0..30),
        reads in prop::collection::vec(0_usize..20, 0..6),
        memory_bytes in 0_u64..400,
    ) {
        let sent: Vec<u8> = chunks.iter().flatten().flatten().copied().collect();
        let budget = budget(memory_bytes, 1_000);
        let replay = Replay::hold(pieces(&chunks), &budget);
        let arrived = runtime().block_on(async {
            for count in reads {
                let mut attempt = replay.attempt();
                for _ in 0..count {
                    let _ = attempt.frame().await;
                }
            }
            all(replay.attempt()).await
        });
        prop_assert_eq!(arrived, sent);
        prop_assert_eq!(replay.holding(), Replayable::Whole);
        drop(replay);
        prop_assert_eq!((budget.memory_bytes(), budget.disk_bytes()), (0, 0));
    }

    #[test]
    fn every_body_is_sent_completely_whatever_part_is_buffered(
        chunks in prop::collection::vec(prop::option::of(prop::collection::vec(any::<u8>(), 0..20)), 0..30),
        memory_bytes in 0_u64..100,
        disk_bytes in 0_u64..100,
    ) {
        let sent: Vec<u8> = chunks.iter().flatten().flatten().copied().collect();
        let budget = budget(memory_bytes, disk_bytes);
        let replay = Replay::hold(pieces(&chunks), &budget);
        prop_assert_eq!(runtime().block_on(all(replay.attempt())), sent);
        prop_assert!(budget.disk_bytes() <= disk_bytes);
    }
}

#[tokio::test]
async fn a_body_that_exceeds_the_memory_is_sent_again_from_the_disk() {
    let budget = budget(2, 1_000_000);
    let chunk = "x".repeat(100_000);
    let replay = Replay::hold(script(&["ab", &chunk, "y", &chunk]), &budget);
    for _ in 0..3 {
        assert_eq!(all(replay.attempt()).await, format!("ab{chunk}y{chunk}"));
    }
    assert_eq!(budget.disk_bytes(), 200_001);
    drop(replay);
    assert_eq!((budget.memory_bytes(), budget.disk_bytes()), (0, 0));
}

async fn check_lost(change: impl Fn(&mut BufferLimits), expected: Loss) {
    let mut bounds = BufferLimits {
        memory_bytes_max: 2,
        memory_total_bytes_max: 1_000,
        disk_bytes_max: 1_000_000,
        disk_total_bytes_max: 1_000_000,
        disk_free_percent_min: 0,
        directory: std::env::temp_dir(),
    };
    change(&mut bounds);
    let budget = BufferBudget::new(&bounds);
    // Larger than the queue of the disk file: the write is polled before the next piece.
    let large = "x".repeat(300_000);
    let replay = Replay::hold(script(&["ab", &large, &large, "ef"]), &budget);
    assert_eq!(all(replay.attempt()).await, format!("ab{large}{large}ef"), "the request continues");
    assert_eq!((replay.holding(), replay.loss()), (Replayable::Lost, Some(expected)));
    assert_eq!((budget.memory_bytes(), budget.disk_bytes()), (0, 0));
}

#[tokio::test]
async fn a_disk_that_is_full_or_broken_costs_the_replay_and_not_the_request() {
    check_lost(|bounds| bounds.disk_bytes_max = 3, Loss::TooLarge).await;
    check_lost(|bounds| bounds.disk_total_bytes_max = 3, Loss::TooLarge).await;
    check_lost(|bounds| bounds.disk_free_percent_min = 100, Loss::DiskFull).await;
    check_lost(|bounds| bounds.directory = "/nonexistent".into(), Loss::DiskFailed).await;
}

#[tokio::test]
async fn bytes_read_ahead_are_the_first_of_every_pass() {
    let mut source = script(&["hello", " ", "world"]);
    source.steps.insert(1, None);
    let budget = ample_budget();
    let replay = Replay::hold(source, &budget);
    assert_eq!(replay.peek_body(99, Duration::from_secs(60)).await, ("hello world".into(), true));
    let mut attempt = replay.attempt();
    assert!(!attempt.is_end_stream());
    assert_eq!(poll(&mut attempt), chunk("hello"));
    assert_eq!(all(attempt).await, " world");
    assert_eq!(all(replay.attempt()).await, "hello world");
    assert_eq!(replay.holding(), Replayable::Whole);
}

#[tokio::test]
async fn bytes_read_ahead_may_exceed_the_memory() {
    for (bytes_max, memory, expected) in
        [(6, 1_000, ("hello ", false)), (99, 6, ("hello world!", true)), (1, 1_000, ("h", false))]
    {
        let budget = budget(memory, 1_000);
        let replay = Replay::hold(script(&["hello", " ", "world", "!"]), &budget);
        let (start, is_whole) = replay.peek_body(bytes_max, Duration::from_secs(60)).await;
        assert_eq!((&start[..], is_whole), (expected.0.as_bytes(), expected.1));
        for _ in 0..2 {
            assert_eq!(all(replay.attempt()).await, "hello world!");
        }
    }
    // A body that could not be kept is still sent once.
    let replay = Replay::hold(script(&["hello", " world"]), &budget(0, 0));
    replay.peek_body(99, Duration::from_secs(60)).await;
    assert_eq!(all(replay.attempt()).await, "hello world");
    assert_eq!(replay.holding(), Replayable::Lost);
}

#[tokio::test]
async fn a_body_that_breaks_while_it_is_read_ahead_breaks_the_pass() {
    let mut source = script(&["hello"]);
    source.steps.push_back(Some(Err("reset")));
    let replay = Replay::hold(source, &ample_budget());
    assert_eq!(replay.peek_body(99, Duration::from_secs(60)).await, ("hello".into(), false));
    let mut attempt = replay.attempt();
    assert_eq!(poll(&mut attempt), chunk("hello"));
    assert_eq!(poll(&mut attempt), Poll::Ready(Some(Err(Interrupted::ClientBroke))));
}

/// A client whose body has this length, and that sends one byte each `interval`.
fn slow(length: u64, interval: Duration) -> impl Body<Data = Bytes, Error = &'static str> + Unpin {
    let steps = futures_util::stream::unfold(0, move |sent| async move {
        if sent == length {
            return None;
        }
        tokio::time::sleep(interval).await;
        Some((Ok(Frame::data(Bytes::from_static(b"x"))), sent + 1))
    });
    Announced { body: http_body_util::StreamBody::new(Box::pin(steps)), length }
}

struct Announced<B> {
    body: B,
    length: u64,
}

impl<B: Body + Unpin> Body for Announced<B> {
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

#[track_caller]
fn check_short(length: u64, interval_ms: u64, bytes_per_second: u32, expected: (Result<(), Slow>, u64)) {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    let result = runtime.block_on(async {
        let body = Replay::hold(slow(length, Duration::from_millis(interval_ms)), &budget(1_000, 0));
        let began = clock::instant();
        let rate = MinRate { bytes_per_second };
        let read = body.wait_for_short_body(100, Duration::from_secs(60), rate).await;
        (read, clock::since(began).as_secs())
    });
    assert_eq!(result, expected, "{length} bytes, one each {interval_ms} ms");
}

#[test]
fn the_proxy_waits_for_a_short_body_and_not_for_a_slow_client() {
    check_short(10, 1_000, 1, (Ok(()), 10));
    // A body longer than the bound is left to the attempt.
    check_short(101, 1_000, 1, (Ok(()), 0));
    check_short(100, 61_000, 0, (Err(Slow::Stalled), 60));
    check_short(100, 59_000, 0, (Ok(()), 5_900));
    // 20 s, and one second more for each byte.
    check_short(100, 2_000, 1, (Err(Slow::Trickles), 39));
    check_short(15, 2_000, 1, (Ok(()), 30));
}

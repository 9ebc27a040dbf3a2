//! Replays an arbitrarily chunked request body with arbitrary buffer limits, after arbitrary incomplete attempts. The
//! last attempt must send the bytes of the client.

#![no_main]

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use arbitrary::Arbitrary;
use bytes::Bytes;
use http_body::{Body, Frame};
use http_body_util::BodyExt;
use keychoir::body::budget::{BufferBudget, BufferLimits};
use keychoir::body::replay::Replay;
use keychoir::policy::replay::ReplayableBody;
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Case {
    pieces: Vec<Option<Vec<u8>>>,
    attempts: Vec<u8>,
    memory: u16,
    disk: u16,
}

struct Client(VecDeque<Option<Vec<u8>>>);

impl Body for Client {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        match self.0.pop_front() {
            None => Poll::Ready(None),
            Some(None) => {
                cx.waker().wake_by_ref();
                Poll::Pending
            }
            Some(Some(piece)) => Poll::Ready(Some(Ok(Frame::data(piece.into())))),
        }
    }
}

fuzz_target!(|case: Case| {
    let sent: Vec<u8> = case.pieces.iter().flatten().flatten().copied().collect();
    let budget = BufferBudget::new(&BufferLimits {
        max_body_memory: case.memory.into(),
        max_total_memory: case.memory.into(),
        max_body_disk: case.disk.into(),
        max_total_disk: case.disk.into(),
        min_disk_free_percent: 0,
        directory: std::env::temp_dir(),
    });
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    runtime.block_on(async {
        let replay = Replay::new(Client(case.pieces.into()), &budget);
        for count in case.attempts.into_iter().take(8) {
            let mut attempt = replay.start_attempt();
            for _ in 0..count {
                if attempt.frame().await.is_none_or(|frame| frame.is_err()) {
                    break;
                }
            }
            if replay.replayable_body() == ReplayableBody::Unavailable {
                return;
            }
        }
        let arrived = replay.start_attempt().collect().await.expect("the body is complete").to_bytes();
        assert_eq!(arrived, sent);
        drop(replay);
        assert_eq!((budget.memory_bytes(), budget.disk_bytes()), (0, 0));
    });
});

//! Fuzzes the replay of request bodies. A body of arbitrary frames is sent in several attempts, with arbitrary limits
//! of its buffers. If the body is still replayable after the incomplete attempts, the last attempt must send all bytes
//! of the client, and all buffers must then be released.

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

/// A request body, its attempts and the limits of its buffers.
#[derive(Arbitrary, Debug)]
struct ReplayCase {
    /// The frames of the body. `None` makes the body pending once.
    frames: Vec<Option<Vec<u8>>>,
    /// The number of frames that each incomplete attempt reads.
    frames_per_attempt: Vec<u8>,
    /// The maximum numbers of buffered bytes.
    max_memory: u16,
    max_disk: u16,
}

/// The body of the client. `None` makes it pending once.
struct ClientBody(VecDeque<Option<Vec<u8>>>);

impl Body for ClientBody {
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
            Some(Some(data)) => Poll::Ready(Some(Ok(Frame::data(data.into())))),
        }
    }
}

fuzz_target!(|case: ReplayCase| {
    let sent: Vec<u8> = case.frames.iter().flatten().flatten().copied().collect();
    let budget = BufferBudget::new(&BufferLimits {
        max_body_memory: case.max_memory.into(),
        max_total_memory: case.max_memory.into(),
        max_body_disk: case.max_disk.into(),
        max_total_disk: case.max_disk.into(),
        min_disk_free_percent: 0,
        directory: std::env::temp_dir(),
    });
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("the runtime must start");
    runtime.block_on(async {
        let replay = Replay::new(ClientBody(case.frames.into()), &budget);
        for frame_count in case.frames_per_attempt.into_iter().take(8) {
            let mut attempt = replay.start_attempt();
            for _ in 0..frame_count {
                if attempt.frame().await.is_none_or(|frame| frame.is_err()) {
                    break;
                }
            }
            if replay.replayable_body() == ReplayableBody::Unavailable {
                return;
            }
        }
        let replayed = replay.start_attempt().collect().await.expect("the body must be complete").to_bytes();
        assert_eq!(replayed, sent, "the last attempt must send all bytes");
        drop(replay);
        assert_eq!((budget.memory_bytes(), budget.disk_bytes()), (0, 0), "all buffers must be released");
    });
});

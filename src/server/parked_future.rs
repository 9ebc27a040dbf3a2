//! A future that runs beside the traffic of a connection and seldom makes progress: polling it must be nearly
//! free, because a connection is polled with every piece that it transfers.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use futures_util::task::AtomicWaker;
use pin_project_lite::pin_project;

pin_project! {
    /// A future that is polled only after it was woken itself, and not whenever its task is. Otherwise a poll
    /// is the load of one word.
    pub(super) struct ParkedFuture<F> {
        #[pin]
        future: F,
        bell: Arc<Bell>,
        // The waker that the future receives.
        rings: Waker,
        // The task to wake, which changes only in tests.
        task: Option<Waker>,
    }
}

#[derive(Default)]
struct Bell {
    is_rung: AtomicBool,
    task: AtomicWaker,
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.is_rung.store(true, Ordering::Release);
        self.task.wake();
    }
}

impl<F: Future> ParkedFuture<F> {
    pub(super) fn new(future: F) -> Self {
        let bell = Arc::new(Bell { is_rung: AtomicBool::new(true), task: AtomicWaker::new() });
        Self { future, rings: Waker::from(Arc::clone(&bell)), bell, task: None }
    }
}

impl<F: Future> Future for ParkedFuture<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        let is_known = this.task.as_ref().is_some_and(|task| task.will_wake(cx.waker()));
        let is_rung = this.bell.is_rung.load(Ordering::Relaxed);
        if is_known && !is_rung {
            return Poll::Pending;
        }
        // The order matters: a wake-up after the swap is seen by this poll or wakes the task, and a waker
        // that was used must be registered again.
        let is_rung = this.bell.is_rung.swap(false, Ordering::AcqRel);
        this.bell.task.register(cx.waker());
        if !is_known {
            *this.task = Some(cx.waker().clone());
        }
        if is_rung || this.bell.is_rung.load(Ordering::Acquire) {
            return this.future.poll(&mut Context::from_waker(this.rings));
        }
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::sync::atomic::AtomicUsize;

    use tokio::sync::Notify;

    use super::*;

    /// Counts its polls until it is notified to end.
    fn counted<'a>(polls: &'a AtomicUsize, end: &'a Notify) -> impl Future<Output = ()> + 'a {
        let mut notified = Box::pin(end.notified());
        poll_fn(move |cx| {
            polls.fetch_add(1, Ordering::Relaxed);
            notified.as_mut().poll(cx)
        })
    }

    async fn is_ready<F: Future>(aside: &mut Pin<Box<ParkedFuture<F>>>) -> bool {
        poll_fn(|cx| Poll::Ready(aside.as_mut().poll(cx).is_ready())).await
    }

    #[tokio::test]
    async fn it_is_polled_when_it_has_asked_and_not_before() {
        let (polls, end) = (AtomicUsize::new(0), Notify::new());
        let mut aside = Box::pin(ParkedFuture::new(counted(&polls, &end)));
        for _ in 0..3 {
            assert!(!is_ready(&mut aside).await);
        }
        assert_eq!(polls.load(Ordering::Relaxed), 1);
        end.notify_one();
        assert!(is_ready(&mut aside).await);
        assert_eq!(polls.load(Ordering::Relaxed), 2);
    }

    #[tokio::test]
    async fn it_wakes_the_task_that_polled_it_last() {
        let (polls, end) = (AtomicUsize::new(0), Notify::new());
        let mut aside = Box::pin(ParkedFuture::new(counted(&polls, &end)));
        // Another task polled it first.
        assert!(aside.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
        tokio::join!(biased; aside.as_mut(), async { end.notify_one() });
        assert_eq!(polls.load(Ordering::Relaxed), 2);
    }

    #[tokio::test]
    async fn it_may_ask_again_and_again() {
        let end = Notify::new();
        let mut rounds = Box::pin(ParkedFuture::new(async {
            for _ in 0..3 {
                end.notified().await;
            }
        }));
        tokio::join!(biased; rounds.as_mut(), async {
            for _ in 0..3 {
                end.notify_one();
                tokio::task::yield_now().await;
            }
        });
    }
}

//! Wraps a future that waits for rare events of a connection, such as timeouts and the drain. The task of a
//! connection is polled for every chunk that it transfers. Without this wrapper, each of these polls would also poll
//! timers and cancellation tokens, and polling them takes a lock.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use futures_util::task::AtomicWaker;
use pin_project_lite::pin_project;

pin_project! {
    /// A future that, after its first poll, is polled only when its own waker was called. Any other poll of its task
    /// costs one atomic load.
    pub(super) struct ParkedFuture<F> {
        #[pin]
        future: F,
        flag: Arc<WakeFlag>,
        // The waker passed to `future`, which sets `flag`.
        waker: Waker,
        // The waker of the task that polled last.
        task: Option<Waker>,
    }
}

/// Records that the parked future was woken, and wakes the task that polls it.
#[derive(Default)]
struct WakeFlag {
    is_woken: AtomicBool,
    task: AtomicWaker,
}

impl Wake for WakeFlag {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.is_woken.store(true, Ordering::Release);
        self.task.wake();
    }
}

impl<F: Future> ParkedFuture<F> {
    pub(super) fn new(future: F) -> Self {
        let flag = Arc::new(WakeFlag { is_woken: AtomicBool::new(true), task: AtomicWaker::new() });
        Self { future, waker: Waker::from(Arc::clone(&flag)), flag, task: None }
    }
}

impl<F: Future> Future for ParkedFuture<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        let is_same_task = this.task.as_ref().is_some_and(|task| task.will_wake(cx.waker()));
        let is_woken = this.flag.is_woken.load(Ordering::Relaxed);
        if is_same_task && !is_woken {
            return Poll::Pending;
        }
        // The waker is registered between the swap and the last load. A wake-up after the swap thus wakes the task,
        // or the load reads it. The waker is registered again for each poll, because `AtomicWaker` removes a waker
        // when it calls the waker.
        let is_woken = this.flag.is_woken.swap(false, Ordering::AcqRel);
        this.flag.task.register(cx.waker());
        if !is_same_task {
            *this.task = Some(cx.waker().clone());
        }
        if is_woken || this.flag.is_woken.load(Ordering::Acquire) {
            return this.future.poll(&mut Context::from_waker(this.waker));
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

    /// Counts its polls, and completes when `end` is notified.
    fn count_polls<'a>(polls: &'a AtomicUsize, end: &'a Notify) -> impl Future<Output = ()> + 'a {
        let mut notified = Box::pin(end.notified());
        poll_fn(move |cx| {
            polls.fetch_add(1, Ordering::Relaxed);
            notified.as_mut().poll(cx)
        })
    }

    async fn is_ready<F: Future>(parked: &mut Pin<Box<ParkedFuture<F>>>) -> bool {
        poll_fn(|cx| Poll::Ready(parked.as_mut().poll(cx).is_ready())).await
    }

    #[tokio::test]
    async fn a_parked_future_is_polled_only_after_its_own_wake_up() {
        let (polls, end) = (AtomicUsize::new(0), Notify::new());
        let mut parked_future = Box::pin(ParkedFuture::new(count_polls(&polls, &end)));
        for _ in 0..3 {
            assert!(!is_ready(&mut parked_future).await);
        }
        assert_eq!(polls.load(Ordering::Relaxed), 1);
        end.notify_one();
        assert!(is_ready(&mut parked_future).await);
        assert_eq!(polls.load(Ordering::Relaxed), 2);
    }

    #[tokio::test]
    async fn a_parked_future_wakes_the_task_that_polled_it_last() {
        let (polls, end) = (AtomicUsize::new(0), Notify::new());
        let mut parked_future = Box::pin(ParkedFuture::new(count_polls(&polls, &end)));
        // A different task polls the future first.
        assert!(parked_future.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
        tokio::join!(biased; parked_future.as_mut(), async { end.notify_one() });
        assert_eq!(polls.load(Ordering::Relaxed), 2);
    }

    #[tokio::test]
    async fn a_parked_future_can_be_woken_many_times() {
        let end = Notify::new();
        let mut parked_future = Box::pin(ParkedFuture::new(async {
            for _ in 0..3 {
                end.notified().await;
            }
        }));
        tokio::join!(biased; parked_future.as_mut(), async {
            for _ in 0..3 {
                end.notify_one();
                tokio::task::yield_now().await;
            }
        });
    }
}

//! The only module that spawns tasks and threads. Every task is counted, so that a drain can wait for all of
//! them, and every thread has a name, so that an operator can find it.

use std::future::Future;
use std::io;
use std::thread;

use tokio::runtime::Handle;
use tokio::task::{AbortHandle, JoinHandle};
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

/// A group of tasks that can be waited for together; a clone is the same group.
#[derive(Clone, Debug, Default)]
pub struct Tasks {
    tracker: TaskTracker,
}

impl Tasks {
    /// An empty group.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Runs `future` on the runtime, as a member of this group.
    pub fn spawn<F>(&self, future: F) -> JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        self.tracker.spawn(future)
    }

    /// Runs `future` as a member of this group on the runtime of `handle`, from any thread.
    pub fn spawn_on<F>(&self, future: F, handle: &Handle) -> JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        self.tracker.spawn_on(future, handle)
    }

    /// The number of members now.
    #[must_use]
    pub fn count(&self) -> usize {
        self.tracker.len()
    }

    /// Runs `future` as a member of this group until it ends or the guard is dropped.
    pub fn spawn_guarded<F>(&self, future: F) -> AbortOnDrop
    where
        F: Future<Output = ()> + Send + 'static,
    {
        AbortOnDrop(self.tracker.spawn(future).abort_handle())
    }

    /// Counts as a member of this group until it is dropped, without being a task.
    #[must_use]
    pub fn member(&self) -> Member {
        Member(self.tracker.token())
    }

    /// Waits until every task of the group has ended. Tasks may still be added meanwhile.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future stops the waiting and nothing else.
    pub async fn ended(&self) {
        self.tracker.close();
        self.tracker.wait().await;
    }
}

/// A member of a group that is not a task; the group waits until it is dropped.
#[derive(Debug)]
pub struct Member(#[expect(dead_code, reason = "its drop is what counts")] TaskTrackerToken);

/// Aborts its task when it is dropped.
#[derive(Debug)]
pub struct AbortOnDrop(AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Runs work that blocks for a moment, such as a write to a file, on the runtime's blocking threads.
///
/// # Cancel safety
///
/// Work that has begun runs to its end, also when the handle is dropped.
pub fn blocking<F, T>(work: F) -> JoinHandle<T>
where
    F: FnOnce() -> T + Send + 'static,
    T: Send + 'static,
{
    tokio::task::spawn_blocking(work)
}

/// Starts an operating-system thread with a name, for work that blocks.
///
/// # Errors
///
/// When the system cannot create a thread.
pub fn thread<F, T>(name: &str, work: F) -> io::Result<thread::JoinHandle<T>>
where
    F: FnOnce() -> T + Send + 'static,
    T: Send + 'static,
{
    thread::Builder::new().name(name.to_owned()).spawn(work)
}

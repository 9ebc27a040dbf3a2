//! Spawns long-running tasks and all threads. Such a task belongs to a group whose end a drain can wait for, and a
//! thread has a name that operators can find. Short blocking work runs on the unnamed blocking threads of the runtime.
//! Tasks that end with the function that spawns them are in a `JoinSet` of tokio instead.

use std::future::Future;
use std::io;
use std::thread;

use tokio::runtime::Handle;
use tokio::task::{AbortHandle, JoinHandle};
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

/// A group of tasks whose end can be waited for, for example by a drain. A clone refers to the same group.
#[derive(Clone, Debug, Default)]
pub struct Tasks {
    tracker: TaskTracker,
}

impl Tasks {
    /// Creates an empty group.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Spawns a task of this group on the current runtime.
    pub fn spawn<F>(&self, future: F) -> JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        self.tracker.spawn(future)
    }

    /// Spawns a task of this group on the runtime of `handle`. May be called from any thread.
    pub fn spawn_on<F>(&self, future: F, handle: &Handle) -> JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        self.tracker.spawn_on(future, handle)
    }

    /// Returns the current number of tasks and tokens.
    #[must_use]
    pub fn count(&self) -> usize {
        self.tracker.len()
    }

    /// Spawns a task of this group that is aborted when the returned guard is dropped.
    pub fn spawn_guarded<F>(&self, future: F) -> AbortOnDrop
    where
        F: Future<Output = ()> + Send + 'static,
    {
        AbortOnDrop(self.tracker.spawn(future).abort_handle())
    }

    /// Returns a token that counts as a task of this group until it is dropped.
    #[must_use]
    pub fn token(&self) -> TaskToken {
        TaskToken(self.tracker.token())
    }

    /// Waits until all tasks of the group have ended, including tasks that are added during the wait.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future has no effect on the tasks.
    pub async fn wait_until_ended(&self) {
        self.tracker.close();
        self.tracker.wait().await;
    }
}

/// Counts as a task of a [`Tasks`] group until it is dropped.
#[derive(Debug)]
pub struct TaskToken(
    #[expect(dead_code, reason = "dropping the token removes it from the group")] TaskTrackerToken,
);

/// Aborts its task when it is dropped.
#[derive(Debug)]
pub struct AbortOnDrop(AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Runs short blocking work, such as a write to a file, on a blocking thread of the runtime.
///
/// # Cancel safety
///
/// Dropping the handle does not stop work that has started.
pub fn spawn_blocking<F, T>(work: F) -> JoinHandle<T>
where
    F: FnOnce() -> T + Send + 'static,
    T: Send + 'static,
{
    tokio::task::spawn_blocking(work)
}

/// Spawns a named thread for long blocking work.
///
/// # Errors
///
/// Fails when the operating system cannot create the thread.
pub fn spawn_thread<F, T>(name: &str, work: F) -> io::Result<thread::JoinHandle<T>>
where
    F: FnOnce() -> T + Send + 'static,
    T: Send + 'static,
{
    thread::Builder::new().name(name.to_owned()).spawn(work)
}

//! Keeps the usage of the end users of a client. The number of users is unbounded, and a client can name any user, so
//! only recently active users are in memory. The usage of other users is read from the usage store.
//!
//! A user stays in memory while one of its requests is in progress or one of its usage records is not written:
//! the requests and the records share the user's counters. A user is therefore removed only when the usage
//! store has all of its usage, and a user that is read again has no usage in memory.

use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::mem;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::OnceCell;
use tokio::time::timeout;

use super::UsageTotals;
use super::counters::{ClientCounters, UsageCounters};
use crate::policy::client::ClientName;
use crate::policy::units::UnixMs;
use crate::secret::UserFingerprint;

/// Maximum wait for the stored usage of a user. It takes about a millisecond unless the disk is overloaded.
const READ_TIMEOUT: Duration = Duration::from_secs(2);

/// The stored usage of a user cannot be read, so its quota cannot be checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the stored usage of the user cannot be read")]
pub struct UserUsageUnavailable;

/// The result of reading the stored usage of a user.
pub type UserUsageFuture<'a> =
    Pin<Box<dyn Future<Output = Result<UsageTotals, UserUsageUnavailable>> + Send + 'a>>;

/// Reads the usage of users from the usage store.
pub trait UserUsageReader: fmt::Debug + Send + Sync {
    /// Reads the usage of `user` in the periods that contain `now`, including all records that were written.
    fn read_user_usage<'a>(
        &'a self,
        client: &'a ClientName,
        user: UserFingerprint,
        now: UnixMs,
    ) -> UserUsageFuture<'a>;
}

/// A usage store without usage, for measurements and tests.
#[derive(Clone, Copy, Debug)]
pub struct NoStoredUsage;

impl UserUsageReader for NoStoredUsage {
    fn read_user_usage<'a>(
        &'a self,
        client: &'a ClientName,
        _: UserFingerprint,
        _: UnixMs,
    ) -> UserUsageFuture<'a> {
        Box::pin(async { Ok(UsageTotals { client: client.clone(), requests: [0; 3], credits: [0; 3] }) })
    }
}

/// The end user that a request names. It keeps the user's counters in memory.
#[derive(Clone)]
pub struct RequestUser {
    fingerprint: UserFingerprint,
    /// The counters, if the client has a quota per user.
    counters: Option<Arc<UsageCounters>>,
}

impl RequestUser {
    /// Creates the user of a request whose client has no quota per user.
    #[must_use]
    pub fn new(fingerprint: UserFingerprint) -> Self {
        Self { fingerprint, counters: None }
    }

    /// Returns the fingerprint of the user, which identifies it in usage records and logs.
    #[must_use]
    pub fn fingerprint(&self) -> UserFingerprint {
        self.fingerprint
    }

    /// Returns the counters, or `None` if the client has no quota per user.
    pub(super) fn counters(&self) -> Option<&Arc<UsageCounters>> {
        self.counters.as_ref()
    }
}

impl fmt::Debug for RequestUser {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.fingerprint.fmt(f)
    }
}

/// Returns the user with its counters, which are read with `reader` if they are not in memory. Concurrent
/// requests of a user share one read.
///
/// # Errors
///
/// Fails when the stored usage cannot be read in time.
pub(super) async fn load(
    client: &ClientName,
    counters: &ClientCounters,
    user: UserFingerprint,
    max_cached_users: usize,
    reader: &dyn UserUsageReader,
    now: UnixMs,
) -> Result<RequestUser, UserUsageUnavailable> {
    let cached = counters.users().get_or_insert(user, max_cached_users);
    let restore = cached.restored.get_or_try_init(|| async {
        let UsageTotals { requests, credits, .. } = reader.read_user_usage(client, user, now).await?;
        cached.counters.requests.add(&requests, now);
        cached.counters.credits.add(&credits, now);
        Ok(())
    });
    // The timeout includes the wait for the failed reads of other requests of this user.
    timeout(READ_TIMEOUT, restore).await.map_err(|_| UserUsageUnavailable)??;
    Ok(RequestUser { fingerprint: user, counters: Some(Arc::clone(&cached.counters)) })
}

/// A user whose usage is in memory.
#[derive(Debug, Default)]
pub(super) struct CachedUser {
    counters: Arc<UsageCounters>,
    /// This cell is set when the stored usage has been added to the counters.
    restored: OnceCell<()>,
}

/// Returns whether a request, a usage record or a pending read uses the user. A new use begins only while the table
/// is locked.
fn is_in_use(user: &Arc<CachedUser>) -> bool {
    Arc::strong_count(user) > 1 || Arc::strong_count(&user.counters) > 1
}

/// The users of one client whose usage is in memory, in two generations. Users move to the recent generation when
/// they are used. When the recent generation is full, it becomes the older one, whose idle users are removed. This
/// costs constant time per request on average, and needs no list of all users in the order of their last requests.
#[derive(Debug, Default)]
pub(super) struct UserTable {
    recent: HashMap<UserFingerprint, Arc<CachedUser>>,
    older: HashMap<UserFingerprint, Arc<CachedUser>>,
    /// The number of users in `recent` that were in use when the generation began.
    kept_count: usize,
}

impl UserTable {
    /// Returns the user, which is inserted if it is missing. At most `max_users` idle users stay in memory, in
    /// addition to a multiple of the users in use.
    pub(super) fn get_or_insert(&mut self, user: UserFingerprint, max_users: usize) -> Arc<CachedUser> {
        if let Some(cached) = self.recent.get(&user) {
            return Arc::clone(cached);
        }
        let cached = self.older.remove(&user).unwrap_or_default();
        // Users in use cannot be removed. Twice their number is added, so that a generation of them is not
        // searched again for each new user.
        if self.recent.len() >= (max_users / 2).max(1).saturating_add(2 * self.kept_count) {
            self.begin_generation();
        }
        self.recent.insert(user, Arc::clone(&cached));
        cached
    }

    /// Makes the recent generation the older one. Of the former older generation, the users in use begin the new recent
    /// generation, and the idle users are removed.
    fn begin_generation(&mut self) {
        let mut kept_users = mem::replace(&mut self.older, mem::take(&mut self.recent));
        kept_users.retain(|_, user| is_in_use(user));
        self.kept_count = kept_users.len();
        self.recent = kept_users;
    }

    /// Returns the counters of a user that is in memory.
    pub(super) fn find(&self, user: UserFingerprint) -> Option<Arc<UsageCounters>> {
        let cached = self.recent.get(&user).or_else(|| self.older.get(&user))?;
        Some(Arc::clone(&cached.counters))
    }

    /// Returns the counters of all users in memory.
    pub(super) fn counters(&self) -> impl Iterator<Item = &UsageCounters> {
        self.recent.values().chain(self.older.values()).map(|cached| &*cached.counters)
    }

    /// Removes all users. Requests in progress keep their counters.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Returns the number of users in memory.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.recent.len() + self.older.len()
    }
}

#[cfg(test)]
mod tests;

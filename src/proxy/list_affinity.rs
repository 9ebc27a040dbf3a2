//! Keeps the account that last served a list to each client, in memory. The client's next list is requested from that
//! account first, so that the client sees the same voices again. With `[redis]`, `account_affinity` also publishes the
//! account to the other replicas.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::policy::client::ClientName;
use crate::pool::OwnerId;

/// The preferred account of each client that has requested a list. The map is bounded by the number of
/// clients.
#[derive(Debug, Default)]
pub(super) struct ListAffinity(Mutex<HashMap<ClientName, OwnerId>>);

impl ListAffinity {
    /// Returns the account that last served a list to `client`.
    pub(super) fn account_for(&self, client: &ClientName) -> Option<OwnerId> {
        self.lock().get(client).cloned()
    }

    /// Records the account that served a list to `client`. Returns whether the account has changed.
    pub(super) fn record(&self, client: &ClientName, account: &OwnerId) -> bool {
        let mut accounts = self.lock();
        let is_changed = accounts.get(client) != Some(account);
        if is_changed {
            accounts.insert(client.clone(), account.clone());
        }
        is_changed
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<ClientName, OwnerId>> {
        // Every change is a single insertion, so a poisoned lock leaves consistent data.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

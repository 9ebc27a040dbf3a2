//! Which account a client sees in its lists: the one that has answered it first, so that a list does
//! not show other voices with every change of the key in use. In memory only.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::policy::client::ClientName;
use crate::pool::OwnerId;

/// The home of each client that has asked for a list. There are as many clients as are configured.
#[derive(Debug, Default)]
pub(super) struct ListAffinity(Mutex<HashMap<ClientName, OwnerId>>);

impl ListAffinity {
    pub(super) fn of(&self, client: &ClientName) -> Option<OwnerId> {
        self.lock().get(client).cloned()
    }

    pub(super) fn record(&self, client: &ClientName, home: &OwnerId) {
        let mut homes = self.lock();
        if homes.get(client) != Some(home) {
            homes.insert(client.clone(), home.clone());
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<ClientName, OwnerId>> {
        // An entry is there or not: a panic in between leaves nothing broken.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

//! Which account a client sees in its lists: the one that has answered it first, so that a list does
//! not show other voices with every change of the key in use. In memory only.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::policy::client::ClientName;
use crate::pool::Identity;

/// The home of each client that has asked for a list. There are as many clients as are configured.
#[derive(Debug, Default)]
pub(super) struct Homes(Mutex<HashMap<ClientName, Identity>>);

impl Homes {
    pub(super) fn of(&self, client: &ClientName) -> Option<Identity> {
        self.lock().get(client).cloned()
    }

    pub(super) fn settle(&self, client: &ClientName, home: &Identity) {
        let mut homes = self.lock();
        if homes.get(client) != Some(home) {
            homes.insert(client.clone(), home.clone());
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<ClientName, Identity>> {
        // An entry is there or not: a panic in between leaves nothing broken.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

//! Records the owners of the identifiers in a response body, before the client receives the end of the body.
//! `account_affinity` creates the recorder, and `relay` passes it a copy of the body.

use std::mem;
use std::sync::Arc;

use http::Method;

use super::replica_owners::{ReplicaOwners, record_owner};
use super::usage::{OwnershipUpdate, UsagePermit};
use crate::body::decode::decode_body;
use crate::body::inspect::BodyInspector;
use crate::clock;
use crate::elevenlabs::affinity;
use crate::elevenlabs::endpoint::Route;
use crate::pool::{OwnerId, OwnershipIndex};

/// Records the ownership of the identifiers in a response body. Dropping the recorder queues the updates for the
/// usage store, including the updates from the response head.
#[derive(Debug)]
pub struct OwnershipRecorder {
    pub(super) owners: Arc<OwnershipIndex>,
    /// The owners that other replicas have recorded, or `None` without other replicas.
    pub(super) replica_owners: Option<Arc<ReplicaOwners>>,
    /// The account that served the response.
    pub(super) owner: OwnerId,
    pub(super) method: Method,
    pub(super) route: Route,
    pub(super) path: Arc<str>,
    /// The content coding of the body, or `None` if the body is not encoded.
    pub(super) encoding: Option<String>,
    /// Maximum number of bytes of the body that are copied.
    pub(super) max_bytes: usize,
    pub(super) updates: Vec<OwnershipUpdate>,
    /// The permit for queuing the updates. Only the drop takes it.
    pub(super) permit: Option<UsagePermit>,
}

impl BodyInspector for OwnershipRecorder {
    fn inspect(mut self, body: &[u8]) {
        let Some(document) = decode_body(body, self.encoding.as_deref(), self.max_bytes) else { return };
        let now = clock::now();
        let identifiers = affinity::identifiers_in_response(&self.method, &self.route, &self.path, &document);
        let replicas = self.replica_owners.as_deref();
        let record = |identifier| record_owner(&self.owners, replicas, identifier, &self.owner, now);
        self.updates.extend(identifiers.into_iter().filter_map(record));
    }
}

impl Drop for OwnershipRecorder {
    fn drop(&mut self) {
        if let Some(permit) = self.permit.take() {
            permit.record_ownership(mem::take(&mut self.updates));
        }
    }
}

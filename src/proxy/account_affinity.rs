//! Determines the account that must or should serve a request, from the identifiers that the request names and the
//! lists that it reads. After a 404 response, decides whether another account may have the named resource. Records
//! the ownership that the response proves.

use std::mem;
use std::sync::Arc;
use std::time::Duration;

use http::header::{CONTENT_ENCODING, CONTENT_TYPE};
use http::request::Parts;
use http::{HeaderMap, Method};
use hyper::body::Incoming;

use super::config::Limits;
use super::not_found_cache::NotFoundCache;
use super::ownership_recorder::OwnershipRecorder;
use super::replica_owners::{ReplicaOwners, record_owner};
use super::request_meta::RequestMeta;
use super::state::Proxy;
use super::upstream_response::UpstreamResponse;
use super::usage::{OwnershipUpdate, UsagePermit};
use crate::body::replay::{BodyStart, Replay};
use crate::clock;
use crate::elevenlabs::affinity::required_owner::{ConflictingOwners, required_owner};
use crate::elevenlabs::affinity::{self, Identifier, RequestIdentifiers, ResourceKind, ResponseOwnership};
use crate::elevenlabs::endpoint::{Endpoint, Metering, Route};
use crate::elevenlabs::request_body;
use crate::policy::client::ClientName;
use crate::policy::replay::Effect;
use crate::policy::verdict::Verdict;
use crate::pool::{Eligibility, Key, OwnerId, OwnershipIndex, Roster};

/// Maximum wait for a JSON body that may contain an owned identifier. A slower body is streamed without being
/// searched.
const BODY_READ_TIMEOUT: Duration = Duration::from_secs(2);

/// The accounts that a request may be sent to.
#[derive(Clone, Debug, PartialEq, Eq)]
enum AccountScope {
    /// Any account.
    Any,
    /// The account that last served the client a list, or any other account if that account cannot serve.
    Preferred(OwnerId),
    /// Only the owner of the named resource.
    Pinned(OwnerId, ResourceKind),
}

/// The accounts that may serve a request, and the identifiers that determine them.
#[derive(Debug)]
pub(super) struct AccountAffinity {
    method: Method,
    route: Route,
    path: Arc<str>,
    pub(super) identifiers: RequestIdentifiers,
    response_ownership: ResponseOwnership,
    /// Whether another account may be tried after a 404 response, because such a response has no effect and
    /// no cost.
    may_try_other_accounts: bool,
    /// Whether the request costs no credits.
    is_free: bool,
    has_json_body: bool,
    scope: AccountScope,
    /// Accounts that returned 404 for the named resource.
    accounts_without_resource: Vec<OwnerId>,
    /// Ownership updates that are not written to the usage store yet.
    updates: Vec<OwnershipUpdate>,
}

impl AccountAffinity {
    pub(super) fn new(head: &Parts, endpoint: &Endpoint, identifiers: RequestIdentifiers) -> Self {
        let response_ownership = affinity::response_ownership(&head.method, &endpoint.route);
        Self {
            identifiers,
            may_try_other_accounts: endpoint.effect == Effect::None || affinity::is_speech(&endpoint.route),
            is_free: endpoint.metering == Metering::Free,
            has_json_body: is_json(&head.headers),
            method: head.method.clone(),
            route: endpoint.route,
            // Only the search for identifiers in the response needs the path.
            path: if response_ownership == ResponseOwnership::None {
                Arc::default()
            } else {
                head.uri.path().into()
            },
            response_ownership,
            scope: AccountScope::Any,
            accounts_without_resource: Vec::new(),
            updates: Vec::new(),
        }
    }

    /// Determines the account that must or should serve the request of `client`, unless the pool has only one account.
    /// Waits for a JSON body, up to a maximum size and time, because the body may name an owned resource. If this
    /// replica knows no owner, looks up the owner once in the other replicas.
    ///
    /// # Errors
    ///
    /// Fails when the request names resources of two different accounts.
    pub(super) async fn resolve<C>(
        &mut self,
        proxy: &Proxy<C>,
        roster: &Roster,
        client: &ClientName,
        body: &Replay<Incoming>,
    ) -> Result<(), ConflictingOwners> {
        if !roster.has_several_workspaces() {
            return Ok(());
        }
        if self.has_json_body
            && let BodyStart { bytes, is_complete: true } =
                body.peek_body(request_body::MAX_PARSED_BODY_BYTES, BODY_READ_TIMEOUT).await
        {
            self.identifiers.add_body(&bytes);
        }
        let (owners, replicas) = (&proxy.owners, proxy.replica_owners.as_deref());
        self.scope = match self.find_named_owner(roster, owners, replicas, &proxy.not_found_cache).await? {
            Some((kind, owner)) => AccountScope::Pinned(owner, kind),
            None if self.prefers_account() => {
                let account = find_list_account(proxy, roster, client).await;
                account.map_or(AccountScope::Any, AccountScope::Preferred)
            }
            None => AccountScope::Any,
        };
        // If all accounts returned 404 recently, only one account is tried.
        self.may_try_other_accounts &= !proxy.not_found_cache.contains(&self.identifiers, clock::now());
        Ok(())
    }

    /// Adds the identifiers in a client's message of a WebSocket session, and determines the account again. Does
    /// nothing if the pool has only one account.
    ///
    /// # Errors
    ///
    /// Fails when the session names resources of two accounts.
    pub(super) async fn add_message_identifiers<C>(
        &mut self,
        message: &[u8],
        proxy: &Proxy<C>,
        roster: &Roster,
    ) -> Result<(), ConflictingOwners> {
        if roster.has_several_workspaces() {
            self.identifiers.add_body(message);
            let (owners, replicas) = (&proxy.owners, proxy.replica_owners.as_deref());
            let owner = self.find_named_owner(roster, owners, replicas, &proxy.not_found_cache).await?;
            if let Some((kind, owner)) = owner {
                self.scope = AccountScope::Pinned(owner, kind);
            }
            self.may_try_other_accounts &= !proxy.not_found_cache.contains(&self.identifiers, clock::now());
        }
        Ok(())
    }

    /// Returns the account that owns the named resources, if a replica of the pool knows it.
    async fn find_named_owner(
        &mut self,
        roster: &Roster,
        owners: &OwnershipIndex,
        replicas: Option<&ReplicaOwners>,
        not_found_cache: &NotFoundCache,
    ) -> Result<Option<(ResourceKind, OwnerId)>, ConflictingOwners> {
        let known_owner = self.find_known_owner(roster, owners)?;
        let Some(replicas) = replicas.filter(|_| known_owner.is_none() && !self.identifiers.is_empty())
        else {
            return Ok(known_owner);
        };
        let lookup = replicas.find(&self.identifiers, owners, clock::now());
        // The future is boxed, so that it does not enlarge the futures of requests without a lookup.
        let Some(updates) = Box::pin(lookup).await else { return Ok(None) };
        self.updates.extend(updates);
        not_found_cache.remove(&self.identifiers);
        self.find_known_owner(roster, owners)
    }

    /// Returns the account that owns the named resources, if this replica knows it.
    fn find_known_owner(
        &mut self,
        roster: &Roster,
        owners: &OwnershipIndex,
    ) -> Result<Option<(ResourceKind, OwnerId)>, ConflictingOwners> {
        let now = clock::now();
        let mut known_owners = Vec::new();
        for identifier in self.identifiers.all() {
            let Some(ownership) = owners.find(identifier, now) else { continue };
            // An owner without a key in the pool counts as unknown.
            let Some(owner) = roster.identity_of(&ownership.owner) else { continue };
            known_owners.push((identifier.kind, owner.clone()));
            self.updates.extend(ownership.update.map(OwnershipUpdate::Recorded));
        }
        required_owner(known_owners)
    }

    /// Records that the account of `key`, which serves a session, owns the resources that the session names
    /// and the identifiers in the provider's first message. Returns the updates to write.
    pub(super) fn record_session<C>(
        &mut self,
        proxy: &Proxy<C>,
        key: &Key,
        first_message: &[u8],
    ) -> Vec<OwnershipUpdate> {
        let (owner, now) = (key.workspace().identity().clone(), clock::now());
        proxy.not_found_cache.remove(&self.identifiers);
        let created = affinity::identifiers_in_first_message(first_message);
        let identifiers = created.into_iter().chain(self.proven_identifiers());
        let replicas = proxy.replica_owners.as_deref();
        let record = |identifier| record_owner(&proxy.owners, replicas, identifier, &owner, now);
        let updates = identifiers.filter_map(record);
        self.updates.extend(updates);
        mem::take(&mut self.updates)
    }

    /// Returns whether the request reads an account's lists, or extends them without a charge.
    fn prefers_account(&self) -> bool {
        self.response_ownership == ResponseOwnership::Account
            || (self.response_ownership == ResponseOwnership::Created && self.is_free)
    }

    /// Returns the account that is tried first, or `None` if the request prefers no account.
    pub(super) fn preferred_account(&self) -> Option<&OwnerId> {
        match &self.scope {
            AccountScope::Preferred(owner) => Some(owner),
            AccountScope::Any | AccountScope::Pinned(..) => None,
        }
    }

    /// Returns whether the affinity excludes keys, prefers keys or admits exhausted keys.
    pub(super) fn affects_selection(&self) -> bool {
        self.scope != AccountScope::Any
            || !self.accounts_without_resource.is_empty()
            || self.needs_no_credits()
    }

    /// Returns whether every key may serve the request.
    pub(super) fn is_unrestricted(&self) -> bool {
        !matches!(self.scope, AccountScope::Pinned(..)) && self.accounts_without_resource.is_empty()
    }

    /// Returns whether the request reads or extends an account's resources without a charge.
    fn needs_no_credits(&self) -> bool {
        self.is_free && (self.response_ownership != ResponseOwnership::None || !self.identifiers.is_empty())
    }

    /// Returns the kind of the owned resource, if only its owner may serve the request.
    pub(super) fn pinning_kind(&self) -> Option<ResourceKind> {
        match &self.scope {
            AccountScope::Pinned(_, kind) => Some(*kind),
            AccountScope::Any | AccountScope::Preferred(_) => None,
        }
    }

    /// Returns the eligibility of `key` to serve the request. An account without credits may serve a request that
    /// costs none.
    pub(super) fn eligibility(&self, key: &Key) -> Eligibility {
        let identity = key.workspace().identity();
        let is_allowed = match &self.scope {
            AccountScope::Pinned(owner, _) => identity == owner,
            AccountScope::Any | AccountScope::Preferred(_) => true,
        };
        if !is_allowed || self.accounts_without_resource.contains(identity) {
            return Eligibility::No;
        }
        if self.needs_no_credits() { Eligibility::EvenExhausted } else { Eligibility::Yes }
    }

    /// Records that the account of `key` does not have the named resource. Returns whether another account
    /// may have it and can be tried.
    pub(super) fn record_not_found(&mut self, key: &Key, roster: &Roster) -> bool {
        let identity = key.workspace().identity();
        if self.pinning_kind().is_some() {
            self.add_owner_removal();
            return false;
        }
        if !self.accounts_without_resource.contains(identity) {
            self.accounts_without_resource.push(identity.clone());
        }
        let is_untried =
            |key: &Arc<Key>| !self.accounts_without_resource.contains(key.workspace().identity());
        self.may_try_other_accounts && !self.identifiers.is_empty() && roster.keys().iter().any(is_untried)
    }

    /// Caches for `ttl` that no account has the named resource, unless its owner is known. While the entry is
    /// valid, only one account is tried.
    pub(super) fn cache_not_found(&self, not_found_cache: &NotFoundCache, ttl: Duration) {
        if self.pinning_kind().is_none() && !self.identifiers.is_empty() {
            not_found_cache.insert(&self.identifiers, ttl, clock::now());
        }
    }

    /// Adds the removal of the recorded owner to the updates, so that the next request may try other accounts. Only
    /// a response that must be about the single named resource proves that its owner does not have it.
    fn add_owner_removal(&mut self) {
        let concerns_named_resource =
            affinity::is_speech(&self.route) || self.route.ends_in_only_identifier();
        if let ([identifier], [], true) =
            (&*self.identifiers.path, &*self.identifiers.others, concerns_named_resource)
        {
            self.updates.push(OwnershipUpdate::Removed(*identifier));
        }
    }

    /// Returns whether the response may cause an ownership update. Such a request needs a permit of the usage queue.
    pub(super) fn may_record(&self, endpoint: &Endpoint) -> bool {
        endpoint.metering == Metering::Credits
            || self.response_ownership != ResponseOwnership::None
            || !self.identifiers.is_empty()
            || !self.updates.is_empty()
    }

    /// Records the ownership that the response head proves and the account that served a list. Publishes removed
    /// owners, and caches a 404 response. Returns a recorder for the response body, if the body may contain new
    /// identifiers. Otherwise, queues the updates for the usage store.
    pub(super) fn record_response<C>(
        mut self,
        proxy: &Proxy<C>,
        meta: &RequestMeta,
        limits: &Limits,
        response: &UpstreamResponse,
        key: &Key,
        usage_permit: UsagePermit,
    ) -> Option<OwnershipRecorder> {
        let owner = key.workspace().identity().clone();
        let now = clock::now();
        let replicas = proxy.replica_owners.as_deref();
        for update in &self.updates {
            if let OwnershipUpdate::Removed(identifier) = update {
                proxy.owners.remove(identifier);
                if let Some(replicas) = replicas {
                    replicas.publish(update);
                }
            }
        }
        let UpstreamResponse { head, verdict, .. } = response;
        if *verdict == Verdict::NotFound {
            self.cache_not_found(&proxy.not_found_cache, limits.not_found_ttl);
        }
        let is_served = *verdict == Verdict::Served && head.status.is_success();
        if is_served {
            proxy.not_found_cache.remove(&self.identifiers);
            let identifiers =
                affinity::identifiers_in_headers(&head.headers).into_iter().chain(self.proven_identifiers());
            let record = |identifier| record_owner(&proxy.owners, replicas, identifier, &owner, now);
            self.updates.extend(identifiers.filter_map(record));
            if self.prefers_account()
                && self.pinning_kind().is_none()
                && proxy.list_affinity.record(&meta.client, &owner)
                && let Some(replicas) = replicas
            {
                replicas.record_list_account(&meta.client, &owner);
            }
        }
        let may_contain_identifiers =
            is_served && self.response_ownership != ResponseOwnership::None && is_json(&head.headers);
        if !may_contain_identifiers {
            usage_permit.record_ownership(self.updates);
            return None;
        }
        let encoding =
            head.headers.get(CONTENT_ENCODING).map(|value| value.to_str().unwrap_or("unreadable").to_owned());
        let Self { method, route, path, updates, .. } = self;
        let (owners, max_bytes) = (Arc::clone(&proxy.owners), limits.max_response_scan_size);
        let permit = Some(usage_permit);
        let replica_owners = proxy.replica_owners.clone();
        Some(OwnershipRecorder {
            owners,
            replica_owners,
            owner,
            method,
            route,
            path,
            encoding,
            max_bytes,
            updates,
            permit,
        })
    }

    /// Returns the identifiers in the request that belong to the serving account, as the success of the request
    /// proves.
    fn proven_identifiers(&self) -> Vec<Identifier> {
        if self.method == Method::DELETE {
            return Vec::new();
        }
        if self.accounts_without_resource.is_empty() {
            // Every account may have a shared resource, so the success of the request proves nothing.
            return self.identifiers.path.iter().filter(|named| !named.kind.is_shared()).copied().collect();
        }
        // Another account did not have the resource. If several identifiers are outside the path, it is
        // unknown which of them that account did not have.
        match (self.identifiers.path.as_slice(), self.identifiers.others.as_slice()) {
            ([], [only]) => vec![*only],
            (path, _) => path.to_vec(),
        }
    }
}

/// Returns the account that last served a list to `client`, if a replica of the pool knows it.
async fn find_list_account<C>(proxy: &Proxy<C>, roster: &Roster, client: &ClientName) -> Option<OwnerId> {
    let known_account = proxy.list_affinity.account_for(client);
    let Some(replicas) = proxy.replica_owners.as_ref().filter(|_| known_account.is_none()) else {
        return known_account;
    };
    let account = replicas.find_list_account(client, clock::now()).await?;
    let account = roster.identity_of(&account)?;
    proxy.list_affinity.record(client, account);
    Some(account.clone())
}

/// Returns whether the headers declare a JSON body.
fn is_json(headers: &HeaderMap) -> bool {
    let Some(content_type) = headers.get(CONTENT_TYPE) else { return false };
    let essence = content_type.as_bytes().split(|&byte| byte == b';').next().unwrap_or_default();
    essence.trim_ascii().eq_ignore_ascii_case(b"application/json")
}

#[cfg(test)]
mod tests;

//! Which account must or should serve a request: by the identifiers it names and the lists it
//! reads; and what its response proves about their ownership.

use std::sync::Arc;
use std::time::Duration;

use http::header::{CONTENT_ENCODING, CONTENT_TYPE};
use http::request::Parts;
use http::{HeaderMap, Method};
use hyper::body::Incoming;

use super::config::Limits;
use super::misses::Misses;
use super::request_meta::RequestMeta;
use super::state::Proxy;
use super::upstream_response::UpstreamResponse;
use super::usage::{OwnershipUpdate, UsagePermit};
use crate::body::decode::decoded;
use crate::body::inspect::BodyInspector;
use crate::body::replay::Replay;
use crate::clock;
use crate::elevenlabs::affinity::claim::{TwoOwners, owner};
use crate::elevenlabs::affinity::{self, Kind, Named, Names, Yields};
use crate::elevenlabs::endpoint::{Endpoint, Metering, Route};
use crate::elevenlabs::request_body;
use crate::policy::replay::Effect;
use crate::policy::units::UnixMs;
use crate::policy::verdict::Verdict;
use crate::pool::{Eligibility, Key, OwnerId, OwnershipIndex, Roster};

/// Maximum wait for a JSON body in which an owned identifier may stand; a slower body is streamed
/// without being searched.
const BODY_WAIT_MAX: Duration = Duration::from_secs(2);

/// The accounts that may serve a request.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Scope {
    /// Any account.
    Any,
    /// The account that served the client's lists before; any other when that one cannot serve.
    Preferred(OwnerId),
    /// Only the owner of the named resource.
    Pinned(OwnerId, Kind),
}

/// The identifiers in a request, and the accounts that may serve it.
#[derive(Debug)]
pub(super) struct AccountAffinity {
    method: Method,
    route: Route,
    path: Arc<str>,
    names: Names,
    yields: Yields,
    /// Whether another account may be tried after a 404, which had no effect and no cost.
    may_be_elsewhere: bool,
    is_free: bool,
    has_document: bool,
    scope: Scope,
    /// Accounts that returned 404 for the named resource.
    accounts_without: Vec<OwnerId>,
    /// Ownership changes that are written to the usage store at the next record.
    changes: Vec<OwnershipUpdate>,
}

impl AccountAffinity {
    /// Reads method, route and identifiers from a request head.
    pub(super) fn of(head: &Parts, endpoint: &Endpoint, names: Names) -> Self {
        let yields = affinity::yields(&head.method, &endpoint.route);
        Self {
            names,
            may_be_elsewhere: endpoint.effect == Effect::None || affinity::is_speech(&endpoint.route),
            is_free: endpoint.metering == Metering::Free,
            has_document: is_json(&head.headers),
            method: head.method.clone(),
            route: endpoint.route,
            // The path is needed only to find identifiers in the response.
            path: if yields == Yields::Nothing { Arc::default() } else { head.uri.path().into() },
            yields,
            scope: Scope::Any,
            accounts_without: Vec::new(),
            changes: Vec::new(),
        }
    }

    /// Determines the account that must or should serve the request. A JSON body is awaited within
    /// bounds, as it may name an owned resource.
    ///
    /// # Errors
    ///
    /// When the request names resources of two accounts.
    pub(super) async fn resolve(
        &mut self,
        roster: &Roster,
        owners: &OwnershipIndex,
        misses: &Misses,
        body: &Replay<Incoming>,
        preferred: impl FnOnce() -> Option<OwnerId>,
    ) -> Result<(), TwoOwners> {
        if !roster.has_choice() {
            return Ok(());
        }
        if self.has_document
            && let (start, true) = body.peek_body(request_body::BODY_BYTES_MAX, BODY_WAIT_MAX).await
        {
            self.names.add_body(&start);
        }
        self.scope = match self.claimed_owner(roster, owners)? {
            Some((kind, identity)) => Scope::Pinned(identity, kind),
            None if self.prefers_account() => preferred().map_or(Scope::Any, Scope::Preferred),
            None => Scope::Any,
        };
        // If no account had it recently, one 404 is as good as one of every account.
        self.may_be_elsewhere &= !misses.includes(&self.names, clock::now());
        Ok(())
    }

    /// Adds the identifiers that a message on a socket names.
    ///
    /// # Errors
    ///
    /// When the session names resources of two accounts.
    pub(super) fn add_message_names(
        &mut self,
        message: &[u8],
        roster: &Roster,
        owners: &OwnershipIndex,
        misses: &Misses,
    ) -> Result<(), TwoOwners> {
        if roster.has_choice() {
            self.names.add_body(message);
            self.may_be_elsewhere &= !misses.includes(&self.names, clock::now());
            if let Some((kind, identity)) = self.claimed_owner(roster, owners)? {
                self.scope = Scope::Pinned(identity, kind);
            }
        }
        Ok(())
    }

    /// The account that owns the named resources, if it is known.
    fn claimed_owner(
        &mut self,
        roster: &Roster,
        owners: &OwnershipIndex,
    ) -> Result<Option<(Kind, OwnerId)>, TwoOwners> {
        let now = clock::now();
        let (mut known, mut changes) = (Vec::new(), Vec::new());
        for named in self.names.all() {
            let Some(entry) = owners.find(named, now) else { continue };
            // An owner without a key in the pool counts as unknown.
            let Some(identity) = roster.identity_of(&entry.owner) else { continue };
            known.push((named.kind, identity.clone()));
            changes.extend(entry.update.map(OwnershipUpdate::Recorded));
        }
        self.changes.append(&mut changes);
        owner(known)
    }

    /// Records the ownership that a served session proves for the account of `key`: of the
    /// resources it names, and of the identifiers in its first message. Returns the changes to
    /// write.
    pub(super) fn record_session<C>(
        &mut self,
        proxy: &Proxy<C>,
        key: &Key,
        first: &[u8],
    ) -> Vec<OwnershipUpdate> {
        let (owner, now) = (key.workspace().identity().clone(), clock::now());
        proxy.misses.forget(&self.names);
        let created = affinity::in_first_message(first);
        let proven = created.into_iter().chain(self.proven_names());
        let updates: Vec<_> = proven.filter_map(|named| proxy.owners.record(named, &owner, now)).collect();
        self.changes.extend(updates.into_iter().map(OwnershipUpdate::Recorded));
        std::mem::take(&mut self.changes)
    }

    /// The identifiers that the request names.
    pub(super) fn names(&self) -> &Names {
        &self.names
    }

    /// Whether the request reads or extends an account's lists without a charge.
    fn prefers_account(&self) -> bool {
        self.yields == Yields::Account || (self.yields == Yields::Made && self.is_free)
    }

    /// The account that is tried first.
    pub(super) fn preferred(&self) -> Option<&OwnerId> {
        match &self.scope {
            Scope::Preferred(identity) => Some(identity),
            Scope::Any | Scope::Pinned(..) => None,
        }
    }

    /// Whether keys differ in whether they may or should serve the request.
    pub(super) fn binds(&self) -> bool {
        self.scope != Scope::Any || !self.accounts_without.is_empty() || self.needs_no_credits()
    }

    /// Whether every key may serve the request.
    pub(super) fn is_unrestricted(&self) -> bool {
        !matches!(self.scope, Scope::Pinned(..)) && self.accounts_without.is_empty()
    }

    /// Whether the request reads or extends an account's resources without a charge.
    fn needs_no_credits(&self) -> bool {
        self.is_free && (self.yields != Yields::Nothing || !self.names.is_empty())
    }

    /// The kind of the owned resource, when only its owner may serve the request.
    pub(super) fn pinned_by(&self) -> Option<Kind> {
        match &self.scope {
            Scope::Pinned(_, kind) => Some(*kind),
            Scope::Any | Scope::Preferred(_) => None,
        }
    }

    /// Whether `key` may serve the request. An account without credits may serve a free one.
    pub(super) fn eligibility(&self, key: &Key) -> Eligibility {
        let identity = key.workspace().identity();
        let is_allowed = match &self.scope {
            Scope::Pinned(owner, _) => identity == owner,
            Scope::Any | Scope::Preferred(_) => true,
        };
        if !is_allowed || self.accounts_without.contains(identity) {
            return Eligibility::No;
        }
        if self.needs_no_credits() { Eligibility::EvenExhausted } else { Eligibility::Yes }
    }

    /// Records that the account of `key` does not have the named resource; returns whether another
    /// may.
    pub(super) fn record_missing(&mut self, key: &Key, roster: &Roster) -> bool {
        let identity = key.workspace().identity();
        if self.pinned_by().is_some() {
            self.forget_deleted();
            return false;
        }
        if !self.accounts_without.contains(identity) {
            self.accounts_without.push(identity.clone());
        }
        let is_left = |key: &Arc<Key>| !self.accounts_without.contains(key.workspace().identity());
        self.may_be_elsewhere && !self.names.is_empty() && roster.keys().iter().any(is_left)
    }

    /// Remembers for `ttl` that no account has the named resource, unless its owner is known:
    /// meanwhile one account is tried and not all of them.
    pub(super) fn remember_miss(&self, misses: &Misses, ttl: Duration, now: UnixMs) {
        if self.pinned_by().is_none() && !self.names.is_empty() {
            misses.remember(&self.names, ttl, now);
        }
    }

    /// Forgets an owner that no longer has the resource, so that the next request may try other
    /// accounts.
    fn forget_deleted(&mut self) {
        let is_about_named = affinity::is_speech(&self.route) || self.route.is_about_one();
        if let ([named], true, true) =
            (self.names.path.as_slice(), self.names.others.is_empty(), is_about_named)
        {
            self.changes.push(OwnershipUpdate::Forgotten(*named));
        }
    }

    /// Whether ownership may be recorded or forgotten, which needs a permit of the usage queue.
    pub(super) fn may_record(&self, endpoint: &Endpoint) -> bool {
        endpoint.metering == Metering::Credits
            || self.yields != Yields::Nothing
            || !self.names.is_empty()
            || !self.changes.is_empty()
    }

    /// Records the ownership that the response head proves. Returns a recorder for the response
    /// body, which then takes `permit`, if the body may give identifiers.
    pub(super) fn record<C>(
        mut self,
        proxy: &Proxy<C>,
        meta: &RequestMeta,
        limits: &Limits,
        response: &UpstreamResponse,
        key: &Key,
        permit: UsagePermit,
    ) -> Option<OwnershipRecorder> {
        let owner = key.workspace().identity().clone();
        let now = clock::now();
        for change in &self.changes {
            if let OwnershipUpdate::Forgotten(named) = change {
                proxy.owners.forget(named);
            }
        }
        let UpstreamResponse { head, verdict, .. } = response;
        if *verdict == Verdict::NotFound {
            self.remember_miss(&proxy.misses, limits.not_found_ttl, now);
        }
        let is_served = *verdict == Verdict::Served && head.status.is_success();
        if is_served {
            proxy.misses.forget(&self.names);
            let proven = affinity::in_headers(&head.headers).into_iter().chain(self.proven_names());
            let updates = proven.filter_map(|named| proxy.owners.record(named, &owner, now));
            self.changes.extend(updates.map(OwnershipUpdate::Recorded));
            if self.prefers_account() && self.pinned_by().is_none() {
                proxy.list_affinity.record(&meta.client, &owner);
            }
        }
        let gives_document = is_served && self.yields != Yields::Nothing && is_json(&head.headers);
        if !gives_document {
            permit.record_ownership(self.changes);
            return None;
        }
        let encoding =
            head.headers.get(CONTENT_ENCODING).map(|value| value.to_str().unwrap_or("unreadable").to_owned());
        let Self { method, route, path, changes, .. } = self;
        let bytes_max = limits.max_response_scan_size;
        let owners = Arc::clone(&proxy.owners);
        Some(OwnershipRecorder {
            owners,
            owner,
            method,
            route,
            path,
            encoding,
            bytes_max,
            changes,
            permit: Some(permit),
        })
    }

    /// The named identifiers that a success proves to belong to the serving account.
    fn proven_names(&self) -> Vec<Named> {
        if self.method == Method::DELETE {
            return Vec::new();
        }
        if self.accounts_without.is_empty() {
            // A resource that every account may have proves nothing.
            return self.names.path.iter().filter(|named| !named.kind.is_shared()).copied().collect();
        }
        // Another account did not have it. Of several identifiers outside the path, it is unknown
        // which one was missing.
        match (self.names.path.as_slice(), self.names.others.as_slice()) {
            ([], [only]) => vec![*only],
            (path, _) => path.to_vec(),
        }
    }
}

/// Records the ownership of identifiers in a response body. The changes from the response head are
/// written with it, or when it is dropped without a body.
#[derive(Debug)]
pub struct OwnershipRecorder {
    owners: Arc<OwnershipIndex>,
    owner: OwnerId,
    method: Method,
    route: Route,
    path: Arc<str>,
    encoding: Option<String>,
    bytes_max: usize,
    changes: Vec<OwnershipUpdate>,
    permit: Option<UsagePermit>,
}

impl OwnershipRecorder {
    /// Maximum bytes of the body that are copied.
    pub(super) fn bytes_max(&self) -> usize {
        self.bytes_max
    }
}

impl BodyInspector for OwnershipRecorder {
    fn inspect(mut self, body: &[u8]) {
        let Some(document) = decoded(body, self.encoding.as_deref(), self.bytes_max) else { return };
        let now = clock::now();
        let created = affinity::in_response(&self.method, &self.route, &self.path, &document);
        let proven = created.into_iter().filter_map(|named| self.owners.record(named, &self.owner, now));
        self.changes.extend(proven.map(OwnershipUpdate::Recorded));
    }
}

impl Drop for OwnershipRecorder {
    fn drop(&mut self) {
        if let Some(permit) = self.permit.take() {
            permit.record_ownership(std::mem::take(&mut self.changes));
        }
    }
}

fn is_json(headers: &HeaderMap) -> bool {
    let Some(value) = headers.get(CONTENT_TYPE) else { return false };
    let essence = value.as_bytes().split(|&byte| byte == b';').next().unwrap_or_default();
    essence.trim_ascii().eq_ignore_ascii_case(b"application/json")
}

//! Tests that other replicas find the owners and list accounts that one replica records, but not a removed owner. Also
//! tests that a lookup without a result is not repeated for its TTL. [`FakeReplicas`] share one table. The tests of
//! `account_affinity` use them as well.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::*;
use crate::elevenlabs::affinity::RetentionLimits;
use crate::proxy::replica_link::{LinkFuture, QuotaReply, QuotaStatement};
use crate::secret::Fingerprint;

const NOW: UnixMs = UnixMs(1_796_000_000_000);
pub(in crate::proxy) const LIMITS: RetentionLimits =
    RetentionLimits { max_identifiers: 1_000, max_idle: None };

/// The owners and list accounts that all replicas have recorded, as one shared table.
#[derive(Debug, Default)]
pub(in crate::proxy) struct FakeReplicas {
    owners: Mutex<HashMap<IdentifierHash, OwnerId>>,
    lists: Mutex<HashMap<ClientName, OwnerId>>,
    lookups: AtomicUsize,
    is_down: AtomicBool,
}

impl FakeReplicas {
    /// Returns the number of lookups so far.
    pub(in crate::proxy) fn lookup_count(&self) -> usize {
        self.lookups.load(Ordering::Acquire)
    }

    /// Counts a lookup, and returns its result. While the link is down, the result is [`LookupResult::Unknown`].
    fn reply<T>(&self, lookup_result: LookupResult<T>) -> LinkFuture<'_, LookupResult<T>>
    where
        T: Send + 'static,
    {
        self.lookups.fetch_add(1, Ordering::AcqRel);
        let lookup_result =
            if self.is_down.load(Ordering::Acquire) { LookupResult::Unknown } else { lookup_result };
        Box::pin(std::future::ready(lookup_result))
    }
}

impl ReplicaLink for FakeReplicas {
    fn replicas(&self) -> u32 {
        2
    }

    fn find_owners<'a>(
        &'a self,
        identifiers: &'a [Identifier],
    ) -> LinkFuture<'a, LookupResult<Vec<FoundOwner>>> {
        let owners = self.owners.lock().unwrap();
        let found_owners = identifiers.iter().filter_map(|identifier| {
            let owner = owners.get(&identifier.hash)?.clone();
            Some(FoundOwner { identifier: *identifier, owner })
        });
        let found_owners: Vec<_> = found_owners.collect();
        self.reply(if found_owners.is_empty() {
            LookupResult::Absent
        } else {
            LookupResult::Known(found_owners)
        })
    }

    fn record_owner(&self, identifier: Identifier, owner: &OwnerId) {
        self.owners.lock().unwrap().insert(identifier.hash, owner.clone());
    }

    fn remove_owner(&self, identifier: Identifier) {
        self.owners.lock().unwrap().remove(&identifier.hash);
    }

    fn find_list_account<'a>(&'a self, client: &'a ClientName) -> LinkFuture<'a, LookupResult<OwnerId>> {
        let account = self.lists.lock().unwrap().get(client).cloned();
        self.reply(account.map_or(LookupResult::Absent, LookupResult::Known))
    }

    fn record_list_account(&self, client: &ClientName, owner: &OwnerId) {
        self.lists.lock().unwrap().insert(client.clone(), owner.clone());
    }

    fn extend_grant<'a>(&'a self, _: &'a QuotaStatement) -> LinkFuture<'a, QuotaReply> {
        Box::pin(std::future::ready(QuotaReply::Unknown))
    }
}

fn owner(name: &str) -> OwnerId {
    OwnerId::new(Some(name), Fingerprint::new("sk"))
}

fn speech_identifiers(voice: &str) -> RequestIdentifiers {
    RequestIdentifiers::parse(&format!("/v1/text-to-speech/{voice}"), None)
}

/// A replica with its own index of owners.
struct Replica {
    index: OwnershipIndex,
    owners: ReplicaOwners,
}

fn replica(fake_replicas: &Arc<FakeReplicas>) -> Replica {
    let link: Arc<dyn ReplicaLink> = fake_replicas.clone();
    Replica { index: OwnershipIndex::new(LIMITS), owners: ReplicaOwners::new(link) }
}

impl Replica {
    async fn find(&self, identifiers: &RequestIdentifiers, now: UnixMs) -> Option<Vec<OwnershipUpdate>> {
        self.owners.find(identifiers, &self.index, now).await
    }
}

fn first_identifier(identifiers: &RequestIdentifiers) -> Identifier {
    *identifiers.all().next().unwrap()
}

#[tokio::test]
async fn an_owner_that_one_replica_records_is_found_by_another_replica_in_one_lookup() {
    let fake_replicas = Arc::new(FakeReplicas::default());
    let (first, second) = (replica(&fake_replicas), replica(&fake_replicas));
    let mut named = speech_identifiers("cloned");
    let voice = first_identifier(&named);
    record_owner(&first.index, Some(&first.owners), voice, &owner("a"), NOW).unwrap();
    assert_eq!(record_owner(&first.index, Some(&first.owners), voice, &owner("a"), NOW), None);
    named.add_body(br#"{"previous_request_ids":["r1"]}"#);
    assert!(named.all().count() > 1);
    let updates = second.find(&named, NOW).await.unwrap();
    assert!(
        matches!(&*updates, [OwnershipUpdate::Recorded(entry)] if entry.owner == owner("a")),
        "the update must contain the owner, not {updates:?}"
    );
    assert_eq!(second.index.find(&voice, NOW).unwrap().owner, owner("a"));
    assert_eq!(fake_replicas.lookup_count(), 1);
    assert_eq!(second.find(&named, NOW).await, None, "no identifier may need another lookup");
    assert_eq!(fake_replicas.lookup_count(), 1);
}

#[tokio::test]
async fn an_identifier_without_an_owner_is_looked_up_once_in_ten_seconds() {
    let fake_replicas = Arc::new(FakeReplicas::default());
    let replica = replica(&fake_replicas);
    for (second, lookups) in [(0, 1), (9, 1), (10, 2)] {
        assert_eq!(
            replica.find(&speech_identifiers("premade"), NOW.plus(Duration::from_secs(second))).await,
            None
        );
        assert_eq!(
            fake_replicas.lookup_count(),
            lookups,
            "{lookups} lookups must be sent up to second {second}"
        );
    }
    fake_replicas.is_down.store(true, Ordering::Release);
    for lookups in [3, 4] {
        assert_eq!(replica.find(&speech_identifiers("other"), NOW).await, None);
        assert_eq!(fake_replicas.lookup_count(), lookups, "a missing reply must not be cached");
    }
}

#[tokio::test]
async fn a_removed_owner_is_not_found_by_a_lookup() {
    let fake_replicas = Arc::new(FakeReplicas::default());
    let replica = replica(&fake_replicas);
    let voice = first_identifier(&speech_identifiers("cloned"));
    record_owner(&OwnershipIndex::new(LIMITS), Some(&replica.owners), voice, &owner("a"), NOW).unwrap();
    replica.owners.publish(&OwnershipUpdate::Removed(voice));
    assert_eq!(replica.find(&speech_identifiers("cloned"), NOW).await, None);
}

#[tokio::test]
async fn an_unknown_list_account_is_looked_up_once_a_minute() {
    let fake_replicas = Arc::new(FakeReplicas::default());
    let (first, second) = (replica(&fake_replicas), replica(&fake_replicas));
    let (app, other) = (ClientName::new("app"), ClientName::new("other"));
    first.owners.record_list_account(&app, &owner("a"));
    assert_eq!(second.owners.find_list_account(&app, NOW).await, Some(owner("a")));
    for (second_of_minute, lookups) in [(0, 2), (59, 2), (60, 3)] {
        let now = NOW.plus(Duration::from_secs(second_of_minute));
        assert_eq!(second.owners.find_list_account(&other, now).await, None);
        assert_eq!(fake_replicas.lookup_count(), lookups);
    }
}

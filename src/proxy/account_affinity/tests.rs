//! Tests the lookup of a voice's owner in other replicas. An owner that another replica has recorded pins the request
//! to its account, but only if this replica has a key of that account.

use http::Request;
use http::header::HOST;

use super::*;
use crate::pool::{Pool, Settings};
use crate::proxy::head;
use crate::proxy::replica_link::ReplicaLink;
use crate::proxy::replica_owners::tests::{FakeReplicas, LIMITS};
use crate::secret::ApiKey;

fn roster_of_two_accounts() -> Arc<Roster> {
    let keys = ["sk_of_the_first_account_000000000001", "sk_of_the_second_account_00000000002"];
    let entries = keys.iter().map(|key| ApiKey::new(key).unwrap().into());
    Pool::new(entries.collect(), Settings::FOR_TESTS).roster()
}

fn affinity_of_speech() -> AccountAffinity {
    let request = Request::post("/v1/text-to-speech/cloned").header(HOST, "localhost").body(()).unwrap();
    let (mut head, ()) = request.into_parts();
    let (endpoint, identifiers, _) = head::route(&mut head, false).unwrap();
    AccountAffinity::new(&head, &endpoint, identifiers)
}

#[tokio::test]
async fn a_voice_that_another_replica_has_recorded_pins_the_request_to_its_account() {
    let roster = roster_of_two_accounts();
    let owner = roster.keys()[1].workspace().identity().clone();
    let fake_replicas = Arc::new(FakeReplicas::default());
    let link: Arc<dyn ReplicaLink> = fake_replicas.clone();
    let replicas = ReplicaOwners::new(link);
    let (owners, not_found_cache) = (OwnershipIndex::new(LIMITS), NotFoundCache::default());
    let mut affinity = affinity_of_speech();
    not_found_cache.insert(&affinity.identifiers, Duration::from_secs(60), clock::now());
    let found_owner = affinity.find_named_owner(&roster, &owners, None, &not_found_cache).await.unwrap();
    assert_eq!(found_owner, None, "without other replicas, no owner must be found");
    fake_replicas.record_owner(affinity.identifiers.path[0], &owner);
    let found_owner =
        affinity.find_named_owner(&roster, &owners, Some(&replicas), &not_found_cache).await.unwrap();
    assert_eq!(found_owner, Some((ResourceKind::Voice, owner.clone())), "the recorded owner must be found");
    assert!(matches!(&*affinity.updates, [OwnershipUpdate::Recorded(entry)] if entry.owner == owner));
    let is_missing = not_found_cache.contains(&affinity.identifiers, clock::now());
    assert!(!is_missing, "a known owner must clear the cached 404 response");
    let mut next_affinity = affinity_of_speech();
    let found_owner = next_affinity.find_named_owner(&roster, &owners, None, &not_found_cache).await.unwrap();
    assert_eq!(
        found_owner,
        Some((ResourceKind::Voice, owner)),
        "this replica must know the owner without another lookup"
    );
}

#[tokio::test]
async fn an_owner_without_a_key_at_this_replica_pins_no_request() {
    let fake_replicas = Arc::new(FakeReplicas::default());
    let link: Arc<dyn ReplicaLink> = fake_replicas.clone();
    let replicas = ReplicaOwners::new(link);
    let (owners, not_found_cache) = (OwnershipIndex::new(LIMITS), NotFoundCache::default());
    let mut affinity = affinity_of_speech();
    fake_replicas.record_owner(affinity.identifiers.path[0], &OwnerId::from_stored("elsewhere"));
    for _ in 0..2 {
        let found_owner = affinity
            .find_named_owner(&roster_of_two_accounts(), &owners, Some(&replicas), &not_found_cache)
            .await;
        assert_eq!(found_owner, Ok(None));
    }
    assert_eq!(fake_replicas.lookup_count(), 1, "the known owner must not be looked up again");
}

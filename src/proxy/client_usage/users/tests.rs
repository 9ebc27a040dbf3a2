//! Tests quotas per user with a usage store in memory: exact quotas, the stored usage that is read once, failed reads,
//! the removal of idle users from memory, and reloads. A usage record keeps its user in memory until the record is
//! written. The tests write a record by dropping it.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use proptest::prelude::*;
use tokio::runtime::{self, Runtime};
use tokio::sync::Semaphore;

use super::*;
use crate::policy::charge::{Billing, ChargeOutcome};
use crate::policy::client::{AnonymousAccess, Client, Clients, Rules};
use crate::policy::client_quota::{ClientQuota, Period, QuotaUnit};
use crate::proxy::client_usage::{AdmissionRequest, ClientLimitExceeded, ClientPermit, ClientUsage};

const NOW: UnixMs = UnixMs(1_796_000_000_000);
const METERED: AdmissionRequest = AdmissionRequest {
    billing: Billing::Metered,
    grants_direct_access: false,
    is_charged: true,
    max_concurrent: 10_000,
};
/// The quota of the users in these tests: 3 requests.
const QUOTA: ClientQuota = ClientQuota { amount: 3, unit: QuotaUnit::Requests, period: Period::Total };

/// The usage of users in the usage store.
#[derive(Debug)]
struct StoredUsers {
    requests: Mutex<HashMap<UserFingerprint, u64>>,
    reads: AtomicUsize,
    /// Each read holds a permit.
    read_permits: Semaphore,
}

impl StoredUsers {
    fn new(read_permits: usize) -> Arc<Self> {
        let read_permits = Semaphore::new(read_permits);
        Arc::new(Self { requests: Mutex::default(), reads: AtomicUsize::new(0), read_permits })
    }

    fn add(&self, user: UserFingerprint, requests: u64) {
        *self.requests.lock().unwrap().entry(user).or_default() += requests;
    }

    fn requests_of(&self, user: UserFingerprint) -> u64 {
        self.requests.lock().unwrap().get(&user).copied().unwrap_or(0)
    }
}

impl UserUsageReader for StoredUsers {
    fn read_user_usage<'a>(
        &'a self,
        client: &'a ClientName,
        user: UserFingerprint,
        _: UnixMs,
    ) -> UserUsageFuture<'a> {
        Box::pin(async move {
            self.reads.fetch_add(1, Ordering::AcqRel);
            let _permit = self.read_permits.acquire().await.map_err(|_| UserUsageUnavailable)?;
            let requests = self.requests_of(user);
            Ok(UsageTotals { client: client.clone(), requests: [requests; 3], credits: [0; 3] })
        })
    }
}

/// A client with a quota per user. `store` contains the usage of its users.
struct TestClient {
    store: Arc<StoredUsers>,
    usage: ClientUsage,
    client: Client,
}

impl TestClient {
    fn new(store: Arc<StoredUsers>) -> Self {
        let clients = Clients::new(Vec::new(), AnonymousAccess::Refused);
        let reader: Arc<dyn UserUsageReader> = store.clone();
        let usage = ClientUsage::new(&clients, &[], reader, NOW);
        let rules = Rules { user_quota: Some(QUOTA), ..Rules::default() };
        Self { store, usage, client: Client { name: ClientName::new("local"), rules } }
    }

    async fn load(
        &self,
        user: UserFingerprint,
        max_cached: usize,
    ) -> Result<RequestUser, UserUsageUnavailable> {
        self.usage.load_user(&self.client.name, user, max_cached, NOW).await
    }

    /// Admits a request of a user.
    async fn admit(
        &self,
        user: u64,
        max_cached: usize,
    ) -> Result<(ClientPermit, RequestUser), ClientLimitExceeded> {
        let user = self.load(user_fingerprint(user), max_cached).await.unwrap();
        let mut permit = self.usage.admit(&self.client, METERED, NOW).await?;
        permit.admit_user(&user, QUOTA, METERED, NOW).await?;
        Ok((permit, user))
    }

    /// Ends a request, and returns its record, which keeps the user in memory.
    fn end(&self, (permit, user): (ClientPermit, RequestUser), outcome: ChargeOutcome) -> UsageRecord {
        let requests = permit.charge(outcome, None, NOW).requests;
        UsageRecord { store: Arc::clone(&self.store), user, requests }
    }

    fn users_in_memory(&self) -> usize {
        self.usage.by_name[&self.client.name].users().len()
    }
}

/// A usage record, which is written when it is dropped.
struct UsageRecord {
    store: Arc<StoredUsers>,
    user: RequestUser,
    requests: u64,
}

impl Drop for UsageRecord {
    fn drop(&mut self) {
        self.store.add(self.user.fingerprint(), self.requests);
    }
}

fn user_fingerprint(number: u64) -> UserFingerprint {
    UserFingerprint::new("local", &number.to_be_bytes())
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime: Runtime = runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(future)
}

#[test]
fn the_fourth_request_of_a_user_is_refused_and_another_user_is_admitted() {
    let test_client = TestClient::new(StoredUsers::new(1));
    test_client.store.add(user_fingerprint(1), 1);
    block_on(async {
        for _ in 0..2 {
            drop(test_client.end(test_client.admit(1, 10).await.unwrap(), ChargeOutcome::Served));
        }
        let refused = test_client.admit(1, 10).await.unwrap_err();
        assert!(
            matches!(refused, ClientLimitExceeded::UserQuota(_)),
            "the quota of the user must refuse the request, not {refused:?}"
        );
        let other_permit = test_client.admit(2, 10).await.unwrap();
        // A refusal of the provider costs nothing.
        drop(test_client.end(other_permit, ChargeOutcome::Refused));
        assert_eq!(test_client.store.requests_of(user_fingerprint(1)), 3);
        assert_eq!(test_client.store.requests_of(user_fingerprint(2)), 0);
        let totals =
            test_client.usage.user_totals(&test_client.client, user_fingerprint(1), 10, NOW).await.unwrap();
        assert_eq!(totals.requests, [3; 3]);
    });
    assert_eq!(test_client.store.reads.load(Ordering::Acquire), 2, "each user must be read once");
}

#[test]
fn a_request_that_the_user_quota_refuses_is_not_counted_for_the_client() {
    let test_client = TestClient::new(StoredUsers::new(1));
    test_client.store.add(user_fingerprint(1), 3);
    block_on(async {
        assert!(test_client.admit(1, 10).await.is_err());
    });
    assert_eq!(test_client.usage.totals(&test_client.client.name, NOW).requests, [0; 3]);
}

#[test]
fn idle_users_above_the_maximum_are_removed_from_memory() {
    let test_client = TestClient::new(StoredUsers::new(1));
    block_on(async {
        let mut records = Vec::new();
        for user in 0..5_000 {
            let record = test_client.end(test_client.admit(user, 100).await.unwrap(), ChargeOutcome::Served);
            // Every hundredth record is not written yet.
            if user % 100 == 0 {
                records.push(record);
            }
            assert!(
                test_client.users_in_memory() <= 100 + 4 * records.len(),
                "at most 100 users and 4 for each unwritten record must be in memory, not {}",
                test_client.users_in_memory()
            );
        }
        // Users with an unwritten record stay in memory, so they need no read, and no usage is lost.
        let reads = test_client.store.reads.load(Ordering::Acquire);
        assert_eq!(reads, 5_000);
        for user in (0..5_000).step_by(100) {
            drop(test_client.end(test_client.admit(user, 100).await.unwrap(), ChargeOutcome::Served));
        }
        assert_eq!(test_client.store.reads.load(Ordering::Acquire), reads);
        drop(records);
        for user in 10_000..10_300 {
            drop(test_client.end(test_client.admit(user, 100).await.unwrap(), ChargeOutcome::Served));
        }
        assert!(test_client.users_in_memory() <= 100, "users whose records are written must be removed");
    });
}

#[test]
fn concurrent_first_requests_of_a_user_share_one_read() {
    let store = StoredUsers::new(0);
    let test_client = TestClient::new(Arc::clone(&store));
    store.add(user_fingerprint(1), 2);
    block_on(async {
        let admit_all = async {
            let (first, second, third) =
                tokio::join!(test_client.admit(1, 1), test_client.admit(1, 1), test_client.admit(1, 1));
            let admitted = [first, second, third].into_iter().filter(Result::is_ok).count();
            assert_eq!(admitted, 1, "only the last request of the quota must be admitted");
        };
        let release = async {
            tokio::task::yield_now().await;
            store.read_permits.add_permits(1);
        };
        tokio::join!(admit_all, release);
    });
    assert_eq!(store.reads.load(Ordering::Acquire), 1);
}

#[test]
fn a_request_whose_read_fails_is_refused_and_the_next_one_reads_again() {
    let store = StoredUsers::new(1);
    let test_client = TestClient::new(Arc::clone(&store));
    let failing_client = TestClient::new(Arc::new(StoredUsers {
        requests: Mutex::default(),
        reads: AtomicUsize::new(0),
        read_permits: {
            let closed = Semaphore::new(0);
            closed.close();
            closed
        },
    }));
    block_on(async {
        for reads in 1..3 {
            assert_eq!(failing_client.load(user_fingerprint(1), 10).await.unwrap_err(), UserUsageUnavailable);
            assert_eq!(failing_client.store.reads.load(Ordering::Acquire), reads);
        }
        assert!(test_client.load(user_fingerprint(1), 10).await.is_ok());
    });
}

#[test]
fn a_reload_without_a_quota_per_user_removes_the_users() {
    let clients = |user_quota| {
        let rules = Rules { user_quota, ..Rules::default() };
        let client = Client { name: ClientName::new("app"), rules };
        Clients::new(
            vec![(client, crate::secret::TokenFingerprint::new("t").into())],
            AnonymousAccess::Refused,
        )
    };
    let store = StoredUsers::new(1);
    let reader: Arc<dyn UserUsageReader> = store.clone();
    let usage = ClientUsage::new(&clients(Some(QUOTA)), &[], reader, NOW);
    let app = ClientName::new("app");
    block_on(async {
        for (user_quota, reads) in [(Some(QUOTA), 1), (None, 2)] {
            usage.load_user(&app, user_fingerprint(1), 10, NOW).await.unwrap();
            let reloaded = usage.with_clients(&clients(user_quota));
            reloaded.load_user(&app, user_fingerprint(1), 10, NOW).await.unwrap();
            assert_eq!(store.reads.load(Ordering::Acquire), reads);
        }
    });
}

/// A step in the lifecycle of a user's request.
#[derive(Clone, Debug)]
enum Step {
    Begin(u64),
    End(usize, bool),
    Write(usize),
    Disconnect(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let index = 0..6_usize;
    prop_oneof![
        4 => (0..7_u64).prop_map(Step::Begin),
        3 => (index.clone(), any::<bool>()).prop_map(|(index, is_served)| Step::End(index, is_served)),
        3 => index.clone().prop_map(Step::Write),
        1 => index.prop_map(Step::Disconnect),
    ]
}

proptest! {
    /// In any order of requests, writes and removals from a small table, every user gets exactly its quota.
    #[test]
    fn each_user_gets_exactly_its_quota(steps in prop::collection::vec(step(), 0..150), max in 1..5_usize) {
        let test_client = TestClient::new(StoredUsers::new(1));
        let (mut running, mut unwritten) = (Vec::new(), Vec::new());
        let (mut charged, mut in_progress) = ([0_u64; 7], [0_u64; 7]);
        block_on(async {
            for step in steps {
                match step {
                    Step::Begin(user) => {
                        let index = usize::try_from(user).unwrap();
                        let has_quota = charged[index] + in_progress[index] < QUOTA.amount;
                        match test_client.admit(user, max).await {
                            Ok(request) => {
                                prop_assert!(has_quota, "user {user} must not exceed its quota");
                                in_progress[index] += 1;
                                running.push((index, request));
                            }
                            Err(_) => {
                                prop_assert!(!has_quota, "user {user} must be able to use its whole quota");
                            }
                        }
                    }
                    Step::End(at, is_served) if at < running.len() => {
                        let (index, request) = running.swap_remove(at);
                        in_progress[index] -= 1;
                        charged[index] += u64::from(is_served);
                        let outcome = if is_served { ChargeOutcome::Served } else { ChargeOutcome::Refused };
                        unwritten.push(test_client.end(request, outcome));
                    }
                    Step::Write(at) if at < unwritten.len() => drop(unwritten.swap_remove(at)),
                    Step::Disconnect(at) if at < running.len() => {
                        in_progress[running[at].0] -= 1;
                        drop(running.swap_remove(at));
                    }
                    Step::End(..) | Step::Write(_) | Step::Disconnect(_) => {}
                }
            }
            Ok(())
        })?;
        drop((running, unwritten));
        for (user, charged) in (0..).zip(charged) {
            prop_assert_eq!(test_client.store.requests_of(user_fingerprint(user)), charged);
        }
    }
}

#[test]
fn parallel_requests_exceed_neither_user_quotas_nor_the_table_size() {
    let test_client = TestClient::new(StoredUsers::new(4));
    let (served, largest_table) = (AtomicU64::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for thread in 0..8_u64 {
            let (test_client, served, largest_table) = (&test_client, &served, &largest_table);
            scope.spawn(move || {
                block_on(async {
                    for turn in 0..600_u64 {
                        // Twenty users that all threads share, and one that is not named again.
                        let user = if turn % 3 == 0 { 1_000 + thread * 1_000 + turn } else { turn % 20 };
                        if let Ok(request) = test_client.admit(user, 8).await {
                            drop(test_client.end(request, ChargeOutcome::Served));
                            served.fetch_add(1, Ordering::AcqRel);
                        }
                        largest_table.fetch_max(test_client.users_in_memory(), Ordering::AcqRel);
                    }
                });
            });
        }
    });
    for user in 0..20 {
        assert_eq!(
            test_client.store.requests_of(user_fingerprint(user)),
            3,
            "user {user} must use its whole quota"
        );
    }
    assert_eq!(served.into_inner(), 20 * 3 + 8 * 200);
    assert!(largest_table.into_inner() <= 8 + 4 * 8);
}

//! Tests of stored refusals: restarts and renamed workspaces keep them, their number is limited, and they contain no
//! secrets. Expired and unreadable refusals are ignored, and refusals from the future start at the current time. A
//! failed transaction is repeated, and a database of an earlier version without refusals is migrated.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use proptest::sample::select;

use super::*;
use crate::elevenlabs::affinity::{Identifier, ResourceKind};
use crate::elevenlabs::endpoint::Route;
use crate::elevenlabs::features::{Limit, RequestFeatures};
use crate::elevenlabs::plan::Capabilities;
use crate::policy::client::ClientName;
use crate::policy::concurrency_group::ConcurrencyGroup;
use crate::policy::evidence::RefusalSource;
use crate::policy::permission::Permission;
use crate::policy::quota::Quota;
use crate::policy::replay::Effect;
use crate::policy::verdict::{Shortfall, Subject, UnexplainedRefusal, Verdict};
use crate::pool::{
    KeyEntry, KeyRequest, Observation, OwnerId, Pool, RefusalHistory, RefusedAttempt, Restriction,
    RestrictionLevel, RestrictionScope, Settings,
};
use crate::proxy::UsageBatch;
use crate::secret::{ApiKey, Fingerprint};
use crate::store::database::Database;
use crate::store::open::{IntegrityCheck, open};
use crate::store::outbox::MirrorScope;
use crate::store::{DatabaseLocation, Store, UsageReader, read as stored, schema, transaction};

const NOW: UnixMs = UnixMs(1_796_000_000_000);
const SETTINGS: Settings = Settings {
    endpoint_cooldown: Duration::from_secs(1_200),
    unproven_cooldown: Duration::from_secs(60),
    permission_cooldown: Duration::from_secs(1_800),
    rate_limited_cooldown: Duration::from_secs(90),
    concurrency_cooldown: Duration::from_secs(2),
    ..Settings::FOR_TESTS
};
const VOICE: &str = "AVoiceOfTheTests0001";

/// Returns four keys. The last two belong to the same workspace.
fn entries() -> Vec<KeyEntry> {
    let entry = |(number, workspace): (usize, Option<&str>)| {
        let key = ApiKey::new(&format!("sk_canary_of_the_refusals_{number:026}")).unwrap();
        KeyEntry { workspace: workspace.map(str::to_owned), ..key.into() }
    };
    [None, None, Some("studio"), Some("studio")].into_iter().enumerate().map(entry).collect()
}

fn pool() -> Arc<Pool> {
    Arc::new(Pool::new(entries(), SETTINGS))
}

fn features() -> RequestFeatures {
    RequestFeatures {
        route: Route::parse("/v1/text-to-speech/x"),
        effect: Effect::Some,
        voice: Some(Identifier::new(ResourceKind::Voice, VOICE).hash),
        model: Some("eleven_v3".into()),
        output_format: Some("pcm_44100".into()),
        characters: Some(900),
        permission: Permission::parse("text_to_speech"),
        adds_voice: false,
    }
}

/// Returns the features of a request, and variants of them.
fn requests() -> Vec<RequestFeatures> {
    let base = features();
    vec![
        RequestFeatures { voice: None, model: None, output_format: None, characters: None, ..base.clone() },
        RequestFeatures { voice: Some(Identifier::new(ResourceKind::Voice, "other").hash), ..base.clone() },
        RequestFeatures { characters: Some(40), ..base.clone() },
        RequestFeatures { output_format: None, permission: None, ..base.clone() },
        RequestFeatures { route: Route::parse("/v1/voices/add"), adds_voice: true, ..base.clone() },
        RequestFeatures { effect: Effect::None, ..base.clone() },
        base,
    ]
}

/// Returns the verdict after `verdict` in a chain of all verdicts. The `match` has no wildcard, so a new verdict does
/// not compile until it has a place in the chain and is tested.
fn next_verdict(verdict: Verdict) -> Option<Verdict> {
    Some(match verdict {
        Verdict::Served => Verdict::WorkspaceQuota(Shortfall::default()),
        Verdict::WorkspaceQuota(_) => Verdict::KeyQuota(Shortfall::default()),
        Verdict::KeyQuota(_) => Verdict::InvalidKey,
        Verdict::InvalidKey => Verdict::WrongHost,
        Verdict::WrongHost => Verdict::MissingPermission(None),
        Verdict::MissingPermission(_) => Verdict::PlanFeature(Subject::Voice),
        Verdict::PlanFeature(subject) => match subject {
            Subject::Voice => Verdict::PlanFeature(Subject::Model),
            Subject::Model => Verdict::PlanFeature(Subject::OutputFormat),
            Subject::OutputFormat => Verdict::PlanFeature(Subject::Cloning),
            Subject::Cloning => Verdict::PlanFeature(Subject::TextLength),
            Subject::TextLength => Verdict::PlanFeature(Subject::Endpoint),
            Subject::Endpoint => Verdict::PlanFeature(Subject::Unnamed),
            Subject::Unnamed => Verdict::Slots,
        },
        Verdict::Slots => Verdict::Billing,
        Verdict::Billing => Verdict::Abuse,
        Verdict::Abuse => Verdict::RateLimited(None),
        Verdict::RateLimited(_) => Verdict::Concurrency { maximum: None },
        Verdict::Concurrency { .. } => Verdict::Busy,
        Verdict::Busy => Verdict::Unexplained(UnexplainedRefusal::Unauthorized),
        Verdict::Unexplained(refusal) => match refusal {
            UnexplainedRefusal::Unauthorized => Verdict::Unexplained(UnexplainedRefusal::PaymentRequired),
            UnexplainedRefusal::PaymentRequired => Verdict::Unexplained(UnexplainedRefusal::Forbidden),
            UnexplainedRefusal::Forbidden => Verdict::Unexplained(UnexplainedRefusal::TooMany(None)),
            UnexplainedRefusal::TooMany(_) => Verdict::Unexplained(UnexplainedRefusal::Bodiless),
            UnexplainedRefusal::Bodiless => Verdict::NotFound,
        },
        Verdict::NotFound => Verdict::RequestError,
        Verdict::RequestError => Verdict::ServerError,
        Verdict::ServerError => Verdict::Unreadable,
        Verdict::Unreadable => return None,
    })
}

/// Returns every verdict without details, and in addition the verdicts with details that can have them.
fn all_verdicts() -> Vec<Verdict> {
    let retry_after = Some(Duration::from_millis(4_500));
    let shortfall = Shortfall { remaining: Some(0), required: Some(7), quota: Some(10) };
    let without_details = std::iter::successors(Some(Verdict::Served), |verdict| next_verdict(*verdict));
    let with_details = [
        Verdict::WorkspaceQuota(shortfall),
        Verdict::KeyQuota(shortfall),
        Verdict::MissingPermission(Permission::parse("text_to_speech")),
        Verdict::MissingPermission(Permission::parse("voices_read")),
        Verdict::RateLimited(retry_after),
        Verdict::Concurrency { maximum: Some(5) },
        Verdict::Unexplained(UnexplainedRefusal::TooMany(retry_after)),
    ];
    without_details.chain(with_details).collect()
}

/// Returns every verdict that leads to a restriction.
fn restricting_verdicts() -> Vec<Verdict> {
    all_verdicts().into_iter().filter(|verdict| features().proven_limit(*verdict).is_some()).collect()
}

fn source(request_id: &str) -> RefusalSource {
    RefusalSource {
        status: Some(403),
        message: "region_blocked: \"not from here\"".into(),
        route: "/v1/text-to-speech/{id}".into(),
        request_id: request_id.into(),
    }
}

#[test]
fn every_refusal_is_read_as_it_was_written() {
    let histories = [
        None,
        Some(RefusalHistory { first_refused_at: NOW, from_characters: 0 }),
        Some(RefusalHistory { first_refused_at: UnixMs(0), from_characters: 40 }),
    ];
    let mut restricted_count = 0;
    for features in requests() {
        for verdict in restricting_verdicts() {
            for (number, history) in histories.into_iter().enumerate() {
                let written_record = RefusalRecord {
                    key: Fingerprint::new("key"),
                    workspace: OwnerId::from_stored("studio \"one\""),
                    tier: (number == 0).then(|| "free".into()),
                    applies_to_plan: number == 1,
                    features: features.clone(),
                    verdict,
                    is_in_group: number == 2,
                    is_repeated_elsewhere: number == 0,
                    at: UnixMs(NOW.0 + number as u64),
                    history,
                    source: Arc::new(if number == 0 { RefusalSource::default() } else { source("r") }),
                };
                let read_record = document::from_json(&document::to_json(&written_record));
                assert_eq!(read_record.as_ref(), Some(&written_record), "{verdict:?} must be unchanged");
                let proven_limit = |record: &RefusalRecord| record.features.proven_limit(record.verdict);
                let restriction = proven_limit(&written_record);
                assert_eq!(proven_limit(&read_record.unwrap()), restriction);
                restricted_count += usize::from(restriction.is_some());
            }
        }
    }
    assert_eq!(
        restricted_count,
        requests().len() * restricting_verdicts().len() * 3,
        "every verdict must restrict every request"
    );
}

#[test]
fn an_unreadable_refusal_is_skipped() {
    let record = RefusalRecord {
        key: Fingerprint::new("key"),
        workspace: OwnerId::from_stored("studio"),
        tier: None,
        applies_to_plan: false,
        features: features(),
        verdict: Verdict::Slots,
        is_in_group: false,
        is_repeated_elsewhere: false,
        at: NOW,
        history: None,
        source: Arc::default(),
    };
    let valid_document = document::to_json(&record);
    assert!(document::from_json(&valid_document).is_some());
    for (part, replacement) in [
        ("\"slots\"", "\"a_new_one\""),
        ("\"slots\"", "\"served\""),
        ("\"slots\"", "\"plan_feature\""),
        ("\"key\":\"", "\"key\":\"x"),
        ("text_to_speech", "fly"),
        ("\"at_ms\"", "\"then\""),
        ("{\"route\"", "{\"path\""),
    ] {
        let changed_document = valid_document.replacen(part, replacement, 1);
        assert_ne!(changed_document, valid_document);
        assert_eq!(document::from_json(&changed_document), None, "{changed_document} must be skipped");
    }
    for json in ["", "{}", "[]", "7"] {
        assert_eq!(document::from_json(json), None, "no refusal must be read from {json:?}");
    }
    for verdict in all_verdicts() {
        let json = document::to_json(&RefusalRecord { verdict, ..record.clone() });
        let is_read = document::from_json(&json).is_some();
        let is_restricting = features().proven_limit(verdict).is_some();
        assert_eq!(is_read, is_restricting, "a refusal with {verdict:?} must be read only if it restricts");
    }
}

/// A database in a temporary directory, with the operations of the writer thread.
struct TestDatabase {
    database: Database,
    _directory: tempfile::TempDir,
    location: DatabaseLocation,
}

impl TestDatabase {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let location = DatabaseLocation::File(directory.path().join("keychoir.db"));
        let database = open(&location, NOW, IntegrityCheck::Skip).unwrap().database;
        Self { database, _directory: directory, location }
    }

    fn write(&mut self, pool: &Pool, now: UnixMs) {
        self.database.refusals.prepare(pool.restrictions(), now);
        let keys = pool.snapshot(now);
        transaction::commit(&mut self.database, &UsageBatch::default(), &keys, MirrorScope::Nothing, now)
            .unwrap();
        assert!(!self.database.refusals.are_stale(pool.restrictions(), now));
    }

    /// Reopens the database, and restores a pool from it like startup.
    fn restore_pool(&mut self, now: UnixMs) -> Arc<Pool> {
        self.database = open(&self.location, now, IntegrityCheck::Skip).unwrap().database;
        let pool = pool();
        pool.restore(&stored::keys(&self.database.connection).unwrap(), now);
        pool.restore_restrictions(read(&self.database.connection).unwrap(), now);
        pool
    }

    fn count_rows(&self) -> i64 {
        self.database.connection.query_row("SELECT count(*) FROM refusals", [], |row| row.get(0)).unwrap()
    }
}

/// The circumstances of a refusal: another key was refused for the same request, or the request is in a concurrency
/// group.
#[derive(Clone, Copy, Debug, Default)]
struct RefusalFlags {
    is_repeated_elsewhere: bool,
    is_in_group: bool,
}

/// Records a refusal of a key without flags.
fn refuse(pool: &Pool, key_index: usize, verdict: Verdict, features: &RequestFeatures, now: UnixMs) {
    refuse_with_flags(pool, key_index, verdict, features, RefusalFlags::default(), "request", now);
}

fn refuse_with_flags(
    pool: &Pool,
    key_index: usize,
    verdict: Verdict,
    features: &RequestFeatures,
    RefusalFlags { is_repeated_elsewhere, is_in_group }: RefusalFlags,
    request_id: &str,
    now: UnixMs,
) {
    let group = is_in_group.then_some(ConcurrencyGroup::SPEECH);
    let key_request = KeyRequest::new(ClientName::new("app"), Some(7), group);
    let refused_attempt = RefusedAttempt {
        verdict,
        request: Some(&key_request),
        is_repeated_elsewhere,
        source: source(request_id),
    };
    let roster = pool.roster();
    pool.restrict(&roster, &roster.keys()[key_index], features, &refused_attempt, now);
}

fn observe(pool: &Arc<Pool>, key_index: usize, tier: Option<&str>, voices_left: Option<u64>, now: UnixMs) {
    let observation = Observation::Quota {
        quota: Quota::default(),
        tier: tier.map(str::to_owned),
        is_paid: None,
        capabilities: Capabilities { can_clone: None, voices_left },
    };
    let roster = pool.roster();
    pool.observe(&roster, &roster.keys()[key_index], observation, now);
}

/// A restriction without its sequence number, which changes when Keychoir restarts.
type ComparedRestriction = (RestrictionScope, Limit, &'static str, [UnixMs; 3], String, Arc<RefusalRecord>);

fn comparable(restriction: &Restriction) -> ComparedRestriction {
    let Restriction { scope, limit, verdict, first_refused_at, refused_at, until, effect, record, .. } =
        restriction;
    let details = format!("{effect:?} {} {:?}", record.is_repeated_elsewhere, record.source);
    (
        scope.clone(),
        limit.clone(),
        verdict,
        [*first_refused_at, *refused_at, *until],
        details,
        Arc::clone(record),
    )
}

fn all_restrictions(pool: &Pool, now: UnixMs) -> Vec<ComparedRestriction> {
    pool.restrictions().all(now).iter().map(comparable).collect()
}

/// The restrictions of each key in the status, and the keys that are tried last for each request.
type VisibleRestrictions = (Vec<Vec<String>>, Vec<Vec<(usize, RestrictionLevel)>>);

fn visible_restrictions(pool: &Pool, now: UnixMs) -> VisibleRestrictions {
    let roster = pool.roster();
    let description_of = |restriction: &Restriction| {
        format!(
            "{} {} {:?} {}",
            restriction.limit, restriction.verdict, restriction.first_refused_at, restriction.until.0
        )
    };
    let descriptions_for = |key| pool.restrictions().for_key(key, now).iter().map(description_of).collect();
    let descriptions = roster.keys().iter().map(|key| descriptions_for(key)).collect();
    let restricted_keys = |features| pool.restrictions().restricted_keys(features, &roster, now);
    (descriptions, requests().iter().map(restricted_keys).collect())
}

/// An event that changes the restrictions, advances the time, or ends the process.
#[derive(Clone, Debug)]
enum RefusalStep {
    Refused { key_index: usize, verdict: Verdict, features: RequestFeatures, flags: RefusalFlags },
    Served { key_index: usize, features: RequestFeatures },
    Polled { key_index: usize, tier: Option<&'static str>, voices_left: Option<u64> },
    Later(u64),
    Written,
    Restarted,
}

fn any_step() -> impl Strategy<Value = RefusalStep> {
    let key_index = 0..entries().len();
    let flags = any::<(bool, bool)>()
        .prop_map(|(is_repeated_elsewhere, is_in_group)| RefusalFlags { is_repeated_elsewhere, is_in_group });
    let refused_request = (key_index.clone(), select(restricting_verdicts()), select(requests()), flags);
    let polled =
        (key_index.clone(), select(vec![None, Some("free"), Some("creator")]), select(vec![None, Some(3)]));
    prop_oneof![
        6 => refused_request.prop_map(|(key_index, verdict, features, flags)| {
            RefusalStep::Refused { key_index, verdict, features, flags }
        }),
        1 => (key_index, select(requests()))
            .prop_map(|(key_index, features)| RefusalStep::Served { key_index, features }),
        1 => polled
            .prop_map(|(key_index, tier, voices_left)| RefusalStep::Polled { key_index, tier, voices_left }),
        1 => (0..700_u64).prop_map(RefusalStep::Later),
        1 => Just(RefusalStep::Written),
        1 => Just(RefusalStep::Restarted),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn restarts_change_no_restriction(history in prop::collection::vec(any_step(), 1..60)) {
        let mut test_database = TestDatabase::new();
        let mut now = NOW;
        // Compares a program that keeps running with one that is restarted repeatedly.
        let (continuous, mut restarted) = (pool(), pool());
        for (number, step) in history.iter().enumerate() {
            // Refusals must have different times.
            now = now.plus(Duration::from_millis(1));
            match step {
                RefusalStep::Refused { key_index, verdict, features, flags } => {
                    for pool in [&continuous, &restarted] {
                        let request_id = number.to_string();
                        refuse_with_flags(pool, *key_index, *verdict, features, *flags, &request_id, now);
                    }
                }
                RefusalStep::Served { key_index, features } => {
                    for pool in [&continuous, &restarted] {
                        let roster = pool.roster();
                        pool.restrictions().refute(features, &roster.keys()[*key_index]);
                    }
                }
                RefusalStep::Polled { key_index, tier, voices_left } => {
                    for pool in [&continuous, &restarted] {
                        observe(pool, *key_index, *tier, *voices_left, now);
                    }
                }
                RefusalStep::Later(seconds) => now = now.plus(Duration::from_secs(*seconds)),
                RefusalStep::Written => test_database.write(&restarted, now),
                RefusalStep::Restarted => {
                    test_database.write(&restarted, now);
                    restarted = test_database.restore_pool(now);
                }
            }
            prop_assert_eq!(all_restrictions(&restarted, now), all_restrictions(&continuous, now));
            prop_assert_eq!(visible_restrictions(&restarted, now), visible_restrictions(&continuous, now));
        }
        test_database.write(&restarted, now);
        prop_assert_eq!(usize::try_from(test_database.count_rows()).unwrap(), all_restrictions(&restarted, now).len());
    }
}

#[test]
fn refusals_from_the_future_start_at_the_current_time() {
    let mut test_database = TestDatabase::new();
    let later = NOW.plus(Duration::from_secs(86_400));
    let pool = pool();
    refuse(&pool, 0, Verdict::PlanFeature(Subject::Voice), &features(), NOW);
    refuse(&pool, 0, Verdict::PlanFeature(Subject::Voice), &features(), later);
    test_database.write(&pool, later);
    let restored_pool = test_database.restore_pool(NOW);
    let [restriction] = &restored_pool.restrictions().all(NOW)[..] else {
        panic!("the pool must have one restriction")
    };
    assert_eq!((restriction.first_refused_at, restriction.refused_at), (NOW, NOW));
    assert_eq!(restriction.until, NOW.plus(SETTINGS.feature_cooldown));
}

#[test]
fn an_expired_refusal_is_ignored_and_deleted() {
    let mut test_database = TestDatabase::new();
    let pool = pool();
    refuse(&pool, 0, Verdict::Slots, &features(), NOW);
    refuse(&pool, 1, Verdict::Unexplained(UnexplainedRefusal::Forbidden), &features(), NOW);
    test_database.write(&pool, NOW);
    assert_eq!(test_database.count_rows(), 2);
    let expiry = NOW.plus(SETTINGS.endpoint_cooldown);
    assert_eq!(test_database.restore_pool(expiry).restrictions().all(NOW).len(), 1);
    assert_eq!(test_database.count_rows(), 2);
    // Although no restriction was added, the expiry of one makes the rows stale.
    test_database.write(&pool, NOW);
    assert!(test_database.database.refusals.are_stale(pool.restrictions(), expiry));
    test_database.write(&pool, expiry);
    assert_eq!(test_database.count_rows(), 1);
    // A poll that reports a free slot ends the restriction of the first key.
    observe(&pool, 0, None, Some(1), expiry);
    test_database.write(&pool, expiry);
    assert_eq!(test_database.count_rows(), 0);
}

#[test]
fn the_database_has_as_many_restrictions_as_the_pool() {
    let mut test_database = TestDatabase::new();
    let pool = pool();
    for number in 0..1_200_u64 {
        let voice = Some(Identifier::new(ResourceKind::Voice, &number.to_string()).hash);
        let features = RequestFeatures { voice, ..features() };
        let now = UnixMs(NOW.0 + number);
        refuse(&pool, 0, Verdict::PlanFeature(Subject::Voice), &features, now);
        if number % 100 == 0 {
            test_database.write(&pool, now);
        }
    }
    let now = UnixMs(NOW.0 + 1_200);
    test_database.write(&pool, now);
    assert_eq!(test_database.count_rows(), 1_024);
    assert_eq!(all_restrictions(&test_database.restore_pool(now), now), all_restrictions(&pool, now));
}

#[test]
fn a_failed_transaction_is_repeated() {
    let mut test_database = TestDatabase::new();
    let pool = pool();
    refuse(&pool, 0, Verdict::Slots, &features(), NOW);
    test_database.write(&pool, NOW);
    refuse(&pool, 1, Verdict::Slots, &features(), NOW);
    test_database.database.connection.execute_batch("PRAGMA query_only = ON").unwrap();
    test_database.database.refusals.prepare(pool.restrictions(), NOW);
    let keys = pool.snapshot(NOW);
    let commit_result = transaction::commit(
        &mut test_database.database,
        &UsageBatch::default(),
        &keys,
        MirrorScope::Nothing,
        NOW,
    );
    assert!(commit_result.is_err());
    assert!(test_database.database.refusals.are_stale(pool.restrictions(), NOW));
    test_database.database.connection.execute_batch("PRAGMA query_only = OFF").unwrap();
    test_database.write(&pool, NOW);
    assert_eq!(test_database.count_rows(), 2);
}

#[test]
fn a_workspace_that_got_a_name_keeps_its_refusals() {
    let mut test_database = TestDatabase::new();
    let old_pool = pool();
    refuse(&old_pool, 0, Verdict::Unexplained(UnexplainedRefusal::Forbidden), &features(), NOW);
    test_database.write(&old_pool, NOW);
    let mut entries = entries();
    entries[0].workspace = Some("attic".to_owned());
    let new_pool = Pool::new(entries.clone(), SETTINGS);
    new_pool.restore_restrictions(read(&test_database.database.connection).unwrap(), NOW);
    let restricted_keys_of =
        |pool: &Pool| pool.restrictions().restricted_keys(&features(), &pool.roster(), NOW);
    assert_eq!(restricted_keys_of(&new_pool), [(0, RestrictionLevel::RefusedLongest)]);
    // The same happens at runtime: by a reload, or when a poll reports that two keys belong to one workspace.
    old_pool.reload(entries, SETTINGS);
    assert_eq!(restricted_keys_of(&old_pool), [(0, RestrictionLevel::RefusedLongest)]);
    let shared_pool = pool();
    refuse(&shared_pool, 0, Verdict::Unexplained(UnexplainedRefusal::Forbidden), &features(), NOW);
    for key_index in [1, 0] {
        shared_pool.record_workspace(&shared_pool.roster().keys()[key_index], "ws_1");
    }
    let are_restricted = [0, 1]
        .map(|key_index| restricted_keys_of(&shared_pool).iter().any(|(position, _)| *position == key_index));
    assert_eq!(are_restricted, [true; 2]);
    test_database.write(&shared_pool, NOW);
    assert_eq!(test_database.count_rows(), 1);
}

#[test]
fn neither_voices_nor_keys_are_in_the_database() {
    let mut test_database = TestDatabase::new();
    let pool = pool();
    for verdict in restricting_verdicts() {
        refuse(&pool, 0, verdict, &features(), NOW);
    }
    test_database.write(&pool, NOW);
    let DatabaseLocation::File(path) = test_database.location.clone() else {
        panic!("the database must be a file")
    };
    let log = PathBuf::from(format!("{}-wal", path.display()));
    let content = [std::fs::read(&path).unwrap(), std::fs::read(log).unwrap()].concat();
    let contains = |part: &str| content.windows(part.len()).any(|window| window == part.as_bytes());
    assert!(contains("region_blocked"), "the file must contain the refusal");
    let key = entries()[0].key.expose().to_owned();
    assert!(!contains(VOICE) && !contains(&key), "the file must contain neither the voice nor the key");
}

#[test]
fn a_database_of_version_10_is_migrated() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("keychoir.db");
    let old_connection = Connection::open(&path).unwrap();
    let fingerprint = entries()[0].key.fingerprint();
    old_connection.execute_batch(&format!(
        "PRAGMA journal_mode = WAL; PRAGMA auto_vacuum = INCREMENTAL; {}
         INSERT INTO keys (key_hash, short_key, position, status, character_count, character_limit, updated_at_ms)
            VALUES ('{fingerprint}', 's', 0, 'active', 40, 100, 1);
         INSERT INTO outbox_keys (key_hash, short_key, status, character_count, character_limit, remaining, usage,
            is_over_limit, is_near_limit, observed_at_ms)
            VALUES ('{fingerprint}', 's', 'active', 40, 100, 60, 0.4, 0, 0, 1);",
        schema::for_version(10)
    ))
    .unwrap();
    drop(old_connection);
    assert_eq!(
        UsageReader::open(&path).unwrap().keys(NOW).unwrap().len(),
        1,
        "the old database must be readable"
    );
    let location = DatabaseLocation::File(path.clone());
    let store = Store::open(&location, NOW).unwrap();
    assert_eq!(store.read_refusals().unwrap(), []);
    let [key] = &store.read_keys().unwrap()[..] else { panic!("the database must have one key") };
    assert_eq!((key.fingerprint, key.quota.count, &key.tier), (fingerprint, 40, &None));
    drop(store);
    let connection = Connection::open(&path).unwrap();
    let query_number = |sql: &str| connection.query_row(sql, [], |row| row.get::<_, i64>(0)).unwrap();
    assert_eq!(query_number("PRAGMA user_version"), schema::VERSION as i64);
    assert_eq!(query_number("SELECT remaining FROM outbox_keys"), 60, "the outbox must keep its rows");
    assert_eq!(UsageReader::open(&path).unwrap().keys(NOW).unwrap().len(), 1);
}

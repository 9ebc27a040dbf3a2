use std::path::PathBuf;

use proptest::prelude::*;
use proptest::sample::select;

use super::*;
use crate::elevenlabs::affinity::{Kind, Named};
use crate::elevenlabs::features::Limit;
use crate::elevenlabs::plan::Capabilities;
use crate::policy::budget::Quota;
use crate::policy::client::ClientName;
use crate::policy::concurrency_group::ConcurrencyGroup;
use crate::policy::evidence::RefusalSource;
use crate::pool::{
    Holder, KeyEntry, KeyRequest, Observation, Pool, Refused, Restraint, Restriction, Settings,
};
use crate::proxy::UsageBatch;
use crate::secret::ApiKey;
use crate::store::database::Database;
use crate::store::open::{IntegrityCheck, open};
use crate::store::outbox::Mirrored;
use crate::store::{DatabaseLocation, Reader, Store, read as keys, rows, schema};

const NOW: UnixMs = UnixMs(1_796_000_000_000);
const SETTINGS: Settings = Settings {
    endpoint_cooldown: Duration::from_secs(1_200),
    unproven_cooldown: Duration::from_secs(60),
    permission_cooldown: Duration::from_secs(1_800),
    rate_limited_cooldown: Duration::from_secs(90),
    concurrency_cooldown: Duration::from_secs(2),
    ..Settings::STILL
};
const VOICE: &str = "AVoiceOfTheTests0001";

/// Four keys; the last two are of one workspace.
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
        route: Route::read("/v1/text-to-speech/x"),
        effect: Effect::Some,
        voice: Some(Named::new(Kind::Voice, VOICE).tag),
        model: Some("eleven_v3".into()),
        output_format: Some("pcm_44100".into()),
        characters: Some(900),
        permission: Permission::parse("text_to_speech"),
        adds_voice: false,
    }
}

/// Requests that each differ in one property.
fn requests() -> Vec<RequestFeatures> {
    let same = features();
    vec![
        RequestFeatures { voice: None, model: None, output_format: None, characters: None, ..same.clone() },
        RequestFeatures { voice: Some(Named::new(Kind::Voice, "other").tag), ..same.clone() },
        RequestFeatures { characters: Some(40), ..same.clone() },
        RequestFeatures { output_format: None, permission: None, ..same.clone() },
        RequestFeatures { route: Route::read("/v1/voices/add"), adds_voice: true, ..same.clone() },
        RequestFeatures { effect: Effect::None, ..same.clone() },
        same,
    ]
}

/// Every verdict that leads to a restriction.
fn verdicts() -> Vec<Verdict> {
    let span = Some(Duration::from_millis(4_500));
    let shortfall = Shortfall { remaining: Some(0), required: Some(7), quota: Some(10) };
    let mut all = vec![
        Verdict::WorkspaceQuota(shortfall),
        Verdict::WorkspaceQuota(Shortfall::default()),
        Verdict::InvalidKey,
        Verdict::WrongHost,
        Verdict::MissingPermission(None),
        Verdict::MissingPermission(Permission::parse("text_to_speech")),
        Verdict::MissingPermission(Permission::parse("voices_read")),
        Verdict::Slots,
        Verdict::Billing,
        Verdict::Abuse,
        Verdict::RateLimited(None),
        Verdict::RateLimited(span),
        Verdict::Concurrency { maximum: None },
        Verdict::Concurrency { maximum: Some(5) },
    ];
    let subjects =
        ["voice", "model", "output_format", "cloning", "text_length", "endpoint", "unnamed"].into_iter();
    all.extend(subjects.map(|word| Verdict::PlanFeature(Subject::of_word(word).unwrap())));
    let refusals = [
        Refusal::Unauthorized,
        Refusal::PaymentRequired,
        Refusal::Forbidden,
        Refusal::TooMany(None),
        Refusal::TooMany(span),
        Refusal::Bodiless,
    ];
    all.extend(refusals.map(Verdict::Unexplained));
    all
}

fn source(request_id: &str) -> RefusalSource {
    RefusalSource {
        status: Some(403),
        words: "region_blocked: \"not from here\"".into(),
        route: "/v1/text-to-speech/{id}".into(),
        request_id: request_id.into(),
    }
}

#[test]
fn every_refusal_survives_the_file() {
    let earlier = [
        None,
        Some(Earlier { since: NOW, from_characters: 0 }),
        Some(Earlier { since: UnixMs(0), from_characters: 40 }),
    ];
    let mut restricted = 0;
    for features in requests() {
        for verdict in verdicts() {
            for (number, earlier) in earlier.into_iter().enumerate() {
                let written = RefusalRecord {
                    key: Fingerprint::of("key"),
                    workspace: OwnerId::of_word("studio \"one\""),
                    tier: (number == 0).then(|| "free".into()),
                    is_of_plan: number == 1,
                    features: features.clone(),
                    verdict,
                    is_in_group: number == 2,
                    is_agreed: number == 0,
                    at: UnixMs(NOW.0 + number as u64),
                    earlier,
                    source: Arc::new(if number == 0 { RefusalSource::default() } else { source("r") }),
                };
                let read = record(&text(&written));
                assert_eq!(read.as_ref(), Some(&written), "{verdict:?}");
                let refused = |record: &RefusalRecord| record.features.refused(record.verdict);
                let concluded = refused(&written);
                assert_eq!(refused(&read.unwrap()), concluded);
                restricted += usize::from(concluded.is_some());
            }
        }
    }
    assert_eq!(restricted, requests().len() * verdicts().len() * 3, "all of them restrict something");
}

#[test]
fn an_unreadable_refusal_is_skipped() {
    let good = RefusalRecord {
        key: Fingerprint::of("key"),
        workspace: OwnerId::of_word("studio"),
        tier: None,
        is_of_plan: false,
        features: features(),
        verdict: Verdict::Slots,
        is_in_group: false,
        is_agreed: false,
        at: NOW,
        earlier: None,
        source: Arc::default(),
    };
    let good = text(&good);
    assert!(record(&good).is_some());
    for (part, other) in [
        ("\"slots\"", "\"a_new_one\""),
        ("\"slots\"", "\"served\""),
        ("\"slots\"", "\"plan_feature\""),
        ("\"key\":\"", "\"key\":\"x"),
        ("text_to_speech", "fly"),
        ("\"at_ms\"", "\"then\""),
        ("{\"route\"", "{\"path\""),
    ] {
        let text = good.replacen(part, other, 1);
        assert!(text != good && record(&text).is_none(), "{text}");
    }
    for text in ["", "{}", "[]", "7"] {
        assert_eq!(record(text), None, "{text}");
    }
}

/// A database in a folder of its own, with the operations of the writing thread.
struct File {
    database: Database,
    _folder: tempfile::TempDir,
    location: DatabaseLocation,
}

impl File {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let location = DatabaseLocation::File(folder.path().join("keychoir.db"));
        let database = open(&location, NOW, IntegrityCheck::Skip).unwrap().database;
        Self { database, _folder: folder, location }
    }

    fn write(&mut self, pool: &Pool, now: UnixMs) {
        self.database.refusals.prepare(pool.restrictions(), now);
        let keys = pool.snapshot(now);
        rows::commit(&mut self.database, &UsageBatch::default(), &keys, Mirrored::Nothing, now).unwrap();
        assert!(!self.database.refusals.are_stale(pool.restrictions(), now));
    }

    /// The pool that a start restores from it.
    fn restored(&mut self, now: UnixMs) -> Arc<Pool> {
        self.database = open(&self.location, now, IntegrityCheck::Skip).unwrap().database;
        let pool = pool();
        pool.restore(&keys::remembered(&self.database.connection).unwrap(), now);
        pool.restore_restrictions(read(&self.database.connection).unwrap(), now);
        pool
    }

    fn rows(&self) -> i64 {
        self.database.connection.query_row("SELECT count(*) FROM refusals", [], |row| row.get(0)).unwrap()
    }
}

fn refuse(pool: &Pool, key: usize, verdict: Verdict, features: &RequestFeatures, now: UnixMs) {
    refuse_as(pool, key, verdict, features, (false, false), "request", now);
}

fn refuse_as(
    pool: &Pool,
    key: usize,
    verdict: Verdict,
    features: &RequestFeatures,
    (is_agreed, is_in_group): (bool, bool),
    request_id: &str,
    now: UnixMs,
) {
    let group = is_in_group.then_some(ConcurrencyGroup::SPEECH);
    let key_request = KeyRequest::new(ClientName::new("app"), Some(7), group);
    let refused = Refused { verdict, request: Some(&key_request), is_agreed, source: source(request_id) };
    let roster = pool.roster();
    pool.restrict(&roster, &roster.keys()[key], features, &refused, now);
}

fn observe(pool: &Arc<Pool>, key: usize, tier: Option<&str>, voices_left: Option<u64>, now: UnixMs) {
    let seen = Observation::Quota {
        quota: Quota::default(),
        tier: tier.map(str::to_owned),
        is_paid: None,
        capabilities: Capabilities { can_clone: None, voices_left },
    };
    let roster = pool.roster();
    pool.observe(&roster, &roster.keys()[key], seen, now);
}

/// A restriction without its number.
type Seen = (Holder, Limit, &'static str, [UnixMs; 3], String, Arc<RefusalRecord>);

fn seen(held: &Restriction) -> Seen {
    let Restriction { holder, limit, verdict, since, refused_at, until, force, is_agreed, record, .. } = held;
    let rest = format!("{force:?} {is_agreed} {:?}", held.source);
    (holder.clone(), limit.clone(), verdict, [*since, *refused_at, *until], rest, Arc::clone(record))
}

fn all(pool: &Pool, now: UnixMs) -> Vec<Seen> {
    pool.restrictions().all(now).iter().map(seen).collect()
}

/// The restrictions of each key in the status, and the keys that are tried last for each request.
type Shown = (Vec<Vec<String>>, Vec<Vec<(usize, Restraint)>>);

fn shown(pool: &Pool, now: UnixMs) -> Shown {
    let roster = pool.roster();
    let of =
        |held: &Restriction| format!("{} {} {:?} {}", held.limit, held.verdict, held.since, held.until.0);
    let cannot = |key| pool.restrictions().of(key, now).iter().map(of).collect();
    let cannot = roster.keys().iter().map(|key| cannot(key)).collect();
    let matching = |features| pool.restrictions().matching(features, &roster, now);
    (cannot, requests().iter().map(matching).collect())
}

#[derive(Clone, Debug)]
enum Step {
    Refused { key: usize, verdict: Verdict, features: RequestFeatures, how: (bool, bool) },
    Served { key: usize, features: RequestFeatures },
    Polled { key: usize, tier: Option<&'static str>, voices_left: Option<u64> },
    Later(u64),
    Written,
    Restarted,
}

fn step() -> impl Strategy<Value = Step> {
    let key = 0..entries().len();
    let refused = (key.clone(), select(verdicts()), select(requests()), any::<(bool, bool)>());
    let polled =
        (key.clone(), select(vec![None, Some("free"), Some("creator")]), select(vec![None, Some(3)]));
    prop_oneof![
        6 => refused.prop_map(|(key, verdict, features, how)| Step::Refused { key, verdict, features, how }),
        1 => (key, select(requests())).prop_map(|(key, features)| Step::Served { key, features }),
        1 => polled.prop_map(|(key, tier, voices_left)| Step::Polled { key, tier, voices_left }),
        1 => (0..700_u64).prop_map(Step::Later),
        1 => Just(Step::Written),
        1 => Just(Step::Restarted),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn restarts_change_no_restriction(history in prop::collection::vec(step(), 1..60)) {
        let mut file = File::new();
        let mut now = NOW;
        // Compares a program that keeps running with one that is restarted repeatedly.
        let (lasting, mut restarted) = (pool(), pool());
        for (number, step) in history.iter().enumerate() {
            // Each refusal has a time of its own.
            now = now.plus(Duration::from_millis(1));
            match step {
                Step::Refused { key, verdict, features, how } => {
                    for pool in [&lasting, &restarted] {
                        refuse_as(pool, *key, *verdict, features, *how, &number.to_string(), now);
                    }
                }
                Step::Served { key, features } => {
                    for pool in [&lasting, &restarted] {
                        let roster = pool.roster();
                        pool.refute_restrictions(features, &roster.keys()[*key]);
                    }
                }
                Step::Polled { key, tier, voices_left } => {
                    for pool in [&lasting, &restarted] {
                        observe(pool, *key, *tier, *voices_left, now);
                    }
                }
                Step::Later(seconds) => now = now.plus(Duration::from_secs(*seconds)),
                Step::Written => file.write(&restarted, now),
                Step::Restarted => {
                    file.write(&restarted, now);
                    restarted = file.restored(now);
                }
            }
            prop_assert_eq!(all(&restarted, now), all(&lasting, now));
            prop_assert_eq!(shown(&restarted, now), shown(&lasting, now));
        }
        file.write(&restarted, now);
        prop_assert_eq!(usize::try_from(file.rows()).unwrap(), all(&restarted, now).len());
    }
}

#[test]
fn a_clock_that_was_set_back_makes_no_refusal_younger() {
    let mut file = File::new();
    let later = NOW.plus(Duration::from_secs(86_400));
    let pool = pool();
    refuse(&pool, 0, Verdict::PlanFeature(Subject::Voice), &features(), NOW);
    refuse(&pool, 0, Verdict::PlanFeature(Subject::Voice), &features(), later);
    file.write(&pool, later);
    let restored = file.restored(NOW);
    let [held] = &restored.restrictions().all(NOW)[..] else { panic!("one restriction") };
    assert_eq!((held.since, held.refused_at), (NOW, NOW));
    assert_eq!(held.until, NOW.plus(SETTINGS.feature_cooldown));
}

#[test]
fn an_expired_refusal_is_neither_read_nor_kept() {
    let mut file = File::new();
    let pool = pool();
    refuse(&pool, 0, Verdict::Slots, &features(), NOW);
    refuse(&pool, 1, Verdict::Unexplained(Refusal::Forbidden), &features(), NOW);
    file.write(&pool, NOW);
    assert_eq!(file.rows(), 2);
    let over = NOW.plus(SETTINGS.endpoint_cooldown);
    assert_eq!(file.restored(over).restrictions().all(NOW).len(), 1);
    assert_eq!(file.rows(), 2);
    // The only change is that the restriction has expired.
    file.write(&pool, NOW);
    assert!(file.database.refusals.are_stale(pool.restrictions(), over));
    file.write(&pool, over);
    assert_eq!(file.rows(), 1);
    // A poll reports a free slot.
    observe(&pool, 0, None, Some(1), over);
    file.write(&pool, over);
    assert_eq!(file.rows(), 0);
}

#[test]
fn the_file_has_as_many_restrictions_as_the_pool() {
    let mut file = File::new();
    let pool = pool();
    for number in 0..1_200_u64 {
        let voice = Some(Named::new(Kind::Voice, &number.to_string()).tag);
        let features = RequestFeatures { voice, ..features() };
        let now = UnixMs(NOW.0 + number);
        refuse(&pool, 0, Verdict::PlanFeature(Subject::Voice), &features, now);
        if number % 100 == 0 {
            file.write(&pool, now);
        }
    }
    let now = UnixMs(NOW.0 + 1_200);
    file.write(&pool, now);
    assert_eq!(file.rows(), 1_024);
    assert_eq!(all(&file.restored(now), now), all(&pool, now));
}

#[test]
fn a_failed_transaction_is_repeated() {
    let mut file = File::new();
    let pool = pool();
    refuse(&pool, 0, Verdict::Slots, &features(), NOW);
    file.write(&pool, NOW);
    refuse(&pool, 1, Verdict::Slots, &features(), NOW);
    file.database.connection.execute_batch("PRAGMA query_only = ON").unwrap();
    file.database.refusals.prepare(pool.restrictions(), NOW);
    let keys = pool.snapshot(NOW);
    let failed = rows::commit(&mut file.database, &UsageBatch::default(), &keys, Mirrored::Nothing, NOW);
    assert!(failed.is_err());
    assert!(file.database.refusals.are_stale(pool.restrictions(), NOW));
    file.database.connection.execute_batch("PRAGMA query_only = OFF").unwrap();
    file.write(&pool, NOW);
    assert_eq!(file.rows(), 2);
}

#[test]
fn a_workspace_that_got_a_name_keeps_its_refusals() {
    let mut file = File::new();
    let before = pool();
    refuse(&before, 0, Verdict::Unexplained(Refusal::Forbidden), &features(), NOW);
    file.write(&before, NOW);
    let mut entries = entries();
    entries[0].workspace = Some("attic".to_owned());
    let after = Pool::new(entries.clone(), SETTINGS);
    after.restore_restrictions(read(&file.database.connection).unwrap(), NOW);
    let asked_last = |pool: &Pool| pool.restrictions().matching(&features(), &pool.roster(), NOW);
    assert_eq!(asked_last(&after), [(0, Restraint::RefusedLongest)]);
    // The same happens at runtime: by a reload, or when a poll reports that two keys belong to one workspace.
    before.reload(entries, SETTINGS);
    assert_eq!(asked_last(&before), [(0, Restraint::RefusedLongest)]);
    let shared = pool();
    refuse(&shared, 0, Verdict::Unexplained(Refusal::Forbidden), &features(), NOW);
    for key in [1, 0] {
        shared.record_workspace(&shared.roster().keys()[key], "ws_1");
    }
    let both = [0, 1].map(|at| asked_last(&shared).iter().any(|(position, _)| *position == at));
    assert_eq!(both, [true; 2]);
    file.write(&shared, NOW);
    assert_eq!(file.rows(), 1);
}

#[test]
fn neither_voices_nor_keys_are_in_the_file() {
    let mut file = File::new();
    let pool = pool();
    for verdict in verdicts() {
        refuse(&pool, 0, verdict, &features(), NOW);
    }
    file.write(&pool, NOW);
    let DatabaseLocation::File(path) = file.location.clone() else { panic!("it is a file") };
    let log = PathBuf::from(format!("{}-wal", path.display()));
    let heap = [std::fs::read(&path).unwrap(), std::fs::read(log).unwrap()].concat();
    let holds = |part: &str| heap.windows(part.len()).any(|window| window == part.as_bytes());
    assert!(holds("region_blocked"), "the file contains the refusal");
    let key = entries()[0].key.expose().to_owned();
    assert!(!holds(VOICE) && !holds(&key));
}

#[test]
fn a_file_of_version_10_is_brought_up_to_date() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("keychoir.db");
    let old = Connection::open(&path).unwrap();
    let print = entries()[0].key.fingerprint();
    old.execute_batch(&format!(
        "PRAGMA journal_mode = WAL; PRAGMA auto_vacuum = INCREMENTAL; {}
         INSERT INTO keys (key_hash, short_key, position, status, character_count, character_limit, updated_at_ms)
            VALUES ('{print}', 's', 0, 'active', 40, 100, 1);
         INSERT INTO outbox_keys (key_hash, short_key, status, character_count, character_limit, remaining, usage,
            is_over_limit, is_near_limit, observed_at_ms) VALUES ('{print}', 's', 'active', 40, 100, 60, 0.4, 0, 0, 1);",
        schema::of_version(10)
    ))
    .unwrap();
    drop(old);
    assert_eq!(Reader::open(&path).unwrap().keys(NOW).unwrap().len(), 1, "the old file can be read");
    let location = DatabaseLocation::File(path.clone());
    let store = Store::open(&location, NOW).unwrap();
    assert_eq!(store.refusals().unwrap(), []);
    let [key] = &store.remembered().unwrap()[..] else { panic!("one key") };
    assert_eq!((key.fingerprint, key.quota.count, &key.tier), (print, 40, &None));
    drop(store);
    let connection = Connection::open(&path).unwrap();
    let one = |sql: &str| connection.query_row(sql, [], |row| row.get::<_, i64>(0)).unwrap();
    assert_eq!(one("PRAGMA user_version"), schema::VERSION as i64);
    assert_eq!(one("SELECT remaining FROM outbox_keys"), 60, "the outbox keeps its rows");
    assert_eq!(Reader::open(&path).unwrap().keys(NOW).unwrap().len(), 1);
}

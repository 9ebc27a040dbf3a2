//! Tests of the stored owners of identifiers.

use super::*;
use crate::elevenlabs::affinity::{Kind, Named};
use crate::pool::{OwnerId, OwnershipIndex};

const DAY: Duration = Duration::from_secs(24 * 3_600);

fn recorded(owners: &OwnershipIndex, kind: Kind, id: &str, now: UnixMs) -> OwnershipUpdate {
    let studio = OwnerId::of_word("studio");
    OwnershipUpdate::Recorded(owners.record(Named::new(kind, id), &studio, now).unwrap())
}

fn count(connection: &Connection, class: u8) -> i64 {
    let table = ["owners", "owners_plentiful"][usize::from(class)];
    let of = ["count(*)", "coalesce(sum(changes), 0)"][usize::from(class > 0)];
    connection.query_row(&format!("SELECT {of} FROM {table}"), [], |row| row.get(0)).unwrap()
}

#[tokio::test]
async fn recorded_owners_are_read_back_and_forgotten_ones_are_not() {
    let folder = tempfile::tempdir().unwrap();
    let (location, path) = location(folder.path());
    let pool = pool();
    let owners = OwnershipIndex::new(KEEPING);
    let (usage, writing) =
        Store::open(&location, NOW).unwrap().write(Arc::clone(&pool), settings(8)).unwrap();
    let changes = vec![
        recorded(&owners, Kind::Voice, "canary-of-a-voice", NOW),
        recorded(&owners, Kind::HistoryItem, "canary-of-an-item", NOW),
        recorded(&owners, Kind::Token, "sutkn_canary", NOW),
        recorded(&owners, Kind::Signature, "canary-of-a-url", NOW),
        recorded(&owners, Kind::Cursor, "canary-of-a-cursor", NOW),
        recorded(&owners, Kind::Request, "canary-of-a-request", NOW),
        recorded(&owners, Kind::Agent, "gone", NOW),
    ];
    usage.permit().await.unwrap().record_ownership(changes);
    usage
        .permit()
        .await
        .unwrap()
        .record_ownership(vec![OwnershipUpdate::Forgotten(Named::new(Kind::Agent, "gone"))]);
    drop(usage);
    assert_eq!(writing.ended(WAIT_MAX).await, 0);

    let next = OwnershipIndex::new(KEEPING);
    next.restore(Store::open(&location, NOW).unwrap().owners().unwrap(), NOW);
    assert_eq!(next.count(), 2, "identifiers that are valid for hours are not stored");
    let owner = next.find(&Named::new(Kind::Voice, "canary-of-a-voice"), NOW).unwrap();
    assert_eq!(owner.owner.word(), "studio");
    let everything = fs::read(&path).unwrap();
    for canary in ["canary-of-a-voice", "canary-of-an-item", "sutkn_canary"] {
        assert!(!everything.windows(canary.len()).any(|part| part == canary.as_bytes()), "{canary}");
    }
}

#[test]
fn an_unreadable_row_is_ignored() {
    let store = Store::open(&DatabaseLocation::Memory, NOW).unwrap();
    let odd =
        "INSERT INTO owners VALUES (x'00', 'voice', 0, 'w', 1, 1), (zeroblob(16), 'spell', 0, 'w', 1, 1),
        (randomblob(16), 'voice', 0, 'w', -1, 1)";
    connection(&store).execute_batch(odd).unwrap();
    assert_eq!(store.owners().unwrap().len(), 1);
}

#[test]
fn the_oldest_owners_are_deleted_in_small_steps_within_each_class() {
    let folder = tempfile::tempdir().unwrap();
    let (location, _) = location(folder.path());
    let mut database = open::open(&location, NOW, IntegrityCheck::Quick).unwrap().database;
    let owners = OwnershipIndex::new(Keeping { identifiers_max: usize::MAX, ..KEEPING });
    let mut changes = Vec::new();
    for index in 0..40_000 {
        let at = NOW.plus(Duration::from_millis(index));
        changes.push(recorded(&owners, Kind::HistoryItem, &format!("h{index}"), at));
    }
    for index in 0..100 {
        changes.push(recorded(&owners, Kind::Voice, &format!("v{index}"), NOW));
    }
    rewrite(&mut database, changes, NOW);
    let settings = settings(8);
    let all_maintenance = |database: &mut Database, now| {
        (1..1_000)
            .find(|_| {
                maintenance::step(database, &settings, now).unwrap() == maintenance::MaintenanceStep::Done
            })
            .unwrap()
    };
    assert!(all_maintenance(&mut database, NOW) > 3, "a part of it at a time");
    assert_eq!((count(&database.connection, 0), count(&database.connection, 1)), (100, 1_000));
    all_maintenance(&mut database, NOW.plus(DAY * 30).plus(Duration::from_secs(1)));
    let left = (count(&database.connection, 0), count(&database.connection, 1));
    assert_eq!(left, (0, 1_000), "unused owners are deleted");
    all_maintenance(&mut database, NOW.plus(DAY * 31));
    assert_eq!(count(&database.connection, 1), 0);
}

#[test]
fn the_newest_owners_are_kept() {
    let mut store = Store::open(&DatabaseLocation::Memory, NOW).unwrap();
    let owners = OwnershipIndex::new(Keeping { identifiers_max: usize::MAX, ..KEEPING });
    let changes: Vec<_> = (0..1_500)
        .map(|index| recorded(&owners, Kind::HistoryItem, &format!("h{index}"), UnixMs(NOW.0 + index)))
        .collect();
    let database = store.database.as_mut().unwrap();
    rewrite(database, changes, NOW);
    while maintenance::step(database, &settings(8), NOW).unwrap() == maintenance::MaintenanceStep::More {}
    let connection = &database.connection;
    assert_eq!(count(connection, 1), 1_000);
    let oldest = crate::store::owners::read(connection).unwrap()[0].used_at;
    assert_eq!(oldest.0, NOW.0 + 500);
}

fn rewrite(database: &mut Database, changes: Vec<OwnershipUpdate>, now: UnixMs) {
    rows::commit(database, &batch_of_owners(changes), &[], Mirrored::Nothing, now).unwrap();
}

fn read(database: &Database) -> Vec<(Kind, UnixMs)> {
    let owners = crate::store::owners::read(&database.connection).unwrap();
    owners.iter().map(|recorded| (recorded.named.kind, recorded.used_at)).collect()
}

#[test]
fn the_last_change_of_an_owner_counts() {
    let mut database = open::open(&DatabaseLocation::Memory, NOW, IntegrityCheck::Quick).unwrap().database;
    let owners = OwnershipIndex::new(KEEPING);
    let later = NOW.plus(DAY * 2);
    for (id, at) in [("a", NOW), ("b", NOW), ("a", later)] {
        let change = recorded(&owners, Kind::HistoryItem, id, at);
        rewrite(&mut database, vec![change], at);
    }
    let expected = [(Kind::HistoryItem, NOW), (Kind::HistoryItem, later)];
    assert_eq!((read(&database), count(&database.connection, 1)), (expected.to_vec(), 3));
    rewrite(&mut database, vec![OwnershipUpdate::Forgotten(Named::new(Kind::HistoryItem, "b"))], later);
    assert_eq!((read(&database), count(&database.connection, 1)), (expected[1..].to_vec(), 4));

    // Compacted first, and then once an hour: superseded changes do not displace others for long.
    let mut maintenance = |now| {
        while maintenance::step(&mut database, &settings(8), now).unwrap()
            == maintenance::MaintenanceStep::More
        {}
        (read(&database), count(&database.connection, 1))
    };
    assert_eq!(maintenance(later), (expected[1..].to_vec(), 1));
    let change = recorded(&owners, Kind::HistoryItem, "a", later.plus(DAY));
    rewrite(&mut database, vec![change], later.plus(DAY));
    let mut maintenance = |now| {
        while maintenance::step(&mut database, &settings(8), now).unwrap()
            == maintenance::MaintenanceStep::More
        {}
        count(&database.connection, 1)
    };
    assert_eq!(maintenance(later.plus(Duration::from_secs(3_599))), 2);
    assert_eq!(maintenance(later.plus(Duration::from_secs(3_600))), 1);
    assert_eq!(read(&database), [(Kind::HistoryItem, later.plus(DAY))]);
}

#[test]
fn too_many_owners_are_deleted_before_the_next_maintenance() {
    let folder = tempfile::tempdir().unwrap();
    let (location, path) = location(folder.path());
    let (mut writer, _) = super::faults::writer(&location, &pool(), 8);
    let now = crate::clock::instant();
    writer.work(now);
    let owners = OwnershipIndex::new(Keeping { identifiers_max: usize::MAX, ..KEEPING });
    let at = crate::clock::now();
    let changes = (0..20_001).map(|index| recorded(&owners, Kind::HistoryItem, &format!("h{index}"), at));
    writer.take(batch_of_owners(changes.collect()));
    let counts: Vec<i64> = (0..20)
        .map(|_| {
            writer.work(now);
            count(&Connection::open(&path).unwrap(), 1)
        })
        .collect();
    assert!(counts[0] > 1_000, "in steps: {counts:?}");
    assert_eq!(counts[19], 1_000, "{counts:?}");
}

//! Tests of the stored owners of identifiers: they are read back without unreadable rows, their log is compacted, and
//! their number and age are limited, by maintenance and between two rounds of maintenance.

use super::*;
use crate::elevenlabs::affinity::{Identifier, ResourceKind};
use crate::pool::{OwnerId, OwnershipIndex};

const DAY: Duration = Duration::from_secs(24 * 3_600);

fn record_owner(owners: &OwnershipIndex, kind: ResourceKind, id: &str, now: UnixMs) -> OwnershipUpdate {
    let studio = OwnerId::from_stored("studio");
    OwnershipUpdate::Recorded(owners.record(Identifier::new(kind, id), &studio, now).unwrap())
}

/// Counts the rows of long-lived identifiers for class 0, and the changes in the log for class 1.
fn count_owners(connection: &Connection, class: u8) -> i64 {
    let table = ["owners", "owners_plentiful"][usize::from(class)];
    let aggregate = ["count(*)", "coalesce(sum(changes), 0)"][usize::from(class > 0)];
    connection.query_row(&format!("SELECT {aggregate} FROM {table}"), [], |row| row.get(0)).unwrap()
}

#[tokio::test]
async fn recorded_owners_are_read_back_and_removed_ones_are_not() {
    let directory = tempfile::tempdir().unwrap();
    let (location, path) = location(directory.path());
    let pool = pool();
    let owners = OwnershipIndex::new(OWNER_LIMITS);
    let (usage, writer_handle) =
        Store::open(&location, NOW).unwrap().start_writer(Arc::clone(&pool), settings(8)).unwrap();
    let updates = vec![
        record_owner(&owners, ResourceKind::Voice, "canary-of-a-voice", NOW),
        record_owner(&owners, ResourceKind::HistoryItem, "canary-of-an-item", NOW),
        record_owner(&owners, ResourceKind::Token, "sutkn_canary", NOW),
        record_owner(&owners, ResourceKind::Signature, "canary-of-a-url", NOW),
        record_owner(&owners, ResourceKind::Cursor, "canary-of-a-cursor", NOW),
        record_owner(&owners, ResourceKind::Request, "canary-of-a-request", NOW),
        record_owner(&owners, ResourceKind::Agent, "gone", NOW),
    ];
    usage.acquire_permit().await.unwrap().record_ownership(updates);
    usage
        .acquire_permit()
        .await
        .unwrap()
        .record_ownership(vec![OwnershipUpdate::Removed(Identifier::new(ResourceKind::Agent, "gone"))]);
    drop(usage);
    assert_eq!(writer_handle.wait_until_closed(WAIT_TIMEOUT).await, 0);

    let restored_index = OwnershipIndex::new(OWNER_LIMITS);
    restored_index.restore(Store::open(&location, NOW).unwrap().read_owners().unwrap(), NOW);
    assert_eq!(restored_index.count(), 2, "identifiers that are valid for hours must not be stored");
    let owner = restored_index.find(&Identifier::new(ResourceKind::Voice, "canary-of-a-voice"), NOW).unwrap();
    assert_eq!(owner.owner.as_str(), "studio");
    let content = fs::read(&path).unwrap();
    for canary in ["canary-of-a-voice", "canary-of-an-item", "sutkn_canary"] {
        let is_stored = content.windows(canary.len()).any(|part| part == canary.as_bytes());
        assert!(!is_stored, "the file must not contain the identifier {canary}");
    }
}

#[test]
fn an_unreadable_row_is_skipped() {
    let store = Store::open(&DatabaseLocation::Memory, NOW).unwrap();
    let unreadable_rows =
        "INSERT INTO owners VALUES (x'00', 'voice', 0, 'w', 1, 1), (zeroblob(16), 'spell', 0, 'w', 1, 1),
        (randomblob(16), 'voice', 0, 'w', -1, 1)";
    connection(&store).execute_batch(unreadable_rows).unwrap();
    assert_eq!(store.read_owners().unwrap().len(), 1);
}

#[test]
fn the_oldest_owners_are_deleted_in_small_steps_within_each_class() {
    let directory = tempfile::tempdir().unwrap();
    let (location, _) = location(directory.path());
    let mut database = open_database(&location);
    let owners = OwnershipIndex::new(RetentionLimits { max_identifiers: usize::MAX, ..OWNER_LIMITS });
    let mut updates = Vec::new();
    for index in 0..40_000 {
        let recorded_at = NOW.plus(Duration::from_millis(index));
        updates.push(record_owner(&owners, ResourceKind::HistoryItem, &format!("h{index}"), recorded_at));
    }
    for index in 0..100 {
        updates.push(record_owner(&owners, ResourceKind::Voice, &format!("v{index}"), NOW));
    }
    write_owners(&mut database, updates, NOW);
    let settings = settings(8);
    let run_maintenance = |database: &mut Database, now| {
        (1..1_000)
            .find(|_| {
                maintenance::run_step(database, &settings, now).unwrap()
                    == maintenance::MaintenanceProgress::Done
            })
            .unwrap()
    };
    assert!(run_maintenance(&mut database, NOW) > 3, "the owners must be deleted in several steps");
    assert_eq!((count_owners(&database.connection, 0), count_owners(&database.connection, 1)), (100, 1_000));
    run_maintenance(&mut database, NOW.plus(DAY * 30).plus(Duration::from_secs(1)));
    let counts = (count_owners(&database.connection, 0), count_owners(&database.connection, 1));
    assert_eq!(counts, (0, 1_000), "unused owners must be deleted");
    run_maintenance(&mut database, NOW.plus(DAY * 31));
    assert_eq!(count_owners(&database.connection, 1), 0);
}

#[test]
fn the_newest_owners_are_kept() {
    let mut store = Store::open(&DatabaseLocation::Memory, NOW).unwrap();
    let owners = OwnershipIndex::new(RetentionLimits { max_identifiers: usize::MAX, ..OWNER_LIMITS });
    let updates: Vec<_> = (0..1_500)
        .map(|index| {
            record_owner(&owners, ResourceKind::HistoryItem, &format!("h{index}"), UnixMs(NOW.0 + index))
        })
        .collect();
    let database = store.database.as_mut().unwrap();
    write_owners(database, updates, NOW);
    while maintenance::run_step(database, &settings(8), NOW).unwrap()
        == maintenance::MaintenanceProgress::MoreWork
    {}
    let connection = &database.connection;
    assert_eq!(count_owners(connection, 1), 1_000);
    let oldest_use = crate::store::owners::read(connection).unwrap()[0].used_at;
    assert_eq!(oldest_use.0, NOW.0 + 500);
}

fn write_owners(database: &mut Database, updates: Vec<OwnershipUpdate>, now: UnixMs) {
    transaction::commit(database, &ownership_batch(updates), &[], MirrorScope::Nothing, now).unwrap();
}

/// Returns the kind and the last use of each stored owner.
fn read(database: &Database) -> Vec<(ResourceKind, UnixMs)> {
    let owners = crate::store::owners::read(&database.connection).unwrap();
    owners.iter().map(|recorded| (recorded.identifier.kind, recorded.used_at)).collect()
}

#[test]
fn the_latest_change_of_an_identifier_is_valid() {
    let mut database = open_database(&DatabaseLocation::Memory);
    let owners = OwnershipIndex::new(OWNER_LIMITS);
    let later = NOW.plus(DAY * 2);
    for (id, recorded_at) in [("a", NOW), ("b", NOW), ("a", later)] {
        let update = record_owner(&owners, ResourceKind::HistoryItem, id, recorded_at);
        write_owners(&mut database, vec![update], recorded_at);
    }
    let expected = [(ResourceKind::HistoryItem, NOW), (ResourceKind::HistoryItem, later)];
    assert_eq!((read(&database), count_owners(&database.connection, 1)), (expected.to_vec(), 3));
    write_owners(
        &mut database,
        vec![OwnershipUpdate::Removed(Identifier::new(ResourceKind::HistoryItem, "b"))],
        later,
    );
    assert_eq!((read(&database), count_owners(&database.connection, 1)), (expected[1..].to_vec(), 4));

    // The first maintenance compacts the log, and later maintenance compacts it once an hour.
    let mut run_maintenance = |now| {
        while maintenance::run_step(&mut database, &settings(8), now).unwrap()
            == maintenance::MaintenanceProgress::MoreWork
        {}
        (read(&database), count_owners(&database.connection, 1))
    };
    assert_eq!(run_maintenance(later), (expected[1..].to_vec(), 1));
    let update = record_owner(&owners, ResourceKind::HistoryItem, "a", later.plus(DAY));
    write_owners(&mut database, vec![update], later.plus(DAY));
    let mut run_maintenance = |now| {
        while maintenance::run_step(&mut database, &settings(8), now).unwrap()
            == maintenance::MaintenanceProgress::MoreWork
        {}
        count_owners(&database.connection, 1)
    };
    assert_eq!(run_maintenance(later.plus(Duration::from_secs(3_599))), 2);
    assert_eq!(run_maintenance(later.plus(Duration::from_secs(3_600))), 1);
    assert_eq!(read(&database), [(ResourceKind::HistoryItem, later.plus(DAY))]);
}

#[test]
fn excess_owners_are_deleted_before_the_next_maintenance() {
    let directory = tempfile::tempdir().unwrap();
    let (location, path) = location(directory.path());
    let (mut writer, _) = super::faults::open_writer(&location, &pool(), 8);
    let now = crate::clock::instant();
    writer.run_due_work(now);
    let owners = OwnershipIndex::new(RetentionLimits { max_identifiers: usize::MAX, ..OWNER_LIMITS });
    let recorded_at = crate::clock::now();
    let updates = (0..20_001)
        .map(|index| record_owner(&owners, ResourceKind::HistoryItem, &format!("h{index}"), recorded_at));
    writer.add_batch(ownership_batch(updates.collect()));
    let counts: Vec<i64> = (0..20)
        .map(|_| {
            writer.run_due_work(now);
            count_owners(&Connection::open(&path).unwrap(), 1)
        })
        .collect();
    assert!(counts[0] > 1_000, "the owners must be deleted in steps: {counts:?}");
    assert_eq!(counts[19], 1_000, "only the latest owners must be kept: {counts:?}");
}

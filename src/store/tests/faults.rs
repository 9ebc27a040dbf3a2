//! Tests of the writer thread when writes fail: on a full disk, and with a database that is locked, read-only, corrupt,
//! moved, replaced or not openable. Records are kept and retried up to the limits, and lost records are counted. An
//! in-memory database is limited too.

use super::*;
use crate::clock;
use crate::store::open;

/// Opens the database, and returns a writer for it and the health that the writer updates.
pub(super) fn open_writer(
    location: &DatabaseLocation,
    pool: &Arc<Pool>,
    max_queued_records: usize,
) -> (Writer, Health) {
    let database = open_database(location);
    let health = Health::default();
    (
        Writer::new(
            Some(database),
            location.clone().into(),
            settings(max_queued_records),
            Arc::clone(pool),
            health.clone(),
        ),
        health,
    )
}

fn execute(writer: &Writer, sql: &str) {
    writer.database.as_ref().unwrap().connection.execute_batch(sql).unwrap();
}

fn count_rows(writer: &Writer, table: &str) -> i64 {
    let connection = &writer.database.as_ref().unwrap().connection;
    connection.query_row(&format!("SELECT count(*) FROM {table}"), [], |row| row.get(0)).unwrap()
}

/// Adds a record to the writer, and counts it like the queue.
pub(super) fn send_record(writer: &mut Writer, health: &Health, record: AttemptRecord) {
    health.depth.record_sent(1);
    health.depth.record_taken(1, 1);
    writer.add_batch(attempt_batch(&[record]));
}

#[track_caller]
fn assert_health(health: &Health, is_failing: bool, unwritten_records: u64, lost_records: u64) {
    assert_eq!(
        (health.is_failing(), health.unwritten_records(), health.lost_records()),
        (is_failing, unwritten_records, lost_records)
    );
}

/// Makes writes fail as on a full disk.
fn fill_disk(writer: &Writer) {
    execute(writer, "PRAGMA max_page_count = 1");
}

/// Makes writes succeed again.
fn free_disk(writer: &Writer) {
    execute(writer, "PRAGMA max_page_count = 100000");
}

#[test]
fn records_of_a_failed_write_are_kept_and_written_later() {
    let pool = pool();
    let (mut writer, health) = open_writer(&DatabaseLocation::Memory, &pool, 1_000);
    fill_disk(&writer);
    (0..500).for_each(|credits| send_record(&mut writer, &health, record(&pool, credits)));
    writer.flush();
    assert_health(&health, true, 500, 0);
    free_disk(&writer);
    writer.flush();
    assert_health(&health, false, 0, 0);
    assert_eq!(count_rows(&writer, "attempts"), 500);
}

#[test]
fn records_beyond_the_limit_are_counted_as_lost() {
    let pool = pool();
    let (mut writer, health) = open_writer(&DatabaseLocation::Memory, &pool, 300);
    fill_disk(&writer);
    (0..310).for_each(|credits| send_record(&mut writer, &health, record(&pool, credits)));
    writer.flush();
    assert_health(&health, true, 300, 10);
    free_disk(&writer);
    writer.flush();
    assert_health(&health, false, 0, 10);
    assert_eq!(count_rows(&writer, "attempts"), 300);
}

#[test]
fn a_failed_write_is_retried_once_per_interval() {
    let pool = pool();
    let (mut writer, health) = open_writer(&DatabaseLocation::Memory, &pool, 1_000);
    fill_disk(&writer);
    let started_at = clock::instant();
    (0..500).for_each(|credits| send_record(&mut writer, &health, record(&pool, credits)));
    writer.run_due_work(started_at);
    assert_health(&health, true, 500, 0);
    free_disk(&writer);
    send_record(&mut writer, &health, record(&pool, 1));
    writer.run_due_work(started_at);
    assert_health(&health, true, 501, 0);
    writer.run_due_work(clock::instant() + Duration::from_secs(1));
    assert_health(&health, false, 0, 0);
}

#[tokio::test(start_paused = true)]
async fn unwritten_records_at_the_end_are_counted() {
    let pool = pool();
    let (writer, health) = open_writer(&DatabaseLocation::Memory, &pool, 500);
    fill_disk(&writer);
    let (usage, queue) = UsageSink::new(500, 500, health.depth.clone());
    for credits in 0..500 {
        usage.acquire_permit().await.unwrap().write(record(&pool, credits));
    }
    drop(usage);
    let (_, outbox_commands) = Outbox::new();
    let (all_written, _) = oneshot::channel();
    let history_commands = no_history_commands();
    writer.run(WriterChannels { queue, outbox_commands, history_commands, all_written }).await;
    assert_health(&health, true, 0, 500);
}

#[tokio::test]
async fn the_wait_until_closed_is_bounded() {
    let pool = pool();
    let store = Store::open(&DatabaseLocation::Memory, NOW).unwrap();
    let (usage, writer_handle) = store.start_writer(Arc::clone(&pool), settings(8)).unwrap();
    let permit = usage.acquire_permit().await.unwrap();
    writer_handle.health.depth.record_sent(3);
    assert_eq!(writer_handle.wait_until_closed(Duration::ZERO).await, 3);
    drop(permit);
}

#[tokio::test]
async fn unwritten_records_are_counted_until_they_are_written() {
    let pool = pool();
    let (mut writer, health) = open_writer(&DatabaseLocation::Memory, &pool, 8);
    let (usage, mut queue) = UsageSink::new(8, 8, health.depth.clone());
    for _ in 0..3 {
        usage.acquire_permit().await.unwrap().write(record(&pool, 1));
    }
    assert_health(&health, false, 3, 0);
    let mut batch = UsageBatch::default();
    queue.take(&mut batch);
    writer.add_batch(batch);
    assert_health(&health, false, 3, 0);
    writer.flush();
    assert_health(&health, false, 0, 0);
}

#[test]
fn a_deleted_directory_is_created_again() {
    let directory = tempfile::tempdir().unwrap();
    let (location, path) = location(directory.path());
    let pool = pool();
    let (mut writer, health) = open_writer(&location, &pool, 8);
    send_record(&mut writer, &health, record(&pool, 1));
    writer.flush();
    fs::remove_dir_all(path.parent().unwrap()).unwrap();
    send_record(&mut writer, &health, record(&pool, 2));
    writer.flush();
    assert_health(&health, false, 0, 0);
    let credits: Vec<i64> = read_attempts(&path).into_iter().map(|(_, credits)| credits).collect();
    assert_eq!(credits, [2], "the later record must be in the new file");
    assert_eq!(count_rows(&writer, "keys"), 2, "the new file must have the state of all keys");
}

#[test]
fn a_file_that_replaces_the_database_is_written_and_keeps_its_log() {
    let directory = tempfile::tempdir().unwrap();
    let (location, path) = location(directory.path());
    let pool = pool();
    let (mut writer, health) = open_writer(&location, &pool, 8);
    send_record(&mut writer, &health, record(&pool, 1));
    writer.flush();

    let other_path = directory.path().join("other.db");
    let (mut other_writer, other_health) = open_writer(&DatabaseLocation::File(other_path.clone()), &pool, 8);
    send_record(&mut other_writer, &other_health, record(&pool, 5));
    other_writer.flush();
    // The other file is moved with its log, from which no page was copied to the file.
    for suffix in ["", "-wal", "-shm"] {
        fs::rename(open::companion(&other_path, suffix), open::companion(&path, suffix)).unwrap();
    }
    send_record(&mut writer, &health, record(&pool, 7));
    writer.flush();
    assert_health(&health, false, 0, 0);
    drop(other_writer);
    let credits: Vec<i64> = read_attempts(&path).into_iter().map(|(_, credits)| credits).collect();
    assert_eq!(credits, [5, 7]);
}

#[test]
fn a_path_that_cannot_be_opened_is_retried() {
    let directory = tempfile::tempdir().unwrap();
    let (location, path) = location(directory.path());
    let pool = pool();
    let (mut writer, health) = open_writer(&location, &pool, 8);
    writer.flush();
    let directory_path = path.parent().unwrap();
    fs::remove_dir_all(directory_path).unwrap();
    fs::write(directory_path, "a file").unwrap();
    send_record(&mut writer, &health, record(&pool, 1));
    writer.flush();
    writer.flush();
    assert_health(&health, true, 1, 0);
    fs::remove_file(directory_path).unwrap();
    writer.flush();
    assert_health(&health, false, 0, 0);
    assert_eq!(read_attempts(&path).len(), 1);
}

#[test]
fn a_write_is_retried_until_another_connection_unlocks_the_database() {
    let directory = tempfile::tempdir().unwrap();
    let (location, path) = location(directory.path());
    let pool = pool();
    let (mut writer, health) = open_writer(&location, &pool, 8);
    let other_connection = Connection::open(&path).unwrap();
    other_connection.execute_batch("BEGIN IMMEDIATE").unwrap();
    send_record(&mut writer, &health, record(&pool, 1));
    writer.flush();
    assert_health(&health, true, 1, 0);
    other_connection.execute_batch("COMMIT").unwrap();
    writer.flush();
    assert_health(&health, false, 0, 0);
    assert_eq!(read_attempts(&path).len(), 1);
}

#[test]
fn a_read_only_connection_is_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let (location, path) = location(directory.path());
    let pool = pool();
    let (mut writer, health) = open_writer(&location, &pool, 8);
    execute(&writer, "PRAGMA query_only = on");
    send_record(&mut writer, &health, record(&pool, 1));
    writer.flush();
    assert_health(&health, true, 1, 0);
    writer.flush();
    assert_health(&health, false, 0, 0);
    assert_eq!(read_attempts(&path).len(), 1);
}

/// Returns the names of the files in the directory of `path`.
fn file_names_next_to(path: &Path) -> Vec<String> {
    let files = fs::read_dir(path.parent().unwrap()).unwrap();
    files.map(|file| file.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn a_database_that_becomes_corrupt_is_quarantined_and_no_record_is_lost() {
    let directory = tempfile::tempdir().unwrap();
    let (location, path) = location(directory.path());
    let pool = pool();
    let (mut writer, health) = open_writer(&location, &pool, 2_000);
    (0..1_000).for_each(|credits| send_record(&mut writer, &health, record(&pool, credits)));
    writer.flush();
    // Another connection writes, so that the writer's connection reads the pages again.
    let other_connection = Connection::open(&path).unwrap();
    other_connection.execute_batch("DELETE FROM keys").unwrap();
    other_connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).unwrap();
    other_connection.execute_batch("DELETE FROM hours").unwrap();
    drop(other_connection);
    let log = fs::read(open::companion(&path, "-wal")).unwrap();
    let mut bytes = fs::read(&path).unwrap();
    bytes[4_096..].fill(0xff);
    // The file is overwritten in place, so its identity stays the same.
    std::io::Write::write_all(&mut fs::OpenOptions::new().write(true).open(&path).unwrap(), &bytes).unwrap();

    send_record(&mut writer, &health, record(&pool, 7));
    writer.flush();
    assert_health(&health, true, 1, 0);
    writer.flush();
    assert_health(&health, false, 0, 0);
    let names = file_names_next_to(&path);
    let is_quarantined =
        |name: &&String| name.contains(".broken-") && !name.ends_with("-wal") && !name.ends_with("-shm");
    let quarantined = names.iter().find(is_quarantined).expect("the corrupt file must be kept");
    assert!(
        fs::read(path.with_file_name(quarantined)).unwrap() == bytes,
        "the corrupt file must be unchanged"
    );
    let quarantined_log = open::companion(&path.with_file_name(quarantined), "-wal");
    assert!(!log.is_empty() && fs::read(quarantined_log).unwrap() == log, "its log must be unchanged");
    assert_eq!(read_attempts(&path).len(), 1);
}

#[tokio::test]
async fn a_database_that_cannot_be_opened_is_created_later() {
    let directory = tempfile::tempdir().unwrap();
    let (location, path) = location(directory.path());
    let disk_full = std::io::Error::from(std::io::ErrorKind::StorageFull);
    let error = OpenError::Unwritable { path: path.clone(), source: disk_full };
    assert!(error.is_temporary());
    let store = Store { location: location.into(), database: Err(error), quarantined_path: None };
    assert_eq!(store.read_keys().unwrap(), []);
    let pool = pool();
    let (usage, writer_handle) = store.start_writer(Arc::clone(&pool), settings(8)).unwrap();
    usage.acquire_permit().await.unwrap().write(record(&pool, 1));
    drop(usage);
    assert_eq!(writer_handle.wait_until_closed(WAIT_TIMEOUT).await, 0);
    assert_eq!(read_attempts(&path).len(), 1);
}

#[test]
fn a_database_that_cannot_be_opened_is_reported_as_failing() {
    let pool = pool();
    let health = Health::default();
    let source = std::io::Error::from(std::io::ErrorKind::ReadOnlyFilesystem);
    let error = OpenError::Unwritable { path: PathBuf::from("k.db"), source };
    let store =
        Store { location: DatabaseLocation::Memory.into(), database: Err(error), quarantined_path: None };
    let mut writer = store.into_writer(pool, settings(8), health.clone());
    assert_health(&health, true, 0, 0);
    writer.flush();
    assert_health(&health, false, 0, 0);
}

#[test]
fn an_error_that_needs_an_operator_is_not_temporary() {
    let unwritable =
        |kind: std::io::ErrorKind| OpenError::Unwritable { path: PathBuf::new(), source: kind.into() };
    let unusable = |code| OpenError::Unusable {
        path: PathBuf::new(),
        source: rusqlite::Error::SqliteFailure(rusqlite::ffi::Error::new(code), None),
    };
    for (error, expected) in [
        (unwritable(std::io::ErrorKind::QuotaExceeded), true),
        (unwritable(std::io::ErrorKind::PermissionDenied), false),
        (unwritable(std::io::ErrorKind::NotADirectory), false),
        (unusable(rusqlite::ffi::SQLITE_FULL), true),
        (unusable(rusqlite::ffi::SQLITE_IOERR), true),
        (unusable(rusqlite::ffi::SQLITE_BUSY), true),
        (unusable(rusqlite::ffi::SQLITE_PERM), false),
        (OpenError::Newer { path: PathBuf::new(), version: 99 }, false),
    ] {
        assert_eq!(
            error.is_temporary(),
            expected,
            "`is_temporary` must be {expected} for this error: {error}"
        );
    }
}

#[test]
fn the_attempts_of_an_in_memory_database_are_bounded() {
    let pool = pool();
    let (mut writer, health) = open_writer(&DatabaseLocation::Memory, &pool, 20_000);
    (0..10_000).for_each(|_| send_record(&mut writer, &health, record(&pool, 1)));
    writer.flush();
    assert_eq!(count_rows(&writer, "attempts"), 10_000);
    send_record(&mut writer, &health, record(&pool, 1));
    writer.flush();
    assert_eq!(count_rows(&writer, "attempts"), 0);
    let credits: i64 = {
        let connection = &writer.database.as_ref().unwrap().connection;
        connection.query_row("SELECT sum(credits) FROM hours", [], |row| row.get(0)).unwrap()
    };
    assert_eq!(credits, 10_001, "the hourly sums must be kept");
}

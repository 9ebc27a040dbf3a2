//! Tests of disk failures, and of files that are moved or replaced while they are open.

use super::*;
use crate::clock;
use crate::store::open;

pub(super) fn writer(location: &DatabaseLocation, pool: &Arc<Pool>, queue_max: usize) -> (Writer, Health) {
    let database = open::open(location, NOW, IntegrityCheck::Quick).unwrap().database;
    let health = Health::default();
    (
        Writer::new(
            Some(database),
            location.clone().into(),
            settings(queue_max),
            Arc::clone(pool),
            health.clone(),
        ),
        health,
    )
}

fn execute(writer: &Writer, sql: &str) {
    writer.database.as_ref().unwrap().connection.execute_batch(sql).unwrap();
}

fn count(writer: &Writer, table: &str) -> i64 {
    let connection = &writer.database.as_ref().unwrap().connection;
    connection.query_row(&format!("SELECT count(*) FROM {table}"), [], |row| row.get(0)).unwrap()
}

/// Sends a record and counts it as the queue does.
pub(super) fn send_record(writer: &mut Writer, health: &Health, record: AttemptRecord) {
    health.depth.record_sent(1);
    health.depth.record_taken(1, 1);
    writer.take(batch_of(&[record]));
}

#[track_caller]
fn assert_health(health: &Health, is_failing: bool, waiting: u64, lost: u64) {
    assert_eq!((health.is_failing(), health.waiting(), health.lost()), (is_failing, waiting, lost));
}

/// Prevents the file from growing, as on a full disk.
fn fill_disk(writer: &Writer) {
    execute(writer, "PRAGMA max_page_count = 1");
}

fn empty_disk(writer: &Writer) {
    execute(writer, "PRAGMA max_page_count = 100000");
}

#[test]
fn records_of_a_failed_write_are_kept_and_written_later() {
    let pool = pool();
    let (mut writer, health) = writer(&DatabaseLocation::Memory, &pool, 1_000);
    fill_disk(&writer);
    (0..500).for_each(|credits| send_record(&mut writer, &health, record(&pool, credits)));
    writer.flush();
    assert_health(&health, true, 500, 0);
    empty_disk(&writer);
    writer.flush();
    assert_health(&health, false, 0, 0);
    assert_eq!(count(&writer, "attempts"), 500);
}

#[test]
fn records_beyond_the_bound_are_counted_as_lost() {
    let pool = pool();
    let (mut writer, health) = writer(&DatabaseLocation::Memory, &pool, 300);
    fill_disk(&writer);
    (0..310).for_each(|credits| send_record(&mut writer, &health, record(&pool, credits)));
    writer.flush();
    assert_health(&health, true, 300, 10);
    empty_disk(&writer);
    writer.flush();
    assert_health(&health, false, 0, 10);
    assert_eq!(count(&writer, "attempts"), 300);
}

#[test]
fn a_failing_disk_is_retried_once_per_pause() {
    let pool = pool();
    let (mut writer, health) = writer(&DatabaseLocation::Memory, &pool, 1_000);
    fill_disk(&writer);
    let before = clock::instant();
    (0..500).for_each(|credits| send_record(&mut writer, &health, record(&pool, credits)));
    writer.work(before);
    assert_health(&health, true, 500, 0);
    empty_disk(&writer);
    send_record(&mut writer, &health, record(&pool, 1));
    writer.work(before);
    assert_health(&health, true, 501, 0);
    writer.work(clock::instant() + Duration::from_secs(1));
    assert_health(&health, false, 0, 0);
}

#[tokio::test(start_paused = true)]
async fn unwritten_records_at_the_end_are_counted() {
    let pool = pool();
    let (writer, health) = writer(&DatabaseLocation::Memory, &pool, 500);
    fill_disk(&writer);
    let (usage, queue) = UsageSink::new(500, 500, health.depth.clone());
    for credits in 0..500 {
        usage.permit().await.unwrap().write(record(&pool, credits));
    }
    drop(usage);
    let (_, commands) = Outbox::new();
    let (all_written, _) = oneshot::channel();
    writer.run(Callers { queue, commands, all_written }).await;
    assert_health(&health, true, 0, 500);
}

#[tokio::test]
async fn the_wait_for_the_end_is_bounded() {
    let pool = pool();
    let store = Store::open(&DatabaseLocation::Memory, NOW).unwrap();
    let (usage, writing) = store.write(Arc::clone(&pool), settings(8)).unwrap();
    let location = usage.permit().await.unwrap();
    writing.health.depth.record_sent(3);
    assert_eq!(writing.ended(Duration::ZERO).await, 3);
    drop(location);
}

#[tokio::test]
async fn waiting_records_are_counted_until_they_are_written() {
    let pool = pool();
    let (mut writer, health) = writer(&DatabaseLocation::Memory, &pool, 8);
    let (usage, mut queue) = UsageSink::new(8, 8, health.depth.clone());
    for _ in 0..3 {
        usage.permit().await.unwrap().write(record(&pool, 1));
    }
    assert_health(&health, false, 3, 0);
    let mut batch = UsageBatch::default();
    queue.take(&mut batch);
    writer.take(batch);
    assert_health(&health, false, 3, 0);
    writer.flush();
    assert_health(&health, false, 0, 0);
}

#[test]
fn a_folder_that_is_deleted_is_made_again() {
    let folder = tempfile::tempdir().unwrap();
    let (location, path) = location(folder.path());
    let pool = pool();
    let (mut writer, health) = writer(&location, &pool, 8);
    send_record(&mut writer, &health, record(&pool, 1));
    writer.flush();
    fs::remove_dir_all(path.parent().unwrap()).unwrap();
    send_record(&mut writer, &health, record(&pool, 2));
    writer.flush();
    assert_health(&health, false, 0, 0);
    let credits: Vec<i64> = attempts(&path).into_iter().map(|(_, credits)| credits).collect();
    assert_eq!(credits, [2], "the later record is in the new file");
    assert_eq!(count(&writer, "keys"), 2, "the new file has the state of all keys");
}

#[test]
fn a_file_that_replaces_the_database_is_written_and_keeps_its_own_log() {
    let folder = tempfile::tempdir().unwrap();
    let (location, path) = location(folder.path());
    let pool = pool();
    let (mut writer, health) = writer(&location, &pool, 8);
    send_record(&mut writer, &health, record(&pool, 1));
    writer.flush();

    let other = folder.path().join("other.db");
    let (mut elsewhere, its_health) = super::faults::writer(&DatabaseLocation::File(other.clone()), &pool, 8);
    send_record(&mut elsewhere, &its_health, record(&pool, 5));
    elsewhere.flush();
    // The file is moved with its log, of which no page was checkpointed.
    for suffix in ["", "-wal", "-shm"] {
        fs::rename(open::companion(&other, suffix), open::companion(&path, suffix)).unwrap();
    }
    send_record(&mut writer, &health, record(&pool, 7));
    writer.flush();
    assert_health(&health, false, 0, 0);
    drop(elsewhere);
    let credits: Vec<i64> = attempts(&path).into_iter().map(|(_, credits)| credits).collect();
    assert_eq!(credits, [5, 7]);
}

#[test]
fn a_path_that_cannot_be_opened_is_retried() {
    let folder = tempfile::tempdir().unwrap();
    let (location, path) = location(folder.path());
    let pool = pool();
    let (mut writer, health) = writer(&location, &pool, 8);
    writer.flush();
    let state = path.parent().unwrap();
    fs::remove_dir_all(state).unwrap();
    fs::write(state, "in the way").unwrap();
    send_record(&mut writer, &health, record(&pool, 1));
    writer.flush();
    writer.flush();
    assert_health(&health, true, 1, 0);
    fs::remove_file(state).unwrap();
    writer.flush();
    assert_health(&health, false, 0, 0);
    assert_eq!(attempts(&path).len(), 1);
}

#[test]
fn a_lock_is_waited_out() {
    let folder = tempfile::tempdir().unwrap();
    let (location, path) = location(folder.path());
    let pool = pool();
    let (mut writer, health) = writer(&location, &pool, 8);
    let other = Connection::open(&path).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    send_record(&mut writer, &health, record(&pool, 1));
    writer.flush();
    assert_health(&health, true, 1, 0);
    other.execute_batch("COMMIT").unwrap();
    writer.flush();
    assert_health(&health, false, 0, 0);
    assert_eq!(attempts(&path).len(), 1);
}

#[test]
fn a_connection_that_can_only_read_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let (location, path) = location(folder.path());
    let pool = pool();
    let (mut writer, health) = writer(&location, &pool, 8);
    execute(&writer, "PRAGMA query_only = on");
    send_record(&mut writer, &health, record(&pool, 1));
    writer.flush();
    assert_health(&health, true, 1, 0);
    writer.flush();
    assert_health(&health, false, 0, 0);
    assert_eq!(attempts(&path).len(), 1);
}

fn files(path: &Path) -> Vec<String> {
    let files = fs::read_dir(path.parent().unwrap()).unwrap();
    files.map(|file| file.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn a_file_that_breaks_while_it_is_written_is_quarantined_without_a_loss() {
    let folder = tempfile::tempdir().unwrap();
    let (location, path) = location(folder.path());
    let pool = pool();
    let (mut writer, health) = writer(&location, &pool, 2_000);
    (0..1_000).for_each(|credits| send_record(&mut writer, &health, record(&pool, credits)));
    writer.flush();
    // Another connection writes, which invalidates the first one's cache.
    let other = Connection::open(&path).unwrap();
    other.execute_batch("DELETE FROM keys").unwrap();
    other.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).unwrap();
    other.execute_batch("DELETE FROM hours").unwrap();
    drop(other);
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
    let names = files(&path);
    let is_quarantined =
        |name: &&String| name.contains(".broken-") && !name.ends_with("-wal") && !name.ends_with("-shm");
    let quarantined = names.iter().find(is_quarantined).expect("it is kept");
    assert!(fs::read(path.with_file_name(quarantined)).unwrap() == bytes, "the file is complete");
    let its_log = open::companion(&path.with_file_name(quarantined), "-wal");
    assert!(!log.is_empty() && fs::read(its_log).unwrap() == log, "the log is complete");
    assert_eq!(attempts(&path).len(), 1);
}

#[tokio::test]
async fn a_database_that_cannot_be_opened_now_is_made_later() {
    let folder = tempfile::tempdir().unwrap();
    let (location, path) = location(folder.path());
    let full = std::io::Error::from(std::io::ErrorKind::StorageFull);
    let trouble = OpenError::Unwritable { path: path.clone(), source: full };
    assert!(trouble.may_pass());
    let store = Store { site: location.into(), database: Err(trouble), quarantined: None };
    assert_eq!(store.remembered().unwrap(), []);
    let pool = pool();
    let (usage, writing) = store.write(Arc::clone(&pool), settings(8)).unwrap();
    usage.permit().await.unwrap().write(record(&pool, 1));
    drop(usage);
    assert_eq!(writing.ended(WAIT_MAX).await, 0);
    assert_eq!(attempts(&path).len(), 1);
}

#[test]
fn a_database_that_fails_from_the_start_is_reported() {
    let pool = pool();
    let health = Health::default();
    let source = std::io::Error::from(std::io::ErrorKind::ReadOnlyFilesystem);
    let trouble = OpenError::Unwritable { path: PathBuf::from("k.db"), source };
    let store = Store { site: DatabaseLocation::Memory.into(), database: Err(trouble), quarantined: None };
    let mut writer = store.writer(pool, settings(8), health.clone());
    assert_health(&health, true, 0, 0);
    writer.flush();
    assert_health(&health, false, 0, 0);
}

#[test]
fn an_error_that_needs_an_operator_is_permanent() {
    let unwritable =
        |kind: std::io::ErrorKind| OpenError::Unwritable { path: PathBuf::new(), source: kind.into() };
    let unusable = |code| OpenError::Unusable {
        path: PathBuf::new(),
        source: rusqlite::Error::SqliteFailure(rusqlite::ffi::Error::new(code), None),
    };
    for (error, may_pass) in [
        (unwritable(std::io::ErrorKind::QuotaExceeded), true),
        (unwritable(std::io::ErrorKind::PermissionDenied), false),
        (unwritable(std::io::ErrorKind::NotADirectory), false),
        (unusable(rusqlite::ffi::SQLITE_FULL), true),
        (unusable(rusqlite::ffi::SQLITE_IOERR), true),
        (unusable(rusqlite::ffi::SQLITE_BUSY), true),
        (unusable(rusqlite::ffi::SQLITE_PERM), false),
        (OpenError::Newer { path: PathBuf::new(), version: 99 }, false),
    ] {
        assert_eq!(error.may_pass(), may_pass, "{error}");
    }
}

#[test]
fn a_database_in_memory_stays_small() {
    let pool = pool();
    let (mut writer, health) = writer(&DatabaseLocation::Memory, &pool, 20_000);
    (0..10_000).for_each(|_| send_record(&mut writer, &health, record(&pool, 1)));
    writer.flush();
    assert_eq!(count(&writer, "attempts"), 10_000);
    send_record(&mut writer, &health, record(&pool, 1));
    writer.flush();
    assert_eq!(count(&writer, "attempts"), 0);
    let credits: i64 = {
        let connection = &writer.database.as_ref().unwrap().connection;
        connection.query_row("SELECT sum(credits) FROM hours", [], |row| row.get(0)).unwrap()
    };
    assert_eq!(credits, 10_001, "the sums stay");
}

//! Tests of upgrades, dry runs and backups: which copies of the database exist after them, what they report, and which
//! databases, targets and disks they refuse.

use super::*;
use crate::store::lock::Lock;
use crate::store::snapshot::{self, ExistingFile, SnapshotError};
use crate::store::{MigrationOutcome, back_up, dry_run_migration, migrate, schema, upgrade};

/// Creates a file of version 9 with two attempts.
fn create_version_9_database(path: &Path) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let old_connection = Connection::open(path).unwrap();
    old_connection.execute_batch(&format!("PRAGMA journal_mode = WAL; {}", schema::for_version(9))).unwrap();
    old_connection.execute_batch(
        "INSERT INTO series VALUES
            (1, 'local', '54ae788b', NULL, 'GET', '/v1/models', NULL, 200, 'served', 'free', 1795953600000);
         INSERT INTO attempt_rows VALUES
            (x'01a22743a37477d9bd8ce92cd127fc02', 'r1', 1, 1, 1795955073908, 0, 5364, NULL, NULL, 0, 1, 2, NULL),
            (x'01a22743a5c577d9bd8cea44d127fc02', 'r2', 1, 1, 1795955074501, 1, 2, 3, 4, 5, 6, 7, 8)",
    )
    .unwrap();
}

fn version_of(path: &Path) -> usize {
    schema::version(&Connection::open(path).unwrap()).unwrap()
}

/// Returns the sorted names of the files in a directory, without the logs and shared memory of SQLite.
fn names_in(directory: &Path) -> Vec<String> {
    let names = fs::read_dir(directory).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> =
        names.filter(|name| !name.ends_with("-wal") && !name.ends_with("-shm")).collect();
    names.sort();
    names
}

#[test]
fn an_upgrade_keeps_a_copy_of_the_earlier_version() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().unwrap();
    let (location, path) = location(directory.path());
    create_version_9_database(&path);
    drop(Store::open(&location, NOW).unwrap());
    let copy = open::companion(&path, ".before-9");
    assert_eq!((version_of(&path), version_of(&copy)), (schema::VERSION, 9));
    assert_eq!(fs::metadata(&copy).unwrap().permissions().mode() & 0o777, 0o600);
    let connection = Connection::open(&copy).unwrap();
    assert_eq!(query_number(&connection, "SELECT count(*) FROM attempts"), 2);
    assert_eq!(snapshot::count_attempts(&connection), Some(2));
    drop(connection);
    // The next startup upgrades nothing and copies nothing.
    fs::remove_file(&copy).unwrap();
    drop(Store::open(&location, NOW).unwrap());
    assert!(!copy.exists());
}

#[test]
fn a_new_database_is_not_copied() {
    let directory = tempfile::tempdir().unwrap();
    let (location, path) = location(directory.path());
    drop(Store::open(&location, NOW).unwrap());
    assert_eq!(names_in(path.parent().unwrap()), ["keychoir.db", "keychoir.db.lock"]);
}

#[test]
fn only_the_two_latest_copies_are_kept() {
    let directory = tempfile::tempdir().unwrap();
    let (location, path) = location(directory.path());
    create_version_9_database(&path);
    for version in [3, 7, 8] {
        fs::write(open::companion(&path, &format!(".before-{version}")), "earlier").unwrap();
    }
    drop(Store::open(&location, NOW).unwrap());
    assert_eq!(
        names_in(path.parent().unwrap()),
        ["keychoir.db", "keychoir.db.before-8", "keychoir.db.before-9", "keychoir.db.lock"]
    );
}

#[test]
fn without_a_copy_nothing_is_upgraded() {
    let directory = tempfile::tempdir().unwrap();
    let (location, path) = location(directory.path());
    create_version_9_database(&path);
    let obstacle = open::companion(&path, ".before-9");
    fs::create_dir(&obstacle).unwrap();
    let error = Store::open(&location, NOW).unwrap_err();
    assert!(
        matches!(&error, OpenError::CannotCopy { .. }) && !error.is_temporary(),
        "the upgrade must fail because of the copy: {error}"
    );
    assert!(error.to_string().contains("Nothing was changed"), "nothing must be changed: {error}");
    assert_eq!(version_of(&path), 9);
    assert_eq!(query_number(&Connection::open(&path).unwrap(), "SELECT count(*) FROM attempt_rows"), 2);
    fs::remove_dir(&obstacle).unwrap();
    drop(Store::open(&location, NOW).unwrap());
    assert_eq!(version_of(&path), schema::VERSION);
}

#[test]
fn a_disk_with_too_little_space_is_reported_with_both_amounts() {
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("copy.db");
    snapshot::check_space(&target, 1).unwrap();
    let error = snapshot::check_space(&target, u64::MAX).unwrap_err();
    let SnapshotError::NoSpace { needed: u64::MAX, available, .. } = error else {
        panic!("the error must be a lack of space: {error}")
    };
    assert!(
        available > 0 && error.to_string().contains("MiB are needed"),
        "the error must contain both sizes: {error}"
    );
    // Startup and `keychoir check` use this function for the space of an upgrade.
    let (_, path) = location(directory.path());
    create_version_9_database(&path);
    upgrade::check_space(&Connection::open(&path).unwrap(), &path).unwrap();
}

#[test]
fn a_dry_run_reports_the_upgrade_and_changes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let (_, path) = location(directory.path());
    create_version_9_database(&path);
    let names_before = names_in(path.parent().unwrap());
    let MigrationOutcome::Migrated(report) = dry_run_migration(&path).unwrap() else {
        panic!("the dry run must migrate the copy")
    };
    assert_eq!((report.from, report.to), (9, schema::VERSION));
    assert_eq!((report.attempts_before, report.attempts_after), (Some(2), Some(2)));
    assert_eq!(report.changes.len(), schema::VERSION - 9);
    assert_eq!((report.copy, version_of(&path), report.warning), (None, 9, None));
    assert_eq!(names_in(path.parent().unwrap()), names_before);

    let MigrationOutcome::Migrated(report) = migrate(&path).unwrap() else {
        panic!("the database must be migrated")
    };
    assert_eq!((report.from, report.attempts_before, report.attempts_after), (9, Some(2), Some(2)));
    let copy = report.copy.unwrap();
    assert_eq!(version_of(&copy), 9);
    let warning = report.warning.expect("the copy must contain plain digests");
    assert!(
        warning.contains(&copy.display().to_string()) && warning.contains("digests"),
        "the warning must name the copy: {warning}"
    );
    let current = MigrationOutcome::Current(schema::VERSION);
    assert_eq!([dry_run_migration(&path).unwrap(), migrate(&path).unwrap()], [current.clone(), current]);
}

#[test]
fn a_dry_run_removes_the_directory_of_an_interrupted_one() {
    let directory = tempfile::tempdir().unwrap();
    let (_, path) = location(directory.path());
    create_version_9_database(&path);
    let abandoned_directory = path.with_file_name(".keychoir-dry-run-killed");
    fs::create_dir(&abandoned_directory).unwrap();
    fs::write(abandoned_directory.join("keychoir.db"), "a full copy").unwrap();
    dry_run_migration(&path).unwrap();
    assert!(!abandoned_directory.exists(), "the directory of a killed process must be removed");
}

#[test]
fn a_migration_refuses_databases_that_it_cannot_upgrade() {
    let directory = tempfile::tempdir().unwrap();
    let missing = directory.path().join("missing.db");
    assert!(migrate(&missing).unwrap_err().to_string().contains("there is no database"));
    assert!(!missing.exists(), "a migration must not create a database");
    let (_, path) = location(directory.path());
    create_version_9_database(&path);
    let lock = Lock::acquire(&path).unwrap();
    assert!(migrate(&path).unwrap_err().to_string().contains("in use by another Keychoir"));
    drop(lock);
    Connection::open(&path).unwrap().execute_batch("PRAGMA user_version = 99").unwrap();
    for error in [migrate(&path).unwrap_err(), dry_run_migration(&path).unwrap_err()] {
        assert!(error.to_string().contains("newer Keychoir"), "the version must be refused: {error}");
    }
    let text_file = directory.path().join("text.db");
    fs::write(&text_file, "a text file").unwrap();
    for error in [migrate(&text_file).unwrap_err(), dry_run_migration(&text_file).unwrap_err()] {
        assert!(
            error.to_string().contains("is not a Keychoir database"),
            "the text file must be refused: {error}"
        );
    }
}

#[tokio::test]
async fn a_backup_has_the_records_that_are_still_in_the_log() {
    let directory = tempfile::tempdir().unwrap();
    let (location, path) = location(directory.path());
    let pool = pool();
    let (usage, writer_handle) =
        Store::open(&location, NOW).unwrap().start_writer(Arc::clone(&pool), settings(8)).unwrap();
    for credits in 1..=5 {
        usage.acquire_permit().await.unwrap().write(record(&pool, credits));
    }
    while writer_handle.health.written_records() < 5 {
        tokio::task::yield_now().await;
    }
    let target = directory.path().join("copy.db");
    let backup = back_up(&path, &target, ExistingFile::Keep).unwrap();
    assert_eq!((backup.attempts, backup.version), (5, schema::VERSION));
    assert_eq!(read_attempts(&target), read_attempts(&path));
    drop(usage);
    assert_eq!(writer_handle.wait_until_closed(WAIT_TIMEOUT).await, 0);
    // The copy is a database that startup can use.
    assert_eq!(Store::open(&DatabaseLocation::File(target), NOW).unwrap().quarantined_path(), None);
}

#[test]
fn a_backup_replaces_a_file_only_on_request_and_never_the_database() {
    let directory = tempfile::tempdir().unwrap();
    let (location, path) = location(directory.path());
    drop(Store::open(&location, NOW).unwrap());
    let target = directory.path().join("copy.db");
    fs::write(&target, "important").unwrap();
    let unrelated = directory.path().join("copy.db.partial");
    fs::write(&unrelated, "unrelated").unwrap();
    let error = back_up(&path, &target, ExistingFile::Keep).unwrap_err();
    assert!(matches!(error, SnapshotError::Exists(_)), "the existing file must be kept: {error}");
    assert_eq!(fs::read_to_string(&target).unwrap(), "important");
    back_up(&path, &target, ExistingFile::Replace).unwrap();
    assert_eq!(version_of(&target), schema::VERSION);
    let link = directory.path().join("link.db");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    for target in [&path, &link] {
        let error = back_up(&path, target, ExistingFile::Replace).unwrap_err();
        assert!(matches!(error, SnapshotError::Itself(_)), "the database must not be a target: {error}");
    }
    let error = back_up(&path, &directory.path().join("none/copy.db"), ExistingFile::Keep).unwrap_err();
    assert!(matches!(error, SnapshotError::Unwritable { .. }), "the target must be unwritable: {error}");
    assert_eq!(
        fs::read_to_string(&unrelated).unwrap(),
        "unrelated",
        "the backup must not change another file"
    );
    assert_eq!(names_in(directory.path()), ["copy.db", "copy.db.partial", "link.db", "state"]);
}

#[test]
fn a_backup_of_a_corrupt_database_fails_and_leaves_no_file() {
    let directory = tempfile::tempdir().unwrap();
    let (location, path) = location(directory.path());
    drop(Store::open(&location, NOW).unwrap());
    let mut bytes = fs::read(&path).unwrap();
    for byte in &mut bytes[4_096..] {
        *byte = 0x5a;
    }
    fs::write(&path, &bytes).unwrap();
    let target = directory.path().join("copy.db");
    back_up(&path, &target, ExistingFile::Keep).unwrap_err();
    assert_eq!(names_in(directory.path()), ["state"]);
}

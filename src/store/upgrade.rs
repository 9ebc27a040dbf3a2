//! Upgrades a database of an earlier version, at startup and for `keychoir db migrate`: checks the free space, copies
//! the database, migrates it, removes old copies, and warns of copies that contain plain digests of keys. Also runs the
//! migration on a temporary copy, for `keychoir db migrate --dry-run`.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::Connection;

use super::attempts::migration;
use super::open::{self, IntegrityCheck, companion};
use super::snapshot::{self, ExistingFile, SnapshotError};
use super::temporary::LockedTemporary;
use super::{DatabaseLocation, LockableLocation, OpenError, schema};
use crate::clock;
use crate::platform::files;

/// The effect of each migration, for operators. The first one creates the tables of a new file.
const CHANGES: [&str; schema::VERSION] = [
    "tables for keys and attempts",
    "hourly sums, and the model, characters and reserved credits of attempts",
    "the outbox of the mirror",
    "owners of identifiers",
    "attempts share rows, and owners have logs",
    "one row of the log of owners per commit, and audio of attempts",
    "changed rows are sent to the mirror again",
    "evidence of keys instead of conclusions",
    "usage of clients' quotas",
    "fingerprints of keys instead of plain digests",
    "refusals and plans of accounts",
    "one row per attempt; the rest of a large file is converted while Keychoir runs",
    "a table for the changes of operators",
    "end users and regions of attempts, and their hourly sums",
    "the id of the replica",
    "daily sums, which are filled while Keychoir runs",
];

/// Maximum number of copies of earlier versions that are kept. A migration removes the copies of the lowest versions.
const MAX_KEPT_COPIES: usize = 2;

/// The free space that an upgrade needs, as a multiple of the size of the database: the copy and the write-ahead log of
/// the migration each need the size of the database.
const SPACE_FACTOR: u64 = 2;

/// The result of a migration or of a dry run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MigrationReport {
    /// The schema version before the migration.
    pub from: usize,
    /// The schema version after the migration.
    pub to: usize,
    /// The effect of each migration, the earliest version first.
    pub changes: &'static [&'static str],
    /// The copy of the database before the migration, or `None` after a dry run.
    pub copy: Option<PathBuf>,
    /// A sentence that advises an operator to remove copies with plain digests of keys, or `None` if there is no such
    /// copy.
    pub warning: Option<String>,
    /// The number of attempts before the migration, or `None` if the table cannot be read.
    pub attempts_before: Option<u64>,
    /// The number of attempts after the migration, or `None` if the table cannot be read.
    pub attempts_after: Option<u64>,
    /// The size of the database before the migration, in bytes.
    pub bytes: u64,
    /// The duration of the copy and the migration.
    pub duration: Duration,
}

/// The result of [`migrate`] or [`dry_run_migration`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MigrationOutcome {
    /// The database already had the current version, which the variant contains. [`migrate`] then only moves
    /// the attempts that are still in the tables of an earlier version.
    Current(usize),
    /// The database, or its temporary copy, was migrated.
    Migrated(MigrationReport),
}

/// The reason why a migration failed. The database keeps all rows. It also keeps its earlier version, unless only the
/// conversion of its remaining attempts failed.
#[derive(Debug, thiserror::Error)]
pub enum MigrateError {
    /// The database cannot be opened, locked or upgraded, or a newer version of Keychoir has written it.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The database is missing or of another program, or it or its copy cannot be read or written.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// SQLite cannot read, check or migrate the database or its temporary copy, for example because it is corrupt.
    #[error("the migration of {} failed: {source}", .path.display())]
    Failed {
        /// The database.
        path: PathBuf,
        /// SQLite's error.
        source: rusqlite::Error,
    },
    /// The migration would change the number of attempts. Only a dry run reports this.
    #[error("the migration would change the number of attempts from {before} to {after}")]
    AttemptsLost {
        /// The number of attempts before the migration.
        before: u64,
        /// The number of attempts after the migration.
        after: u64,
    },
}

/// Returns the effects of the migrations after `version`.
fn changes_after(version: usize) -> &'static [&'static str] {
    CHANGES.get(version..).unwrap_or_default()
}

/// Checks that an upgrade of the open database at `path` has enough disk space.
pub(super) fn check_space(connection: &Connection, path: &Path) -> Result<(), OpenError> {
    let size = snapshot::database_size(connection)
        .map_err(|source| OpenError::Unusable { path: path.to_owned(), source })?;
    snapshot::check_space(path, size.saturating_mul(SPACE_FACTOR))
        .map_err(|source| OpenError::CannotCopy { path: path.to_owned(), source })
}

/// Copies the open database at `path` and runs `migrate`. A new file of version 0, and a file of the current version,
/// are not copied.
pub(super) fn upgrade(
    connection: &mut Connection,
    path: &Path,
    version: usize,
    migrate: impl FnOnce(&mut Connection, usize) -> Result<(), rusqlite::Error>,
) -> Result<(), OpenError> {
    let unusable = |source| OpenError::Unusable { path: path.to_owned(), source };
    if version == 0 || version >= schema::VERSION {
        return migrate(connection, version).map_err(unusable);
    }
    let started_at = clock::instant();
    let (from, to, changes) = (version, schema::VERSION, changes_after(version).join("; "));
    check_space(connection, path)?;
    let copy = copy_path(path, version);
    tracing::info!(
        event = "database_migrating",
        from,
        to,
        copy = %copy.display(),
        "Upgrading the database from schema {from} to {to} after a copy to {}: {changes}",
        copy.display()
    );
    let copy_result = snapshot::create_partial(&copy).and_then(|partial| {
        snapshot::copy(connection, path, partial.path())?;
        snapshot::publish(partial.path(), &copy, ExistingFile::Replace)
    });
    copy_result.map_err(|source| OpenError::CannotCopy { path: path.to_owned(), source })?;
    migrate(connection, version).map_err(unusable)?;
    let duration = clock::elapsed_since(started_at);
    remove_old_copies(path);
    let duration_ms = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let message = format!("Upgraded the database from schema {from} to {to} in {duration_ms} ms");
    match digest_warning(&copies_with_digests(path)) {
        None => tracing::info!(event = "database_migrated", from, to, duration_ms, "{message}"),
        Some(warning) => {
            tracing::warn!(event = "database_migrated", from, to, duration_ms, "{message}. {warning}");
        }
    }
    Ok(())
}

/// Returns the path of the copy that precedes a migration from `version`.
fn copy_path(path: &Path, version: usize) -> PathBuf {
    companion(path, &format!(".before-{version}"))
}

/// Returns the copies of versions before [`schema::FINGERPRINT_VERSION`]. They contain plain digests of keys, which the
/// migration removes only from the database.
fn copies_with_digests(path: &Path) -> Vec<PathBuf> {
    let copies = (1..schema::FINGERPRINT_VERSION).map(|version| copy_path(path, version));
    copies.filter(|copy| copy.exists()).collect()
}

/// Returns advice for an operator to remove `copies`, or `None` if there are none.
fn digest_warning(copies: &[PathBuf]) -> Option<String> {
    let names: Vec<String> = copies.iter().map(|copy| copy.display().to_string()).collect();
    (!names.is_empty()).then(|| {
        format!(
            "Plain SHA-256 digests of keys remain in {}: remove every such copy as soon as the new version works",
            names.join(" and ")
        )
    })
}

/// Removes the copies of the lowest versions, and keeps [`MAX_KEPT_COPIES`].
fn remove_old_copies(path: &Path) {
    let copies = (1..schema::VERSION).rev().map(|version| copy_path(path, version));
    for copy in copies.filter(|copy| copy.exists()).skip(MAX_KEPT_COPIES) {
        match fs::remove_file(&copy) {
            Ok(()) => tracing::info!("Removed {}, an earlier copy of the database", copy.display()),
            Err(error) => tracing::warn!("{} cannot be removed: {error}", copy.display()),
        }
    }
}

/// Migrates the database at `path` completely, unless it has the current version. No process may have it open.
///
/// # Errors
///
/// Fails when the database is missing, in use, corrupt, of another program or of a newer version, or when the disk
/// is full.
pub fn migrate(path: &Path) -> Result<MigrationOutcome, MigrateError> {
    let started_at = clock::instant();
    let migrate_error = |source| MigrateError::Failed { path: path.to_owned(), source };
    let source = inspect_database(path)?;
    if source.version == schema::VERSION && !source.is_unfinished {
        return Ok(MigrationOutcome::Current(source.version));
    }
    let mut location = LockableLocation::from(DatabaseLocation::File(path.to_owned()));
    location.lock()?;
    // Unlike at startup, a corrupt file is not quarantined.
    let connection = open::connect(path, IntegrityCheck::Full).map_err(migrate_error)?;
    let database = open::migrate(connection, path, None)?.database;
    while migration::move_next_attempts(&database.connection).map_err(migrate_error)? {}
    if source.version == schema::VERSION {
        return Ok(MigrationOutcome::Current(source.version));
    }
    Ok(MigrationOutcome::Migrated(MigrationReport {
        from: source.version,
        to: schema::VERSION,
        changes: changes_after(source.version),
        copy: Some(copy_path(path, source.version)),
        warning: digest_warning(&copies_with_digests(path)),
        attempts_before: source.attempts,
        attempts_after: snapshot::count_attempts(&database.connection),
        bytes: source.bytes,
        duration: clock::elapsed_since(started_at),
    }))
}

/// Migrates a temporary copy of the database at `path`, checks the copy, and removes it. A running Keychoir may be
/// using the database, which stays unchanged.
///
/// # Errors
///
/// Fails when [`migrate`] would fail, except that the database may be in use.
pub fn dry_run_migration(path: &Path) -> Result<MigrationOutcome, MigrateError> {
    let started_at = clock::instant();
    let source = inspect_database(path)?;
    if source.version == schema::VERSION {
        return Ok(MigrationOutcome::Current(source.version));
    }
    // The copy and the write-ahead log of its migration occupy the disk at the same time.
    snapshot::check_space(path, source.bytes.saturating_mul(SPACE_FACTOR))?;
    let directory = std::path::absolute(path).ok().and_then(|path| path.parent().map(Path::to_owned));
    let directory = directory.unwrap_or_else(|| PathBuf::from("."));
    let temporary = LockedTemporary::create_directory(&directory, OsStr::new(".keychoir-dry-run-"))
        .map_err(|source| SnapshotError::Unwritable { path: directory, source })?;
    let copy = temporary.path().join("keychoir.db");
    let migrate_error = |source| MigrateError::Failed { path: path.to_owned(), source };
    let unwritable = |source| SnapshotError::Unwritable { path: copy.clone(), source };
    // `VACUUM INTO` accepts an empty file. If SQLite created the file, other users could read it.
    files::private_options().write(true).create_new(true).open(&copy).map_err(unwritable)?;
    snapshot::copy(&snapshot::open_for_reading(path)?, path, &copy)?;
    let mut connection = open::connect(&copy, IntegrityCheck::Full).map_err(migrate_error)?;
    open::migrate_schema(&mut connection, source.version).map_err(migrate_error)?;
    while migration::move_next_attempts(&connection).map_err(migrate_error)? {}
    let attempts_after = snapshot::count_attempts(&connection);
    drop(connection);
    snapshot::check_copy(&copy, path)?;
    if let (Some(before), Some(after)) = (source.attempts, attempts_after)
        && before != after
    {
        return Err(MigrateError::AttemptsLost { before, after });
    }
    Ok(MigrationOutcome::Migrated(MigrationReport {
        from: source.version,
        to: schema::VERSION,
        changes: changes_after(source.version),
        copy: None,
        warning: None,
        attempts_before: source.attempts,
        attempts_after,
        bytes: source.bytes,
        duration: clock::elapsed_since(started_at),
    }))
}

/// A database before its migration.
struct UpgradeSource {
    version: usize,
    bytes: u64,
    attempts: Option<u64>,
    /// Whether maintenance has to move further attempts to their new table.
    is_unfinished: bool,
}

fn inspect_database(path: &Path) -> Result<UpgradeSource, MigrateError> {
    let connection = snapshot::open_for_reading(path)?;
    let migrate_error = |source| MigrateError::Failed { path: path.to_owned(), source };
    let version = schema::version(&connection).map_err(migrate_error)?;
    if version > schema::VERSION {
        return Err(OpenError::Newer { path: path.to_owned(), version }.into());
    }
    let bytes = snapshot::database_size(&connection).map_err(migrate_error)?;
    let is_unfinished = migration::is_unfinished(&connection).map_err(migrate_error)?;
    Ok(UpgradeSource { version, bytes, attempts: snapshot::count_attempts(&connection), is_unfinished })
}

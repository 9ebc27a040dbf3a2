//! Reads usage, attempts, failures and the states of keys for commands, and inspects the file, through a read-only
//! connection. Another process may be writing the file. This module is separate from `read`, with which startup
//! restores the state of the pool.

mod attempts;
mod inspection;

use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, OpenFlags, params};

pub use attempts::{AttemptQuery, FailureCount};
pub use inspection::{DatabaseInspection, DatabaseIntegrity};

use super::columns::timestamp;
use super::open::is_corruption;
use super::read::read_key;
use super::schema;
use super::usage_sums::{UsageDimension, UsageSums, read_sums, sum_columns};
use crate::policy::evidence::{Cooldowns, Evidence, longest_cooldown};
use crate::policy::key_state::{KeyState, KeyStatus};
use crate::policy::quota::Quota;
use crate::policy::retention::start_of_hour;
use crate::policy::units::UnixMs;
use crate::pool::RestoredKey;

/// The reason why the database cannot be read. The message describes how to solve the problem, if it can be solved.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The file does not exist.
    #[error("there are no usage records at {} yet: the first start of `keychoir serve` creates the file", .0.display())]
    NoFile(PathBuf),
    /// The file exists, but has no tables.
    #[error("{} contains no usage records yet", .0.display())]
    Empty(PathBuf),
    /// The file cannot be opened for reading.
    #[error("{} cannot be read: {source}", .path.display())]
    Unreadable {
        /// The database file.
        path: PathBuf,
        /// The I/O error.
        source: io::Error,
    },
    /// A newer version of Keychoir wrote the file.
    #[error(
        "{} was written by a newer Keychoir (schema {version}, this one supports {})",
        .path.display(),
        schema::VERSION
    )]
    Newer {
        /// The database file.
        path: PathBuf,
        /// The schema version in the file.
        version: usize,
    },
    /// An older version of Keychoir wrote the file, and the file lacks the tables or columns to be read.
    #[error("{} was written by an older Keychoir: the next start of `keychoir serve` migrates it", .0.display())]
    Older(PathBuf),
    /// The file is not a database, or it is corrupt.
    #[error("{} is not a usage database, or it is corrupt: {source}", .path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// SQLite's error.
        source: rusqlite::Error,
    },
    /// SQLite cannot read the file now.
    #[error("{} cannot be read: {source} (run this command as the user that runs Keychoir)", .path.display())]
    Unusable {
        /// The database file.
        path: PathBuf,
        /// SQLite's error.
        source: rusqlite::Error,
    },
}

/// The group that a sum belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UsageGroup {
    /// The sums of a key.
    Key {
        /// The key's fingerprint, in hexadecimal digits.
        hash: String,
        /// The short form of the key, if it is stored.
        short: Option<String>,
        /// The configured name of the key, or `None` as for `short` or if the key has no name.
        name: Option<String>,
    },
    /// The start of the day or hour, or the name of the client, user, region, model or route. `None` if the attempts
    /// have none.
    Name(Option<String>),
}

impl UsageGroup {
    /// Converts the group in a row of a query. `short` and `name` are those of the key with the fingerprint `group`.
    fn new(dimension: UsageDimension, group: String, short: Option<String>, name: Option<String>) -> Self {
        if dimension == UsageDimension::Key {
            return Self::Key { hash: group, short, name };
        }
        let group = match dimension.period_start(&group).map(UnixMs::rfc3339_seconds) {
            // The first 10 characters are the date, and the first 16 are the date, hour and minute.
            Some(start) if dimension == UsageDimension::Day => start[..10].to_owned(),
            Some(start) => format!("{}Z", &start[..16]),
            None => group,
        };
        Self::Name((!group.is_empty()).then_some(group))
    }
}

/// The stored state of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredKey {
    /// The key's fingerprint, in hexadecimal digits.
    pub hash: String,
    /// The short form of the key.
    pub short: String,
    /// The configured name of the key, or `None` if it has none.
    pub name: Option<String>,
    /// The key's workspace, if one was configured.
    pub workspace: Option<String>,
    /// The status of the key.
    pub status: KeyStatus,
    /// The credits of the key's workspace.
    pub quota: Quota,
}

/// A read-only connection to the database.
#[derive(Debug)]
pub struct UsageReader {
    path: PathBuf,
    connection: Connection,
    /// Whether the file contains users and regions. The next startup adds them to a file of an earlier version.
    has_users: bool,
}

/// Maximum wait for a lock. Readers wait only for a startup that migrates the file.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

impl UsageReader {
    /// Opens the database at `path`.
    ///
    /// # Errors
    ///
    /// Fails when the file is missing, empty, unreadable, corrupt, or of a version that this program cannot read.
    pub fn open(path: &Path) -> Result<Self, ReadError> {
        let path = path.to_owned();
        if let Err(source) = fs::File::open(&path) {
            let is_missing = source.kind() == io::ErrorKind::NotFound;
            return Err(if is_missing {
                ReadError::NoFile(path)
            } else {
                ReadError::Unreadable { path, source }
            });
        }
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let open_result = Connection::open_with_flags(&path, flags).and_then(|connection| {
            connection.busy_timeout(BUSY_TIMEOUT)?;
            let version = schema::version(&connection)?;
            Ok((connection, version))
        });
        match open_result {
            Ok((_, 0)) => Err(ReadError::Empty(path)),
            Ok((_, version)) if version > schema::VERSION => Err(ReadError::Newer { path, version }),
            Ok((_, version)) if version < schema::FINGERPRINT_VERSION => Err(ReadError::Older(path)),
            Ok((connection, version)) => {
                Ok(Self { path, connection, has_users: version >= schema::USERS_VERSION })
            }
            Err(source) => Err(read_error(path, source)),
        }
    }

    /// Returns the sums of the hours in `period`, from the hour that contains its start, and without the hour that
    /// contains its end. Groups by time are in the order of time, and any other groups by descending credits.
    ///
    /// # Errors
    ///
    /// Fails when the file cannot be read, and for the dimensions of users and regions when the file is of a version
    /// without them.
    pub fn usage(
        &self,
        period: Range<UnixMs>,
        dimension: UsageDimension,
    ) -> Result<Vec<(UsageGroup, UsageSums)>, ReadError> {
        self.check_dimension(dimension)?;
        self.select_sums(period, dimension).map_err(|source| read_error(self.path.clone(), source))
    }

    /// Returns every stored key with its state at `now`, in the order that the keys had in the pool.
    ///
    /// # Errors
    ///
    /// Fails when the file cannot be read.
    pub fn keys(&self, now: UnixMs) -> Result<Vec<StoredKey>, ReadError> {
        self.select_keys(now).map_err(|source| read_error(self.path.clone(), source))
    }

    /// Checks that the file contains the columns of a dimension.
    fn check_dimension(&self, dimension: UsageDimension) -> Result<(), ReadError> {
        match dimension {
            UsageDimension::User | UsageDimension::Region if !self.has_users => {
                Err(ReadError::Older(self.path.clone()))
            }
            UsageDimension::User
            | UsageDimension::Region
            | UsageDimension::Key
            | UsageDimension::Client
            | UsageDimension::Model
            | UsageDimension::Route
            | UsageDimension::Hour
            | UsageDimension::Day => Ok(()),
        }
    }

    fn select_sums(
        &self,
        period: Range<UnixMs>,
        dimension: UsageDimension,
    ) -> Result<Vec<(UsageGroup, UsageSums)>, rusqlite::Error> {
        let (column, table) = (dimension.expression("hour_ms"), dimension.table());
        // Column 7 contains the credits, column 2 the attempts, and column 1 the group.
        let order = if dimension.is_time() { "CAST(group_name AS INTEGER)" } else { "7 DESC, 2 DESC, 1" };
        let sums = sum_columns();
        let sql = format!(
            "SELECT sums.*, keys.short_key, keys.name
             FROM (SELECT {column} AS group_name, {sums} FROM {table}
                WHERE hour_ms >= ?1 AND hour_ms < ?2 GROUP BY 1) AS sums
             LEFT JOIN keys ON keys.key_hash = sums.group_name
             ORDER BY {order}"
        );
        let mut statement = self.connection.prepare(&sql)?;
        let hours = [period.start, period.end].map(|time| timestamp(start_of_hour(time)));
        let rows = statement.query_map(params![hours[0], hours[1]], |row| {
            Ok((UsageGroup::new(dimension, row.get(0)?, row.get(8)?, row.get(9)?), read_sums(row)?))
        })?;
        rows.collect()
    }

    fn select_keys(&self, now: UnixMs) -> Result<Vec<StoredKey>, rusqlite::Error> {
        let mut statement = self.connection.prepare(
            "SELECT key_hash, character_count, character_limit, extension, resets_at_ms, evidence, short_key, name,
                workspace
             FROM keys ORDER BY position, key_hash",
        )?;
        let rows = statement.query_map([], |row| {
            let Some(RestoredKey { quota, key_evidence, workspace_evidence, .. }) = read_key(row)? else {
                return Ok(None);
            };
            let quota = quota.reset_if_due(now);
            // A running Keychoir may have other cooldowns in its configuration. Its status document shows the exact
            // state.
            let cooldown_of =
                |evidence: &[Evidence]| longest_cooldown(evidence, quota.resets_at, &Cooldowns::DEFAULT, now);
            Ok(Some(StoredKey {
                hash: row.get(0)?,
                short: row.get(6)?,
                name: row.get(7)?,
                workspace: row.get(8)?,
                status: KeyState::new(
                    cooldown_of(&key_evidence),
                    cooldown_of(&workspace_evidence),
                    &quota,
                    now,
                )
                .status(),
                quota,
            }))
        })?;
        rows.filter_map(Result::transpose).collect()
    }
}

fn read_error(path: PathBuf, source: rusqlite::Error) -> ReadError {
    if is_corruption(&source) {
        ReadError::Corrupt { path, source }
    } else {
        ReadError::Unusable { path, source }
    }
}

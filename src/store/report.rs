//! Reads the usage records from other processes while they are written, through a read-only
//! connection of its own. Separate from `read`, which belongs to the writing process.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, OpenFlags, Row, params};

use super::columns::timestamp;
use super::open::is_broken;
use super::read::remembered_key;
use super::schema;
use crate::policy::budget::Quota;
use crate::policy::evidence::{Cooldowns, Evidence, cooldown};
use crate::policy::key_state::{KeyState, KeyStatus};
use crate::policy::retention::hour_of;
use crate::policy::units::UnixMs;
use crate::pool::RestoredKey;

/// Why nothing can be read. The message says what to do.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The file does not exist.
    #[error("there are no usage records at {} yet: `keychoir serve` begins them with its first start", .0.display())]
    NoFile(PathBuf),
    /// The file exists, but has no tables yet.
    #[error("{} holds no usage records yet", .0.display())]
    Empty(PathBuf),
    /// The file system denies reading.
    #[error("{} cannot be read: {source}", .path.display())]
    Unreadable {
        /// The database file.
        path: PathBuf,
        /// The error of the file system.
        source: io::Error,
    },
    /// A newer version of Keychoir wrote the file.
    #[error("{} was written by a newer Keychoir (schema {version}, this one knows {})", .path.display(), schema::VERSION)]
    Newer {
        /// The database file.
        path: PathBuf,
        /// The schema version in the file.
        version: usize,
    },
    /// An older version of Keychoir wrote the file, which kept no sums or named keys by their plain
    /// digests.
    #[error("{} was written by an older Keychoir: the next start of `keychoir serve` brings it up to date", .0.display())]
    Older(PathBuf),
    /// The file is no database, or is corrupt.
    #[error("{} is no file of usage records, or a broken one: {source}", .path.display())]
    Broken {
        /// The file.
        path: PathBuf,
        /// SQLite's error.
        source: rusqlite::Error,
    },
    /// SQLite cannot read the file now.
    #[error("{} cannot be read: {source} (it is best read as the user that Keychoir runs as)", .path.display())]
    Unusable {
        /// The database file.
        path: PathBuf,
        /// SQLite's error.
        source: rusqlite::Error,
    },
}

/// The dimension that sums are grouped by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// One sum per key.
    Key,
    /// One sum per client.
    Client,
    /// One sum per model.
    Model,
    /// One sum per route.
    Route,
}

/// The group of a sum.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UsageOwner {
    /// A key.
    Key {
        /// The key's fingerprint, in hexadecimal digits.
        hash: String,
        /// The short form of the key, if it is stored.
        short: Option<String>,
        /// The configured name of the key.
        name: Option<String>,
    },
    /// The name of a client, model or route; `None` for attempts without one.
    Name(Option<String>),
}

/// Sums over attempts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sums {
    /// All attempts, with and without a response.
    pub attempts: u64,
    /// Attempts with a response status below 400.
    pub served: u64,
    /// Bytes of request bodies sent to the provider.
    pub request_bytes: u64,
    /// Bytes of response bodies relayed to clients.
    pub response_bytes: u64,
    /// Characters of text converted to speech.
    pub characters: u64,
    /// Credits charged, as far as they are known.
    pub credits: u64,
    /// Attempts that may have been charged, without a known price.
    pub unpriced: u64,
}

/// The stored state of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KnownKey {
    /// The key's fingerprint, in hexadecimal digits.
    pub hash: String,
    /// The short form of the key.
    pub short: String,
    /// The configured name of the key.
    pub name: Option<String>,
    /// Its workspace, if one was configured.
    pub workspace: Option<String>,
    /// The status of the key.
    pub status: KeyStatus,
    /// The credits of its workspace.
    pub quota: Quota,
}

/// A read-only connection to the database.
#[derive(Debug)]
pub struct Reader {
    path: PathBuf,
    connection: Connection,
}

/// Maximum wait for a lock: a reader only waits for a start that migrates the file.
const BUSY_MAX: Duration = Duration::from_secs(5);

impl Reader {
    /// Opens the database at `path` for reading.
    ///
    /// # Errors
    ///
    /// When the file is missing or cannot be read.
    pub fn open(path: &Path) -> Result<Self, ReadError> {
        let path = path.to_owned();
        match fs::File::open(&path).and_then(|file| file.metadata()) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(ReadError::NoFile(path)),
            Err(source) => return Err(ReadError::Unreadable { path, source }),
        }
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let opened = Connection::open_with_flags(&path, flags).and_then(|connection| {
            connection.busy_timeout(BUSY_MAX)?;
            let version = schema::version(&connection)?;
            Ok((connection, version))
        });
        match opened {
            Ok((_, 0)) => Err(ReadError::Empty(path)),
            Ok((_, version)) if version > schema::VERSION => Err(ReadError::Newer { path, version }),
            Ok((_, version)) if version < schema::FINGERPRINTS => Err(ReadError::Older(path)),
            Ok((connection, _)) => Ok(Self { path, connection }),
            Err(source) => Err(trouble(path, source)),
        }
    }

    /// Sums since the begin of the hour of `since`, the most expensive first.
    ///
    /// # Errors
    ///
    /// When the file cannot be read.
    pub fn usage(&self, since: UnixMs, by: By) -> Result<Vec<(UsageOwner, Sums)>, ReadError> {
        self.sums(since, by).map_err(|source| trouble(self.path.clone(), source))
    }

    /// Every stored key with its state at `now`, in the last order of the pool.
    ///
    /// # Errors
    ///
    /// When the file cannot be read.
    pub fn keys(&self, now: UnixMs) -> Result<Vec<KnownKey>, ReadError> {
        self.known_keys(now).map_err(|source| trouble(self.path.clone(), source))
    }

    fn sums(&self, since: UnixMs, by: By) -> Result<Vec<(UsageOwner, Sums)>, rusqlite::Error> {
        let column = match by {
            By::Key => "key_hash",
            By::Client => "client",
            By::Model => "model",
            By::Route => "route",
        };
        // Sums are computed as floating point numbers, which are exact far beyond real amounts and
        // cannot overflow.
        let sum = |column: &str| format!("CAST(min(total({column}), 9007199254740992) AS INTEGER)");
        let sums =
            ["attempts", "served", "request_bytes", "response_bytes", "characters", "credits", "unpriced"]
                .map(sum)
                .join(", ");
        let sql = format!(
            "SELECT own.*, keys.short_key, keys.name
             FROM (SELECT {column} AS whose, {sums} FROM hours WHERE hour_ms >= ?1 GROUP BY {column}) AS own
             LEFT JOIN keys ON keys.key_hash = own.whose
             ORDER BY 7 DESC, 2 DESC, 1"
        );
        let mut statement = self.connection.prepare(&sql)?;
        let rows = statement.query_map(params![timestamp(hour_of(since))], |row| {
            let name: String = row.get(0)?;
            let owner = match by {
                By::Key => UsageOwner::Key { hash: name, short: row.get(8)?, name: row.get(9)? },
                By::Client | By::Model | By::Route => UsageOwner::Name((!name.is_empty()).then_some(name)),
            };
            Ok((owner, read_sums(row)?))
        })?;
        rows.collect()
    }

    fn known_keys(&self, now: UnixMs) -> Result<Vec<KnownKey>, rusqlite::Error> {
        let mut statement = self.connection.prepare(
            "SELECT key_hash, character_count, character_limit, extension, resets_at_ms, evidence, short_key, name,
                workspace
             FROM keys ORDER BY position, key_hash",
        )?;
        let rows = statement.query_map([], |row| {
            let Some(RestoredKey { quota, of_key, of_workspace, .. }) = remembered_key(row)? else {
                return Ok(None);
            };
            let quota = quota.at(now);
            // The writing process may have other settings; its status pages are more exact while it
            // runs.
            let cooldown_of =
                |evidence: &[Evidence]| cooldown(evidence, quota.resets_at, &Cooldowns::DEFAULT, now);
            Ok(Some(KnownKey {
                hash: row.get(0)?,
                short: row.get(6)?,
                name: row.get(7)?,
                workspace: row.get(8)?,
                status: KeyState::of(cooldown_of(&of_key), cooldown_of(&of_workspace), &quota, now).status(),
                quota,
            }))
        })?;
        rows.filter_map(Result::transpose).collect()
    }
}

fn read_sums(row: &Row<'_>) -> Result<Sums, rusqlite::Error> {
    let amount = |index| row.get::<_, i64>(index).map(|amount| u64::try_from(amount).unwrap_or(0));
    Ok(Sums {
        attempts: amount(1)?,
        served: amount(2)?,
        request_bytes: amount(3)?,
        response_bytes: amount(4)?,
        characters: amount(5)?,
        credits: amount(6)?,
        unpriced: amount(7)?,
    })
}

impl std::ops::AddAssign for Sums {
    fn add_assign(&mut self, other: Self) {
        self.attempts = self.attempts.saturating_add(other.attempts);
        self.served = self.served.saturating_add(other.served);
        self.request_bytes = self.request_bytes.saturating_add(other.request_bytes);
        self.response_bytes = self.response_bytes.saturating_add(other.response_bytes);
        self.characters = self.characters.saturating_add(other.characters);
        self.credits = self.credits.saturating_add(other.credits);
        self.unpriced = self.unpriced.saturating_add(other.unpriced);
    }
}

fn trouble(path: PathBuf, source: rusqlite::Error) -> ReadError {
    if is_broken(&source) { ReadError::Broken { path, source } } else { ReadError::Unusable { path, source } }
}

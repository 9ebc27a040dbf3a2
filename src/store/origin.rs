//! Determines which program created the file at the database path. A corrupt database of Keychoir is
//! quarantined and replaced by a new one; the file of another program must be neither renamed nor changed.
//! `storage.path` may name such a file by mistake.

use std::fs;
use std::io::{self, Read};
use std::path::Path;

use rusqlite::{Connection, OpenFlags};

use super::lock;
use super::open::companion;
use super::schema::APPLICATION;

/// The origin of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// No file, an empty one, or a database of Keychoir, which may be corrupt.
    Ours,
    /// An earlier database of Keychoir was here, because its lock file exists; the current file is no
    /// database.
    OursNoDatabase,
    /// Another program created the file; contains the kind of file.
    Foreign(&'static str),
}

/// The first bytes of every SQLite file.
const MAGIC: &[u8] = b"SQLite format 3\0";
/// The size of SQLite's header, and the offset of the application id in it (SQLite's file format,
/// section 1.3).
const HEADER_SIZE: u64 = 100;
const APPLICATION_AT: std::ops::Range<usize> = 68..72;

/// Determines the origin of the file at `path` without changing it. The application id in the header proves
/// that the file is Keychoir's. If the header is unreadable, the lock file that an earlier start left beside
/// it proves it.
pub(super) fn of(path: &Path) -> io::Result<Origin> {
    let mut header = Vec::new();
    match fs::File::open(path) {
        Ok(file) => file.take(HEADER_SIZE).read_to_end(&mut header)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Origin::Ours),
        Err(error) => return Err(error),
    };
    let has_log = fs::metadata(companion(path, "-wal")).is_ok_and(|log| log.len() > 0);
    let has_lock_file = lock::is_beside(path);
    if header.is_empty() && !has_log {
        return Ok(Origin::Ours);
    }
    if !header.starts_with(MAGIC) {
        return Ok(if has_lock_file {
            Origin::OursNoDatabase
        } else {
            Origin::Foreign("it is no SQLite file")
        });
    }
    if header.get(APPLICATION_AT) == Some(&APPLICATION.to_be_bytes()) {
        return Ok(Origin::Ours);
    }
    let has_our_tables = tables(path).map(|tables| {
        let has = |name: &str| tables.iter().any(|table| table == name);
        tables.is_empty() || (has("keys") && (has("attempts") || has("attempt_rows")))
    });
    Ok(match has_our_tables {
        Ok(true) => Origin::Ours,
        Ok(false) => Origin::Foreign("it is an SQLite file with other tables"),
        Err(_) if has_lock_file => Origin::Ours,
        Err(_) => Origin::Foreign("it is a broken SQLite file of another program"),
    })
}

/// Lists the tables of an SQLite file, without a lock and without writing anything beside it.
fn tables(path: &Path) -> Result<Vec<String>, rusqlite::Error> {
    let escaped = path.to_string_lossy().replace('%', "%25").replace('?', "%3f").replace('#', "%23");
    let flags =
        OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_URI | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(format!("file:{escaped}?immutable=1"), flags)?;
    let mut statement =
        connection.prepare("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')")?;
    let names = statement.query_map([], |row| row.get(0))?;
    names.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const OTHER_TABLES: Origin = Origin::Foreign("it is an SQLite file with other tables");
    const NO_SQLITE: Origin = Origin::Foreign("it is no SQLite file");

    /// Checks the origin of the file that `make` creates: first without, then with a lock file
    /// beside it.
    #[track_caller]
    fn check(make: impl Fn(&Path), never_here: Origin, was_here: Origin) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a 100%? #1.db");
        make(&path);
        let before = fs::read(&path).ok();
        assert_eq!(of(&path).unwrap(), never_here, "without a lock file");
        let names: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|file| file.unwrap().path()).collect();
        assert!(names.iter().all(|name| *name == path || *name == companion(&path, "-wal")), "{names:?}");
        drop(lock::Lock::take(&path));
        assert_eq!(of(&path).unwrap(), was_here, "with a lock file");
        assert_eq!(fs::read(&path).ok(), before, "the file is unchanged");
    }

    fn sqlite(path: &Path, statements: &str) {
        Connection::open(path).unwrap().execute_batch(statements).unwrap();
    }

    #[test]
    fn a_missing_and_an_empty_file_are_ours() {
        check(|_| {}, Origin::Ours, Origin::Ours);
        check(|path| fs::write(path, "").unwrap(), Origin::Ours, Origin::Ours);
        check(|path| sqlite(path, "VACUUM"), Origin::Ours, Origin::Ours);
    }

    #[test]
    fn a_file_of_another_format_is_ours_only_beside_our_lock() {
        for text in ["x", "these are not the books you are looking for", "SQLite format 2\0"] {
            check(|path| fs::write(path, text).unwrap(), NO_SQLITE, Origin::OursNoDatabase);
        }
        let empty_beside_a_log = |path: &Path| {
            fs::write(path, "").unwrap();
            fs::write(companion(path, "-wal"), "its log").unwrap();
        };
        check(empty_beside_a_log, NO_SQLITE, Origin::OursNoDatabase);
    }

    #[test]
    fn a_database_of_another_program_is_never_ours() {
        for statements in [
            "CREATE TABLE photos (name TEXT)",
            "CREATE TABLE keys (name TEXT)",
            "CREATE TABLE photos (name TEXT); PRAGMA user_version = 7",
            "CREATE TABLE photos (name TEXT); PRAGMA application_id = 1",
        ] {
            check(|path| sqlite(path, statements), OTHER_TABLES, OTHER_TABLES);
        }
    }

    #[test]
    fn the_application_id_alone_identifies_our_file() {
        let marked = |path: &Path| {
            sqlite(path, &format!("CREATE TABLE x (y); PRAGMA application_id = {APPLICATION}"));
            let mut bytes = fs::read(path).unwrap();
            bytes[100..].fill(0xff);
            fs::write(path, bytes).unwrap();
        };
        check(marked, Origin::Ours, Origin::Ours);
    }

    #[test]
    fn a_corrupt_database_without_an_application_id_is_ours_only_beside_our_lock() {
        let broken = |path: &Path| {
            sqlite(path, "CREATE TABLE photos (name TEXT)");
            let mut bytes = fs::read(path).unwrap();
            bytes[100..].fill(0xff);
            fs::write(path, bytes).unwrap();
        };
        check(broken, Origin::Foreign("it is a broken SQLite file of another program"), Origin::Ours);
    }

    #[test]
    fn older_files_without_an_application_id_are_identified_by_their_tables() {
        let earlier = |path: &Path| sqlite(path, &super::super::schema::of_version(1));
        check(earlier, Origin::Ours, Origin::Ours);
    }
}

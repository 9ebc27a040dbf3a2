//! Detects which program created the file at the database path. A corrupt database of Keychoir is renamed and
//! replaced by a new one. The file of another program, which `storage.path` may name by mistake, must be
//! neither renamed nor changed.

use std::fs;
use std::io::{self, Read};
use std::path::Path;

use rusqlite::{Connection, OpenFlags};

use super::lock;
use super::open::companion;
use super::schema::APPLICATION_ID;

/// The origin of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// The file is missing, empty, an SQLite file without tables, or a database of Keychoir, which may be corrupt.
    Ours,
    /// The file is not a database, but a lock file next to it shows that the path was Keychoir's.
    OursNotADatabase,
    /// Another program created the file. Contains a clause about the kind of the file, for error messages.
    Foreign(&'static str),
}

/// The first bytes of every SQLite file.
const MAGIC: &[u8] = b"SQLite format 3\0";
/// The size of the header of an SQLite file (section 1.3 of SQLite's file format).
const HEADER_SIZE: u64 = 100;
/// The position of the application id in the header.
const APPLICATION_ID_RANGE: std::ops::Range<usize> = 68..72;

/// Detects the origin of the file at `path` without changing it. The file is Keychoir's if it is missing or empty, if
/// its header has Keychoir's application id, if it has Keychoir's tables or no tables, or if it is corrupt and an
/// earlier start left a lock file next to it.
pub(super) fn detect(path: &Path) -> io::Result<Origin> {
    let mut header = Vec::new();
    match fs::File::open(path) {
        Ok(file) => file.take(HEADER_SIZE).read_to_end(&mut header)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Origin::Ours),
        Err(error) => return Err(error),
    };
    let has_log = fs::metadata(companion(path, "-wal")).is_ok_and(|log| log.len() > 0);
    let has_lock_file = lock::has_lock_file(path);
    if header.is_empty() && !has_log {
        return Ok(Origin::Ours);
    }
    if !header.starts_with(MAGIC) {
        return Ok(if has_lock_file {
            Origin::OursNotADatabase
        } else {
            Origin::Foreign("it is not an SQLite file")
        });
    }
    if header.get(APPLICATION_ID_RANGE) == Some(&APPLICATION_ID.to_be_bytes()) {
        return Ok(Origin::Ours);
    }
    let has_our_tables = table_names(path).map(|tables| {
        let has_table = |name: &str| tables.iter().any(|table| table == name);
        tables.is_empty() || (has_table("keys") && (has_table("attempts") || has_table("attempt_rows")))
    });
    Ok(match has_our_tables {
        Ok(true) => Origin::Ours,
        Ok(false) => Origin::Foreign("it is an SQLite file with other tables"),
        Err(_) if has_lock_file => Origin::Ours,
        Err(_) => Origin::Foreign("it is a corrupt SQLite file of another program"),
    })
}

/// Lists the tables and views of an SQLite file without locking it and without creating other files.
fn table_names(path: &Path) -> Result<Vec<String>, rusqlite::Error> {
    let escaped_path = path.to_string_lossy().replace('%', "%25").replace('?', "%3f").replace('#', "%23");
    let flags =
        OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_URI | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(format!("file:{escaped_path}?immutable=1"), flags)?;
    let mut statement =
        connection.prepare("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')")?;
    let names = statement.query_map([], |row| row.get(0))?;
    names.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const OTHER_TABLES: Origin = Origin::Foreign("it is an SQLite file with other tables");
    const NOT_SQLITE: Origin = Origin::Foreign("it is not an SQLite file");

    /// Asserts the origin of the file that `create` creates, without and with a lock file next to it.
    #[track_caller]
    fn assert_origin(create: impl Fn(&Path), expected_without_lock: Origin, expected_with_lock: Origin) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a 100%? #1.db");
        create(&path);
        let content_before = fs::read(&path).ok();
        assert_eq!(detect(&path).unwrap(), expected_without_lock, "it has no lock file yet");
        let paths: Vec<_> =
            fs::read_dir(directory.path()).unwrap().map(|file| file.unwrap().path()).collect();
        let has_no_other_file =
            paths.iter().all(|found| *found == path || *found == companion(&path, "-wal"));
        assert!(has_no_other_file, "the detection must not create a file: {paths:?}");
        drop(lock::Lock::acquire(&path));
        assert_eq!(detect(&path).unwrap(), expected_with_lock, "it has a lock file now");
        assert_eq!(fs::read(&path).ok(), content_before, "the file must stay unchanged");
    }

    fn create_sqlite_file(path: &Path, statements: &str) {
        Connection::open(path).unwrap().execute_batch(statements).unwrap();
    }

    #[test]
    fn a_missing_and_an_empty_file_are_ours() {
        assert_origin(|_| {}, Origin::Ours, Origin::Ours);
        assert_origin(|path| fs::write(path, "").unwrap(), Origin::Ours, Origin::Ours);
        assert_origin(|path| create_sqlite_file(path, "VACUUM"), Origin::Ours, Origin::Ours);
    }

    #[test]
    fn a_file_of_another_format_is_ours_only_next_to_our_lock_file() {
        for text in ["x", "a text file", "SQLite format 2\0"] {
            assert_origin(|path| fs::write(path, text).unwrap(), NOT_SQLITE, Origin::OursNotADatabase);
        }
        let create_empty_file_with_log = |path: &Path| {
            fs::write(path, "").unwrap();
            fs::write(companion(path, "-wal"), "its log").unwrap();
        };
        assert_origin(create_empty_file_with_log, NOT_SQLITE, Origin::OursNotADatabase);
    }

    #[test]
    fn a_database_of_another_program_is_never_ours() {
        for statements in [
            "CREATE TABLE photos (name TEXT)",
            "CREATE TABLE keys (name TEXT)",
            "CREATE TABLE photos (name TEXT); PRAGMA user_version = 7",
            "CREATE TABLE photos (name TEXT); PRAGMA application_id = 1",
        ] {
            assert_origin(|path| create_sqlite_file(path, statements), OTHER_TABLES, OTHER_TABLES);
        }
    }

    #[test]
    fn the_application_id_alone_identifies_our_file() {
        let create_corrupt_file_with_id = |path: &Path| {
            create_sqlite_file(
                path,
                &format!("CREATE TABLE x (y); PRAGMA application_id = {APPLICATION_ID}"),
            );
            let mut bytes = fs::read(path).unwrap();
            bytes[100..].fill(0xff);
            fs::write(path, bytes).unwrap();
        };
        assert_origin(create_corrupt_file_with_id, Origin::Ours, Origin::Ours);
    }

    #[test]
    fn a_corrupt_database_without_an_application_id_is_ours_only_next_to_our_lock_file() {
        let create_corrupt_file = |path: &Path| {
            create_sqlite_file(path, "CREATE TABLE photos (name TEXT)");
            let mut bytes = fs::read(path).unwrap();
            bytes[100..].fill(0xff);
            fs::write(path, bytes).unwrap();
        };
        assert_origin(
            create_corrupt_file,
            Origin::Foreign("it is a corrupt SQLite file of another program"),
            Origin::Ours,
        );
    }

    #[test]
    fn older_files_without_an_application_id_are_identified_by_their_tables() {
        let create_version_1 = |path: &Path| create_sqlite_file(path, &crate::store::schema::for_version(1));
        assert_origin(create_version_1, Origin::Ours, Origin::Ours);
    }
}

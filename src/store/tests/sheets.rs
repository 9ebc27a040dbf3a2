//! Tests that packed attempts read the same as attempts with rows of their own.

use rusqlite::params;

use super::sums::{ALL, rows as found};
use super::*;
use crate::elevenlabs::affinity::{Kind, Named};
use crate::pool::{OwnerId, OwnershipIndex};
use crate::proxy::{OwnershipUpdate, RecordId};
use crate::store::{maintenance, open, owners, schema};

const HOUR: Duration = Duration::from_secs(3_600);

fn opened(place: &DatabaseLocation) -> Database {
    open::open(place, NOW, IntegrityCheck::Quick).unwrap().ledger
}

fn one(ledger: &Database, sql: &str) -> i64 {
    ledger.connection.query_row(sql, [], |row| row.get(0)).unwrap()
}

fn shared(ledger: &Database) -> i64 {
    one(ledger, "SELECT coalesce(sum(attempts), 0) FROM attempt_sheets")
}

fn alone(ledger: &Database) -> i64 {
    one(ledger, "SELECT count(*) FROM attempt_rows")
}

/// Attempts of every kind, some more than once.
fn all_kinds(pool: &Pool) -> Vec<AttemptRecord> {
    let new = || record_at(pool, NOW, 7);
    let later = NOW.plus(HOUR);
    let mad = UnixMs(u64::MAX);
    let different = || {
        [
            new(),
            AttemptRecord { key: None, model: None, status: None, first_byte: None, ..new() },
            AttemptRecord { credits_reserved: Some(9), audio: Some(Duration::from_secs(3)), ..new() },
            AttemptRecord { characters: None, audio: Some(Duration::MAX), ..new() },
            AttemptRecord { request_id: "a \"quoted\"\\ name\n\u{1}of ÄÖ 😀".into(), ..new() },
            AttemptRecord { request_id: "".into(), number: 3, ..new() },
            AttemptRecord { credits: 0, credits_from: CreditSource::Unknown, ..new() },
            AttemptRecord { credits: u64::MAX, request_bytes: u64::MAX, response_bytes: 0, ..new() },
            record_at(pool, later, 1),
            record_at(pool, UnixMs(0), 1),
            AttemptRecord { started_at: mad, ..record_at(pool, mad, 1) },
            AttemptRecord { id: RecordId { at: NOW, count: (1 << 42) - 1, chance: u32::MAX }.id(), ..new() },
            AttemptRecord { id: RecordId { at: NOW, count: 0, chance: 0 }.id(), ..new() },
            // Ids that do not match the time of the attempt, or were not made by Keychoir.
            AttemptRecord { id: AttemptRecord::name(later), ..new() },
            AttemptRecord { id: uuid::Uuid::nil(), ..new() },
        ]
    };
    let mut records = [different(), different()].concat();
    let mut seen = std::collections::HashSet::new();
    records.retain(|record| seen.insert(record.id));
    records
}

#[test]
fn what_is_written_together_reads_as_if_each_were_written_by_itself() {
    let pool = pool();
    let records = all_kinds(&pool);
    let (mut each, mut together) = (opened(&DatabaseLocation::Memory), opened(&DatabaseLocation::Memory));
    for record in &records {
        write(&mut each, std::slice::from_ref(record), Mirrored::Nothing);
    }
    write(&mut together, &records, Mirrored::Nothing);
    assert_eq!((alone(&each), shared(&each)), (records.len() as i64, 0));
    assert_eq!((alone(&together), shared(&together)), (7, records.len() as i64 - 7), "those that cannot");
    let hours = "SELECT * FROM hours ORDER BY 1, 2, 3, 4, 5";
    let audio = "SELECT id, audio_ms FROM attempts ORDER BY id";
    for sql in [ALL, audio, hours] {
        let (each, together) = (found(&each.connection, sql), found(&together.connection, sql));
        assert_eq!(each.len(), together.len());
        each.iter().zip(&together).for_each(|(each, together)| assert_eq!(each, together));
    }
}

#[test]
fn few_have_rows_of_their_own_and_so_has_what_is_mirrored_one_by_one() {
    let pool = pool();
    for (count, mirrored, expected) in [
        (15, Mirrored::Nothing, 0),
        (16, Mirrored::Nothing, 16),
        (16, Mirrored::Keys, 16),
        (16, Mirrored::KeysAndEvents, 0),
    ] {
        let mut ledger = opened(&DatabaseLocation::Memory);
        let records: Vec<_> = (0..count).map(|_| record(&pool, 1)).collect();
        write(&mut ledger, &records, mirrored);
        assert_eq!((shared(&ledger), alone(&ledger)), (expected, count - expected), "{count} {mirrored:?}");
        assert_eq!(one(&ledger, "SELECT count(*) FROM attempts"), count);
    }
}

#[test]
fn what_a_failed_commit_may_have_written_is_not_written_again() {
    let pool = pool();
    let mut ledger = opened(&DatabaseLocation::Memory);
    let mut doubt = CommitUncertainty::default();
    let commit = |ledger: &mut Database, records: &[AttemptRecord], doubt: &mut CommitUncertainty| {
        rows::commit(ledger, &[sheet_of(records)], &[], Mirrored::Nothing, doubt, NOW)
    };
    let records: Vec<_> = (0..300).map(|_| record(&pool, 1)).collect();
    let total = |ledger: &Database| {
        let sums = "SELECT sum(attempts) FROM hours";
        (one(ledger, "SELECT count(*) FROM attempts"), one(ledger, sums))
    };
    commit(&mut ledger, &records[..100], &mut doubt).unwrap();
    // The commit succeeded, but its acknowledgement was lost.
    doubt.arises();
    commit(&mut ledger, &records[..200], &mut doubt).unwrap();
    assert_eq!(total(&ledger), (200, 200));
    // The commit failed.
    let trouble = "CREATE TRIGGER trouble BEFORE INSERT ON hours BEGIN SELECT raise(ABORT, 'full'); END";
    ledger.connection.execute_batch(trouble).unwrap();
    commit(&mut ledger, &records[200..250], &mut doubt).unwrap_err();
    commit(&mut ledger, &records[200..250], &mut doubt).unwrap_err();
    ledger.connection.execute_batch("DROP TRIGGER trouble").unwrap();
    commit(&mut ledger, &records[200..], &mut doubt).unwrap();
    assert_eq!(total(&ledger), (300, 300));
    // The uncertainty is resolved: the same record sent again is a new one.
    let again: Vec<_> = (0..20).map(|_| record(&pool, 1)).collect();
    commit(&mut ledger, &again, &mut doubt).unwrap();
    assert_eq!(total(&ledger), (320, 320));
}

#[test]
fn they_go_with_the_hour_in_which_they_began() {
    let pool = pool();
    let mut ledger = opened(&DatabaseLocation::Memory);
    let settings = Settings { retention: Retention::of_days(1, 0), ..settings(8) };
    let at = |hours: u32| (0..20).map(|_| record_at(&pool, NOW.plus(HOUR * hours), 1)).collect::<Vec<_>>();
    write(&mut ledger, &[at(0), at(1), at(2)].concat(), Mirrored::Nothing);
    (0..10).for_each(|_| write(&mut ledger, &at(0), Mirrored::Nothing));
    assert_eq!((shared(&ledger), one(&ledger, "SELECT count(*) FROM attempt_sheets")), (260, 13));
    let edge = crate::policy::retention::hour_of(NOW).plus(HOUR * 24);
    let mut left = |now| {
        let steps = (1..).find(|_| {
            maintenance::step(&mut ledger, &settings, now).unwrap() == maintenance::MaintenanceStep::Done
        });
        (steps.unwrap() > 2, one(&ledger, "SELECT count(*) FROM attempts"))
    };
    assert_eq!(left(edge), (false, 260));
    assert_eq!(left(edge.plus(HOUR)), (true, 40), "in small steps");
    assert_eq!(left(edge.plus(HOUR * 3)), (false, 0));
    assert_eq!(one(&ledger, "SELECT count(*) FROM series"), 0);
}

#[test]
fn a_file_of_before_keeps_its_attempts_and_what_it_knows_of_identifiers() {
    let folder = tempfile::tempdir().unwrap();
    let (place, path) = place(folder.path());
    fs::create_dir(path.parent().unwrap()).unwrap();
    let old = Connection::open(&path).unwrap();
    old.execute_batch(&format!("PRAGMA journal_mode = WAL; {}", schema::of_version(5))).unwrap();
    old.execute_batch(&format!(
        "INSERT INTO series VALUES (3, 'local', 'hash', 'studio', 'POST', '/v1/a', 'm', 200, 'served', 'answer', {0});
         INSERT INTO attempt_rows VALUES (x'01a229f128007abc8def0123456789ab', 'r1', 3, 1, {0}, 1, 2, 3, 4, 5, 6, 7, 8),
            (x'01a229f128007abc8def0123456789ac', 'r2', 3, 2, {0}, 0, 0, NULL, NULL, 0, NULL, 1, NULL);
         INSERT INTO outbox_events VALUES (x'01a229f128007abc8def0123456789ac', NULL, NULL);",
        NOW.0,
    ))
    .unwrap();
    old.execute_batch("BEGIN").unwrap();
    let known = OwnershipIndex::new(Keeping { identifiers_max: usize::MAX, ..KEEPING });
    let mut expected = Vec::new();
    for (log, kind) in [("owners_plentiful", Kind::HistoryItem), ("owners_passing", Kind::Request)] {
        for index in 0..3_000 {
            let owner = OwnerId::of_word(["studio", "attic"][index % 2]);
            let at = NOW.plus(Duration::from_millis(index as u64 / 7));
            let lesson = known.record(Named::new(kind, &index.to_string()), &owner, at).unwrap();
            let insert = format!(
                "INSERT INTO {log} (id, kind, workspace, learned_at_ms, used_at_ms) VALUES (?1, ?2, ?3, ?4, ?4)"
            );
            let columns = params![lesson.named.tag.bytes(), kind.word(), lesson.owner.word(), at.0 as i64];
            old.prepare_cached(&insert).unwrap().execute(columns).unwrap();
            expected.push(lesson);
        }
        // The latest change of one identifier removes it, that of another gives it another owner.
        let gone = expected.remove(expected.len() - 3_000);
        let insert = format!(
            "INSERT INTO {log} (id, kind, workspace, learned_at_ms, used_at_ms) VALUES (?1, ?2, NULL, 1, 1)"
        );
        old.execute(&insert, params![gone.named.tag.bytes(), kind.word()]).unwrap();
    }
    old.execute_batch("COMMIT").unwrap();
    let before = found(&old, ALL);
    drop(old);

    let mut ledger = opened(&place);
    assert_eq!(one(&ledger, "PRAGMA user_version"), schema::VERSION as i64);
    assert_eq!(found(&ledger.connection, ALL), before);
    assert_eq!(one(&ledger, "SELECT count(*) FROM outbox_events WHERE revision = 0"), 1);
    assert!(owners::read(&ledger.connection).unwrap() == expected);
    assert_eq!(
        one(&ledger, "SELECT count(*) FROM sqlite_schema WHERE name LIKE '%_rows'"),
        1,
        "attempt_rows"
    );
    // Writing continues.
    let pool = pool();
    let mut sheet = sheet_of(&(0..20).map(|_| record(&pool, 1)).collect::<Vec<_>>());
    let gone = Named::new(Kind::HistoryItem, "2999");
    sheet.record_ownership(vec![OwnershipUpdate::Forgotten(gone)]);
    rows::commit(&mut ledger, &[sheet], &[], Mirrored::Nothing, &mut CommitUncertainty::default(), NOW)
        .unwrap();
    assert_eq!(one(&ledger, "SELECT count(*) FROM attempts"), 22);
    expected.retain(|lesson| lesson.named != gone);
    assert!(owners::read(&ledger.connection).unwrap() == expected);
}

#[test]
fn the_shell_of_sqlite_reads_them() {
    let folder = tempfile::tempdir().unwrap();
    let (place, path) = place(folder.path());
    let pool = pool();
    let records: Vec<_> = (0..40).map(|_| record(&pool, 3)).collect();
    write(&mut opened(&place), &records, Mirrored::Nothing);
    let sql = "SELECT id, client, credits FROM attempts ORDER BY id DESC LIMIT 1";
    let Ok(output) = std::process::Command::new("sqlite3").arg(&path).arg(sql).output() else { return };
    let said = String::from_utf8(output.stdout).unwrap();
    assert_eq!(said.trim(), format!("{}|local|3", records[39].id), "{:?}", String::from_utf8(output.stderr));
}

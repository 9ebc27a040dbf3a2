//! Tests of the rows in the table `attempts` and of their hourly sums: the columns, records that are written twice,
//! records before and after a reload, and prices that are reported later. The `sqlite3` shell can read the rows.

use super::sums::query_rows;
use super::*;
use crate::proxy::RequestUser;
use crate::secret::UserFingerprint;

fn write(database: &mut Database, records: &[AttemptRecord]) {
    super::write(database, records, MirrorScope::Nothing);
}

/// Returns the number of attempts in the table `attempts` and in the hourly sums.
fn attempt_counts(database: &Database) -> [i64; 2] {
    ["SELECT count(*) FROM attempts", "SELECT coalesce(sum(attempts), 0) FROM hours"]
        .map(|sql| query_number(&database.connection, sql))
}

#[test]
fn each_column_has_the_value_of_its_record() {
    let pool = pool();
    let mut database = open_database(&DatabaseLocation::Memory);
    let full_record = AttemptRecord {
        id: AttemptRecord::new_id(UnixMs(1)),
        request_id: "a \"quoted\" name of ÄÖ 😀".into(),
        number: 2,
        client: ClientName::new("phone"),
        user: Some(RequestUser::new(UserFingerprint::new("phone", b"alice"))),
        credits_reserved: Some(9),
        characters: Some(8),
        audio: Some(Duration::from_secs(3)),
        request_bytes: 10,
        response_bytes: 11,
        ..record(&pool, 7)
    };
    let minimal_record = AttemptRecord {
        id: AttemptRecord::new_id(UnixMs(2)),
        key: None,
        model: None,
        status: None,
        characters: None,
        first_byte: None,
        credits: u64::MAX,
        credits_from: CreditSource::Unknown,
        total: Duration::MAX,
        ..record(&pool, 0)
    };
    write(&mut database, &[full_record.clone(), minimal_record.clone()]);
    let hash = Fingerprint::new(KEYS[0]);
    assert_eq!(
        query_rows(&database.connection, "SELECT * FROM attempts ORDER BY id")
            .iter()
            .map(|row| row.replace(", ", " "))
            .collect::<Vec<_>>(),
        [
            format!(
                "[Text({:?}) Text({:?}) Integer(2) Integer({}) Text(\"phone\") Text(\"{hash}\") Null Text(\"POST\") \
                 Text(\"/v1/text-to-speech/{{id}}\") Text(\"eleven_v3\") Integer(200) Text(\"served\") Integer(10) \
                 Integer(11) Integer(8) Integer(3000) Integer(9) Integer(7) Text(\"answer\") Integer(3) Integer(4) \
                 Text(\"{}\") Text(\"global\")]",
                full_record.id.to_string(),
                &*full_record.request_id,
                NOW.0,
                UserFingerprint::new("phone", b"alice")
            ),
            format!(
                "[Text({:?}) Text(\"request\") Integer(1) Integer({}) Text(\"local\") Text(\"own\") Null \
                 Text(\"POST\") Text(\"/v1/text-to-speech/{{id}}\") Null Null Text(\"served\") Integer(1) Integer(2) \
                 Null Null Null Integer({}) Text(\"unknown\") Null Integer({}) Null Text(\"global\")]",
                minimal_record.id.to_string(),
                NOW.0,
                1_i64 << 48,
                i64::MAX
            ),
        ]
    );
}

#[test]
fn a_repeated_commit_counts_no_attempt_twice() {
    let pool = pool();
    let mut database = open_database(&DatabaseLocation::Memory);
    let records: Vec<_> = (0..300).map(|_| record(&pool, 1)).collect();
    write(&mut database, &records[..100]);
    // The first commit succeeded although an error was reported, so its records are written again.
    write(&mut database, &records[..200]);
    assert_eq!(attempt_counts(&database), [200; 2]);
    let hourly_sums = query_rows(&database.connection, "SELECT * FROM hours");
    write(&mut database, &records[..200]);
    assert_eq!(query_rows(&database.connection, "SELECT * FROM hours"), hourly_sums);
    // A failed commit leaves no rows in the database.
    let failing_trigger =
        "CREATE TRIGGER trouble BEFORE UPDATE ON hours BEGIN SELECT raise(ABORT, 'full'); END";
    database.connection.execute_batch(failing_trigger).unwrap();
    transaction::commit(&mut database, &attempt_batch(&records[200..]), &[], MirrorScope::Nothing, NOW)
        .unwrap_err();
    assert_eq!(attempt_counts(&database), [200; 2]);
    database.connection.execute_batch("DROP TRIGGER trouble").unwrap();
    write(&mut database, &records[200..]);
    assert_eq!(attempt_counts(&database), [300; 2]);
}

#[test]
fn attempts_before_and_after_a_reload_are_added_to_the_same_sum() {
    let [old_pool, new_pool] = [pool(), pool()];
    let mut database = open_database(&DatabaseLocation::Memory);
    let empty_model = AttemptRecord { model: Some("".into()), ..record(&new_pool, 4) };
    let no_model = AttemptRecord { model: None, ..record(&old_pool, 8) };
    write(&mut database, &[record(&old_pool, 1), record(&new_pool, 2), empty_model, no_model]);
    let sums_query = "SELECT model, attempts, credits FROM hours ORDER BY model";
    assert_eq!(
        query_rows(&database.connection, sums_query),
        ["[Text(\"\"), Integer(2), Integer(12)]", "[Text(\"eleven_v3\"), Integer(2), Integer(3)]"]
    );
}

#[test]
fn a_late_price_is_added_once() {
    let pool = pool();
    let mut database = open_database(&DatabaseLocation::Memory);
    let unpriced = || AttemptRecord { credits: 0, credits_from: CreditSource::Unknown, ..record(&pool, 0) };
    let counts_and_credits = |database: &Database| {
        [
            "SELECT count(*) FROM attempts",
            "SELECT sum(credits) FROM attempts",
            "SELECT count(*) FROM attempts WHERE credits_from = 'unknown'",
            "SELECT sum(attempts) FROM hours",
            "SELECT sum(credits) FROM hours",
            "SELECT sum(unpriced) FROM hours",
        ]
        .map(|sql| query_number(&database.connection, sql))
    };
    let first = unpriced();
    write(&mut database, std::slice::from_ref(&first));
    assert_eq!(counts_and_credits(&database), [1, 0, 1, 1, 0, 1]);
    for _ in 0..2 {
        write(&mut database, &[late_price(&first, 296)]);
        assert_eq!(counts_and_credits(&database), [1, 296, 0, 1, 296, 0]);
    }
    // Writing the first record again does not remove the price.
    write(&mut database, &[first]);
    assert_eq!(counts_and_credits(&database), [1, 296, 0, 1, 296, 0]);
    // The record and its price may be written in one transaction.
    let second = unpriced();
    write(&mut database, &[second.clone(), late_price(&second, 4)]);
    assert_eq!(counts_and_credits(&database), [2, 300, 0, 2, 300, 0]);
    // If the price is written before the first record, the attempt is written with its price. The first record may
    // follow.
    let third = unpriced();
    write(&mut database, &[late_price(&third, 9)]);
    write(&mut database, &[third]);
    assert_eq!(counts_and_credits(&database), [3, 309, 0, 3, 309, 0]);
}

#[test]
fn the_sqlite_shell_can_read_the_attempts() {
    let directory = tempfile::tempdir().unwrap();
    let (location, path) = location(directory.path());
    let pool = pool();
    let records: Vec<_> = (0..40).map(|_| record(&pool, 3)).collect();
    write(&mut open_database(&location), &records);
    let sql = "SELECT id, client, credits FROM attempts ORDER BY id DESC LIMIT 1";
    let Ok(output) = std::process::Command::new("sqlite3").arg(&path).arg(sql).output() else { return };
    let printed_row = String::from_utf8(output.stdout).unwrap();
    let expected_row = format!("{}|local|3", records[39].id);
    let errors = String::from_utf8(output.stderr);
    assert_eq!(printed_row.trim(), expected_row, "the shell must print the row; its errors are {errors:?}");
}

//! Tests of the dimensions of attempts: written once, found again, and deleted after the last
//! attempt.

use super::*;
use crate::policy::retention::hour_of;
use crate::store::maintenance;

const HOUR: Duration = Duration::from_secs(3_600);

fn write(ledger: &mut Database, records: &[AttemptRecord]) {
    super::write(ledger, records, Mirrored::Nothing);
}

fn one(ledger: &Database, sql: &str) -> i64 {
    ledger.connection.query_row(sql, [], |row| row.get(0)).unwrap()
}

fn opened(place: &DatabaseLocation) -> Database {
    open::open(place, NOW, IntegrityCheck::Quick).unwrap().ledger
}

#[test]
fn what_differs_in_anything_is_another_series_and_what_is_alike_is_not() {
    let pool = pool();
    let new = || record_at(&pool, NOW, 1);
    let second = Arc::clone(&pool.roster().keys()[1]);
    let different = || {
        [
            new(),
            AttemptRecord { client: ClientName::new("phone"), ..new() },
            AttemptRecord { key: Some(Arc::clone(&second)), ..new() },
            AttemptRecord { key: None, ..new() },
            AttemptRecord { method: Method::GET, ..new() },
            AttemptRecord { route: Route::read("/v1/voices"), ..new() },
            AttemptRecord { model: None, ..new() },
            AttemptRecord { model: Some("".into()), ..new() },
            AttemptRecord { status: None, ..new() },
            AttemptRecord { status: Some(500), ..new() },
            AttemptRecord { outcome: Outcome::Shutdown, ..new() },
            AttemptRecord { credits_from: CreditSource::Estimate, ..new() },
        ]
    };
    let folder = tempfile::tempdir().unwrap();
    let (place, _) = place(folder.path());
    let count = different().len() as i64;
    // Twice through one connection, and once through another one with an empty cache.
    for times in 1..=2 {
        let mut ledger = opened(&place);
        write(&mut ledger, &different());
        write(&mut ledger, &different());
        assert_eq!(one(&ledger, "SELECT count(*) FROM series"), count);
        assert_eq!(
            one(&ledger, "SELECT count(*) FROM attempts"),
            2 * times * count,
            "none is without its series"
        );
        let alike =
            "SELECT count(*) FROM attempts GROUP BY client, key_hash, method, route, model, status, verdict,
            credits_from ORDER BY 1 DESC";
        assert_eq!(one(&ledger, alike), 2 * times);
    }
}

#[test]
fn a_series_whose_transaction_failed_is_not_believed_to_be_there() {
    let pool = pool();
    let mut ledger = opened(&DatabaseLocation::Memory);
    let trouble = "CREATE TRIGGER trouble BEFORE INSERT ON hours BEGIN SELECT raise(ABORT, 'full'); END";
    ledger.connection.execute_batch(trouble).unwrap();
    let records = [record_at(&pool, NOW, 1)];
    let sheets = [sheet_of(&records)];
    rows::commit(&mut ledger, &sheets, &[], Mirrored::Nothing, &mut CommitUncertainty::default(), NOW)
        .unwrap_err();
    assert_eq!(one(&ledger, "SELECT count(*) FROM series"), 0);
    ledger.connection.execute_batch("DROP TRIGGER trouble").unwrap();
    write(&mut ledger, &records);
    assert_eq!(one(&ledger, "SELECT count(*) FROM attempts"), 1);
}

#[test]
fn a_series_that_another_program_has_forgotten_is_written_again() {
    let pool = pool();
    let mut ledger = opened(&DatabaseLocation::Memory);
    write(&mut ledger, &[record_at(&pool, NOW, 1)]);
    ledger.connection.execute_batch("DELETE FROM attempt_rows; DELETE FROM series").unwrap();
    write(&mut ledger, &[record_at(&pool, NOW.plus(HOUR), 2)]);
    assert_eq!(one(&ledger, "SELECT count(*) FROM attempts"), 1);
}

#[test]
fn a_series_goes_after_its_last_attempt() {
    let pool = pool();
    let mut ledger = opened(&DatabaseLocation::Memory);
    let settings = Settings { retention: Retention::of_days(1, 0), ..settings(8) };
    let all_chores = |ledger: &mut Database, now| {
        while maintenance::step(ledger, &settings, now).unwrap() == maintenance::MaintenanceStep::More {}
        (one(ledger, "SELECT count(*) FROM attempts"), one(ledger, "SELECT count(*) FROM series"))
    };
    write(&mut ledger, &[record_at(&pool, NOW, 1)]);
    // A later attempt, and then one that was queued before: the latest counts.
    write(&mut ledger, &[record_at(&pool, NOW.plus(HOUR * 2), 2)]);
    write(&mut ledger, &[record_at(&pool, NOW.plus(HOUR), 3)]);
    let edge = hour_of(NOW).plus(HOUR * 24);
    assert_eq!(all_chores(&mut ledger, edge), (3, 1));
    assert_eq!(all_chores(&mut ledger, edge.plus(HOUR)), (2, 1));
    assert_eq!(all_chores(&mut ledger, edge.plus(HOUR * 2)), (1, 1));
    assert_eq!(all_chores(&mut ledger, edge.plus(HOUR * 3)), (0, 0));
    // A delayed attempt of an earlier hour.
    write(&mut ledger, &[record_at(&pool, NOW, 4)]);
    assert_eq!(one(&ledger, "SELECT count(*) FROM attempts"), 1, "it is not believed to be there still");
}

#[test]
fn a_price_that_comes_later_completes_the_record_once() {
    let pool = pool();
    let mut ledger = opened(&DatabaseLocation::Memory);
    let unpriced =
        AttemptRecord { credits: 0, credits_from: CreditSource::Unknown, ..record_at(&pool, NOW, 0) };
    let with_price = AttemptRecord { credits: 296, credits_from: CreditSource::Answer, ..unpriced.clone() };
    let figures = |ledger: &Database| {
        [
            one(ledger, "SELECT count(*) FROM attempts"),
            one(ledger, "SELECT sum(credits) FROM attempts"),
            one(ledger, "SELECT count(*) FROM attempts WHERE credits_from = 'unknown'"),
            one(ledger, "SELECT sum(attempts) FROM hours"),
            one(ledger, "SELECT sum(credits) FROM hours"),
            one(ledger, "SELECT sum(unpriced) FROM hours"),
        ]
    };
    write(&mut ledger, std::slice::from_ref(&unpriced));
    assert_eq!(figures(&ledger), [1, 0, 1, 1, 0, 1]);
    let priced = |ledger: &mut Database, first: &[AttemptRecord], record: &AttemptRecord| {
        let mut sheet = sheet_of(first);
        sheet.price(record);
        rows::commit(ledger, &[sheet], &[], Mirrored::Nothing, &mut CommitUncertainty::default(), NOW)
            .unwrap();
    };
    for _ in 0..2 {
        priced(&mut ledger, &[], &with_price);
        assert_eq!(figures(&ledger), [1, 296, 0, 1, 296, 0]);
    }
    // The first record does not revert it.
    write(&mut ledger, &[unpriced]);
    assert_eq!(figures(&ledger), [1, 296, 0, 1, 296, 0]);
    // The same in one transaction.
    let unpriced =
        AttemptRecord { credits: 0, credits_from: CreditSource::Unknown, ..record_at(&pool, NOW, 0) };
    let with_price = AttemptRecord { credits: 4, credits_from: CreditSource::Answer, ..unpriced.clone() };
    priced(&mut ledger, &[unpriced], &with_price);
    assert_eq!(figures(&ledger), [2, 300, 0, 2, 300, 0]);
    // If the first record was lost, the attempt is written with its price, and the first record may
    // still come.
    let unpriced =
        AttemptRecord { credits: 0, credits_from: CreditSource::Unknown, ..record_at(&pool, NOW, 0) };
    let with_price = AttemptRecord { credits: 9, credits_from: CreditSource::Answer, ..unpriced.clone() };
    priced(&mut ledger, &[], &with_price);
    write(&mut ledger, &[unpriced]);
    assert_eq!(figures(&ledger), [3, 309, 0, 3, 309, 0]);
    // The same among many attempts.
    let many: Vec<_> = (0..30).map(|_| record_at(&pool, NOW, 0)).collect();
    let unpriced =
        AttemptRecord { credits: 0, credits_from: CreditSource::Unknown, ..record_at(&pool, NOW, 0) };
    let with_price = AttemptRecord { credits: 1, credits_from: CreditSource::Answer, ..unpriced.clone() };
    write(&mut ledger, &[many.clone(), vec![unpriced]].concat());
    assert_eq!(figures(&ledger), [34, 309, 1, 34, 309, 1]);
    let others: Vec<_> = (0..30).map(|_| record_at(&pool, NOW, 0)).collect();
    priced(&mut ledger, &others, &with_price);
    assert_eq!(figures(&ledger), [64, 310, 0, 64, 310, 0]);
}

#[test]
fn a_second_delivery_that_completes_nothing_leaves_no_series_behind() {
    let pool = pool();
    let mut ledger = opened(&DatabaseLocation::Memory);
    let priced = record_at(&pool, NOW, 7);
    assert_eq!(priced.credits_from, CreditSource::Answer);
    for _ in 0..2 {
        write(&mut ledger, std::slice::from_ref(&priced));
        assert_eq!(one(&ledger, "SELECT count(*) FROM series"), 1);
    }
}

//! Tests of the outbox: inserted rows, due rows, and rows that stay after a delivery.

use super::*;
use crate::store::maintenance;

/// A database with an outbox for all rows, and an attempt of one credit.
async fn writing(location: &DatabaseLocation, pool: &Arc<Pool>) -> (UsageSink, Writing) {
    let settings = Settings { mirrored: Mirrored::KeysAndEvents, ..settings(8) };
    let (usage, writing) = Store::open(location, NOW).unwrap().write(Arc::clone(pool), settings).unwrap();
    usage.permit().await.unwrap().write(record(pool, 1));
    (usage, writing)
}

/// Ends the writer; the outbox can still be read.
async fn all_written(usage: UsageSink, mut writing: Writing) -> (Outbox, Writing) {
    drop(usage);
    assert!(writing.written(WAIT_MAX).await);
    (writing.outbox.take().unwrap(), writing)
}

fn key_name(state: &MirroredKeyState) -> RowName {
    RowName::Key { key_hash: state.key_hash.clone(), observed_at: state.observed_at }
}

fn names(batch: &Batch) -> Vec<RowName> {
    let events = batch.events.iter();
    let events = events.map(|event| RowName::Event { id: event.id.clone(), revision: event.revision });
    batch.keys.iter().map(key_name).chain(events).collect()
}

#[tokio::test]
async fn sent_rows_leave_the_outbox_and_others_survive_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let (location, _) = location(folder.path());
    let pool = pool();
    let (usage, writing) = writing(&location, &pool).await;
    let (outbox, writing) = all_written(usage, writing).await;
    let batch = outbox.take(10).await.unwrap();
    assert_eq!((batch.keys.len(), batch.events.len(), batch.refused), (2, 1, 0));
    assert_eq!((batch.events[0].credits, &*batch.events[0].client), (1, "local"));
    assert_eq!(outbox.take(10).await.unwrap(), batch, "unconfirmed rows are due again");
    drop(outbox);
    assert_eq!(writing.ended(WAIT_MAX).await, 0);

    let (usage, writing) = self::writing(&location, &pool).await;
    let (outbox, writing) = all_written(usage, writing).await;
    let later = outbox.take(10).await.unwrap();
    assert_eq!((later.keys.len(), later.events.len()), (2, 2), "one row a key, one an attempt");
    assert_eq!(outbox.take(1).await.unwrap().events, later.events[..1], "the oldest first");
    outbox.record(Delivery { sent: names(&later), refused: Vec::new() }).await.unwrap();
    assert_eq!(outbox.take(10).await.unwrap(), Batch::default());
    drop(outbox);
    assert_eq!(writing.ended(WAIT_MAX).await, 0);
}

#[tokio::test]
async fn a_state_that_changed_during_the_delivery_is_sent_again() {
    let pool = pool();
    let (usage, writing) = writing(&DatabaseLocation::Memory, &pool).await;
    let (outbox, _writing) = all_written(usage, writing).await;
    let before = outbox.take(10).await.unwrap();
    refuse(&pool, crate::clock::now());
    let after = outbox.take(10).await.unwrap();
    let hash = Fingerprint::of(KEYS[1]).to_string();
    let of = |batch: &Batch| batch.keys.iter().find(|state| state.key_hash == hash).unwrap().clone();
    assert_eq!(
        (&*of(&before).status, &*of(&after).status),
        ("active", "invalid"),
        "the state changes without an attempt"
    );
    assert!(of(&after).observed_at > of(&before).observed_at);
    outbox.record(Delivery { sent: names(&before), refused: Vec::new() }).await.unwrap();
    assert_eq!(outbox.take(10).await.unwrap().keys, [of(&after)]);
}

#[tokio::test]
async fn a_refused_row_waits_its_time_and_is_counted_once() {
    let pool = pool();
    let (usage, writing) = writing(&DatabaseLocation::Memory, &pool).await;
    let (outbox, _writing) = all_written(usage, writing).await;
    let batch = outbox.take(10).await.unwrap();
    let refused = |until| {
        let refused = |name| RefusedRow { name, code: "23514".to_owned(), until };
        Delivery { sent: Vec::new(), refused: names(&batch).into_iter().map(refused).collect() }
    };
    assert_eq!(outbox.record(refused(UnixMs(u64::MAX >> 1))).await, Ok(3));
    assert_eq!(outbox.take(10).await.unwrap(), Batch { refused: 3, ..Batch::default() });
    outbox.clear_parked().await.unwrap();
    assert_eq!(outbox.take(10).await.unwrap(), Batch { refused: 3, ..batch.clone() });
    assert_eq!(outbox.record(refused(UnixMs(0))).await, Ok(0), "a second refusal is not counted");
    assert_eq!(outbox.take(10).await.unwrap().keys.len(), 2, "the refused row is due again");
    outbox.record(Delivery { sent: names(&batch), refused: Vec::new() }).await.unwrap();
    assert_eq!(outbox.take(10).await.unwrap(), Batch::default());
}

#[test]
fn a_clock_that_is_set_back_makes_no_state_older() {
    let mut database = open::open(&DatabaseLocation::Memory, NOW, IntegrityCheck::Quick).unwrap().database;
    let keys = pool().snapshot(NOW);
    let mut observed = Vec::new();
    for now in [1_000, 1_000, 400, 2_000].map(UnixMs) {
        rows::commit(&mut database, &UsageBatch::default(), &keys[..1], Mirrored::Keys, now).unwrap();
        let sql = "SELECT observed_at_ms FROM outbox_keys";
        observed.push(database.connection.query_row(sql, [], |row| row.get::<_, i64>(0)).unwrap());
    }
    assert_eq!(observed, [1_000, 1_001, 1_002, 2_000]);
}

#[test]
fn only_mirrored_rows_enter_the_outbox_and_an_event_once() {
    let pool = pool();
    let keys = pool.snapshot(NOW);
    for (mirrored, expected) in
        [(Mirrored::Nothing, (0, 0)), (Mirrored::Keys, (2, 0)), (Mirrored::KeysAndEvents, (2, 1))]
    {
        let mut database =
            open::open(&DatabaseLocation::Memory, NOW, IntegrityCheck::Quick).unwrap().database;
        let record = record(&pool, 1);
        for _ in 0..2 {
            let batch = batch_of(&[record.clone(), record.clone()]);
            rows::commit(&mut database, &batch, &keys, mirrored, NOW).unwrap();
        }
        let count = |table| {
            let sql = format!("SELECT count(*) FROM {table}");
            database.connection.query_row(&sql, [], |row| row.get::<_, i64>(0)).unwrap()
        };
        assert_eq!((count("outbox_keys"), count("outbox_events")), expected, "{mirrored:?}");
    }
}

#[test]
fn a_deleted_attempt_leaves_the_outbox() {
    let pool = pool();
    let mut database = open::open(&DatabaseLocation::Memory, NOW, IntegrityCheck::Quick).unwrap().database;
    let old = record_at(&pool, UnixMs(0), 1);
    let records = [old, record(&pool, 1)];
    write(&mut database, &records, Mirrored::KeysAndEvents);
    let settings = Settings { retention: Retention::of_days(1, 0), ..settings(8) };
    maintenance::step(&mut database, &settings, NOW).unwrap();
    let sql = "SELECT id FROM outbox_events";
    let left: String = database.connection.query_row(sql, [], |row| row.get(0)).unwrap();
    assert_eq!(left, records[1].id.to_string());
}

#[tokio::test]
async fn a_failing_disk_leaves_the_mirror_without_a_reply() {
    let pool = pool();
    let (usage, writing) = writing(&DatabaseLocation::Memory, &pool).await;
    let (outbox, writing) = all_written(usage, writing).await;
    writing.health.set_failing(true);
    assert_eq!(outbox.take(10).await, Err(StoreClosed));
    writing.health.set_failing(false);
    assert_eq!(outbox.take(10).await.unwrap().keys.len(), 2);
}

#[tokio::test]
async fn a_late_price_is_sent_in_every_state_of_the_event() {
    let pool = pool();
    let settings = Settings { mirrored: Mirrored::KeysAndEvents, ..settings(8) };
    let store = Store::open(&DatabaseLocation::Memory, NOW).unwrap();
    let (usage, mut writing) = store.write(Arc::clone(&pool), settings).unwrap();
    let outbox = writing.outbox.take().unwrap();
    let unpriced = || AttemptRecord { credits: 0, credits_from: CreditSource::Unknown, ..record(&pool, 0) };
    let records = [(); 3].map(|()| unpriced());
    let written = async |count| {
        while writing.health.written() < count {
            tokio::task::yield_now().await;
        }
    };
    for record in &records {
        usage.permit().await.unwrap().write(record.clone());
    }
    written(3).await;
    let before = outbox.take(10).await.unwrap();
    let of = |record: &AttemptRecord| {
        let id = record.id.to_string();
        names(&before)
            .into_iter()
            .find(|name| matches!(name, RowName::Event { id: of, .. } if *of == id))
            .unwrap()
    };
    let refused =
        |record| RefusedRow { name: of(record), code: "23514".into(), until: UnixMs(u64::MAX >> 1) };
    // The first is delivered before its price is known, the second after it, the third is refused.
    let delivery = Delivery { sent: vec![of(&records[0])], refused: vec![refused(&records[2])] };
    outbox.record(delivery).await.unwrap();
    for record in &records {
        usage.permit().await.unwrap().write(priced(record, 5));
    }
    written(6).await;
    let delivery = Delivery { sent: vec![of(&records[1])], refused: vec![refused(&records[1])] };
    assert_eq!(outbox.record(delivery).await, Ok(0), "the refusal of an old revision is ignored");
    let after = outbox.take(10).await.unwrap();
    let figures: Vec<_> = after.events.iter().map(|event| (event.credits, &*event.credits_from)).collect();
    assert_eq!((figures, after.refused), (vec![(5, "answer"); 3], 0));
    outbox.record(Delivery { sent: names(&after), refused: Vec::new() }).await.unwrap();
    assert_eq!(outbox.take(10).await.unwrap(), Batch::default());
}

//! Tests of the outbox: which rows enter it, which are due, and which remain after a delivery, a refusal, a later price
//! or the deletion of an attempt. The outbox is unavailable while writes fail.

use super::*;
use crate::store::maintenance;

/// Starts a writer with an outbox for keys and events, and writes the record of an attempt of one credit.
async fn start_writer(location: &DatabaseLocation, pool: &Arc<Pool>) -> (UsageSink, WriterHandle) {
    let settings = Settings { mirror_scope: MirrorScope::KeysAndEvents, ..settings(8) };
    let (usage, writer_handle) =
        Store::open(location, NOW).unwrap().start_writer(Arc::clone(pool), settings).unwrap();
    usage.acquire_permit().await.unwrap().write(record(pool, 1));
    (usage, writer_handle)
}

/// Waits until all records are written. Returns the outbox, which can still be read, and the handle of the writer.
async fn finish_writing(usage: UsageSink, mut writer_handle: WriterHandle) -> (Outbox, WriterHandle) {
    drop(usage);
    assert!(writer_handle.wait_until_written(WAIT_TIMEOUT).await);
    (writer_handle.outbox.take().unwrap(), writer_handle)
}

fn key_version(state: &MirroredKeyState) -> RowVersion {
    RowVersion::Key { key_hash: state.key_hash.clone(), observed_at: state.observed_at }
}

fn row_versions(batch: &OutboxBatch) -> Vec<RowVersion> {
    let events = batch.events.iter();
    let events = events.map(|event| RowVersion::Event { id: event.id.clone(), revision: event.revision });
    batch.keys.iter().map(key_version).chain(events).collect()
}

#[tokio::test]
async fn delivered_rows_leave_the_outbox_and_others_survive_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let (location, _) = location(directory.path());
    let pool = pool();
    let (usage, writer_handle) = start_writer(&location, &pool).await;
    let (outbox, writer_handle) = finish_writing(usage, writer_handle).await;
    let batch = outbox.next_batch(10).await.unwrap();
    assert_eq!((batch.keys.len(), batch.events.len(), batch.refused), (2, 1, 0));
    assert_eq!((batch.events[0].credits, &*batch.events[0].client), (1, "local"));
    assert_eq!(outbox.next_batch(10).await.unwrap(), batch, "unconfirmed rows must be due again");
    drop(outbox);
    assert_eq!(writer_handle.wait_until_closed(WAIT_TIMEOUT).await, 0);

    let (usage, writer_handle) = start_writer(&location, &pool).await;
    let (outbox, writer_handle) = finish_writing(usage, writer_handle).await;
    let later_batch = outbox.next_batch(10).await.unwrap();
    assert_eq!(
        (later_batch.keys.len(), later_batch.events.len()),
        (2, 2),
        "the outbox must contain one row per key and one per attempt"
    );
    assert_eq!(
        outbox.next_batch(1).await.unwrap().events,
        later_batch.events[..1],
        "the oldest events must come first"
    );
    let delivery = DeliveryReport { sent: row_versions(&later_batch), refused: Vec::new() };
    outbox.record_delivery(delivery).await.unwrap();
    assert_eq!(outbox.next_batch(10).await.unwrap(), OutboxBatch::default());
    drop(outbox);
    assert_eq!(writer_handle.wait_until_closed(WAIT_TIMEOUT).await, 0);
}

#[tokio::test]
async fn a_state_that_changed_during_the_delivery_is_sent_again() {
    let pool = pool();
    let (usage, writer_handle) = start_writer(&DatabaseLocation::Memory, &pool).await;
    let (outbox, _writer_handle) = finish_writing(usage, writer_handle).await;
    let first_batch = outbox.next_batch(10).await.unwrap();
    refuse_second_key(&pool, crate::clock::now());
    let second_batch = outbox.next_batch(10).await.unwrap();
    let hash = Fingerprint::new(KEYS[1]).to_string();
    let second_key =
        |batch: &OutboxBatch| batch.keys.iter().find(|state| state.key_hash == hash).unwrap().clone();
    assert_eq!(
        (&*second_key(&first_batch).status, &*second_key(&second_batch).status),
        ("active", "invalid"),
        "the state must change without an attempt"
    );
    assert!(second_key(&second_batch).observed_at > second_key(&first_batch).observed_at);
    outbox
        .record_delivery(DeliveryReport { sent: row_versions(&first_batch), refused: Vec::new() })
        .await
        .unwrap();
    assert_eq!(outbox.next_batch(10).await.unwrap().keys, [second_key(&second_batch)]);
}

#[tokio::test]
async fn a_refused_row_waits_for_its_retry_time_and_is_counted_once() {
    let pool = pool();
    let (usage, writer_handle) = start_writer(&DatabaseLocation::Memory, &pool).await;
    let (outbox, _writer_handle) = finish_writing(usage, writer_handle).await;
    let batch = outbox.next_batch(10).await.unwrap();
    let all_refused_until = |retry_at| {
        let refused_row = |row| RefusedRow { row, code: "23514".to_owned(), retry_at };
        DeliveryReport {
            sent: Vec::new(),
            refused: row_versions(&batch).into_iter().map(refused_row).collect(),
        }
    };
    assert_eq!(outbox.record_delivery(all_refused_until(UnixMs(u64::MAX >> 1))).await, Ok(3));
    assert_eq!(outbox.next_batch(10).await.unwrap(), OutboxBatch { refused: 3, ..OutboxBatch::default() });
    outbox.release_refused().await.unwrap();
    assert_eq!(outbox.next_batch(10).await.unwrap(), OutboxBatch { refused: 3, ..batch.clone() });
    assert_eq!(
        outbox.record_delivery(all_refused_until(UnixMs(0))).await,
        Ok(0),
        "a second refusal must not be counted"
    );
    assert_eq!(outbox.next_batch(10).await.unwrap().keys.len(), 2, "the refused rows must be due again");
    outbox.record_delivery(DeliveryReport { sent: row_versions(&batch), refused: Vec::new() }).await.unwrap();
    assert_eq!(outbox.next_batch(10).await.unwrap(), OutboxBatch::default());
}

#[test]
fn observation_times_increase_even_if_the_clock_is_set_back() {
    let mut database = open_database(&DatabaseLocation::Memory);
    let keys = pool().snapshot(NOW);
    let mut observation_times = Vec::new();
    for now in [1_000, 1_000, 400, 2_000].map(UnixMs) {
        transaction::commit(&mut database, &UsageBatch::default(), &keys[..1], MirrorScope::Keys, now)
            .unwrap();
        let sql = "SELECT observed_at_ms FROM outbox_keys";
        observation_times.push(database.connection.query_row(sql, [], |row| row.get::<_, i64>(0)).unwrap());
    }
    assert_eq!(observation_times, [1_000, 1_001, 1_002, 2_000]);
}

#[test]
fn only_mirrored_rows_enter_the_outbox_and_each_event_once() {
    let pool = pool();
    let keys = pool.snapshot(NOW);
    for (mirror_scope, expected) in
        [(MirrorScope::Nothing, (0, 0)), (MirrorScope::Keys, (2, 0)), (MirrorScope::KeysAndEvents, (2, 1))]
    {
        let mut database = open_database(&DatabaseLocation::Memory);
        let record = record(&pool, 1);
        for _ in 0..2 {
            let batch = attempt_batch(&[record.clone(), record.clone()]);
            transaction::commit(&mut database, &batch, &keys, mirror_scope, NOW).unwrap();
        }
        let count = |table| {
            let sql = format!("SELECT count(*) FROM {table}");
            database.connection.query_row(&sql, [], |row| row.get::<_, i64>(0)).unwrap()
        };
        assert_eq!(
            (count("outbox_keys"), count("outbox_events")),
            expected,
            "the outbox must have the rows of {mirror_scope:?}"
        );
    }
}

#[test]
fn a_deleted_attempt_leaves_the_outbox() {
    let pool = pool();
    let mut database = open_database(&DatabaseLocation::Memory);
    let old_record = record_started_at(&pool, UnixMs(0), 1);
    let records = [old_record, record(&pool, 1)];
    write(&mut database, &records, MirrorScope::KeysAndEvents);
    let settings = Settings { retention: Retention::from_days(1, 0), ..settings(8) };
    maintenance::run_step(&mut database, &settings, NOW).unwrap();
    let sql = "SELECT id FROM outbox_events";
    let remaining_id: String = database.connection.query_row(sql, [], |row| row.get(0)).unwrap();
    assert_eq!(remaining_id, records[1].id.to_string());
}

#[tokio::test]
async fn the_outbox_is_unavailable_while_writes_fail() {
    let pool = pool();
    let (usage, writer_handle) = start_writer(&DatabaseLocation::Memory, &pool).await;
    let (outbox, writer_handle) = finish_writing(usage, writer_handle).await;
    writer_handle.health.set_failing(true);
    assert_eq!(outbox.next_batch(10).await, Err(StoreUnavailable));
    writer_handle.health.set_failing(false);
    assert_eq!(outbox.next_batch(10).await.unwrap().keys.len(), 2);
}

#[tokio::test]
async fn a_late_price_is_sent_in_every_delivery_state() {
    let pool = pool();
    let settings = Settings { mirror_scope: MirrorScope::KeysAndEvents, ..settings(8) };
    let store = Store::open(&DatabaseLocation::Memory, NOW).unwrap();
    let (usage, mut writer_handle) = store.start_writer(Arc::clone(&pool), settings).unwrap();
    let outbox = writer_handle.outbox.take().unwrap();
    let unpriced = || AttemptRecord { credits: 0, credits_from: CreditSource::Unknown, ..record(&pool, 0) };
    let records = [(); 3].map(|()| unpriced());
    let wait_until_written = async |count| {
        while writer_handle.health.written_records() < count {
            tokio::task::yield_now().await;
        }
    };
    for record in &records {
        usage.acquire_permit().await.unwrap().write(record.clone());
    }
    wait_until_written(3).await;
    let first_batch = outbox.next_batch(10).await.unwrap();
    let first_version = |record: &AttemptRecord| {
        let id = record.id.to_string();
        row_versions(&first_batch)
            .into_iter()
            .find(|version| matches!(version, RowVersion::Event { id: event_id, .. } if *event_id == id))
            .unwrap()
    };
    let refused_row = |record| RefusedRow {
        row: first_version(record),
        code: "23514".into(),
        retry_at: UnixMs(u64::MAX >> 1),
    };
    // The first event is delivered before its price is known, and the third is refused. Two reports about the old
    // revision of the second event, a delivery and a refusal, arrive after its price.
    let delivery =
        DeliveryReport { sent: vec![first_version(&records[0])], refused: vec![refused_row(&records[2])] };
    outbox.record_delivery(delivery).await.unwrap();
    for record in &records {
        usage.acquire_permit().await.unwrap().write(late_price(record, 5));
    }
    wait_until_written(6).await;
    let delivery =
        DeliveryReport { sent: vec![first_version(&records[1])], refused: vec![refused_row(&records[1])] };
    assert_eq!(
        outbox.record_delivery(delivery).await,
        Ok(0),
        "the refusal of an old revision must be ignored"
    );
    let second_batch = outbox.next_batch(10).await.unwrap();
    let prices: Vec<_> =
        second_batch.events.iter().map(|event| (event.credits, &*event.credits_from)).collect();
    assert_eq!((prices, second_batch.refused), (vec![(5, "answer"); 3], 0));
    outbox
        .record_delivery(DeliveryReport { sent: row_versions(&second_batch), refused: Vec::new() })
        .await
        .unwrap();
    assert_eq!(outbox.next_batch(10).await.unwrap(), OutboxBatch::default());
}

//! Tests of the times at which commits start, and of the commands that the writer thread runs between them. They use
//! virtual time, which does not advance during a commit.

use super::faults::open_writer;
use super::*;
use tokio::time::sleep;

const MAX_QUEUED: usize = 8;

/// The handles of a writer that runs concurrently with a test.
struct RunningWriter {
    usage: UsageSink,
    health: Health,
    outbox: Outbox,
}

/// Runs `test` concurrently with a writer, and waits until both have ended.
async fn with_running_writer<F: Future>(
    location: &DatabaseLocation,
    pool: &Arc<Pool>,
    test: impl FnOnce(RunningWriter) -> F,
) -> F::Output {
    let (writer, health) = open_writer(location, pool, MAX_QUEUED);
    let (usage, queue) = UsageSink::new(MAX_QUEUED, MAX_QUEUED, health.depth.clone());
    let (outbox, outbox_commands) = Outbox::new();
    let (all_written, _) = oneshot::channel();
    let history_commands = no_history_commands();
    let writing = writer.run(WriterChannels { queue, outbox_commands, history_commands, all_written });
    let (_, output) = tokio::join!(writing, test(RunningWriter { usage, health, outbox }));
    output
}

impl RunningWriter {
    async fn write(&self, pool: &Pool, records: usize) {
        for _ in 0..records {
            self.usage.acquire_permit().await.unwrap().write(record(pool, 1));
        }
    }

    /// Waits `ms` milliseconds, and returns the number of written records.
    async fn written_after(&self, ms: u64) -> u64 {
        sleep(Duration::from_millis(ms)).await;
        self.health.written_records()
    }
}

#[tokio::test(start_paused = true)]
async fn the_first_record_is_committed_immediately_and_later_ones_share_a_commit() {
    let pool = pool();
    with_running_writer(&DatabaseLocation::Memory, &pool, async |running| {
        running.write(&pool, 1).await;
        assert_eq!(running.written_after(1).await, 1);
        running.write(&pool, 1).await;
        assert_eq!(running.written_after(20).await, 1);
        running.write(&pool, 2).await;
        assert_eq!(
            running.written_after(28).await,
            1,
            "49 ms after the last commit started, the next one must not have started"
        );
        assert_eq!(running.written_after(2).await, 4);
        running.write(&pool, 1).await;
        assert_eq!(running.written_after(48).await, 4, "the interval must apply while records are received");
        assert_eq!(running.written_after(2).await, 5);
        assert_eq!(running.written_after(100).await, 5);
        running.write(&pool, 1).await;
        assert_eq!(
            running.written_after(1).await,
            6,
            "after an idle period, a record must be committed immediately"
        );
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_full_batch_is_committed_before_the_interval() {
    let pool = pool();
    with_running_writer(&DatabaseLocation::Memory, &pool, async |running| {
        running.write(&pool, 1).await;
        assert_eq!(running.written_after(1).await, 1);
        for round in 1..=3 {
            running.write(&pool, MAX_QUEUED).await;
            assert_eq!(running.written_after(1).await, 1 + round * MAX_QUEUED as u64);
        }
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn shutdown_does_not_wait_for_the_interval() {
    let pool = pool();
    let started_at = crate::clock::instant();
    let health = with_running_writer(&DatabaseLocation::Memory, &pool, async |running| {
        running.write(&pool, 1).await;
        assert_eq!(running.written_after(1).await, 1);
        running.write(&pool, 3).await;
        running.health
    })
    .await;
    assert_eq!((health.written_records(), health.unwritten_records()), (4, 0));
    assert_eq!(crate::clock::elapsed_since(started_at), Duration::from_millis(1));
}

#[tokio::test(start_paused = true)]
async fn the_mirror_is_served_between_commits() {
    let pool = pool();
    with_running_writer(&DatabaseLocation::Memory, &pool, async |running| {
        running.write(&pool, 1).await;
        assert_eq!(running.written_after(1).await, 1);
        running.write(&pool, 1).await;
        let started_at = crate::clock::instant();
        assert_eq!(running.outbox.next_batch(10).await.unwrap().keys.len(), 2);
        assert_eq!(crate::clock::elapsed_since(started_at), Duration::ZERO);
        assert_eq!(running.health.written_records(), 1);
        assert_eq!(running.written_after(50).await, 2, "a command must not delay the commit");
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn changed_keys_are_written_after_the_commit_interval() {
    let directory = tempfile::tempdir().unwrap();
    let (location, path) = location(directory.path());
    let pool = pool();
    with_running_writer(&location, &pool, async |running| {
        running.write(&pool, 1).await;
        assert_eq!(running.written_after(1).await, 1);
        refuse_second_key(&pool, NOW);
        running.usage.request_key_state_write();
        let keys_with_evidence = || -> i64 {
            let sql = "SELECT count(*) FROM keys WHERE evidence <> '{}'";
            Connection::open(&path).unwrap().query_row(sql, [], |row| row.get(0)).unwrap()
        };
        sleep(Duration::from_millis(48)).await;
        assert_eq!(keys_with_evidence(), 0);
        sleep(Duration::from_millis(2)).await;
        assert_eq!(keys_with_evidence(), 1);
    })
    .await;
}

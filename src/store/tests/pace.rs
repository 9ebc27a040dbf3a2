//! Tests of the times of commits. They use virtual time, in which a commit has no duration.

use super::faults::writer;
use super::*;
use tokio::time::sleep;

const QUEUE_MAX: usize = 8;

/// A writer that runs beside a test.
struct Beside {
    usage: UsageSink,
    health: Health,
    outbox: Outbox,
}

/// Runs `test` beside the thread that writes to `location`, and waits until that has ended.
async fn beside<F: Future>(
    location: &DatabaseLocation,
    pool: &Arc<Pool>,
    test: impl FnOnce(Beside) -> F,
) -> F::Output {
    let (writer, health) = writer(location, pool, QUEUE_MAX);
    let (usage, queue) = UsageSink::new(QUEUE_MAX, QUEUE_MAX, health.depth.clone());
    let (outbox, commands) = Outbox::new();
    let (all_written, _) = oneshot::channel();
    let writing = writer.run(Callers { queue, commands, all_written });
    let (_, output) = tokio::join!(writing, test(Beside { usage, health, outbox }));
    output
}

impl Beside {
    async fn write(&self, pool: &Pool, records: usize) {
        for _ in 0..records {
            self.usage.permit().await.unwrap().write(record(pool, 1));
        }
    }

    /// The number of written records after `ms` more milliseconds.
    async fn written_after(&self, ms: u64) -> u64 {
        sleep(Duration::from_millis(ms)).await;
        self.health.written()
    }
}

#[tokio::test(start_paused = true)]
async fn the_first_record_is_committed_at_once_and_later_ones_share_a_commit() {
    let pool = pool();
    beside(&DatabaseLocation::Memory, &pool, async |beside| {
        beside.write(&pool, 1).await;
        assert_eq!(beside.written_after(1).await, 1);
        beside.write(&pool, 1).await;
        assert_eq!(beside.written_after(20).await, 1);
        beside.write(&pool, 2).await;
        assert_eq!(beside.written_after(28).await, 1, "49 ms after the last commit began");
        assert_eq!(beside.written_after(2).await, 4);
        beside.write(&pool, 1).await;
        assert_eq!(beside.written_after(48).await, 4, "the interval applies while records arrive");
        assert_eq!(beside.written_after(2).await, 5);
        assert_eq!(beside.written_after(100).await, 5);
        beside.write(&pool, 1).await;
        assert_eq!(beside.written_after(1).await, 6, "after a quiet moment, at once");
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_full_batch_is_committed_before_the_interval() {
    let pool = pool();
    beside(&DatabaseLocation::Memory, &pool, async |beside| {
        beside.write(&pool, 1).await;
        assert_eq!(beside.written_after(1).await, 1);
        for round in 1..=3 {
            beside.write(&pool, QUEUE_MAX).await;
            assert_eq!(beside.written_after(1).await, 1 + round * QUEUE_MAX as u64);
        }
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn the_end_does_not_wait_for_the_interval() {
    let pool = pool();
    let began = crate::clock::instant();
    let health = beside(&DatabaseLocation::Memory, &pool, async |beside| {
        beside.write(&pool, 1).await;
        assert_eq!(beside.written_after(1).await, 1);
        beside.write(&pool, 3).await;
        beside.health
    })
    .await;
    assert_eq!((health.written(), health.waiting()), (4, 0));
    assert_eq!(crate::clock::since(began), Duration::from_millis(1));
}

#[tokio::test(start_paused = true)]
async fn the_mirror_is_served_between_commits() {
    let pool = pool();
    beside(&DatabaseLocation::Memory, &pool, async |beside| {
        beside.write(&pool, 1).await;
        assert_eq!(beside.written_after(1).await, 1);
        beside.write(&pool, 1).await;
        let began = crate::clock::instant();
        assert_eq!(beside.outbox.take(10).await.unwrap().keys.len(), 2);
        assert_eq!(crate::clock::since(began), Duration::ZERO);
        assert_eq!(beside.health.written(), 1);
        assert_eq!(beside.written_after(50).await, 2, "a command does not delay the commit");
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn changed_keys_are_written_after_the_commit_interval() {
    let folder = tempfile::tempdir().unwrap();
    let (location, path) = location(folder.path());
    let pool = pool();
    beside(&location, &pool, async |beside| {
        beside.write(&pool, 1).await;
        assert_eq!(beside.written_after(1).await, 1);
        refuse(&pool, NOW);
        beside.usage.keys_changed();
        let parked = || -> i64 {
            let sql = "SELECT count(*) FROM keys WHERE evidence <> '{}'";
            Connection::open(&path).unwrap().query_row(sql, [], |row| row.get(0)).unwrap()
        };
        sleep(Duration::from_millis(48)).await;
        assert_eq!(parked(), 0);
        sleep(Duration::from_millis(2)).await;
        assert_eq!(parked(), 1);
    })
    .await;
}

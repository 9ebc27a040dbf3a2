//! Tests of the states of the files after a power cut: the log is truncated at any byte or ends in garbage, or a
//! checkpoint has written only a part of its pages. The tests do not prove that the disk keeps flushed data, which
//! would need a device that drops unflushed writes.

use super::faults::{open_writer, send_record};
use super::*;
use crate::store::open;

/// The contents of a database file and of its log.
#[derive(Clone)]
struct Snapshot {
    file: Vec<u8>,
    log: Vec<u8>,
}

impl Snapshot {
    fn read(path: &Path) -> Self {
        Self {
            file: fs::read(path).unwrap(),
            log: fs::read(open::companion(path, "-wal")).unwrap_or_default(),
        }
    }

    /// Opens the snapshot as startup would, and returns the credits of its attempts in their order. The file
    /// must not be quarantined, and the sums must agree with the attempts.
    #[track_caller]
    fn attempts(&self) -> Vec<i64> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keychoir.db");
        fs::write(&path, &self.file).unwrap();
        fs::write(open::companion(&path, "-wal"), &self.log).unwrap();
        let open_result =
            open::open(&DatabaseLocation::File(path.clone()), NOW, IntegrityCheck::Full).unwrap();
        assert_eq!(open_result.quarantined_path, None);
        let connection = &open_result.database.connection;
        let integrity: String = connection.query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap();
        assert_eq!(integrity, "ok");
        let mut statement = connection.prepare("SELECT credits FROM attempts ORDER BY id").unwrap();
        let attempts: Vec<i64> =
            statement.query_map([], |row| row.get(0)).unwrap().map(Result::unwrap).collect();
        let sum = |sql: &str| -> i64 { connection.query_row(sql, [], |row| row.get(0)).unwrap() };
        assert_eq!(sum("SELECT coalesce(sum(credits), 0) FROM hours"), attempts.iter().sum::<i64>());
        attempts
    }
}

/// The size of the header of a write-ahead log.
const LOG_HEADER_SIZE: usize = 32;
/// The size of a frame of a write-ahead log: a header and a page.
const FRAME_SIZE: usize = 24 + 4_096;

/// Commits an attempt with each of the `credits`, and returns a snapshot after each commit.
fn commit_and_snapshot(
    path: &Path,
    location: &DatabaseLocation,
    credits: std::ops::RangeInclusive<u64>,
) -> Vec<Snapshot> {
    commit_batches_and_snapshot(path, location, credits, 1)
}

/// Commits `batch_size` attempts with each of the `credits`, and returns a snapshot after each commit.
fn commit_batches_and_snapshot(
    path: &Path,
    location: &DatabaseLocation,
    credits: std::ops::RangeInclusive<u64>,
    batch_size: usize,
) -> Vec<Snapshot> {
    let pool = pool();
    let (mut writer, health) = open_writer(location, &pool, 1_000);
    let snapshot_after = |credits| {
        (0..batch_size).for_each(|_| send_record(&mut writer, &health, record(&pool, credits)));
        writer.flush();
        assert!(!health.is_failing());
        Snapshot::read(path)
    };
    credits.map(snapshot_after).collect()
}

#[test]
fn a_log_that_is_cut_off_anywhere_leaves_whole_transactions() {
    let directory = tempfile::tempdir().unwrap();
    let (location, path) = location(directory.path());
    let snapshots = commit_and_snapshot(&path, &location, 1..=6);
    let last = snapshots.last().unwrap();
    assert_eq!(last.log.len() % FRAME_SIZE, LOG_HEADER_SIZE, "the log must consist of whole frames");
    let frames = (0..=last.log.len() / FRAME_SIZE).map(|frame| LOG_HEADER_SIZE + frame * FRAME_SIZE);
    let edges = frames.flat_map(|end| [end.saturating_sub(1), end, end + 1, end + 25, end + 2_000]);
    let mut previous_count = 0;
    for length in [0, 1, 31].into_iter().chain(edges).filter(|length| *length <= last.log.len()) {
        let attempts = Snapshot { log: last.log[..length].to_vec(), ..last.clone() }.attempts();
        assert!(
            attempts.iter().copied().eq(1..=attempts.len() as i64),
            "a log of {length} bytes must contain the first attempts: {attempts:?}"
        );
        assert!(attempts.len() >= previous_count, "a log of {length} bytes must not contain fewer attempts");
        // The log that was flushed when a commit was acknowledged must contain its transaction.
        let acknowledged_count = snapshots.iter().take_while(|snapshot| snapshot.log.len() <= length).count();
        assert!(
            attempts.len() >= acknowledged_count,
            "a log of {length} bytes must contain {acknowledged_count} attempts: {attempts:?}"
        );
        previous_count = attempts.len();
    }
    assert_eq!(previous_count, 6);
}

#[test]
fn the_attempts_of_a_commit_are_all_kept_or_all_lost() {
    const ATTEMPTS_PER_COMMIT: usize = 200;
    let directory = tempfile::tempdir().unwrap();
    let (location, path) = location(directory.path());
    let snapshots = commit_batches_and_snapshot(&path, &location, 1..=6, ATTEMPTS_PER_COMMIT);
    let last = snapshots.last().unwrap();
    let mut previous_commits = 0;
    for frame in 0..=last.log.len() / FRAME_SIZE {
        for torn_bytes in [0, 2_000] {
            let length = (LOG_HEADER_SIZE + frame * FRAME_SIZE + torn_bytes).min(last.log.len());
            let attempts = Snapshot { log: last.log[..length].to_vec(), ..last.clone() }.attempts();
            let commits = attempts.len() / ATTEMPTS_PER_COMMIT;
            let complete_commits =
                (1..=commits as i64).flat_map(|credits| std::iter::repeat_n(credits, ATTEMPTS_PER_COMMIT));
            assert!(
                attempts.iter().copied().eq(complete_commits),
                "a log of {length} bytes must contain whole commits: {attempts:?}"
            );
            let acknowledged_count =
                snapshots.iter().take_while(|snapshot| snapshot.log.len() <= length).count();
            assert!(
                commits >= acknowledged_count.max(previous_commits),
                "a log of {length} bytes must not contain only {commits} commits"
            );
            previous_commits = commits;
        }
    }
    assert_eq!(previous_commits, 6);
}

#[test]
fn a_log_that_ends_in_garbage_leaves_whole_transactions() {
    let directory = tempfile::tempdir().unwrap();
    let (location, path) = location(directory.path());
    let snapshots = commit_and_snapshot(&path, &location, 1..=3);
    let last = snapshots.last().unwrap();
    for (count, snapshot) in snapshots.iter().enumerate() {
        // The disk has allocated space without writing to it, or has written garbage.
        for filler in [0x00, 0xff, 0x5a] {
            let mut log = snapshot.log.clone();
            log.resize(last.log.len().max(log.len() + FRAME_SIZE), filler);
            let attempts = Snapshot { log, file: snapshot.file.clone() }.attempts();
            assert_eq!(
                attempts.len(),
                count + 1,
                "a log that is filled with {filler:#x} must contain the committed attempts"
            );
        }
    }
    // A later frame of the log reached the disk before an earlier one.
    let mut log = last.log.clone();
    let first_length = snapshots[0].log.len();
    log[first_length..first_length + FRAME_SIZE].fill(0);
    assert_eq!(Snapshot { log, ..last.clone() }.attempts(), [1]);
}

#[test]
fn an_interrupted_checkpoint_loses_no_attempt() {
    let directory = tempfile::tempdir().unwrap();
    let (location, path) = location(directory.path());
    let snapshots = commit_and_snapshot(&path, &location, 1..=120);
    let content_before = snapshots.last().unwrap();
    Connection::open(&path).unwrap().query_row("PRAGMA wal_checkpoint(FULL)", [], |_| Ok(())).unwrap();
    let content_after = fs::read(&path).unwrap();
    assert!(
        content_after.len() > content_before.file.len(),
        "the checkpoint must copy pages from the log to the file"
    );
    let expected: Vec<i64> = (1..=120).collect();
    for page in 0..=content_after.len() / 4_096 {
        for torn_bytes in [0, 512, 4_000] {
            // The file has its new content up to this offset and its old content after it, and then the
            // reverse.
            let offset = (page * 4_096 + torn_bytes).min(content_after.len());
            let mut file = content_after[..offset].to_vec();
            file.extend(content_before.file.get(offset..).unwrap_or_default());
            assert_eq!(Snapshot { file, log: content_before.log.clone() }.attempts(), expected);
            let mut file =
                content_before.file.get(..offset.min(content_before.file.len())).unwrap_or_default().to_vec();
            file.resize(offset, 0);
            file.extend(&content_after[offset..]);
            assert_eq!(Snapshot { file, log: content_before.log.clone() }.attempts(), expected);
        }
    }
}

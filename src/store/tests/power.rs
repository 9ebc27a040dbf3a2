//! Simulates a power cut: the file and its log as of some moment, with the log truncated at any byte or
//! ending in garbage, or with the file in the middle of a checkpoint. The tests do not check the disk's
//! guarantees, which would need a loop device that drops unflushed writes. The effect of `synchronous=FULL`
//! on the disk was checked separately.

use super::faults::{send_record, writer};
use super::*;
use crate::store::open;

/// The bytes of a file and of its log.
#[derive(Clone)]
struct Snapshot {
    file: Vec<u8>,
    log: Vec<u8>,
}

impl Snapshot {
    fn of(path: &Path) -> Self {
        Self {
            file: fs::read(path).unwrap(),
            log: fs::read(open::companion(path, "-wal")).unwrap_or_default(),
        }
    }

    /// The attempts that a start finds after this moment, in their order. Nothing may be
    /// quarantined, and sums and attempts must agree.
    #[track_caller]
    fn attempts(&self) -> Vec<i64> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keychoir.db");
        fs::write(&path, &self.file).unwrap();
        fs::write(open::companion(&path, "-wal"), &self.log).unwrap();
        let opened = open::open(&DatabaseLocation::File(path.clone()), NOW, IntegrityCheck::Full).unwrap();
        assert_eq!(opened.quarantined, None);
        let connection = &opened.database.connection;
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

/// The sizes of the header of a log, and of a frame with its page.
const LOG_HEAD: usize = 32;
const FRAME: usize = 24 + 4_096;

/// A database with a transaction for each of `credits`, and the state after each of them.
fn snapshots(
    path: &Path,
    location: &DatabaseLocation,
    credits: std::ops::RangeInclusive<u64>,
) -> Vec<Snapshot> {
    snapshots_of(path, location, credits, 1)
}

/// Like `snapshots`, with a number of attempts in each transaction.
fn snapshots_of(
    path: &Path,
    location: &DatabaseLocation,
    credits: std::ops::RangeInclusive<u64>,
    attempts: usize,
) -> Vec<Snapshot> {
    let pool = pool();
    let (mut writer, health) = writer(location, &pool, 1_000);
    let after = |credits| {
        (0..attempts).for_each(|_| send_record(&mut writer, &health, record(&pool, credits)));
        writer.flush();
        assert!(!health.is_failing());
        Snapshot::of(path)
    };
    credits.map(after).collect()
}

#[test]
fn a_log_that_is_cut_off_anywhere_leaves_whole_transactions() {
    let folder = tempfile::tempdir().unwrap();
    let (location, path) = location(folder.path());
    let snapshots = snapshots(&path, &location, 1..=6);
    let last = snapshots.last().unwrap();
    assert_eq!(last.log.len() % FRAME, LOG_HEAD, "the log is one of whole frames");
    let frames = (0..=last.log.len() / FRAME).map(|frame| LOG_HEAD + frame * FRAME);
    let edges = frames.flat_map(|end| [end.saturating_sub(1), end, end + 1, end + 25, end + 2_000]);
    let mut before = 0;
    for length in [0, 1, 31].into_iter().chain(edges).filter(|length| *length <= last.log.len()) {
        let attempts = Snapshot { log: last.log[..length].to_vec(), ..last.clone() }.attempts();
        assert!(attempts.iter().copied().eq(1..=attempts.len() as i64), "{length}: {attempts:?}");
        assert!(attempts.len() >= before, "{length}: more of the log is never less");
        // The data flushed when a transaction was acknowledged suffices for it.
        let acknowledged = snapshots.iter().take_while(|snapshot| snapshot.log.len() <= length).count();
        assert!(attempts.len() >= acknowledged, "{length}: {attempts:?}");
        before = attempts.len();
    }
    assert_eq!(before, 6);
}

#[test]
fn the_attempts_of_a_commit_are_all_kept_or_all_lost() {
    const EACH: usize = 200;
    let folder = tempfile::tempdir().unwrap();
    let (location, path) = location(folder.path());
    let snapshots = snapshots_of(&path, &location, 1..=6, EACH);
    let last = snapshots.last().unwrap();
    let mut before = 0;
    for frame in 0..=last.log.len() / FRAME {
        for torn in [0, 2_000] {
            let length = (LOG_HEAD + frame * FRAME + torn).min(last.log.len());
            let attempts = Snapshot { log: last.log[..length].to_vec(), ..last.clone() }.attempts();
            let commits = attempts.len() / EACH;
            let whole = (1..=commits as i64).flat_map(|credits| std::iter::repeat_n(credits, EACH));
            assert!(attempts.iter().copied().eq(whole), "{length}: {attempts:?}");
            let acknowledged = snapshots.iter().take_while(|snapshot| snapshot.log.len() <= length).count();
            assert!(commits >= acknowledged.max(before), "{length}: {commits} commits");
            before = commits;
        }
    }
    assert_eq!(before, 6);
}

#[test]
fn a_log_that_ends_in_garbage_leaves_whole_transactions() {
    let folder = tempfile::tempdir().unwrap();
    let (location, path) = location(folder.path());
    let snapshots = snapshots(&path, &location, 1..=3);
    let last = snapshots.last().unwrap();
    for (count, snapshot) in snapshots.iter().enumerate() {
        // The disk has allocated space without writing it, or has written garbage.
        for filler in [0x00, 0xff, 0x5a] {
            let mut log = snapshot.log.clone();
            log.resize(last.log.len().max(log.len() + FRAME), filler);
            let attempts = Snapshot { log, file: snapshot.file.clone() }.attempts();
            assert_eq!(attempts.len(), count + 1, "filled with {filler:#x}");
        }
    }
    // A page of the log that reached the disk before earlier pages.
    let mut log = last.log.clone();
    let first = snapshots[0].log.len();
    log[first..first + FRAME].fill(0);
    assert_eq!(Snapshot { log, ..last.clone() }.attempts(), [1]);
}

#[test]
fn a_checkpoint_that_stops_half_way_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (location, path) = location(folder.path());
    let snapshots = snapshots(&path, &location, 1..=120);
    let before = snapshots.last().unwrap();
    Connection::open(&path).unwrap().query_row("PRAGMA wal_checkpoint(FULL)", [], |_| Ok(())).unwrap();
    let after = fs::read(&path).unwrap();
    assert!(after.len() > before.file.len(), "the pages were moved from the log to the file");
    let expected: Vec<i64> = (1..=120).collect();
    for page in 0..=after.len() / 4_096 {
        for torn in [0, 512, 4_000] {
            // The new file up to this offset and the old one after it; then the reverse.
            let at = (page * 4_096 + torn).min(after.len());
            let mut file = after[..at].to_vec();
            file.extend(before.file.get(at..).unwrap_or_default());
            assert_eq!(Snapshot { file, log: before.log.clone() }.attempts(), expected);
            let mut file = before.file.get(..at.min(before.file.len())).unwrap_or_default().to_vec();
            file.resize(at, 0);
            file.extend(&after[at..]);
            assert_eq!(Snapshot { file, log: before.log.clone() }.attempts(), expected);
        }
    }
}

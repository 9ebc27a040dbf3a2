//! Stores many attempts of one commit in one row, as JSON: an insert per attempt would cost more
//! than all other work for it. The view `attempts` lists them one by one.
//!
//! Attempts that may still change or are to be mirrored have rows of their own in `attempt_rows`.

use std::collections::HashSet;

use rusqlite::{Connection, Transaction, params};
use uuid::Uuid;

use super::rows::{amount, moment, whole};
use crate::policy::retention::hour_of;
use crate::policy::units::UnixMs;
use crate::proxy::{RecordId, UsageRow};

/// Maximum number of batches that one retention step deletes. Each may take some hundred pages.
const SHEETS: usize = 4;
/// Maximum number of batches searched for duplicates after a commit of unknown outcome: such a
/// commit has one batch for each hour in which its attempts began.
const DOUBTFUL_MAX: usize = 64;

/// Batches to be written, one for each hour and each run of the program.
#[derive(Default)]
pub(super) struct PendingBatches(Vec<PendingBatch>);

struct PendingBatch {
    hour: UnixMs,
    /// The first counter among the ids of its attempts, and their random part.
    count: u64,
    chance: u32,
    attempts: u32,
    text: Vec<u8>,
}

impl PendingBatches {
    /// Adds an attempt; returns false if it cannot share a row, because its id does not carry the
    /// time at which it began.
    pub(super) fn add(&mut self, row: &UsageRow, request_id: &str, series: i64) -> bool {
        let Some(RecordId { at, count, chance }) = RecordId::of(row.id) else { return false };
        if at != row.started_at {
            return false;
        }
        let hour = hour_of(at);
        let is_there = |sheet: &PendingBatch| (sheet.hour, sheet.chance) == (hour, chance);
        let place = self.0.iter().rposition(is_there).unwrap_or_else(|| {
            self.0.push(PendingBatch { hour, count, chance, attempts: 0, text: Vec::new() });
            self.0.len() - 1
        });
        let Some(sheet) = self.0.get_mut(place) else { return false };
        sheet.attempts += 1;
        let text = &mut sheet.text;
        // The order is that of the view. Values that are mostly unknown come last, where they can
        // be left out.
        text.extend_from_slice(if text.is_empty() { b"[[" } else { b",[" });
        push_number(text, whole(at.since(hour).as_millis() as u64));
        text.push(b',');
        push_number(text, whole(count).wrapping_sub(whole(sheet.count)));
        text.push(b',');
        push_text(text, request_id);
        let known = [
            Some(series),
            Some(i64::from(row.number)),
            Some(amount(row.request_bytes)),
            Some(amount(row.response_bytes)),
            Some(whole(row.total_ms)),
            row.first_byte_ms.map(whole),
            Some(amount(row.credits)),
            row.characters.map(amount),
            row.credits_reserved.map(amount),
            row.audio_ms.map(whole),
        ];
        let length = known.iter().rposition(Option::is_some).map_or(0, |last| last + 1);
        for value in &known[..length] {
            text.push(b',');
            match value {
                Some(number) => push_number(text, *number),
                None => text.extend_from_slice(b"null"),
            }
        }
        text.push(b']');
        true
    }

    /// Inserts the batches.
    pub(super) fn write(self, transaction: &Transaction<'_>) -> Result<(), rusqlite::Error> {
        let mut statement = transaction.prepare_cached(
            "INSERT INTO attempt_sheets (hour_ms, count, chance, attempts, lines) VALUES (?1, ?2, ?3, ?4, ?5)",
        )?;
        for PendingBatch { hour, count, chance, attempts, mut text } in self.0 {
            text.push(b']');
            // The bytes consist of strings and digits, so they are always UTF-8.
            let lines = String::from_utf8(text).unwrap_or_default();
            statement.execute(params![moment(hour), whole(count), chance, attempts, lines])?;
        }
        Ok(())
    }
}

fn push_number(text: &mut Vec<u8>, number: i64) {
    if number < 0 {
        text.push(b'-');
    }
    let mut digits = [0; 20];
    let mut rest = number.unsigned_abs();
    let mut begin = digits.len();
    loop {
        begin -= 1;
        digits[begin] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    text.extend_from_slice(&digits[begin..]);
}

fn push_text(text: &mut Vec<u8>, word: &str) {
    let is_plain = |byte: u8| byte >= b' ' && byte != b'"' && byte != b'\\';
    if word.bytes().all(is_plain) {
        text.push(b'"');
        text.extend_from_slice(word.as_bytes());
        text.push(b'"');
    } else {
        // Serializing a string cannot fail.
        text.extend(serde_json::to_vec(word).unwrap_or_else(|_| b"\"\"".to_vec()));
    }
}

/// Tracks a commit that SQLite reported as failed, but that may have reached the log: attempts that
/// are retried must not be stored twice. Rows are recognized by their ids, batches by their
/// numbers.
#[derive(Debug, Default)]
pub(super) struct CommitUncertainty {
    /// The number of the last batch before that commit.
    before: Option<i64>,
    is_open: bool,
}

impl CommitUncertainty {
    /// The attempts about to be written that the file may already contain.
    pub(super) fn written(&mut self, connection: &Connection) -> Result<HashSet<Uuid>, rusqlite::Error> {
        if !self.is_open {
            const LAST: &str = "SELECT coalesce(max(number), 0) FROM attempt_sheets";
            self.before = Some(connection.prepare_cached(LAST)?.query_row([], |row| row.get(0))?);
            return Ok(HashSet::new());
        }
        // If the commit failed before this query, nothing was written.
        let Some(before) = self.before else { return Ok(HashSet::new()) };
        let mut statement = connection.prepare_cached(
            "SELECT hour_ms + json_extract(line.value, '$[0]'), count + json_extract(line.value, '$[1]'), chance
             FROM (SELECT * FROM attempt_sheets WHERE number > ?1 ORDER BY number DESC LIMIT ?2),
                json_each(lines) AS line",
        )?;
        let names = statement.query_map(params![before, DOUBTFUL_MAX as i64], |row| {
            let [at, count]: [i64; 2] = [row.get(0)?, row.get(1)?];
            Ok(RecordId { at: UnixMs(at.unsigned_abs()), count: count.unsigned_abs(), chance: row.get(2)? }
                .id())
        })?;
        names.collect()
    }

    /// Records that a commit has failed, or that its file is gone.
    pub(super) fn arises(&mut self) {
        self.is_open = true;
    }

    /// Records that a commit has succeeded.
    pub(super) fn is_resolved(&mut self) {
        self.is_open = false;
    }
}

/// Deletes some of the batches that began before `oldest`, which is the begin of an hour; returns
/// whether there may be more.
pub(super) fn forget_some(connection: &Connection, oldest: UnixMs) -> Result<bool, rusqlite::Error> {
    const OLD: &str = "DELETE FROM attempt_sheets WHERE number IN (
        SELECT number FROM attempt_sheets WHERE hour_ms < ?1 LIMIT ?2)";
    Ok(connection.prepare_cached(OLD)?.execute(params![moment(oldest), SHEETS as i64])? == SHEETS)
}

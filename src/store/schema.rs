//! Creates and migrates the schema of the database: one migration leads from each version to the next. Also marks the
//! file with SQLite's application id, by which `origin` recognizes it.

use rusqlite::{Connection, TransactionBehavior};

use super::attempts::migration;
use super::{changes, days, key_names, owners, refusals, replica, users};

/// One migration per version. A released migration never changes.
const MIGRATIONS: [&str; 16] = [
    "
    CREATE TABLE keys (
        key_hash TEXT PRIMARY KEY,
        short_key TEXT NOT NULL,
        name TEXT,
        workspace TEXT,
        position INTEGER NOT NULL,
        status TEXT NOT NULL,
        character_count INTEGER NOT NULL,
        character_limit INTEGER,
        -- NULL: no overage; -1: without end
        extension INTEGER,
        resets_at_ms INTEGER,
        park_reason TEXT,
        park_until_ms INTEGER,
        workspace_park_reason TEXT,
        workspace_park_until_ms INTEGER,
        updated_at_ms INTEGER NOT NULL
    ) STRICT;

    CREATE TABLE attempts (
        id TEXT PRIMARY KEY,
        request_id TEXT NOT NULL,
        number INTEGER NOT NULL,
        started_at_ms INTEGER NOT NULL,
        client TEXT NOT NULL,
        key_hash TEXT NOT NULL,
        workspace TEXT,
        method TEXT NOT NULL,
        route TEXT NOT NULL,
        status INTEGER,
        verdict TEXT NOT NULL,
        request_bytes INTEGER NOT NULL,
        response_bytes INTEGER NOT NULL,
        credits INTEGER NOT NULL,
        -- answer, free or unknown
        credits_from TEXT NOT NULL,
        first_byte_ms INTEGER,
        total_ms INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;

    CREATE INDEX attempts_by_time ON attempts (started_at_ms);
    ",
    "
    ALTER TABLE attempts ADD COLUMN model TEXT;
    ALTER TABLE attempts ADD COLUMN characters INTEGER;
    -- reserved before the request was sent; `credits` were charged
    ALTER TABLE attempts ADD COLUMN credits_reserved INTEGER;

    -- Sums over the attempts that started in an hour.
    CREATE TABLE hours (
        hour_ms INTEGER NOT NULL,
        key_hash TEXT NOT NULL,
        client TEXT NOT NULL,
        route TEXT NOT NULL,
        -- empty: unknown
        model TEXT NOT NULL,
        attempts INTEGER NOT NULL,
        -- with a response status below 400
        served INTEGER NOT NULL,
        request_bytes INTEGER NOT NULL,
        response_bytes INTEGER NOT NULL,
        characters INTEGER NOT NULL,
        credits INTEGER NOT NULL,
        -- attempts that may have been charged an unknown amount
        unpriced INTEGER NOT NULL,
        PRIMARY KEY (hour_ms, key_hash, client, route, model)
    ) STRICT, WITHOUT ROWID;

    INSERT INTO hours
    SELECT started_at_ms - started_at_ms % 3600000, key_hash, client, route, '',
        count(*), sum(coalesce(status < 400, 0)), min(total(request_bytes), 9007199254740992),
        min(total(response_bytes), 9007199254740992), 0, min(total(credits), 9007199254740992),
        sum(credits_from = 'unknown')
    FROM attempts GROUP BY 1, 2, 3, 4;
    ",
    "
    -- The latest state of each key, for the mirror.
    CREATE TABLE outbox_keys (
        key_hash TEXT PRIMARY KEY,
        short_key TEXT NOT NULL,
        status TEXT NOT NULL,
        character_count INTEGER NOT NULL,
        -- 0: unknown
        character_limit INTEGER NOT NULL,
        remaining INTEGER NOT NULL,
        usage REAL NOT NULL,
        is_over_limit INTEGER NOT NULL,
        is_near_limit INTEGER NOT NULL,
        resets_at_ms INTEGER,
        -- increases with every state, also when the clock is set back
        observed_at_ms INTEGER NOT NULL,
        -- the state that Supabase has confirmed
        sent_at_ms INTEGER,
        -- the code with which it was refused
        refused TEXT,
        parked_until_ms INTEGER
    ) STRICT, WITHOUT ROWID;

    -- The attempts that the mirror has not sent yet.
    CREATE TABLE outbox_events (
        id TEXT PRIMARY KEY,
        refused TEXT,
        parked_until_ms INTEGER
    ) STRICT, WITHOUT ROWID;

    CREATE INDEX outbox_events_refused ON outbox_events (id) WHERE refused IS NOT NULL;

    CREATE TRIGGER attempts_forgotten AFTER DELETE ON attempts BEGIN
        DELETE FROM outbox_events WHERE id = OLD.id;
    END;
    ",
    "
    -- Which workspace an identifier belongs to.
    CREATE TABLE owners (
        -- SHA-256 of kind and identifier, cut to 16 bytes
        id BLOB PRIMARY KEY,
        kind TEXT NOT NULL,
        -- 0: long-lived; before schema 5 also 1: one per request, and 2: valid for hours
        class INTEGER NOT NULL,
        -- its name, or the hash of its first key
        workspace TEXT NOT NULL,
        learned_at_ms INTEGER NOT NULL,
        used_at_ms INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;

    CREATE INDEX owners_by_use ON owners (class, used_at_ms);
    ",
    "
    -- The common columns of many attempts.
    CREATE TABLE series (
        number INTEGER PRIMARY KEY,
        client TEXT NOT NULL,
        key_hash TEXT NOT NULL,
        workspace TEXT,
        method TEXT NOT NULL,
        route TEXT NOT NULL,
        model TEXT,
        status INTEGER,
        verdict TEXT NOT NULL,
        -- answer, estimate, free or unknown
        credits_from TEXT NOT NULL,
        -- the start of the latest hour with such an attempt
        used_at_ms INTEGER NOT NULL
    ) STRICT;

    INSERT INTO series (client, key_hash, workspace, method, route, model, status, verdict, credits_from, used_at_ms)
    SELECT client, key_hash, workspace, method, route, model, status, verdict, credits_from,
        max(started_at_ms) - max(started_at_ms) % 3600000
    FROM attempts GROUP BY client, key_hash, workspace, method, route, model, status, verdict, credits_from;

    CREATE INDEX series_by_route ON series (route, client, key_hash);

    -- Read through the view `attempts`.
    CREATE TABLE attempt_rows (
        -- UUID of version 7: ids are in the order of time
        id BLOB PRIMARY KEY,
        request_id TEXT NOT NULL,
        series INTEGER NOT NULL,
        number INTEGER NOT NULL,
        started_at_ms INTEGER NOT NULL,
        request_bytes INTEGER NOT NULL,
        response_bytes INTEGER NOT NULL,
        characters INTEGER,
        -- reserved before the request was sent; `credits` were charged
        credits_reserved INTEGER,
        credits INTEGER NOT NULL,
        first_byte_ms INTEGER,
        total_ms INTEGER NOT NULL,
        -- duration of the audio that a WebSocket sent to be transcribed
        audio_ms INTEGER
    ) STRICT, WITHOUT ROWID;

    INSERT INTO attempt_rows
    SELECT coalesce(iif(length(id) = 36, unhex(id, '-'), NULL), CAST(id AS BLOB)), request_id, series.number,
        attempts.number, started_at_ms, request_bytes, response_bytes, characters, credits_reserved, credits,
        first_byte_ms, total_ms, NULL
    FROM attempts JOIN series ON series.route = attempts.route AND series.client = attempts.client
        AND series.key_hash = attempts.key_hash AND series.workspace IS attempts.workspace
        AND series.method = attempts.method AND series.model IS attempts.model AND series.status IS attempts.status
        AND series.verdict = attempts.verdict AND series.credits_from = attempts.credits_from
    ORDER BY attempts.id;

    -- This drops its index and its trigger, too.
    DROP TABLE attempts;

    CREATE TABLE outbox_of_events (
        id BLOB PRIMARY KEY,
        refused TEXT,
        parked_until_ms INTEGER
    ) STRICT, WITHOUT ROWID;

    INSERT INTO outbox_of_events
    SELECT coalesce(iif(length(id) = 36, unhex(id, '-'), NULL), CAST(id AS BLOB)), refused, parked_until_ms
    FROM outbox_events;

    DROP TABLE outbox_events;
    ALTER TABLE outbox_of_events RENAME TO outbox_events;
    CREATE INDEX outbox_events_refused ON outbox_events (id) WHERE refused IS NOT NULL;

    CREATE TRIGGER attempts_forgotten AFTER DELETE ON attempt_rows BEGIN
        DELETE FROM outbox_events WHERE id = OLD.id;
    END;

    -- Identifiers that come with every request are not searched by their ids, which are random, so their changes
    -- are in the order in which they were recorded; the latest change of an id counts.
    CREATE TABLE owners_plentiful (
        number INTEGER PRIMARY KEY,
        id BLOB NOT NULL,
        kind TEXT NOT NULL,
        -- NULL: the identifier was removed
        workspace TEXT,
        learned_at_ms INTEGER NOT NULL,
        used_at_ms INTEGER NOT NULL
    ) STRICT;

    CREATE TABLE owners_passing (
        number INTEGER PRIMARY KEY,
        id BLOB NOT NULL,
        kind TEXT NOT NULL,
        workspace TEXT,
        learned_at_ms INTEGER NOT NULL,
        used_at_ms INTEGER NOT NULL
    ) STRICT;

    INSERT INTO owners_plentiful (id, kind, workspace, learned_at_ms, used_at_ms)
    SELECT id, kind, workspace, learned_at_ms, used_at_ms FROM owners WHERE class = 1 ORDER BY used_at_ms;
    INSERT INTO owners_passing (id, kind, workspace, learned_at_ms, used_at_ms)
    SELECT id, kind, workspace, learned_at_ms, used_at_ms FROM owners WHERE class = 2 ORDER BY used_at_ms;
    DELETE FROM owners WHERE class <> 0;

    CREATE VIEW attempts AS
    SELECT
        iif(length(id) <> 16, CAST(id AS TEXT), lower(printf('%s-%s-%s-%s-%s', substr(hex(id), 1, 8),
            substr(hex(id), 9, 4), substr(hex(id), 13, 4), substr(hex(id), 17, 4), substr(hex(id), 21)))) AS id,
        request_id, attempt_rows.number AS number, started_at_ms, client, key_hash, workspace, method, route, model,
        status, verdict, request_bytes, response_bytes, characters, credits_reserved, credits, credits_from,
        first_byte_ms, total_ms, audio_ms
    FROM attempt_rows JOIN series ON series.number = attempt_rows.series;
    ",
    "
    -- Attempts that were committed together and started in the same hour. Read through the view `attempts`. An id
    -- consists of the time, a counter and a random number, with version and variant between them.
    CREATE TABLE attempt_sheets (
        number INTEGER PRIMARY KEY,
        hour_ms INTEGER NOT NULL,
        -- counter of the first attempt
        count INTEGER NOT NULL,
        -- random number of all attempts
        chance INTEGER NOT NULL,
        attempts INTEGER NOT NULL,
        -- JSON, an array per attempt: milliseconds from the start of the hour, counter from the first, request_id,
        -- series, number, request_bytes, response_bytes, total_ms, first_byte_ms, credits, characters,
        -- credits_reserved, audio_ms; unknown values at the end are left out
        lines TEXT NOT NULL
    ) STRICT;

    CREATE INDEX attempt_sheets_by_hour ON attempt_sheets (hour_ms);

    DROP VIEW attempts;
    CREATE VIEW attempts AS
    SELECT
        iif(length(id) <> 16, CAST(id AS TEXT), lower(printf('%s-%s-%s-%s-%s', substr(hex(id), 1, 8),
            substr(hex(id), 9, 4), substr(hex(id), 13, 4), substr(hex(id), 17, 4), substr(hex(id), 21)))) AS id,
        request_id, attempt_rows.number AS number, started_at_ms, client, key_hash, workspace, method, route, model,
        status, verdict, request_bytes, response_bytes, characters, credits_reserved, credits, credits_from,
        first_byte_ms, total_ms, audio_ms
    FROM attempt_rows JOIN series ON series.number = attempt_rows.series
    UNION ALL
    SELECT
        printf('%08x-%04x-%04x-%04x-%04x%08x',
            (hour_ms + json_extract(value, '$[0]')) >> 16, (hour_ms + json_extract(value, '$[0]')) & 0xffff,
            0x7000 | (((count + json_extract(value, '$[1]')) >> 30) & 0x0fff),
            0x8000 | (((count + json_extract(value, '$[1]')) >> 16) & 0x3fff),
            (count + json_extract(value, '$[1]')) & 0xffff, chance),
        json_extract(value, '$[2]'), json_extract(value, '$[4]'), hour_ms + json_extract(value, '$[0]'),
        client, key_hash, workspace, method, route, model, status, verdict,
        json_extract(value, '$[5]'), json_extract(value, '$[6]'), json_extract(value, '$[10]'),
        json_extract(value, '$[11]'), json_extract(value, '$[9]'), credits_from,
        json_extract(value, '$[8]'), json_extract(value, '$[7]'), json_extract(value, '$[12]')
    FROM attempt_sheets, json_each(lines) JOIN series ON series.number = json_extract(value, '$[3]');

    -- One row per commit.
    ALTER TABLE owners_plentiful RENAME TO owners_plentiful_rows;
    ALTER TABLE owners_passing RENAME TO owners_passing_rows;
    CREATE TABLE owners_plentiful (
        number INTEGER PRIMARY KEY,
        changes INTEGER NOT NULL,
        -- the latest use of the identifiers
        used_at_ms INTEGER NOT NULL,
        pack BLOB NOT NULL
    ) STRICT;
    CREATE TABLE owners_passing (
        number INTEGER PRIMARY KEY,
        changes INTEGER NOT NULL,
        used_at_ms INTEGER NOT NULL,
        pack BLOB NOT NULL
    ) STRICT;
    ",
    "
    -- Increases when an event changes in the outbox, so that the delivery of an earlier state does not count.
    ALTER TABLE outbox_events ADD COLUMN revision INTEGER NOT NULL DEFAULT 0;
    ",
    "
    -- The refusals of a key, instead of the conclusions from them.
    ALTER TABLE keys ADD COLUMN evidence TEXT NOT NULL DEFAULT '{}';
    ALTER TABLE keys DROP COLUMN park_reason;
    ALTER TABLE keys DROP COLUMN park_until_ms;
    ALTER TABLE keys DROP COLUMN workspace_park_reason;
    ALTER TABLE keys DROP COLUMN workspace_park_until_ms;
    ",
    "
    -- Usage of the quotas of clients. Before, a request counted when something was charged in its hour, or may
    -- have been.
    ALTER TABLE hours ADD COLUMN quota_requests INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE hours ADD COLUMN quota_credits INTEGER NOT NULL DEFAULT 0;
    UPDATE hours SET quota_requests = served * (credits > 0 OR unpriced > 0), quota_credits = credits
    WHERE key_hash <> 'own';
    ",
    "
    -- Before, `key_hash` was the plain SHA-256 of a key. Now it is a fingerprint, SHA-256 over `keychoir:key:1:`
    -- and the key. Rows of keys that are not configured have a digest of the old digest, which is listed here.
    CREATE TABLE retired_keys (
        key_hash TEXT PRIMARY KEY
    ) STRICT, WITHOUT ROWID;

    -- Tasks that concern the whole file.
    CREATE TABLE maintenance (
        task TEXT PRIMARY KEY
    ) STRICT, WITHOUT ROWID;

    -- Rows of the mirror to be renamed.
    CREATE TABLE outbox_renames (
        -- the first 12 digits of the old name
        beginning TEXT PRIMARY KEY,
        -- the new name
        key_hash TEXT NOT NULL
    ) STRICT, WITHOUT ROWID;
    ",
    refusals::TABLE,
    migration::STATEMENTS,
    changes::TABLE,
    users::TABLE,
    replica::TABLE,
    days::TABLE,
];

/// The version from which a row of the log of owners contains many changes.
const PACKED_OWNERS_VERSION: usize = 6;

/// The version from which `key_hash` is a fingerprint and not a plain digest.
pub(super) const FINGERPRINT_VERSION: usize = 10;

/// The version from which attempts have a user and a region.
pub(super) const USERS_VERSION: usize = 14;

/// The version that this program writes.
pub(super) const VERSION: usize = MIGRATIONS.len();

/// Returns the schema version of a file, which is 0 for an empty file.
pub(super) fn version(connection: &Connection) -> Result<usize, rusqlite::Error> {
    let version: i64 = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    Ok(usize::try_from(version).unwrap_or(usize::MAX))
}

/// Migrates a file to [`VERSION`] in one transaction. If an earlier version has stored many attempts, maintenance moves
/// a part of them after startup, see [`migration`].
pub(super) fn migrate(connection: &mut Connection) -> Result<(), rusqlite::Error> {
    // The version is read in the transaction, so that no other process can migrate the file after it was read.
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let old_version = version(&transaction)?;
    for (version, statements) in (1..).zip(MIGRATIONS).skip(old_version) {
        transaction.execute_batch(statements)?;
        if version == PACKED_OWNERS_VERSION {
            owners::pack_rows(&transaction)?;
        }
    }
    if old_version < FINGERPRINT_VERSION {
        key_names::retire_plain_digests(&transaction)?;
    }
    if old_version < VERSION {
        // A file of version 12 may have all its attempts in the new table already.
        if migration::is_unfinished(&transaction)? {
            migration::move_first_attempts(&transaction)?;
        }
        transaction.execute_batch(&format!("PRAGMA user_version = {VERSION}"))?;
    }
    transaction.commit()
}

/// SQLite's application id, which marks a file as Keychoir's (`file(1)` shows it).
pub(super) const APPLICATION_ID: u32 = u32::from_be_bytes(*b"Kchr");

/// Writes Keychoir's application id if the file has another one or none.
pub(super) fn write_application_id(connection: &Connection) -> Result<(), rusqlite::Error> {
    let id: i64 = connection.query_row("PRAGMA application_id", [], |row| row.get(0))?;
    if id != i64::from(APPLICATION_ID) {
        connection.execute_batch(&format!("PRAGMA application_id = {APPLICATION_ID}"))?;
    }
    Ok(())
}

/// Returns the statements that create a file of an earlier version.
#[cfg(test)]
pub(super) fn for_version(version: usize) -> String {
    format!("{}; PRAGMA user_version = {version};", MIGRATIONS[..version].join(";"))
}

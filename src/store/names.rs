//! The names of keys in the file. Earlier versions named a key by its plain SHA-256, which is a
//! secret itself; this module removes those digests from the file and, through the outbox, from the
//! mirror.
//!
//! It takes two steps, because a file does not contain the keys. The migration replaces every plain
//! digest by a retired one ([`Fingerprint::retired`]). Each start then finds the rows of the
//! configured keys by their retired digests and renames them to fingerprints, also those of a key
//! that was missing when the file was migrated.

use std::collections::HashMap;

use rusqlite::{Connection, Transaction, TransactionBehavior};

use super::attempts::migration;
use super::owners;
use crate::secret::{ApiKey, Fingerprint};

/// Columns with names of keys; a workspace without a name of its own is named by its first key.
const COLUMNS: [(&str, &str); 6] = [
    ("keys", "key_hash"),
    ("attempts", "key_hash"),
    (SERIES, "key_hash"),
    ("hours", "key_hash"),
    ("outbox_keys", "key_hash"),
    ("owners", "workspace"),
];

/// A table that an unfinished migration of the attempts has left.
const SERIES: &str = "series";

/// The columns of the tables in the file.
fn columns(
    connection: &Connection,
) -> Result<impl Iterator<Item = (&'static str, &'static str)>, rusqlite::Error> {
    let has_series = migration::is_unfinished(connection)?;
    Ok(COLUMNS.into_iter().filter(move |(table, _)| has_series || *table != SERIES))
}

/// The maintenance task that is left after the transaction that retired the digests.
const VACUUM: &str = "vacuum";

/// Old names with the new ones.
type Renamed = HashMap<String, String>;

/// Replaces the plain digests of an earlier version. They stay in free pages until the file is
/// vacuumed ([`wiped`]).
pub(super) fn retire(transaction: &Transaction<'_>) -> Result<(), rusqlite::Error> {
    let mut names_found = owners::words(transaction)?;
    for (table, column) in columns(transaction)? {
        let mut statement = transaction.prepare(&format!("SELECT DISTINCT {column} FROM {table}"))?;
        let names = statement.query_map([], |row| row.get::<_, String>(0))?;
        for name in names {
            names_found.insert(name?);
        }
    }
    let retired = |plain: String| Some((Fingerprint::retired(&plain)?.to_string(), plain));
    let renamed: Renamed =
        names_found.into_iter().filter_map(retired).map(|(retired, plain)| (plain, retired)).collect();
    if renamed.is_empty() {
        return Ok(());
    }
    rename(transaction, &renamed)?;
    transaction.execute_batch(&format!(
        "INSERT INTO retired_keys SELECT new_name FROM temp.renamed;
         INSERT INTO maintenance VALUES ('{VACUUM}');
         INSERT INTO outbox_renames SELECT substr(old_name, 1, 12), new_name FROM temp.renamed
            WHERE new_name IN (SELECT key_hash FROM outbox_keys);
         DROP TABLE temp.renamed;"
    ))
}

/// Renames the rows of `keys` from retired digests to fingerprints.
pub(super) fn recognize<'k>(
    connection: &mut Connection,
    keys: impl Iterator<Item = &'k ApiKey>,
) -> Result<(), rusqlite::Error> {
    if !connection.query_row("SELECT EXISTS (SELECT * FROM retired_keys)", [], |row| row.get(0))? {
        return Ok(());
    }
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let mut renamed = Renamed::new();
    {
        let mut is_retired = transaction.prepare("SELECT * FROM retired_keys WHERE key_hash = ?1")?;
        for key in keys {
            let Some(retired) = Fingerprint::retired_of(key.expose()) else { continue };
            if is_retired.exists([retired.to_string()])? {
                renamed.insert(retired.to_string(), key.fingerprint().to_string());
            }
        }
    }
    if renamed.is_empty() {
        return Ok(());
    }
    rename(&transaction, &renamed)?;
    // Renames that the mirror has not delivered yet are merged into one step.
    transaction.execute_batch(
        "UPDATE outbox_renames SET key_hash = (SELECT new_name FROM temp.renamed WHERE old_name = key_hash)
            WHERE key_hash IN (SELECT old_name FROM temp.renamed);
         INSERT OR IGNORE INTO outbox_renames SELECT substr(old_name, 1, 12), new_name FROM temp.renamed
            WHERE new_name NOT IN (SELECT key_hash FROM outbox_renames)
                AND new_name IN (SELECT key_hash FROM outbox_keys);
         DELETE FROM retired_keys WHERE key_hash IN (SELECT old_name FROM temp.renamed);
         DROP TABLE temp.renamed;",
    )?;
    transaction.commit()
}

/// Renames in every table, and leaves the names in `temp.renamed`. If a row exists under the new
/// name, its state is kept and its sums are added up.
fn rename(transaction: &Transaction<'_>, renamed: &Renamed) -> Result<(), rusqlite::Error> {
    transaction.execute_batch(
        "CREATE TEMP TABLE renamed (old_name TEXT PRIMARY KEY, new_name TEXT NOT NULL) STRICT, WITHOUT ROWID",
    )?;
    {
        let mut insert = transaction.prepare("INSERT INTO temp.renamed VALUES (?1, ?2)")?;
        for names in renamed {
            insert.execute(names)?;
        }
    }
    for (table, column) in columns(transaction)? {
        let is_renamed = format!("{column} IN (SELECT old_name FROM temp.renamed)");
        let new_name = format!("(SELECT new_name FROM temp.renamed WHERE old_name = {column})");
        match table {
            "hours" => add_up_hours(transaction)?,
            // These tables have one row per key.
            "keys" | "outbox_keys" => transaction.execute_batch(&format!(
                "DELETE FROM {table} WHERE {is_renamed} AND {new_name} IN (SELECT {column} FROM {table});
                 UPDATE {table} SET {column} = {new_name} WHERE {is_renamed};"
            ))?,
            _ => transaction
                .execute_batch(&format!("UPDATE {table} SET {column} = {new_name} WHERE {is_renamed}"))?,
        }
    }
    owners::rename(transaction, renamed)
}

fn add_up_hours(transaction: &Transaction<'_>) -> Result<(), rusqlite::Error> {
    const SUMS: [&str; 9] = [
        "attempts",
        "served",
        "request_bytes",
        "response_bytes",
        "characters",
        "credits",
        "unpriced",
        "quota_requests",
        "quota_credits",
    ];
    // Neither sum exceeds 2^53, so adding them does not overflow.
    let sums = SUMS.map(|sum| format!("{sum} = min({sum} + excluded.{sum}, 9007199254740992)")).join(", ");
    transaction.execute_batch(&format!(
        "INSERT INTO hours SELECT hour_ms, new_name, client, route, model, {}
         FROM hours JOIN temp.renamed ON old_name = key_hash
         ON CONFLICT DO UPDATE SET {sums};
         DELETE FROM hours WHERE key_hash IN (SELECT old_name FROM temp.renamed);",
        SUMS.join(", ")
    ))
}

/// Whether free pages may still hold plain digests.
pub(super) fn is_wipe_due(connection: &Connection) -> Result<bool, rusqlite::Error> {
    connection
        .query_row("SELECT EXISTS (SELECT * FROM maintenance WHERE task = ?1)", [VACUUM], |row| row.get(0))
}

/// Records that the file was vacuumed and its log truncated.
pub(super) fn wiped(connection: &Connection) -> Result<(), rusqlite::Error> {
    connection.execute("DELETE FROM maintenance WHERE task = ?1", [VACUUM]).map(drop)
}

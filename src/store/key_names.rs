//! Renames the rows of keys in files of earlier versions, which named a key by its plain SHA-256. That digest
//! must not stay in the file or, through the outbox, in the mirror, because it is also a secret.
//!
//! There are two steps, because the file does not contain the keys. The migration replaces every plain digest by a
//! retired digest, which is the digest of the plain digest ([`Fingerprint::from_plain_digest`]). Each start then finds
//! the rows of the configured keys by their retired digests and renames them to fingerprints. This includes keys that
//! were not configured when the file was migrated. A row in `maintenance` records that free pages may still contain
//! plain digests.

use std::collections::HashMap;

use rusqlite::{Connection, Transaction, TransactionBehavior};

use super::attempts::{ADD_SUMS, SUM_COLUMNS, migration};
use super::{days, owners};
use crate::secret::{ApiKey, Fingerprint};

/// The tables and columns that contain key names. A workspace without a configured name has the name of its
/// first key.
const COLUMNS: [(&str, &str); 6] = [
    ("keys", "key_hash"),
    ("attempts", "key_hash"),
    (SERIES, "key_hash"),
    ("hours", "key_hash"),
    ("outbox_keys", "key_hash"),
    ("owners", "workspace"),
];

/// The table of the columns that several attempts have in common. It exists until all attempts are migrated.
const SERIES: &str = "series";

/// Returns the members of [`COLUMNS`] whose tables exist.
fn existing_columns(
    connection: &Connection,
) -> Result<impl Iterator<Item = (&'static str, &'static str)>, rusqlite::Error> {
    let has_series = migration::is_unfinished(connection)?;
    Ok(COLUMNS.into_iter().filter(move |(table, _)| has_series || *table != SERIES))
}

/// The row of `maintenance` that records that the file must be vacuumed after its digests were retired.
const VACUUM: &str = "vacuum";

/// New names by old names.
type NewNames = HashMap<String, String>;

/// Replaces plain digests by retired digests. The plain digests stay in free pages until the file is vacuumed
/// ([`record_wipe`]).
pub(super) fn retire_plain_digests(transaction: &Transaction<'_>) -> Result<(), rusqlite::Error> {
    let mut names = owners::names(transaction)?;
    for (table, column) in existing_columns(transaction)? {
        let mut statement = transaction.prepare(&format!("SELECT DISTINCT {column} FROM {table}"))?;
        for name in statement.query_map([], |row| row.get::<_, String>(0))? {
            names.insert(name?);
        }
    }
    let retired = |digest: String| Some((Fingerprint::from_plain_digest(&digest)?.to_string(), digest));
    let new_names: NewNames =
        names.into_iter().filter_map(retired).map(|(retired, digest)| (digest, retired)).collect();
    if new_names.is_empty() {
        return Ok(());
    }
    rename_rows(transaction, &new_names)?;
    transaction.execute_batch(&format!(
        "INSERT INTO retired_keys SELECT new_name FROM temp.renamed;
         INSERT INTO maintenance VALUES ('{VACUUM}');
         INSERT INTO outbox_renames SELECT substr(old_name, 1, 12), new_name FROM temp.renamed
            WHERE new_name IN (SELECT key_hash FROM outbox_keys);
         DROP TABLE temp.renamed;"
    ))
}

/// Renames the rows of `keys` from retired digests to fingerprints.
pub(super) fn rename_keys<'k>(
    connection: &mut Connection,
    keys: impl Iterator<Item = &'k ApiKey>,
) -> Result<(), rusqlite::Error> {
    if !connection.query_row("SELECT EXISTS (SELECT * FROM retired_keys)", [], |row| row.get(0))? {
        return Ok(());
    }
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let mut new_names = NewNames::new();
    {
        let mut select_retired = transaction.prepare("SELECT * FROM retired_keys WHERE key_hash = ?1")?;
        for key in keys {
            let Some(retired) = Fingerprint::replaced_plain_digest(key.expose()) else { continue };
            if select_retired.exists([retired.to_string()])? {
                new_names.insert(retired.to_string(), key.fingerprint().to_string());
            }
        }
    }
    if new_names.is_empty() {
        return Ok(());
    }
    rename_rows(&transaction, &new_names)?;
    // A rename that the mirror has not delivered yet is merged with the new one.
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

/// Renames rows in every table, and stores the names in `temp.renamed`. If `keys` or `outbox_keys` has a row with the
/// new name, that row is kept. In `hours`, the sums of both rows are added.
fn rename_rows(transaction: &Transaction<'_>, new_names: &NewNames) -> Result<(), rusqlite::Error> {
    transaction.execute_batch(
        "CREATE TEMP TABLE renamed (old_name TEXT PRIMARY KEY, new_name TEXT NOT NULL) STRICT, WITHOUT ROWID",
    )?;
    {
        let mut insert = transaction.prepare("INSERT INTO temp.renamed VALUES (?1, ?2)")?;
        for (old_name, new_name) in new_names {
            insert.execute([old_name, new_name])?;
        }
    }
    for (table, column) in existing_columns(transaction)? {
        let is_renamed = format!("{column} IN (SELECT old_name FROM temp.renamed)");
        let new_name = format!("(SELECT new_name FROM temp.renamed WHERE old_name = {column})");
        match table {
            "hours" => merge_hours(transaction)?,
            // These tables have one row per key.
            "keys" | "outbox_keys" => transaction.execute_batch(&format!(
                "DELETE FROM {table} WHERE {is_renamed} AND {new_name} IN (SELECT {column} FROM {table});
                 UPDATE {table} SET {column} = {new_name} WHERE {is_renamed};"
            ))?,
            _ => transaction
                .execute_batch(&format!("UPDATE {table} SET {column} = {new_name} WHERE {is_renamed}"))?,
        }
    }
    owners::rename(transaction, new_names)
}

/// Moves the sums of the renamed keys to their new names.
fn merge_hours(transaction: &Transaction<'_>) -> Result<(), rusqlite::Error> {
    // Neither sum exceeds 2^53, so adding them does not overflow.
    transaction.execute_batch(&format!(
        "INSERT INTO hours SELECT hour_ms, new_name, client, route, model, {}
         FROM hours JOIN temp.renamed ON old_name = key_hash
         {};
         DELETE FROM hours WHERE key_hash IN (SELECT old_name FROM temp.renamed);
         {}",
        SUM_COLUMNS.join(", "),
        *ADD_SUMS,
        days::CLEAR
    ))
}

/// Returns whether free pages may still contain plain digests.
pub(super) fn is_wipe_due(connection: &Connection) -> Result<bool, rusqlite::Error> {
    connection
        .query_row("SELECT EXISTS (SELECT * FROM maintenance WHERE task = ?1)", [VACUUM], |row| row.get(0))
}

/// Records that the file was vacuumed and its log truncated.
pub(super) fn record_wipe(connection: &Connection) -> Result<(), rusqlite::Error> {
    connection.execute("DELETE FROM maintenance WHERE task = ?1", [VACUUM]).map(drop)
}

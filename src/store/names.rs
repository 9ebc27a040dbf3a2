//! What keys are called in the file. Earlier versions called a key by its plain SHA-256, which is a
//! secret itself; here those digests leave the file and, by way of the outbox, the mirror.
//!
//! It takes two steps, because a file does not know the keys. The migration replaces every plain digest
//! by a retired one ([`Fingerprint::retired`]). Each start then finds the rows of the keys that are
//! configured by their retired digests, and calls them by their fingerprints: also those of a key that
//! was missing when the file was migrated.

use std::collections::HashMap;

use rusqlite::{Connection, Transaction, TransactionBehavior};

use super::owners;
use crate::secret::{ApiKey, Fingerprint};

/// Columns with names of keys; a workspace without a name of its own is called by its first key.
const COLUMNS: [(&str, &str); 5] = [
    ("keys", "key_hash"),
    ("series", "key_hash"),
    ("hours", "key_hash"),
    ("outbox_keys", "key_hash"),
    ("owners", "workspace"),
];

/// What is left to do after the transaction in which the digests were retired.
const VACUUM: &str = "vacuum";

/// Old names with the new ones.
type Renamed = HashMap<String, String>;

/// Replaces the plain digests of an earlier version. They stay in free pages until [`wipe`].
pub(super) fn retire(transaction: &Transaction<'_>) -> Result<(), rusqlite::Error> {
    let mut found = owners::words(transaction)?;
    for (table, column) in COLUMNS {
        let mut statement = transaction.prepare(&format!("SELECT DISTINCT {column} FROM {table}"))?;
        let names = statement.query_map([], |row| row.get::<_, String>(0))?;
        for name in names {
            found.insert(name?);
        }
    }
    let retired = |plain: String| Some((Fingerprint::retired(&plain)?.to_string(), plain));
    let renamed: Renamed =
        found.into_iter().filter_map(retired).map(|(retired, plain)| (plain, retired)).collect();
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

/// Calls what belongs to `keys` and still has a retired digest by their fingerprints.
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
    // What the mirror has not been told yet, it is told in one step.
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

/// Renames in every table, and leaves the names in `temp.renamed`. Where something is there under the
/// new name already, a state stays as it is and sums are added up.
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
    for (table, column) in COLUMNS {
        let is_renamed = format!("{column} IN (SELECT old_name FROM temp.renamed)");
        let new_name = format!("(SELECT new_name FROM temp.renamed WHERE old_name = {column})");
        match table {
            "hours" => add_up_hours(transaction)?,
            // One row a key.
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
    // Neither of two sums is beyond 2^53, so adding them does not overflow.
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

/// Notes that the file was written anew, and its log emptied.
pub(super) fn wiped(connection: &Connection) -> Result<(), rusqlite::Error> {
    connection.execute("DELETE FROM maintenance WHERE task = ?1", [VACUUM]).map(drop)
}

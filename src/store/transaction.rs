//! Stores a batch in one transaction: attempts, owners of identifiers, refusals, the state of the keys, and their
//! outbox rows are committed together or not at all.

use rusqlite::{ToSql, Transaction, TransactionBehavior};

use super::columns::{integer, timestamp};
use super::database::Database;
use super::outbox::{self, MirrorScope};
use super::{attempts, evidence, owners};
use crate::policy::quota::Extension;
use crate::policy::units::UnixMs;
use crate::pool::KeySnapshot;
use crate::proxy::UsageBatch;

/// Stores `batch`, the prepared refusals, and `keys` in one transaction.
pub(super) fn commit(
    database: &mut Database,
    batch: &UsageBatch,
    keys: &[KeySnapshot],
    mirror_scope: MirrorScope,
    now: UnixMs,
) -> Result<(), rusqlite::Error> {
    let Database { connection, refusals, .. } = database;
    let commit_result = (|| {
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        attempts::write(&transaction, &batch.attempts, mirror_scope)?;
        owners::write(&transaction, &batch.owners, now)?;
        refusals.write(&transaction)?;
        for key in keys {
            upsert_key(&transaction, key, now)?;
            if mirror_scope != MirrorScope::Nothing {
                outbox::put_key(&transaction, key, now)?;
            }
        }
        transaction.commit()
    })();
    match commit_result {
        Ok(()) => refusals.record_commit(),
        // After a failed commit it is unknown which refusals are in the file.
        Err(_) => refusals.reset(),
    }
    commit_result
}

fn upsert_key(
    transaction: &Transaction<'_>,
    snapshot: &KeySnapshot,
    now: UnixMs,
) -> Result<(), rusqlite::Error> {
    let mut statement = transaction.prepare_cached(
        "INSERT INTO keys (key_hash, short_key, name, workspace, position, status, character_count, character_limit,
            extension, resets_at_ms, evidence, updated_at_ms, plan)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13)
         ON CONFLICT DO UPDATE SET
            short_key = excluded.short_key, name = excluded.name, workspace = excluded.workspace,
            position = excluded.position, status = excluded.status, character_count = excluded.character_count,
            character_limit = excluded.character_limit, extension = excluded.extension,
            resets_at_ms = excluded.resets_at_ms, evidence = excluded.evidence,
            updated_at_ms = excluded.updated_at_ms, plan = excluded.plan",
    )?;
    let KeySnapshot { key, quota, state, key_evidence, workspace_evidence, .. } = snapshot;
    let extension: Option<i64> = match quota.extension {
        Extension::None => None,
        Extension::Credits(credits) => Some(integer(credits)),
        Extension::Unlimited => Some(-1),
    };
    let membership = key.workspace().membership();
    let tier = key.workspace().tier();
    let columns: [&dyn ToSql; 13] = [
        &key.api_key().fingerprint().to_string(),
        &key.api_key().short().as_str(),
        &key.name(),
        &membership.name(),
        &integer(key.position() as u64),
        &state.status().as_str(),
        &integer(quota.count),
        &quota.limit.map(integer),
        &extension,
        &quota.resets_at.map(timestamp),
        &evidence::to_json(key_evidence, workspace_evidence),
        &timestamp(now),
        &tier.as_ref().map(|tier| tier.as_str()),
    ];
    statement.execute(columns.as_slice())?;
    Ok(())
}

//! Checks the tables of the mirror for operators, without changing them.

use super::client::{SendOutcome, SupabaseClient};
use super::rows::MirrorRow;
use super::{MirrorStartError, Settings};
use crate::policy::mirror::DeliveryResult;
use crate::store::{AttemptEvent, MirroredKeyState};

/// A table and the answer of Supabase to a request that selects none of its rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableCheck {
    /// The name of the table.
    pub table: &'static str,
    /// The reason why the mirror could not use the table, with advice.
    pub result: Result<(), String>,
}

/// Checks that the HTTP client of the mirror can be created.
///
/// # Errors
///
/// The error that a start of the mirror would report.
pub fn check_settings(settings: &Settings) -> Result<(), MirrorStartError> {
    SupabaseClient::new(settings).map(drop)
}

/// Requests no rows of each table that the mirror writes to.
///
/// # Errors
///
/// Fails when the HTTP client cannot be created.
pub async fn check_tables(
    settings: &Settings,
    has_events: bool,
) -> Result<Vec<TableCheck>, MirrorStartError> {
    let client = SupabaseClient::new(settings)?;
    let keys = check_table::<MirroredKeyState>(&client);
    if !has_events {
        return Ok(vec![keys.await]);
    }
    let (keys, events) = tokio::join!(keys, check_table::<AttemptEvent>(&client));
    Ok(vec![keys, events])
}

async fn check_table<R: MirrorRow>(client: &SupabaseClient) -> TableCheck {
    let SendOutcome { verdict, reason, .. } = client.select_nothing::<R>().await;
    let result = match verdict {
        DeliveryResult::Stored => Ok(()),
        DeliveryResult::OperatorRequired(problem) => Err(format!("{} ({reason})", problem.message())),
        DeliveryResult::Retry | DeliveryResult::RowRejected => Err(reason.to_string()),
    };
    TableCheck { table: R::TABLE, result }
}

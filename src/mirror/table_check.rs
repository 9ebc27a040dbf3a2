//! Creates the HTTP client of the mirror and queries its tables without selecting rows, so that `keychoir check` and
//! `keychoir doctor` report unusable settings and tables without changing a table.

use super::client::{SendOutcome, SupabaseClient};
use super::rows::MirrorRow;
use super::{MirrorStartError, Settings};
use crate::policy::mirror::DeliveryResult;
use crate::store::{AttemptEvent, MirroredKeyState};

/// A table and the result of a query that selects none of its rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableCheck {
    /// The name of the table.
    pub table: &'static str,
    /// `Ok` if the mirror can use the table. The error is the reason why it cannot, with advice if the operator must
    /// fix it.
    pub result: Result<(), String>,
}

/// Checks that the HTTP client of the mirror can be created.
///
/// # Errors
///
/// Fails with the error that a start of the mirror would report.
pub fn check_settings(settings: &Settings) -> Result<(), MirrorStartError> {
    SupabaseClient::new(settings).map(drop)
}

/// Queries each table that the mirror writes to, without selecting rows. `has_events` tells whether the mirror writes
/// to the table of events.
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
    let SendOutcome { delivery, reason, .. } = client.select_nothing::<R>().await;
    let result = match delivery {
        DeliveryResult::Stored => Ok(()),
        DeliveryResult::OperatorRequired(problem) => Err(format!("{} ({reason})", problem.message())),
        DeliveryResult::Retry | DeliveryResult::RowRejected => Err(reason.to_string()),
    };
    TableCheck { table: R::TABLE, result }
}

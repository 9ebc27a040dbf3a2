//! Sends one batch of rows of one table. If Supabase refuses the batch, its halves are sent separately, down
//! to single rows, so that only invalid rows stay undelivered. Also sends the renames of keys.

use std::collections::VecDeque;
use std::time::Duration;

use super::client::{FailureReason, SendOutcome, SupabaseClient};
use super::rows::MirrorRow;
use crate::policy::mirror::{DeliveryResult, MirrorProblem, split_rows};
use crate::store::{AttemptEvent, KeyRename, MirroredKeyState, RowVersion};

/// Maximum number of requests for one batch, enough to find a few invalid rows among hundreds. Unsent rows
/// stay in the outbox for the next batch.
const MAX_REQUESTS: usize = 128;

/// The result of sending a batch.
#[derive(Debug, Default)]
pub(super) struct PushResult {
    pub(super) sent: Vec<RowVersion>,
    /// Rows refused for their content, each with the database's error code.
    pub(super) refused: Vec<(RowVersion, String)>,
    /// The error that ended the push or concerns all rows. Without an error, it is `None`, even if rows are left
    /// because of the maximum number of requests.
    pub(super) error: Option<PushError>,
}

/// An error of a push that does not concern the content of single rows.
#[derive(Clone, Debug)]
pub(super) enum PushError {
    /// A temporary failure, with the duration in the `Retry-After` header of the response, or `None` without this
    /// header.
    Temporary { reason: FailureReason, retry_after: Option<Duration> },
    /// A setup error that an operator must fix.
    Setup { problem: MirrorProblem, reason: FailureReason },
}

/// Sends `rows`. The halves of a refused batch are sent before smaller parts, so that valid rows are delivered early.
/// An accepted row proves that the table is valid, so that refused rows must be invalid.
pub(super) async fn push<R: MirrorRow>(client: &SupabaseClient, rows: &[R]) -> PushResult {
    let mut push_result = PushResult::default();
    let mut queued_ranges = VecDeque::new();
    queued_ranges.push_back(0..rows.len());
    let mut last_refusal = None;
    // Single rows that were refused before a row was accepted. The table may have been the cause, so they
    // are sent again after the first accepted row.
    let mut early_refusals = Vec::new();
    for _ in 0..MAX_REQUESTS {
        if queued_ranges.is_empty() && !push_result.sent.is_empty() {
            queued_ranges.extend(early_refusals.drain(..).map(|(range, _)| range));
        }
        let Some(range) = queued_ranges.pop_front() else { break };
        let Some(batch) = rows.get(range.clone()).filter(|batch| !batch.is_empty()) else { continue };
        let SendOutcome { delivery, reason, retry_after } = client.upsert(batch).await;
        match delivery {
            DeliveryResult::Stored => push_result.sent.extend(batch.iter().map(MirrorRow::version)),
            DeliveryResult::RowRejected => {
                match split_rows(range.clone()) {
                    Some(halves) => queued_ranges.extend(halves),
                    None if push_result.sent.is_empty() => early_refusals.push((range, reason.code())),
                    None => {
                        push_result.refused.extend(batch.iter().map(|row| (row.version(), reason.code())))
                    }
                }
                last_refusal = Some(reason);
            }
            DeliveryResult::Retry => {
                push_result.error = Some(PushError::Temporary { reason, retry_after });
                break;
            }
            DeliveryResult::OperatorRequired(problem) => {
                push_result.error = Some(PushError::Setup { problem, reason });
                break;
            }
        }
    }
    if push_result.sent.is_empty() {
        let refused = early_refusals
            .into_iter()
            .filter_map(|(range, code)| Some((rows.get(range.start)?.version(), code)));
        push_result.refused.extend(refused);
    }
    // If all of several rows are refused, the table is invalid, not the rows.
    if let Some(reason) = last_refusal.filter(|_| push_result.sent.is_empty() && rows.len() > 1) {
        push_result.refused.clear();
        push_result.error.get_or_insert(PushError::Setup { problem: MirrorProblem::EveryRow, reason });
    }
    push_result
}

/// Renames the rows that an earlier version sent, in both tables. If the table of key states has a row with the new
/// name, the old row is deleted.
pub(super) async fn rename(client: &SupabaseClient, renames: Vec<KeyRename>) -> PushResult {
    let mut push_result = PushResult::default();
    for rename in renames {
        match rename_one(client, &rename).await {
            None => push_result.sent.push(RowVersion::Rename(rename)),
            Some(error) => {
                push_result.error = Some(error);
                break;
            }
        }
    }
    push_result
}

async fn rename_one(client: &SupabaseClient, rename: &KeyRename) -> Option<PushError> {
    let rename_outcome = client.rename::<MirroredKeyState>(rename).await;
    let outcome = match rename_outcome.delivery {
        DeliveryResult::RowRejected => client.delete::<MirroredKeyState>(rename).await,
        DeliveryResult::Stored | DeliveryResult::Retry | DeliveryResult::OperatorRequired(_) => {
            rename_outcome
        }
    };
    match rename_error(outcome) {
        None => rename_error(client.rename::<AttemptEvent>(rename).await),
        error => error,
    }
}

/// Returns the error of a rename, or `None` if the rows were renamed or there are none.
fn rename_error(SendOutcome { delivery, reason, retry_after }: SendOutcome) -> Option<PushError> {
    match delivery {
        // A missing table has no row to rename. Older versions of PostgREST also respond with 404
        // when no row matches.
        DeliveryResult::Stored | DeliveryResult::OperatorRequired(MirrorProblem::Table) => None,
        DeliveryResult::Retry => Some(PushError::Temporary { reason, retry_after }),
        DeliveryResult::RowRejected => Some(PushError::Setup { problem: MirrorProblem::EveryRow, reason }),
        DeliveryResult::OperatorRequired(problem) => Some(PushError::Setup { problem, reason }),
    }
}

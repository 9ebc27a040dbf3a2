//! Sends one batch of rows of one table. If Supabase refuses the batch, its halves are sent
//! separately, down to single rows, so that only the invalid rows stay undelivered.

use std::collections::VecDeque;
use std::time::Duration;

use super::remote::{Reason, Remote, SendOutcome};
use super::rows::{KeyUsage, MirrorRow, UsageEvent};
use crate::policy::mirror::{Acceptance, Hint, halves};
use crate::store::{Rename, RowName};

/// Maximum requests for one batch: enough to find a few invalid rows among hundreds. Rows that are
/// not sent stay in the outbox for the next batch.
const MAX_REQUESTS: usize = 128;

/// The result of a batch.
#[derive(Debug, Default)]
pub(super) struct PushResult {
    pub(super) sent: Vec<RowName>,
    /// Rows refused for their content, each with the database's error code.
    pub(super) refused: Vec<(RowName, String)>,
    /// The error that ended the push before every row was sent.
    pub(super) stop: Option<Stop>,
}

/// The error that stopped a push.
#[derive(Clone, Debug)]
pub(super) enum Stop {
    /// A temporary failure, with the `Retry-After` of the response.
    Temporary { reason: Reason, retry_after: Option<Duration> },
    /// A setup error that an operator must fix.
    Setup { hint: Hint, reason: Reason },
}

/// Sends `rows`. Halves are sent breadth first: valid rows are delivered early, and an accepted row
/// proves that the table is valid and the refused rows are not.
pub(super) async fn push<R: MirrorRow>(remote: &Remote, rows: &[R]) -> PushResult {
    let mut pushed = PushResult::default();
    let mut queued_ranges = VecDeque::new();
    queued_ranges.push_back(0..rows.len());
    let mut last_refusal = None;
    // Single rows that were refused before any row was accepted. The table may have caused the
    // refusals, so these rows are sent again after the first accepted row.
    let mut early_refusals = Vec::new();
    for _ in 0..MAX_REQUESTS {
        if queued_ranges.is_empty() && !pushed.sent.is_empty() {
            queued_ranges.extend(early_refusals.drain(..).map(|(range, _)| range));
        }
        let Some(range) = queued_ranges.pop_front() else { break };
        let Some(part) = rows.get(range.clone()).filter(|part| !part.is_empty()) else { continue };
        let SendOutcome { verdict, reason, retry_after } = remote.push(part).await;
        match verdict {
            Acceptance::Arrived => pushed.sent.extend(part.iter().map(MirrorRow::name)),
            Acceptance::Row => {
                match halves(range.clone()) {
                    Some(halves_of_range) => queued_ranges.extend(halves_of_range),
                    None if pushed.sent.is_empty() => early_refusals.push((range, reason.code())),
                    None => pushed.refused.extend(part.iter().map(|row| (row.name(), reason.code()))),
                }
                last_refusal = Some(reason);
            }
            Acceptance::Later => {
                pushed.stop = Some(Stop::Temporary { reason, retry_after });
                break;
            }
            Acceptance::Person(hint) => {
                pushed.stop = Some(Stop::Setup { hint, reason });
                break;
            }
        }
    }
    if pushed.sent.is_empty() {
        let alone = early_refusals
            .into_iter()
            .filter_map(|(range, code)| Some((rows.get(range.start)?.name(), code)));
        pushed.refused.extend(alone);
    }
    // If none of several rows is accepted, the table is invalid, not the rows.
    if let Some(reason) = last_refusal.filter(|_| pushed.sent.is_empty() && rows.len() > 1) {
        pushed.refused.clear();
        pushed.stop.get_or_insert(Stop::Setup { hint: Hint::EveryRow, reason });
    }
    pushed
}

/// Renames rows that an earlier version sent, in both tables. If a row with the new name exists,
/// the old row is deleted.
pub(super) async fn rename(remote: &Remote, renames: Vec<Rename>) -> PushResult {
    let mut pushed = PushResult::default();
    for rename in renames {
        match rename_one(remote, &rename).await {
            None => pushed.sent.push(RowName::Rename(rename)),
            Some(stop) => {
                pushed.stop = Some(stop);
                break;
            }
        }
    }
    pushed
}

async fn rename_one(remote: &Remote, rename: &Rename) -> Option<Stop> {
    let renamed = remote.rename::<KeyUsage>(rename).await;
    let outcome = match renamed.verdict {
        Acceptance::Row => remote.remove::<KeyUsage>(rename).await,
        Acceptance::Arrived | Acceptance::Later | Acceptance::Person(_) => renamed,
    };
    match stop_of(outcome) {
        None => stop_of(remote.rename::<UsageEvent>(rename).await),
        stop => stop,
    }
}

fn stop_of(SendOutcome { verdict, reason, retry_after }: SendOutcome) -> Option<Stop> {
    match verdict {
        // A missing table has no row to rename. Older versions of PostgREST also respond with 404
        // when no row matches.
        Acceptance::Arrived | Acceptance::Person(Hint::Table) => None,
        Acceptance::Later => Some(Stop::Temporary { reason, retry_after }),
        Acceptance::Row => Some(Stop::Setup { hint: Hint::EveryRow, reason }),
        Acceptance::Person(hint) => Some(Stop::Setup { hint, reason }),
    }
}

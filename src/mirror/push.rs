//! Sends one batch of one table: the whole batch first, then halves if part of it is refused, until
//! the refused rows are found. Rows that are accepted on the way are delivered.

use std::collections::VecDeque;
use std::time::Duration;

use super::remote::{Reason, Remote, SendOutcome};
use super::rows::{KeyUsage, MirrorRow, UsageEvent};
use crate::policy::mirror::{Acceptance, Hint, halves};
use crate::store::{Rename, RowName};

/// Maximum requests for one batch: enough to find a handful of bad rows among hundreds. The others
/// are in the next batch, which is smaller.
const MAX_REQUESTS: usize = 128;

/// The result of a batch.
#[derive(Debug, Default)]
pub(super) struct Pushed {
    pub(super) sent: Vec<RowName>,
    /// Rows refused for their content, with the database's code.
    pub(super) refused: Vec<(RowName, String)>,
    /// Why the push ended before every row was tried.
    pub(super) stop: Option<Stop>,
}

/// The error that stopped a push.
#[derive(Clone, Debug)]
pub(super) enum Stop {
    /// A temporary failure, with the delay that the response demanded.
    Later { reason: Reason, retry_after: Option<Duration> },
    /// A mistake of the setup that an operator must fix.
    Person { hint: Hint, reason: Reason },
}

/// Sends `rows`. The halves are tried level by level, not depth first: good rows are delivered
/// early, which also proves that the rows are at fault and not the table.
pub(super) async fn push<R: MirrorRow>(remote: &Remote, rows: &[R]) -> Pushed {
    let mut pushed = Pushed::default();
    let mut waiting = VecDeque::new();
    waiting.push_back(0..rows.len());
    let mut last_refusal = None;
    // Rows refused alone before any row was accepted: the table may have been the cause.
    let mut early = Vec::new();
    for _ in 0..MAX_REQUESTS {
        if waiting.is_empty() && !pushed.sent.is_empty() {
            waiting.extend(early.drain(..).map(|(range, _)| range));
        }
        let Some(range) = waiting.pop_front() else { break };
        let Some(part) = rows.get(range.clone()).filter(|part| !part.is_empty()) else { continue };
        let SendOutcome { verdict, reason, retry_after } = remote.push(part).await;
        match verdict {
            Acceptance::Arrived => pushed.sent.extend(part.iter().map(MirrorRow::name)),
            Acceptance::Row => {
                match halves(range.clone()) {
                    Some(halves_of_range) => waiting.extend(halves_of_range),
                    None if pushed.sent.is_empty() => early.push((range, reason.code())),
                    None => pushed.refused.extend(part.iter().map(|row| (row.name(), reason.code()))),
                }
                last_refusal = Some(reason);
            }
            Acceptance::Later => {
                pushed.stop = Some(Stop::Later { reason, retry_after });
                break;
            }
            Acceptance::Person(hint) => {
                pushed.stop = Some(Stop::Person { hint, reason });
                break;
            }
        }
    }
    if pushed.sent.is_empty() {
        let alone = early.into_iter().filter_map(|(range, code)| Some((rows.get(range.start)?.name(), code)));
        pushed.refused.extend(alone);
    }
    // If no row of several is accepted, the table is at fault, not the rows.
    if let Some(reason) = last_refusal.filter(|_| pushed.sent.is_empty() && rows.len() > 1) {
        pushed.refused.clear();
        pushed.stop.get_or_insert(Stop::Person { hint: Hint::EveryRow, reason });
    }
    pushed
}

/// Renames rows that an earlier version sent, in both tables. If a key already has a row under its
/// new name, the old row is deleted.
pub(super) async fn rename(remote: &Remote, renames: Vec<Rename>) -> Pushed {
    let mut pushed = Pushed::default();
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
        // Without a table no row has an old name. Older versions of PostgREST also answer 404 when
        // no row matches.
        Acceptance::Arrived | Acceptance::Person(Hint::Table) => None,
        Acceptance::Later => Some(Stop::Later { reason, retry_after }),
        Acceptance::Row => Some(Stop::Person { hint: Hint::EveryRow, reason }),
        Acceptance::Person(hint) => Some(Stop::Person { hint, reason }),
    }
}

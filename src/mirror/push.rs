//! One batch of one table on its way: sent whole, and halved when some of it is refused, until the
//! rows are found that are at fault. What arrives meanwhile has arrived.

use std::collections::VecDeque;
use std::time::Duration;

use super::remote::{Outcome, Reason, Remote};
use super::rows::{KeyUsage, Row, UsageEvent};
use crate::policy::mirror::{Acceptance, Hint, halves};
use crate::store::{Rename, RowName};

/// Requests for one batch: enough to find a handful of rows among hundreds. What is not found is in
/// the next batch, which is smaller.
const REQUESTS_MAX: usize = 128;

/// What became of a batch.
#[derive(Debug, Default)]
pub(super) struct Pushed {
    pub(super) sent: Vec<RowName>,
    /// Refused for what is in them, with the database's code.
    pub(super) refused: Vec<(RowName, String)>,
    /// Why it ended before everything was tried.
    pub(super) stop: Option<Stop>,
}

/// What is in the way.
#[derive(Clone, Debug)]
pub(super) enum Stop {
    /// Something that passes.
    Later { reason: Reason, told: Option<Duration> },
    /// Something that a person must do.
    Person { hint: Hint, reason: Reason },
}

/// Sends `rows`. By levels, not one half to its end: what is sound arrives early, which also tells
/// that it is the rows and not the table.
pub(super) async fn push<R: Row>(remote: &Remote, rows: &[R]) -> Pushed {
    let mut pushed = Pushed::default();
    let mut waiting = VecDeque::new();
    waiting.push_back(0..rows.len());
    let mut last_refusal = None;
    // Rows that were refused by themselves before anything arrived: perhaps it was the table then.
    let mut early = Vec::new();
    for _ in 0..REQUESTS_MAX {
        if waiting.is_empty() && !pushed.sent.is_empty() {
            waiting.extend(early.drain(..).map(|(range, _)| range));
        }
        let Some(range) = waiting.pop_front() else { break };
        let Some(part) = rows.get(range.clone()).filter(|part| !part.is_empty()) else { continue };
        let Outcome { verdict, reason, told } = remote.push(part).await;
        match verdict {
            Acceptance::Arrived => pushed.sent.extend(part.iter().map(Row::name)),
            Acceptance::Row => {
                match halves(range.clone()) {
                    Some(both) => waiting.extend(both),
                    None if pushed.sent.is_empty() => early.push((range, reason.code())),
                    None => pushed.refused.extend(part.iter().map(|row| (row.name(), reason.code()))),
                }
                last_refusal = Some(reason);
            }
            Acceptance::Later => {
                pushed.stop = Some(Stop::Later { reason, told });
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
    // Judged by contrast: where nothing arrives of several rows, it is not the rows.
    if let Some(reason) = last_refusal.filter(|_| pushed.sent.is_empty() && rows.len() > 1) {
        pushed.refused.clear();
        pushed.stop.get_or_insert(Stop::Person { hint: Hint::EveryRow, reason });
    }
    pushed
}

/// Renames rows that an earlier version has sent, in both tables. A key that has a row under its new
/// name already loses the old one.
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
    match in_the_way(outcome) {
        None => in_the_way(remote.rename::<UsageEvent>(rename).await),
        stop => stop,
    }
}

fn in_the_way(Outcome { verdict, reason, told }: Outcome) -> Option<Stop> {
    match verdict {
        // Where there is no table, no row has an old name; older versions of PostgREST answer 404 also
        // when no row is found.
        Acceptance::Arrived | Acceptance::Person(Hint::Table) => None,
        Acceptance::Later => Some(Stop::Later { reason, told }),
        Acceptance::Row => Some(Stop::Person { hint: Hint::EveryRow, reason }),
        Acceptance::Person(hint) => Some(Stop::Person { hint, reason }),
    }
}

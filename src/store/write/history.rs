//! Runs the commands of [`History`](crate::store::History) on the writer thread: reads of an in-memory database or of
//! the usage of a user, and changes of operators.

use rusqlite::Connection;
use tokio::sync::oneshot;

use super::Writer;
use crate::store::changes::{self, StoredChange};
use crate::store::history::HistoryCommand;

/// Maximum number of changes of operators that are kept while the database cannot be written. Further changes are not
/// recorded.
const MAX_UNWRITTEN_CHANGES: usize = 1_000;

/// A change that is not written yet.
pub(super) struct UnwrittenChange {
    change: StoredChange,
    /// Confirms the change to its sender, which may have stopped waiting.
    confirm: oneshot::Sender<()>,
}

/// Writes the changes in their order, and removes each of them after its commit.
pub(super) fn write_changes(
    connection: &Connection,
    unwritten: &mut Vec<UnwrittenChange>,
) -> Result<(), rusqlite::Error> {
    while let Some(next) = unwritten.first() {
        changes::insert(connection, &next.change)?;
        let UnwrittenChange { confirm, .. } = unwritten.remove(0);
        let _ = confirm.send(());
    }
    Ok(())
}

impl Writer {
    /// Runs a command. If the database is not open, a read is dropped, which closes the response channel of its sender.
    /// A change is kept until it is written. If too many changes are kept, it is dropped, which closes the channel too.
    pub(super) fn run_history_command(&mut self, command: HistoryCommand) {
        match command {
            HistoryCommand::Read(read) => {
                if let Some(database) = self.database.as_mut() {
                    read(&mut database.connection);
                }
            }
            HistoryCommand::Record(change, confirm) => {
                if self.unwritten_changes.len() < MAX_UNWRITTEN_CHANGES {
                    self.unwritten_changes.push(UnwrittenChange { change, confirm });
                }
                if !self.health.is_failing() {
                    self.flush();
                }
            }
        }
    }
}

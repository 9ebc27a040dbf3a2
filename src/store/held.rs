//! Batches of usage records that were taken from the queue and are not written yet: counted, and
//! bounded while the database cannot be written.

use super::{DatabaseLocation, Settings};
use crate::proxy::{UsageBatch, UsageQueue};

/// Maximum number of empty batches kept for reuse: about as many as there are sending threads.
const SPARE_MAX: usize = 16;

#[derive(Debug, Default)]
pub(super) struct HeldTransaction {
    sheets: Vec<UsageBatch>,
    records: usize,
    owners: usize,
    /// Batches that were written and can be filled again.
    spare: Vec<UsageBatch>,
}

impl HeldTransaction {
    /// Takes all batches from the queue; returns whether the state of the keys is to be written.
    pub(super) fn take_from(
        &mut self,
        queue: &mut UsageQueue,
        place: &DatabaseLocation,
        settings: &Settings,
    ) -> bool {
        let mut taken = Vec::new();
        let are_keys_changed = queue.take(&mut taken, &mut self.spare);
        taken.into_iter().for_each(|sheet| self.take(sheet, place, settings));
        are_keys_changed
    }

    pub(super) fn take(&mut self, mut sheet: UsageBatch, place: &DatabaseLocation, settings: &Settings) {
        // An in-memory database is never read back. Owners above the limit are recorded again when
        // a later response names them.
        if *place == DatabaseLocation::Memory || self.owners >= settings.queue_max {
            sheet.forget_owners();
        }
        self.records += sheet.rows().len();
        self.owners += sheet.owners().len();
        self.sheets.push(sheet);
    }

    pub(super) fn sheets(&self) -> &[UsageBatch] {
        &self.sheets
    }

    pub(super) fn records(&self) -> usize {
        self.records
    }

    /// Keeps the first `records_max` records; returns how many were dropped.
    pub(super) fn shed(&mut self, records_max: usize) -> usize {
        let lost = self.records.saturating_sub(records_max);
        let mut excess = lost;
        for sheet in self.sheets.iter_mut().rev() {
            let rows = sheet.rows().len();
            sheet.keep(rows.saturating_sub(excess));
            excess = excess.saturating_sub(rows);
        }
        self.records -= lost;
        self.sheets.retain(|sheet| !sheet.is_empty());
        lost
    }

    /// Marks all batches as written; returns how many records and owner changes they held.
    pub(super) fn written(&mut self) -> (usize, usize) {
        self.spare.extend(self.sheets.drain(..).map(UsageBatch::cleared));
        self.spare.truncate(SPARE_MAX);
        (std::mem::take(&mut self.records), std::mem::take(&mut self.owners))
    }
}

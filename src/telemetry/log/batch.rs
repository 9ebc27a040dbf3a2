//! Queued log entries in the order in which they were logged, not yet formatted.

use crate::telemetry::ended::AccessLogEntry;
use crate::telemetry::line::Form;

#[derive(Debug, Default)]
pub(super) struct Batch {
    entries: Vec<Entry>,
    /// The texts of all entries, one behind the other.
    texts: Vec<u8>,
}

#[derive(Debug)]
enum Entry {
    /// A formatted line of this length.
    Line(usize),
    Ended(AccessLogEntry<usize>),
}

impl Batch {
    pub(super) fn add_line(&mut self, line: &[u8]) {
        self.texts.extend_from_slice(line);
        self.entries.push(Entry::Line(line.len()));
    }

    pub(super) fn add_ended(&mut self, ended: &AccessLogEntry<&str>) {
        let packed = ended.packed(&mut self.texts);
        self.entries.push(Entry::Ended(packed));
    }

    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub(super) fn entries(&self) -> usize {
        self.entries.len()
    }

    /// The memory of the entries and their texts, in bytes.
    pub(super) fn bytes(&self) -> usize {
        self.entries.len() * size_of::<Entry>() + self.texts.len()
    }

    /// Empties the batch, and keeps at most `kept_bytes` of memory for each of its two buffers.
    pub(super) fn clear(&mut self, kept_bytes: usize) {
        self.entries.clear();
        self.texts.clear();
        self.entries.shrink_to(kept_bytes / size_of::<Entry>());
        self.texts.shrink_to(kept_bytes);
    }

    /// An iterator that formats the entries from the first one on.
    pub(super) fn told(&self) -> BatchStatus<'_> {
        BatchStatus { entries: self.entries.iter(), texts: &self.texts }
    }
}

/// The entries of a batch that are not yet formatted.
pub(super) struct BatchStatus<'a> {
    entries: std::slice::Iter<'a, Entry>,
    texts: &'a [u8],
}

impl BatchStatus<'_> {
    /// Appends the next line; false when there is none.
    pub(super) fn append(&mut self, text: &mut Vec<u8>, form: Form) -> bool {
        match self.entries.next() {
            Some(Entry::Line(length)) => {
                text.extend_from_slice(self.texts.split_off(..*length).unwrap_or_default());
            }
            Some(Entry::Ended(ended)) => ended.unpacked(&mut self.texts).append(text, form),
            None => return false,
        }
        true
    }
}

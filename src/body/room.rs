//! How much may be held of request bodies: in memory and on disk, for one request and for all.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The bounds, as they are configured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Bytes of one body in memory.
    pub memory_bytes_max: u64,
    /// Bytes of all bodies in memory.
    pub memory_total_bytes_max: u64,
    /// Bytes of one body on disk, beyond those in memory.
    pub disk_bytes_max: u64,
    /// Bytes of all bodies on disk.
    pub disk_total_bytes_max: u64,
    /// The share of the disk, in percent, that is left free.
    pub disk_free_percent_min: u64,
    /// Where the files are made. They have no name there.
    pub directory: PathBuf,
}

/// The room that all held bodies share. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Room {
    memory: Budget,
    disk: Budget,
    disk_free_percent_min: u64,
    directory: Arc<Path>,
}

/// One bound for a body and one for all of them.
#[derive(Clone, Debug)]
pub(super) struct Budget {
    used: Arc<AtomicU64>,
    one_bytes_max: u64,
    total_bytes_max: u64,
}

impl Room {
    /// Room within these bounds.
    #[must_use]
    pub fn new(bounds: &Bounds) -> Self {
        Self {
            memory: Budget::new(bounds.memory_bytes_max, bounds.memory_total_bytes_max),
            disk: Budget::new(bounds.disk_bytes_max, bounds.disk_total_bytes_max),
            disk_free_percent_min: bounds.disk_free_percent_min,
            directory: bounds.directory.as_path().into(),
        }
    }

    /// No room at all.
    #[must_use]
    pub fn none() -> Self {
        Self::new(&Bounds {
            memory_bytes_max: 0,
            memory_total_bytes_max: 0,
            disk_bytes_max: 0,
            disk_total_bytes_max: 0,
            disk_free_percent_min: 0,
            directory: PathBuf::new(),
        })
    }

    /// This room, if its bounds are those of `other`, and otherwise `other`, with nothing held.
    #[must_use]
    pub fn or_other(&self, other: Self) -> Self {
        let is_same = self.memory.has_bounds_of(&other.memory)
            && self.disk.has_bounds_of(&other.disk)
            && self.disk_free_percent_min == other.disk_free_percent_min
            && self.directory == other.directory;
        if is_same { self.clone() } else { other }
    }

    /// Bytes that are held in memory now.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        self.memory.used()
    }

    /// Bytes that are held on disk now.
    #[must_use]
    pub fn disk_bytes(&self) -> u64 {
        self.disk.used()
    }

    pub(super) fn memory(&self) -> &Budget {
        &self.memory
    }

    pub(super) fn disk(&self) -> &Budget {
        &self.disk
    }

    pub(super) fn directory(&self) -> Arc<Path> {
        Arc::clone(&self.directory)
    }

    pub(super) fn disk_free_percent_min(&self) -> u64 {
        self.disk_free_percent_min
    }
}

impl Budget {
    fn new(one_bytes_max: u64, total_bytes_max: u64) -> Self {
        Self { used: Arc::default(), one_bytes_max, total_bytes_max }
    }

    /// Takes `bytes` for a body that has taken `held` already. Whether they fit.
    pub(super) fn take(&self, held: u64, bytes: u64) -> bool {
        let fits = |used: u64| used.checked_add(bytes).filter(|&sum| sum <= self.total_bytes_max);
        held.saturating_add(bytes) <= self.one_bytes_max
            && self.used.fetch_update(Ordering::AcqRel, Ordering::Acquire, fits).is_ok()
    }

    pub(super) fn give_back(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Ordering::AcqRel);
    }

    fn has_bounds_of(&self, other: &Self) -> bool {
        (self.one_bytes_max, self.total_bytes_max) == (other.one_bytes_max, other.total_bytes_max)
    }

    fn used(&self) -> u64 {
        self.used.load(Ordering::Acquire)
    }
}

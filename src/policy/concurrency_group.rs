//! Identifies a concurrency group: the requests of a workspace that share one limit of concurrent requests at the
//! provider. A group is only a number, because the pool has an array with one limiter per group for each workspace.
//!
//! [`elevenlabs::concurrency`](crate::elevenlabs::concurrency) assigns models and operations to groups.

/// A concurrency group, identified by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConcurrencyGroup(u8);

impl ConcurrencyGroup {
    /// Number of groups that a workspace can track.
    pub const COUNT: usize = 16;

    /// Creates the group with the given `number`, which must be below [`COUNT`](Self::COUNT).
    pub(crate) const fn from_number(number: u8) -> Self {
        assert!((number as usize) < Self::COUNT);
        Self(number)
    }

    /// Returns the number of the group, as an index below [`COUNT`](Self::COUNT).
    #[must_use]
    pub fn index(self) -> usize {
        usize::from(self.0)
    }

    /// Returns all groups in the order of their numbers.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..).take(Self::COUNT).map(Self)
    }
}

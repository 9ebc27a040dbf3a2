//! A concurrency group: the provider counts requests of one group together when it limits concurrent
//! requests.
//!
//! A workspace keeps one limiter per group in an array, so that speech of a slow model does not use the
//! capacity for transcriptions. The groups of the provider's models and operations are in
//! [`elevenlabs::concurrency`](crate::elevenlabs::concurrency).

/// One concurrency group, by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConcurrencyGroup(u8);

impl ConcurrencyGroup {
    /// Maximum number of groups.
    pub const COUNT: usize = 16;

    /// The group with a number below [`COUNT`](Self::COUNT).
    pub(crate) const fn of_number(number: u8) -> Self {
        assert!((number as usize) < Self::COUNT);
        Self(number)
    }

    /// Its number, below [`COUNT`](Self::COUNT).
    #[must_use]
    pub fn index(self) -> usize {
        usize::from(self.0)
    }

    /// All groups, in the order of their numbers.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..).take(Self::COUNT).map(Self)
    }
}

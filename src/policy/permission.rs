//! Identifies a permission that a key may lack. The permission is only a number here, because decisions about keys
//! only compare permissions. [`elevenlabs::permission`](crate::elevenlabs::permission) lists the names of the
//! permissions, and the endpoint table lists the permission that each request needs.

/// A permission of the provider, identified by its index in the list of names.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Permission(u8);

impl Permission {
    /// Creates the permission with the given index in the list of names.
    pub(crate) const fn from_number(number: u8) -> Self {
        Self(number)
    }

    /// Returns the index in the list of names.
    pub(crate) const fn number(self) -> u8 {
        self.0
    }
}

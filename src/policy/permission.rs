//! A permission that a key may lack. It is only a number here, because decisions about keys only compare
//! permissions.
//!
//! The names of the permissions, and the requests that need them, are in
//! [`elevenlabs::permission`](crate::elevenlabs::permission).

/// A permission of the provider, by its number in the list of its names.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Permission(u8);

impl Permission {
    pub(crate) const fn of_number(number: u8) -> Self {
        Self(number)
    }

    pub(crate) const fn number(self) -> u8 {
        self.0
    }
}

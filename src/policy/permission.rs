//! Identifies a permission that a key may lack. It is only a number here, because decisions about keys only
//! compare permissions. [`elevenlabs::permission`](crate::elevenlabs::permission) has the names of the
//! permissions and the requests that need them.

/// A permission of the provider, identified by its index in the list of names.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Permission(u8);

impl Permission {
    pub(crate) const fn from_number(number: u8) -> Self {
        Self(number)
    }

    pub(crate) const fn number(self) -> u8 {
        self.0
    }
}

//! Defines the name of a pool that replicas share, and derives the names of the keys and channels of the pool in Redis.

use std::fmt;

/// The maximum length of the name of a shared pool, in bytes.
const MAX_NAME_LENGTH: usize = 64;

/// The name of a pool that replicas share. Pools with different names share nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharedPoolName(String);

impl SharedPoolName {
    /// Validates a name: 1 to 64 characters of `a`-`z`, `0`-`9`, `_`, `.` and `-`. None of these characters is
    /// special in a Redis key or in an ACL pattern of Redis.
    #[must_use]
    pub fn new(name: &str) -> Option<Self> {
        let is_name_byte = |byte: u8| {
            byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'_' | b'.' | b'-')
        };
        let is_valid = (1..=MAX_NAME_LENGTH).contains(&name.len()) && name.bytes().all(is_name_byte);
        is_valid.then(|| Self(name.to_owned()))
    }

    /// Returns the prefix of all Redis keys of the pool. The part in braces puts all keys into one cluster slot, and
    /// the number is the version of the key format.
    #[must_use]
    pub fn key_prefix(&self) -> String {
        format!("{{keychoir:{}}}:1:", self.0)
    }

    /// Returns the name of the channel on which replicas publish changes.
    #[must_use]
    pub fn changes_channel(&self) -> String {
        format!("{}changes", self.key_prefix())
    }

    /// Returns an ACL pattern of Redis that matches the keys and channels of the pool in all versions of the format.
    #[must_use]
    pub fn access_pattern(&self) -> String {
        format!("{{keychoir:{}}}:*", self.0)
    }
}

impl Default for SharedPoolName {
    fn default() -> Self {
        Self("default".to_owned())
    }
}

impl fmt::Display for SharedPoolName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_a_special_character_is_rejected() {
        for name in ["a", "default", "a-b_c.9", &"a".repeat(64)] {
            assert!(SharedPoolName::new(name).is_some(), "{name} must be accepted");
        }
        for name in ["", "A", "a b", "a*", "{a}", "a:b", "\u{e4}", &"a".repeat(65)] {
            assert!(SharedPoolName::new(name).is_none(), "{name} must be rejected");
        }
    }

    #[test]
    fn the_keys_and_channels_of_a_pool_are_in_one_slot_and_match_its_access_pattern() {
        let name = SharedPoolName::new("studio").unwrap();
        assert_eq!(name.key_prefix(), "{keychoir:studio}:1:");
        assert_eq!(name.changes_channel(), "{keychoir:studio}:1:changes");
        assert_eq!(name.access_pattern(), "{keychoir:studio}:*");
    }
}

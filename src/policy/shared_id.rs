//! Derives names of keys, workspaces, clients, users and identifiers for other replicas. A name is a digest, so that
//! the Redis server that the replicas share contains neither a secret nor a plain identifier.

use std::fmt;

use sha2::{Digest, Sha256};

use crate::secret::parse_hex;

/// The first 16 bytes of a SHA-256 digest, which is printed as 32 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SharedId([u8; 16]);

/// The kind of object that a [`SharedId`] names. Objects of different kinds have different names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SharedKind {
    /// An API key, by its fingerprint.
    Key,
    /// A workspace, by its identifier, its name, or the fingerprint of its only key.
    Workspace,
    /// A client, by its name.
    Client,
    /// An end user of a client.
    User,
    /// The identifier of a resource.
    Identifier,
}

impl SharedKind {
    fn as_str(self) -> &'static str {
        match self {
            Self::Key => "key",
            Self::Workspace => "workspace",
            Self::Client => "client",
            Self::User => "user",
            Self::Identifier => "identifier",
        }
    }
}

impl SharedId {
    /// Returns the identifier of the object of `kind` that `parts` describe.
    #[must_use]
    pub fn new(kind: SharedKind, parts: &[&[u8]]) -> Self {
        let mut hash = Sha256::new();
        hash.update("keychoir:shared:1:");
        hash.update(kind.as_str());
        for part in parts {
            // The length separates the parts, so that different parts cannot have the same bytes.
            hash.update((part.len() as u64).to_be_bytes());
            hash.update(part);
        }
        let mut id = [0; 16];
        id.copy_from_slice(&hash.finalize()[..16]);
        Self(id)
    }

    /// Parses 32 hexadecimal digits.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        parse_hex(text).map(Self)
    }
}

impl fmt::Display for SharedId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for SharedId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SharedId({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn different_objects_have_different_names() {
        let ids = [
            SharedId::new(SharedKind::Key, &[b"a"]),
            SharedId::new(SharedKind::Client, &[b"a"]),
            SharedId::new(SharedKind::Client, &[b"a", b""]),
            SharedId::new(SharedKind::Client, &[b"a", b"b"]),
            SharedId::new(SharedKind::Client, &[b"ab"]),
        ];
        for (index, id) in ids.iter().enumerate() {
            assert!(!ids[..index].contains(id), "{id} must be unique");
        }
    }

    #[test]
    fn a_printed_name_is_parsed_and_nothing_else() {
        let id = SharedId::new(SharedKind::Workspace, &[b"main"]);
        assert_eq!(SharedId::parse(&id.to_string()), Some(id));
        for wrong in ["", "0", &"g".repeat(32), &"0".repeat(31), &"0".repeat(33), &"é".repeat(16)] {
            assert_eq!(SharedId::parse(wrong), None, "{wrong:?} must not be parsed");
        }
    }
}

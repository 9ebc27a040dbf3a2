//! Encrypts the overlay for other replicas, decrypts the overlays of other replicas, and defines their versions. The
//! overlay contains the changes that operators make at runtime. Also creates the channels between the owner of the
//! overlay (`control/merge.rs`) and the task of the link. The task receives only versions and encrypted bytes.

use std::fmt;

use bytes::Bytes;
use tokio::sync::{mpsc, watch};

use super::envelope::{self, OpenEnvelopeError, SealEnvelopeError, SecretDocument};
use crate::policy::units::UnixMs;
use crate::secret::ApiKey;

/// The first bytes of a sealed overlay. Increment the number when the format changes.
const MAGIC: [u8; 4] = *b"KCO1";

/// The number of bytes of a content hash.
const HASH_BYTES: usize = 16;

/// The number of bytes of the plain header: the magic bytes and the version.
const HEADER_BYTES: usize = MAGIC.len() + 8 + 8 + HASH_BYTES;

/// Maximum number of queued overlays of other replicas. Each overlay contains all changes, so a longer queue would only
/// delay the last overlay.
const MAX_QUEUED_OVERLAYS: usize = 16;

/// The version of an overlay, which is not secret. A merged overlay has a higher version than the overlays from which
/// it was merged, except an overlay with the same content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct OverlayVersion {
    /// The number of changes that led to the overlay.
    pub generation: u64,
    /// The time of the last change, which can be ahead of the clock.
    pub changed_at: UnixMs,
    /// The first bytes of a hash of the content. The hash does not include the generation.
    pub content_hash: [u8; HASH_BYTES],
}

impl fmt::Display for OverlayVersion {
    /// Writes 64 hexadecimal digits. The order of these texts is the order of the versions.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { generation, changed_at, content_hash } = self;
        write!(f, "{generation:016x}{:016x}", changed_at.0)?;
        content_hash.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// An encrypted overlay.
#[derive(Clone, PartialEq, Eq)]
pub struct SealedOverlay {
    version: OverlayVersion,
    bytes: Bytes,
}

impl fmt::Debug for SealedOverlay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SealedOverlay({})", self.version)
    }
}

impl SealedOverlay {
    /// Encrypts an overlay for replicas that have one of these API keys.
    ///
    /// # Errors
    ///
    /// Fails if there is no key, if the document has more than 4 MiB, or if the system provides no random numbers.
    pub fn seal<'k>(
        version: OverlayVersion,
        document: &SecretDocument,
        keys: impl IntoIterator<Item = &'k ApiKey>,
    ) -> Result<Self, SealEnvelopeError> {
        let mut header = MAGIC.to_vec();
        header.extend_from_slice(&version.generation.to_be_bytes());
        header.extend_from_slice(&version.changed_at.0.to_be_bytes());
        header.extend_from_slice(&version.content_hash);
        let bytes = envelope::seal(&header, document, keys)?.into();
        Ok(Self { version, bytes })
    }

    /// Reads the version of an encrypted overlay. The version is certain only after [`SealedOverlay::open`].
    ///
    /// # Errors
    ///
    /// Fails if the bytes do not begin as an encrypted overlay of this format.
    pub fn parse(bytes: impl Into<Bytes>) -> Result<Self, OpenEnvelopeError> {
        let bytes = bytes.into();
        let version = parse_version(&bytes).ok_or(OpenEnvelopeError::UnknownFormat)?;
        Ok(Self { version, bytes })
    }

    /// Returns the version, by which replicas decide whether to store or merge the overlay.
    #[must_use]
    pub fn version(&self) -> OverlayVersion {
        self.version
    }

    /// Returns the encrypted bytes, which contain no secret and no name.
    #[must_use]
    pub fn as_bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// Decrypts the overlay with any of these API keys.
    ///
    /// # Errors
    ///
    /// Fails if none of the keys can open the overlay, or if the bytes or the version were changed.
    pub fn open<'k>(
        &self,
        keys: impl IntoIterator<Item = &'k ApiKey>,
    ) -> Result<SecretDocument, OpenEnvelopeError> {
        envelope::open(HEADER_BYTES, &self.bytes, keys)
    }
}

fn parse_version(bytes: &[u8]) -> Option<OverlayVersion> {
    let rest = bytes.strip_prefix(&MAGIC)?;
    let (generation, rest) = rest.split_first_chunk()?;
    let (changed_at, rest) = rest.split_first_chunk()?;
    let (content_hash, _) = rest.split_first_chunk()?;
    let changed_at = UnixMs(u64::from_be_bytes(*changed_at));
    Some(OverlayVersion {
        generation: u64::from_be_bytes(*generation),
        changed_at,
        content_hash: *content_hash,
    })
}

/// The ends of the channels that the task of the link uses.
#[derive(Debug)]
pub struct OverlayPort {
    /// Contains the overlay of this replica at the start, and after each change.
    pub outgoing: watch::Receiver<SealedOverlay>,
    /// Sends the overlays of other replicas to the owner.
    pub incoming: mpsc::Sender<SealedOverlay>,
}

/// The ends of the channels that the owner of the overlay uses.
#[derive(Debug)]
pub struct OverlayExchange {
    /// Sends the overlay of this replica to Redis.
    pub outgoing: watch::Sender<SealedOverlay>,
    /// Receives the overlays of other replicas.
    pub incoming: mpsc::Receiver<SealedOverlay>,
}

impl OverlayExchange {
    /// Creates the channels. `first` is the overlay of this replica at the start.
    #[must_use]
    pub fn channel(first: SealedOverlay) -> (Self, OverlayPort) {
        let (sender, outgoing) = watch::channel(first);
        let (incoming, receiver) = mpsc::channel(MAX_QUEUED_OVERLAYS);
        (Self { outgoing: sender, incoming: receiver }, OverlayPort { outgoing, incoming })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const KEY: &str = "sk_0123456789abcdef0123456789abcdef0123456789abcdef";

    fn version(generation: u64, changed_at: u64, byte: u8) -> OverlayVersion {
        OverlayVersion { generation, changed_at: UnixMs(changed_at), content_hash: [byte; HASH_BYTES] }
    }

    #[test]
    fn an_overlay_is_parsed_with_its_version() {
        let key = ApiKey::new(KEY).unwrap();
        let version = version(7, 1_800_000_000_000, 9);
        let document = SecretDocument::new(b"text".to_vec());
        let sealed = SealedOverlay::seal(version, &document, [&key]).unwrap();
        let received = SealedOverlay::parse(sealed.as_bytes().clone()).unwrap();
        assert_eq!((received.version(), &received), (version, &sealed));
        assert_eq!(received.open([&key]).unwrap(), document);
        assert_eq!(format!("{received:?}"), format!("SealedOverlay({version})"));
    }

    #[test]
    fn another_version_in_the_header_is_refused() {
        let key = ApiKey::new(KEY).unwrap();
        let sealed = SealedOverlay::seal(version(7, 1, 9), &SecretDocument::new(Vec::new()), [&key]).unwrap();
        let mut bytes = sealed.as_bytes().to_vec();
        bytes[MAGIC.len() + 7] = 8;
        let changed = SealedOverlay::parse(bytes).unwrap();
        assert_eq!(changed.version().generation, 8);
        assert_eq!(changed.open([&key]), Err(OpenEnvelopeError::Tampered));
    }

    #[test]
    fn other_formats_are_refused() {
        for bytes in [&b""[..], b"KCO1", b"KCO2000000000000000000000000000000000000000000"] {
            let parsed = SealedOverlay::parse(Bytes::copy_from_slice(bytes));
            assert_eq!(parsed, Err(OpenEnvelopeError::UnknownFormat));
        }
    }

    proptest! {
        #[test]
        fn the_texts_of_versions_have_the_order_of_the_versions(
            first in (any::<u64>(), any::<u64>(), any::<u8>()),
            second in (any::<u64>(), any::<u64>(), any::<u8>()),
        ) {
            let (first, second) = (version(first.0, first.1, first.2), version(second.0, second.1, second.2));
            prop_assert_eq!(first.cmp(&second), first.to_string().cmp(&second.to_string()));
            prop_assert_eq!(first.to_string().len(), 64);
        }

        #[test]
        fn hostile_bytes_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let bytes = [&MAGIC[..], &bytes].concat();
            if let Ok(sealed) = SealedOverlay::parse(bytes) {
                prop_assert!(sealed.open([&ApiKey::new(KEY).unwrap()]).is_err());
            }
        }
    }
}

//! Formats and parses the JSON document in which replicas send each other their overlays. A sender encrypts the
//! document, and a receiver checks the format, the generation and each entry of the decrypted document.

use ring::digest::{Context, SHA256};
use serde::{Deserialize, Serialize};

use super::overlay_state::OverlayState;
use crate::shared::{OverlayVersion, SecretDocument};

/// The version of the format. Increment it when an entry gets a field, so that an earlier version of Keychoir does
/// not drop the field.
const FORMAT_VERSION: u32 = 1;

/// The prefix of the hashed content, which separates these hashes from others of the same bytes.
const CONTENT_DOMAIN: &[u8] = b"keychoir:overlay:1:";

/// Maximum generation that is accepted from another replica. A greater one is a mistake, and counting further changes
/// could overflow it.
const MAX_GENERATION: u64 = 1 << 53;

/// The overlay of a replica in the form in which it is encrypted and sent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct OverlayDocument {
    format: u32,
    /// The generation of the overlay, a number that increases with each change.
    pub(super) generation: u64,
    pub(super) state: OverlayState,
}

/// The reason why a document of another replica is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum DocumentError {
    /// The document is not JSON with the members of this format, or it has another format version.
    #[error(
        "the changes are not in the format of this version of Keychoir: run the same version on all replicas"
    )]
    UnknownFormat,
    /// The generation, the time of a change, or an entry is invalid.
    #[error("{0}")]
    Invalid(&'static str),
}

impl OverlayDocument {
    pub(super) fn new(generation: u64, state: OverlayState) -> Self {
        Self { format: FORMAT_VERSION, generation, state }
    }

    /// Parses a decrypted document and checks its entries.
    pub(super) fn parse(document: &SecretDocument) -> Result<Self, DocumentError> {
        // The message of the parser could contain a part of the document.
        let document: Self =
            serde_json::from_slice(document.expose()).map_err(|_| DocumentError::UnknownFormat)?;
        if document.format != FORMAT_VERSION {
            return Err(DocumentError::UnknownFormat);
        }
        if document.generation > MAX_GENERATION {
            return Err(DocumentError::Invalid("the number of changes is not plausible"));
        }
        document.state.check_entries().map_err(DocumentError::Invalid)?;
        Ok(document)
    }

    /// Formats the document. Returns it with its version, which contains the first 16 bytes of the hash of the entries.
    pub(super) fn format(&self) -> Result<(OverlayVersion, SecretDocument), serde_json::Error> {
        let document = SecretDocument::new(serde_json::to_vec(self)?);
        let mut hash = Context::new(&SHA256);
        hash.update(CONTENT_DOMAIN);
        hash.update(&serde_json::to_vec(&self.state)?);
        let mut content_hash = [0; 16];
        content_hash
            .iter_mut()
            .zip(hash.finish().as_ref())
            .for_each(|(byte, digest_byte)| *byte = *digest_byte);
        let changed_at = self.state.last_change();
        Ok((OverlayVersion { generation: self.generation, changed_at, content_hash }, document))
    }
}

//! Encrypts a document so that each replica with one of several API keys can read it, and Redis and the network cannot.
//! `overlay.rs` uses it for the overlay.
//!
//! A random data key encrypts the document, and each API key encrypts the data key, so that replicas with different
//! lists of keys need only one key in common. All encryption is ChaCha20-Poly1305. A sealed document has these parts:
//!
//! | part | bytes |
//! |---|---|
//! | header of the caller, in plain text | fixed by the caller |
//! | salt | 32 |
//! | number of recipients | 1 |
//! | for each recipient: its id, the encrypted data key | 16 + 48 |
//! | encrypted document | its length + 16 |
//!
//! A wrapping key is derived from an API key and the random salt (HKDF-SHA256), so that no key encrypts twice and the
//! nonces can be constant. The parts before the encrypted document are authenticated together with it.

use std::fmt;

use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::digest::{Context, SHA256};
use ring::error::Unspecified;
use ring::hkdf::{HKDF_SHA256, Salt};
use ring::rand::{SecureRandom as _, SystemRandom};

use crate::secret::ApiKey;

/// Maximum size of a document in bytes. The file of the overlay has at most 1 MiB, and its document, which is JSON with
/// the keys, at most about twice as much.
pub(super) const MAX_DOCUMENT_BYTES: usize = 4 * 1024 * 1024;

/// Maximum number of API keys that can open a document. Two replicas of one pool have most keys in common, so the first
/// keys are enough. The maximum of recipients takes 4 KiB.
const MAX_RECIPIENTS: usize = 64;

const SALT_BYTES: usize = 32;
const DATA_KEY_BYTES: usize = 32;
const TAG_BYTES: usize = 16;
const ID_BYTES: usize = 16;
const RECIPIENT_BYTES: usize = ID_BYTES + DATA_KEY_BYTES + TAG_BYTES;

/// The domain prefix of the id of a recipient. Increment its number when the format changes.
const RECIPIENT_DOMAIN: &[u8] = b"keychoir:recipient:1:";

/// The purpose of the key that is derived from an API key.
const WRAPPING_KEY_INFO: &[u8] = b"keychoir:envelope:1:data-key";

/// A document in plain text, before its encryption or after its decryption. It contains secrets and cannot be printed.
#[derive(Clone, PartialEq, Eq)]
pub struct SecretDocument(Vec<u8>);

impl SecretDocument {
    /// Creates a document from its plain text.
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }

    /// Returns the plain text.
    #[must_use]
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for SecretDocument {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecretDocument({} bytes)", self.0.len())
    }
}

/// The reason why a document cannot be encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SealEnvelopeError {
    /// No API key could open the document.
    #[error("there is no API key with which another replica could read the changes")]
    NoKey,
    /// The document is too large.
    #[error("the changes have {0} bytes, and at most {MAX_DOCUMENT_BYTES} can be shared")]
    TooLarge(usize),
    /// The system provides no random numbers.
    #[error("the system provides no random numbers")]
    NoRandomNumbers,
}

/// The reason why a document cannot be decrypted. The texts continue a sentence about the changes of another replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenEnvelopeError {
    /// The bytes are not a sealed document of this version.
    #[error("they are not in the format of this version of Keychoir: run the same version on all replicas")]
    UnknownFormat,
    /// None of the API keys can open the document.
    #[error(
        "this replica has none of the keys with which they are encrypted: configure at least one same ElevenLabs API \
         key on all replicas"
    )]
    NoCommonKey,
    /// The document was changed after it was sealed.
    #[error("they were changed in Redis or on the way: check who can write to Redis")]
    Tampered,
}

impl From<Unspecified> for SealEnvelopeError {
    fn from(Unspecified: Unspecified) -> Self {
        Self::NoRandomNumbers
    }
}

/// Encrypts `document` for the first [`MAX_RECIPIENTS`] of these API keys. The sealed document begins with `header` in
/// plain text.
pub(super) fn seal<'k>(
    header: &[u8],
    document: &SecretDocument,
    keys: impl IntoIterator<Item = &'k ApiKey>,
) -> Result<Vec<u8>, SealEnvelopeError> {
    let SecretDocument(plain) = document;
    if plain.len() > MAX_DOCUMENT_BYTES {
        return Err(SealEnvelopeError::TooLarge(plain.len()));
    }
    let random = SystemRandom::new();
    let (mut salt, mut data_key) = ([0; SALT_BYTES], [0; DATA_KEY_BYTES]);
    random.fill(&mut salt)?;
    random.fill(&mut data_key)?;

    let mut recipients: Vec<([u8; ID_BYTES], &ApiKey)> = Vec::new();
    for key in keys {
        let id = recipient_id(key);
        if recipients.len() < MAX_RECIPIENTS && !recipients.iter().any(|(other, _)| *other == id) {
            recipients.push((id, key));
        }
    }
    let count = u8::try_from(recipients.len()).ok().filter(|count| *count > 0);
    let mut sealed = header.to_vec();
    sealed.extend_from_slice(&salt);
    sealed.push(count.ok_or(SealEnvelopeError::NoKey)?);
    for (id, key) in recipients {
        let mut wrapped_key = data_key.to_vec();
        let associated = Aad::from([header, &salt, &id].concat());
        wrapping_key(&salt, key)?.seal_in_place_append_tag(
            single_use_nonce(),
            associated,
            &mut wrapped_key,
        )?;
        sealed.extend_from_slice(&id);
        sealed.extend_from_slice(&wrapped_key);
    }
    let mut encrypted = plain.clone();
    cipher(&data_key)?.seal_in_place_append_tag(
        single_use_nonce(),
        Aad::from(sealed.as_slice()),
        &mut encrypted,
    )?;
    sealed.append(&mut encrypted);
    Ok(sealed)
}

/// Decrypts a document whose header has `header_length` bytes, with any of these API keys.
pub(super) fn open<'k>(
    header_length: usize,
    sealed: &[u8],
    keys: impl IntoIterator<Item = &'k ApiKey>,
) -> Result<SecretDocument, OpenEnvelopeError> {
    let parts = SealedParts::parse(header_length, sealed).ok_or(OpenEnvelopeError::UnknownFormat)?;
    let mut opened = Err(OpenEnvelopeError::NoCommonKey);
    for key in keys {
        let id = recipient_id(key);
        let Some(recipient) =
            parts.recipients.chunks_exact(RECIPIENT_BYTES).find(|recipient| recipient.starts_with(&id))
        else {
            continue;
        };
        // If only the recipient of this key was changed, the next key can still open the document.
        opened = parts.decrypt(recipient, key).map_err(|Unspecified| OpenEnvelopeError::Tampered);
        if opened.is_ok() {
            break;
        }
    }
    opened
}

/// The parts of a sealed document.
struct SealedParts<'a> {
    header: &'a [u8],
    salt: &'a [u8],
    recipients: &'a [u8],
    /// All parts before the encrypted document.
    authenticated: &'a [u8],
    encrypted: &'a [u8],
}

impl<'a> SealedParts<'a> {
    /// Splits a sealed document into its parts. Returns `None` if it is too short, too long or has an impossible
    /// number of recipients.
    fn parse(header_length: usize, sealed: &'a [u8]) -> Option<Self> {
        let (header, rest) = sealed.split_at_checked(header_length)?;
        let (salt, rest) = rest.split_at_checked(SALT_BYTES)?;
        let (count, rest) = rest.split_first()?;
        let count = usize::from(*count);
        let (recipients, encrypted) = rest.split_at_checked(count * RECIPIENT_BYTES)?;
        let length = encrypted.len().checked_sub(TAG_BYTES)?;
        if count == 0 || count > MAX_RECIPIENTS || length > MAX_DOCUMENT_BYTES {
            return None;
        }
        let (authenticated, _) = sealed.split_at_checked(sealed.len() - encrypted.len())?;
        Some(Self { header, salt, recipients, authenticated, encrypted })
    }

    /// Decrypts the data key of `recipient` with its API key, and the document with the data key.
    fn decrypt(&self, recipient: &[u8], key: &ApiKey) -> Result<SecretDocument, Unspecified> {
        let (id, wrapped_key) = recipient.split_at_checked(ID_BYTES).ok_or(Unspecified)?;
        let mut wrapped_key = wrapped_key.to_vec();
        let associated = Aad::from([self.header, self.salt, id].concat());
        let data_key =
            wrapping_key(self.salt, key)?.open_in_place(single_use_nonce(), associated, &mut wrapped_key)?;
        let mut document = self.encrypted.to_vec();
        let authenticated = Aad::from(self.authenticated);
        let plain_length =
            cipher(data_key)?.open_in_place(single_use_nonce(), authenticated, &mut document)?.len();
        document.truncate(plain_length);
        Ok(SecretDocument(document))
    }
}

/// Returns the identifier of an API key in sealed documents. It differs from the fingerprint, so that rows of a
/// database cannot be matched with entries in Redis.
fn recipient_id(key: &ApiKey) -> [u8; ID_BYTES] {
    let mut hash = Context::new(&SHA256);
    hash.update(RECIPIENT_DOMAIN);
    hash.update(key.expose().as_bytes());
    let mut id = [0; ID_BYTES];
    id.iter_mut().zip(hash.finish().as_ref()).for_each(|(byte, digest)| *byte = *digest);
    id
}

/// Derives the key that encrypts the data key for the holders of an API key.
fn wrapping_key(salt: &[u8], key: &ApiKey) -> Result<LessSafeKey, Unspecified> {
    let secret = Salt::new(HKDF_SHA256, salt).extract(key.expose().as_bytes());
    let derived = secret.expand(&[WRAPPING_KEY_INFO], &CHACHA20_POLY1305)?;
    Ok(LessSafeKey::new(UnboundKey::from(derived)))
}

/// Returns the cipher of the document.
fn cipher(data_key: &[u8]) -> Result<LessSafeKey, Unspecified> {
    Ok(LessSafeKey::new(UnboundKey::new(&CHACHA20_POLY1305, data_key)?))
}

/// Returns a constant nonce, for a key that encrypts only once. The data key is random, and a wrapping key depends on
/// the random salt.
fn single_use_nonce() -> Nonce {
    Nonce::assume_unique_for_key([0; NONCE_LEN])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HEADER: &[u8] = b"head";

    fn key(number: usize) -> ApiKey {
        ApiKey::new(&format!("sk_{number:048x}")).unwrap()
    }

    fn document(text: &str) -> SecretDocument {
        SecretDocument::new(text.as_bytes().to_vec())
    }

    fn seal_for(keys: &[ApiKey]) -> Vec<u8> {
        seal(HEADER, &document("secret text"), keys).unwrap()
    }

    fn open_with(sealed: &[u8], keys: &[ApiKey]) -> Result<SecretDocument, OpenEnvelopeError> {
        open(HEADER.len(), sealed, keys)
    }

    #[test]
    fn any_common_key_opens_a_document() {
        let sealed = seal_for(&[key(1), key(2), key(2)]);
        for keys in [vec![key(1)], vec![key(2)], vec![key(7), key(2)]] {
            assert_eq!(open_with(&sealed, &keys).unwrap().expose(), b"secret text");
        }
    }

    #[test]
    fn another_key_and_no_key_do_not_open_a_document() {
        let sealed = seal_for(&[key(1)]);
        for keys in [vec![], vec![key(2)]] {
            assert_eq!(open_with(&sealed, &keys), Err(OpenEnvelopeError::NoCommonKey));
        }
        // A recipient whose id is changed to that of another key cannot be opened with the other key.
        let mut renamed = sealed.clone();
        let start = HEADER.len() + SALT_BYTES + 1;
        renamed[start..start + ID_BYTES].copy_from_slice(&recipient_id(&key(2)));
        assert_eq!(open_with(&renamed, &[key(2)]), Err(OpenEnvelopeError::Tampered));
    }

    #[test]
    fn a_document_contains_neither_the_text_nor_a_key() {
        let sealed = seal_for(&[key(1)]);
        let contains = |needle: &[u8]| sealed.windows(needle.len()).any(|window| window == needle);
        assert!(!contains(b"secret text"), "the text must be encrypted");
        assert!(!contains(key(1).expose().as_bytes()), "a sealed document must not contain a key");
        let digits = key(1).fingerprint().to_string();
        let fingerprint: Vec<u8> =
            (0..8).map(|index| u8::from_str_radix(&digits[2 * index..2 * index + 2], 16).unwrap()).collect();
        assert!(!contains(&fingerprint), "the id of a recipient must differ from the fingerprint");
        assert_ne!(sealed, seal_for(&[key(1)]), "each document must have its own data key");
    }

    #[test]
    fn a_document_that_was_changed_or_cut_is_refused() {
        let sealed = seal_for(&[key(1), key(2)]);
        for index in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[index] ^= 1;
            assert!(open_with(&changed, &[key(1)]).is_err(), "byte {index} must be authenticated");
            assert!(open_with(&sealed[..index], &[key(1)]).is_err(), "{index} bytes must not suffice");
        }
        let longer = [&sealed[..], b"x"].concat();
        assert_eq!(open_with(&longer, &[key(1)]), Err(OpenEnvelopeError::Tampered));
    }

    #[test]
    fn at_most_64_keys_are_recipients() {
        let keys: Vec<ApiKey> = (0..65).map(key).collect();
        let sealed = seal_for(&keys);
        assert!(open_with(&sealed, &keys[63..64]).is_ok(), "the 64th key must open the document");
        assert_eq!(open_with(&sealed, &keys[64..]), Err(OpenEnvelopeError::NoCommonKey));
        assert_eq!(seal(HEADER, &document(""), &[]), Err(SealEnvelopeError::NoKey));
    }

    #[test]
    fn a_document_above_the_maximum_is_neither_sealed_nor_opened() {
        let fits = SecretDocument::new(vec![b'a'; MAX_DOCUMENT_BYTES]);
        let sealed = seal(HEADER, &fits, &[key(1)]).unwrap();
        assert_eq!(open_with(&sealed, &[key(1)]).unwrap(), fits);
        let longer = [&sealed[..], b"x"].concat();
        assert_eq!(open_with(&longer, &[key(1)]), Err(OpenEnvelopeError::UnknownFormat));
        let error = seal(HEADER, &SecretDocument::new(vec![b'a'; MAX_DOCUMENT_BYTES + 1]), &[key(1)]);
        assert_eq!(error, Err(SealEnvelopeError::TooLarge(MAX_DOCUMENT_BYTES + 1)));
    }

    #[test]
    fn an_opened_document_cannot_be_printed() {
        assert_eq!(format!("{:?}", document("secret")), "SecretDocument(6 bytes)");
    }

    proptest! {
        #[test]
        fn every_document_is_opened_as_it_was_sealed(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let document = SecretDocument::new(bytes);
            let sealed = seal(HEADER, &document, &[key(1)]).unwrap();
            prop_assert_eq!(open_with(&sealed, &[key(1)]).unwrap(), document);
        }

        #[test]
        fn hostile_bytes_are_refused(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..300),
            count in 0..4_u8,
            is_named in any::<bool>(),
        ) {
            let start = HEADER.len() + SALT_BYTES;
            if let Some(byte) = bytes.get_mut(start) {
                *byte = count;
            }
            if is_named && bytes.len() > start + 1 + ID_BYTES {
                bytes[start + 1..start + 1 + ID_BYTES].copy_from_slice(&recipient_id(&key(1)));
            }
            prop_assert!(open_with(&bytes, &[key(1)]).is_err());
        }
    }
}

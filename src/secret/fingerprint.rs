//! Digests that identify secrets where the secrets themselves must not appear. Keys and client
//! tokens have separate types, so that neither can be compared with, or stored as, the other.
//!
//! The plain SHA-256 of a key is a secret itself: ElevenLabs uses it as the HS256
//! secret when it signs calls to the key owner's server. A key's digest therefore has a domain prefix, and the plain digest
//! exists only inside [`Fingerprint::retired`], which recognizes database rows that an earlier
//! version wrote.

use std::fmt;

use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq;

/// The domain prefix of a key's digest. The number grows when the format changes.
const KEY_DOMAIN: &[u8] = b"keychoir:key:1:";
/// The domain prefix of an earlier version's plain digest.
const RETIRED_DOMAIN: &[u8] = b"keychoir:key:0:";

/// 32 bytes, printed as 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Digest([u8; 32]);

impl Digest {
    fn of(parts: &[&[u8]]) -> Self {
        let mut hash = Sha256::new();
        parts.iter().for_each(|part| hash.update(part));
        Self(hash.finalize().into())
    }

    fn parse(hex: &str) -> Option<Self> {
        let digits = hex.as_bytes();
        if digits.len() != 64 {
            return None;
        }
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            let high = char::from(pair[0]).to_digit(16)?;
            let low = char::from(pair[1]).to_digit(16)?;
            *byte = u8::try_from(high * 16 + low).ok()?;
        }
        Some(Self(bytes))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Identifies a key in the database, the mirror and comparisons (`api_key_hash`): SHA-256 of
/// `keychoir:key:1:` and the key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fingerprint(Digest);

impl Fingerprint {
    /// The fingerprint of a key.
    #[must_use]
    pub fn of(key: &str) -> Self {
        Self(Digest::of(&[KEY_DOMAIN, key.as_bytes()]))
    }

    /// Parses 64 hexadecimal digits, as [`Display`](fmt::Display) prints them.
    #[must_use]
    pub fn parse(hex: &str) -> Option<Self> {
        Digest::parse(hex).map(Self)
    }

    /// Replaces a plain digest that an earlier version has written: SHA-256 of `keychoir:key:0:`
    /// and the digest's 64 digits. `None` for any other text.
    pub(crate) fn retired(plain: &str) -> Option<Self> {
        let is_digest =
            plain.len() == 64 && plain.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        is_digest.then(|| Self(Digest::of(&[RETIRED_DOMAIN, plain.as_bytes()])))
    }

    /// The fingerprint that [`retired`](Self::retired) gives for the plain digest of `key`: rows with it belong to
    /// the key.
    pub(crate) fn retired_of(key: &str) -> Option<Self> {
        Self::retired(&Digest::of(&[key.as_bytes()]).to_string())
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// Identifies a client's token: its plain SHA-256, which can be made with `sha256sum`. The token is
/// Keychoir's own, so its digest signs nothing.
#[derive(Clone, Copy, Eq)]
pub struct TokenFingerprint(Digest);

/// In constant time: the time of a comparison must not reveal how much of a token is right.
impl PartialEq for TokenFingerprint {
    fn eq(&self, other: &Self) -> bool {
        self.0.0.ct_eq(&other.0.0).into()
    }
}

impl TokenFingerprint {
    /// The fingerprint of a token.
    #[must_use]
    pub fn of(token: &str) -> Self {
        Self(Digest::of(&[token.as_bytes()]))
    }

    /// Parses 64 hexadecimal digits, as [`Display`](fmt::Display) prints them.
    #[must_use]
    pub fn parse(hex: &str) -> Option<Self> {
        Digest::parse(hex).map(Self)
    }

    /// Its first eight bytes, as an index.
    #[must_use]
    pub fn first_word(&self) -> u64 {
        self.0.0.first_chunk().map_or(0, |word| u64::from_ne_bytes(*word))
    }
}

impl fmt::Display for TokenFingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for TokenFingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `printf abc | sha256sum`.
    const PLAIN: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
    /// `printf keychoir:key:1:abc | sha256sum`.
    const OF_KEY: &str = "c2e59b5b0fc296c72e13bb72f2b8192fb16d53055d938b460803b24f65d9912b";

    #[test]
    fn a_key_and_a_token_of_one_text_have_different_fingerprints() {
        assert_eq!(Fingerprint::of("abc").to_string(), OF_KEY);
        assert_eq!(TokenFingerprint::of("abc").to_string(), PLAIN);
        assert_eq!(format!("{:?}", Fingerprint::of("abc")), OF_KEY);
    }

    #[test]
    fn only_fingerprints_are_parsed() {
        assert_eq!(Fingerprint::parse(OF_KEY), Some(Fingerprint::of("abc")));
        assert_eq!(TokenFingerprint::parse(PLAIN).unwrap(), TokenFingerprint::of("abc"));
        assert_ne!(TokenFingerprint::of("abd"), TokenFingerprint::of("abc"));
        for text in [&PLAIN[1..], &PLAIN.replace('b', "g"), "", "own"] {
            assert_eq!((Fingerprint::parse(text), TokenFingerprint::parse(text)), (None, None), "{text}");
        }
    }

    #[test]
    fn a_retired_digest_is_found_by_its_key_and_does_not_reveal_it() {
        let retired = Fingerprint::retired(PLAIN).unwrap();
        assert_eq!(Fingerprint::retired_of("abc"), Some(retired));
        assert_ne!(retired.to_string(), PLAIN);
        assert_ne!(retired, Fingerprint::of("abc"));
        for text in ["", "own", "studio", &PLAIN[1..], &PLAIN.to_uppercase()] {
            assert_eq!(Fingerprint::retired(text), None, "{text}");
        }
    }
}

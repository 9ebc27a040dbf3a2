//! Computes the digests that identify API keys, tokens and end users in logs, in files and in the database. Each of
//! them has a separate type, so that a digest of a key cannot be compared with, or stored as, a digest of a token.
//!
//! The plain SHA-256 of an API key is itself a secret: ElevenLabs uses it as the HS256 secret when it
//! signs calls to the key owner's server. A key is therefore hashed with a domain prefix. The plain digest of a key is
//! computed only to recognize the database rows of an earlier version ([`Fingerprint::from_plain_digest`]).

use std::fmt;

use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq;

/// The domain prefix of an API key. Increment its number when the format changes.
const KEY_DOMAIN: &[u8] = b"keychoir:key:1:";
/// The domain prefix with which a plain digest of an earlier version is hashed.
const PLAIN_DIGEST_DOMAIN: &[u8] = b"keychoir:key:0:";

/// A SHA-256 digest, which is printed as 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Digest([u8; 32]);

impl Digest {
    fn new(parts: &[&[u8]]) -> Self {
        let mut hash = Sha256::new();
        parts.iter().for_each(|part| hash.update(part));
        Self(hash.finalize().into())
    }

    fn parse(hex: &str) -> Option<Self> {
        parse_hex(hex).map(Self)
    }
}

/// Parses two hexadecimal digits for each of `N` bytes. Returns `None` for any other text.
#[must_use]
pub fn parse_hex<const N: usize>(hex: &str) -> Option<[u8; N]> {
    let digits = hex.as_bytes();
    if digits.len() != 2 * N {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let (high, low) = (char::from(pair[0]).to_digit(16)?, char::from(pair[1]).to_digit(16)?);
        *byte = u8::try_from(high * 16 + low).ok()?;
    }
    Some(bytes)
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Identifies an API key in the database and in the mirror (`api_key_hash`): the SHA-256 of
/// `keychoir:key:1:` followed by the key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fingerprint(Digest);

/// Number of digits of a key's fingerprint that are its id in the admin API.
pub const KEY_ID_DIGITS: usize = 12;

impl Fingerprint {
    /// Returns the id of the key in the admin API: the first 12 digits of the fingerprint.
    #[must_use]
    pub fn key_id(&self) -> String {
        // Formatting the whole fingerprint would write 52 unused digits for every key that is compared.
        let digit = |value: u8| char::from(b"0123456789abcdef"[usize::from(value & 0xf)]);
        self.0.0[..KEY_ID_DIGITS / 2].iter().flat_map(|byte| [digit(byte >> 4), digit(*byte)]).collect()
    }

    /// Computes the fingerprint of an API key.
    #[must_use]
    pub fn new(key: &str) -> Self {
        Self(Digest::new(&[KEY_DOMAIN, key.as_bytes()]))
    }

    /// Parses the 64 hexadecimal digits that [`Display`](fmt::Display) prints. Returns `None` for any other text.
    #[must_use]
    pub fn parse(hex: &str) -> Option<Self> {
        Digest::parse(hex).map(Self)
    }

    /// Replaces a plain digest that an earlier version stored with the SHA-256 of `keychoir:key:0:` and
    /// the 64 lower-case digits. Returns `None` if `plain` is not such a digest.
    pub(crate) fn from_plain_digest(plain: &str) -> Option<Self> {
        let is_digest =
            plain.len() == 64 && plain.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        is_digest.then(|| Self(Digest::new(&[PLAIN_DIGEST_DOMAIN, plain.as_bytes()])))
    }

    /// Returns the fingerprint that replaces the plain digest of `key`. Rows with this fingerprint belong to the key.
    pub(crate) fn replaced_plain_digest(key: &str) -> Option<Self> {
        Self::from_plain_digest(&Digest::new(&[key.as_bytes()]).to_string())
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

/// Identifies a client token: its plain SHA-256, which an operator can compute with `sha256sum`. The
/// digest needs no domain prefix, because only Keychoir accepts the token.
#[derive(Clone, Copy, Eq)]
pub struct TokenFingerprint(Digest);

/// Compares in constant time, so that the duration does not reveal how much of a token is correct.
impl PartialEq for TokenFingerprint {
    fn eq(&self, other: &Self) -> bool {
        self.0.0.ct_eq(&other.0.0).into()
    }
}

impl TokenFingerprint {
    /// Computes the fingerprint of a client token.
    #[must_use]
    pub fn new(token: &str) -> Self {
        Self(Digest::new(&[token.as_bytes()]))
    }

    /// Parses the 64 hexadecimal digits that [`Display`](fmt::Display) prints. Returns `None` for any other text.
    #[must_use]
    pub fn parse(hex: &str) -> Option<Self> {
        Digest::parse(hex).map(Self)
    }

    /// Returns the first eight bytes, as the key of a lookup table.
    #[must_use]
    pub fn index(&self) -> u64 {
        self.0.0.first_chunk().map_or(0, |bytes| u64::from_ne_bytes(*bytes))
    }
}

impl fmt::Display for TokenFingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// Does not print the digest, because an operator may have chosen a token that can be guessed from it.
impl fmt::Debug for TokenFingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TokenFingerprint(...)")
    }
}

/// Identifies the admin token: its SHA-256. The type is separate, so that a client token never gives access to the
/// admin API.
#[derive(Clone, Copy, Eq)]
pub struct AdminTokenFingerprint(Digest);

/// Compares in constant time, so that the duration does not reveal how much of a token is correct.
impl PartialEq for AdminTokenFingerprint {
    fn eq(&self, other: &Self) -> bool {
        self.0.0.ct_eq(&other.0.0).into()
    }
}

impl AdminTokenFingerprint {
    /// Computes the fingerprint of an admin token.
    #[must_use]
    pub fn new(token: &str) -> Self {
        Self(Digest::new(&[token.as_bytes()]))
    }
}

/// Does not print the digest, because an operator may have chosen a token that can be guessed from it.
impl fmt::Debug for AdminTokenFingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AdminTokenFingerprint(...)")
    }
}

/// The domain prefix of a session token. Increment its number when the format changes.
const SESSION_DOMAIN: &[u8] = b"keychoir:session:1:";

/// Identifies a session of the dashboard, or the code that starts one: the SHA-256 of `keychoir:session:1:`, the digest
/// of the admin token, and the random session token.
///
/// The digest of the admin token is included, so that a change of the admin token ends all sessions.
#[derive(Clone, Copy, Eq)]
pub struct SessionTokenFingerprint(Digest);

/// Compares in constant time, so that the duration does not reveal how much of a token is correct.
impl PartialEq for SessionTokenFingerprint {
    fn eq(&self, other: &Self) -> bool {
        self.0.0.ct_eq(&other.0.0).into()
    }
}

impl SessionTokenFingerprint {
    /// Computes the fingerprint of a session token that is valid while `admin_token` is the admin token.
    #[must_use]
    pub fn new(session_token: &str, admin_token: &AdminTokenFingerprint) -> Self {
        Self(Digest::new(&[SESSION_DOMAIN, &admin_token.0.0, session_token.as_bytes()]))
    }

    /// Parses the 64 hexadecimal digits that [`Display`](fmt::Display) prints. Returns `None` for any other text.
    #[must_use]
    pub fn parse(hex: &str) -> Option<Self> {
        Digest::parse(hex).map(Self)
    }
}

impl fmt::Display for SessionTokenFingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for SessionTokenFingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SessionTokenFingerprint(...)")
    }
}

/// The domain prefix of an end user. Increment its number when the format changes.
const USER_DOMAIN: &[u8] = b"keychoir:user:1:";

/// Identifies an end user of a client: the first 8 bytes of the SHA-256 of `keychoir:user:1:`, the client's
/// name, a colon and the user's id. Printed as 16 hexadecimal digits.
///
/// The name of the client makes the users of two clients different, even if their ids are equal. 64 bits
/// are enough: a user who finds two ids with equal fingerprints only makes both ids share one quota.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UserFingerprint(u64);

impl UserFingerprint {
    /// Computes the fingerprint of the user with the given `id`. The name of a client contains no colon.
    #[must_use]
    pub fn new(client: &str, id: &[u8]) -> Self {
        let Digest(bytes) = Digest::new(&[USER_DOMAIN, client.as_bytes(), b":", id]);
        Self(bytes.first_chunk().map_or(0, |start| u64::from_be_bytes(*start)))
    }
}

impl fmt::Display for UserFingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for UserFingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `printf abc | sha256sum`.
    const PLAIN: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
    /// `printf keychoir:key:1:abc | sha256sum`.
    const KEY_FINGERPRINT: &str = "c2e59b5b0fc296c72e13bb72f2b8192fb16d53055d938b460803b24f65d9912b";

    #[test]
    fn an_api_key_and_a_token_with_the_same_value_have_different_fingerprints() {
        assert_eq!(Fingerprint::new("abc").to_string(), KEY_FINGERPRINT);
        assert_eq!(TokenFingerprint::new("abc").to_string(), PLAIN);
        assert_eq!(format!("{:?}", Fingerprint::new("abc")), KEY_FINGERPRINT);
    }

    #[test]
    fn a_user_is_identified_by_its_client_and_its_id() {
        // `printf keychoir:user:1:app:alice | sha256sum | cut -c1-16`.
        assert_eq!(UserFingerprint::new("app", b"alice").to_string(), "4f3bb061f4cefa80");
        assert_eq!(format!("{:?}", UserFingerprint::new("app", b"alice")), "4f3bb061f4cefa80");
        for (client, id) in [("app", "alicf"), ("web", "alice"), ("app", "")] {
            assert_ne!(UserFingerprint::new(client, id.as_bytes()), UserFingerprint::new("app", b"alice"));
        }
    }

    #[test]
    fn only_the_same_admin_token_is_equal() {
        assert_eq!(AdminTokenFingerprint::new("abc"), AdminTokenFingerprint::new("abc"));
        assert_ne!(AdminTokenFingerprint::new("abc"), AdminTokenFingerprint::new("abd"));
    }

    #[test]
    fn the_digest_of_a_token_is_not_printed_for_debugging() {
        let debug = format!("{:?} {:?}", AdminTokenFingerprint::new("abc"), TokenFingerprint::new("abc"));
        assert_eq!(debug, "AdminTokenFingerprint(...) TokenFingerprint(...)");
    }

    #[test]
    fn only_fingerprints_are_parsed() {
        assert_eq!(Fingerprint::parse(KEY_FINGERPRINT), Some(Fingerprint::new("abc")));
        assert_eq!(TokenFingerprint::parse(PLAIN).unwrap(), TokenFingerprint::new("abc"));
        assert_ne!(TokenFingerprint::new("abd"), TokenFingerprint::new("abc"));
        for value in [&PLAIN[1..], &PLAIN.replace('b', "g"), "", "own"] {
            let parsed = (Fingerprint::parse(value), TokenFingerprint::parse(value));
            assert_eq!(parsed, (None, None), "no fingerprint must be parsed from {value:?}");
        }
    }

    #[test]
    fn a_replaced_plain_digest_is_found_by_its_key_and_does_not_reveal_it() {
        let replaced = Fingerprint::from_plain_digest(PLAIN).unwrap();
        assert_eq!(Fingerprint::replaced_plain_digest("abc"), Some(replaced));
        assert_ne!(replaced.to_string(), PLAIN);
        assert_ne!(replaced, Fingerprint::new("abc"));
        for value in ["", "own", "studio", &PLAIN[1..], &PLAIN.to_uppercase()] {
            assert_eq!(Fingerprint::from_plain_digest(value), None, "{value:?} must not be replaced");
        }
    }
}

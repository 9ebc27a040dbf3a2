//! Defines types for secrets whose values cannot be printed, computes their fingerprints, generates tokens, and removes
//! keys from responses (`redactor`). An API key is displayed as its short form or its fingerprint. Its value leaves
//! this module only through [`ApiKey::expose`], so that only the callers of this method need review.

mod fingerprint;
mod proxy_credentials;
mod redactor;
mod redis_credentials;
mod supabase_key;
mod token;

use std::fmt;
use std::sync::Arc;

pub use fingerprint::{
    AdminTokenFingerprint, Fingerprint, KEY_ID_DIGITS, SessionTokenFingerprint, TokenFingerprint,
    UserFingerprint, parse_hex,
};
pub use proxy_credentials::ProxyCredentials;
pub use redactor::{RedactedChunk, Redactor, StreamRedaction};
pub use redis_credentials::RedisCredentials;
pub use supabase_key::{InvalidSupabaseKey, SupabaseKey, SupabaseKeyForm};
pub use token::generate_token;

/// The short form of an API key: its first and last characters.
///
/// The short form of a key of at least 48 characters consists of the first 11 and the last 5 characters. The short form
/// of a shorter key consists of the first 4 and the last 4 characters. If more characters of an old key of 32
/// hexadecimal digits appeared next to its hash, the key could be found by brute force. The short form of a key of
/// fewer than 16 characters contains no character of the key.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ShortKey(Arc<str>);

impl ShortKey {
    /// Abbreviates a key, or a placeholder for a key.
    pub(crate) fn new(key: &str) -> Self {
        let length = key.chars().count();
        let (prefix_length, suffix_length) = match length {
            48.. => (11, 5),
            16..48 => (4, 4),
            _ => (0, 0),
        };
        let mut short: String = key.chars().take(prefix_length).collect();
        short.push_str("...");
        short.extend(key.chars().skip(length - suffix_length));
        Self(short.into())
    }

    /// Returns the short form as it appears in the status document and the log.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ShortKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ShortKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// An API key of the provider. `Debug` prints only its short form.
#[derive(Clone)]
pub struct ApiKey {
    value: Arc<str>,
    short: ShortKey,
    fingerprint: Fingerprint,
}

impl ApiKey {
    /// Validates a configured key.
    ///
    /// # Errors
    ///
    /// Fails if the key is empty or contains characters other than visible ASCII, which are not valid in a
    /// header. The provider documents no format, so nothing else is checked.
    pub fn new(value: &str) -> Result<Self, InvalidApiKey> {
        if value.is_empty() {
            return Err(InvalidApiKey::Empty);
        }
        if !is_visible_ascii(value) {
            return Err(InvalidApiKey::NotVisibleAscii);
        }
        Ok(Self { value: value.into(), short: ShortKey::new(value), fingerprint: Fingerprint::new(value) })
    }

    /// Returns the plain text of the key. It may be sent to the provider, written to a key file, encrypted for other
    /// replicas, and hashed, but neither printed nor logged.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.value
    }

    /// Returns the short form, which may be displayed.
    #[must_use]
    pub fn short(&self) -> &ShortKey {
        &self.short
    }

    /// Returns the digest that identifies the key, for example in the database and in the mirror.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ApiKey({})", self.short)
    }
}

/// The reason why a configured value is not a valid API key. The error contains no part of the value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidApiKey {
    /// The value is empty.
    #[error("the key is empty")]
    Empty,
    /// The value contains characters that are invalid in a header.
    #[error("the key has an invalid character (a space, a control character or a letter beyond ASCII)")]
    NotVisibleAscii,
}

/// Returns whether `value` is a non-empty string of visible ASCII characters, which is valid in a header.
fn is_visible_ascii(value: &str) -> bool {
    !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_graphic())
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: &str = "sk_6c036526aaaabbbbccccddddeeeeffff0000111122223333d452b";

    /// Asserts the short form of a key.
    #[track_caller]
    fn check_short_form(key: &str, expected: &str) {
        assert_eq!(ApiKey::new(key).unwrap().short().as_str(), expected);
    }

    #[test]
    fn a_short_form_shows_sixteen_characters_of_a_key_of_48_characters() {
        check_short_form(LONG, "sk_6c036526...d452b");
        check_short_form(&LONG[..48], "sk_6c036526...22223");
        check_short_form(&LONG[..47], "sk_6...2222");
        check_short_form("0123456789abcdef0123456789abcdef", "0123...cdef");
    }

    #[test]
    fn a_short_form_shows_no_characters_of_a_key_of_fewer_than_16_characters() {
        check_short_form("0123456789abcdef", "0123...cdef");
        check_short_form("0123456789abcde", "...");
        check_short_form("x", "...");
    }

    #[test]
    fn debug_does_not_print_a_key() {
        let key = ApiKey::new(LONG).unwrap();
        assert_eq!(format!("{key:?} {key:#?}"), "ApiKey(sk_6c036526...d452b) ApiKey(sk_6c036526...d452b)");
    }

    #[test]
    fn a_key_that_is_invalid_in_a_header_is_rejected() {
        assert_eq!(ApiKey::new("").unwrap_err(), InvalidApiKey::Empty);
        for value in ["sk a", "sk\r\nx: y", "sk\u{e9}", "sk\u{7f}"] {
            assert_eq!(ApiKey::new(value).unwrap_err(), InvalidApiKey::NotVisibleAscii);
        }
    }
}

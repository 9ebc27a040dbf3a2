//! Types of secrets, which cannot be printed. A key is shown as its short form or its fingerprint,
//! and its value leaves this module only through [`ApiKey::expose`], which has few callers to
//! review.

mod fingerprint;
mod redactor;
mod supabase_key;

use std::fmt;
use std::sync::Arc;

pub use fingerprint::{Fingerprint, TokenFingerprint};
pub use redactor::{Passed, Redaction, Redactor};
pub use supabase_key::{ServiceKey, ServiceKeyForm, UnusableServiceKey};

/// The short form of a key: its first and last characters.
///
/// It shows 11 and 5 characters of keys of 48 characters and more, 4 and 4 of shorter ones: an old key of 32
/// hexadecimal digits could be found by brute force if more of it were shown beside its hash. For a
/// key too short to hide anything behind eight characters, nothing is shown.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ShortKey(Arc<str>);

impl ShortKey {
    /// The short form of a key, or of a placeholder for a key.
    pub(crate) fn of(key: &str) -> Self {
        let count = key.chars().count();
        let (head, tail) = match count {
            48.. => (11, 5),
            16..48 => (4, 4),
            _ => (0, 0),
        };
        let mut short: String = key.chars().take(head).collect();
        short.push_str("...");
        short.extend(key.chars().skip(count - tail));
        Self(short.into())
    }

    /// The text, as in the status document and the log.
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

/// A provider key. Prints as its short form only.
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
    /// When it is invalid in a header: empty, or with anything but visible ASCII. The format is not
    /// checked further, because the provider documents none.
    pub fn new(value: &str) -> Result<Self, UnusableKey> {
        if value.is_empty() {
            return Err(UnusableKey::Empty);
        }
        if !value.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(UnusableKey::NotVisibleAscii);
        }
        Ok(Self { value: value.into(), short: ShortKey::of(value), fingerprint: Fingerprint::of(value) })
    }

    /// The plain text of the key, only for the header of an upstream request.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.value
    }

    /// Its short form, which may be shown.
    #[must_use]
    pub fn short(&self) -> &ShortKey {
        &self.short
    }

    /// Its fingerprint, which identifies it where the key must not appear.
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

/// The reason why a configured text cannot be a key. Contains nothing of the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnusableKey {
    /// The text is empty.
    #[error("the key is empty")]
    Empty,
    /// The text contains characters that are invalid in a header.
    #[error("the key has an invalid character (a space, a control character or a letter beyond ASCII)")]
    NotVisibleAscii,
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: &str = "sk_6c036526aaaabbbbccccddddeeeeffff0000111122223333d452b";

    #[track_caller]
    fn check_short(key: &str, expected: &str) {
        assert_eq!(ApiKey::new(key).unwrap().short().as_str(), expected);
    }

    #[test]
    fn a_short_key_shows_eleven_and_five_from_48_characters_on() {
        check_short(LONG, "sk_6c036526...d452b");
        check_short(&LONG[..48], "sk_6c036526...22223");
        check_short(&LONG[..47], "sk_6...2222");
        check_short("0123456789abcdef0123456789abcdef", "0123...cdef");
    }

    #[test]
    fn a_tiny_key_shows_nothing() {
        check_short("0123456789abcdef", "0123...cdef");
        check_short("0123456789abcde", "...");
        check_short("x", "...");
    }

    #[test]
    fn a_key_cannot_be_printed() {
        let key = ApiKey::new(LONG).unwrap();
        assert_eq!(format!("{key:?} {key:#?}"), "ApiKey(sk_6c036526...d452b) ApiKey(sk_6c036526...d452b)");
    }

    #[test]
    fn a_text_that_is_invalid_in_a_header_is_refused() {
        assert_eq!(ApiKey::new("").unwrap_err(), UnusableKey::Empty);
        for text in ["sk a", "sk\r\nx: y", "sk\u{e9}", "sk\u{7f}"] {
            assert_eq!(ApiKey::new(text).unwrap_err(), UnusableKey::NotVisibleAscii);
        }
    }
}

//! A per-thread cache of parsed header names. Most responses have the same headers, and a cache lookup is
//! cheaper than validating and allocating a name.

use std::cell::RefCell;

use http::HeaderName;
use http::header::InvalidHeaderName;

/// Number of slots in the cache of a thread.
const SLOTS: usize = 64;
/// Maximum length of a cached name. The provider has no longer ones.
const MAX_NAME_BYTES: usize = 64;

thread_local! {
    static CACHE: RefCell<[Option<HeaderName>; SLOTS]> = const { RefCell::new([const { None }; SLOTS]) };
}

/// Parses a header name, regardless of case.
///
/// # Errors
///
/// Fails when the bytes are not a valid header name.
pub(super) fn header_name(bytes: &[u8]) -> Result<HeaderName, InvalidHeaderName> {
    CACHE.with_borrow_mut(|cache| {
        let slot = &mut cache[slot_index(bytes)];
        if let Some(name) = slot.as_ref().filter(|name| is_same(name.as_str().as_bytes(), bytes)) {
            return Ok(name.clone());
        }
        let name = HeaderName::from_bytes(bytes)?;
        if bytes.len() <= MAX_NAME_BYTES {
            *slot = Some(name.clone());
        }
        Ok(name)
    })
}

/// Compares the exact bytes first, because most names are sent in lower case.
fn is_same(cached_name: &[u8], bytes: &[u8]) -> bool {
    cached_name == bytes || cached_name.eq_ignore_ascii_case(bytes)
}

/// Hashes the length of a name and three of its characters, regardless of case.
fn slot_index(bytes: &[u8]) -> usize {
    let [first, .., last] = bytes else { return 0 };
    let hash = [*first, bytes[bytes.len() / 2], *last]
        .iter()
        .fold(bytes.len(), |hash, byte| hash.wrapping_mul(31).wrapping_add(usize::from(byte | 0x20)));
    hash % SLOTS
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_cached_name_equals_the_parsed_name(
            names in prop::collection::vec("[a-cA-C_ -]{0,3}|content-(type|LENGTH)|[x]{60,70}|\\PC{0,3}", 1..40),
        ) {
            for name in names.iter().chain(&names) {
                let expected = HeaderName::from_bytes(name.as_bytes());
                prop_assert_eq!(header_name(name.as_bytes()).ok(), expected.ok());
            }
        }
    }

    #[test]
    fn a_long_name_is_not_cached() {
        let long = "y".repeat(MAX_NAME_BYTES + 1);
        assert_eq!(header_name(long.as_bytes()).unwrap(), *long);
        assert!(
            CACHE.with_borrow(|cached| cached
                .iter()
                .flatten()
                .all(|name| name.as_str().len() <= MAX_NAME_BYTES))
        );
    }
}

//! Caches the parsed header names of responses, with one cache per thread. Most responses have the same headers, and a
//! cache lookup is cheaper than the validation and allocation of a name.

use std::cell::RefCell;

use http::HeaderName;
use http::header::InvalidHeaderName;

/// Number of slots in the cache of a thread.
const CACHE_SLOTS: usize = 64;
/// Maximum length of a cached name. All names that the provider sends are shorter.
const MAX_CACHED_NAME_BYTES: usize = 64;

thread_local! {
    static CACHE: RefCell<[Option<HeaderName>; CACHE_SLOTS]> = const { RefCell::new([const { None }; CACHE_SLOTS]) };
}

/// Parses a header name, ignoring case. Returns the name from the cache if the cache contains it.
///
/// # Errors
///
/// Fails when the bytes are not a valid header name.
pub(super) fn parse_header_name(bytes: &[u8]) -> Result<HeaderName, InvalidHeaderName> {
    CACHE.with_borrow_mut(|cache| {
        let slot = &mut cache[slot_index(bytes)];
        if let Some(name) = slot.as_ref().filter(|name| is_same_name(name.as_str().as_bytes(), bytes)) {
            return Ok(name.clone());
        }
        let name = HeaderName::from_bytes(bytes)?;
        if bytes.len() <= MAX_CACHED_NAME_BYTES {
            *slot = Some(name.clone());
        }
        Ok(name)
    })
}

/// Returns whether two names are equal, ignoring ASCII case. The exact bytes are compared first, because most names
/// are sent in lower case.
fn is_same_name(cached_name: &[u8], received_name: &[u8]) -> bool {
    cached_name == received_name || cached_name.eq_ignore_ascii_case(received_name)
}

/// Returns the index of the slot for a name: a hash of its length and three of its characters, ignoring case.
fn slot_index(bytes: &[u8]) -> usize {
    let [first, .., last] = bytes else { return 0 };
    let hash = [*first, bytes[bytes.len() / 2], *last]
        .iter()
        .fold(bytes.len(), |hash, byte| hash.wrapping_mul(31).wrapping_add(usize::from(byte | 0x20)));
    hash % CACHE_SLOTS
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
                prop_assert_eq!(parse_header_name(name.as_bytes()).ok(), expected.ok());
            }
        }
    }

    #[test]
    fn a_long_name_is_not_cached() {
        let long_name = "y".repeat(MAX_CACHED_NAME_BYTES + 1);
        assert_eq!(parse_header_name(long_name.as_bytes()).unwrap(), *long_name);
        let is_cached = CACHE.with_borrow(|cache| cache.iter().flatten().any(|name| *name == *long_name));
        assert!(!is_cached, "the cache must not contain a name that exceeds the maximum length");
    }
}

//! A cache of parsed header names. Most responses have the same headers, and finding a name in the cache is
//! cheaper than validating and allocating it.

use std::cell::RefCell;

use http::HeaderName;
use http::header::InvalidHeaderName;

/// Slots of the cache of each thread.
const SLOTS: usize = 64;
/// Maximum length of a cached name; the provider has none longer.
const BYTES_MAX: usize = 64;

thread_local! {
    static CACHE: RefCell<[Option<HeaderName>; SLOTS]> = const { RefCell::new([const { None }; SLOTS]) };
}

/// The header name of these bytes, in either case.
///
/// # Errors
///
/// When the bytes are not a valid header name.
pub(super) fn header_name(written: &[u8]) -> Result<HeaderName, InvalidHeaderName> {
    CACHE.with_borrow_mut(|cached| {
        let cached = &mut cached[slot(written)];
        if let Some(cached_name) =
            cached.as_ref().filter(|cached_name| is_same(cached_name.as_str().as_bytes(), written))
        {
            return Ok(cached_name.clone());
        }
        let name = HeaderName::from_bytes(written)?;
        if written.len() <= BYTES_MAX {
            *cached = Some(name.clone());
        }
        Ok(name)
    })
}

/// Compares the exact bytes first: most names are sent in lower case.
fn is_same(cached_name: &[u8], written: &[u8]) -> bool {
    cached_name == written || cached_name.eq_ignore_ascii_case(written)
}

/// The slot of a name, from its length and three of its characters, without regard to case.
fn slot(written: &[u8]) -> usize {
    let [first, .., last] = written else { return 0 };
    let mixed = [*first, written[written.len() / 2], *last]
        .iter()
        .fold(written.len(), |mixed, byte| mixed.wrapping_mul(31).wrapping_add(usize::from(byte | 0x20)));
    mixed % SLOTS
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_cached_name_is_the_same_as_a_parsed_one(
            names in prop::collection::vec("[a-cA-C_ -]{0,3}|content-(type|LENGTH)|[x]{60,70}|\\PC{0,3}", 1..40),
        ) {
            for written in names.iter().chain(&names) {
                let expected = HeaderName::from_bytes(written.as_bytes());
                prop_assert_eq!(header_name(written.as_bytes()).ok(), expected.ok());
            }
        }
    }

    #[test]
    fn a_long_name_is_not_cached() {
        let long = "y".repeat(BYTES_MAX + 1);
        assert_eq!(header_name(long.as_bytes()).unwrap(), *long);
        assert!(
            CACHE.with_borrow(|cached| cached.iter().flatten().all(|name| name.as_str().len() <= BYTES_MAX))
        );
    }
}

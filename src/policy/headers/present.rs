//! Finds the rows of the table of headers that apply to a message. One pass over the names of the headers computes the
//! set of these rows, so that the rules look up only headers that are present. A hash table, which the compiler fills,
//! finds the row of a name.

use std::iter;

use http::header::{HeaderMap, HeaderName};

use super::table::{HEADERS, HeaderRow, ROWS, Rule};

/// A set of table rows, one bit per row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct PresentHeaders(u128);

/// A row, identified by its index in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct KnownHeader(u8);

impl KnownHeader {
    pub(super) const CONNECTION: Self = Self::from_name("connection");
    pub(super) const PROXY_AUTHORIZATION: Self = Self::from_name("proxy-authorization");
    pub(super) const TRANSFER_ENCODING: Self = Self::from_name("transfer-encoding");
    pub(super) const TOKEN: Self = Self::from_name("x-keychoir-token");
    pub(super) const KEY: Self = Self::from_name("xi-api-key");
    pub(super) const KEY_UNDERSCORED: Self = Self::from_name("xi_api_key");
    pub(super) const AUTHORIZATION: Self = Self::from_name("authorization");
    pub(super) const COOKIE: Self = Self::from_name("cookie");
    pub(super) const SUBPROTOCOLS: Self = Self::from_name("sec-websocket-protocol");
    pub(super) const ACCEPT_ENCODING: Self = Self::from_name("accept-encoding");

    /// Returns the row with the given `name`. Fails to compile if there is no such row.
    const fn from_name(name: &str) -> Self {
        let mut index = 0;
        while !are_equal(ROWS[index].name.as_bytes(), name.as_bytes()) {
            index += 1;
        }
        Self::from_index(index)
    }

    /// Returns the header name of the row, which must not cover a prefix.
    pub(super) fn name(self) -> &'static HeaderName {
        &HEADERS[usize::from(self.0)]
    }

    /// Returns the table row.
    pub(super) fn row(self) -> &'static HeaderRow {
        &ROWS[usize::from(self.0)]
    }

    /// Finds the row that covers `name`, which must be in lower case.
    pub(super) fn find(name: &str) -> Option<Self> {
        let bytes = name.as_bytes();
        let mut slot = first_slot(bytes);
        while SLOTS[slot] != EMPTY {
            let candidate = Self(SLOTS[slot]);
            if candidate.row().name == name {
                return Some(candidate);
            }
            slot = (slot + 1) % SLOTS.len();
        }
        let name_start = first_three(bytes);
        if !PREFIX_FILTER[name_start as usize % PREFIX_FILTER.len()] {
            return None;
        }
        let covers = |(start, known): &&(u32, Self)| {
            *start == name_start && known.row().prefix().is_some_and(|prefix| name.starts_with(prefix))
        };
        PREFIXES.iter().find(covers).map(|(_, known)| *known)
    }

    const fn from_index(index: usize) -> Self {
        assert!(index < 128, "the rows must fit into the bits of a u128");
        #[expect(clippy::cast_possible_truncation, reason = "the index is below 128")]
        Self(index as u8)
    }

    /// Returns the bit of the row in [`PresentHeaders`].
    const fn bit(self) -> u128 {
        1 << self.0
    }
}

impl PresentHeaders {
    /// The rows that are removed from requests even if `access.forward_headers` lists them.
    pub(super) const NEVER_SENT: Self = Self(
        with_rule(Rule::HopByHop).0 | with_rule(Rule::Credential).0 | KnownHeader::from_name("host").bit(),
    );
    /// The rows that are removed from requests unless they are listed in `access.forward_headers`.
    pub(super) const SENT_BY_PROXIES: Self = with_rule(Rule::Request);
    /// The rows that are removed from responses.
    pub(super) const SENT_BY_ORIGIN: Self = Self(with_rule(Rule::HopByHop).0 | with_rule(Rule::Response).0);

    /// Returns the rows that cover the given headers.
    pub(super) fn in_headers(headers: &HeaderMap) -> Self {
        let bit = |name: &HeaderName| KnownHeader::find(name.as_str()).map_or(0, KnownHeader::bit);
        Self(headers.keys().fold(0, |bits, name| bits | bit(name)))
    }

    /// Whether the set contains a row.
    pub(super) fn contains(self, known: KnownHeader) -> bool {
        self.0 & known.bit() != 0
    }

    /// Returns the rows that are in both sets.
    pub(super) const fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Returns the rows that are in at least one of the sets.
    pub(super) const fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Returns the rows of this set that are not in `other`.
    pub(super) const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Adds a row to the set.
    pub(super) const fn with(self, known: KnownHeader) -> Self {
        Self(self.0 | known.bit())
    }

    /// Returns the rows in the set.
    pub(super) fn rows(self) -> impl Iterator<Item = KnownHeader> {
        let mut remaining = self.0;
        iter::from_fn(move || {
            let next = KnownHeader(u8::try_from(remaining.trailing_zeros()).ok().filter(|_| remaining != 0)?);
            remaining &= remaining - 1;
            Some(next)
        })
    }
}

/// Returns the rows with the given `rule`.
const fn with_rule(rule: Rule) -> PresentHeaders {
    let (mut bits, mut index) = (0, 0);
    while index < ROWS.len() {
        if ROWS[index].rule as u8 == rule as u8 {
            bits |= 1 << index;
        }
        index += 1;
    }
    PresentHeaders(bits)
}

/// Marks an empty slot of the hash table.
const EMPTY: u8 = u8::MAX;

/// An open-addressing hash table from the names of the rows without a prefix to the indexes of the rows.
static SLOTS: [u8; 1024] = {
    let mut slots = [EMPTY; 1024];
    let mut index = 0;
    while index < ROWS.len() {
        if ROWS[index].prefix().is_none() {
            let mut slot = first_slot(ROWS[index].name.as_bytes());
            while slots[slot] != EMPTY {
                slot = (slot + 1) % slots.len();
            }
            slots[slot] = KnownHeader::from_index(index).0;
        }
        index += 1;
    }
    slots
};

/// Number of rows that cover all names with a prefix.
const PREFIX_COUNT: usize = {
    let (mut count, mut index) = (0, 0);
    while index < ROWS.len() {
        if ROWS[index].prefix().is_some() {
            count += 1;
        }
        index += 1;
    }
    count
};

/// The rows that cover a prefix, each with its first three characters.
static PREFIXES: [(u32, KnownHeader); PREFIX_COUNT] = {
    let mut prefixes = [(0, KnownHeader(0)); PREFIX_COUNT];
    let (mut count, mut index) = (0, 0);
    while index < ROWS.len() {
        if ROWS[index].prefix().is_some() {
            prefixes[count] = (first_three(ROWS[index].name.as_bytes()), KnownHeader::from_index(index));
            count += 1;
        }
        index += 1;
    }
    prefixes
};

/// A filter for names that may match a prefix. The index is the first three characters, modulo the size of the filter.
static PREFIX_FILTER: [bool; 1021] = {
    let mut filter = [false; 1021];
    let mut index = 0;
    while index < ROWS.len() {
        if ROWS[index].prefix().is_some() {
            filter[first_three(ROWS[index].name.as_bytes()) as usize % filter.len()] = true;
        }
        index += 1;
    }
    filter
};

/// Returns the first three characters of a name as a number. Every prefix has at least three characters.
const fn first_three(name: &[u8]) -> u32 {
    match name {
        [first, second, third, ..] => u32::from_be_bytes([0, *first, *second, *third]),
        _ => 0,
    }
}

/// Returns the slot at which the search for a name starts: a hash of its length and three of its characters.
const fn first_slot(name: &[u8]) -> usize {
    const fn mix(hash: u32, byte: u8) -> u32 {
        (hash ^ byte as u32).wrapping_mul(0x0100_0193)
    }
    let length = name.len();
    if length == 0 {
        return 0;
    }
    #[expect(clippy::cast_possible_truncation, reason = "a hash needs no exact length")]
    let mut hash = (length as u32).wrapping_mul(0x9e37_79b1);
    hash = mix(hash, name[0]);
    hash = mix(hash, name[length / 2]);
    hash = mix(hash, name[length - 1]);
    (hash.wrapping_mul(0x9e37_79b1) >> 22) as usize
}

/// Compares byte strings in constant functions, where `==` is not available.
const fn are_equal(left: &[u8], right: &[u8]) -> bool {
    let mut index = 0;
    while index < left.len() && index < right.len() && left[index] == right[index] {
        index += 1;
    }
    index == left.len() && index == right.len()
}

#[cfg(test)]
mod tests {
    use http::header::HeaderValue;

    use super::*;

    #[test]
    fn a_row_is_found_only_by_the_names_that_it_covers() {
        for (index, row) in ROWS.iter().enumerate() {
            let names = match row.prefix() {
                None => vec![row.name.to_owned()],
                Some(prefix) => vec![format!("{prefix}x"), format!("{prefix}connecting-ip")],
            };
            for name in names {
                let known_header = KnownHeader::find(&name).unwrap();
                assert_eq!(usize::from(known_header.0), index, "{name} must be covered by {}", row.name);
                let name: HeaderName = name.parse().unwrap();
                let headers = HeaderMap::from_iter([(name, HeaderValue::from_static("x"))]);
                assert_eq!(PresentHeaders::in_headers(&headers), PresentHeaders(1 << index));
            }
        }
        for name in [
            "accept",
            "user-agent",
            "hosts",
            "x",
            "te-",
            "content-type",
            "xi-api-kex",
            "cf",
            "x-forwardedx",
            "x-fern-language",
            "x-request-id",
            "traceparent",
            "baggage",
            "origin",
            "referer",
            "safety-identifier",
        ] {
            assert_eq!(KnownHeader::find(name), None, "no row must cover {name}");
        }
    }

    #[test]
    fn every_row_of_a_set_is_returned_once() {
        assert_eq!(PresentHeaders::default().rows().count(), 0);
        let last = KnownHeader::from_index(ROWS.len() - 1);
        let set = PresentHeaders::default().with(KnownHeader::CONNECTION).with(last);
        assert_eq!(set.rows().collect::<Vec<_>>(), [KnownHeader::CONNECTION, last]);
        assert_eq!(
            PresentHeaders::SENT_BY_ORIGIN.and(PresentHeaders::SENT_BY_PROXIES),
            PresentHeaders::default()
        );
        let hop_by_hop = PresentHeaders::SENT_BY_ORIGIN.and(PresentHeaders::NEVER_SENT);
        assert!(hop_by_hop.rows().all(|known| known.row().rule == Rule::HopByHop));
        assert_eq!(hop_by_hop.rows().count(), 10);
    }
}

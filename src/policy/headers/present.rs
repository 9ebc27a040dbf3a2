//! Computes the set of table rows that occur in a head, in one pass over its names, so that absent
//! headers are never looked up.

use std::iter;

use http::header::{HeaderMap, HeaderName};

use super::table::{HEADERS, HeaderRow, ROWS, Rule};

/// The set of rows, one bit each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct PresentHeaders(u128);

/// A row, by its index in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct KnownHeader(u8);

impl KnownHeader {
    pub(super) const CONNECTION: Self = Self::named("connection");
    pub(super) const PROXY_AUTHORIZATION: Self = Self::named("proxy-authorization");
    pub(super) const TRANSFER_ENCODING: Self = Self::named("transfer-encoding");
    pub(super) const TOKEN: Self = Self::named("x-keychoir-token");
    pub(super) const KEY: Self = Self::named("xi-api-key");
    pub(super) const KEY_UNDERSCORED: Self = Self::named("xi_api_key");
    pub(super) const AUTHORIZATION: Self = Self::named("authorization");
    pub(super) const COOKIE: Self = Self::named("cookie");
    pub(super) const SUBPROTOCOLS: Self = Self::named("sec-websocket-protocol");
    pub(super) const ACCEPT_ENCODING: Self = Self::named("accept-encoding");

    /// The row with this name.
    const fn named(name: &str) -> Self {
        let mut number = 0;
        while !is_same(ROWS[number].name.as_bytes(), name.as_bytes()) {
            number += 1;
        }
        Self(small(number))
    }

    /// The header name of a row with a single name.
    pub(super) fn name(self) -> &'static HeaderName {
        &HEADERS[usize::from(self.0)]
    }

    /// The row in the table.
    pub(super) fn row(self) -> &'static HeaderRow {
        &ROWS[usize::from(self.0)]
    }

    /// The row that `name`, in lower case, belongs to.
    pub(super) fn of(name: &str) -> Option<Self> {
        let bytes = name.as_bytes();
        let mut slot = slot_of(bytes);
        while SLOTS[slot] != EMPTY {
            let known = Self(SLOTS[slot]);
            if known.row().name == name {
                return Some(known);
            }
            slot = (slot + 1) % SLOTS.len();
        }
        let name_start = start_of(bytes);
        if !PREFIX_FILTER[name_start as usize % PREFIX_FILTER.len()] {
            return None;
        }
        let covers = |(start, known): &&(u32, Self)| {
            *start == name_start && known.row().prefix().is_some_and(|prefix| name.starts_with(prefix))
        };
        PREFIXES.iter().find(covers).map(|(_, known)| *known)
    }

    const fn bit(self) -> u128 {
        1 << self.0
    }
}

impl PresentHeaders {
    /// Always removed from requests, even if `access.forward_headers` lists them.
    pub(super) const NEVER_SENT: Self =
        Self(rows(Rule::Hop).0 | rows(Rule::Credential).0 | KnownHeader::named("host").bit());
    /// Removed from requests unless listed in `access.forward_headers`.
    pub(super) const OF_PROXIES: Self = rows(Rule::Up);
    /// Removed from responses.
    pub(super) const OF_ORIGIN: Self = Self(rows(Rule::Hop).0 | rows(Rule::Down).0);

    pub(super) fn of(headers: &HeaderMap) -> Self {
        let bit = |name: &HeaderName| KnownHeader::of(name.as_str()).map_or(0, KnownHeader::bit);
        Self(headers.keys().fold(0, |bits, name| bits | bit(name)))
    }

    pub(super) fn has(self, known: KnownHeader) -> bool {
        self.0 & known.bit() != 0
    }

    pub(super) const fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    pub(super) const fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    pub(super) const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    pub(super) const fn with(self, known: KnownHeader) -> Self {
        Self(self.0 | known.bit())
    }

    /// The rows of the set.
    pub(super) fn rows(self) -> impl Iterator<Item = KnownHeader> {
        let mut left = self.0;
        iter::from_fn(move || {
            let next = KnownHeader(u8::try_from(left.trailing_zeros()).ok().filter(|_| left != 0)?);
            left &= left - 1;
            Some(next)
        })
    }
}

/// The rows with a rule.
const fn rows(rule: Rule) -> PresentHeaders {
    let (mut bits, mut number) = (0, 0);
    while number < ROWS.len() {
        if ROWS[number].rule as u8 == rule as u8 {
            bits |= 1 << number;
        }
        number += 1;
    }
    PresentHeaders(bits)
}

const EMPTY: u8 = u8::MAX;

/// Open-addressing hash table of the rows with a single name: their indexes by name.
static SLOTS: [u8; 1024] = {
    let mut slots = [EMPTY; 1024];
    let mut number = 0;
    while number < ROWS.len() {
        if ROWS[number].prefix().is_none() {
            let mut slot = slot_of(ROWS[number].name.as_bytes());
            while slots[slot] != EMPTY {
                slot = (slot + 1) % slots.len();
            }
            slots[slot] = small(number);
        }
        number += 1;
    }
    slots
};

const PREFIX_COUNT: usize = {
    let (mut count, mut number) = (0, 0);
    while number < ROWS.len() {
        if ROWS[number].prefix().is_some() {
            count += 1;
        }
        number += 1;
    }
    count
};

/// The rows with a name prefix, each with its first three characters.
static PREFIXES: [(u32, KnownHeader); PREFIX_COUNT] = {
    let mut prefixes = [(0, KnownHeader(0)); PREFIX_COUNT];
    let (mut count, mut number) = (0, 0);
    while number < ROWS.len() {
        if ROWS[number].prefix().is_some() {
            prefixes[count] = (start_of(ROWS[number].name.as_bytes()), KnownHeader(small(number)));
            count += 1;
        }
        number += 1;
    }
    prefixes
};

/// Filter for names that may match a prefix row.
static PREFIX_FILTER: [bool; 1021] = {
    let mut filter = [false; 1021];
    let mut number = 0;
    while number < ROWS.len() {
        if ROWS[number].prefix().is_some() {
            filter[start_of(ROWS[number].name.as_bytes()) as usize % filter.len()] = true;
        }
        number += 1;
    }
    filter
};

/// The first three characters; every prefix is at least as long.
const fn start_of(name: &[u8]) -> u32 {
    match name {
        [first, second, third, ..] => u32::from_be_bytes([0, *first, *second, *third]),
        _ => 0,
    }
}

/// The first slot of a name: a hash of its length and three of its characters.
const fn slot_of(name: &[u8]) -> usize {
    const fn mix(hash: u32, byte: u8) -> u32 {
        (hash ^ byte as u32).wrapping_mul(0x0100_0193)
    }
    let length = name.len();
    if length == 0 {
        return 0;
    }
    #[expect(clippy::cast_possible_truncation, reason = "a hash")]
    let mut hash = (length as u32).wrapping_mul(0x9e37_79b1);
    hash = mix(hash, name[0]);
    hash = mix(hash, name[length / 2]);
    hash = mix(hash, name[length - 1]);
    (hash.wrapping_mul(0x9e37_79b1) >> 22) as usize
}

const fn is_same(one: &[u8], other: &[u8]) -> bool {
    if one.len() != other.len() {
        return false;
    }
    let mut at = 0;
    while at < one.len() {
        if one[at] != other[at] {
            return false;
        }
        at += 1;
    }
    true
}

const fn small(number: usize) -> u8 {
    assert!(number < 128, "rows are the bits of a u128");
    #[expect(clippy::cast_possible_truncation, reason = "below 128")]
    let small = number as u8;
    small
}

#[cfg(test)]
mod tests {
    use http::header::HeaderValue;

    use super::*;

    #[test]
    fn every_row_is_found_by_its_names_and_by_no_others() {
        for (number, row) in ROWS.iter().enumerate() {
            let names = match row.prefix() {
                None => vec![row.name.to_owned()],
                Some(prefix) => vec![format!("{prefix}x"), format!("{prefix}connecting-ip")],
            };
            for name in names {
                let known = KnownHeader::of(&name).unwrap();
                assert_eq!(usize::from(known.0), number, "{name}");
                let name: HeaderName = name.parse().unwrap();
                let headers = HeaderMap::from_iter([(name, HeaderValue::from_static("x"))]);
                assert_eq!(PresentHeaders::of(&headers), PresentHeaders(1 << number));
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
            assert_eq!(KnownHeader::of(name), None, "{name}");
        }
    }

    #[test]
    fn rows_of_a_set_are_listed_one_by_one() {
        assert_eq!(PresentHeaders::default().rows().count(), 0);
        let last = KnownHeader(small(ROWS.len() - 1));
        let some = PresentHeaders::default().with(KnownHeader::CONNECTION).with(last);
        assert_eq!(some.rows().collect::<Vec<_>>(), [KnownHeader::CONNECTION, last]);
        assert_eq!(PresentHeaders::OF_ORIGIN.and(PresentHeaders::OF_PROXIES), PresentHeaders::default());
        let hop = PresentHeaders::OF_ORIGIN.and(PresentHeaders::NEVER_SENT);
        assert!(hop.rows().all(|known| known.row().rule == Rule::Hop));
        assert_eq!(hop.rows().count(), 10);
    }
}

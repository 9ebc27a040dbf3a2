//! Which of the headers that matter on the way a head has: found in one pass over the names, so that
//! those that are not there are never looked for.

use std::iter;

use http::header::{self, HeaderMap, HeaderName};

/// Those of [`KNOWN`] that are there, a bit each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Present(u32);

/// A header that matters, by its place in [`KNOWN`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Known(u8);

/// The headers that matter, in the order in which they are taken out: what belongs to one connection
/// (RFC 9110, section 7.6.1) and `expect`, which this server answers itself; then where a client may
/// present a credential; then the rest.
static KNOWN: [HeaderName; 18] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    header::EXPECT,
    HeaderName::from_static("x-keychoir-token"),
    HeaderName::from_static("xi-api-key"),
    HeaderName::from_static("xi_api_key"),
    header::AUTHORIZATION,
    header::COOKIE,
    header::HOST,
    header::SEC_WEBSOCKET_PROTOCOL,
    header::CONTENT_LENGTH,
];

/// So many of them belong to one connection.
const HOP: u8 = 10;

impl Known {
    pub(super) const CONNECTION: Self = Self(0);
    pub(super) const PROXY_AUTHORIZATION: Self = Self(4);
    pub(super) const TRANSFER_ENCODING: Self = Self(7);
    pub(super) const TOKEN: Self = Self(10);
    pub(super) const KEY: Self = Self(11);
    pub(super) const KEY_UNDERSCORED: Self = Self(12);
    pub(super) const AUTHORIZATION: Self = Self(13);
    pub(super) const COOKIE: Self = Self(14);
    pub(super) const HOST: Self = Self(15);
    pub(super) const SUBPROTOCOLS: Self = Self(16);

    pub(super) fn name(self) -> &'static HeaderName {
        &KNOWN[usize::from(self.0)]
    }

    /// Told by its length, and then by the only few that are so long.
    fn of(name: &str) -> Option<Self> {
        let number = match (name.len(), name) {
            (2, "te") => 5,
            (4, "host") => 15,
            (6, "expect") => 9,
            (6, "cookie") => 14,
            (7, "trailer") => 6,
            (7, "upgrade") => 8,
            (10, "connection") => 0,
            (10, "keep-alive") => 1,
            (10, "xi-api-key") => 11,
            (10, "xi_api_key") => 12,
            (13, "authorization") => 13,
            (14, "content-length") => 17,
            (16, "proxy-connection") => 2,
            (16, "x-keychoir-token") => 10,
            (17, "transfer-encoding") => 7,
            (18, "proxy-authenticate") => 3,
            (19, "proxy-authorization") => 4,
            (22, "sec-websocket-protocol") => 16,
            _ => return None,
        };
        Some(Self(number))
    }
}

impl Present {
    pub(super) fn of(headers: &HeaderMap) -> Self {
        let bit = |name: &HeaderName| Known::of(name.as_str()).map_or(0, |known| 1 << known.0);
        Self(headers.keys().fold(0, |bits, name| bits | bit(name)))
    }

    pub(super) fn has(self, known: Known) -> bool {
        self.0 & (1 << known.0) != 0
    }

    /// Those of them that belong to one connection.
    pub(super) fn of_hop(self) -> impl Iterator<Item = Known> {
        let mut left = self.0 & ((1 << HOP) - 1);
        iter::from_fn(move || {
            let next = (0..HOP).nth(left.trailing_zeros() as usize)?;
            left &= left - 1;
            Some(Known(next))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_belongs_to_one_connection_is_the_beginning() {
        let all = HeaderMap::from_iter(
            KNOWN.iter().map(|name| (name.clone(), header::HeaderValue::from_static("x"))),
        );
        let names: Vec<&str> = Present::of(&all).of_hop().map(|known| known.name().as_str()).collect();
        assert_eq!(names.len(), usize::from(HOP));
        assert_eq!((names[0], names[9]), ("connection", "expect"));
        assert_eq!(Present::default().of_hop().count(), 0);
    }

    #[test]
    fn every_header_that_matters_is_known_and_no_other() {
        for (number, name) in KNOWN.iter().enumerate() {
            let known = Known::of(name.as_str()).unwrap();
            assert_eq!((usize::from(known.0), known.name()), (number, name));
            let headers = HeaderMap::from_iter([(name.clone(), header::HeaderValue::from_static("x"))]);
            assert_eq!(Present::of(&headers), Present(1 << number));
        }
        for (known, name) in [
            (Known::CONNECTION, "connection"),
            (Known::PROXY_AUTHORIZATION, "proxy-authorization"),
            (Known::TRANSFER_ENCODING, "transfer-encoding"),
            (Known::TOKEN, "x-keychoir-token"),
            (Known::KEY, "xi-api-key"),
            (Known::KEY_UNDERSCORED, "xi_api_key"),
            (Known::AUTHORIZATION, "authorization"),
            (Known::COOKIE, "cookie"),
            (Known::HOST, "host"),
            (Known::SUBPROTOCOLS, "sec-websocket-protocol"),
        ] {
            assert_eq!(known.name(), name);
        }
        for name in ["accept", "user-agent", "hosts", "x", "te-", "content-type", "xi-api-kex"] {
            assert_eq!(Known::of(name), None, "{name}");
        }
    }
}

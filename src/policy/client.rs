//! Who is asking. What a client presents, in any of the places where the provider's SDKs put a
//! key, is Keychoir's own client token: looked up here, compared in constant time, never
//! forwarded. Without configured clients everyone is let in; the server then listens on loopback
//! only.

use std::sync::Arc;

use http::HeaderMap;
use http::header::AUTHORIZATION;

use super::headers::{CREDENTIAL_HEADERS, credential_values};
use crate::secret::Fingerprint;

/// The name of a client, for records and logs.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ClientName(Arc<str>);

impl ClientName {
    /// A name as it is configured.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self(name.into())
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Who may ask.
#[derive(Clone, Debug)]
pub enum Clients {
    /// Anyone who reaches the listener; all under one name.
    Anyone(ClientName),
    /// Those with a token.
    Known(Vec<(ClientName, Fingerprint)>),
}

impl Clients {
    /// Everyone, when there are no tokens to ask for.
    #[must_use]
    pub fn new(known: Vec<(ClientName, Fingerprint)>) -> Self {
        if known.is_empty() { Self::Anyone(ClientName::new("local")) } else { Self::Known(known) }
    }

    /// Whether clients need a token.
    #[must_use]
    pub fn are_known(&self) -> bool {
        matches!(self, Self::Known(_))
    }
}

/// Why a client is not let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unidentified {
    /// It presents nothing.
    #[error("the client presents no token")]
    Missing,
    /// It presents something, and no client has it.
    #[error("the client presents a token that nobody has")]
    Wrong,
}

/// The client that asks.
///
/// # Errors
///
/// When tokens are asked for and none that is presented is one.
pub fn identify(
    clients: &Clients,
    headers: &HeaderMap,
    query: Option<&str>,
) -> Result<ClientName, Unidentified> {
    let known = match clients {
        Clients::Anyone(name) => return Ok(name.clone()),
        Clients::Known(known) => known,
    };
    let mut refusal = Unidentified::Missing;
    for token in presented(headers, query) {
        refusal = Unidentified::Wrong;
        let print = Fingerprint::of(&token);
        // All are compared, so that the time says nothing of which one it was.
        let found = known.iter().fold(
            None,
            |found, (name, expected)| {
                if expected.matches(&print) { Some(name) } else { found }
            },
        );
        if let Some(name) = found {
            return Ok(name.clone());
        }
    }
    Err(refusal)
}

/// Every token that a request carries, in any of the places.
fn presented(headers: &HeaderMap, query: Option<&str>) -> Vec<String> {
    let mut tokens = Vec::new();
    for name in &CREDENTIAL_HEADERS {
        for value in headers.get_all(name).iter().filter_map(|value| value.to_str().ok()) {
            let value = value.trim();
            match value.split_once(' ') {
                Some((scheme, token)) if name == AUTHORIZATION && scheme.eq_ignore_ascii_case("bearer") => {
                    tokens.push(token.trim().to_owned());
                }
                _ if !value.is_empty() => tokens.push(value.to_owned()),
                _ => {}
            }
        }
    }
    tokens.extend(query.into_iter().flat_map(credential_values));
    tokens
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known() -> Clients {
        Clients::new(vec![
            (ClientName::new("app"), Fingerprint::of("token-of-app")),
            (ClientName::new("ops"), Fingerprint::of("token-of-ops")),
        ])
    }

    #[track_caller]
    fn check(
        header: Option<(&'static str, &'static str)>,
        query: Option<&str>,
        expected: Result<&str, Unidentified>,
    ) {
        let headers = header.map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()));
        let found = identify(&known(), &HeaderMap::from_iter(headers), query);
        assert_eq!(found.as_ref().map(ClientName::as_str), expected.as_ref().copied());
    }

    #[test]
    fn a_token_is_found_wherever_an_sdk_puts_its_key() {
        check(Some(("xi-api-key", "token-of-app")), None, Ok("app"));
        check(Some(("xi_api_key", "token-of-ops")), None, Ok("ops"));
        check(Some(("authorization", "Bearer token-of-app")), None, Ok("app"));
        check(Some(("authorization", "bearer  token-of-app")), None, Ok("app"));
        check(None, Some("a=b&xi_api_key=token-of-ops"), Ok("ops"));
        check(None, Some("xi%2Dapi-key=token%2Dof%2Dops"), Ok("ops"));
    }

    #[test]
    fn one_right_token_among_wrong_ones_is_enough() {
        check(Some(("xi-api-key", "anything")), Some("authorization=token-of-app"), Ok("app"));
    }

    #[test]
    fn a_wrong_token_is_wrong_and_none_is_missing() {
        check(Some(("xi-api-key", "token-of-ap")), None, Err(Unidentified::Wrong));
        check(Some(("xi-api-key", "")), None, Err(Unidentified::Missing));
        check(Some(("accept", "token-of-app")), None, Err(Unidentified::Missing));
        check(None, Some("token=token-of-app"), Err(Unidentified::Missing));
    }

    #[test]
    fn without_configured_clients_everyone_is_local() {
        let name = identify(&Clients::new(Vec::new()), &HeaderMap::new(), None).unwrap();
        assert_eq!(name.as_str(), "local");
    }
}

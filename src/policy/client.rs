//! Authenticates the clients of requests by their tokens, which may expire, and finds the provider key that a client
//! brings. The limits of a client are in `rules`.
//!
//! A client sends its Keychoir token in any header or parameter in which the provider's SDKs send a key. The token is
//! compared in constant time and never forwarded. Without configured clients, every request is accepted, and Keychoir
//! listens on loopback only. A client that may bring its own provider key sends its token in `x-keychoir-token`, and
//! the key in `xi-api-key`.

mod rules;

use std::collections::HashMap;
use std::sync::Arc;

use http::HeaderMap;

use super::headers::{PresentedCredential, has_unreadable_key, presented_credentials};
use super::units::UnixMs;
use crate::secret::{ApiKey, TokenFingerprint};

pub use rules::{AllowedKeys, RULE_NAMES, Rules};

/// A client name, as it appears in usage records and logs.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ClientName(Arc<str>);

impl ClientName {
    /// Creates a name from the configuration.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self(name.into())
    }

    /// Returns the configured name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A client that the configuration or an operator has defined, or the anonymous client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Client {
    /// The name in usage records and logs.
    pub name: ClientName,
    /// The limits of the client.
    pub rules: Rules,
}

/// The kind of source from which a client was configured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientOrigin {
    /// The configuration file, or a file that a variable names.
    File,
    /// The configuration file, with a change that was made at runtime.
    Changed,
    /// The state directory: the client was added at runtime.
    Managed,
}

impl ClientOrigin {
    /// Returns the identifier in documents.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Changed => "changed",
            Self::Managed => "managed",
        }
    }

    /// Whether the configuration file contains the client.
    #[must_use]
    pub fn is_in_file(self) -> bool {
        match self {
            Self::File | Self::Changed => true,
            Self::Managed => false,
        }
    }
}

/// A client with its tokens.
#[derive(Clone, Debug)]
pub struct ConfiguredClient {
    /// The client's name and rules.
    pub client: Arc<Client>,
    /// The tokens of the client.
    pub tokens: ClientTokens,
}

/// The tokens of a client, and the source of its configuration. During the grace period of a rotation, the client has
/// two tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientTokens {
    /// The kind of source from which the client was configured.
    pub origin: ClientOrigin,
    /// The current token.
    pub current: IssuedToken,
    /// The token that the last rotation replaced, or `None` without a rotation.
    pub previous: Option<IssuedToken>,
}

impl From<TokenFingerprint> for ClientTokens {
    /// Creates the tokens of a client with one token in the configuration file, which does not expire.
    fn from(fingerprint: TokenFingerprint) -> Self {
        Self {
            origin: ClientOrigin::File,
            current: IssuedToken { fingerprint, expires_at: None },
            previous: None,
        }
    }
}

/// A client token and its expiry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IssuedToken {
    /// The digest of the token.
    pub fingerprint: TokenFingerprint,
    /// The time from which the token is refused, or `None` if it does not expire.
    pub expires_at: Option<UnixMs>,
}

impl IssuedToken {
    /// Whether the token is refused at `now`.
    #[must_use]
    pub fn is_expired(&self, now: UnixMs) -> bool {
        self.expires_at.is_some_and(|expires_at| expires_at <= now)
    }
}

/// The treatment of a credential that is not a token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AnonymousAccess {
    /// The credential is rejected, or ignored if no tokens are configured.
    #[default]
    Refused,
    /// The credential is used as the client's own key.
    BringKeys,
}

/// The configured clients.
#[derive(Clone, Debug)]
pub struct Clients {
    /// The tokens with their clients, by [`TokenFingerprint::index`]. The fingerprint is a hash, so the duration of a
    /// lookup does not reveal how much of a guessed token is correct.
    by_token: HashMap<u64, Vec<(Arc<Client>, IssuedToken)>>,
    /// All clients with a token.
    with_token: Vec<ConfiguredClient>,
    /// The client of requests without a token.
    anonymous_client: Arc<Client>,
    anonymous_access: AnonymousAccess,
}

impl Clients {
    /// Indexes the clients by token. An empty list accepts every request.
    #[must_use]
    pub fn new(clients: Vec<(Client, ClientTokens)>, anonymous_access: AnonymousAccess) -> Self {
        let name = ClientName::new(if clients.is_empty() { "local" } else { "own" });
        let anonymous_client = Arc::new(Client { name, rules: Rules::default() });
        let mut by_token: HashMap<_, Vec<_>> = HashMap::with_capacity(clients.len());
        let mut clients_with_token = Vec::with_capacity(clients.len());
        for (client, tokens) in clients {
            let client = Arc::new(client);
            for token in [Some(tokens.current), tokens.previous].into_iter().flatten() {
                by_token.entry(token.fingerprint.index()).or_default().push((Arc::clone(&client), token));
            }
            clients_with_token.push(ConfiguredClient { client, tokens });
        }
        Self { by_token, with_token: clients_with_token, anonymous_client, anonymous_access }
    }

    /// Whether tokens are configured.
    #[must_use]
    pub fn require_token(&self) -> bool {
        !self.by_token.is_empty()
    }

    /// Whether the caller has sent a valid token. Always true if no tokens are configured. An anonymous client with its
    /// own key has sent no token.
    #[must_use]
    pub fn is_authenticated(&self, caller: &Caller) -> bool {
        !self.require_token() || !Arc::ptr_eq(&caller.client, &self.anonymous_client)
    }

    /// Returns the clients that have a token.
    pub fn with_token(&self) -> impl Iterator<Item = &ConfiguredClient> {
        self.with_token.iter()
    }

    /// Returns the names of the clients that have a token.
    pub fn names_with_token(&self) -> impl Iterator<Item = &ClientName> {
        self.with_token.iter().map(|configured| &configured.client.name)
    }

    /// Returns the names of all clients, including the anonymous client.
    pub fn names(&self) -> impl Iterator<Item = &ClientName> {
        self.names_with_token().chain([&self.anonymous_client.name])
    }

    /// Whether `token` is a client token that has not expired.
    #[must_use]
    pub fn has_valid_token(&self, token: &str, now: UnixMs) -> bool {
        matches!(self.find_by_token(token, now), TokenMatch::Valid(_))
    }

    fn find_by_token(&self, token: &str, now: UnixMs) -> TokenMatch<'_> {
        // Without configured tokens, the credential need not be hashed.
        if !self.require_token() {
            return TokenMatch::Unknown;
        }
        self.find_by_fingerprint(&TokenFingerprint::new(token), now)
    }

    fn find_by_fingerprint(&self, fingerprint: &TokenFingerprint, now: UnixMs) -> TokenMatch<'_> {
        let mut candidates = self.by_token.get(&fingerprint.index()).into_iter().flatten();
        match candidates.find(|(_, token)| token.fingerprint == *fingerprint) {
            None => TokenMatch::Unknown,
            Some((_, token)) if token.is_expired(now) => TokenMatch::Expired,
            Some((client, _)) => TokenMatch::Valid(client),
        }
    }
}

/// The result of looking up a credential among the tokens.
enum TokenMatch<'a> {
    /// The credential is the token of the contained client.
    Valid(&'a Arc<Client>),
    /// The credential is an expired client token.
    Expired,
    /// The credential is not a client token.
    Unknown,
}

/// The authenticated client of a request.
#[derive(Clone, Debug)]
pub struct Caller {
    /// The client and its limits.
    pub client: Arc<Client>,
    /// The provider key that the client brought. If `None`, a key of the pool serves the request.
    pub own_key: Option<ApiKey>,
}

/// The reason why a request is not authenticated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unauthenticated {
    /// The request contains no credential.
    #[error("the client presents no token")]
    MissingToken,
    /// The request contains a credential that is not the token of a configured client.
    #[error("the client presents an unknown token")]
    UnknownToken,
    /// The token of a configured client has expired.
    #[error("the client presents an expired token")]
    ExpiredToken,
    /// The client may bring its own key, and the key is not a valid header value.
    #[error("the client's own key is malformed")]
    MalformedKey,
}

/// The prefixes of the tokens that Keychoir generates for clients and for operators. No provider key starts with them.
const TOKEN_PREFIXES: [&str; 2] = ["kc_", "kca_"];

/// Whether a credential is a token that Keychoir generated, which may be revoked or mistyped.
fn is_generated_token(credential: &str) -> bool {
    TOKEN_PREFIXES.iter().any(|prefix| credential.starts_with(prefix))
}

/// Authenticates the client of a request.
///
/// # Errors
///
/// Fails if tokens are configured and the request contains no valid token. Also fails if a client that may bring its
/// own key sends a malformed key or a token instead of a key. A key of the pool must not serve such a request, because
/// it would spend the credits of other clients.
pub fn authenticate(
    clients: &Clients,
    headers: &HeaderMap,
    query: Option<&str>,
    now: UnixMs,
) -> Result<Caller, Unauthenticated> {
    let credentials = || presented_credentials(headers, query);
    let own_key = || find_own_key(clients, headers, query, now);
    let mut has_expired_token = false;
    for credential in credentials() {
        match clients.find_by_token(credential.as_str(), now) {
            TokenMatch::Valid(client) => {
                let own_key = if client.rules.may_bring_key { own_key()? } else { None };
                return Ok(Caller { client: Arc::clone(client), own_key });
            }
            TokenMatch::Expired => has_expired_token = true,
            TokenMatch::Unknown => {}
        }
    }
    if has_expired_token {
        return Err(Unauthenticated::ExpiredToken);
    }
    // The value of `x-keychoir-token` is always a token, so a client with an unknown token must not count as anonymous.
    let has_token = credentials().any(|credential| matches!(credential, PresentedCredential::Token(_)));
    let own_key = match clients.anonymous_access {
        AnonymousAccess::BringKeys if !has_token => own_key()?,
        AnonymousAccess::BringKeys | AnonymousAccess::Refused => None,
    };
    if own_key.is_some() || !clients.require_token() {
        return Ok(Caller { client: Arc::clone(&clients.anonymous_client), own_key });
    }
    Err(if credentials().next().is_none() {
        Unauthenticated::MissingToken
    } else {
        Unauthenticated::UnknownToken
    })
}

/// Returns the provider key that a client brings, if it brings one. The key is the first key credential that is not a
/// token, because the SDK was configured with it. Fails if the only key credentials are malformed keys or unknown
/// tokens.
fn find_own_key(
    clients: &Clients,
    headers: &HeaderMap,
    query: Option<&str>,
    now: UnixMs,
) -> Result<Option<ApiKey>, Unauthenticated> {
    let keys = presented_credentials(headers, query).filter_map(|credential| match credential {
        PresentedCredential::Key(key) => Some(key),
        PresentedCredential::Token(_) | PresentedCredential::Other(_) => None,
    });
    let (mut has_malformed_key, mut has_unknown_token) = (has_unreadable_key(headers), false);
    // An expired token is not sent to the provider as a key.
    for key in keys.filter(|key| matches!(clients.find_by_token(key, now), TokenMatch::Unknown)) {
        // The provider must not receive a token, even if it is not valid.
        if is_generated_token(&key) {
            has_unknown_token = true;
            continue;
        }
        match ApiKey::new(&key) {
            Ok(key) => return Ok(Some(key)),
            Err(_) => has_malformed_key = true,
        }
    }
    match (has_malformed_key, has_unknown_token) {
        (true, _) => Err(Unauthenticated::MalformedKey),
        (false, true) => Err(Unauthenticated::UnknownToken),
        (false, false) => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: UnixMs = UnixMs(1_800_000_000_000);

    fn client(name: &str, may_bring_key: bool) -> Client {
        Client { name: ClientName::new(name), rules: Rules { may_bring_key, ..Rules::default() } }
    }

    fn configured_clients(anonymous_access: AnonymousAccess) -> Clients {
        let clients = vec![
            (client("app", false), TokenFingerprint::new("token-of-app").into()),
            (client("ops", true), TokenFingerprint::new("token-of-ops").into()),
        ];
        Clients::new(clients, anonymous_access)
    }

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
    }

    #[track_caller]
    fn check_client(
        header: Option<(&'static str, &'static str)>,
        query: Option<&str>,
        expected: Result<&str, Unauthenticated>,
    ) {
        let headers = headers(header.as_slice());
        let caller = authenticate(&configured_clients(AnonymousAccess::Refused), &headers, query, NOW);
        assert_eq!(caller.as_ref().map(|caller| caller.client.name.as_str()), expected.as_ref().copied());
        assert!(
            caller.is_ok_and(|caller| caller.own_key.is_none()) || expected.is_err(),
            "the token must not be taken for the client's own key"
        );
    }

    #[test]
    fn a_token_is_accepted_wherever_an_sdk_sends_its_key() {
        check_client(Some(("xi-api-key", "token-of-app")), None, Ok("app"));
        check_client(Some(("xi_api_key", "token-of-ops")), None, Ok("ops"));
        check_client(Some(("x-keychoir-token", "token-of-ops")), None, Ok("ops"));
        check_client(Some(("authorization", "Bearer token-of-app")), None, Ok("app"));
        check_client(Some(("authorization", "bearer  token-of-app")), None, Ok("app"));
        check_client(None, Some("a=b&xi_api_key=token-of-ops"), Ok("ops"));
        check_client(None, Some("xi%2Dapi-key=token%2Dof%2Dops"), Ok("ops"));
    }

    #[test]
    fn a_valid_token_next_to_an_invalid_one_is_accepted() {
        check_client(Some(("xi-api-key", "anything")), Some("authorization=token-of-app"), Ok("app"));
    }

    #[test]
    fn an_unknown_token_is_distinguished_from_a_missing_one() {
        check_client(Some(("xi-api-key", "token-of-ap")), None, Err(Unauthenticated::UnknownToken));
        check_client(Some(("x-keychoir-token", "token-of-ap")), None, Err(Unauthenticated::UnknownToken));
        check_client(Some(("xi-api-key", "")), None, Err(Unauthenticated::MissingToken));
        check_client(Some(("accept", "token-of-app")), None, Err(Unauthenticated::MissingToken));
        check_client(None, Some("token=token-of-app"), Err(Unauthenticated::MissingToken));
    }

    #[test]
    fn fingerprints_with_the_same_index_are_distinguished() {
        let fingerprint = |last: char| TokenFingerprint::parse(&format!("{}{last}", "0".repeat(63))).unwrap();
        let clients = vec![
            (client("one", false), fingerprint('1').into()),
            (client("two", false), fingerprint('2').into()),
        ];
        let clients = Clients::new(clients, AnonymousAccess::Refused);
        let name = |fingerprint| match clients.find_by_fingerprint(&fingerprint, NOW) {
            TokenMatch::Valid(client) => Some(client.name.as_str()),
            TokenMatch::Expired | TokenMatch::Unknown => None,
        };
        assert_eq!(
            [name(fingerprint('1')), name(fingerprint('2')), name(fingerprint('3'))],
            [Some("one"), Some("two"), None]
        );
    }

    #[test]
    fn without_configured_clients_every_request_is_accepted_as_local() {
        let clients = Clients::new(Vec::new(), AnonymousAccess::Refused);
        let caller = authenticate(&clients, &headers(&[("xi-api-key", "anything")]), None, NOW).unwrap();
        assert_eq!((caller.client.name.as_str(), caller.own_key.is_none()), ("local", true));
    }

    /// Checks the client name and the key that the client brings.
    #[track_caller]
    fn check_own_key(
        clients: &Clients,
        credentials: &[(&'static str, &'static str)],
        query: Option<&str>,
        expected: Result<(&str, Option<&str>), Unauthenticated>,
    ) {
        let caller = authenticate(clients, &headers(credentials), query, NOW);
        let authenticated = caller
            .as_ref()
            .map(|caller| (caller.client.name.as_str(), caller.own_key.as_ref().map(ApiKey::fingerprint)));
        let expected = expected.map(|(name, key)| (name, key.map(crate::secret::Fingerprint::new)));
        assert_eq!(authenticated.map_err(|error| *error), expected);
    }

    #[test]
    fn a_permitted_client_may_send_its_own_key_with_its_token() {
        let clients = configured_clients(AnonymousAccess::Refused);
        let (ops, app) = (("x-keychoir-token", "token-of-ops"), ("x-keychoir-token", "token-of-app"));
        check_own_key(&clients, &[ops, ("xi-api-key", "sk_own")], None, Ok(("ops", Some("sk_own"))));
        check_own_key(&clients, &[ops], Some("xi_api_key=sk_own"), Ok(("ops", Some("sk_own"))));
        check_own_key(&clients, &[("xi-api-key", "token-of-ops")], None, Ok(("ops", None)));
        check_own_key(&clients, &[ops, ("xi-api-key", "token-of-ops")], None, Ok(("ops", None)));
        check_own_key(&clients, &[ops, ("xi-api-key", "token-of-app")], None, Ok(("ops", None)));
        check_own_key(&clients, &[ops, ("authorization", "Bearer sk_own")], None, Ok(("ops", None)));
        check_own_key(&clients, &[app, ("xi-api-key", "sk_own")], None, Ok(("app", None)));
    }

    #[test]
    fn a_malformed_own_key_is_rejected() {
        let clients = configured_clients(AnonymousAccess::Refused);
        let (ops, app) = (("x-keychoir-token", "token-of-ops"), ("x-keychoir-token", "token-of-app"));
        let open_clients = Clients::new(Vec::new(), AnonymousAccess::BringKeys);
        for key in ["sk_own two", "sk\u{e9}", "Bearer sk_own"] {
            let own = ("xi-api-key", key);
            check_own_key(&clients, &[ops, own], None, Err(Unauthenticated::MalformedKey));
            check_own_key(&clients, &[app, own], None, Ok(("app", None)));
            check_own_key(
                &configured_clients(AnonymousAccess::BringKeys),
                &[own],
                None,
                Err(Unauthenticated::MalformedKey),
            );
            check_own_key(&open_clients, &[own], None, Err(Unauthenticated::MalformedKey));
        }
        check_own_key(&clients, &[ops], Some("xi_api_key=sk%20own"), Err(Unauthenticated::MalformedKey));
        check_own_key(&clients, &[ops], Some("xi_api_key=sk%0Aown"), Err(Unauthenticated::MalformedKey));
        check_own_key(&clients, &[ops, ("xi-api-key", "")], None, Ok(("ops", None)));
        // A valid key is used even if another one is malformed.
        let valid_key = Some("xi_api_key=sk_own");
        check_own_key(&clients, &[ops, ("xi-api-key", "sk own")], valid_key, Ok(("ops", Some("sk_own"))));
    }

    #[test]
    fn a_generated_token_is_never_sent_to_the_provider_as_a_key() {
        let unknown = || Err(Unauthenticated::UnknownToken);
        let ops = ("x-keychoir-token", "token-of-ops");
        let open_clients = Clients::new(Vec::new(), AnonymousAccess::BringKeys);
        for token in ["kc_0123456789abcdef", "kca_0123456789abcdef", "kc_"] {
            let own = ("xi-api-key", token);
            check_own_key(&configured_clients(AnonymousAccess::BringKeys), &[own], None, unknown());
            check_own_key(&configured_clients(AnonymousAccess::Refused), &[ops, own], None, unknown());
            check_own_key(&open_clients, &[own], None, unknown());
            // A valid key is used even if another credential is a token.
            let key = Some("xi_api_key=sk_own");
            check_own_key(&open_clients, &[own], key, Ok(("local", Some("sk_own"))));
        }
        check_own_key(&open_clients, &[("xi-api-key", "kd_own")], None, Ok(("local", Some("kd_own"))));
    }

    #[test]
    fn a_token_is_valid_until_it_expires_and_the_previous_one_during_its_grace() {
        let token = |text, expires_at| IssuedToken { fingerprint: TokenFingerprint::new(text), expires_at };
        let tokens = ClientTokens {
            origin: ClientOrigin::Managed,
            current: token("new-token", Some(UnixMs(3_000))),
            previous: Some(token("old-token", Some(UnixMs(2_000)))),
        };
        let clients = Clients::new(vec![(client("app", true), tokens)], AnonymousAccess::BringKeys);
        assert_eq!(clients.names_with_token().count(), 1);
        let check_token = |presented: &'static str, now, expected: Result<&str, Unauthenticated>| {
            let caller = authenticate(&clients, &headers(&[("xi-api-key", presented)]), None, UnixMs(now));
            let name = caller.as_ref().map(|caller| caller.client.name.as_str());
            assert_eq!(name, expected.as_ref().copied(), "{presented} must have this result at {now}");
        };
        check_token("old-token", 1_999, Ok("app"));
        check_token("new-token", 1_999, Ok("app"));
        check_token("old-token", 2_000, Err(Unauthenticated::ExpiredToken));
        check_token("new-token", 2_999, Ok("app"));
        check_token("new-token", 3_000, Err(Unauthenticated::ExpiredToken));
        // An unknown credential is the client's own key here, and an expired token is never sent to the provider.
        check_token("some-key", 3_000, Ok("own"));
        let headers_with_both_tokens = [("x-keychoir-token", "new-token"), ("xi-api-key", "old-token")];
        let caller =
            authenticate(&clients, &headers(&headers_with_both_tokens), None, UnixMs(2_500)).unwrap();
        assert!(caller.own_key.is_none());
    }

    #[test]
    fn anonymous_clients_may_send_keys_only_when_permitted() {
        let own = [("xi-api-key", "sk_own")];
        check_own_key(
            &configured_clients(AnonymousAccess::Refused),
            &own,
            None,
            Err(Unauthenticated::UnknownToken),
        );
        let clients = configured_clients(AnonymousAccess::BringKeys);
        check_own_key(&clients, &own, None, Ok(("own", Some("sk_own"))));
        check_own_key(&clients, &[("xi-api-key", "token-of-app")], None, Ok(("app", None)));
        check_own_key(
            &clients,
            &[("authorization", "Bearer sk_own")],
            None,
            Err(Unauthenticated::UnknownToken),
        );
        check_own_key(
            &clients,
            &[own[0], ("x-keychoir-token", "wrong")],
            None,
            Err(Unauthenticated::UnknownToken),
        );
        check_own_key(&clients, &[], None, Err(Unauthenticated::MissingToken));
        let is_authenticated = |credentials| {
            clients.is_authenticated(&authenticate(&clients, &headers(credentials), None, NOW).unwrap())
        };
        assert!(is_authenticated(&[("xi-api-key", "token-of-app")]) && !is_authenticated(&own));
        let open_clients = Clients::new(Vec::new(), AnonymousAccess::BringKeys);
        check_own_key(&open_clients, &own, None, Ok(("local", Some("sk_own"))));
        check_own_key(&open_clients, &[], None, Ok(("local", None)));
    }
}

//! Authenticates clients. A client presents one of Keychoir's own tokens in any place where the
//! provider's SDKs put a key; the token is looked up, compared in constant time, and never forwarded.
//! Without configured clients every request is accepted, and the server listens on loopback only.
//!
//! A client that may bring its own key of the provider presents its token in `x-keychoir-token`, and its
//! key in the header or parameter of the SDK.

use std::collections::HashMap;
use std::sync::Arc;

use http::HeaderMap;

use super::client_quota::{ClientQuota, Rate};
use super::headers::{Presented, has_unreadable_key, presented};
use super::path::Path;
use crate::secret::{ApiKey, TokenFingerprint};

/// The name of a client, for usage records and logs.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ClientName(Arc<str>);

impl ClientName {
    /// A name as it is configured.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self(name.into())
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The limits of a client. The default has none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// Its quota of requests or credits.
    pub quota: Option<ClientQuota>,
    /// Its rate limit.
    pub rate: Option<Rate>,
    /// Maximum number of its concurrent requests.
    pub concurrency: Option<u32>,
    /// Prefixes of the paths that it may use; empty for all paths.
    pub paths: Vec<String>,
    /// The keys and workspaces that may serve it; empty for all.
    pub pins: AllowedKeys,
    /// Whether it may bring a key of its own.
    pub may_bring_key: bool,
    /// Whether it may request tokens and signed URLs of the provider although it has a quota.
    pub may_take_tokens: bool,
}

impl Rules {
    /// Whether it may use this path.
    #[must_use]
    pub fn permit(&self, path: &str) -> bool {
        self.paths.is_empty()
            || Path::read(path).is_ok_and(|path| self.paths.iter().any(|prefix| path.is_within(prefix)))
    }
}

/// Keys and workspaces, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AllowedKeys {
    /// Names of keys.
    pub keys: Vec<String>,
    /// Names of workspaces.
    pub workspaces: Vec<String>,
}

impl AllowedKeys {
    /// Whether a key with this name and workspace may serve.
    #[must_use]
    pub fn permit(&self, key: Option<&str>, workspace: Option<&str>) -> bool {
        let is_listed =
            |list: &[String], name: Option<&str>| name.is_some_and(|name| list.iter().any(|one| one == name));
        (self.keys.is_empty() && self.workspaces.is_empty())
            || is_listed(&self.keys, key)
            || is_listed(&self.workspaces, workspace)
    }
}

/// A configured client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Client {
    /// Identifies it in usage records and logs.
    pub name: ClientName,
    /// Its limits.
    pub rules: Rules,
}

/// Whether a client without a token may bring a key of the provider.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AnonymousAccess {
    /// A credential that is not a token is refused; without configured tokens it is ignored.
    #[default]
    Refused,
    /// A credential that is not a token is used as the client's own key.
    BringKeys,
}

/// The configured clients.
#[derive(Clone, Debug)]
pub struct Clients {
    /// Clients with a token, by the first word of its fingerprint. The fingerprint is a hash, so the time of
    /// a lookup does not reveal how much of a guessed token is right.
    by_token: HashMap<u64, Vec<(Arc<Client>, TokenFingerprint)>>,
    /// The client of requests without a token.
    anonymous_client: Arc<Client>,
    anonymous: AnonymousAccess,
}

impl Clients {
    /// The clients with a token; without any, every request is accepted.
    #[must_use]
    pub fn new(clients: Vec<(Client, TokenFingerprint)>, anonymous: AnonymousAccess) -> Self {
        let name = ClientName::new(if clients.is_empty() { "local" } else { "own" });
        let anonymous_client = Arc::new(Client { name, rules: Rules::default() });
        let mut by_token: HashMap<_, Vec<_>> = HashMap::with_capacity(clients.len());
        for (client, fingerprint) in clients {
            by_token.entry(fingerprint.first_word()).or_default().push((Arc::new(client), fingerprint));
        }
        Self { by_token, anonymous_client, anonymous }
    }

    /// Whether clients need a token.
    #[must_use]
    pub fn are_known(&self) -> bool {
        !self.by_token.is_empty()
    }

    /// Whether the caller was authenticated by a token, where tokens are needed, and is not an anonymous
    /// client with its own key.
    #[must_use]
    pub fn include(&self, caller: &Caller) -> bool {
        !self.are_known() || !Arc::ptr_eq(&caller.client, &self.anonymous_client)
    }

    /// The names of the clients that have a token.
    pub fn token_holders(&self) -> impl Iterator<Item = &ClientName> {
        self.by_token.values().flatten().map(|(client, _)| &client.name)
    }

    /// The names of all clients.
    pub fn names(&self) -> impl Iterator<Item = &ClientName> {
        let with_token = self.by_token.values().flatten().map(|(client, _)| client);
        with_token.chain([&self.anonymous_client]).map(|client| &client.name)
    }

    /// The client of this token.
    fn of_token(&self, token: &str) -> Option<&Arc<Client>> {
        if self.are_known() { self.of_print(&TokenFingerprint::of(token)) } else { None }
    }

    fn of_print(&self, fingerprint: &TokenFingerprint) -> Option<&Arc<Client>> {
        let same_bucket = self.by_token.get(&fingerprint.first_word())?;
        same_bucket.iter().find(|(_, expected)| expected == fingerprint).map(|(client, _)| client)
    }
}

/// The client of a request, and the key that serves it.
#[derive(Clone, Debug)]
pub struct Caller {
    /// The client, with its limits.
    pub client: Arc<Client>,
    /// The key that it brings; without one, the pool serves.
    pub own_key: Option<ApiKey>,
}

/// Why a client is not authenticated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unidentified {
    /// The client presents no credential.
    #[error("the client presents no token")]
    Missing,
    /// The client presents a credential that belongs to no client.
    #[error("the client presents a token that no client has")]
    Wrong,
    /// The client may bring its own key, and presents a text that is not a valid header value.
    #[error("the client's own key is malformed")]
    MalformedKey,
}

/// Identifies the client of a request.
///
/// # Errors
///
/// When tokens are needed and no valid one is presented, and when a client that may bring its own key
/// presents a malformed one: serving it from the pool would spend other clients' credits.
pub fn authenticate(
    clients: &Clients,
    headers: &HeaderMap,
    query: Option<&str>,
) -> Result<Caller, Unidentified> {
    let presented = || presented(headers, query);
    // A credential that is not a token: the key that the SDK was configured with.
    let own_key = || {
        let keys = presented().filter_map(|credential| match credential {
            Presented::Key(key) => Some(key),
            Presented::Token(_) | Presented::Other(_) => None,
        });
        let mut is_malformed = has_unreadable_key(headers);
        for key in keys.filter(|key| clients.of_token(key).is_none()) {
            match ApiKey::new(&key) {
                Ok(key) => return Ok(Some(key)),
                Err(_) => is_malformed = true,
            }
        }
        if is_malformed { Err(Unidentified::MalformedKey) } else { Ok(None) }
    };
    if let Some(client) = presented().find_map(|credential| clients.of_token(credential.text())) {
        let own_key = if client.rules.may_bring_key { own_key()? } else { None };
        return Ok(Caller { client: Arc::clone(client), own_key });
    }
    // A client that presents a token in `x-keychoir-token` must be authenticated by it.
    let has_token = presented().any(|credential| matches!(credential, Presented::Token(_)));
    let own_key = match clients.anonymous {
        AnonymousAccess::BringKeys if !has_token => own_key()?,
        AnonymousAccess::BringKeys | AnonymousAccess::Refused => None,
    };
    if own_key.is_some() || !clients.are_known() {
        return Ok(Caller { client: Arc::clone(&clients.anonymous_client), own_key });
    }
    Err(if presented().next().is_none() { Unidentified::Missing } else { Unidentified::Wrong })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(name: &str, may_bring_key: bool) -> Client {
        Client { name: ClientName::new(name), rules: Rules { may_bring_key, ..Rules::default() } }
    }

    fn configured_clients(anonymous: AnonymousAccess) -> Clients {
        let clients = vec![
            (client("app", false), TokenFingerprint::of("token-of-app")),
            (client("ops", true), TokenFingerprint::of("token-of-ops")),
        ];
        Clients::new(clients, anonymous)
    }

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
    }

    #[track_caller]
    fn check(
        header: Option<(&'static str, &'static str)>,
        query: Option<&str>,
        expected: Result<&str, Unidentified>,
    ) {
        let headers = headers(header.as_slice());
        let caller = authenticate(&configured_clients(AnonymousAccess::Refused), &headers, query);
        assert_eq!(caller.as_ref().map(|caller| caller.client.name.as_str()), expected.as_ref().copied());
        assert!(caller.is_ok_and(|caller| caller.own_key.is_none()) || expected.is_err());
    }

    #[test]
    fn a_token_is_found_wherever_an_sdk_puts_its_key() {
        check(Some(("xi-api-key", "token-of-app")), None, Ok("app"));
        check(Some(("xi_api_key", "token-of-ops")), None, Ok("ops"));
        check(Some(("x-keychoir-token", "token-of-ops")), None, Ok("ops"));
        check(Some(("authorization", "Bearer token-of-app")), None, Ok("app"));
        check(Some(("authorization", "bearer  token-of-app")), None, Ok("app"));
        check(None, Some("a=b&xi_api_key=token-of-ops"), Ok("ops"));
        check(None, Some("xi%2Dapi-key=token%2Dof%2Dops"), Ok("ops"));
    }

    #[test]
    fn one_valid_token_among_invalid_ones_is_accepted() {
        check(Some(("xi-api-key", "anything")), Some("authorization=token-of-app"), Ok("app"));
    }

    #[test]
    fn a_wrong_token_is_distinguished_from_a_missing_one() {
        check(Some(("xi-api-key", "token-of-ap")), None, Err(Unidentified::Wrong));
        check(Some(("x-keychoir-token", "token-of-ap")), None, Err(Unidentified::Wrong));
        check(Some(("xi-api-key", "")), None, Err(Unidentified::Missing));
        check(Some(("accept", "token-of-app")), None, Err(Unidentified::Missing));
        check(None, Some("token=token-of-app"), Err(Unidentified::Missing));
    }

    #[test]
    fn fingerprints_with_a_common_prefix_are_distinguished() {
        let fingerprint = |last: char| TokenFingerprint::parse(&format!("{}{last}", "0".repeat(63))).unwrap();
        let clients =
            vec![(client("one", false), fingerprint('1')), (client("two", false), fingerprint('2'))];
        let clients = Clients::new(clients, AnonymousAccess::Refused);
        let name = |fingerprint| clients.of_print(&fingerprint).map(|client| client.name.as_str());
        assert_eq!(
            [name(fingerprint('1')), name(fingerprint('2')), name(fingerprint('3'))],
            [Some("one"), Some("two"), None]
        );
    }

    #[test]
    fn without_configured_clients_every_request_is_local() {
        let clients = Clients::new(Vec::new(), AnonymousAccess::Refused);
        let caller = authenticate(&clients, &headers(&[("xi-api-key", "anything")]), None).unwrap();
        assert_eq!((caller.client.name.as_str(), caller.own_key.is_none()), ("local", true));
    }

    /// The client of a request, and the key that it brings.
    #[track_caller]
    fn check_own(
        clients: &Clients,
        credentials: &[(&'static str, &'static str)],
        query: Option<&str>,
        expected: Result<(&str, Option<&str>), Unidentified>,
    ) {
        let caller = authenticate(clients, &headers(credentials), query);
        let identified = caller
            .as_ref()
            .map(|caller| (caller.client.name.as_str(), caller.own_key.as_ref().map(ApiKey::fingerprint)));
        let expected = expected.map(|(name, key)| (name, key.map(crate::secret::Fingerprint::of)));
        assert_eq!(identified.map_err(|error| *error), expected);
    }

    #[test]
    fn a_permitted_client_brings_its_key_beside_its_token() {
        let clients = configured_clients(AnonymousAccess::Refused);
        let (ops, app) = (("x-keychoir-token", "token-of-ops"), ("x-keychoir-token", "token-of-app"));
        check_own(&clients, &[ops, ("xi-api-key", "sk_own")], None, Ok(("ops", Some("sk_own"))));
        check_own(&clients, &[ops], Some("xi_api_key=sk_own"), Ok(("ops", Some("sk_own"))));
        check_own(&clients, &[("xi-api-key", "token-of-ops")], None, Ok(("ops", None)));
        check_own(&clients, &[ops, ("xi-api-key", "token-of-ops")], None, Ok(("ops", None)));
        check_own(&clients, &[ops, ("xi-api-key", "token-of-app")], None, Ok(("ops", None)));
        check_own(&clients, &[ops, ("authorization", "Bearer sk_own")], None, Ok(("ops", None)));
        check_own(&clients, &[app, ("xi-api-key", "sk_own")], None, Ok(("app", None)));
    }

    #[test]
    fn a_malformed_own_key_is_not_served_from_the_pool() {
        let clients = configured_clients(AnonymousAccess::Refused);
        let (ops, app) = (("x-keychoir-token", "token-of-ops"), ("x-keychoir-token", "token-of-app"));
        let open_clients = Clients::new(Vec::new(), AnonymousAccess::BringKeys);
        for key in ["sk_own two", "sk\u{e9}", "Bearer sk_own"] {
            let own = ("xi-api-key", key);
            check_own(&clients, &[ops, own], None, Err(Unidentified::MalformedKey));
            check_own(&clients, &[app, own], None, Ok(("app", None)));
            check_own(
                &configured_clients(AnonymousAccess::BringKeys),
                &[own],
                None,
                Err(Unidentified::MalformedKey),
            );
            check_own(&open_clients, &[own], None, Err(Unidentified::MalformedKey));
        }
        check_own(&clients, &[ops], Some("xi_api_key=sk%20own"), Err(Unidentified::MalformedKey));
        check_own(&clients, &[ops], Some("xi_api_key=sk%0Aown"), Err(Unidentified::MalformedKey));
        check_own(&clients, &[ops, ("xi-api-key", "")], None, Ok(("ops", None)));
        // Of a malformed and a valid key, the valid one is used.
        let both = Some("xi_api_key=sk_own");
        check_own(&clients, &[ops, ("xi-api-key", "sk own")], both, Ok(("ops", Some("sk_own"))));
    }

    #[test]
    fn anonymous_clients_bring_keys_only_when_permitted() {
        let own = [("xi-api-key", "sk_own")];
        check_own(&configured_clients(AnonymousAccess::Refused), &own, None, Err(Unidentified::Wrong));
        let clients = configured_clients(AnonymousAccess::BringKeys);
        check_own(&clients, &own, None, Ok(("own", Some("sk_own"))));
        check_own(&clients, &[("xi-api-key", "token-of-app")], None, Ok(("app", None)));
        check_own(&clients, &[("authorization", "Bearer sk_own")], None, Err(Unidentified::Wrong));
        check_own(&clients, &[own[0], ("x-keychoir-token", "wrong")], None, Err(Unidentified::Wrong));
        check_own(&clients, &[], None, Err(Unidentified::Missing));
        let is_included =
            |credentials| clients.include(&authenticate(&clients, &headers(credentials), None).unwrap());
        assert!(is_included(&[("xi-api-key", "token-of-app")]) && !is_included(&own));
        let open_clients = Clients::new(Vec::new(), AnonymousAccess::BringKeys);
        check_own(&open_clients, &own, None, Ok(("local", Some("sk_own"))));
        check_own(&open_clients, &[], None, Ok(("local", None)));
    }

    #[test]
    fn allowed_keys_are_names_of_keys_or_workspaces() {
        let pins = AllowedKeys { keys: vec!["first".into()], workspaces: vec!["studio".into()] };
        assert!(AllowedKeys::default().permit(None, None));
        assert!(pins.permit(Some("first"), None));
        assert!(pins.permit(Some("third"), Some("studio")));
        assert!(!pins.permit(Some("third"), Some("first")));
        assert!(!pins.permit(None, None));
    }

    #[test]
    fn a_permitted_path_includes_all_paths_below_it() {
        let rules = |paths: &[&str]| Rules {
            paths: paths.iter().map(|path| (*path).to_owned()).collect(),
            ..Rules::default()
        };
        assert!(rules(&[]).permit("/v1/anything"));
        let speech = rules(&["/v1/text-to-speech", "/v1/voices/{id}/settings"]);
        for path in ["/v1/text-to-speech/x/stream", "/v1/Text-to-%73peech/", "/v1/voices/abc/settings"] {
            assert!(speech.permit(path), "{path}");
        }
        for path in [
            "/v1/text-to-speech-2/x",
            "/v1/voices",
            "/v1/voices/abc",
            "/v1/text-to-speech/../voices",
            "/v1/text-to-speech/%2e%2e/voices",
            "/v1/text-to-speech/..;/voices",
            "//v1/text-to-speech",
            "/v2/text-to-speech/x",
            "/",
        ] {
            assert!(!speech.permit(path), "{path}");
        }
    }
}

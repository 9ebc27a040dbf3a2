//! Defines the rules that are configured per client: the limits of its quotas, rate, concurrent requests, paths and
//! keys, and whether it may bring its own key or request tokens of the provider.

use crate::policy::client_quota::{ClientQuota, RateLimit};
use crate::policy::path::Path;

/// The rules of a client. A limit of `None` is not applied. The default sets no limits, and grants neither of the two
/// permissions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// Maximum number of requests or credits per period.
    pub quota: Option<ClientQuota>,
    /// Maximum number of requests or credits per period of each end user of the client. With this quota, requests that
    /// cost credits must name their user.
    pub user_quota: Option<ClientQuota>,
    /// Maximum number of requests per interval.
    pub rate_limit: Option<RateLimit>,
    /// Maximum number of concurrent requests.
    pub max_concurrent: Option<u32>,
    /// Prefixes of the paths that the client may use. An empty list allows all paths.
    pub paths: Vec<String>,
    /// The keys and workspaces that may serve the client.
    pub allowed_keys: AllowedKeys,
    /// Whether the client may bring its own provider key.
    pub may_bring_key: bool,
    /// Whether the client may request tokens and signed URLs of the provider despite a quota. Requests with them
    /// bypass Keychoir, so they are not counted.
    pub may_request_tokens: bool,
}

/// The names of the rules in the configuration and in the admin API.
pub const RULE_NAMES: [&str; 9] = [
    "quota",
    "user_quota",
    "rate_limit",
    "max_concurrent",
    "paths",
    "keys",
    "workspaces",
    "bring_your_own_key",
    "provider_tokens",
];

impl Rules {
    /// Whether the client may use `path`.
    #[must_use]
    pub fn permit(&self, path: &str) -> bool {
        self.paths.is_empty()
            || Path::parse(path).is_ok_and(|path| self.paths.iter().any(|prefix| path.is_within(prefix)))
    }
}

/// The keys and workspaces that may serve a client, by name. Two empty lists allow every key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AllowedKeys {
    /// Names of keys.
    pub keys: Vec<String>,
    /// Names of workspaces.
    pub workspaces: Vec<String>,
}

impl AllowedKeys {
    /// Whether the key named `key` in the workspace named `workspace` may serve the client.
    #[must_use]
    pub fn permit(&self, key: Option<&str>, workspace: Option<&str>) -> bool {
        let is_listed = |list: &[String], name: Option<&str>| {
            name.is_some_and(|name| list.iter().any(|listed| listed == name))
        };
        (self.keys.is_empty() && self.workspaces.is_empty())
            || is_listed(&self.keys, key)
            || is_listed(&self.workspaces, workspace)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_allowed_by_its_name_or_its_workspace() {
        let allowed_keys = AllowedKeys { keys: vec!["first".into()], workspaces: vec!["studio".into()] };
        assert!(AllowedKeys::default().permit(None, None));
        assert!(allowed_keys.permit(Some("first"), None));
        assert!(allowed_keys.permit(Some("third"), Some("studio")));
        assert!(!allowed_keys.permit(Some("third"), Some("first")));
        assert!(!allowed_keys.permit(None, None));
    }

    #[test]
    fn a_path_prefix_permits_all_paths_below_it() {
        let rules = |paths: &[&str]| Rules {
            paths: paths.iter().map(|path| (*path).to_owned()).collect(),
            ..Rules::default()
        };
        assert!(rules(&[]).permit("/v1/anything"));
        let speech = rules(&["/v1/text-to-speech", "/v1/voices/{id}/settings"]);
        for path in ["/v1/text-to-speech/x/stream", "/v1/Text-to-%73peech/", "/v1/voices/abc/settings"] {
            assert!(speech.permit(path), "{path} must be permitted");
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
            assert!(!speech.permit(path), "{path} must not be permitted");
        }
    }
}

//! Reads the entries of the overlay into the configuration: appends its keys, adds, changes and removes clients by
//! name, collects the paused keys, and validates the removed entries. Also parses the generation of the overlay.
//! Mistakes are reported like mistakes in the operator's file.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::super::clients::{self, ClientConfig};
use super::super::document::{StringField, TableEntry};
use super::super::keys::{FoundKeys, KeyConfig, KeyListSource, KeySearch, SourceSelection};
use super::super::problem::{Problem, Report, SourceSpan, ValueError, Warning};
use super::super::rules;
use super::super::value::{self, RawValue};
use super::StateDirectory;
use crate::policy::client::{ClientOrigin, RULE_NAMES, Rules};
use crate::policy::key_state::{KeyOrigin, Pause};
use crate::policy::units::UnixMs;
use crate::secret::{Fingerprint, TokenFingerprint};

/// A key that an operator paused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PausedKeyConfig {
    /// The fingerprint of the key.
    pub fingerprint: Fingerprint,
    /// The start of the pause.
    pub since: UnixMs,
    /// The time at which the key is resumed. If it is `None`, only an operator resumes the key.
    pub until: Option<UnixMs>,
    /// The operator's reason.
    pub reason: Option<Arc<str>>,
}

impl PausedKeyConfig {
    /// Returns the pause without the key.
    #[must_use]
    pub fn pause(&self) -> Pause {
        Pause { since: self.since, until: self.until, reason: self.reason.clone() }
    }
}

/// Parses the generation of the overlay.
pub(in crate::config) fn parse_generation(raw: RawValue<'_>) -> Result<u64, ValueError> {
    value::parse_integer(raw)
}

/// Appends the keys of the overlay to the keys of the other sources.
pub(in crate::config) fn add_keys(
    mut search: KeySearch<'_>,
    entries: &[TableEntry<'_>],
    directory: &StateDirectory,
) -> FoundKeys {
    if !entries.is_empty() {
        if search.found.source == KeyListSource::Absent {
            search.found.source = KeyListSource::Managed(directory.overlay_path());
        }
        let applied_entries = applied_entries(entries, &mut search.report.problems);
        search.add_entries(&applied_entries, KeyOrigin::Managed, SourceSelection::Selected);
    }
    search.found
}

/// Returns the entries that apply to this machine, and checks the fields that only replicas use. An entry with
/// `left_out` conflicts with the configuration file of this machine, and is kept only for other replicas.
fn applied_entries<'e, 'a>(
    entries: &'e [TableEntry<'a>],
    problems: &mut Vec<Problem>,
) -> Vec<&'e TableEntry<'a>> {
    let mut applied_entries = Vec::new();
    for entry in entries {
        if entry.parse_bool("left_out", problems) != Some(true) {
            entry.parse_time("changed_at", problems);
            applied_entries.push(entry);
        }
    }
    applied_entries
}

/// The fields of a `[[clients]]` entry in addition to the rules.
const CLIENT_FIELDS: [&str; 9] = [
    "name",
    "token_sha256",
    "expires_at",
    "previous_token_sha256",
    "previous_token_expires_at",
    "replaced_token_sha256",
    "revoked",
    "changed_at",
    "left_out",
];

/// A `[[clients]]` entry of the overlay: a new client, a change of a client of the configuration file, or its
/// revocation.
struct ClientEntry<'a> {
    name: &'a str,
    span: SourceSpan,
    /// The rules, if the entry contains any.
    rules: Option<Rules>,
    token: Option<TokenFingerprint>,
    expires_at: Option<UnixMs>,
    previous_token: Option<(TokenFingerprint, UnixMs)>,
    /// The token in the configuration file at the time of the rotation or revocation.
    replaced_token: Option<TokenFingerprint>,
    is_revoked: bool,
}

impl<'a> ClientEntry<'a> {
    /// Parses an entry. Returns `None` if its name is missing or invalid.
    fn parse(entry: &TableEntry<'a>, pool: &[KeyConfig], problems: &mut Vec<Problem>) -> Option<Self> {
        let known_fields: Vec<&str> = CLIENT_FIELDS.into_iter().chain(RULE_NAMES).collect();
        entry.report_unknown_fields(&known_fields, problems);
        let rules = rules::parse(entry, pool, problems);
        let has_rules = RULE_NAMES.iter().any(|name| entry.has_field(name));
        let token = parse_fingerprint(entry, "token_sha256", problems);
        let previous_token = parse_fingerprint(entry, "previous_token_sha256", problems);
        let replaced_token = parse_fingerprint(entry, "replaced_token_sha256", problems);
        let expires_at = entry.parse_time("expires_at", problems);
        let previous_token_expires_at = entry.parse_time("previous_token_expires_at", problems);
        let is_revoked = entry.parse_bool("revoked", problems).unwrap_or(false);
        let StringField { text: name, span, .. } = entry.require_one_of(&["name"], problems)?;
        problems.extend(clients::check_client_name(name).err().map(|error| span.problem(error)));
        Some(Self {
            name,
            span,
            rules: has_rules.then_some(rules),
            token,
            expires_at,
            previous_token: previous_token.zip(previous_token_expires_at),
            replaced_token,
            is_revoked,
        })
    }

    /// Returns a warning if the operator changed the token of `client` in the configuration file after the rotation or
    /// revocation. The overlay takes precedence, so the new token has no effect.
    fn ignored_token_warning(&self, client: &ClientConfig) -> Option<Warning> {
        if self.replaced_token.as_ref().is_none_or(|replaced_token| client.token == *replaced_token) {
            return None;
        }
        let effect = match self.is_revoked {
            true => "the client stays revoked",
            false => "the token of the rotation applies",
        };
        Some(self.span.warning(format!(
            "the token of the client `{}` in the configuration file has no effect: {effect}; rotate it, or delete this \
             entry while Keychoir does not run",
            self.name
        )))
    }

    /// Changes a client of the configuration file.
    fn apply_to(self, client: &mut ClientConfig) {
        client.origin = ClientOrigin::Changed;
        if let Some(rules) = self.rules {
            client.rules = rules;
        }
        if let Some(token) = self.token {
            (client.token, client.previous_token) = (token, self.previous_token);
        }
        // Without a token in the entry, the token is from the configuration file, where tokens do not expire.
        client.expires_at = self.expires_at;
    }

    /// Creates a client that is only in the overlay.
    fn into_client(self, token: TokenFingerprint) -> ClientConfig {
        ClientConfig {
            name: self.name.to_owned(),
            token,
            expires_at: self.expires_at,
            previous_token: self.previous_token,
            origin: ClientOrigin::Managed,
            rules: self.rules.unwrap_or_default(),
        }
    }
}

/// Applies the client entries to `clients`: adds new clients, changes clients of the configuration file, and removes
/// revoked clients.
pub(in crate::config) fn apply_clients(
    clients: &mut Vec<ClientConfig>,
    entries: &[TableEntry<'_>],
    pool: &[KeyConfig],
    report: &mut Report,
) {
    let Report { problems, warnings } = report;
    // An overlay may have thousands of clients, so maps replace linear searches.
    let client_indices: HashMap<String, usize> =
        clients.iter().enumerate().map(|(index, client)| (client.name.clone(), index)).collect();
    let mut names_by_token: HashMap<String, String> =
        clients.iter().map(|client| (client.token.to_string(), client.name.clone())).collect();
    let (mut seen_names, mut revoked_names) = (HashSet::new(), HashSet::new());
    for entry in applied_entries(entries, problems) {
        let Some(entry) = ClientEntry::parse(entry, pool, problems) else { continue };
        let name = entry.name;
        if !seen_names.insert(name) {
            problems.push(entry.span.problem(ValueError::new("an earlier entry has the same name")));
            continue;
        }
        let configured_client = client_indices.get(name).and_then(|index| clients.get_mut(*index));
        if let Some(client) = &configured_client {
            warnings.extend(entry.ignored_token_warning(client));
        }
        if entry.is_revoked {
            if let Some(client) = configured_client {
                names_by_token.remove(&client.token.to_string());
            }
            revoked_names.insert(name);
            continue;
        }
        if let Some(token) = &entry.token
            && let Some(other_name) = names_by_token.get(&token.to_string()).filter(|other| *other != name)
        {
            let message = format!("this client has the same token as the client `{other_name}`");
            let error = ValueError::new(message).advise("give each client its own token");
            problems.push(entry.span.problem(error));
            continue;
        }
        match (configured_client, entry.token) {
            (Some(client), token) => {
                if let Some(token) = token {
                    names_by_token.remove(&client.token.to_string());
                    names_by_token.insert(token.to_string(), name.to_owned());
                }
                entry.apply_to(client);
            }
            (None, Some(token)) => {
                names_by_token.insert(token.to_string(), name.to_owned());
                clients.push(entry.into_client(token));
            }
            (None, None) => warnings.push(entry.span.warning(format!(
                "the client `{name}` is no longer in the configuration file, so that this entry has no effect"
            ))),
        }
    }
    clients.retain(|client| !revoked_names.contains(client.name.as_str()));
}

/// Checks the `[[removed]]` entries, which have no effect on the configuration of this machine.
pub(in crate::config) fn check_removed_entries(entries: &[TableEntry<'_>], problems: &mut Vec<Problem>) {
    for entry in entries {
        entry.report_unknown_fields(&["kind", "id", "changed_at"], problems);
        entry.parse_time("changed_at", problems);
    }
}

/// Parses the `[[paused_keys]]` entries.
pub(in crate::config) fn parse_paused_keys(
    entries: &[TableEntry<'_>],
    problems: &mut Vec<Problem>,
) -> Vec<PausedKeyConfig> {
    let mut paused_keys = Vec::new();
    for entry in entries {
        entry.report_unknown_fields(
            &["fingerprint", "short_key", "since", "until", "reason", "changed_at"],
            problems,
        );
        entry.parse_time("changed_at", problems);
        // Without a valid start, the pause starts at the Unix epoch, which is before every request.
        let since = entry.parse_time("since", problems).unwrap_or(UnixMs(0));
        let until = entry.parse_time("until", problems);
        let reason = entry.parse_string("reason", problems).map(|(reason, _)| Arc::from(reason));
        let fingerprint_field = entry.require_one_of(&["fingerprint"], problems);
        let Some(StringField { text, span, .. }) = fingerprint_field else { continue };
        match Fingerprint::parse(text) {
            Some(fingerprint) => paused_keys.push(PausedKeyConfig { fingerprint, since, until, reason }),
            None => problems.push(span.problem(ValueError::new("this is not a fingerprint of a key"))),
        }
    }
    paused_keys
}

/// Parses the fingerprint of a token in a field. Returns `None` if the field is missing or invalid.
fn parse_fingerprint(
    entry: &TableEntry<'_>,
    name: &str,
    problems: &mut Vec<Problem>,
) -> Option<TokenFingerprint> {
    let (text, span) = entry.parse_string(name, problems)?;
    let fingerprint = TokenFingerprint::parse(text);
    if fingerprint.is_none() {
        problems.push(span.problem(clients::invalid_fingerprint_error(text)));
    }
    fingerprint
}

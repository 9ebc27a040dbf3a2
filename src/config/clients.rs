//! Parses the clients that may use the pool, from `[[clients]]` entries and from the file of
//! `KEYCHOIR_CLIENT_TOKEN_FILE`. A token is hashed and then dropped, so the configuration contains only its
//! fingerprint. The overlay and the commands check client names with the functions of this module.

use std::collections::HashMap;

use super::document::{StringField, TableEntry};
use super::keys::{KeyConfig, check_name};
use super::problem::{Report, SourceSpan, ValueError, ValueOrigin};
use super::rules;
use super::source::ValueSources;
use super::value::BaseDirectories;
use super::value_file::{read_secret_file, unreadable_file_error};
use super::variables::CLIENT_TOKEN_FILE;
use crate::policy::client::{ClientOrigin, RULE_NAMES, Rules};
use crate::policy::units::UnixMs;
use crate::secret::TokenFingerprint;

/// Recommended minimum number of characters in a token. A shorter token could be guessed.
const MIN_RECOMMENDED_TOKEN_CHARS: usize = 16;

/// The name of the client whose token is in the file of `KEYCHOIR_CLIENT_TOKEN_FILE`.
const DEFAULT_CLIENT: &str = "default";

/// A client and the fingerprint of its token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientConfig {
    /// The name in logs, metrics and usage records: 1 to 64 characters of `a`-`z`, `0`-`9`, `-`, `_`.
    pub name: String,
    /// The SHA-256 of the client token.
    pub token: TokenFingerprint,
    /// The time at which the token expires. If it is `None`, the token does not expire.
    pub expires_at: Option<UnixMs>,
    /// The token that the last rotation replaced, and the time at which that token expires. It is `None` if no rotation
    /// left the previous token valid.
    pub previous_token: Option<(TokenFingerprint, UnixMs)>,
    /// The kind of source from which the client was configured.
    pub origin: ClientOrigin,
    /// The access rules and limits of the client.
    pub rules: Rules,
}

impl ClientConfig {
    /// Creates a client of the configuration file or the environment with a token that does not expire.
    #[must_use]
    pub fn new(name: String, token: TokenFingerprint, rules: Rules) -> Self {
        Self { name, token, expires_at: None, previous_token: None, origin: ClientOrigin::File, rules }
    }
}

/// Parses the `[[clients]]` entries of the configuration file. The keys and workspaces in the rules of a
/// client must be in `pool`.
pub(super) fn parse(
    sources: &ValueSources<'_>,
    entries: &[TableEntry<'_>],
    directories: BaseDirectories<'_>,
    pool: &[KeyConfig],
    report: &mut Report,
) -> Vec<ClientConfig> {
    let Report { problems, warnings } = report;
    let mut clients = Vec::new();
    let mut index_by_name: HashMap<&str, usize> = HashMap::new();
    let mut index_by_token: HashMap<String, usize> = HashMap::new();
    for (index, entry) in entries.iter().enumerate() {
        let known_fields = ["name", "token", "token_file", "token_sha256"].iter().chain(&RULE_NAMES);
        entry.report_unknown_fields(&known_fields.copied().collect::<Vec<_>>(), problems);
        let rules = rules::parse(entry, pool, problems);
        let name = entry.require_one_of(&["name"], problems);
        if let Some(StringField { text: name, span, .. }) = &name {
            problems.extend(check_client_name(name).err().map(|error| span.problem(error)));
            if let Some(first) = index_by_name.insert(name, index) {
                let message = format!("client {} has the same name as client {}", index + 1, first + 1);
                problems.push(span.problem(ValueError::new(message).advise("give each client its own name")));
            }
        }
        let fields = ["token_sha256", "token_file", "token"];
        let Some(StringField { name: field, text, span }) = entry.require_one_of(&fields, problems) else {
            continue;
        };
        let token = match field {
            "token_sha256" => TokenFingerprint::parse(text).ok_or_else(|| invalid_fingerprint_error(text)),
            "token_file" => {
                read_secret_file(sources, directories, text).and_then(|text| hash_token(text.trim()))
            }
            _ => hash_token(text),
        };
        let token = match token {
            Ok(token) => token,
            Err(error) => {
                problems.push(span.problem(error));
                continue;
            }
        };
        if field == "token" && text.chars().count() < MIN_RECOMMENDED_TOKEN_CHARS {
            let message = format!(
                "the token of client {} is short: use at least {MIN_RECOMMENDED_TOKEN_CHARS} random characters",
                index + 1
            );
            warnings.push(span.warning(message));
        }
        if let Some(first) = index_by_token.insert(token.to_string(), index) {
            let message = format!("client {} has the same token as client {}", index + 1, first + 1);
            problems.push(span.problem(ValueError::new(message).advise("give each client its own token")));
        }
        if let Some(StringField { text: name, .. }) = name {
            clients.push(ClientConfig::new(name.to_owned(), token, rules));
        }
    }
    clients
}

/// Adds the client `default`, whose token is in the file that `KEYCHOIR_CLIENT_TOKEN_FILE` names, to `clients`. The
/// client has no rules. With this variable, a container needs no configuration file.
pub(super) fn add_default_client(
    sources: &ValueSources<'_>,
    clients: &mut Vec<ClientConfig>,
    report: &mut Report,
) {
    let Some(path) = sources.environment.value(CLIENT_TOKEN_FILE) else { return };
    let directories = BaseDirectories { base: None, home: sources.environment.home() };
    let span = SourceSpan::new(ValueOrigin::Variable(CLIENT_TOKEN_FILE.to_owned()));
    let content = directories.resolve(path).and_then(|path| {
        (sources.read_file)(&path).map_err(|reason| unreadable_file_error("the file", &reason))
    });
    let error = match content.and_then(|text| hash_token(text.trim())) {
        Err(error) => error,
        Ok(token) => {
            match clients.iter().find(|client| client.name == DEFAULT_CLIENT || client.token == token) {
                None => {
                    clients.push(ClientConfig::new(DEFAULT_CLIENT.to_owned(), token, Rules::default()));
                    return;
                }
                Some(client) if client.name == DEFAULT_CLIENT => {
                    let message = format!(
                        "this variable and a [[clients]] entry both define the client `{DEFAULT_CLIENT}`"
                    );
                    ValueError::new(message).advise("remove the variable, or rename the entry")
                }
                Some(client) => {
                    let message = format!(
                        "the client `{DEFAULT_CLIENT}` has the same token as the client `{}`",
                        client.name
                    );
                    ValueError::new(message).advise("give each client its own token")
                }
            }
        }
    };
    report.problems.push(span.problem(error));
}

/// Names that usage records and metrics use for other purposes, each with its purpose.
const RESERVED_NAMES: [(&str, &str); 3] = [
    ("own", "requests with the client's own key and without a token"),
    ("local", "requests without configured clients"),
    ("other", "clients beyond the maximum number of names"),
];

/// Checks that a client name is valid and not reserved.
pub(super) fn check_client_name(name: &str) -> Result<(), ValueError> {
    check_name(name)?;
    match RESERVED_NAMES.iter().find(|(reserved_name, _)| *reserved_name == name) {
        Some((_, purpose)) => {
            Err(ValueError::new(format!("the name `{name}` is reserved: usage records use it for {purpose}"))
                .advise("give the client another name"))
        }
        None => Ok(()),
    }
}

/// Parses a client name in a command.
///
/// # Errors
///
/// Returns a message about the name if it is not valid.
pub fn parse_client_name(name: &str) -> Result<String, String> {
    check_client_name(name).map(|()| name.to_owned()).map_err(|error| error.to_string())
}

/// Hashes a token, which must be valid in a header.
fn hash_token(token: &str) -> Result<TokenFingerprint, ValueError> {
    if token.is_empty() {
        return Err(ValueError::new("the token is empty"));
    }
    if !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        let message = "the token contains a space, a control character or a character outside ASCII";
        return Err(ValueError::new(message)
            .advise("a header cannot contain it: use letters, digits and punctuation"));
    }
    Ok(TokenFingerprint::new(token))
}

/// Returns the error for an invalid fingerprint. It does not contain the text, which may be the token.
pub(super) fn invalid_fingerprint_error(text: &str) -> ValueError {
    let message = match text.chars().count() {
        64 => "this contains characters other than hexadecimal digits".to_owned(),
        count => format!("this has {count} characters, but a SHA-256 has 64"),
    };
    ValueError::new(message)
        .advise("write the output of `printf %s TOKEN | sha256sum`, or the token itself as `token`")
}

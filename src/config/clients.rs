//! Parses the clients that may use the pool. The configuration contains only the fingerprint of a
//! token; the token is dropped after hashing.

use std::collections::HashMap;

use super::document::TableEntry;
use super::keys::{KeyConfig, check_name, secret_file};
use super::problem::{Problem, Warning, WrongValue};
use super::rules;
use super::source::ValueSources;
use super::value::Folders;
use crate::policy::client::Rules;
use crate::secret::TokenFingerprint;

/// Minimum recommended characters of a token. A shorter token could be guessed.
const MIN_ADVISED_TOKEN_CHARS: usize = 16;

/// A client and the fingerprint of its token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientConfig {
    /// Its name in logs, metrics and usage records: 1 to 64 of `a`-`z`, `0`-`9`, `-`, `_`.
    pub name: String,
    /// SHA-256 of its token.
    pub token: TokenFingerprint,
    /// Its access rules and limits.
    pub rules: Rules,
}

/// The clients of the `[[clients]]` entries.
pub(super) fn read(
    sources: &ValueSources<'_>,
    entries: &[TableEntry<'_>],
    folders: Folders<'_>,
    pool: &[KeyConfig],
    problems: &mut Vec<Problem>,
    warnings: &mut Vec<Warning>,
) -> Vec<ClientConfig> {
    let mut clients = Vec::new();
    let mut names: HashMap<&str, usize> = HashMap::new();
    let mut tokens: HashMap<String, usize> = HashMap::new();
    for (index, entry) in entries.iter().enumerate() {
        let known_names = ["name", "token", "token_file", "token_sha256"].iter().chain(&rules::FIELDS);
        entry.check_names(&known_names.copied().collect::<Vec<_>>(), problems);
        let rules = rules::read(entry, pool, problems);
        let name = entry.one_of(&["name"], problems);
        if let Some((_, name, span)) = &name {
            problems.extend(check_client_name(name).err().map(|wrong| span.problem(wrong)));
            if let Some(first) = names.insert(name, index) {
                let message = format!("client {} has the same name as client {}", index + 1, first + 1);
                problems.push(span.problem(WrongValue::new(message).advise("give each client its own name")));
            }
        }
        let fields = ["token_sha256", "token_file", "token"];
        let Some((field, text, span)) = entry.one_of(&fields, problems) else { continue };
        let token = match field {
            "token_sha256" => TokenFingerprint::parse(text).ok_or_else(|| invalid_fingerprint(text)),
            "token_file" => {
                secret_file(sources, folders, text).and_then(|text| token_fingerprint(text.trim()))
            }
            _ => token_fingerprint(text),
        };
        let token = match token {
            Ok(token) => token,
            Err(wrong) => {
                problems.push(span.problem(wrong));
                continue;
            }
        };
        if field == "token" && text.chars().count() < MIN_ADVISED_TOKEN_CHARS {
            let message = format!(
                "the token of client {} is short: {MIN_ADVISED_TOKEN_CHARS} random characters are safer",
                index + 1
            );
            warnings.push(span.warning(message));
        }
        if let Some(first) = tokens.insert(token.to_string(), index) {
            let message = format!("client {} has the same token as client {}", index + 1, first + 1);
            problems.push(span.problem(WrongValue::new(message).advise("give each client its own token")));
        }
        if let Some((_, name, _)) = name {
            clients.push(ClientConfig { name: name.to_owned(), token, rules });
        }
    }
    clients
}

/// Names that usage records and metrics use for requests without a configured client.
const RESERVED: [(&str, &str); 3] = [
    ("own", "requests with a key of their own and without a token"),
    ("local", "requests while there are no clients"),
    ("other", "clients beyond the limit of names"),
];

fn check_client_name(name: &str) -> Result<(), WrongValue> {
    check_name(name)?;
    match RESERVED.iter().find(|(reserved, _)| *reserved == name) {
        Some((_, usage)) => {
            Err(WrongValue::new(format!("the name `{name}` is taken: records use it for {usage}"))
                .advise("give the client another name"))
        }
        None => Ok(()),
    }
}

/// Hashes a token, which must be valid in a header.
fn token_fingerprint(text: &str) -> Result<TokenFingerprint, WrongValue> {
    if text.is_empty() {
        return Err(WrongValue::new("the token is empty"));
    }
    if !text.bytes().all(|byte| byte.is_ascii_graphic()) {
        let message = "the token has a space, a control character or a letter beyond ASCII";
        return Err(
            WrongValue::new(message).advise("it is invalid in a header: write letters, digits and signs")
        );
    }
    Ok(TokenFingerprint::of(text))
}

/// The error for an invalid fingerprint. It contains only the length, because the text may be the
/// token.
fn invalid_fingerprint(text: &str) -> WrongValue {
    let message = match text.chars().count() {
        64 => "this has other characters than hexadecimal digits".to_owned(),
        count => format!("this has {count} characters, a SHA-256 has 64"),
    };
    WrongValue::new(message)
        .advise("write the output of `printf %s TOKEN | sha256sum`, or the token itself as `token`")
}

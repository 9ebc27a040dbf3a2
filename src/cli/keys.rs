//! `keychoir keys list`: prints the short forms of the configured keys with their states. The
//! states are those of the running Keychoir, as in `keychoir status`, or else those in the
//! database. Never prints a key.

use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::database::{DatabaseError, DatabaseOptions};
use super::status::{self, keys_of_running, status_words};
use super::table::{Alignment, Table, cut, short};
use super::{print, print_error, runtime};
use crate::clock;
use crate::config::{Config, KeyConfig};
use crate::store::{KnownKey, ReadError};

#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// List the keys of the pool in their order.
    List(ListArguments),
}

#[derive(Debug, Args)]
struct ListArguments {
    #[command(flatten)]
    database: DatabaseOptions,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// A row of the list.
struct ListedKey {
    short: String,
    name: Option<String>,
    workspace: Option<String>,
    state: Option<ReportedKeyState>,
}

/// The state of a key.
struct ReportedKeyState {
    status: String,
    is_near_limit: bool,
    count: u64,
    limit: Option<u64>,
    remaining: u64,
}

impl ReportedKeyState {
    /// The state in the database. A key is near its limit from this used share on.
    fn of_database(key: &KnownKey, near_limit_ratio: f64) -> Self {
        Self {
            status: key.status.word().to_owned(),
            is_near_limit: key.quota.is_near_limit(near_limit_ratio),
            count: key.quota.count,
            limit: key.quota.limit,
            remaining: key.quota.remaining(),
        }
    }

    fn of_running_server(key: &status::KeyRow) -> Self {
        Self {
            status: key.status.clone(),
            is_near_limit: key.is_near_limit,
            count: key.character_count,
            limit: (!key.is_unknown()).then_some(key.character_limit),
            remaining: key.remaining_characters,
        }
    }
}

pub(super) fn run(arguments: Arguments) -> ExitCode {
    let Command::List(ListArguments { database, json }) = arguments.command;
    let config = match database.config() {
        Ok(config) => config,
        Err(code) => return code,
    };
    if let Some(keys) = database.uses_configured_file().then(|| running(&config)).flatten() {
        return print_keys(&keys, json, ExitCode::SUCCESS);
    }
    let known_keys = database
        .open_configured(&config)
        .and_then(|database| database.keys(clock::now()).map_err(DatabaseError::from));
    let (known_keys, code) = match known_keys {
        Ok(known_keys) => (known_keys, ExitCode::SUCCESS),
        Err(error) => {
            print_error(&format_args!("keychoir: the state of the keys is unknown: {error}"));
            (Vec::new(), exit_code(&error))
        }
    };
    print_keys(&list(&config, &known_keys), json, code)
}

/// The keys and states of the Keychoir that runs with this configuration. `None` if no Keychoir
/// responds, or if it requires a token or has other keys.
fn running(config: &Config) -> Option<Vec<ListedKey>> {
    let keys = runtime().ok()?.block_on(keys_of_running(config))?;
    let is_same = |(config, key): (&KeyConfig, &status::KeyRow)| config.key.short().as_str() == key.short_key;
    if keys.len() != config.keys.len() || !config.keys.iter().zip(&keys).all(is_same) {
        return None;
    }
    let listed = |(config, key): (&KeyConfig, &status::KeyRow)| {
        ListedKey::of(config, Some(ReportedKeyState::of_running_server(key)))
    };
    Some(config.keys.iter().zip(&keys).map(listed).collect())
}

fn print_keys(keys: &[ListedKey], json: bool, code: ExitCode) -> ExitCode {
    if json {
        print(&keys.iter().map(row_json).collect::<Value>());
    } else if keys.is_empty() {
        print_error(&"There are no keys yet: give some in ELEVENLABS_API_KEYS=sk_first,sk_second");
    } else {
        print(&table(keys));
    }
    code
}

impl ListedKey {
    fn of(config: &KeyConfig, state: Option<ReportedKeyState>) -> Self {
        Self {
            short: config.key.short().to_string(),
            name: config.name.clone(),
            workspace: config.workspace.clone(),
            state,
        }
    }
}

/// A missing database is reported with the exit code of success.
fn exit_code(error: &DatabaseError) -> ExitCode {
    match error {
        DatabaseError::Ephemeral | DatabaseError::Read(ReadError::NoFile(_) | ReadError::Empty(_)) => {
            ExitCode::SUCCESS
        }
        DatabaseError::Read(
            ReadError::Unreadable { .. }
            | ReadError::Newer { .. }
            | ReadError::Older(_)
            | ReadError::Broken { .. }
            | ReadError::Unusable { .. },
        ) => ExitCode::FAILURE,
    }
}

/// The configured keys, or the keys in the database if none are configured.
fn list(config: &Config, known_keys: &[KnownKey]) -> Vec<ListedKey> {
    let as_state = |known: &KnownKey| ReportedKeyState::of_database(known, config.pool.near_limit_ratio);
    if config.keys.is_empty() {
        let listed = |known: &KnownKey| ListedKey {
            short: known.short.clone(),
            name: known.name.clone(),
            workspace: known.workspace.clone(),
            state: Some(as_state(known)),
        };
        return known_keys.iter().map(listed).collect();
    }
    let listed = |key: &KeyConfig| {
        let hash = key.key.fingerprint().to_string();
        ListedKey::of(key, known_keys.iter().find(|known| known.hash == hash).map(as_state))
    };
    config.keys.iter().map(listed).collect()
}

fn table(keys: &[ListedKey]) -> String {
    let mut table = Table::new([
        ("#", Alignment::Right),
        ("key", Alignment::Left),
        ("name", Alignment::Left),
        ("workspace", Alignment::Left),
        ("status", Alignment::Left),
        ("left", Alignment::Right),
    ]);
    for (index, key) in keys.iter().enumerate() {
        let text =
            |text: &Option<String>| text.as_deref().map_or_else(|| "-".to_owned(), |text| cut(text, 14));
        let remaining =
            key.state.as_ref().filter(|state| state.limit.is_some()).map(|state| short(state.remaining));
        let status = key.state.as_ref().map(|state| status_words(&state.status, state.is_near_limit));
        table.row([
            (index + 1).to_string(),
            key.short.clone(),
            text(&key.name),
            text(&key.workspace),
            status.unwrap_or_else(|| "-".to_owned()),
            remaining.unwrap_or_else(|| "unknown".to_owned()),
        ]);
    }
    table.text()
}

fn row_json(key: &ListedKey) -> Value {
    let state = key.state.as_ref();
    json!({
        "shortKey": key.short,
        "name": key.name,
        "workspace": key.workspace,
        "status": state.map(|state| &state.status),
        "characterCount": state.map(|state| state.count),
        "characterLimit": state.and_then(|state| state.limit),
    })
}

//! `keychoir keys list`: prints the short forms of the configured keys and their states. The states come
//! from the running Keychoir, as in `keychoir status`, or else from the database.

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::database::{DatabaseError, DatabaseOptions};
use super::status::{self, format_status};
use super::table::{Alignment, Table, abbreviate, truncate};
use super::{CommandResult, build_runtime, fail, print, print_error};
use crate::clock;
use crate::config::{Config, KeyConfig};
use crate::store::{ReadError, StoredKey};

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
    /// The state in the database. `near_limit_ratio` is the used share from which a key is near its limit.
    fn from_stored(key: &StoredKey, near_limit_ratio: f64) -> Self {
        Self {
            status: key.status.as_str().to_owned(),
            is_near_limit: key.quota.is_near_limit(near_limit_ratio),
            count: key.quota.count,
            limit: key.quota.limit,
            remaining: key.quota.remaining(),
        }
    }

    /// The state in the status document of a running Keychoir.
    fn from_status(key: &status::ReportedKeyStatus) -> Self {
        Self {
            status: key.status.clone(),
            is_near_limit: key.is_near_limit,
            count: key.character_count,
            limit: (!key.has_unknown_limit()).then_some(key.character_limit),
            remaining: key.remaining_characters,
        }
    }
}

pub(super) fn run(arguments: Arguments) -> CommandResult {
    let Command::List(ListArguments { database, json }) = arguments.command;
    let config = database.load_config()?;
    if let Some(keys) = database.uses_configured_file().then(|| fetch_running_keys(&config)).flatten() {
        print_keys(&keys, json);
        return Ok(());
    }
    let stored_keys = database.open_configured(&config).and_then(|database| Ok(database.keys(clock::now())?));
    let (stored_keys, result) = match stored_keys {
        Ok(stored_keys) => (stored_keys, Ok(())),
        Err(error) => {
            let code = fail(format_args!("the state of the keys is unknown: {error}"));
            (Vec::new(), if is_missing(&error) { Ok(()) } else { Err(code) })
        }
    };
    print_keys(&list_keys(&config, &stored_keys), json);
    result
}

/// Fetches the states of the configured keys from the Keychoir that runs with this configuration.
/// Returns `None` if it does not respond, requires a token, or has other keys.
fn fetch_running_keys(config: &Config) -> Option<Vec<ListedKey>> {
    let keys = build_runtime().ok()?.block_on(status::fetch_keys(config))?;
    let is_same = |(config, key): (&KeyConfig, &status::ReportedKeyStatus)| {
        config.key.short().as_str() == key.short_key
    };
    if keys.len() != config.keys.len() || !config.keys.iter().zip(&keys).all(is_same) {
        return None;
    }
    let listed_keys = config
        .keys
        .iter()
        .zip(&keys)
        .map(|(config, key)| ListedKey::new(config, Some(ReportedKeyState::from_status(key))));
    Some(listed_keys.collect())
}

fn print_keys(keys: &[ListedKey], json: bool) {
    if json {
        print(&keys.iter().map(key_json).collect::<Value>());
    } else if keys.is_empty() {
        print_error(&"No keys are configured: set ELEVENLABS_API_KEYS=sk_first,sk_second");
    } else {
        print(&format_table(keys));
    }
}

impl ListedKey {
    fn new(config: &KeyConfig, state: Option<ReportedKeyState>) -> Self {
        Self {
            short: config.key.short().to_string(),
            name: config.name.clone(),
            workspace: config.workspace.clone(),
            state,
        }
    }
}

/// Whether there is no database yet, which is not a failure.
fn is_missing(error: &DatabaseError) -> bool {
    match error {
        DatabaseError::Ephemeral | DatabaseError::Read(ReadError::NoFile(_) | ReadError::Empty(_)) => true,
        DatabaseError::Read(
            ReadError::Unreadable { .. }
            | ReadError::Newer { .. }
            | ReadError::Older(_)
            | ReadError::Corrupt { .. }
            | ReadError::Unusable { .. },
        ) => false,
    }
}

/// The configured keys, or the keys in the database if none are configured.
fn list_keys(config: &Config, stored_keys: &[StoredKey]) -> Vec<ListedKey> {
    let state = |key: &StoredKey| ReportedKeyState::from_stored(key, config.pool.near_limit_ratio);
    if config.keys.is_empty() {
        let listed_keys = stored_keys.iter().map(|key| ListedKey {
            short: key.short.clone(),
            name: key.name.clone(),
            workspace: key.workspace.clone(),
            state: Some(state(key)),
        });
        return listed_keys.collect();
    }
    let listed_keys = config.keys.iter().map(|key| {
        let hash = key.key.fingerprint().to_string();
        ListedKey::new(key, stored_keys.iter().find(|stored_key| stored_key.hash == hash).map(state))
    });
    listed_keys.collect()
}

fn format_table(keys: &[ListedKey]) -> String {
    let mut table = Table::new([
        ("#", Alignment::Right),
        ("key", Alignment::Left),
        ("name", Alignment::Left),
        ("workspace", Alignment::Left),
        ("status", Alignment::Left),
        ("left", Alignment::Right),
    ]);
    for (index, key) in keys.iter().enumerate() {
        let format_name =
            |name: &Option<String>| name.as_deref().map_or_else(|| "-".to_owned(), |name| truncate(name, 14));
        let remaining =
            key.state.as_ref().filter(|state| state.limit.is_some()).map(|state| abbreviate(state.remaining));
        let status = key.state.as_ref().map(|state| format_status(&state.status, state.is_near_limit));
        table.add_row([
            (index + 1).to_string(),
            key.short.clone(),
            format_name(&key.name),
            format_name(&key.workspace),
            status.unwrap_or_else(|| "-".to_owned()),
            remaining.unwrap_or_else(|| "unknown".to_owned()),
        ]);
    }
    table.format()
}

fn key_json(key: &ListedKey) -> Value {
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

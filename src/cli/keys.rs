//! `keychoir keys`: lists, adds, removes, pauses, resumes and checks the keys of the pool. `list` prints the short
//! forms of the keys and their states. It fetches the states from the running Keychoir, like `keychoir status`, or else
//! reads them from the database. The other subcommands use the admin API of the running Keychoir, or the overlay.

mod check;

use std::fs::File;
use std::io::{self, IsTerminal, Read};
use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::control::{ControlOptions, parse_end};
use super::database::{DatabaseError, DatabaseOptions};
use super::status::{self, format_status};
use super::table::{Alignment, Table, abbreviate, truncate};
use super::{CommandResult, EX_INVALID_ARGUMENTS, build_runtime, fail, fail_with, print, print_error};
use crate::admin::control::{Change, NewKey};
use crate::clock;
use crate::config::{Config, KeyConfig};
use crate::policy::units::UnixMs;
use crate::secret::ApiKey;
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
    /// Add a key, which is read from standard input or a file.
    Add(AddArguments),
    /// Remove a key that was added with `keys add`.
    Remove {
        #[command(flatten)]
        key: KeyArgument,
        #[command(flatten)]
        options: ControlOptions,
    },
    /// Let a key finish its requests in progress, and assign no new requests to it.
    Pause {
        #[command(flatten)]
        key: KeyArgument,
        /// The time at which the key is resumed, or a duration until then, such as 2h. By default, only
        /// `keys resume` resumes it.
        #[arg(long, value_name = "TIME", value_parser = parse_end)]
        until: Option<UnixMs>,
        /// The reason, which the status shows.
        #[arg(long, value_name = "TEXT")]
        reason: Option<String>,
        #[command(flatten)]
        options: ControlOptions,
    },
    /// Check keys at the provider: their plan, credits, permissions and latency.
    Check(check::CheckArguments),
    /// End the pause of a key.
    Resume {
        #[command(flatten)]
        key: KeyArgument,
        #[command(flatten)]
        options: ControlOptions,
    },
}

#[derive(Debug, Args)]
struct KeyArgument {
    /// The name, the id or the short form of the key, but not the key itself.
    #[arg(value_name = "NAME")]
    key: String,
}

#[derive(Debug, Args)]
struct AddArguments {
    /// The key name: 1 to 64 of a-z, 0-9, - and _.
    name: String,
    /// The workspace name of the key. Keys of one workspace share its credits.
    #[arg(long, value_name = "NAME")]
    workspace: Option<String>,
    /// The base URL at which the key is valid, if it is not upstream.base_url.
    #[arg(long, value_name = "URL")]
    base_url: Option<String>,
    /// The key's share of the requests under the strategies `round-robin` and `least-requests`.
    #[arg(long, value_name = "NUMBER")]
    weight: Option<u32>,
    /// Read the key from this file instead of standard input.
    #[arg(long, value_name = "FILE")]
    key_file: Option<PathBuf>,
    #[command(flatten)]
    options: ControlOptions,
}

#[derive(Debug, Args)]
struct ListArguments {
    #[command(flatten)]
    database: DatabaseOptions,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// A key of the list. The `id` is `None` for a key that is only in the database, and the `state` is `None` if it is
/// unknown.
struct ListedKey {
    id: Option<String>,
    short_key: String,
    name: Option<String>,
    workspace: Option<String>,
    state: Option<ReportedKeyState>,
}

/// The state of a key, from the running Keychoir or from the database.
struct ReportedKeyState {
    status: String,
    is_near_limit: bool,
    count: u64,
    limit: Option<u64>,
    remaining: u64,
}

impl ReportedKeyState {
    /// Converts the state in the database. A key is near its limit if the used share of the limit is at least
    /// `near_limit_ratio`.
    fn from_stored(key: &StoredKey, near_limit_ratio: f64) -> Self {
        Self {
            status: key.status.as_str().to_owned(),
            is_near_limit: key.quota.is_near_limit(near_limit_ratio),
            count: key.quota.count,
            limit: key.quota.limit,
            remaining: key.quota.remaining(),
        }
    }

    /// Converts the state in the status document of a running Keychoir.
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
    match arguments.command {
        Command::List(arguments) => run_list(&arguments),
        Command::Add(arguments) => add_key(arguments),
        Command::Check(arguments) => check::run(&arguments),
        Command::Remove { key: KeyArgument { key }, options } => {
            options.make_change(Change::RemoveKey { key }, "Removed the key.")
        }
        Command::Pause { key: KeyArgument { key }, until, reason, options } => {
            options.make_change(Change::PauseKey { key, until, reason }, "Paused the key.")
        }
        Command::Resume { key: KeyArgument { key }, options } => {
            options.make_change(Change::ResumeKey { key }, "Resumed the key.")
        }
    }
}

/// Maximum number of bytes of the input with a key, which may have surrounding white space.
const MAX_KEY_BYTES: u64 = 4096;

fn add_key(arguments: AddArguments) -> CommandResult {
    let AddArguments { name, workspace, base_url, weight, key_file, options } = arguments;
    let mut input = String::new();
    let read_result = match &key_file {
        Some(path) => {
            File::open(path).and_then(|file| file.take(MAX_KEY_BYTES + 1).read_to_string(&mut input))
        }
        None => {
            if io::stdin().is_terminal() {
                print_error(&"Paste the key, and press Enter and Ctrl-D:");
            }
            io::stdin().take(MAX_KEY_BYTES + 1).read_to_string(&mut input)
        }
    };
    read_result.map_err(|error| fail(format_args!("the key cannot be read: {error}")))?;
    if input.len() as u64 > MAX_KEY_BYTES {
        return Err(fail_with(
            EX_INVALID_ARGUMENTS,
            format_args!("the input is not a key: it has more than {MAX_KEY_BYTES} bytes"),
        ));
    }
    let key = ApiKey::new(input.trim()).map_err(|error| fail_with(EX_INVALID_ARGUMENTS, error))?;
    let message = format!("Added the key `{name}` ({}).", key.short());
    options.make_change(Change::AddKey(NewKey { name, key, workspace, base_url, weight }), &message)
}

fn run_list(arguments: &ListArguments) -> CommandResult {
    let ListArguments { database, json } = arguments;
    let json = *json;
    let config = database.load_config()?;
    if let Some(keys) = database.uses_configured_file().then(|| fetch_running_keys(&config)).flatten() {
        print_keys(&keys, json);
        return Ok(());
    }
    let read_keys = database.open_configured(&config).and_then(|reader| Ok(reader.keys(clock::now())?));
    let (stored_keys, command_result) = match read_keys {
        Ok(stored_keys) => (stored_keys, Ok(())),
        Err(error) => {
            let code = fail(format_args!("the state of the keys is unknown: {error}"));
            (Vec::new(), if has_no_database(&error) { Ok(()) } else { Err(code) })
        }
    };
    print_keys(&list_keys(&config, &stored_keys), json);
    command_result
}

/// Fetches the states of the configured keys from the Keychoir that runs with `config`. Returns `None` if it does not
/// respond, requires a token, or has different keys.
fn fetch_running_keys(config: &Config) -> Option<Vec<ListedKey>> {
    let keys = build_runtime().ok()?.block_on(status::fetch_keys(config))?;
    let is_same_key = |(configured, reported): (&KeyConfig, &status::ReportedKeyStatus)| {
        configured.key.short().as_str() == reported.short_key
    };
    if keys.len() != config.keys.len() || !config.keys.iter().zip(&keys).all(is_same_key) {
        return None;
    }
    let now = clock::now();
    let listed_keys = config.keys.iter().zip(&keys).map(|(configured, reported)| {
        ListedKey::new(config, configured, Some(ReportedKeyState::from_status(reported)), now)
    });
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
    /// Creates the list's description of a configured key. A pause replaces the status, because neither the status
    /// document nor the database contains pauses.
    fn new(config: &Config, key: &KeyConfig, state: Option<ReportedKeyState>, now: UnixMs) -> Self {
        let fingerprint = key.key.fingerprint();
        let is_paused = config
            .paused_keys
            .iter()
            .any(|paused| paused.fingerprint == fingerprint && paused.pause().is_active(now));
        let state = match state {
            Some(state) if is_paused => Some(ReportedKeyState { status: status::PAUSED.to_owned(), ..state }),
            state => state,
        };
        Self {
            id: Some(fingerprint.key_id()),
            short_key: key.key.short().to_string(),
            name: key.name.clone(),
            workspace: key.workspace.clone(),
            state,
        }
    }
}

/// Returns whether there is no database, because it does not exist yet or is kept in memory. A missing database is
/// not a failure.
fn has_no_database(error: &DatabaseError) -> bool {
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

/// Returns the configured keys, or the keys in the database if none are configured.
fn list_keys(config: &Config, stored_keys: &[StoredKey]) -> Vec<ListedKey> {
    let read_state = |key: &StoredKey| ReportedKeyState::from_stored(key, config.pool.near_limit_ratio);
    if config.keys.is_empty() {
        let listed_keys = stored_keys.iter().map(|key| ListedKey {
            id: None,
            short_key: key.short.clone(),
            name: key.name.clone(),
            workspace: key.workspace.clone(),
            state: Some(read_state(key)),
        });
        return listed_keys.collect();
    }
    let listed_keys = config.keys.iter().map(|key| {
        let hash = key.key.fingerprint().to_string();
        let stored_key = stored_keys.iter().find(|stored_key| stored_key.hash == hash);
        ListedKey::new(config, key, stored_key.map(read_state), clock::now())
    });
    listed_keys.collect()
}

/// Maximum number of characters of the name of a key or workspace, so that the other columns fit into the line.
const MAX_NAME_CHARS: usize = 14;

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
        let format_name = |name: &Option<String>| {
            name.as_deref().map_or_else(|| "-".to_owned(), |name| truncate(name, MAX_NAME_CHARS))
        };
        let remaining =
            key.state.as_ref().filter(|state| state.limit.is_some()).map(|state| abbreviate(state.remaining));
        let status = key.state.as_ref().map(|state| format_status(&state.status, state.is_near_limit));
        table.add_row([
            (index + 1).to_string(),
            key.short_key.clone(),
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
        "id": key.id,
        "shortKey": key.short_key,
        "name": key.name,
        "workspace": key.workspace,
        "status": state.map(|state| &state.status),
        "characterCount": state.map(|state| state.count),
        "characterLimit": state.and_then(|state| state.limit),
    })
}

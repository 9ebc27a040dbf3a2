//! `keychoir keys list`: prints the configured keys by their short forms, with their state: that of
//! the running Keychoir, in agreement with `keychoir status`, or else that in the database. Never
//! prints a key.

use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::books::{Books, BooksError};
use super::status::{self, keys_of_running, status_words};
use super::table::{Side, Table, cut, short};
use super::{complain, print, runtime};
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
    List(List),
}

#[derive(Debug, Args)]
struct List {
    #[command(flatten)]
    books: Books,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// A row of the list.
struct Listed {
    short: String,
    name: Option<String>,
    workspace: Option<String>,
    known: Option<Known>,
}

/// The state of a key.
struct Known {
    status: String,
    is_near_limit: bool,
    count: u64,
    limit: Option<u64>,
    left: u64,
}

impl Known {
    /// The state in the database; near its limit from this share on.
    fn of_books(key: &KnownKey, near_limit_ratio: f64) -> Self {
        Self {
            status: key.status.word().to_owned(),
            is_near_limit: key.quota.is_near_limit(near_limit_ratio),
            count: key.quota.count,
            limit: key.quota.limit,
            left: key.quota.remaining(),
        }
    }

    fn of_running(key: &status::Key) -> Self {
        Self {
            status: key.status.clone(),
            is_near_limit: key.is_near_limit,
            count: key.character_count,
            limit: (!key.is_unknown()).then_some(key.character_limit),
            left: key.remaining_characters,
        }
    }
}

pub(super) fn run(arguments: Arguments) -> ExitCode {
    let Command::List(List { books, json }) = arguments.command;
    let config = match books.config() {
        Ok(config) => config,
        Err(code) => return code,
    };
    if let Some(keys) = books.is_of_configuration().then(|| running(&config)).flatten() {
        return tell(&keys, json, ExitCode::SUCCESS);
    }
    let known = books.open_of(&config).and_then(|books| books.keys(clock::now()).map_err(BooksError::from));
    let (known, code) = match known {
        Ok(known) => (known, ExitCode::SUCCESS),
        Err(error) => {
            complain(&format_args!("keychoir: how the keys stand is not known: {error}"));
            (Vec::new(), code(&error))
        }
    };
    tell(&list(&config, &known), json, code)
}

/// The keys and states of the Keychoir that runs with this configuration. `None` if there is no
/// response, or if it requires a token or has other keys.
fn running(config: &Config) -> Option<Vec<Listed>> {
    let keys = runtime().ok()?.block_on(keys_of_running(config))?;
    let is_same = |(config, key): (&KeyConfig, &status::Key)| config.key.short().as_str() == key.short_key;
    if keys.len() != config.keys.len() || !config.keys.iter().zip(&keys).all(is_same) {
        return None;
    }
    let listed = |(config, key): (&KeyConfig, &status::Key)| Listed::of(config, Some(Known::of_running(key)));
    Some(config.keys.iter().zip(&keys).map(listed).collect())
}

fn tell(keys: &[Listed], json: bool, code: ExitCode) -> ExitCode {
    if json {
        print(&keys.iter().map(row_json).collect::<Value>());
    } else if keys.is_empty() {
        complain(&"There are no keys yet: give some in ELEVENLABS_API_KEYS=sk_first,sk_second");
    } else {
        print(&table(keys));
    }
    code
}

impl Listed {
    fn of(config: &KeyConfig, known: Option<Known>) -> Self {
        Self {
            short: config.key.short().to_string(),
            name: config.name.clone(),
            workspace: config.workspace.clone(),
            known,
        }
    }
}

/// A missing database is no failure.
fn code(error: &BooksError) -> ExitCode {
    match error {
        BooksError::Ephemeral | BooksError::Read(ReadError::NoFile(_) | ReadError::Empty(_)) => {
            ExitCode::SUCCESS
        }
        BooksError::Read(
            ReadError::Unreadable { .. }
            | ReadError::Newer { .. }
            | ReadError::Older(_)
            | ReadError::Broken { .. }
            | ReadError::Unusable { .. },
        ) => ExitCode::FAILURE,
    }
}

/// The configured keys; without any, those in the database.
fn list(config: &Config, known: &[KnownKey]) -> Vec<Listed> {
    let as_known = |known: &KnownKey| Known::of_books(known, config.pool.near_limit_ratio);
    if config.keys.is_empty() {
        let listed = |known: &KnownKey| Listed {
            short: known.short.clone(),
            name: known.name.clone(),
            workspace: known.workspace.clone(),
            known: Some(as_known(known)),
        };
        return known.iter().map(listed).collect();
    }
    let listed = |key: &KeyConfig| {
        let hash = key.key.fingerprint().to_string();
        Listed::of(key, known.iter().find(|known| known.hash == hash).map(as_known))
    };
    config.keys.iter().map(listed).collect()
}

fn table(keys: &[Listed]) -> String {
    let mut table = Table::new([
        ("#", Side::Right),
        ("key", Side::Left),
        ("name", Side::Left),
        ("workspace", Side::Left),
        ("status", Side::Left),
        ("left", Side::Right),
    ]);
    for (index, key) in keys.iter().enumerate() {
        let text =
            |text: &Option<String>| text.as_deref().map_or_else(|| "-".to_owned(), |text| cut(text, 14));
        let left = key.known.as_ref().filter(|known| known.limit.is_some()).map(|known| short(known.left));
        let status = key.known.as_ref().map(|known| status_words(&known.status, known.is_near_limit));
        table.row([
            (index + 1).to_string(),
            key.short.clone(),
            text(&key.name),
            text(&key.workspace),
            status.unwrap_or_else(|| "-".to_owned()),
            left.unwrap_or_else(|| "unknown".to_owned()),
        ]);
    }
    table.text()
}

fn row_json(key: &Listed) -> Value {
    let known = key.known.as_ref();
    json!({
        "shortKey": key.short,
        "name": key.name,
        "workspace": key.workspace,
        "status": known.map(|known| &known.status),
        "characterCount": known.map(|known| known.count),
        "characterLimit": known.and_then(|known| known.limit),
    })
}

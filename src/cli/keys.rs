//! `keychoir keys list`: the configured keys by their short forms, with how the books say they
//! stand. Never a key.

use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::books::{Books, BooksError};
use super::table::{Side, Table, cut, short};
use super::{complain, print};
use crate::clock;
use crate::config::Config;
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

/// A key as it is listed.
struct Listed {
    short: String,
    name: Option<String>,
    workspace: Option<String>,
    known: Option<KnownKey>,
}

pub(super) fn run(arguments: Arguments) -> ExitCode {
    let Command::List(List { books, json }) = arguments.command;
    let config = match books.config() {
        Ok(config) => config,
        Err(code) => return code,
    };
    let known = books.open_of(&config).and_then(|books| books.keys(clock::now()).map_err(BooksError::from));
    let (known, code) = match known {
        Ok(known) => (known, ExitCode::SUCCESS),
        Err(error) => {
            complain(&format_args!("keychoir: how the keys stand is not known: {error}"));
            (Vec::new(), code(&error))
        }
    };
    let keys = list(&config, known);
    if json {
        print(&keys.iter().map(row_json).collect::<Value>());
    } else if keys.is_empty() {
        complain(&"There are no keys yet: give some in ELEVENLABS_API_KEYS=sk_first,sk_second");
    } else {
        print(&table(&keys));
    }
    code
}

/// Books that are not there yet are no failure.
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

/// The configured keys; where none are, those that the books know.
fn list(config: &Config, known: Vec<KnownKey>) -> Vec<Listed> {
    if config.keys.is_empty() {
        let listed = |known: KnownKey| Listed {
            short: known.short.clone(),
            name: known.name.clone(),
            workspace: known.workspace.clone(),
            known: Some(known),
        };
        return known.into_iter().map(listed).collect();
    }
    let listed = |key: &crate::config::KeyConfig| {
        let hash = key.key.fingerprint().to_string();
        Listed {
            short: key.key.short().to_string(),
            name: key.name.clone(),
            workspace: key.workspace.clone(),
            known: known.iter().find(|known| known.hash == hash).cloned(),
        }
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
        let quota = key.known.as_ref().map(|known| known.quota).filter(|quota| quota.limit.is_some());
        table.row([
            (index + 1).to_string(),
            key.short.clone(),
            text(&key.name),
            text(&key.workspace),
            key.known.as_ref().map_or_else(|| "-".to_owned(), |known| known.status.word().replace('_', " ")),
            quota.map_or_else(|| "?".to_owned(), |quota| short(quota.remaining())),
        ]);
    }
    table.text()
}

fn row_json(key: &Listed) -> Value {
    let quota = key.known.as_ref().map(|known| known.quota);
    json!({
        "shortKey": key.short,
        "name": key.name,
        "workspace": key.workspace,
        "status": key.known.as_ref().map(|known| known.status.word()),
        "characterCount": quota.map(|quota| quota.count),
        "characterLimit": quota.and_then(|quota| quota.limit),
    })
}

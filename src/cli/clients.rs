//! `keychoir clients`: adds, lists and removes clients in the configuration file; a running
//! Keychoir applies the change when it reloads.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand};
use rustls::crypto::ring::default_provider;
use serde_json::{Value, json};

use super::{EX_CONFIG, complain, failed, load, print};
use crate::config::{ClientConfig, EditError, Need, NewClient, Overrides, add_client, remove_client};
use crate::policy::client::Rules;
use crate::secret::TokenFingerprint;

#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Add a client and print its token, which is shown only now.
    Add(Adding),
    /// List the clients and what they may do.
    List(Place),
    /// Remove a client: its token is invalid from then on.
    Revoke {
        /// The client's name.
        name: String,
        #[command(flatten)]
        place: Place,
    },
}

#[derive(Debug, Args)]
struct Place {
    /// The configuration file; KEYCHOIR_CONFIG may name it as well.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct Adding {
    /// The client's name: 1 to 64 of a-z, 0-9, - and _.
    name: String,
    /// Its quota, which the entry calls `quota`: "3 requests", "50 requests per day", "10_000
    /// credits per month".
    #[arg(long, value_name = "TEXT")]
    allowance: Option<String>,
    /// Its rate limit, which the entry calls `rate_limit`: "60 per minute", "5 per second".
    #[arg(long, value_name = "TEXT")]
    rate: Option<String>,
    /// The maximum of its concurrent requests, which the entry calls `max_concurrent`.
    #[arg(long, value_name = "COUNT")]
    concurrency: Option<u32>,
    /// A path below which it may send requests, such as /v1/text-to-speech. May be given several
    /// times.
    #[arg(long = "path", value_name = "PATH")]
    paths: Vec<String>,
    /// The name of a key that serves it. May be given several times.
    #[arg(long = "key", value_name = "NAME")]
    keys: Vec<String>,
    /// A workspace whose keys serve it. May be given several times.
    #[arg(long = "workspace", value_name = "NAME")]
    workspaces: Vec<String>,
    /// It may bring a key of its own.
    #[arg(long)]
    bring_your_own_key: bool,
    #[command(flatten)]
    place: Place,
}

impl Place {
    fn overrides(&self) -> Overrides {
        // Neither keys nor the usage database are needed to change clients.
        Overrides {
            config_file: self.config.clone(),
            is_ephemeral: true,
            keys: Need::Optional,
            ..Overrides::default()
        }
    }
}

pub(super) fn run(arguments: Arguments) -> ExitCode {
    match arguments.command {
        Command::Add(adding) => add(adding),
        Command::List(place) => list(&place),
        Command::Revoke { name, place } => revoke(&name, &place),
    }
}

fn add(adding: Adding) -> ExitCode {
    let Adding { name, allowance, rate, concurrency, paths, keys, workspaces, bring_your_own_key, place } =
        adding;
    let client = NewClient {
        name,
        quota: allowance,
        rate_limit: rate,
        max_concurrent: concurrency,
        paths,
        keys,
        workspaces,
        may_bring_key: bring_your_own_key,
    };
    let Some(token) = random_token() else { return failed(&"the system has no random numbers to give") };
    let (file, _) = match add_client(&place.overrides(), &client, &TokenFingerprint::of(&token)) {
        Ok(changed) => changed,
        Err(error) => return not_changed(&error),
    };
    let (name, file) = (&client.name, file.display());
    complain(&format_args!("Added the client `{name}` to {file}. Its token is shown only now:"));
    if place.json {
        print(&json!({"name": name, "token": token}));
    } else {
        print(&token);
    }
    ExitCode::SUCCESS
}

fn revoke(name: &str, place: &Place) -> ExitCode {
    let (file, loaded) = match remove_client(&place.overrides(), name) {
        Ok(changed) => changed,
        Err(error) => return not_changed(&error),
    };
    complain(&format_args!("Took the client `{name}` out of {}.", file.display()));
    let left = loaded.config.clients.len();
    if left == 0 {
        complain(&"No client is left: apps on this machine need no token.");
    }
    if place.json {
        print(&json!({"name": name, "clientsLeft": left}));
    }
    ExitCode::SUCCESS
}

fn list(place: &Place) -> ExitCode {
    let loaded = match load(&place.overrides()) {
        Ok(loaded) => loaded,
        Err(code) => return code,
    };
    let clients = &loaded.config.clients;
    if place.json {
        print(&Value::from(clients.iter().map(document).collect::<Vec<_>>()));
        return ExitCode::SUCCESS;
    }
    let width = clients.iter().map(|client| client.name.len()).max().unwrap_or(0);
    for ClientConfig { name, rules, .. } in clients {
        print(&format_args!("{name:width$}  {}", summary(rules)));
    }
    if clients.is_empty() {
        complain(&"There are no clients: apps on this machine need no token.");
    }
    ExitCode::SUCCESS
}

fn document(client: &ClientConfig) -> Value {
    let Rules { allowance, rate, concurrency, paths, pins, may_bring_key, may_take_tokens } = &client.rules;
    json!({
        "name": client.name,
        "quota": allowance.map(|allowance| allowance.to_string()),
        "rateLimit": rate.map(|rate| rate.to_string()),
        "maxConcurrent": concurrency,
        "paths": paths,
        "keys": pins.keys,
        "workspaces": pins.workspaces,
        "bringYourOwnKey": may_bring_key,
        "providerTokens": may_take_tokens,
    })
}

/// The client's rules in one line.
fn summary(rules: &Rules) -> String {
    let Rules { allowance, rate, concurrency, paths, pins, may_bring_key, may_take_tokens } = rules;
    let mut parts: Vec<String> = Vec::new();
    parts.extend(allowance.map(|allowance| allowance.to_string()));
    parts.extend(rate.map(|rate| rate.to_string()));
    parts.extend(concurrency.map(|count| format!("{count} at once")));
    for (what, list) in [("below", paths), ("keys", &pins.keys), ("workspaces", &pins.workspaces)] {
        if !list.is_empty() {
            parts.push(format!("{what} {}", list.join(" ")));
        }
    }
    parts.extend(may_bring_key.then(|| "may bring its own key".to_owned()));
    parts.extend(may_take_tokens.then(|| "may ask for tokens of the provider".to_owned()));
    if parts.is_empty() { "without bounds".to_owned() } else { parts.join(", ") }
}

fn not_changed(error: &EditError) -> ExitCode {
    complain(&format_args!("keychoir: {error}"));
    match error {
        EditError::Unwritable { .. } | EditError::Changed => ExitCode::FAILURE,
        EditError::NoFile
        | EditError::Unreadable { .. }
        | EditError::Exists(_)
        | EditError::Unknown(_)
        | EditError::NotTables
        | EditError::Mistaken(_) => ExitCode::from(EX_CONFIG),
    }
}

/// A token of 192 random bits. Its prefix makes it recognizable to people and to secret scanners.
fn random_token() -> Option<String> {
    let mut bytes = [0_u8; 24];
    default_provider().secure_random.fill(&mut bytes).ok()?;
    let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    Some(format!("kc_{digits}"))
}

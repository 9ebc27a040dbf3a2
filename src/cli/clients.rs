//! `keychoir clients`: adds, lists and removes clients in the configuration file. A running
//! Keychoir applies the change when it reloads the file.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand};
use rustls::crypto::ring::default_provider;
use serde_json::{Value, json};

use super::{EX_CONFIG, failure, load, print, print_error};
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
    Add(NewClientArguments),
    /// List the clients and what they may do.
    List(ClientsFile),
    /// Remove a client: its token is invalid from then on.
    Revoke {
        /// The client's name.
        name: String,
        #[command(flatten)]
        file: ClientsFile,
    },
}

#[derive(Debug, Args)]
struct ClientsFile {
    /// The configuration file; KEYCHOIR_CONFIG may name it as well.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct NewClientArguments {
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
    file: ClientsFile,
}

impl ClientsFile {
    fn overrides(&self) -> Overrides {
        // A change of clients requires neither keys nor the usage database.
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
        Command::Add(arguments) => add(arguments),
        Command::List(file) => list(&file),
        Command::Revoke { name, file } => revoke(&name, &file),
    }
}

fn add(arguments: NewClientArguments) -> ExitCode {
    let NewClientArguments {
        name,
        allowance,
        rate,
        concurrency,
        paths,
        keys,
        workspaces,
        bring_your_own_key,
        file,
    } = arguments;
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
    let Some(token) = random_token() else { return failure(&"the system provides no random numbers") };
    let (path, _) = match add_client(&file.overrides(), &client, &TokenFingerprint::of(&token)) {
        Ok(changed) => changed,
        Err(error) => return not_changed(&error),
    };
    let (name, path) = (&client.name, path.display());
    print_error(&format_args!("Added the client `{name}` to {path}. Its token is shown only now:"));
    if file.json {
        print(&json!({"name": name, "token": token}));
    } else {
        print(&token);
    }
    ExitCode::SUCCESS
}

fn revoke(name: &str, file: &ClientsFile) -> ExitCode {
    let (path, loaded) = match remove_client(&file.overrides(), name) {
        Ok(changed) => changed,
        Err(error) => return not_changed(&error),
    };
    print_error(&format_args!("Removed the client `{name}` from {}.", path.display()));
    let remaining_clients = loaded.config.clients.len();
    if remaining_clients == 0 {
        print_error(&"No client is left: apps on this machine need no token.");
    }
    if file.json {
        print(&json!({"name": name, "clientsLeft": remaining_clients}));
    }
    ExitCode::SUCCESS
}

fn list(file: &ClientsFile) -> ExitCode {
    let loaded = match load(&file.overrides()) {
        Ok(loaded) => loaded,
        Err(code) => return code,
    };
    let clients = &loaded.config.clients;
    if file.json {
        print(&Value::from(clients.iter().map(document).collect::<Vec<_>>()));
        return ExitCode::SUCCESS;
    }
    let width = clients.iter().map(|client| client.name.len()).max().unwrap_or(0);
    for ClientConfig { name, rules, .. } in clients {
        print(&format_args!("{name:width$}  {}", summary(rules)));
    }
    if clients.is_empty() {
        print_error(&"There are no clients: apps on this machine need no token.");
    }
    ExitCode::SUCCESS
}

fn document(client: &ClientConfig) -> Value {
    let Rules { quota, rate, concurrency, paths, pins, may_bring_key, may_take_tokens } = &client.rules;
    json!({
        "name": client.name,
        "quota": quota.map(|quota| quota.to_string()),
        "rateLimit": rate.map(|rate| rate.to_string()),
        "maxConcurrent": concurrency,
        "paths": paths,
        "keys": pins.keys,
        "workspaces": pins.workspaces,
        "bringYourOwnKey": may_bring_key,
        "providerTokens": may_take_tokens,
    })
}

/// Formats the client's rules in one line.
fn summary(rules: &Rules) -> String {
    let Rules { quota, rate, concurrency, paths, pins, may_bring_key, may_take_tokens } = rules;
    let mut rules_listed: Vec<String> = Vec::new();
    rules_listed.extend(quota.map(|quota| quota.to_string()));
    rules_listed.extend(rate.map(|rate| rate.to_string()));
    rules_listed.extend(concurrency.map(|count| format!("{count} at once")));
    for (label, list) in [("below", paths), ("keys", &pins.keys), ("workspaces", &pins.workspaces)] {
        if !list.is_empty() {
            rules_listed.push(format!("{label} {}", list.join(" ")));
        }
    }
    rules_listed.extend(may_bring_key.then(|| "may bring its own key".to_owned()));
    rules_listed.extend(may_take_tokens.then(|| "may request tokens of the provider".to_owned()));
    if rules_listed.is_empty() { "without bounds".to_owned() } else { rules_listed.join(", ") }
}

fn not_changed(error: &EditError) -> ExitCode {
    print_error(&format_args!("keychoir: {error}"));
    match error {
        EditError::Unwritable { .. } | EditError::Changed => ExitCode::FAILURE,
        EditError::NoFile
        | EditError::Unreadable { .. }
        | EditError::Exists(_)
        | EditError::Unknown(_)
        | EditError::NotTables
        | EditError::Invalid(_) => ExitCode::from(EX_CONFIG),
    }
}

/// Generates a token of 192 random bits. Secret scanners and operators can recognize it by its
/// prefix.
fn random_token() -> Option<String> {
    let mut bytes = [0_u8; 24];
    default_provider().secure_random.fill(&mut bytes).ok()?;
    let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    Some(format!("kc_{digits}"))
}

//! `keychoir clients`: adds, lists and removes clients in the configuration file. A running
//! Keychoir applies the change when it reloads the file.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand};
use rustls::crypto::ring::default_provider;
use serde_json::{Value, json};

use super::{CommandResult, EX_CONFIG, fail, fail_with, load, print, print_error};
use crate::config::{
    ClientConfig, EditError, KeyRequirement, NewClient, Overrides, add_client, remove_client,
};
use crate::policy::client::Rules;
use crate::secret::TokenFingerprint;

#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Add a client and print its token, which cannot be shown again.
    Add(NewClientArguments),
    /// List the clients with their rules and limits.
    List(ClientsFile),
    /// Remove a client, so that its token becomes invalid.
    Revoke {
        /// The client's name.
        name: String,
        #[command(flatten)]
        file: ClientsFile,
    },
}

#[derive(Debug, Args)]
struct ClientsFile {
    /// The configuration file, if KEYCHOIR_CONFIG does not name it.
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
    /// Its `quota`: "3 requests", "50 requests per day" or "10_000 credits per month".
    #[arg(long = "allowance", value_name = "TEXT")]
    quota: Option<String>,
    /// Its `rate_limit`: "60 per minute" or "5 per second".
    #[arg(long = "rate", value_name = "TEXT")]
    rate_limit: Option<String>,
    /// Its `max_concurrent`, the maximum of concurrent requests.
    #[arg(long = "concurrency", value_name = "COUNT")]
    max_concurrent: Option<u32>,
    /// A path below which it may send requests, such as /v1/text-to-speech. May be repeated.
    #[arg(long = "path", value_name = "PATH")]
    paths: Vec<String>,
    /// The name of a key that may serve it. May be repeated.
    #[arg(long = "key", value_name = "NAME")]
    keys: Vec<String>,
    /// A workspace whose keys may serve it. May be repeated.
    #[arg(long = "workspace", value_name = "NAME")]
    workspaces: Vec<String>,
    /// Allow the client to send its own key.
    #[arg(long)]
    bring_your_own_key: bool,
    #[command(flatten)]
    file: ClientsFile,
}

impl ClientsFile {
    fn overrides(&self) -> Overrides {
        // These commands need neither keys nor the usage database.
        Overrides {
            config_file: self.config.clone(),
            is_ephemeral: true,
            key_requirement: KeyRequirement::Optional,
            ..Overrides::default()
        }
    }
}

pub(super) fn run(arguments: Arguments) -> CommandResult {
    match arguments.command {
        Command::Add(arguments) => add(arguments),
        Command::List(file) => list(&file),
        Command::Revoke { name, file } => revoke(&name, &file),
    }
}

fn add(arguments: NewClientArguments) -> CommandResult {
    let client = NewClient {
        name: arguments.name,
        quota: arguments.quota,
        rate_limit: arguments.rate_limit,
        max_concurrent: arguments.max_concurrent,
        paths: arguments.paths,
        keys: arguments.keys,
        workspaces: arguments.workspaces,
        may_bring_key: arguments.bring_your_own_key,
    };
    let file = arguments.file;
    let token = generate_token().ok_or_else(|| fail("the system provides no random numbers"))?;
    let (path, _) =
        add_client(&file.overrides(), &client, &TokenFingerprint::new(&token)).map_err(report_edit_error)?;
    let name = &client.name;
    print_error(&format_args!(
        "Added the client `{name}` to {}. Its token is shown only now:",
        path.display()
    ));
    if file.json {
        print(&json!({"name": name, "token": token}));
    } else {
        print(&token);
    }
    Ok(())
}

fn revoke(name: &str, file: &ClientsFile) -> CommandResult {
    let (path, loaded) = remove_client(&file.overrides(), name).map_err(report_edit_error)?;
    print_error(&format_args!("Removed the client `{name}` from {}.", path.display()));
    let remaining_clients = loaded.config.clients.len();
    if remaining_clients == 0 {
        print_error(&"No clients are left: apps on this machine need no token.");
    }
    if file.json {
        print(&json!({"name": name, "clientsLeft": remaining_clients}));
    }
    Ok(())
}

fn list(file: &ClientsFile) -> CommandResult {
    let clients = load(&file.overrides())?.config.clients;
    if file.json {
        print(&Value::from(clients.iter().map(client_json).collect::<Vec<_>>()));
        return Ok(());
    }
    let width = clients.iter().map(|client| client.name.len()).max().unwrap_or(0);
    for ClientConfig { name, rules, .. } in &clients {
        print(&format_args!("{name:width$}  {}", format_rules(rules)));
    }
    if clients.is_empty() {
        print_error(&"No clients are configured: apps on this machine need no token.");
    }
    Ok(())
}

fn client_json(client: &ClientConfig) -> Value {
    let Rules { quota, rate_limit, max_concurrent, paths, allowed_keys, may_bring_key, may_request_tokens } =
        &client.rules;
    json!({
        "name": client.name,
        "quota": quota.map(|quota| quota.to_string()),
        "rateLimit": rate_limit.map(|rate| rate.to_string()),
        "maxConcurrent": max_concurrent,
        "paths": paths,
        "keys": allowed_keys.keys,
        "workspaces": allowed_keys.workspaces,
        "bringYourOwnKey": may_bring_key,
        "providerTokens": may_request_tokens,
    })
}

/// Formats the client's rules in one line.
fn format_rules(rules: &Rules) -> String {
    let Rules { quota, rate_limit, max_concurrent, paths, allowed_keys, may_bring_key, may_request_tokens } =
        rules;
    let mut parts: Vec<String> = Vec::new();
    parts.extend(quota.map(|quota| quota.to_string()));
    parts.extend(rate_limit.map(|rate| rate.to_string()));
    parts.extend(max_concurrent.map(|count| format!("{count} concurrent requests")));
    for (label, list) in
        [("below", paths), ("keys", &allowed_keys.keys), ("workspaces", &allowed_keys.workspaces)]
    {
        if !list.is_empty() {
            parts.push(format!("{label} {}", list.join(" ")));
        }
    }
    parts.extend(may_bring_key.then(|| "may bring its own key".to_owned()));
    parts.extend(may_request_tokens.then(|| "may request tokens of the provider".to_owned()));
    if parts.is_empty() { "without limits".to_owned() } else { parts.join(", ") }
}

/// Prints the error of an edit, and returns the exit code.
fn report_edit_error(error: EditError) -> ExitCode {
    match error {
        EditError::Unwritable { .. } | EditError::ConcurrentChange => fail(error),
        EditError::NoFile
        | EditError::Unreadable { .. }
        | EditError::ClientExists(_)
        | EditError::UnknownClient(_)
        | EditError::UnsupportedNotation
        | EditError::InvalidConfig(_) => fail_with(EX_CONFIG, error),
    }
}

/// Generates a token of 192 random bits, with a prefix by which operators and secret scanners recognize it.
fn generate_token() -> Option<String> {
    let mut bytes = [0_u8; 24];
    default_provider().secure_random.fill(&mut bytes).ok()?;
    let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    Some(format!("kc_{digits}"))
}

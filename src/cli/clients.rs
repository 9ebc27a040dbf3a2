//! `keychoir clients`: adds, lists, shows, changes and revokes clients, and replaces their tokens. It uses the admin
//! API of the running Keychoir, or else the configuration and the overlay. `config show` formats clients with the same
//! type.

use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Value, json};

use super::control::{ControlOptions, Target, parse_duration, parse_end, parse_expiry};
use super::{CommandResult, build_runtime, fail, print, print_error};
use crate::admin::control::{Change, ClientRules, TokenExpiry};
use crate::clock;
use crate::config::{self, ClientConfig, ManagedRules};
use crate::policy::units::UnixMs;

#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Add a client and print its token, which cannot be shown again.
    Add {
        /// The client's name: 1 to 64 of a-z, 0-9, - and _.
        #[arg(value_parser = config::parse_client_name)]
        name: String,
        #[command(flatten)]
        rules: RuleArguments,
        /// The time at which the client token expires, or a duration until then, such as 30d.
        #[arg(long, value_name = "TIME", value_parser = parse_end)]
        expires: Option<UnixMs>,
        #[command(flatten)]
        options: ControlOptions,
    },
    /// List the clients with their rules and limits.
    List(ControlOptions),
    /// Show one client.
    Show {
        /// The client's name.
        #[arg(value_parser = config::parse_client_name)]
        name: String,
        #[command(flatten)]
        options: ControlOptions,
    },
    /// Give a client a new token and print it. The previous token stays valid during the grace period.
    Rotate {
        /// The client's name.
        #[arg(value_parser = config::parse_client_name)]
        name: String,
        /// The time for which the previous token stays valid, such as 1h.
        #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = parse_duration)]
        grace: Duration,
        /// The time at which the new token expires, or a duration until then, such as 30d.
        #[arg(long, value_name = "TIME", value_parser = parse_end)]
        expires: Option<UnixMs>,
        #[command(flatten)]
        options: ControlOptions,
    },
    /// Change the rules of a client, or when its token expires. An empty text or 0 removes a rule.
    Set {
        /// The client's name.
        #[arg(value_parser = config::parse_client_name)]
        name: String,
        #[command(flatten)]
        rules: RuleArguments,
        /// The time at which the current token expires, a duration until then, such as 30d, or `never`.
        #[arg(long, value_name = "TIME", value_parser = parse_expiry)]
        expires: Option<TokenExpiry>,
        #[command(flatten)]
        options: ControlOptions,
    },
    /// Invalidate a client token.
    Revoke {
        /// The client's name.
        #[arg(value_parser = config::parse_client_name)]
        name: String,
        #[command(flatten)]
        options: ControlOptions,
    },
}

#[derive(Debug, Args)]
struct RuleArguments {
    /// The `quota` of the client: "3 requests", "50 requests per day" or "10_000 credits per month".
    #[arg(long, value_name = "TEXT")]
    quota: Option<String>,
    /// The `user_quota`, which is the quota of each end user of the client, in the same notation.
    #[arg(long, value_name = "TEXT")]
    user_quota: Option<String>,
    /// The `rate_limit` of the client: "60 per minute" or "5 per second".
    #[arg(long, value_name = "TEXT")]
    rate_limit: Option<String>,
    /// The `max_concurrent` of the client, which is the maximum number of concurrent requests.
    #[arg(long, value_name = "COUNT")]
    max_concurrent: Option<u32>,
    /// A path below which the client may send requests, such as /v1/text-to-speech. May be repeated.
    #[arg(long = "path", value_name = "PATH")]
    paths: Vec<String>,
    /// The name of a key that may serve the client. May be repeated.
    #[arg(long = "key", value_name = "NAME")]
    keys: Vec<String>,
    /// A workspace whose keys may serve the client. May be repeated.
    #[arg(long = "workspace", value_name = "NAME")]
    workspaces: Vec<String>,
    /// Allow the client to send its own key.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    bring_your_own_key: Option<bool>,
}

impl RuleArguments {
    fn into_rules(self) -> ClientRules {
        // The option `--path ""` results in an empty list, which removes the rule. Without the option, the rule stays.
        let into_rule = |items: Vec<String>| {
            (!items.is_empty()).then(|| items.into_iter().filter(|item| !item.is_empty()).collect())
        };
        ClientRules {
            quota: self.quota,
            user_quota: self.user_quota,
            rate_limit: self.rate_limit,
            max_concurrent: self.max_concurrent,
            paths: into_rule(self.paths),
            keys: into_rule(self.keys),
            workspaces: into_rule(self.workspaces),
            bring_your_own_key: self.bring_your_own_key,
            provider_tokens: None,
        }
    }
}

pub(super) fn run(arguments: Arguments) -> CommandResult {
    match arguments.command {
        Command::Add { name, rules, expires, options } => {
            let message = format!("Added the client `{name}`. Its token is shown only now:");
            options.make_change(
                Change::AddClient { name, rules: rules.into_rules(), expires_at: expires },
                &message,
            )
        }
        Command::List(options) => list_clients(&options),
        Command::Show { name, options } => show_client(&name, &options),
        Command::Rotate { name, grace, expires, options } => {
            let message = format!("The client `{name}` has a new token, which is shown only now:");
            options.make_change(Change::RotateClient { name, grace, expires_at: expires }, &message)
        }
        Command::Set { name, rules, expires: expiry, options } => {
            let message = format!("Changed the client `{name}`.");
            options.make_change(Change::SetClient { name, rules: rules.into_rules(), expiry }, &message)
        }
        Command::Revoke { name, options } => {
            let message = format!("Revoked the token of the client `{name}`.");
            options.make_change(Change::RevokeClient { name }, &message)
        }
    }
}

/// A client as the running Keychoir or the configuration describes it. Its fields have the names and the notation of
/// the configuration.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct ListedClient {
    name: String,
    pub(super) source: String,
    #[serde(deserialize_with = "read_quota")]
    quota: Option<String>,
    #[serde(deserialize_with = "read_quota")]
    user_quota: Option<String>,
    rate_limit: Option<String>,
    max_concurrent: Option<u32>,
    paths: Vec<String>,
    keys: Vec<String>,
    workspaces: Vec<String>,
    bring_your_own_key: bool,
    provider_tokens: bool,
    expires_at: Option<String>,
    previous_token_expires_at: Option<String>,
    /// The counted requests of each period. Only a running Keychoir reports them.
    #[serde(skip_serializing_if = "Option::is_none")]
    requests: Option<Value>,
    /// The charged credits of each period. Only a running Keychoir reports them.
    #[serde(skip_serializing_if = "Option::is_none")]
    credits: Option<Value>,
}

/// Deserializes a quota. The admin API describes it as an object, whose member `limit` contains the notation.
fn read_quota<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    let quota = Value::deserialize(deserializer)?;
    Ok(quota.as_str().or_else(|| quota["limit"].as_str()).map(str::to_owned))
}

impl From<&ClientConfig> for ListedClient {
    fn from(client: &ClientConfig) -> Self {
        let ClientConfig { name, token: _, expires_at, previous_token, origin, rules } = client;
        let ManagedRules {
            quota,
            user_quota,
            rate_limit,
            max_concurrent,
            paths,
            keys,
            workspaces,
            bring_your_own_key,
            provider_tokens,
        } = ManagedRules::from(rules);
        Self {
            name: name.clone(),
            source: origin.as_str().to_owned(),
            quota,
            user_quota,
            rate_limit,
            max_concurrent,
            paths,
            keys,
            workspaces,
            bring_your_own_key: bring_your_own_key.unwrap_or(false),
            provider_tokens: provider_tokens.unwrap_or(false),
            expires_at: expires_at.map(UnixMs::rfc3339),
            previous_token_expires_at: previous_token.map(|(_, expires_at)| expires_at.rfc3339()),
            requests: None,
            credits: None,
        }
    }
}

/// Reads the clients from the running Keychoir, or else from the configuration.
fn read_clients(options: &ControlOptions) -> Result<Vec<ListedClient>, ExitCode> {
    build_runtime()?.block_on(async {
        match options.connect().await? {
            Target::Server(client) => {
                let document = client.get("/clients").await?;
                Vec::deserialize(&document["clients"])
                    .map_err(|error| fail(format_args!("the response of the server is not valid: {error}")))
            }
            Target::Offline(offline) => Ok(offline.config.clients.iter().map(ListedClient::from).collect()),
        }
    })
}

fn list_clients(options: &ControlOptions) -> CommandResult {
    let clients = read_clients(options)?;
    if options.json {
        print(&json!({"clients": clients}));
        return Ok(());
    }
    let width = clients.iter().map(|client| client.name.len()).max().unwrap_or(0);
    for client in &clients {
        print(&format_args!("{:width$}  {}", client.name, format_rules(client)));
    }
    if clients.is_empty() {
        print_error(&"No clients are configured: apps on this machine need no token.");
    }
    Ok(())
}

fn show_client(name: &str, options: &ControlOptions) -> CommandResult {
    let clients = read_clients(options)?;
    let Some(client) = clients.iter().find(|client| client.name == name) else {
        let message = "no client has this name: `keychoir clients list` lists them";
        return Err(fail(message));
    };
    if options.json {
        print(&json!(client));
        return Ok(());
    }
    print(&format_args!("{}  {}", client.name, format_rules(client)));
    let details = [
        ("configured in", Some(client.source.as_str())),
        ("token expires", client.expires_at.as_deref()),
        ("previous token expires", client.previous_token_expires_at.as_deref()),
    ];
    for (label, detail) in details {
        if let Some(detail) = detail.filter(|detail| !detail.is_empty()) {
            print(&format_args!("  {label}: {detail}"));
        }
    }
    Ok(())
}

/// Formats the client's rules in one line.
fn format_rules(client: &ListedClient) -> String {
    let mut parts: Vec<String> = Vec::new();
    parts.extend(client.quota.clone());
    parts.extend(client.user_quota.as_ref().map(|quota| format!("{quota} for each user")));
    parts.extend(client.rate_limit.clone());
    parts.extend(client.max_concurrent.map(|count| format!("{count} concurrent requests")));
    for (label, names) in
        [("below", &client.paths), ("keys", &client.keys), ("workspaces", &client.workspaces)]
    {
        if !names.is_empty() {
            parts.push(format!("{label} {}", names.join(" ")));
        }
    }
    let expires_at = client.expires_at.as_deref().and_then(UnixMs::parse);
    parts.extend(expires_at.map(|expires_at| match expires_at <= clock::now() {
        true => "expired".to_owned(),
        false => format!("expires {}", expires_at.rfc3339_seconds()),
    }));
    parts.extend(client.bring_your_own_key.then(|| "may bring its own key".to_owned()));
    parts.extend(client.provider_tokens.then(|| "may request tokens of the provider".to_owned()));
    if parts.is_empty() { "without limits".to_owned() } else { parts.join(", ") }
}

//! `keychoir config show`: prints every effective setting with its source, in the notation of `keychoir.toml`, so
//! that the output can be used as a configuration file. Keys, clients and secrets are comments, because the output
//! omits their secret parts. With `--json`, it prints the same facts as a document.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use clap::{Args, Subcommand};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::clients::ListedClient;
use super::{CommandResult, ConfigSources, describe_files, load, print, print_error};
use crate::clock;
use crate::config::{Config, KeyConfig, KeyRequirement, LoadedConfig, Overrides, ProxySetting, SettingValue};
use crate::policy::key_state::KeyOrigin;

#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Print every effective setting with its source, and the keys and clients, without secrets.
    ///
    /// The output is a configuration file: sources, keys and clients are comments.
    Show(ShowArguments),
}

#[derive(Debug, Args)]
struct ShowArguments {
    #[command(flatten)]
    sources: ConfigSources,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: Arguments) -> CommandResult {
    let Command::Show(ShowArguments { sources, json }) = arguments.command;
    let overrides = sources.into_overrides(KeyRequirement::Optional);
    // An address that other machines can reach without a client token is shown as well. `keychoir check` reports it.
    let loaded_config = load(&Overrides { allows_exposure: true, ..overrides })?;
    for warning in &loaded_config.warnings {
        print_error(warning);
    }
    if json {
        print(&to_json(&loaded_config));
    } else {
        print(&to_toml(&loaded_config).trim_end());
    }
    Ok(())
}

/// A key of the pool without its secret part.
#[derive(Debug, Serialize)]
struct ListedConfigKey {
    name: Option<String>,
    short_key: String,
    workspace: Option<String>,
    base_url: Option<String>,
    /// The forward proxy without its credentials. The text is empty if the key has no `proxy` of its own.
    proxy: String,
    weight: u32,
    reserve_credits: Option<u64>,
    paused: bool,
    source: String,
}

impl ListedConfigKey {
    fn new(key: &KeyConfig, config: &Config) -> Self {
        let source = match key.origin {
            KeyOrigin::Managed => config.state_directory().map_or_else(
                || key.origin.as_str().to_owned(),
                |directory| directory.overlay_path().display().to_string(),
            ),
            KeyOrigin::Environment | KeyOrigin::File => config.key_source.to_string(),
        };
        let fingerprint = key.key.fingerprint();
        Self {
            name: key.name.clone(),
            short_key: key.key.short().to_string(),
            workspace: key.workspace.clone(),
            base_url: key.base_url.as_ref().map(ToString::to_string),
            proxy: key.proxy.to_string(),
            weight: key.weight,
            reserve_credits: key.reserve_credits,
            paused: config
                .paused_keys
                .iter()
                .any(|paused| paused.fingerprint == fingerprint && paused.pause().is_active(clock::now())),
            source,
        }
    }
}

/// Whether a secret is set. The secret itself is not shown.
struct SecretPresence {
    name: &'static str,
    is_set: bool,
}

fn secret_presences(config: &Config) -> [SecretPresence; 2] {
    [
        SecretPresence { name: "admin token", is_set: config.admin_token.is_some() },
        SecretPresence { name: "Supabase key", is_set: config.supabase.key.is_some() },
    ]
}

fn to_json(loaded: &LoadedConfig) -> Value {
    let LoadedConfig { config, warnings, file, contents, .. } = loaded;
    let files = contents.stamps();
    let keys: Vec<_> = config.keys.iter().map(|key| ListedConfigKey::new(key, config)).collect();
    let secrets = secret_presences(config).into_iter();
    json!({
        "file": file,
        "files": files.existing().collect::<Vec<_>>(),
        "settings": config.setting_values(),
        "secrets": secrets.map(|secret| (secret.name.replace(' ', "_"), json!(secret.is_set))).collect::<Map<_, _>>(),
        "keys": keys,
        "clients": config.clients.iter().map(ListedClient::from).collect::<Vec<_>>(),
        "generation": config.generation,
        "warnings": warnings.iter().map(ToString::to_string).collect::<Vec<_>>(),
    })
}

/// Formats the loaded settings as a configuration file. The source of each line follows as a comment.
fn to_toml(loaded: &LoadedConfig) -> String {
    let config = &loaded.config;
    let mut text = format!("# {}\n", describe_files(loaded));
    for secret in secret_presences(config) {
        let _ = writeln!(text, "# {}: {}", secret.name, if secret.is_set { "set" } else { "not set" });
    }
    if let Some(route) = config.proxy_routes().describe(&config.upstream.base_url) {
        let _ = writeln!(text, "# {route}");
    }
    let settings = config.setting_values();
    let set_names =
        settings.iter().filter(|setting| !is_unset(setting)).map(|setting| setting.name).collect();
    let mut section = "";
    for setting in &settings {
        let (next_section, name) = split_path(setting.name);
        if next_section != section {
            section = next_section;
            let _ = write!(text, "\n[{section}]\n");
        }
        let comment = match omission_reason(setting, &set_names) {
            Some(OmissionReason::Unused) => continue,
            Some(OmissionReason::Secret) => "# ",
            None => "",
        };
        let _ = writeln!(text, "{comment}{name} = {}  # {}", setting.value, setting.source);
    }
    for key in &config.keys {
        text.push_str(&format_key(&ListedConfigKey::new(key, config)));
    }
    for client in &config.clients {
        text.push_str(&format_client(&ListedClient::from(client)));
    }
    text
}

/// Splits `server.tls.cert` into the section `server` and the dotted key `tls.cert`.
fn split_path(path: &'static str) -> (&'static str, &'static str) {
    path.split_once('.').unwrap_or(("", path))
}

/// Returns whether the setting is an empty string. An empty string means that the setting is not set.
fn is_unset(setting: &SettingValue) -> bool {
    setting.value == "\"\""
}

/// The reason why a setting is omitted from the printed file, or is a comment in it.
enum OmissionReason {
    /// The setting has no effect, and its line would make the file invalid.
    Unused,
    /// A part of the value is masked, or the value comes from a file with a secret.
    Secret,
}

/// Returns why the setting cannot be a line of the printed file, or `None` if it can. `set_names` contains the names of
/// all settings that are set.
fn omission_reason(setting: &SettingValue, set_names: &BTreeSet<&str>) -> Option<OmissionReason> {
    let has_certificate = set_names.contains("server.tls.cert") || set_names.contains("server.tls.key");
    match setting.name {
        // `server.tls` is either a string or a table of two files.
        "server.tls" if has_certificate => Some(OmissionReason::Unused),
        "server.tls.cert" | "server.tls.key" if !has_certificate => Some(OmissionReason::Unused),
        "upstream.proxy" if set_names.contains("upstream.proxy_file") => Some(OmissionReason::Secret),
        "supabase.proxy" if set_names.contains("supabase.proxy_file") => Some(OmissionReason::Secret),
        "redis.url" if set_names.contains("redis.url_file") => Some(OmissionReason::Secret),
        _ => setting.is_masked.then_some(OmissionReason::Secret),
    }
}

fn format_key(key: &ListedConfigKey) -> String {
    let ListedConfigKey {
        name,
        short_key,
        workspace,
        base_url,
        proxy,
        weight,
        reserve_credits,
        paused,
        source,
    } = key;
    let paused = if *paused { "  paused" } else { "" };
    let mut text = format!("\n# [[keys]]  # {source}{paused}\n# key = \"{short_key}\"\n");
    let proxy = (*proxy != ProxySetting::default().to_string()).then_some(proxy);
    for (name, value) in [
        ("name", name.as_ref()),
        ("workspace", workspace.as_ref()),
        ("base_url", base_url.as_ref()),
        ("proxy", proxy),
    ] {
        if let Some(value) = value {
            let _ = writeln!(text, "# {name} = {}", json!(value));
        }
    }
    if *weight != 1 {
        let _ = writeln!(text, "# weight = {weight}");
    }
    if let Some(credits) = reserve_credits {
        let _ = writeln!(text, "# reserve_credits = {credits}");
    }
    text
}

fn format_client(client: &ListedClient) -> String {
    let document = json!(client);
    let mut text = format!("\n# [[clients]]  # {}\n", client.source);
    for (name, value) in document.as_object().into_iter().flatten() {
        let is_unset = match value {
            Value::Null | Value::Bool(false) => true,
            Value::Array(items) => items.is_empty(),
            Value::Bool(true) | Value::Number(_) | Value::String(_) | Value::Object(_) => false,
        };
        if name != "source" && !is_unset {
            let _ = writeln!(text, "# {name} = {value}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns how a setting is printed if the settings `set_names` are set.
    fn printed_form(name: &'static str, set_names: &[&'static str], is_masked: bool) -> &'static str {
        let setting = SettingValue {
            name,
            value: "\"x\"".to_owned(),
            source: "default".to_owned(),
            is_masked,
            pending: None,
        };
        match omission_reason(&setting, &set_names.iter().copied().collect()) {
            Some(OmissionReason::Unused) => "omitted",
            Some(OmissionReason::Secret) => "comment",
            None => "setting",
        }
    }

    #[test]
    fn settings_that_would_make_the_file_invalid_or_wrong_are_omitted_or_comments() {
        for (name, set_names, expected) in [
            ("server.tls", &[][..], "setting"),
            ("server.tls", &["server.tls.cert"], "omitted"),
            ("server.tls.key", &["server.tls.cert"], "setting"),
            ("server.tls.key", &[], "omitted"),
            ("upstream.proxy", &[], "setting"),
            ("upstream.proxy", &["upstream.proxy_file"], "comment"),
            ("supabase.proxy", &["supabase.proxy_file"], "comment"),
            ("redis.url", &["redis.url_file"], "comment"),
        ] {
            assert_eq!(
                printed_form(name, set_names, false),
                expected,
                "{name} must have the expected form if {set_names:?} are set"
            );
        }
        assert_eq!(printed_form("upstream.proxy", &[], true), "comment", "a masked value must be a comment");
    }
}

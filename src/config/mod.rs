//! Loads the configuration from flags, environment, file and defaults, in this order of precedence, into validated
//! types. Then applies the overlay, the file with the keys, pauses and clients that operators changed at runtime.
//!
//! One load reports all mistakes, each with its source and advice. No message or `Debug` output contains a key or a
//! token. Parsers get the environment and the content of files from `source`, so that they can be tested without them.

mod resolve;

mod document;
mod list_items;
mod old_names;
mod setting;
mod setting_values;
mod socket_base;
mod value;
mod value_file;
mod variables;

mod clients;
mod key_format;
mod key_list;
mod keys;
mod rules;

mod access;
mod admin;
mod base_url;
mod host_port;
mod listen;
mod log;
mod no_proxy;
mod proxy;
mod redis;
mod sections;
mod strategy;
mod supabase;
mod tls;

mod mask;
mod problem;

mod overlay;
mod permissions;
mod reload;
mod source;

#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

pub use access::AccessConfig;
pub use admin::{AdminConfig, AdminListen};
pub use base_url::BaseUrl;
pub use clients::{ClientConfig, parse_client_name};
pub use host_port::HostPort;
pub use keys::{KeyConfig, KeyListSource};
pub use listen::{ListenAddress, ListenAddresses, UnixMode};
pub use log::{LogFilter, LogFormat};
pub use overlay::{
    EntryKind, FileError, KEYS_DIRECTORY, LockError, ManagedClient, ManagedKey, ManagedRules, Overlay,
    PausedKey, PausedKeyConfig, RemovedEntry, StateDirectory, StateLock,
};
pub use problem::{Problem, Problems, ValueError, ValueOrigin, Warning};
pub use proxy::{EnvironmentProxies, ProxyRoutes, ProxySetting};
pub use redis::{RedisConfig, RedisUrlSetting};
use reload::FileContent;
pub use reload::{FileContents, FileStamps};
pub use sections::{
    AffinityConfig, LogConfig, PoolConfig, QuotaPollingConfig, RetryConfig, ServerConfig, StorageConfig,
    UpstreamConfig, WebsocketConfig,
};
pub use setting_values::SettingValue;
pub use supabase::{SupabaseConfig, SupabaseUrl};
pub use tls::{TlsConfig, TlsMode};

use crate::certificate::{self, Certificate};
use crate::clock;
use crate::policy::key_state::KeyOrigin;
use crate::secret::{AdminTokenFingerprint, ApiKey};

/// The settings from the command line, which override all other sources.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    /// `--config FILE`. Without it, `KEYCHOIR_CONFIG` names the file, or else the first existing
    /// default path is read.
    pub config_file: Option<PathBuf>,
    /// The values of `--listen`.
    pub listen: Vec<String>,
    /// `--ephemeral`: usage records are kept in memory only.
    pub is_ephemeral: bool,
    /// Whether systemd passed sockets. They are the default of `server.listen`.
    pub has_passed_sockets: bool,
    /// Whether the command requires keys.
    pub key_requirement: KeyRequirement,
    /// Whether an address that other machines can reach may have no client tokens. The commands that show, diagnose
    /// or change a configuration set it, because its first client may not be added yet.
    pub allows_exposure: bool,
    /// The location of the overlay and of the generated admin token.
    pub state_location: StateLocation,
}

/// The location of the overlay and of the generated admin token.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum StateLocation {
    /// The files are in the directory of the configured database.
    #[default]
    BesideDatabase,
    /// The files are in the state directory of the running Keychoir process, or do not exist if its database is in
    /// memory. The database of a running process changes only with a restart.
    Fixed(Option<StateDirectory>),
}

/// Whether a command requires keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KeyRequirement {
    /// A configuration without keys is an error.
    #[default]
    Required,
    /// A configuration without keys is valid.
    Optional,
}

/// A valid configuration, with its warnings and its files.
#[derive(Clone, Debug)]
pub struct LoadedConfig {
    /// The resolved settings.
    pub config: Config,
    /// Messages about corrected or unusual settings, and about files that other users can read or change.
    pub warnings: Vec<Warning>,
    /// The path of the configuration file that was read, or `None` if there is no configuration file.
    pub file: Option<PathBuf>,
    /// Whether the configuration file contains keys, tokens or passwords.
    pub file_contains_secrets: bool,
    /// The content of every file that was read or searched, with its metadata.
    pub contents: FileContents,
}

/// Loads the configuration from the environment, the configuration file, and the files that they
/// name.
///
/// # Errors
///
/// Fails when the configuration contains mistakes. The error lists all of them.
pub fn load(overrides: &Overrides) -> Result<LoadedConfig, Problems> {
    load_with_files(overrides, &[], &FileContents::default())
}

/// Loads the configuration without its invalid parts, for a command that must find a running Keychoir process although
/// the files have been edited and contain mistakes. The process continues with its last configuration without mistakes.
#[must_use]
pub fn load_ignoring_mistakes(overrides: &Overrides) -> Config {
    let read_file = |path: &Path| FileContent::read(path).text;
    let environment = source::Environment::capture();
    let sources = source::ValueSources { environment, read_file: &read_file, now: clock::now() };
    resolve::resolve_ignoring_mistakes(overrides, &sources)
}

/// Loads the configuration as if each of the `replaced` files had the given content, so that a change can be validated
/// before its files are written. Files in `kept` are not read again, so that the change does not apply a file that an
/// operator is writing at this moment.
///
/// # Errors
///
/// Fails when the configuration contains mistakes. The error lists all of them.
pub fn load_with_files(
    overrides: &Overrides,
    replaced: &[(PathBuf, String)],
    kept: &FileContents,
) -> Result<LoadedConfig, Problems> {
    let environment = source::Environment::capture();
    let contents = RefCell::new(FileContents::default());
    let read_file = |path: &Path| {
        let content = match (replaced.iter().find(|(replaced_path, _)| replaced_path == path), kept.get(path))
        {
            (Some((_, text)), _) => FileContent::with_text(path, text),
            (None, Some(content)) => content.clone(),
            (None, None) => FileContent::read(path),
        };
        contents.borrow_mut().push(path, content.clone());
        content.text
    };
    let sources = source::ValueSources { environment, read_file: &read_file, now: clock::now() };
    let mut loaded_config = resolve::resolve(overrides, &sources)?;
    let credentials = sources.environment.value(keys::CREDENTIALS).map(PathBuf::from);
    loaded_config.contents = contents.into_inner();
    loaded_config.warnings.extend(permissions::find_risks(&loaded_config, credentials.as_deref()));
    if loaded_config.file.is_none() && Path::new(FILE_NAME).exists() {
        let span = problem::SourceSpan::new(ValueOrigin::File(PathBuf::from(FILE_NAME)));
        let message = format!("this file is not read: to read it, use --config {FILE_NAME}");
        loaded_config.warnings.push(span.warning(message));
    }
    Ok(loaded_config)
}

impl Config {
    /// Returns the sources of the keys for messages, such as `ELEVENLABS_API_KEYS and /var/lib/keychoir/managed.toml`.
    #[must_use]
    pub fn describe_key_sources(&self) -> String {
        let has_managed_keys = self.keys.iter().any(|key| key.origin == KeyOrigin::Managed);
        match (&self.key_source, self.state_directory()) {
            (source @ KeyListSource::Managed(_), _) => source.to_string(),
            (source, Some(directory)) if has_managed_keys => {
                format!("{source} and {}", directory.overlay_path().display())
            }
            (source, _) => source.to_string(),
        }
    }
}

/// Returns whether `name` is valid for a key, a workspace or a client.
#[must_use]
pub fn is_valid_name(name: &str) -> bool {
    keys::check_name(name).is_ok()
}

/// The default name of a configuration file.
const FILE_NAME: &str = "keychoir.toml";

/// All settings. The default has no keys.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// The listeners, and the limits of client connections.
    pub server: ServerConfig,
    /// The provider's address and the limits of connections to it.
    pub upstream: UpstreamConfig,
    /// The selection of keys, and their cooldowns.
    pub pool: PoolConfig,
    /// The retries of requests, and the buffers for their bodies.
    pub retry: RetryConfig,
    /// The polling of the keys' quotas.
    pub quota_polling: QuotaPollingConfig,
    /// The storage of usage records.
    pub storage: StorageConfig,
    /// The mirror in Supabase.
    pub supabase: SupabaseConfig,
    /// The Redis server that several replicas share.
    pub redis: RedisConfig,
    /// The records of the accounts that own identifiers.
    pub affinity: AffinityConfig,
    /// The limits of WebSocket sessions.
    pub websocket: WebsocketConfig,
    /// The format and level of the log.
    pub log: LogConfig,
    /// The access rules of all clients.
    pub access: AccessConfig,
    /// The pool's keys in the configured order, without duplicates.
    pub keys: Vec<KeyConfig>,
    /// The source of the keys.
    pub key_source: KeyListSource,
    /// The clients that may use the pool. If there are none, no token is required.
    pub clients: Vec<ClientConfig>,
    /// The access to the admin API.
    pub admin: AdminConfig,
    /// The keys that operators paused. Some may not be in the pool.
    pub paused_keys: Vec<PausedKeyConfig>,
    /// A number that increases with each change at runtime.
    pub generation: u64,
    /// The fingerprint of the admin token. It is `None` if there is no admin token.
    pub admin_token: Option<AdminTokenFingerprint>,
    /// The source of each setting that a flag, a variable or the file sets, by the path of the setting.
    pub setting_sources: HashMap<&'static str, String>,
    /// The certificate in the files that `server.tls` names, or `None` if it names no files.
    pub certificate: Option<Certificate>,
    /// The forward proxies of the environment, which are used where no setting names one.
    pub environment_proxies: EnvironmentProxies,
}

impl Config {
    /// Creates the default configuration with `keys` and the given upstream. Usage records stay in memory, because the
    /// demo and tests must not leave files.
    #[must_use]
    pub fn with_defaults(keys: Vec<ApiKey>, base_url: BaseUrl) -> Self {
        let mut config = Self {
            keys: keys.into_iter().map(KeyConfig::from).collect(),
            key_source: KeyListSource::Caller,
            ..Self::default()
        };
        config.upstream.base_url = base_url;
        config.storage.ephemeral = true;
        config
    }

    /// Returns the directory of the usage database, in which changes by operators are saved, or `None` if usage records
    /// are kept only in memory.
    #[must_use]
    pub fn state_directory(&self) -> Option<StateDirectory> {
        self.storage.file()?.parent().map(|directory| StateDirectory::new(directory.to_owned()))
    }

    /// Returns the forward proxies for connections to the provider and to Supabase.
    #[must_use]
    pub fn proxy_routes(&self) -> ProxyRoutes {
        ProxyRoutes::new(self.upstream.proxy.clone(), self.environment_proxies.clone())
    }

    /// Returns the location of the local CA: `server.tls_directory`, or else the directory `tls` beside the usage
    /// database. If usage records are kept only in memory, so is the CA.
    #[must_use]
    pub fn ca_location(&self) -> certificate::CaLocation {
        let default_directory = || Some(self.storage.file()?.parent()?.join("tls"));
        match self.server.tls_directory.clone().or_else(default_directory) {
            Some(directory) => certificate::CaLocation::Directory(directory),
            None => certificate::CaLocation::Memory,
        }
    }

    /// Returns the file with the certificate of the local CA, if Keychoir has created it.
    #[must_use]
    pub fn local_ca_file(&self) -> Option<PathBuf> {
        match self.ca_location() {
            certificate::CaLocation::Directory(directory) => {
                Some(certificate::ca_certificate_file(&directory)).filter(|path| path.exists())
            }
            certificate::CaLocation::Memory => None,
        }
    }
}

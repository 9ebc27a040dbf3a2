//! Loads the configuration from flags, environment, file and defaults, in this order of precedence,
//! into validated types.
//!
//! Only `source` reads the environment and files; all other modules are pure functions of these
//! texts. One load reports all mistakes, each with its source and advice. No mistake, warning or
//! `Debug` output contains a key or a token.

mod resolve;

mod document;
mod names;
mod renamed;
mod setting;
mod socket_base;
mod value;
mod variables;

mod clients;
mod key_list;
mod key_shape;
mod keys;
mod rules;

mod access;
mod base_url;
mod choice;
mod host_port;
mod listen;
mod sections;
mod supabase;
mod tls;

mod mask;
mod problem;

mod edit;
mod permissions;
mod reload;
mod source;

#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::path::{Path, PathBuf};

pub use access::AccessConfig;
pub use base_url::BaseUrl;
pub use choice::{LogFilter, LogFormat};
pub use clients::ClientConfig;
pub use edit::{EditError, NewClient, add_client, remove_client};
pub use host_port::HostPort;
pub use keys::{KeyConfig, KeyListSource};
pub use listen::{Listen, Listens, UnixMode};
pub use problem::{Problem, Problems, ValueOrigin, Warning, WrongValue};
pub use reload::Files;
pub use sections::{
    AffinityConfig, LogConfig, PoolConfig, QuotaPollingConfig, RetryConfig, ServerConfig, StorageConfig,
    UpstreamConfig, WebsocketConfig,
};
pub use supabase::{SupabaseConfig, SupabaseUrl};
pub use tls::{TlsChoice, TlsConfig};

use crate::certificate::{self, Certificate};
use crate::secret::ApiKey;

/// The command line arguments, which override all other sources.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    /// `--config FILE`. Without it, `KEYCHOIR_CONFIG` names the file, or the first existing default
    /// path is used.
    pub config_file: Option<PathBuf>,
    /// The values of `--listen`.
    pub listen: Vec<String>,
    /// `--ephemeral`: usage records are kept in memory only.
    pub is_ephemeral: bool,
    /// Whether systemd passed sockets. They are used if no listener is configured.
    pub has_passed_sockets: bool,
    /// Whether the command requires keys.
    pub keys: Need,
}

/// Whether a part of the configuration is required.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Need {
    /// An absent part is an error.
    #[default]
    Required,
    /// An absent part is allowed.
    Optional,
}

/// A valid configuration.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The resolved settings.
    pub config: Config,
    /// Messages about corrected or unusual settings.
    pub warnings: Vec<Warning>,
    /// The path of the configuration file, if there is one.
    pub file: Option<PathBuf>,
    /// Whether the file contains keys or tokens.
    pub file_holds_secrets: bool,
    /// Every file that was read or searched, with its metadata at that time.
    pub files: Files,
}

/// Reads the environment, the configuration file and the files that these name.
///
/// # Errors
///
/// All mistakes together. The program then exits with 78.
pub fn load(overrides: &Overrides) -> Result<Loaded, Problems> {
    let environment = source::Environment::of_process();
    let files = RefCell::new(Files::default());
    let read = |path: &Path| {
        files.borrow_mut().record(path);
        source::read_file(path)
    };
    let sources = source::ValueSources { environment, read: &read, now: source::now() };
    let mut loaded = resolve::resolve(overrides, &sources)?;
    let credentials = sources.environment.value(keys::CREDENTIALS).map(PathBuf::from);
    loaded.files = files.into_inner();
    loaded.warnings.extend(permissions::warnings(&loaded, credentials.as_deref()));
    if loaded.file.is_none() && Path::new(NAME).exists() {
        let message = format!("this file is not read, because it is not named: use --config {NAME}");
        loaded
            .warnings
            .push(problem::SourceSpan::of(ValueOrigin::File(PathBuf::from(NAME))).warning(message));
    }
    Ok(loaded)
}

/// The file name of the configuration.
const NAME: &str = "keychoir.toml";

/// All settings. The default has no keys.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// The listeners and the limits of clients' connections.
    pub server: ServerConfig,
    /// The provider's address and the limits of connections to it.
    pub upstream: UpstreamConfig,
    /// The selection of keys.
    pub pool: PoolConfig,
    /// The retries of refused requests.
    pub retry: RetryConfig,
    /// The polling of quotas.
    pub quota_polling: QuotaPollingConfig,
    /// The storage of usage records.
    pub storage: StorageConfig,
    /// The mirror in Supabase.
    pub supabase: SupabaseConfig,
    /// The memory of which account owns which identifier.
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
    /// The clients that may use the pool. Without clients, no token is required.
    pub clients: Vec<ClientConfig>,
    /// The certificate in the files of `server.tls`, if it names files.
    pub certificate: Option<Certificate>,
}

impl Config {
    /// The defaults with these keys and this upstream. Usage records stay in memory, because the
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

    /// The folder of the local CA: `server.tls_directory`, or the folder of the usage database.
    #[must_use]
    pub fn ca_location(&self) -> certificate::CaLocation {
        let beside = || Some(self.storage.file()?.parent()?.join("tls"));
        match self.server.tls_directory.clone().or_else(beside) {
            Some(folder) => certificate::CaLocation::Folder(folder),
            None => certificate::CaLocation::Memory,
        }
    }
}

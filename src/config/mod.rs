//! What Keychoir was told: flags over environment over file over defaults, resolved once at the
//! start into types that cannot be wrong.
//!
//! Everything but `source` is a function of what was read there. All mistakes are found and told
//! at once, each with its place and what to do; none of them, no warning and no `Debug` output
//! contains a key or a token.

mod resolve;

mod document;
mod renamed;
mod setting;
mod socket_base;
mod value;
mod variables;
mod visitors;

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
pub use keys::{KeyConfig, KeySource};
pub use listen::{Listen, Listens, UnixMode};
pub use problem::{Origin, Problem, Problems, Warning, WrongValue};
pub use reload::Files;
pub use sections::{
    AffinityConfig, LogConfig, PoolConfig, QuotaPollingConfig, RetryConfig, ServerConfig, StorageConfig,
    UpstreamConfig, WebsocketConfig,
};
pub use supabase::{SupabaseConfig, SupabaseUrl};
pub use tls::{TlsChoice, TlsConfig};

use crate::certificate::{self, Certificate};
use crate::secret::ApiKey;

/// What the command line says, over everything else.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    /// `--config FILE`; without it, `KEYCHOIR_CONFIG` may name one, or one of the usual places have one.
    pub config_file: Option<PathBuf>,
    /// `--listen`, each of them.
    pub listen: Vec<String>,
    /// `--ephemeral`: the books live in memory only.
    pub is_ephemeral: bool,
    /// Whether systemd has passed sockets: without any other word on it, these are listened on.
    pub has_passed_sockets: bool,
    /// Whether the command can do without keys.
    pub keys: Need,
}

/// Whether something must be configured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Need {
    /// Its lack is a mistake.
    #[default]
    Required,
    /// Its lack is fine.
    Optional,
}

/// A configuration without mistakes.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// What counts.
    pub config: Config,
    /// What was mended or looks unintended.
    pub warnings: Vec<Warning>,
    /// The configuration file, if there is one.
    pub file: Option<PathBuf>,
    /// Whether keys or tokens stand in it.
    pub file_holds_secrets: bool,
    /// Every file that was looked at, as it was.
    pub files: Files,
}

/// Reads the environment, the configuration file and the files that they name.
///
/// # Errors
///
/// All mistakes at once. The caller exits with 78.
pub fn load(overrides: &Overrides) -> Result<Loaded, Problems> {
    let environment = source::Environment::of_process();
    let files = RefCell::new(Files::default());
    let read = |path: &Path| {
        files.borrow_mut().note(path);
        source::read_file(path)
    };
    let sources = source::Sources { environment, read: &read, now: source::now() };
    let mut loaded = resolve::resolve(overrides, &sources)?;
    let credentials = sources.environment.value(keys::CREDENTIALS).map(PathBuf::from);
    loaded.files = files.into_inner();
    loaded.warnings.extend(permissions::warnings(&loaded, credentials.as_deref()));
    if loaded.file.is_none() && Path::new(NAME).exists() {
        let what = format!("this file is not read, because nothing names it: --config {NAME} does");
        loaded.warnings.push(problem::Place::of(Origin::File(PathBuf::from(NAME))).warning(what));
    }
    Ok(loaded)
}

/// What a configuration file is called.
const NAME: &str = "keychoir.toml";

/// Everything that can be set. The default has no keys.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// The listeners and the bounds of clients.
    pub server: ServerConfig,
    /// The provider.
    pub upstream: UpstreamConfig,
    /// How keys are chosen.
    pub pool: PoolConfig,
    /// How refused requests are sent again.
    pub retry: RetryConfig,
    /// How quotas are polled.
    pub quota_polling: QuotaPollingConfig,
    /// Where usage records are kept.
    pub storage: StorageConfig,
    /// The mirror.
    pub supabase: SupabaseConfig,
    /// How long the account of an identifier is remembered.
    pub affinity: AffinityConfig,
    /// The bounds of sessions on WebSockets.
    pub websocket: WebsocketConfig,
    /// The log.
    pub log: LogConfig,
    /// What clients may request.
    pub access: AccessConfig,
    /// The pool's keys in their order, each once.
    pub keys: Vec<KeyConfig>,
    /// Where the keys were found.
    pub key_source: KeySource,
    /// Who may use the pool; with none, no token is asked for.
    pub clients: Vec<ClientConfig>,
    /// The certificate in the files of `server.tls`, if it names some.
    pub certificate: Option<Certificate>,
}

impl Config {
    /// All defaults around these keys and this upstream, but with the books in memory only: for
    /// the demo and for tests, which must leave nothing behind.
    #[must_use]
    pub fn with_defaults(keys: Vec<ApiKey>, base_url: BaseUrl) -> Self {
        let mut config = Self {
            keys: keys.into_iter().map(KeyConfig::from).collect(),
            key_source: KeySource::Caller,
            ..Self::default()
        };
        config.upstream.base_url = base_url;
        config.storage.ephemeral = true;
        config
    }

    /// Where the local authority lives: in `server.tls_directory`, or beside the books.
    #[must_use]
    pub fn authority_place(&self) -> certificate::CaLocation {
        let beside = || Some(self.storage.file()?.parent()?.join("tls"));
        match self.server.tls_directory.clone().or_else(beside) {
            Some(folder) => certificate::CaLocation::Folder(folder),
            None => certificate::CaLocation::Memory,
        }
    }
}

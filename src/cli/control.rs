//! Makes changes of keys and clients for the commands `keys` and `clients`: through the admin API of the running
//! Keychoir, or, if none responds, in the overlay. The next startup reads the overlay. Other commands find the running
//! Keychoir and the admin token with the same options, and parse durations and ends with the same functions.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use http::Method;
use serde::Deserialize;
use serde_json::{Value, json};

use super::admin_token::find_admin_token;
use super::server::{KeychoirClient, ServerAddress, ServerRequestError};
use super::{
    CommandResult, ConfigSources, EX_CONFIG, build_runtime, fail, fail_with, load, print, print_error,
};
use crate::admin::control::{Actor, Change, ChangeOrigin, ControlError, NewKey, TokenExpiry};
use crate::clock;
use crate::config::{Config, KeyRequirement, Overrides};
use crate::control::{Controller, create_offline_recorder};
use crate::policy::quantity::duration::{self, DisplayDuration};
use crate::policy::units::UnixMs;
use crate::store::{OfflineChanges, OpenError};

/// The options of commands that use the admin API.
#[derive(Clone, Debug, Args)]
pub(super) struct ControlOptions {
    #[command(flatten)]
    sources: ConfigSources,
    /// Connect here instead of to the configured address: http://HOST:PORT, https://HOST:PORT or unix:/PATH.
    #[arg(long, value_name = "URL")]
    url: Option<String>,
    /// A file with the admin token. By default: KEYCHOIR_ADMIN_TOKEN, then the file of admin.token_file, or else the
    /// token in the directory of the usage database.
    #[arg(long, value_name = "FILE")]
    admin_token_file: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    pub(super) json: bool,
}

/// The target of a change: the running Keychoir or the overlay.
pub(super) enum Target {
    /// The running Keychoir, or the address in `--url`.
    Server(AdminClient),
    /// The overlay, because no Keychoir responds at the configured address.
    Offline(Box<OfflineConfig>),
}

/// The configuration of a command without a running Keychoir, and the sources that a change loads again.
pub(super) struct OfflineConfig {
    overrides: Overrides,
    pub(super) config: Config,
}

/// A client of the admin API.
pub(super) struct AdminClient {
    client: KeychoirClient,
    token: Option<String>,
}

/// The result of a change, from the controller or from the admin API. It is not `Debug`, because it contains the
/// new token.
#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct Receipt {
    pub(super) generation: u64,
    pub(super) token: Option<String>,
    pub(super) warnings: Vec<String>,
}

/// The path prefix of the admin API.
const API_PREFIX: &str = "/api/keychoir/v1";

/// The state directory of the service in `systemd/`.
const SERVICE_DIRECTORY: &str = "/var/lib/keychoir";

/// Returns advice if a change would not reach the service: the service has its state directory at `service`, no source
/// sets `storage.path`, and its default value is in a different directory.
fn service_directory_hint(config: &Config, service: &Path) -> Option<String> {
    let settings = config.setting_values();
    let is_default =
        settings.iter().any(|setting| setting.name == "storage.path" && setting.source == "default");
    let directory = config.state_directory().filter(|directory| is_default && directory.path() != service)?;
    // A symbolic link counts as a directory, even if this user may not follow it.
    service.symlink_metadata().ok()?;
    Some(format!(
        "the service keeps its keys and clients in {service}, and this command would use {used}: run it with \
         KEYCHOIR_STORAGE__PATH={database}",
        service = service.display(),
        used = directory.path().display(),
        database = service.join("keychoir.db").display(),
    ))
}

impl ControlOptions {
    /// Finds the running Keychoir. Without `--url`, it is not an error if none responds.
    pub(super) async fn connect(&self) -> Result<Target, ExitCode> {
        let overrides = self.overrides();
        // An address that requires client tokens is accepted, because the change may add the first client.
        let lenient_overrides = Overrides { allows_exposure: true, ..overrides.clone() };
        if let Some(url) = &self.url {
            let address = ServerAddress::parse(url).map_err(fail)?;
            // The token of this machine's state directory is not sent to other machines.
            let config = if address.is_local() { crate::config::load(&lenient_overrides).ok() } else { None };
            let config = config.map(|loaded| loaded.config);
            return Ok(Target::Server(self.create_client(address, config.as_ref())?));
        }
        let config = load(&lenient_overrides)?.config;
        if let Ok(address) = ServerAddress::from_config(&config) {
            let admin_client = self.create_client(address, Some(&config))?;
            if admin_client.client.is_keychoir().await {
                return Ok(Target::Server(admin_client));
            }
        }
        if let Some(hint) = service_directory_hint(&config, Path::new(SERVICE_DIRECTORY)) {
            return Err(fail_with(EX_CONFIG, hint));
        }
        Ok(Target::Offline(Box::new(OfflineConfig { overrides, config })))
    }

    /// Returns the sources of the configuration, which may have no keys.
    pub(super) fn overrides(&self) -> Overrides {
        self.sources.clone().into_overrides(KeyRequirement::Optional)
    }

    /// Returns the address in `--url`, or else the configured address.
    pub(super) fn address(&self, config: &Config) -> Result<ServerAddress, ServerRequestError> {
        match &self.url {
            Some(url) => ServerAddress::parse(url),
            None => ServerAddress::from_config(config),
        }
    }

    /// Reads the admin token. Returns `None` if there is none or it cannot be read.
    pub(super) fn find_token(&self, config: &Config) -> Option<String> {
        self.read_token(Some(config)).ok().flatten()
    }

    fn create_client(
        &self,
        address: ServerAddress,
        config: Option<&Config>,
    ) -> Result<AdminClient, ExitCode> {
        let ca_file = config.and_then(Config::local_ca_file);
        let client = KeychoirClient::new(address, None, ca_file.as_deref()).map_err(fail)?;
        let token = self.read_token(config)?;
        Ok(AdminClient { client, token })
    }

    /// Reads the admin token. A missing default file is not an error, because some requests to Keychoir need no token.
    /// Fails with advice if the token would be read from another directory than that of the service.
    fn read_token(&self, config: Option<&Config>) -> Result<Option<String>, ExitCode> {
        let has_token_file = self.admin_token_file.is_some();
        if let Some(hint) = config
            .filter(|_| !has_token_file)
            .and_then(|config| service_directory_hint(config, Path::new(SERVICE_DIRECTORY)))
        {
            return Err(fail(hint));
        }
        find_admin_token(self.admin_token_file.as_deref(), config).map_err(fail)
    }

    /// Makes a change, and prints `message` and the token that the change generated.
    pub(super) fn make_change(&self, change: Change, message: &str) -> CommandResult {
        let receipt = build_runtime()?.block_on(async {
            match self.connect().await? {
                Target::Server(client) => client.make_change(&change).await,
                Target::Offline(offline) => offline.make_change(change).await,
            }
        })?;
        let Receipt { generation, token, warnings } = &receipt;
        print_error(&message);
        for warning in warnings {
            print_error(&format_args!("note: {warning}"));
        }
        if self.json {
            let mut document = json!({"generation": generation, "warnings": warnings});
            if let (Some(token), Some(document)) = (token, document.as_object_mut()) {
                document.insert("token".to_owned(), token.as_str().into());
            }
            print(&document);
        } else if let Some(token) = token {
            print(token);
        }
        Ok(())
    }
}

impl OfflineConfig {
    async fn make_change(self, change: Change) -> Result<Receipt, ExitCode> {
        let file = self.config.storage.file().ok_or_else(|| report_error(ControlError::NoStateDirectory))?;
        let changes = OfflineChanges::open(file, clock::now()).map_err(|error| {
            if matches!(error, OpenError::InUse { .. }) {
                let advice = "It does not respond at the configured address: name its address with --url";
                return fail(format_args!("{error}. {advice}"));
            }
            fail(error)
        })?;
        let mut controller = Controller::offline(self.overrides, create_offline_recorder(changes));
        let origin = ChangeOrigin { actor: Actor::CommandLine, address: None };
        let receipt = Box::pin(controller.make(change, None, origin, None)).await.map_err(report_error)?;
        Ok(Receipt {
            generation: receipt.generation,
            token: receipt.token.map(|token| token.expose().to_owned()),
            warnings: receipt.warnings,
        })
    }
}

impl AdminClient {
    /// Returns the base URL for a browser, or `None` for a Unix socket.
    pub(super) fn browser_url(&self) -> Option<String> {
        Some(self.client.address_text()).filter(|address| !address.starts_with("unix:"))
    }

    /// Requests a document of the admin API.
    pub(super) async fn get(&self, path: &str) -> Result<Value, ExitCode> {
        self.call(&Method::GET, path, None).await
    }

    async fn make_change(&self, change: &Change) -> Result<Receipt, ExitCode> {
        let call = ApiCall::new(change);
        let path = match call.key {
            Some(key) => format!("/keys/{}{}", self.find_key_id(key).await?, call.path),
            None => call.path,
        };
        let document = self.call(&call.method, &path, call.body).await?;
        serde_json::from_value(document)
            .map_err(|error| fail(format_args!("the response of the server is not valid: {error}")))
    }

    /// Returns the ids of all keys of the pool, in their order.
    pub(super) async fn key_ids(&self) -> Result<Vec<String>, ExitCode> {
        let document = self.get("/keys").await?;
        let keys = document["keys"].as_array().map_or(&[][..], Vec::as_slice);
        Ok(keys.iter().filter_map(|key| key["id"].as_str()).map(str::to_owned).collect())
    }

    /// Finds the id of a key by its id, name or short form.
    pub(super) async fn find_key_id(&self, identifier: &str) -> Result<String, ExitCode> {
        let document = self.get("/keys").await?;
        let keys = document["keys"].as_array().map_or(&[][..], Vec::as_slice);
        let find_keys_by =
            |member: &str| keys.iter().filter(|key| key[member] == identifier).collect::<Vec<_>>();
        let matching_keys = ["id", "name", "short_key"]
            .map(find_keys_by)
            .into_iter()
            .find(|matching_keys| !matching_keys.is_empty());
        match matching_keys.as_deref() {
            Some([key]) => Ok(key["id"].as_str().unwrap_or_default().to_owned()),
            Some(_) => Err(fail("several keys have this short form: use the id of the key")),
            None => Err(fail(
                "the pool has no key with this id, name or short form: `keychoir keys list` lists them",
            )),
        }
    }

    /// Sends a request to the admin API. Returns the document of a successful response. Prints the error of any other
    /// response, and returns the exit code.
    pub(super) async fn call(
        &self,
        method: &Method,
        path: &str,
        body: Option<Value>,
    ) -> Result<Value, ExitCode> {
        let Some(token) = &self.token else {
            return Err(fail(
                "the server requires the admin token: use --admin-token-file or KEYCHOIR_ADMIN_TOKEN",
            ));
        };
        let path = format!("{API_PREFIX}{path}");
        let (status, document) =
            self.client.call_admin(method.clone(), &path, token, body).await.map_err(fail)?;
        match status {
            200..300 => Ok(document),
            _ => {
                let message =
                    document["detail"]["message"].as_str().unwrap_or("the server refuses the request");
                let code = if matches!(status, 400 | 422) { EX_CONFIG } else { 1 };
                Err(fail_with(code, format_args!("{message} (HTTP {status})")))
            }
        }
    }
}

/// An admin API request for a change.
struct ApiCall<'a> {
    method: Method,
    /// The path after the prefix of the API, or, with `key`, after the path of the key.
    path: String,
    /// The id, name or short form of the key, if the change is about an existing key.
    key: Option<&'a str>,
    body: Option<Value>,
}

impl<'a> ApiCall<'a> {
    fn new(change: &'a Change) -> Self {
        let call = |method, path: String, key, body| Self { method, path, key, body };
        match change {
            Change::AddKey(NewKey { name, key, workspace, base_url, weight }) => {
                let body = json!({
                    "name": name,
                    "key": key.expose(),
                    "workspace": workspace,
                    "base_url": base_url,
                    "weight": weight,
                });
                call(Method::POST, "/keys".to_owned(), None, Some(without_nulls(body)))
            }
            Change::RemoveKey { key } => call(Method::DELETE, String::new(), Some(key), None),
            Change::PauseKey { key, until, reason } => {
                let body = json!({"until": until.map(UnixMs::rfc3339), "reason": reason});
                call(Method::POST, "/pause".to_owned(), Some(key), Some(without_nulls(body)))
            }
            Change::ResumeKey { key } => call(Method::POST, "/resume".to_owned(), Some(key), Some(json!({}))),
            Change::AddClient { name, rules, expires_at } => {
                let mut body = rules.to_json();
                body["name"] = name.as_str().into();
                body["expires_at"] = expires_at.map(UnixMs::rfc3339).into();
                call(Method::POST, "/clients".to_owned(), None, Some(without_nulls(body)))
            }
            Change::SetClient { name, rules, expiry } => {
                let mut body = rules.to_json();
                // The API reads `null` as a token that does not expire.
                match expiry {
                    Some(TokenExpiry::At(time)) => body["expires_at"] = time.rfc3339().into(),
                    Some(TokenExpiry::Never) => body["expires_at"] = Value::Null,
                    None => {}
                }
                call(Method::PATCH, format!("/clients/{name}"), None, Some(body))
            }
            Change::RotateClient { name, grace, expires_at } => {
                let body = json!({
                    "grace": DisplayDuration(*grace).to_string(),
                    "expires_at": expires_at.map(UnixMs::rfc3339),
                });
                call(Method::POST, format!("/clients/{name}/rotate"), None, Some(without_nulls(body)))
            }
            Change::RevokeClient { name } => call(Method::DELETE, format!("/clients/{name}"), None, None),
            Change::Reload => call(Method::POST, "/reload".to_owned(), None, Some(json!({}))),
        }
    }
}

fn without_nulls(mut document: Value) -> Value {
    if let Some(members) = document.as_object_mut() {
        members.retain(|_, value| !value.is_null());
    }
    document
}

/// Prints the error of a change, and returns the exit code.
fn report_error(error: ControlError) -> ExitCode {
    match error {
        ControlError::Stale { .. }
        | ControlError::Unwritable { .. }
        | ControlError::UnreadableOverlay { .. }
        | ControlError::NoRandomNumbers
        | ControlError::NotFound(_)
        | ControlError::AlreadyExists(_)
        | ControlError::LastClient
        | ControlError::GraceNotEnded
        | ControlError::NotPaused(_)
        | ControlError::NotManaged(_)
        | ControlError::Unavailable => fail(error),
        ControlError::Invalid(_) | ControlError::NoStateDirectory => fail_with(EX_CONFIG, error),
    }
}

/// Parses the duration of an option, such as `2h`.
pub(super) fn parse_duration(text: &str) -> Result<std::time::Duration, String> {
    duration::parse(text).map_err(|_| "write a duration, for example 30m, 2h or 30d".to_owned())
}

/// Parses the end of a pause or of a token: a duration from now on, or an RFC 3339 time.
pub(super) fn parse_end(text: &str) -> Result<UnixMs, String> {
    let from_now = duration::parse(text).ok().map(|duration| clock::now().plus(duration));
    from_now.or_else(|| UnixMs::parse(text)).ok_or_else(|| {
        "write a duration, for example 2h or 30d, or a time such as 2026-12-01T00:00:00Z".to_owned()
    })
}

/// Parses the end of a token: `never`, a duration from now on, or an RFC 3339 time.
pub(super) fn parse_expiry(text: &str) -> Result<TokenExpiry, String> {
    match text {
        "never" => Ok(TokenExpiry::Never),
        text => parse_end(text).map(TokenExpiry::At).map_err(|error| format!("{error}, or `never`")),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_change_that_would_not_reach_the_service_is_refused_with_advice() {
        let temporary = tempfile::tempdir().unwrap();
        let service = temporary.path().join("service");
        let other_database = temporary.path().join("other/keychoir.db");
        let mut config = Config::default();
        config.storage.path.clone_from(&other_database);
        assert_eq!(
            service_directory_hint(&config, &service),
            None,
            "without a service, no other directory must be suggested"
        );
        fs::create_dir(&service).unwrap();
        let hint = service_directory_hint(&config, &service).unwrap();
        assert!(
            hint.contains("KEYCHOIR_STORAGE__PATH=") && hint.contains("service/keychoir.db"),
            "the hint must name the database of the service: {hint}"
        );
        config.storage.path = service.join("keychoir.db");
        assert_eq!(service_directory_hint(&config, &service), None);
        config.storage.path = other_database;
        config.setting_sources.insert("storage.path", "KEYCHOIR_STORAGE__PATH".to_owned());
        assert_eq!(service_directory_hint(&config, &service), None);
    }
}

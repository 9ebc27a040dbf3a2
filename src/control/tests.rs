//! Tests of the controller with real files, and with a running server in the tests that call [`start_server`]: changes
//! of keys and clients, refused and interrupted changes, reloads, records of changes, and the generated admin token.

mod replicas;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver};

use super::*;
use crate::admin::control::{ClientRules, NewKey, TokenExpiry};
use crate::app::{self, AppConfig, Listener};
use crate::config::{self, ClientConfig, Config, KEYS_DIRECTORY, Overlay};
use crate::policy::client::ClientOrigin;
use crate::policy::key_state::KeyOrigin;
use crate::policy::units::UnixMs;
use crate::secret::{ApiKey, TokenFingerprint};

const FIRST_KEY: &str = "sk_0123456789abcdef0123456789abcdef0123456789abcdef";
const SPARE_KEY: &str = "sk_fedcba9876543210fedcba9876543210fedcba9876543210";

/// The file of the key that [`new_key`] adds.
const KEY_FILE: &str = "managed_keys/spare";

const ORIGIN: ChangeOrigin = ChangeOrigin { actor: Actor::CommandLine, address: None };

/// A machine whose configuration file contains one key and the client `app`.
struct Machine {
    directory: tempfile::TempDir,
}

impl Machine {
    fn new() -> Self {
        let machine = Self { directory: tempfile::tempdir().unwrap() };
        machine.configure("");
        machine
    }

    /// Writes the configuration file, which ends with `last_lines`.
    fn configure(&self, last_lines: &str) {
        let database = self.state_directory().join("keychoir.db");
        let token = TokenFingerprint::new("token-of-app");
        let config_text = format!(
            "[storage]\npath = \"{}\"\n[quota_polling]\nenabled = false\n\
             [upstream]\nbase_url = \"http://127.0.0.1:9\"\n\
             [[keys]]\nname = \"first\"\nkey = \"{FIRST_KEY}\"\n\
             [[clients]]\nname = \"app\"\ntoken_sha256 = \"{token}\"\nquota = \"3 requests\"\n{last_lines}",
            database.display()
        );
        fs::write(self.config_file(), config_text).unwrap();
    }

    fn config_file(&self) -> PathBuf {
        self.directory.path().join("keychoir.toml")
    }

    fn state_directory(&self) -> PathBuf {
        self.directory.path().join("state")
    }

    fn overrides(&self) -> Overrides {
        Overrides {
            config_file: Some(self.config_file()),
            listen: vec!["127.0.0.1:0".to_owned()],
            ..Overrides::default()
        }
    }

    fn controller(&self) -> (Controller, Receiver<StoredChange>) {
        let (sender, records) = mpsc::channel();
        let recorder = move |record| -> RecordFuture {
            sender.send(record).unwrap();
            Box::pin(std::future::ready(()))
        };
        (Controller::offline(self.overrides(), Box::new(recorder)), records)
    }

    /// Makes a change like another process, without a running server.
    async fn make(&self, change: Change) -> Result<ChangeReceipt, ControlError> {
        self.controller().0.make(change, None, ORIGIN, None).await
    }

    fn config(&self) -> Config {
        config::load(&self.overrides()).unwrap().config
    }

    /// Returns the files of the state directory and their contents, without the lock file.
    fn state_files(&self) -> Vec<(PathBuf, String)> {
        fn collect(directory: &Path, files: &mut Vec<(PathBuf, String)>) {
            for entry in fs::read_dir(directory).into_iter().flatten() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    collect(&path, files);
                } else if path.file_name().unwrap() != "managed.lock" {
                    files.push((path.clone(), fs::read_to_string(&path).unwrap()));
                }
            }
        }
        let mut files = Vec::new();
        collect(&self.state_directory(), &mut files);
        files.sort();
        files
    }
}

fn new_key() -> NewKey {
    NewKey {
        name: "spare".to_owned(),
        key: ApiKey::new(SPARE_KEY).unwrap(),
        workspace: None,
        base_url: None,
        weight: None,
    }
}

fn pause_key(key: &str) -> Change {
    Change::PauseKey { key: key.to_owned(), until: None, reason: Some("billing".to_owned()) }
}

fn quota_rules(quota: &str) -> ClientRules {
    ClientRules { quota: Some(quota.to_owned()), ..ClientRules::default() }
}

#[tokio::test]
async fn a_key_is_added_paused_resumed_and_removed() {
    let machine = Machine::new();
    let (mut controller, records) = machine.controller();
    let receipt = controller.make(Change::AddKey(new_key()), Some(0), ORIGIN, None).await.unwrap();
    assert_eq!(receipt.generation, 1);
    let config = machine.config();
    assert_eq!((config.keys.len(), config.keys[1].origin), (2, KeyOrigin::Managed));
    let id = receipt.key_id.unwrap();
    assert_eq!(id, config.keys[1].key.fingerprint().to_string()[..12]);

    // The key is paused by its id and by its name, and resumed by its short form.
    controller.make(pause_key(&id), None, ORIGIN, None).await.unwrap();
    let config = machine.config();
    assert_eq!(config.paused_keys[0].reason.as_deref(), Some("billing"));
    let short_key = config.keys[1].key.short().to_string();
    controller.make(Change::ResumeKey { key: short_key }, None, ORIGIN, None).await.unwrap();
    assert!(machine.config().paused_keys.is_empty());
    controller.make(pause_key("spare"), None, ORIGIN, None).await.unwrap();
    controller.make(Change::RemoveKey { key: "spare".to_owned() }, None, ORIGIN, None).await.unwrap();
    let config = machine.config();
    assert_eq!((config.keys.len(), config.paused_keys.len(), config.generation), (1, 0, 5));
    assert!(!machine.state_directory().join(KEY_FILE).exists());

    let records: Vec<_> = records.try_iter().collect();
    let actions: Vec<_> =
        records.iter().map(|record| (record.action.as_str(), record.target.as_deref())).collect();
    let expected = ["key_added", "key_paused", "key_resumed", "key_paused", "key_removed"];
    assert_eq!(actions, expected.map(|action| (action, Some("spare"))));
    assert!(
        records.iter().all(|record| !format!("{record:?}").contains(SPARE_KEY)),
        "no record must contain the key"
    );
}

#[tokio::test]
async fn a_key_that_the_file_has_as_well_is_removed_from_the_overlay_only() {
    let machine = Machine::new();
    machine.make(Change::AddKey(new_key())).await.unwrap();
    machine.configure(&format!("[[keys]]\nkey = \"{SPARE_KEY}\"\n"));
    let config = machine.config();
    assert_eq!((config.keys.len(), config.keys[1].origin), (2, KeyOrigin::File));
    machine.make(Change::RemoveKey { key: "spare".to_owned() }).await.unwrap();
    assert_eq!(machine.config().keys.len(), 2);
    assert!(!machine.state_directory().join(KEY_FILE).exists());
}

#[tokio::test]
async fn a_client_of_the_file_is_rotated_changed_and_revoked_without_touching_the_file() {
    let machine = Machine::new();
    let config_text = fs::read_to_string(machine.config_file()).unwrap();
    let name = || "app".to_owned();
    let grace = Duration::from_secs(3_600);
    let receipt = machine.make(Change::RotateClient { name: name(), grace, expires_at: None }).await.unwrap();
    let token = TokenFingerprint::new(receipt.token.unwrap().expose());
    let client = machine.config().clients.remove(0);
    assert_eq!(client.token, token);
    assert_eq!(client.previous_token.map(|(token, _)| token), Some(TokenFingerprint::new("token-of-app")));
    assert!(client.rules.quota.is_some());

    machine.make(Change::SetClient { name: name(), rules: quota_rules(""), expiry: None }).await.unwrap();
    let client = machine.config().clients.remove(0);
    assert_eq!((client.rules.quota, client.token), (None, token), "the rule of the file must be removed");
    let rules = ClientRules { max_concurrent: Some(4), ..ClientRules::default() };
    machine.make(Change::SetClient { name: name(), rules, expiry: None }).await.unwrap();
    machine
        .make(Change::SetClient { name: name(), rules: quota_rules("5 requests"), expiry: None })
        .await
        .unwrap();
    let client = machine.config().clients.remove(0);
    assert_eq!(client.rules.max_concurrent, Some(4));
    assert_eq!(client.rules.quota.unwrap().to_string(), "5 requests");

    let add = |name| Change::AddClient { name, rules: ClientRules::default(), expires_at: None };
    machine.make(add("web".to_owned())).await.unwrap();
    machine.make(Change::RevokeClient { name: name() }).await.unwrap();
    assert_eq!(machine.config().clients.len(), 1);
    // The client that is added again does not inherit the rules of the file.
    machine.make(add(name())).await.unwrap();
    let client = machine.config().clients.into_iter().find(|client| client.name == name()).unwrap();
    assert_eq!(client.rules.quota, None);
    assert_eq!(fs::read_to_string(machine.config_file()).unwrap(), config_text);
}

#[tokio::test]
async fn the_end_of_a_token_is_set_moved_and_removed() {
    let machine = Machine::new();
    let set = |expiry| {
        let change =
            Change::SetClient { name: "app".to_owned(), rules: ClientRules::default(), expiry: Some(expiry) };
        machine.make(change)
    };
    let client = || machine.config().clients.remove(0);
    let unchanged = ClientConfig { origin: ClientOrigin::Changed, ..client() };
    // The token of the configuration file expires, and its rules stay.
    let end = clock::now().plus(Duration::from_secs(3_600));
    set(TokenExpiry::At(end)).await.unwrap();
    let expected = ClientConfig { expires_at: Some(end), ..unchanged.clone() };
    assert_eq!(client(), expected, "only the end of the token must change");
    set(TokenExpiry::Never).await.unwrap();
    assert_eq!(client(), unchanged);
    // The end of a token of the overlay is removed in the same way.
    let rotate =
        Change::RotateClient { name: "app".to_owned(), grace: Duration::ZERO, expires_at: Some(end) };
    machine.make(rotate).await.unwrap();
    let rotated_client = client();
    set(TokenExpiry::Never).await.unwrap();
    assert_eq!(client(), ClientConfig { expires_at: None, ..rotated_client }, "the token must stay");
    let error = set(TokenExpiry::At(UnixMs(1))).await.unwrap_err();
    assert!(error.to_string().contains("not in the future"), "an end in the past must be refused: {error}");
}

#[tokio::test]
async fn an_invalid_change_changes_no_file() {
    let machine = Machine::new();
    machine.make(Change::AddKey(new_key())).await.unwrap();
    let files_before = machine.state_files();
    let named_key =
        |name: &str, key: &str| NewKey { name: name.to_owned(), key: ApiKey::new(key).unwrap(), ..new_key() };
    let add_client = |name: &str, rules| Change::AddClient { name: name.to_owned(), rules, expires_at: None };
    let other_key = "sk_aaaabbbbccccddddaaaabbbbccccddddaaaabbbbccccdddd";
    let pause_with_past_end =
        Change::PauseKey { key: "first".to_owned(), until: Some(UnixMs(1)), reason: None };
    let pause_with_long_reason =
        Change::PauseKey { key: "first".to_owned(), until: None, reason: Some("x".repeat(201)) };
    for (change, expected) in [
        (Change::AddKey(named_key("spare", other_key)), "already exists"),
        (Change::AddKey(named_key("other", FIRST_KEY)), "has this key already: first"),
        (Change::AddKey(named_key("../other", other_key)), "this name is invalid"),
        (Change::RemoveKey { key: "first".to_owned() }, "configured in a file"),
        (Change::RemoveKey { key: "none".to_owned() }, "has no key with this"),
        (Change::ResumeKey { key: "first".to_owned() }, "is not paused"),
        (pause_with_past_end, "not in the future"),
        (pause_with_long_reason, "at most 200 characters"),
        (add_client("app", quota_rules("1 request")), "already exists"),
        (add_client("web", quota_rules("much")), "is not a quota"),
        (add_client("own", quota_rules("1 request")), "is reserved"),
        (
            Change::SetClient { name: "app".to_owned(), rules: ClientRules::default(), expiry: None },
            "names no rule",
        ),
        (Change::RevokeClient { name: "none".to_owned() }, "no client has this name"),
    ] {
        let error = machine.make(change).await.unwrap_err().to_string();
        assert!(error.contains(expected), "the error must contain {expected:?}, but it is: {error}");
        assert_eq!(machine.state_files(), files_before, "no file must change: {error}");
    }
}

#[tokio::test]
async fn a_stale_generation_is_refused_with_the_current_one() {
    let machine = Machine::new();
    let (mut controller, _records) = machine.controller();
    controller.make(pause_key("first"), Some(0), ORIGIN, None).await.unwrap();
    let resume = || Change::ResumeKey { key: "first".to_owned() };
    let error = controller.make(resume(), Some(0), ORIGIN, None).await.unwrap_err();
    assert_eq!(error, ControlError::Stale { current: 1 });
    assert_eq!(machine.config().paused_keys.len(), 1);
    controller.make(resume(), Some(1), ORIGIN, None).await.unwrap();
}

#[tokio::test]
async fn a_crash_between_two_files_leaves_the_state_before_or_after_the_change() {
    for (step, expected_keys) in [(ChangeStep::KeyFilesWritten, 1), (ChangeStep::OverlaySaved, 2)] {
        let machine = Machine::new();
        let (mut controller, records) = machine.controller();
        controller.stop_after = Some(step);
        let stopped = controller.make(Change::AddKey(new_key()), None, ORIGIN, None).await;
        assert_eq!(stopped.unwrap_err(), ControlError::Unavailable);
        assert!(records.try_recv().is_err());
        assert!(machine.state_directory().join(KEY_FILE).exists());
        assert_eq!(machine.config().keys.len(), expected_keys);
        // The next startup deletes the key files that no entry names.
        delete_leftover_key_files(&machine.config());
        assert_eq!(machine.state_directory().join(KEY_FILE).exists(), expected_keys == 2);
    }
    // Removing a key saves the overlay first.
    let machine = Machine::new();
    machine.make(Change::AddKey(new_key())).await.unwrap();
    let (mut controller, _records) = machine.controller();
    controller.stop_after = Some(ChangeStep::OverlaySaved);
    let remove = Change::RemoveKey { key: "spare".to_owned() };
    assert!(controller.make(remove, None, ORIGIN, None).await.is_err());
    assert_eq!(machine.config().keys.len(), 1);
    assert!(machine.state_directory().join(KEY_FILE).exists());
    delete_leftover_key_files(&machine.config());
    assert!(!machine.state_directory().join(KEY_FILE).exists());
}

#[tokio::test]
async fn a_change_that_cannot_be_written_changes_nothing() {
    let machine = Machine::new();
    machine.make(pause_key("first")).await.unwrap();
    // A file in place of the directory of keys fails for every user, as a full disk would.
    fs::write(machine.state_directory().join(KEYS_DIRECTORY), "").unwrap();
    let files_before = machine.state_files();
    let error = machine.make(Change::AddKey(new_key())).await.unwrap_err();
    assert!(matches!(error, ControlError::Unwritable { .. }), "the directory must not be writable: {error}");
    assert_eq!(machine.state_files(), files_before);
    fs::remove_file(machine.state_directory().join(KEYS_DIRECTORY)).unwrap();
    machine.make(Change::AddKey(new_key())).await.unwrap();
}

#[tokio::test]
async fn two_controllers_lose_no_change_of_each_other() {
    let machine = Machine::new();
    let (mut first, _first_records) = machine.controller();
    let (mut second, _second_records) = machine.controller();
    let add = |name: String| Change::AddClient { name, rules: ClientRules::default(), expires_at: None };
    let add_all = async |controller: &mut Controller, side: &str| {
        for number in 0..5 {
            controller.make(add(format!("{side}-{number}")), None, ORIGIN, None).await.unwrap();
            tokio::task::yield_now().await;
        }
    };
    tokio::join!(add_all(&mut first, "left"), add_all(&mut second, "right"));
    let config = machine.config();
    assert_eq!((config.clients.len(), config.generation), (11, 10));
}

#[tokio::test]
async fn without_a_state_directory_no_change_is_made() {
    let machine = Machine::new();
    let overrides = Overrides { is_ephemeral: true, ..machine.overrides() };
    let recorder = |_| -> RecordFuture { Box::pin(std::future::ready(())) };
    let mut controller = Controller::offline(overrides, Box::new(recorder));
    let error = controller.make(pause_key("first"), None, ORIGIN, None).await.unwrap_err();
    assert_eq!(error, ControlError::NoStateDirectory);
}

#[test]
fn the_admin_token_is_generated_once() {
    let machine = Machine::new();
    let mut config = machine.config();
    assert!(config.admin_token.is_none());
    let new_token = NewAdminToken::generate_into(&mut config).unwrap();
    assert!(!machine.state_directory().exists(), "a failed start must leave no file");
    new_token.save().unwrap();
    let text = fs::read_to_string(machine.state_directory().join("admin_token")).unwrap();
    assert!(text.starts_with("kca_"), "the token must have its prefix");
    assert_eq!(text.trim().len(), 52);
    let mut reloaded_config = machine.config();
    assert_eq!(reloaded_config.admin_token, config.admin_token);
    assert!(NewAdminToken::generate_into(&mut reloaded_config).is_none());
}

/// Starts Keychoir on this machine with a controller.
async fn start_server(machine: &Machine) -> (RunningApp, Controller, Receiver<StoredChange>) {
    let loaded_config = config::load(&machine.overrides()).unwrap();
    let (sender, records) = mpsc::channel();
    let generation = Arc::new(AtomicU64::new(loaded_config.config.generation));
    let recorder = move |record| -> RecordFuture {
        sender.send(record).unwrap();
        Box::pin(std::future::ready(()))
    };
    let reloader = ConfigReloader::new(None, &loaded_config);
    let controller = Controller::new(machine.overrides(), reloader, generation, Box::new(recorder));
    let listener = Listener::Tcp(tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap());
    let app = app::start(AppConfig::from_config(loaded_config.config).unwrap(), vec![listener]).unwrap();
    (app, controller, records)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_is_in_force_in_the_running_program_when_it_is_confirmed() {
    let machine = Machine::new();
    let (app, mut controller, records) = start_server(&machine).await;
    let keys_and_clients = || (app.keys().len(), app.client_names());
    controller.make(Change::AddKey(new_key()), None, ORIGIN, Some(&app)).await.unwrap();
    assert_eq!(keys_and_clients(), (2, vec!["app".to_owned()]));
    let add = Change::AddClient { name: "web".to_owned(), rules: quota_rules("1 request"), expires_at: None };
    controller.make(add, None, ORIGIN, Some(&app)).await.unwrap();
    assert_eq!(keys_and_clients(), (2, vec!["app".to_owned(), "web".to_owned()]));
    controller
        .make(Change::RemoveKey { key: "spare".to_owned() }, Some(2), ORIGIN, Some(&app))
        .await
        .unwrap();
    assert_eq!(keys_and_clients().0, 1);
    assert_eq!(records.try_iter().count(), 3);
    app.drain(Duration::ZERO).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_counts_as_a_change_only_if_it_changed_something() {
    let machine = Machine::new();
    let (app, mut controller, records) = start_server(&machine).await;
    let reload_origin = ChangeOrigin { actor: Actor::Reload, address: None };
    let receipt = controller.make(Change::Reload, None, reload_origin.clone(), Some(&app)).await.unwrap();
    assert_eq!(receipt.generation, 0);
    let token = TokenFingerprint::new("token-of-web");
    machine.configure(&format!("[[clients]]\nname = \"web\"\ntoken_sha256 = \"{token}\"\n"));
    let receipt = controller.make(Change::Reload, Some(0), reload_origin.clone(), Some(&app)).await.unwrap();
    assert_eq!((receipt.generation, machine.config().generation), (1, 1));
    assert_eq!(app.client_names().len(), 2);
    // A change of another process has increased the generation already.
    machine.make(pause_key("first")).await.unwrap();
    let receipt = controller.make(Change::Reload, None, reload_origin.clone(), Some(&app)).await.unwrap();
    assert_eq!(receipt.generation, 2);
    // A mistake is reported, and the previous configuration stays in use.
    machine.configure("[serverr]\n");
    let error = controller.make(Change::Reload, None, reload_origin, Some(&app)).await.unwrap_err();
    assert!(error.to_string().contains("unknown section `serverr`"), "the mistake must be named: {error}");
    assert_eq!((app.client_names().len(), records.try_iter().count()), (2, 2));
    app.drain(Duration::ZERO).await;
}

/// Returns a change that rotates the token of `app`.
fn rotate_app(grace: Duration, expires_at: Option<UnixMs>) -> Change {
    Change::RotateClient { name: "app".to_owned(), grace, expires_at }
}

#[tokio::test]
async fn files_that_keychoir_did_not_write_are_not_deleted() {
    let machine = Machine::new();
    let other_file = machine.state_directory().join("keys/main");
    fs::create_dir_all(other_file.parent().unwrap()).unwrap();
    fs::write(&other_file, FIRST_KEY).unwrap();
    delete_leftover_key_files(&machine.config());
    machine.make(Change::AddKey(new_key())).await.unwrap();
    machine.make(Change::RemoveKey { key: "spare".to_owned() }).await.unwrap();
    delete_leftover_key_files(&machine.config());
    assert_eq!(fs::read_to_string(other_file).unwrap(), FIRST_KEY);
    assert!(!machine.state_directory().join(KEY_FILE).exists());
}

#[tokio::test]
async fn the_last_client_is_not_revoked_because_requests_would_need_no_token() {
    let machine = Machine::new();
    let revoke = || Change::RevokeClient { name: "app".to_owned() };
    assert_eq!(machine.make(revoke()).await.unwrap_err(), ControlError::LastClient);
    let add = Change::AddClient { name: "web".to_owned(), rules: quota_rules("1 request"), expires_at: None };
    machine.make(add).await.unwrap();
    machine.make(revoke()).await.unwrap();
    let names: Vec<String> = machine.config().clients.into_iter().map(|client| client.name).collect();
    assert_eq!(names, ["web"]);
}

#[tokio::test]
async fn a_rotation_keeps_a_promised_grace_period_and_the_end_of_the_token() {
    let machine = Machine::new();
    let expires_at = clock::now().plus(Duration::from_secs(86_400));
    machine.make(rotate_app(Duration::from_secs(3_600), Some(expires_at))).await.unwrap();
    let client = machine.config().clients.remove(0);
    let (previous_token, _) = client.previous_token.unwrap();
    assert_eq!(
        (previous_token, client.expires_at),
        (TokenFingerprint::new("token-of-app"), Some(expires_at))
    );

    let refusal = machine.make(rotate_app(Duration::from_secs(1), None)).await.unwrap_err();
    assert_eq!(refusal, ControlError::GraceNotEnded);
    machine.make(rotate_app(Duration::ZERO, None)).await.unwrap();
    let client = machine.config().clients.remove(0);
    assert_eq!((client.previous_token, client.expires_at), (None, Some(expires_at)));
}

#[tokio::test]
async fn a_token_that_is_edited_after_its_rotation_is_reported() {
    let machine = Machine::new();
    machine.make(rotate_app(Duration::ZERO, None)).await.unwrap();
    machine.make(rotate_app(Duration::ZERO, None)).await.unwrap();
    let warnings = || {
        let loaded_config = config::load(&machine.overrides()).unwrap();
        loaded_config.warnings.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert!(
        !warnings().iter().any(|warning| warning.contains("has no effect")),
        "two rotations must cause no warning: {:?}",
        warnings()
    );
    let config_text = fs::read_to_string(machine.config_file()).unwrap();
    let token = |text| TokenFingerprint::new(text).to_string();
    let edited_text = config_text.replace(&token("token-of-app"), &token("edited"));
    fs::write(machine.config_file(), edited_text).unwrap();
    assert!(warnings().iter().any(|warning| warning.contains("`app`") && warning.contains("has no effect")));
}

#[tokio::test]
async fn an_overlay_that_is_too_large_to_be_read_is_not_written() {
    let machine = Machine::new();
    machine.make(pause_key("first")).await.unwrap();
    let files_before = machine.state_files();
    let paths = (0..60_000).map(|number| format!("/v1/path-{number:08}")).collect();
    let rules = ClientRules { paths: Some(paths), ..ClientRules::default() };
    let add = Change::AddClient { name: "large".to_owned(), rules, expires_at: None };
    let error = machine.make(add).await.unwrap_err();
    assert!(error.to_string().contains("larger than"), "the size must be refused: {error}");
    assert_eq!(machine.state_files(), files_before);
}

#[tokio::test]
async fn an_added_key_cannot_be_named_like_an_id_and_an_id_precedes_a_name() {
    let machine = Machine::new();
    let id = &ApiKey::new(FIRST_KEY).unwrap().fingerprint().to_string()[..12];
    let key = NewKey { name: id.to_owned(), ..new_key() };
    let error = machine.make(Change::AddKey(key)).await.unwrap_err();
    assert!(matches!(error, ControlError::Invalid(_)), "the name must be refused: {error}");
    // A name in the configuration file is not restricted, so the id has precedence.
    machine.configure(&format!("[[keys]]\nname = \"{id}\"\nkey = \"{SPARE_KEY}\"\n"));
    machine.make(pause_key(id)).await.unwrap();
    assert_eq!(machine.config().paused_keys[0].fingerprint, ApiKey::new(FIRST_KEY).unwrap().fingerprint());
}

#[tokio::test]
async fn a_change_records_the_rules_and_the_host_that_it_sets() {
    let machine = Machine::new();
    let (mut controller, records) = machine.controller();
    let key = NewKey { base_url: Some("http://127.0.0.1:10".to_owned()), ..new_key() };
    controller.make(Change::AddKey(key), None, ORIGIN, None).await.unwrap();
    let set = Change::SetClient { name: "app".to_owned(), rules: quota_rules("9 requests"), expiry: None };
    controller.make(set, None, ORIGIN, None).await.unwrap();
    let details: Vec<String> = records.try_iter().map(|record| record.detail).collect();
    assert!(details[0].contains("http://127.0.0.1:10"), "the record must contain the host: {details:?}");
    assert_eq!(details[1], r#"{"rules":{"quota":"9 requests"}}"#);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_applies_nothing_that_an_operator_is_writing_to_the_configuration_file() {
    let machine = Machine::new();
    let (app, mut controller, _records) = start_server(&machine).await;
    let config_text = fs::read_to_string(machine.config_file()).unwrap();
    // The clients are not written yet, so that Keychoir would serve requests without a token with this file.
    fs::write(machine.config_file(), config_text.split("[[clients]]").next().unwrap()).unwrap();
    controller.make(pause_key("first"), None, ORIGIN, Some(&app)).await.unwrap();
    assert_eq!(app.client_names(), ["app"]);
    // A mistake in the file does not prevent a change.
    machine.configure("[serverr]\n");
    let resume = Change::ResumeKey { key: "first".to_owned() };
    controller.make(resume, None, ORIGIN, Some(&app)).await.unwrap();
    // The next reload reads the file.
    let token = TokenFingerprint::new("token-of-web");
    machine.configure(&format!("[[clients]]\nname = \"web\"\ntoken_sha256 = \"{token}\"\n"));
    controller.make(Change::Reload, None, ORIGIN, Some(&app)).await.unwrap();
    assert_eq!(app.client_names(), ["app", "web"]);
    app.drain(Duration::ZERO).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_whose_caller_has_stopped_waiting_is_not_made() {
    let machine = Machine::new();
    let (app, mut controller, records) = start_server(&machine).await;
    let (respond, response) = tokio::sync::oneshot::channel();
    drop(response);
    let change = rotate_app(Duration::ZERO, None);
    let request = ControlRequest { change, expected_generation: None, origin: ORIGIN, respond };
    controller.answer_request(request, &app).await;
    assert_eq!((records.try_iter().count(), machine.config().generation), (0, 0));
    app.drain(Duration::ZERO).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_with_another_database_keeps_the_keys_and_clients_of_the_running_program() {
    let machine = Machine::new();
    let (app, mut controller, _records) = start_server(&machine).await;
    controller.make(Change::AddKey(new_key()), None, ORIGIN, Some(&app)).await.unwrap();
    let add = |name: &str| Change::AddClient {
        name: name.to_owned(),
        rules: quota_rules("9 requests"),
        expires_at: None,
    };
    controller.make(add("web"), None, ORIGIN, Some(&app)).await.unwrap();
    // The running server keeps its database until a restart, and the overlay is in the directory of the database.
    let moved_path = machine.directory.path().join("moved/keychoir.db");
    let config_text = fs::read_to_string(machine.config_file()).unwrap();
    let previous_path = machine.state_directory().join("keychoir.db").display().to_string();
    fs::write(machine.config_file(), config_text.replace(&previous_path, &moved_path.display().to_string()))
        .unwrap();
    controller.make(Change::Reload, None, ORIGIN, Some(&app)).await.unwrap();
    assert_eq!((app.keys().len(), app.client_names()), (2, vec!["app".to_owned(), "web".to_owned()]));
    controller.make(add("phone"), None, ORIGIN, Some(&app)).await.unwrap();
    assert_eq!(app.client_names().len(), 3);
    assert!(fs::read_to_string(machine.state_directory().join("managed.toml")).unwrap().contains("phone"));
    assert!(!moved_path.parent().unwrap().exists(), "nothing must be written beside the next database");
    app.drain(Duration::ZERO).await;
}

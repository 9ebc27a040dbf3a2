//! Tests of the precedence of flags, variables, file and defaults, of the default configuration, and of the rules about
//! several settings. Also tests that `load` looks for the configuration file on this machine.

use std::path::Path;

use super::{FakeMachine, KEY};
use crate::config::{Config, Overrides, setting};

#[test]
fn every_setting_except_the_keys_has_a_default() {
    let loaded_config = FakeMachine::with_key().resolve().unwrap();
    let mut config = loaded_config.config;
    assert_eq!(config.storage.file(), Some(Path::new("/home/me/.local/state/keychoir/keychoir.db")));
    config.storage.path = Config::default().storage.path;
    for setting in setting::SETTINGS {
        assert_eq!(setting.format_value(&mut config), setting.format_value(&mut Config::default()));
    }
    assert_eq!(config.key_source.to_string(), "ELEVENLABS_API_KEYS");
    assert_eq!((config.keys.len(), loaded_config.warnings.len(), loaded_config.file), (1, 0, None));
}

#[test]
fn flags_override_variables_and_variables_override_the_file() {
    let file = FakeMachine::with_key().toml("server.listen = \"127.0.0.1:1\"");
    assert_eq!(file.config().server.listen.to_string(), "\"127.0.0.1:1\"");
    let variable = file.variable("KEYCHOIR_SERVER__LISTEN", " 127.0.0.1:2 ");
    assert_eq!(variable.config().server.listen.to_string(), "\"127.0.0.1:2\"");
    let flag = FakeMachine { listen: Some("127.0.0.1:3"), ..variable };
    assert_eq!(flag.config().server.listen.to_string(), "\"127.0.0.1:3\"");
}

#[test]
fn a_blank_variable_is_not_set() {
    let machine =
        FakeMachine::with_key().variable("KEYCHOIR_SERVER__LISTEN", "  ").variable("KEYCHOIR_CONFIG", "");
    assert_eq!(machine.config().server.listen.to_string(), "\"127.0.0.1:11011\"");
    let machine = FakeMachine::with_key().variable("KEYCHOIR_NO_SUCH", "");
    assert_eq!(machine.config().keys.len(), 1);
}

#[test]
fn an_overridden_layer_is_validated() {
    let machine = FakeMachine {
        listen: Some("127.0.0.1:3"),
        ..FakeMachine::with_key().variable("KEYCHOIR_SERVER__LISTEN", "x")
    };
    machine.check_problems(
        "KEYCHOIR_SERVER__LISTEN: `x` has no port\n    = write HOST:PORT, for example 127.0.0.1:11011",
    );
}

#[test]
fn sockets_from_systemd_are_used_unless_an_address_is_configured() {
    let passed = FakeMachine { has_passed_sockets: true, ..FakeMachine::with_key() };
    assert_eq!(passed.config().server.listen.to_string(), "\"systemd\"");
    let configured = passed.variable("KEYCHOIR_SERVER__LISTEN", "127.0.0.1:1,systemd");
    assert_eq!(configured.config().server.listen.to_string(), "[\"127.0.0.1:1\", \"systemd\"]");
}

#[test]
fn paths_in_the_file_are_relative_to_its_directory() {
    let machine = FakeMachine::with_key().toml("storage.path = \"usage/k.db\"");
    assert_eq!(machine.config().storage.path, Path::new("/etc/usage/k.db"));
    let machine = machine.variable("KEYCHOIR_STORAGE__PATH", "k.db");
    assert_eq!(machine.config().storage.path, Path::new("k.db"));
}

#[test]
fn without_a_home_directory_the_usage_database_needs_a_path() {
    let without_home =
        FakeMachine { variables: vec![("ELEVENLABS_API_KEYS", KEY)], ..FakeMachine::default() };
    without_home.check_problems(
        "
configuration: the usage database has no default directory, because HOME is not set
    = set KEYCHOIR_STORAGE__PATH to a file
    = or KEYCHOIR_STORAGE__EPHEMERAL=true (or `serve --ephemeral`) to keep usage records in memory only
",
    );
    assert_eq!(
        without_home.clone().variable("KEYCHOIR_STORAGE__EPHEMERAL", "true").config().storage.file(),
        None
    );
    let flag = FakeMachine {
        is_ephemeral: true,
        ..without_home.clone().variable("KEYCHOIR_STORAGE__EPHEMERAL", "false")
    };
    assert_eq!(flag.config().storage.file(), None);
    assert_eq!(
        without_home.variable("KEYCHOIR_STORAGE__PATH", "/k.db").config().storage.path,
        Path::new("/k.db")
    );
}

#[test]
fn an_upstream_that_is_keychoir_itself_is_refused() {
    let expected = "
KEYCHOIR_UPSTREAM__BASE_URL: 127.0.0.1:11011 is an address on which Keychoir itself listens, so it would send requests to itself
    = set the base URL to that of ElevenLabs, of a gateway in front of it, or of a simulator
    = or listen on another address (`server.listen`)";
    let own = FakeMachine::with_key().variable("KEYCHOIR_UPSTREAM__BASE_URL", "http://localhost:11011");
    own.check_problems(expected);
    FakeMachine { listen: Some("127.0.0.1:11012"), ..own }.config();
    let entry =
        "[[keys]]\nkey = \"sk_another_key_of_the_test_00000001\"\nbase_url = \"http://127.0.0.1:11011\"";
    let problems = FakeMachine::without_key().toml(entry).resolve().unwrap_err().to_string();
    assert!(
        problems.contains("is an address on which Keychoir itself listens"),
        "the base URL of a key must be checked as well: {problems}"
    );
}

#[test]
fn the_buffer_of_one_request_must_fit_into_the_total_buffer() {
    let machine = FakeMachine::with_key().variable("KEYCHOIR_RETRY__MAX_TOTAL_BUFFER_SIZE", "16MiB");
    assert_eq!(machine.config().retry.max_total_buffer_size, 16_777_216);
    FakeMachine::with_key().variable("KEYCHOIR_RETRY__MAX_TOTAL_BUFFER_SIZE", "16777215B").check_problems(
        "
KEYCHOIR_RETRY__MAX_TOTAL_BUFFER_SIZE: one request may buffer 16MiB (`retry.buffer_size`), but all requests together only 16777215B
    = raise `retry.max_total_buffer_size`
",
    );
}

#[test]
fn a_key_sent_in_clear_text_causes_a_warning() {
    FakeMachine::with_key().variable("KEYCHOIR_UPSTREAM__BASE_URL", "http://127.0.0.1:9").check_warnings(&[]);
    FakeMachine::with_key().variable("KEYCHOIR_UPSTREAM__BASE_URL", "http://example.com").check_warnings(&[
        "KEYCHOIR_UPSTREAM__BASE_URL: the keys are sent over the network in clear text: use https:// if the host supports it",
    ]);
}

#[test]
fn a_configuration_of_defaults_leaves_no_files_behind() {
    let key = crate::secret::ApiKey::new(KEY).unwrap();
    let config = Config::with_defaults(vec![key], "http://127.0.0.1:9".parse().unwrap());
    assert_eq!((config.keys.len(), config.storage.file(), config.upstream.base_url.port()), (1, None, 9));
    assert!(!format!("{config:?}").contains(KEY));
}

#[test]
fn loading_reports_a_configuration_file_that_does_not_exist() {
    let overrides = Overrides { config_file: Some("/nowhere/at/all.toml".into()), ..Overrides::default() };
    assert!(crate::config::load(&overrides).unwrap_err().to_string().contains("it does not exist"));
}

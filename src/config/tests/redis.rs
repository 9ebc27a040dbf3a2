//! Tests of the URL of Redis in settings, files, variables and the credentials of systemd: its sources, its errors, its
//! masked credentials, and the restart that a change needs.

use super::FakeMachine;
use crate::config::Config;

/// Returns the configured URL without its credentials.
fn url(machine: &FakeMachine<'_>) -> String {
    machine.config().redis.url.to_string()
}

#[test]
fn the_url_comes_from_a_setting_a_file_or_a_credential() {
    let from_setting = FakeMachine::with_key().toml("[redis]\nurl = \"redis://:pw@a\"\n");
    assert_eq!(url(&from_setting), "redis://...@a:6379");
    let from_file =
        FakeMachine::with_key().toml("[redis]\nurl_file = \"r\"\n").file("/etc/r", "redis://:pw@b\n");
    assert_eq!(url(&from_file), "redis://...@b:6379");
    let from_variable = from_setting.clone().variable("KEYCHOIR_REDIS__URL", "redis://c");
    assert_eq!(url(&from_variable), "redis://c:6379");
    let from_credential = FakeMachine::with_key()
        .variable("CREDENTIALS_DIRECTORY", "/run/c")
        .file("/run/c/redis_url", "rediss://d:pw@d\n");
    assert_eq!(url(&from_credential), "rediss://...@d:6379");
    let source = from_credential.config().setting_sources.get("redis.url").cloned();
    assert_eq!(source.as_deref(), Some("/run/c/redis_url"));
    let overridden = from_credential.variable("KEYCHOIR_REDIS__URL", "redis://c");
    assert_eq!(url(&overridden), "redis://c:6379", "a setting must have precedence over the credential");
    assert_eq!(url(&FakeMachine::with_key().variable("CREDENTIALS_DIRECTORY", "/run/c")), "");
}

#[test]
fn two_urls_and_invalid_files_are_errors() {
    let two = "[redis]\nurl = \"redis://a\"\nurl_file = \"r\"\n";
    FakeMachine::with_key().file("/etc/r", "redis://b").toml(two).check_problems(
        "
/etc/k.toml:3:12: both `redis.url` and `redis.url_file` are set
  3 | url_file = ***
    |            ^^^
    = remove one of them",
    );
    FakeMachine::with_key().toml("[redis]\nurl_file = \"none\"\n").check_problems(
        "
/etc/k.toml:2:12: the file cannot be read: it does not exist
  2 | url_file = ***
    |            ^^^",
    );
    let empty = FakeMachine::with_key().toml("[redis]\nurl_file = \"r\"\n").file("/etc/r", " \n");
    assert!(empty.resolve().unwrap_err().to_string().contains("contains no URL of Redis"));
    let credential = FakeMachine::with_key()
        .variable("CREDENTIALS_DIRECTORY", "/run/c")
        .file("/run/c/redis_url", "http://hunter2");
    let problems = credential.resolve().unwrap_err().to_string();
    assert!(
        problems.contains("/run/c/redis_url") && !problems.contains("hunter2"),
        "the credential must be reported without its content: {problems}"
    );
}

#[test]
fn a_configuration_file_with_the_password_of_redis_contains_secrets() {
    let contains_secrets = |machine: FakeMachine<'_>| machine.resolve().unwrap().file_contains_secrets;
    assert!(contains_secrets(FakeMachine::with_key().toml("[redis]\nurl = \"redis://:pw@a\"\n")));
    assert!(!contains_secrets(FakeMachine::with_key().toml("[redis]\nurl = \"redis://a\"\n")));
    let in_file = FakeMachine::with_key().toml("[redis]\nurl_file = \"r\"\n").file("/etc/r", "redis://:pw@b");
    assert!(!contains_secrets(in_file));
}

#[test]
fn no_output_contains_the_credentials_of_redis() {
    for url in [
        "redis://USER:PASS@h",
        "redis://USER:PASS@",
        "redis://USER:PA/SS@h",
        "redis://USER:PASS",
        "USER:PASS@h:1",
        "http://USER:PASS@h",
        "redis://h/USER:PASS",
        "redis+sentinel://USER:PASS@h/m",
        "redis+sentinel://USER:PASS@h",
        "redis+sentinel://h/USER:PASS",
        "unix:/r?user=USER&pass=PASS",
        "unix:/r?USER=PASS",
        "unix:USER:PASS@/r",
    ] {
        let url = url.replace("USER", "alice").replace("PA", "hunt").replace("SS", "er2");
        let quoted_setting = format!("[redis]\nurl = \"{url}\"\n");
        let unquoted_setting = format!("[redis]\nurl = {url}\n");
        let wrong_setting = format!("[redis]\npool = \"{url}\"\nurl_file = \"/f\"\n");
        for machine in [
            FakeMachine::with_key().toml(&quoted_setting),
            FakeMachine::with_key().toml(&unquoted_setting),
            FakeMachine::with_key().toml(&wrong_setting).file("/f", &url),
            FakeMachine::with_key().variable("KEYCHOIR_REDIS__URL", &url),
        ] {
            let mut printed_text = super::canaries::all_output(&machine);
            if let Ok(loaded) = machine.resolve() {
                printed_text.push_str(&format!("{:?}", loaded.config.setting_values()));
            }
            let is_clean = ["alice", "hunt", "er2"].iter().all(|secret| !printed_text.contains(secret));
            assert!(is_clean, "no output must contain the credentials of {url}:\n{printed_text}");
        }
    }
}

#[test]
fn a_value_with_a_password_is_marked_as_masked() {
    for (url, is_masked) in [
        ("redis://:pw@a", true),
        ("unix:/r?pass=pw", true),
        ("redis+sentinel://:pw@a/m", true),
        ("redis://a", false),
        ("unix:/r", false),
    ] {
        let settings = FakeMachine::with_key().variable("KEYCHOIR_REDIS__URL", url).config().setting_values();
        let setting = settings.iter().find(|setting| setting.name == "redis.url").unwrap();
        assert_eq!(setting.is_masked, is_masked, "only a value with a password must be masked: {url}");
    }
}

#[test]
fn every_change_of_redis_needs_a_restart() {
    let config =
        |url: &str| -> Config { FakeMachine::with_key().variable("KEYCHOIR_REDIS__URL", url).config() };
    let (running, mut next) = (config("redis://:pw@a"), config("redis://:new@a"));
    next.redis.pool = "other".parse().unwrap();
    assert_eq!(running.settings_needing_restart(&next), ["redis.url", "redis.pool"]);
    let in_force = next.with_restart_settings_of(&running);
    assert_eq!(in_force.redis, running.redis, "a reload must not apply a part of the settings of Redis");
}

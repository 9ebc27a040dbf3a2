//! Tests of the pool's keys: their sources, the fields of their entries, the warnings about unusual keys, and the
//! errors about invalid or missing keys.

use super::{FakeMachine, KEY};
use crate::config::{KeyListSource, KeyRequirement};

#[test]
fn keys_come_from_the_first_source_that_has_them() {
    let file = FakeMachine::without_key()
        .simulated()
        .toml("[[keys]]\nkey = \"sk_d\"\n")
        .file("/list", "sk_b")
        .file("/c/elevenlabs_api_keys", "sk_c\n");
    let credential = file.clone().variable("CREDENTIALS_DIRECTORY", "/c");
    let list = credential.clone().variable("ELEVENLABS_API_KEYS_FILE", "/list");
    let variable = list.clone().variable("ELEVENLABS_API_KEYS", "sk_a");
    for (machine, key, source) in [
        (&file, "sk_d", "/etc/k.toml"),
        (&credential, "sk_c", "/c/elevenlabs_api_keys"),
        (&list, "sk_b", "/list"),
        (&variable, "sk_a", "ELEVENLABS_API_KEYS"),
    ] {
        let config = machine.config();
        assert_eq!(config.keys.iter().map(|config| config.key.expose()).collect::<Vec<_>>(), [key]);
        assert_eq!(config.key_source.to_string(), source);
    }
    file.check_warnings(&[]);
    variable.check_warnings(&[
        "ELEVENLABS_API_KEYS_FILE: these keys are not used, because ELEVENLABS_API_KEYS has keys too",
        "/c/elevenlabs_api_keys: these keys are not used, because ELEVENLABS_API_KEYS has keys too",
        "/etc/k.toml:1:1: these keys are not used, because ELEVENLABS_API_KEYS has keys too",
    ]);
}

#[test]
fn a_service_may_have_other_credentials() {
    let machine = FakeMachine::with_key().variable("CREDENTIALS_DIRECTORY", "/c");
    assert_eq!(machine.config().key_source, KeyListSource::Variable);
    machine.check_warnings(&[]);
}

#[test]
fn a_correction_of_a_list_is_reported_by_position() {
    let keys = format!("\"{KEY}, {KEY},,\"");
    FakeMachine::without_key().variable("ELEVENLABS_API_KEYS", &keys).check_warnings(&[
        "ELEVENLABS_API_KEYS: entry 2 is the same key as entry 1 (sk_01234567...bcdef)",
        "ELEVENLABS_API_KEYS: entry 3 is empty",
        "ELEVENLABS_API_KEYS: ends with a comma",
        "ELEVENLABS_API_KEYS: has quotes around keys",
    ]);
}

#[test]
fn entries_configure_keys_with_names_and_workspaces() {
    let machine = FakeMachine::without_key().simulated().file("/etc/secret", "sk_b\n").file("/abs", "'sk_c'").toml(
        "[[keys]]\nkey = \"sk_a\"\nname = \"one\"\nworkspace = \"w\"\n[[keys]]\nkey_file = \"secret\"\n[[keys]]\nkey_file = \"/abs\"\n[[keys]]\nkey = 'sk_a'",
    );
    let config = machine.config();
    assert_eq!(config.keys.iter().map(|key| key.key.expose()).collect::<Vec<_>>(), ["sk_a", "sk_b", "sk_c"]);
    assert_eq!(config.keys[0].name.as_deref(), Some("one"));
    assert_eq!(config.keys[0].workspace.as_deref(), Some("w"));
    machine.check_warnings(&[
        "/etc/k.toml:8:12: has quotes around keys",
        "/etc/k.toml:10:7: key 4 is the same as key 1 (...)",
    ]);
}

#[test]
fn a_short_key_is_refused_only_for_elevenlabs() {
    let problem = "
ELEVENLABS_API_KEYS: entry 2 (sk_***, 8 characters) is too short for a key of ElevenLabs
    = write only keys, separated by commas: ELEVENLABS_API_KEYS=sk_first,sk_second
";
    let keys = format!("{KEY},sk_short");
    let machine = FakeMachine::without_key().variable("ELEVENLABS_API_KEYS", &keys);
    machine.check_problems(problem);
    machine
        .clone()
        .variable("KEYCHOIR_UPSTREAM__BASE_URL", "https://api.eu.residency.elevenlabs.io")
        .check_problems(problem);
    machine.simulated().check_warnings(&[]);
    // A key with its own host is checked for that host.
    let entry_with = |base_url: &str| format!("[[keys]]\nkey = \"sk_short\"\nbase_url = \"{base_url}\"\n");
    assert!(FakeMachine::without_key().toml(&entry_with("http://127.0.0.1:1")).resolve().is_ok());
    assert!(
        FakeMachine::without_key()
            .simulated()
            .toml(&entry_with("https://api.us.elevenlabs.io"))
            .resolve()
            .is_err()
    );
}

#[test]
fn a_comment_after_a_key_is_refused_with_advice() {
    let list = format!("# ours\n{KEY} # main\n");
    FakeMachine::without_key()
        .file("/list", &list)
        .variable("ELEVENLABS_API_KEYS_FILE", "/list")
        .check_problems(
            "
/list: entry 1 (sk_01234567... main) contains a comment
    = write comments only in a file, on separate lines that begin with `#`
    = write only keys, one per line
",
        );
}

#[test]
fn a_key_of_an_unknown_format_causes_a_warning() {
    let keys = format!("{KEY},{}", &KEY[..40]);
    FakeMachine::without_key().variable("ELEVENLABS_API_KEYS", &keys).check_warnings(&[
        "ELEVENLABS_API_KEYS: entry 2 (sk_0...1234) has an unknown format (known keys of ElevenLabs have `sk_` \
         and 48 hexadecimal digits, or 32 hexadecimal digits): it may be truncated or mistyped",
    ]);
}

#[test]
fn key_files_are_not_read_if_the_environment_has_keys() {
    let machine = FakeMachine::with_key().toml("[[keys]]\nkey_file = \"none\"\nname = \"a\"\n");
    assert_eq!(machine.config().keys.len(), 1);
}

#[test]
fn invalid_entries_are_reported_without_their_values() {
    FakeMachine::without_key()
        .file("/etc/two", "sk_a\nsk_b\n")
        .toml(
            "[[keys]]\nname = \"a\"\n[[keys]]\nkey = \"sk_a\"\nkey_file = \"x\"\nname = \"a\"\n[[keys]]\nkey_file = \"none\"\nnmae = \"b\"\n[[keys]]\nkey_file = \"two\"\n[[keys]]\nkey = 3\n[[keys]]\nkey = \"\"\n",
        )
        .check_problems(
            "
/etc/k.toml:1:1: this entry has no `key` or `key_file`
  1 | [[keys]]
    | ^^^^^^^^
/etc/k.toml:3:1: this entry has both `key` and `key_file`
  3 | [[keys]]
    | ^^^^^^^^
    = write only one of `key` or `key_file`
/etc/k.toml:6:8: key 2 has the same name as key 1
  6 | name = ***
    |        ^^^
    = give each key its own name
/etc/k.toml:8:12: the file cannot be read: it does not exist
  8 | key_file = ***
    |            ^^^
    = a relative path starts at the directory of the configuration file
/etc/k.toml:9:1: unknown field `nmae`
  9 | nmae = ***
    | ^^^^
    = did you mean `name`?
/etc/k.toml:11:12: this is more than one key
  11 | key_file = ***
     |            ^^^
     = write one [[keys]] entry for each key
     = or set ELEVENLABS_API_KEYS_FILE to a file with all keys
/etc/k.toml:13:7: this is a number, but should be a string
  13 | key = ***
     |       ^
     = write it in quotes
/etc/k.toml:15:7: contains no key
  15 | key = ***
     |       ^^
",
        );
}

#[test]
fn the_error_without_keys_names_the_sources_and_the_demo() {
    FakeMachine::without_key().check_problems(
        "
configuration: no ElevenLabs API keys are configured
    = set ELEVENLABS_API_KEYS=sk_first,sk_second
    = or put them in a file, one per line, and set ELEVENLABS_API_KEYS_FILE to its path
    = or write a [[keys]] entry with `key` or `key_file` for each key in the configuration file
    = to try Keychoir without a key, run: keychoir demo
",
    );
    let problems =
        FakeMachine::without_key().variable("ELEVENLABS_API_KEY", KEY).resolve().unwrap_err().to_string();
    assert!(
        problems.contains("did you mean `ELEVENLABS_API_KEYS`?"),
        "the variable of Keychoir must be suggested: {problems}"
    );
    let config =
        FakeMachine { key_requirement: KeyRequirement::Optional, ..FakeMachine::without_key() }.config();
    assert_eq!((config.keys.len(), config.key_source), (0, KeyListSource::Absent));
}

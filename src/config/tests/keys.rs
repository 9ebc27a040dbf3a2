//! Tests of the pool's keys: their sources, and invalid keys.

use super::{FakeMachine, KEY};
use crate::config::{KeyListSource, Need};

#[test]
fn keys_come_from_the_first_source_that_has_them() {
    let file = FakeMachine::keyless()
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
    let machine = FakeMachine::fresh().variable("CREDENTIALS_DIRECTORY", "/c");
    assert_eq!(machine.config().key_source, KeyListSource::Variable);
    machine.check_warnings(&[]);
}

#[test]
fn a_correction_of_a_list_is_reported_by_position() {
    let keys = format!("\"{KEY}, {KEY},,\"");
    FakeMachine::keyless().variable("ELEVENLABS_API_KEYS", &keys).check_warnings(&[
        "ELEVENLABS_API_KEYS: entry 2 is the same key as entry 1 (sk_01234567...bcdef)",
        "ELEVENLABS_API_KEYS: entry 3 is empty",
        "ELEVENLABS_API_KEYS: ends with a comma",
        "ELEVENLABS_API_KEYS: has quotes around keys",
    ]);
}

#[test]
fn entries_give_keys_with_names_and_workspaces() {
    let machine = FakeMachine::keyless().simulated().file("/etc/secret", "sk_b\n").file("/abs", "'sk_c'").toml(
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
fn a_text_that_is_no_key_is_refused_for_elevenlabs_only() {
    let short = "
ELEVENLABS_API_KEYS: entry 2 (sk_***, 8 characters) is too short for a key of ElevenLabs
    = write the keys alone, separated by commas: ELEVENLABS_API_KEYS=sk_first,sk_second
";
    let keys = format!("{KEY},sk_short");
    let machine = FakeMachine::keyless().variable("ELEVENLABS_API_KEYS", &keys);
    machine.check_problems(short);
    machine
        .clone()
        .variable("KEYCHOIR_UPSTREAM__BASE_URL", "https://api.eu.residency.elevenlabs.io")
        .check_problems(short);
    machine.simulated().check_warnings(&[]);
    // A key with its own host is checked for that host.
    let at = |base_url: &str| format!("[[keys]]\nkey = \"sk_short\"\nbase_url = \"{base_url}\"\n");
    assert!(FakeMachine::keyless().toml(&at("http://127.0.0.1:1")).resolve().is_ok());
    assert!(FakeMachine::keyless().simulated().toml(&at("https://api.us.elevenlabs.io")).resolve().is_err());
}

#[test]
fn a_comment_after_a_key_is_refused_with_advice() {
    let list = format!("# ours\n{KEY} # main\n");
    FakeMachine::keyless().file("/list", &list).variable("ELEVENLABS_API_KEYS_FILE", "/list").check_problems(
        "
/list: entry 1 (sk_01234567... main) has a comment in it
    = write comments only into a file, on lines of their own that begin with `#`
    = write the keys alone, one a line
",
    );
}

#[test]
fn a_key_of_an_unknown_format_causes_a_warning() {
    let keys = format!("{KEY},{}", &KEY[..40]);
    FakeMachine::keyless().variable("ELEVENLABS_API_KEYS", &keys).check_warnings(&[
        "ELEVENLABS_API_KEYS: entry 2 (sk_0...1234) has another shape than the keys of ElevenLabs that are known (`sk_` \
         and 48 hexadecimal digits, or 32 of them): it may be cut off or mistyped",
    ]);
}

#[test]
fn key_files_are_not_read_when_the_environment_gives_the_keys() {
    let machine = FakeMachine::fresh().toml("[[keys]]\nkey_file = \"none\"\nname = \"a\"\n");
    assert_eq!(machine.config().keys.len(), 1);
}

#[test]
fn mistakes_in_entries_are_reported_without_their_values() {
    FakeMachine::keyless()
        .file("/etc/two", "sk_a\nsk_b\n")
        .toml(
            "[[keys]]\nname = \"a\"\n[[keys]]\nkey = \"sk_a\"\nkey_file = \"x\"\nname = \"a\"\n[[keys]]\nkey_file = \"none\"\nnmae = \"b\"\n[[keys]]\nkey_file = \"two\"\n[[keys]]\nkey = 3\n[[keys]]\nkey = \"\"\n",
        )
        .check_problems(
            "
/etc/k.toml:1:1: this entry has no `key` or `key_file`
  1 | [[keys]]
    | ^^^^^^^^
/etc/k.toml:3:1: this entry has `key` and `key_file`
  3 | [[keys]]
    | ^^^^^^^^
    = give one of `key` or `key_file`
/etc/k.toml:6:8: key 2 has the same name as key 1
  6 | name = ***
    |        ^^^
    = give each key its own name
/etc/k.toml:8:12: the file cannot be read: there is no such file
  8 | key_file = ***
    |            ^^^
    = a relative path starts at the folder of the configuration file
/etc/k.toml:9:1: unknown key `nmae`
  9 | nmae = ***
    | ^^^^
    = did you mean `name`?
/etc/k.toml:11:12: there is more than one key here
  11 | key_file = ***
     |            ^^^
     = write one [[keys]] entry for each
     = or give all of them with ELEVENLABS_API_KEYS_FILE
/etc/k.toml:13:7: this is a number and should be a text
  13 | key = ***
     |       ^
     = write it in quotes
/etc/k.toml:15:7: there is no key in it
  15 | key = ***
     |       ^^
",
        );
}

#[test]
fn the_error_without_keys_names_three_sources_and_the_demo() {
    FakeMachine::keyless().check_problems(
        "
configuration: there are no ElevenLabs API keys
    = set ELEVENLABS_API_KEYS=sk_first,sk_second
    = or put them in a file, one a line, and set ELEVENLABS_API_KEYS_FILE to its path
    = or write a [[keys]] entry with `key` or `key_file` for each in the configuration file
    = to see it work without a key: keychoir demo
",
    );
    let problems =
        FakeMachine::keyless().variable("ELEVENLABS_API_KEY", KEY).resolve().unwrap_err().to_string();
    assert!(problems.contains("did you mean `ELEVENLABS_API_KEYS`?"), "{problems}");
    let config = FakeMachine { keys: Need::Optional, ..FakeMachine::keyless() }.config();
    assert_eq!((config.keys.len(), config.key_source), (0, KeyListSource::Absent));
}

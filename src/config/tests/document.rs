//! Tests of the configuration file: its path, syntax, structure and unknown names, and the report of all its mistakes.

use std::path::{Path, PathBuf};

use super::FakeMachine;

#[test]
fn the_flag_takes_precedence_over_the_variable_that_names_the_file() {
    let machine = FakeMachine::with_key().variable("KEYCHOIR_CONFIG", "/none").toml("");
    assert_eq!(machine.resolve().unwrap().file, Some(PathBuf::from("/etc/k.toml")));
    let machine = FakeMachine::with_key()
        .variable("KEYCHOIR_CONFIG", "~/k.toml")
        .file("/home/me/k.toml", "log.format = 'json'");
    assert_eq!(machine.config().log.format.to_string(), "json");
}

#[test]
fn a_configuration_file_is_found_at_its_default_path() {
    const USER_FILE: &str = "/home/me/.config/keychoir/keychoir.toml";
    const MACHINE_FILE: &str = "/etc/keychoir/keychoir.toml";
    let listen = |port: u16| format!("[server]\nlisten = \"127.0.0.1:{port}\"\n");
    let (user_text, machine_text, other_text) = (listen(1), listen(2), listen(3));
    let without_file = FakeMachine::with_key();
    let machine_file = without_file.clone().file(MACHINE_FILE, &machine_text);
    let two_files = machine_file.clone().file(USER_FILE, &user_text);
    let xdg =
        two_files.clone().variable("XDG_CONFIG_HOME", "/x").file("/x/keychoir/keychoir.toml", &other_text);
    let named_file =
        two_files.clone().variable("KEYCHOIR_CONFIG", "/named.toml").file("/named.toml", &other_text);
    for (machine, port, file) in [
        (&without_file, 11011, None),
        (&machine_file, 2, Some(MACHINE_FILE)),
        (&two_files, 1, Some(USER_FILE)),
        (&xdg, 3, Some("/x/keychoir/keychoir.toml")),
        (&named_file, 3, Some("/named.toml")),
    ] {
        let loaded_config = machine.resolve().unwrap();
        assert_eq!(loaded_config.config.server.listen.to_string(), format!("\"127.0.0.1:{port}\""));
        assert_eq!(loaded_config.file.as_deref(), file.map(Path::new));
    }
    machine_file.file(USER_FILE, "[serverr]\n").check_problems(&format!(
        "
{USER_FILE}:1:2: unknown section `serverr`
  1 | [serverr]
    |  ^^^^^^^
    = did you mean `server`?
"
    ));
}

#[test]
fn the_error_for_an_unreadable_configuration_file_names_the_source_of_its_path() {
    FakeMachine { config: Some("/none"), ..FakeMachine::with_key() }
        .check_problems("--config: `/none` cannot be read: it does not exist");
    FakeMachine::with_key()
        .variable("KEYCHOIR_CONFIG", "/directory")
        .check_problems("KEYCHOIR_CONFIG: `/directory` cannot be read: it is a directory");
    FakeMachine { config: Some("/latin1.toml"), ..FakeMachine::with_key() }
        .check_problems("/latin1.toml:3:7: the file is not UTF-8 text from here on\n    = save it as UTF-8");
}

#[test]
fn one_load_reports_all_mistakes() {
    let machine = FakeMachine { listen: Some("8080"), ..FakeMachine::with_key() }
        .variable("KEYCHOIR_SERVER__LISTEN", "127.0.0.1")
        .variable("KEYCHOIR_LOG__FROMAT", "json")
        .toml("\n\n[pool]\nstrateggy = \"fill-first\"\nnear_limit_ratio = 80\n\n[sever]\nlisten = \"x\"\n");
    machine.check_problems(
        r#"
--listen: `8080` has no port
    = write HOST:PORT, for example 127.0.0.1:11011
    = did you mean `127.0.0.1:8080`?
/etc/k.toml:4:1: unknown setting `strateggy` in [pool]
  4 | strateggy = "fill-first"
    | ^^^^^^^^^
    = did you mean `strategy`?
/etc/k.toml:5:20: the ratio is above 1
  5 | near_limit_ratio = 80
    |                    ^^
    = write a number above 0 and up to 1, for example 0.8 for 80 %
    = did you mean `0.8`?
/etc/k.toml:7:2: unknown section `sever`
  7 | [sever]
    |  ^^^^^
    = did you mean `server`?
KEYCHOIR_LOG__FROMAT: unknown setting
    = did you mean `KEYCHOIR_LOG__FORMAT`?
KEYCHOIR_SERVER__LISTEN: `127.0.0.1` has no port
    = write HOST:PORT, for example 127.0.0.1:11011
"#,
    );
    assert!(machine.resolve().unwrap_err().to_string().ends_with("\n6 problems in the configuration"));
}

#[test]
fn the_error_for_a_setting_in_the_wrong_section_names_its_section() {
    FakeMachine::with_key()
        .toml("listen = \"127.0.0.1:1\"\n[server]\nstrategy = \"fill-first\"\nlevell = 'info'")
        .check_problems(
            r#"
/etc/k.toml:1:1: unknown setting `listen`
  1 | listen = ***
    | ^^^^^^
    = `listen` belongs in [server]
/etc/k.toml:3:1: unknown setting `strategy` in [server]
  3 | strategy = "fill-first"
    | ^^^^^^^^
    = `strategy` belongs in [pool]
/etc/k.toml:4:1: unknown setting `levell` in [server]
  4 | levell = 'info'
    | ^^^^^^
    = did you mean `log.level`?
"#,
        );
}

#[test]
fn a_syntax_error_is_reported_once_and_hides_no_other_mistake() {
    FakeMachine::with_key()
        .toml("[server]\nlisten = 127.0.0.1:1\nlisten = \"a:b\"\n[log]\nformat = \"x\"\nlevel = \"info\n")
        .check_problems(
            r#"
/etc/k.toml:2:15: invalid float
  2 | listen = 127.0.0.1:1
    |               ^^^^^^
    = write a string in quotes, and a number in digits only
/etc/k.toml:3:1: `listen` is set twice
  3 | listen = "a:b"
    | ^^^^^^
    = remove one of the lines
/etc/k.toml:5:10: unknown log format `x`
  5 | format = "x"
    |          ^^^
    = use one of `auto`, `terminal`, `ascii`, `json`
/etc/k.toml:6:14: invalid basic string
  6 | level = "info
    |              ^
    = expected `"`
"#,
        );
}

#[test]
fn no_setting_is_reported_as_missing_after_a_syntax_error() {
    FakeMachine::without_key().toml("[[keys]\nkey = \"x\"\n").check_problems(
        "
/etc/k.toml:1:8: unclosed array table
  1 | [[keys]
    |        ^
    = expected `]`
",
    );
}

#[test]
fn the_structure_of_entries_is_checked() {
    FakeMachine::with_key()
        .toml("keys = \"a\"\nserver = 3\nclients = [ 3 ]\n[log]\nlevel = 1979-05-27\n")
        .check_problems(
            r#"
/etc/k.toml:1:8: `keys` must be a list of tables
  1 | keys = ***
    |        ^^^
    = for each entry, write [[keys]] with double brackets, and `key = …` below it
/etc/k.toml:2:10: this is a number, but should be a table
  2 | server = 3
    |          ^
/etc/k.toml:3:13: `clients` must be a list of tables
  3 | clients = ***
    |             ^
    = for each entry, write [[clients]] with double brackets, and `token_sha256 = …` below it
/etc/k.toml:5:9: this is a date or time, but should be a string
  5 | level = 1979-05-27
    |         ^^^^^^^^^^
    = write it in quotes
"#,
        );
}

//! The layers together, the reference file, and the canaries.

use std::collections::HashMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::source::{Environment, Sources, Unreadable};
use super::value::{Folders, Raw};
use super::{Config, KeySource, Loaded, Need, Overrides, Problems, TlsChoice, resolve, setting};
use crate::certificate::Place;
use crate::policy::units::UnixMs;
use crate::secret::ServiceKeyForm;

const KEY: &str = "sk_0123456789abcdef0123456789abcdef0123456789abcdef";
const OTHER_KEY: &str = "sk_fedcba9876543210fedcba9876543210fedcba9876543210";
const TOKEN: &str = "canary-token-of-a-client";

const NOW: UnixMs = UnixMs(1_800_000_000_000);

/// A machine: variables, files, flags.
#[derive(Clone, Default)]
struct Given<'a> {
    variables: Vec<(&'a str, &'a str)>,
    files: Vec<(&'a str, &'a str)>,
    listen: Option<&'a str>,
    config: Option<&'a str>,
    is_ephemeral: bool,
    has_passed_sockets: bool,
    keys: Need,
}

impl<'a> Given<'a> {
    /// Only a home folder and one key.
    fn fresh() -> Self {
        Self { variables: vec![("HOME", "/home/me"), ("ELEVENLABS_API_KEYS", KEY)], ..Self::default() }
    }

    /// Only a home folder.
    fn keyless() -> Self {
        Self { variables: vec![("HOME", "/home/me")], ..Self::default() }
    }

    /// The upstream is not ElevenLabs, so a key may have any shape.
    fn simulated(self) -> Self {
        self.variable("KEYCHOIR_UPSTREAM__BASE_URL", "http://127.0.0.1:1")
    }

    fn variable(mut self, name: &'a str, value: &'a str) -> Self {
        self.variables.push((name, value));
        self
    }

    fn file(mut self, path: &'a str, text: &'a str) -> Self {
        self.files.push((path, text));
        self
    }

    /// A configuration file that `--config` names.
    fn toml(self, text: &'a str) -> Self {
        Self { config: Some("/etc/k.toml"), ..self.file("/etc/k.toml", text) }
    }

    fn resolve(&self) -> Result<Loaded, Problems> {
        let files: HashMap<PathBuf, &str> =
            self.files.iter().map(|(path, text)| (PathBuf::from(path), *text)).collect();
        let read = |path: &Path| match files.get(path) {
            Some(text) => Ok((*text).to_owned()),
            None if path == Path::new("/folder") => Err(Unreadable::Folder),
            None if path == Path::new("/latin1.toml") => Err(Unreadable::NotUtf8 { line: 3, column: 7 }),
            None => Err(Unreadable::Missing),
        };
        let environment: Environment = self
            .variables
            .iter()
            .map(|(name, value)| (OsString::from(name), OsString::from(value)))
            .collect();
        let overrides = Overrides {
            config_file: self.config.map(PathBuf::from),
            listen: self.listen.map(str::to_owned).into_iter().collect(),
            is_ephemeral: self.is_ephemeral,
            has_passed_sockets: self.has_passed_sockets,
            keys: self.keys,
        };
        resolve::resolve(&overrides, &Sources { environment, read: &read, now: NOW })
    }

    #[track_caller]
    fn config(&self) -> Config {
        match self.resolve() {
            Ok(loaded) => loaded.config,
            Err(problems) => panic!("{problems}"),
        }
    }

    #[track_caller]
    fn check_problems(&self, expected: &str) {
        match self.resolve() {
            Ok(loaded) => panic!("{loaded:?}"),
            Err(problems) => {
                let printed = problems.to_string();
                let (problems, _) = printed.rsplit_once('\n').unwrap();
                assert_eq!(problems, expected.trim_start_matches('\n').trim_end(), "\n{printed}");
            }
        }
    }

    #[track_caller]
    fn check_warnings(&self, expected: &[&str]) {
        let warnings = self.resolve().unwrap().warnings;
        assert_eq!(warnings.iter().map(ToString::to_string).collect::<Vec<_>>(), expected);
    }
}

#[test]
fn an_upstream_that_is_keychoir_itself_is_refused() {
    let expected = "
KEYCHOIR_UPSTREAM__BASE_URL: 127.0.0.1:11011 is where Keychoir itself listens: it would send requests to itself
    = write the URL of ElevenLabs, of a gateway before it or of a simulator as the base URL
    = or listen elsewhere (`server.listen`)";
    let own = Given::fresh().variable("KEYCHOIR_UPSTREAM__BASE_URL", "http://localhost:11011");
    own.check_problems(expected);
    Given { listen: Some("127.0.0.1:11012"), ..own }.config();
    let of_a_key =
        "[[keys]]\nkey = \"sk_another_key_of_the_test_00000001\"\nbase_url = \"http://127.0.0.1:11011\"";
    let problems = Given::keyless().toml(of_a_key).resolve().unwrap_err().to_string();
    assert!(problems.contains("is where Keychoir itself listens"), "{problems}");
}

#[test]
fn with_a_key_and_nothing_else_everything_is_at_its_default() {
    let loaded = Given::fresh().resolve().unwrap();
    let mut config = loaded.config;
    assert_eq!(config.storage.file(), Some(Path::new("/home/me/.local/state/keychoir/keychoir.db")));
    config.storage.path = Config::default().storage.path;
    for setting in setting::TABLE {
        assert_eq!(setting.show(&mut config), setting.show(&mut Config::default()));
    }
    assert_eq!(config.key_source.to_string(), "ELEVENLABS_API_KEYS");
    assert_eq!((config.keys.len(), loaded.warnings.len(), loaded.file), (1, 0, None));
}

#[test]
fn flags_win_over_variables_over_the_file() {
    let file = Given::fresh().toml("server.listen = \"127.0.0.1:1\"");
    assert_eq!(file.config().server.listen.to_string(), "\"127.0.0.1:1\"");
    let variable = file.variable("KEYCHOIR_SERVER__LISTEN", " 127.0.0.1:2 ");
    assert_eq!(variable.config().server.listen.to_string(), "\"127.0.0.1:2\"");
    let flag = Given { listen: Some("127.0.0.1:3"), ..variable };
    assert_eq!(flag.config().server.listen.to_string(), "\"127.0.0.1:3\"");
}

#[test]
fn a_blank_variable_is_not_set() {
    let given = Given::fresh().variable("KEYCHOIR_SERVER__LISTEN", "  ").variable("KEYCHOIR_CONFIG", "");
    assert_eq!(given.config().server.listen.to_string(), "\"127.0.0.1:11011\"");
    let given = Given::fresh().variable("KEYCHOIR_NO_SUCH", "");
    assert_eq!(given.config().keys.len(), 1);
}

#[test]
fn every_layer_is_judged_also_under_another() {
    let given =
        Given { listen: Some("127.0.0.1:3"), ..Given::fresh().variable("KEYCHOIR_SERVER__LISTEN", "x") };
    given.check_problems(
        "KEYCHOIR_SERVER__LISTEN: `x` has no port\n    = write HOST:PORT, for example 127.0.0.1:11011",
    );
}

#[test]
fn all_mistakes_are_told_at_once() {
    let given = Given { listen: Some("8080"), ..Given::fresh() }
        .variable("KEYCHOIR_SERVER__LISTEN", "127.0.0.1")
        .variable("KEYCHOIR_LOG__FROMAT", "json")
        .toml("\n\n[pool]\nstrateggy = \"fill-first\"\nnear_limit_ratio = 80\n\n[sever]\nlisten = \"x\"\n");
    given.check_problems(
        r#"
--listen: `8080` has no port
    = write HOST:PORT, for example 127.0.0.1:11011
    = did you mean `127.0.0.1:8080`?
/etc/k.toml:4:1: unknown key `strateggy` in [pool]
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
KEYCHOIR_LOG__FROMAT: there is no such setting
    = did you mean `KEYCHOIR_LOG__FORMAT`?
KEYCHOIR_SERVER__LISTEN: `127.0.0.1` has no port
    = write HOST:PORT, for example 127.0.0.1:11011
"#,
    );
    assert!(given.resolve().unwrap_err().to_string().ends_with("\n6 problems in the configuration"));
}

#[test]
fn a_setting_in_the_wrong_place_is_sent_to_the_right_one() {
    Given::fresh()
        .toml("listen = \"127.0.0.1:1\"\n[server]\nstrategy = \"fill-first\"\nlevell = 'info'")
        .check_problems(
            r#"
/etc/k.toml:1:1: unknown key `listen`
  1 | listen = ***
    | ^^^^^^
    = `listen` belongs in [server]
/etc/k.toml:3:1: unknown key `strategy` in [server]
  3 | strategy = "fill-first"
    | ^^^^^^^^
    = `strategy` belongs in [pool]
/etc/k.toml:4:1: unknown key `levell` in [server]
  4 | levell = 'info'
    | ^^^^^^
    = did you mean `log.level`?
"#,
        );
}

#[test]
fn syntax_errors_do_not_hide_the_rest_and_are_not_doubled() {
    Given::fresh()
        .toml("[server]\nlisten = 127.0.0.1:1\nlisten = \"a:b\"\n[log]\nformat = \"x\"\nlevel = \"info\n")
        .check_problems(
            r#"
/etc/k.toml:2:15: invalid float
  2 | listen = 127.0.0.1:1
    |               ^^^^^^
    = a text is written in quotes, a number in digits only
/etc/k.toml:3:1: `listen` is given twice
  3 | listen = "a:b"
    | ^^^^^^
    = keep one of them
/etc/k.toml:5:10: there is no log format `x`
  5 | format = "x"
    |          ^^^
    = there is `auto`, `terminal`, `ascii`, `json`
/etc/k.toml:6:14: invalid basic string
  6 | level = "info
    |              ^
    = expected `"`
"#,
        );
}

#[test]
fn a_broken_file_is_not_blamed_for_what_it_may_say() {
    Given::keyless().toml("[[keys]\nkey = \"x\"\n").check_problems(
        "
/etc/k.toml:1:8: unclosed array table
  1 | [[keys]
    |        ^
    = expected `]`
",
    );
}

#[test]
fn shapes_are_checked() {
    Given::fresh()
        .toml("keys = \"a\"\nserver = 3\nclients = [ 3 ]\n[log]\nlevel = 1979-05-27\n")
        .check_problems(
            r#"
/etc/k.toml:1:8: `keys` should be a list of tables
  1 | keys = ***
    |        ^^^
    = write [[keys]], with two brackets, and `key = …` below it, once for each
/etc/k.toml:2:10: this is a number and should be a table
  2 | server = 3
    |          ^
/etc/k.toml:3:13: `clients` should be a list of tables
  3 | clients = ***
    |             ^
    = write [[clients]], with two brackets, and `token_sha256 = …` below it, once for each
/etc/k.toml:5:9: this is a date or time and should be a text
  5 | level = 1979-05-27
    |         ^^^^^^^^^^
    = write it in quotes
"#,
        );
}

#[test]
fn a_configuration_file_that_cannot_be_read_says_where_it_was_named() {
    Given { config: Some("/none"), ..Given::fresh() }
        .check_problems("--config: `/none` cannot be read: there is no such file");
    Given::fresh()
        .variable("KEYCHOIR_CONFIG", "/folder")
        .check_problems("KEYCHOIR_CONFIG: `/folder` cannot be read: it is a folder");
    Given { config: Some("/latin1.toml"), ..Given::fresh() }
        .check_problems("/latin1.toml:3:7: the file is no UTF-8 text from here on\n    = save it as UTF-8");
}

#[test]
fn sockets_from_systemd_are_used_unless_another_place_is_named() {
    let passed = Given { has_passed_sockets: true, ..Given::fresh() };
    assert_eq!(passed.config().server.listen.to_string(), "\"systemd\"");
    let named = passed.variable("KEYCHOIR_SERVER__LISTEN", "127.0.0.1:1,systemd");
    assert_eq!(named.config().server.listen.to_string(), "[\"127.0.0.1:1\", \"systemd\"]");
}

#[test]
fn the_flag_names_the_file_before_the_variable_does() {
    let given = Given::fresh().variable("KEYCHOIR_CONFIG", "/none").toml("");
    assert_eq!(given.resolve().unwrap().file, Some(PathBuf::from("/etc/k.toml")));
    let given =
        Given::fresh().variable("KEYCHOIR_CONFIG", "~/k.toml").file("/home/me/k.toml", "log.format = 'json'");
    assert_eq!(given.config().log.format.to_string(), "json");
}

#[test]
fn paths_in_the_file_start_at_its_folder() {
    let given = Given::fresh().toml("storage.path = \"books/k.db\"");
    assert_eq!(given.config().storage.path, Path::new("/etc/books/k.db"));
    let given = given.variable("KEYCHOIR_STORAGE__PATH", "k.db");
    assert_eq!(given.config().storage.path, Path::new("k.db"));
}

#[test]
fn without_a_home_the_books_need_a_place() {
    let homeless = Given { variables: vec![("ELEVENLABS_API_KEYS", KEY)], ..Given::default() };
    homeless.check_problems(
        "
configuration: there is no folder for the books: HOME is not set
    = set KEYCHOIR_STORAGE__PATH to a file
    = or KEYCHOIR_STORAGE__EPHEMERAL=true (or `serve --ephemeral`) to keep them in memory only
",
    );
    assert_eq!(
        homeless.clone().variable("KEYCHOIR_STORAGE__EPHEMERAL", "true").config().storage.file(),
        None
    );
    let flag =
        Given { is_ephemeral: true, ..homeless.clone().variable("KEYCHOIR_STORAGE__EPHEMERAL", "false") };
    assert_eq!(flag.config().storage.file(), None);
    assert_eq!(
        homeless.variable("KEYCHOIR_STORAGE__PATH", "/k.db").config().storage.path,
        Path::new("/k.db")
    );
}

#[test]
fn keys_come_from_the_first_place_that_gives_them() {
    let file = Given::keyless()
        .simulated()
        .toml("[[keys]]\nkey = \"sk_d\"\n")
        .file("/list", "sk_b")
        .file("/c/elevenlabs_api_keys", "sk_c\n");
    let credential = file.clone().variable("CREDENTIALS_DIRECTORY", "/c");
    let list = credential.clone().variable("ELEVENLABS_API_KEYS_FILE", "/list");
    let variable = list.clone().variable("ELEVENLABS_API_KEYS", "sk_a");
    for (given, key, source) in [
        (&file, "sk_d", "/etc/k.toml"),
        (&credential, "sk_c", "/c/elevenlabs_api_keys"),
        (&list, "sk_b", "/list"),
        (&variable, "sk_a", "ELEVENLABS_API_KEYS"),
    ] {
        let config = given.config();
        assert_eq!(config.keys.iter().map(|config| config.key.expose()).collect::<Vec<_>>(), [key]);
        assert_eq!(config.key_source.to_string(), source);
    }
    file.check_warnings(&[]);
    variable.check_warnings(&[
        "ELEVENLABS_API_KEYS_FILE: these keys are left out: ELEVENLABS_API_KEYS gives keys too",
        "/c/elevenlabs_api_keys: these keys are left out: ELEVENLABS_API_KEYS gives keys too",
        "/etc/k.toml:1:1: these keys are left out: ELEVENLABS_API_KEYS gives keys too",
    ]);
}

#[test]
fn the_credentials_of_a_service_may_be_others() {
    let given = Given::fresh().variable("CREDENTIALS_DIRECTORY", "/c");
    assert_eq!(given.config().key_source, KeySource::Variable);
    given.check_warnings(&[]);
}

#[test]
fn what_was_mended_in_a_list_is_told_by_position() {
    let keys = format!("\"{KEY}, {KEY},,\"");
    Given::keyless().variable("ELEVENLABS_API_KEYS", &keys).check_warnings(&[
        "ELEVENLABS_API_KEYS: entry 2 is the same key as entry 1 (sk_01234567...bcdef)",
        "ELEVENLABS_API_KEYS: entry 3 is empty",
        "ELEVENLABS_API_KEYS: ends with a comma",
        "ELEVENLABS_API_KEYS: has quotes around keys",
    ]);
}

#[test]
fn entries_give_keys_with_names_and_workspaces() {
    let given = Given::keyless().simulated().file("/etc/secret", "sk_b\n").file("/abs", "'sk_c'").toml(
        "[[keys]]\nkey = \"sk_a\"\nname = \"one\"\nworkspace = \"w\"\n[[keys]]\nkey_file = \"secret\"\n[[keys]]\nkey_file = \"/abs\"\n[[keys]]\nkey = 'sk_a'",
    );
    let config = given.config();
    assert_eq!(config.keys.iter().map(|key| key.key.expose()).collect::<Vec<_>>(), ["sk_a", "sk_b", "sk_c"]);
    assert_eq!(config.keys[0].name.as_deref(), Some("one"));
    assert_eq!(config.keys[0].workspace.as_deref(), Some("w"));
    given.check_warnings(&[
        "/etc/k.toml:8:12: has quotes around keys",
        "/etc/k.toml:10:7: key 4 is the same as key 1 (...)",
    ]);
}

#[test]
fn what_is_no_key_is_refused_where_elevenlabs_is_asked() {
    let short = "
ELEVENLABS_API_KEYS: entry 2 (sk_***, 8 characters) is too short for a key of ElevenLabs
    = write the keys alone, separated by commas: ELEVENLABS_API_KEYS=sk_first,sk_second
";
    let keys = format!("{KEY},sk_short");
    let given = Given::keyless().variable("ELEVENLABS_API_KEYS", &keys);
    given.check_problems(short);
    given
        .clone()
        .variable("KEYCHOIR_UPSTREAM__BASE_URL", "https://api.eu.residency.elevenlabs.io")
        .check_problems(short);
    given.simulated().check_warnings(&[]);
    // A key of its own host is judged by that.
    let at = |base_url: &str| format!("[[keys]]\nkey = \"sk_short\"\nbase_url = \"{base_url}\"\n");
    assert!(Given::keyless().toml(&at("http://127.0.0.1:1")).resolve().is_ok());
    assert!(Given::keyless().simulated().toml(&at("https://api.us.elevenlabs.io")).resolve().is_err());
}

#[test]
fn a_file_of_keys_says_how_it_is_written() {
    let list = format!("# ours\n{KEY} # main\n");
    Given::keyless().file("/list", &list).variable("ELEVENLABS_API_KEYS_FILE", "/list").check_problems(
        "
/list: entry 1 (sk_01234567... main) has a comment in it
    = write comments only into a file, on lines of their own that begin with `#`
    = write the keys alone, one a line
",
    );
}

#[test]
fn a_key_of_an_unknown_shape_is_warned_about() {
    let keys = format!("{KEY},{}", &KEY[..40]);
    Given::keyless().variable("ELEVENLABS_API_KEYS", &keys).check_warnings(&[
        "ELEVENLABS_API_KEYS: entry 2 (sk_0...1234) has another shape than the keys of ElevenLabs that are known (`sk_` \
         and 48 hexadecimal digits, or 32 of them): it may be cut off or mistyped",
    ]);
}

#[test]
fn key_files_are_not_read_when_the_environment_gives_the_keys() {
    let given = Given::fresh().toml("[[keys]]\nkey_file = \"none\"\nname = \"a\"\n");
    assert_eq!(given.config().keys.len(), 1);
}

#[test]
fn mistakes_in_entries_are_told_without_their_values() {
    Given::keyless()
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
fn without_keys_the_three_ways_and_the_demo_are_named() {
    Given::keyless().check_problems(
        "
configuration: there are no ElevenLabs API keys
    = set ELEVENLABS_API_KEYS=sk_first,sk_second
    = or put them in a file, one a line, and set ELEVENLABS_API_KEYS_FILE to its path
    = or write a [[keys]] entry with `key` or `key_file` for each in the configuration file
    = to see it work without a key: keychoir demo
",
    );
    let problems = Given::keyless().variable("ELEVENLABS_API_KEY", KEY).resolve().unwrap_err().to_string();
    assert!(problems.contains("did you mean `ELEVENLABS_API_KEYS`?"), "{problems}");
    let config = Given { keys: Need::Optional, ..Given::keyless() }.config();
    assert_eq!((config.keys.len(), config.key_source), (0, KeySource::Nowhere));
}

#[test]
fn clients_are_known_by_their_fingerprints() {
    let hex = crate::secret::TokenFingerprint::of("c").to_string();
    let text = format!(
        "[[clients]]\nname = \"a\"\ntoken = \"{TOKEN}\"\n[[clients]]\nname = \"b\"\ntoken_file = \"t\"\n[[clients]]\nname = \"c\"\ntoken_sha256 = \"{hex}\"\n"
    );
    let config = Given::fresh().file("/etc/t", "b\n").toml(&text).config();
    let expected = [("a", TOKEN), ("b", "b"), ("c", "c")];
    for (client, (name, token)) in config.clients.iter().zip(expected) {
        assert_eq!(client.name, name);
        assert!(client.token.matches(&crate::secret::TokenFingerprint::of(token)));
    }
    assert_eq!(config.clients.len(), 3);
}

#[test]
fn mistakes_in_clients_are_told_without_their_values() {
    Given::fresh()
        .toml(
            "[[clients]]\ntoken = \"a b\"\n[[clients]]\nname = \"B\"\ntoken_sha256 = \"12\"\n[[clients]]\nname = \"c\"\ntoken = \"t\"\n[[clients]]\nname = \"c\"\ntoken = \"t\"\n",
        )
        .check_problems(
            "
/etc/k.toml:1:1: this entry has no `name`
  1 | [[clients]]
    | ^^^^^^^^^^^
/etc/k.toml:2:9: the token has a space, a control character or a letter beyond ASCII
  2 | token = ***
    |         ^^^
    = a header could not carry it: write letters, digits and signs
/etc/k.toml:4:8: this name is not plain
  4 | name = ***
    |        ^^^
    = write 1 to 64 of `a`-`z`, `0`-`9`, `-` and `_`
/etc/k.toml:5:16: this has 2 characters, a SHA-256 has 64
  5 | token_sha256 = ***
    |                ^^^
    = write the output of `printf %s TOKEN | sha256sum`, or the token itself as `token`
/etc/k.toml:10:8: client 4 has the same name as client 3
  10 | name = ***
     |        ^^^
     = give each client its own name
/etc/k.toml:11:9: client 4 has the same token as client 3
  11 | token = ***
     |         ^^^
     = give each client its own token
",
        );
}

#[test]
fn a_client_is_not_called_what_records_call_others() {
    for name in ["own", "local", "other"] {
        let text = format!("[[clients]]\nname = \"{name}\"\ntoken = \"0123456789abcdef\"\n");
        let problems = Given::fresh().toml(&text).resolve().unwrap_err().to_string();
        assert!(problems.contains(&format!("k.toml:2:8: the name `{name}` is taken")), "{problems}");
    }
    let text = "[[clients]]\nname = \"owner\"\ntoken = \"0123456789abcdef\"\n";
    assert_eq!(Given::fresh().toml(text).config().clients[0].name, "owner");
}

#[test]
fn a_configuration_file_is_found_without_a_name() {
    const OF_USER: &str = "/home/me/.config/keychoir/keychoir.toml";
    const OF_MACHINE: &str = "/etc/keychoir/keychoir.toml";
    let listen = |port: u16| format!("[server]\nlisten = \"127.0.0.1:{port}\"\n");
    let (one, two, three) = (listen(1), listen(2), listen(3));
    let neither = Given::fresh();
    let machine = neither.clone().file(OF_MACHINE, &two);
    let both = machine.clone().file(OF_USER, &one);
    let xdg = both.clone().variable("XDG_CONFIG_HOME", "/x").file("/x/keychoir/keychoir.toml", &three);
    let named = both.clone().variable("KEYCHOIR_CONFIG", "/named.toml").file("/named.toml", &three);
    for (given, port, file) in [
        (&neither, 11011, None),
        (&machine, 2, Some(OF_MACHINE)),
        (&both, 1, Some(OF_USER)),
        (&xdg, 3, Some("/x/keychoir/keychoir.toml")),
        (&named, 3, Some("/named.toml")),
    ] {
        let loaded = given.resolve().unwrap();
        assert_eq!(loaded.config.server.listen.to_string(), format!("\"127.0.0.1:{port}\""));
        assert_eq!(loaded.file.as_deref(), file.map(Path::new));
    }
    machine.file(OF_USER, "[serverr]\n").check_problems(&format!(
        "
{OF_USER}:1:2: unknown section `serverr`
  1 | [serverr]
    |  ^^^^^^^
    = did you mean `server`?
"
    ));
}

#[test]
fn what_a_client_may_do_is_read() {
    let text = "[[keys]]\nkey = \"sk_0123456789abcdef\"\nname = \"first\"\nworkspace = \"studio\"\n\
        [[clients]]\nname = \"a\"\ntoken = \"0123456789abcdef\"\nallowance = \"3 requests\"\nrate = \"5 per second\"\n\
        concurrency = 4\npaths = [\"/v1/voices/\"]\nkeys = [\"first\"]\nworkspaces = \"studio\"\n\
        bring_your_own_key = true\n[[clients]]\nname = \"b\"\ntoken = \"0123456789abcdeg\"\n";
    let config = Given::keyless().simulated().toml(text).config();
    let rules = &config.clients[0].rules;
    assert_eq!(rules.allowance.unwrap().to_string(), "3 requests");
    assert_eq!(rules.rate.unwrap().to_string(), "5 per second");
    assert_eq!((rules.concurrency, &*rules.paths), (Some(4), &["/v1/voices".to_owned()][..]));
    assert!(rules.pins.keys == ["first"] && rules.pins.workspaces == ["studio"] && rules.may_bring_key);
    assert_eq!(config.clients[1].rules, crate::policy::client::Rules::default());
}

#[test]
fn a_rule_that_is_not_understood_is_never_taken_for_none() {
    Given::fresh()
        .toml(
            "[[clients]]\nname = \"a\"\ntoken = \"0123456789abcdef\"\nallowance = 3\nconcurrency = 0\npaths = []\nkeys = [\"first\"]\nratee = \"x\"\n",
        )
        .check_problems(
            "
/etc/k.toml:4:13: this is a number and should be a text
  4 | allowance = ***
    |             ^
    = write it in quotes
/etc/k.toml:5:15: 0 is out of range
  5 | concurrency = ***
    |               ^
    = write a whole number from 1 to 1000000
/etc/k.toml:6:9: this list is empty
  6 | paths = ***
    |         ^^
    = remove it, or name what it should list
/etc/k.toml:7:8: the pool has no key of the name `first`
  7 | keys = ***
    |        ^^^
    = write the `name` of a [[keys]] entry
/etc/k.toml:8:1: unknown key `ratee`
  8 | ratee = ***
    | ^^^^^
    = did you mean `rate`?
",
        );
}

#[test]
fn names_have_1_to_64_characters() {
    let check = |name: &str| super::keys::check_name(name).is_ok();
    assert!(check("a") && check(&"a-".repeat(32)) && check("a_1-z"));
    assert!(!check("") && !check(&"a-".repeat(33)) && !check("A") && !check("a b") && !check(KEY));
}

#[test]
fn a_short_token_is_warned_about() {
    let given = |token: &str| format!("[[clients]]\nname = \"a\"\ntoken = \"{token}\"\n");
    Given::fresh().toml(&given("0123456789-abcde")).check_warnings(&[]);
    Given::fresh()
        .toml(&given("0123456789-abcd"))
        .check_warnings(&["/etc/k.toml:3:9: the token of client 1 is short: 16 random characters are safer"]);
}

#[test]
fn beyond_loopback_a_client_token_is_needed() {
    let open = Given { listen: Some("0.0.0.0:80"), ..Given::fresh() };
    open.check_problems(
        "
--listen: 0.0.0.0:80 is open to other machines, and no client token is asked for
    = write a [[clients]] entry with `name` and `token_sha256` in the configuration file
    = or listen on 127.0.0.1:80
",
    );
    let text = format!("[[clients]]\nname = \"a\"\ntoken = \"{TOKEN}\"\n");
    assert!(open.toml(&text).config().server.listen.exposed().is_some());
    for listen in ["localhost:0", "[::1]:0"] {
        assert!(Given { listen: Some(listen), ..Given::fresh() }.config().server.listen.exposed().is_none());
    }
}

/// A certificate and its private key.
fn pair() -> (String, String) {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    (made.cert.pem(), made.signing_key.serialize_pem())
}

#[test]
fn tls_is_a_word_or_files_and_the_last_layer_counts() {
    let choice = |given: &Given<'_>| given.config().server.tls.choice();
    let (cert, key) = pair();
    let files = Given::fresh().file("/etc/c.pem", &cert).file("/etc/k.pem", &key);
    assert_eq!(choice(&Given::fresh()), TlsChoice::Auto);
    assert_eq!(choice(&Given::fresh().toml("server.tls = \"off\"")), TlsChoice::Off);
    for toml in [
        "[server]\ntls = { cert = \"c.pem\", key = \"k.pem\" }",
        "[server.tls]\ncert = \"c.pem\"\nkey = \"/etc/k.pem\"",
        "server.tls.cert = \"c.pem\"\nserver.tls.key = \"k.pem\"",
    ] {
        let given = files.clone().toml(toml);
        assert_eq!(choice(&given), TlsChoice::Files);
        assert!(given.config().certificate.is_some());
        let off = given.variable("KEYCHOIR_SERVER__TLS", "off");
        assert_eq!(choice(&off), TlsChoice::Off);
        assert!(off.config().certificate.is_none());
    }
    let variables = files
        .variable("KEYCHOIR_SERVER__TLS__CERT", "/etc/c.pem")
        .variable("KEYCHOIR_SERVER__TLS__KEY", "/etc/k.pem")
        .toml("server.tls = \"off\"");
    assert_eq!(choice(&variables), TlsChoice::Files);
    variables.variable("KEYCHOIR_SERVER__TLS", "auto").check_problems(
        "
KEYCHOIR_SERVER__TLS: variables give a word for TLS and files as well
    = remove this one to use the files, or KEYCHOIR_SERVER__TLS__CERT and __KEY
",
    );
}

#[test]
fn what_is_no_way_to_speak_tls_says_so() {
    let form = "write \"auto\", \"off\", or { cert = \"FILE\", key = \"FILE\" }";
    for (toml, column, what, near) in [
        ("true", "^^^^", "this is true or false and should be a text or a table", "\"auto\""),
        ("false", "^^^^^", "this is true or false and should be a text or a table", "\"off\""),
        ("\"on\"", "^^^^", "`on` is no way to speak TLS", "auto"),
        ("\"atuo\"", "^^^^^^", "`atuo` is no way to speak TLS", "auto"),
    ] {
        Given::fresh().toml(&format!("[server]\ntls = {toml}\n")).check_problems(&format!(
            "/etc/k.toml:2:7: {what}\n  2 | tls = {toml}\n    |       {column}\n    = {form}\n    = did you mean `{near}`?"
        ));
    }
    Given::fresh()
        .variable("KEYCHOIR_SERVER__TLS", "c.pem")
        .check_problems(&format!("KEYCHOIR_SERVER__TLS: `c.pem` is no way to speak TLS\n    = {form}"));
    Given::fresh()
        .toml("[server.tls]\ncrt = \"a\"\n[server]\ntls_directory = 3\ncert = \"a\"\n")
        .check_problems(
            r#"
/etc/k.toml:2:1: unknown key `crt` in [server.tls]
  2 | crt = "a"
    | ^^^
    = did you mean `cert`?
/etc/k.toml:4:17: this is a number and should be a text
  4 | tls_directory = 3
    |                 ^
    = write it in quotes
/etc/k.toml:5:1: unknown key `cert` in [server]
  5 | cert = "a"
    | ^^^^
"#,
        );
    Given::fresh().toml("server.tls = {}").check_problems(
        "/etc/k.toml:1:14: this table is empty\n  1 | server.tls = {}\n    |              ^^",
    );
}

#[test]
fn files_of_tls_that_cannot_be_used_are_named() {
    let (cert, key) = pair();
    let (_, other) = pair();
    let check = |cert_file: &str, key_file: &str, expected: &str| {
        Given::fresh()
            .file("/etc/c.pem", cert_file)
            .file("/etc/k.pem", key_file)
            .toml("[server.tls]\ncert = \"c.pem\"\nkey = \"k.pem\"\n")
            .check_problems(expected);
    };
    let at_cert =
        |what: &str| format!("/etc/k.toml:2:8: {what}\n  2 | cert = \"c.pem\"\n    |        ^^^^^^^\n");
    let at_key = |what: &str| format!("/etc/k.toml:3:7: {what}\n  3 | key = ***\n    |       ^^^\n");
    check(
        "",
        &key,
        &(at_cert("there is no certificate in it")
            + "    = write the path of a PEM file: -----BEGIN CERTIFICATE-----"),
    );
    let exchanged = "    = `cert` is the file of certificates, `key` that of the private key";
    check(&key, &key, &(at_cert("there is a private key in it and no certificate") + exchanged));
    check(&cert, &cert, &(at_key("there is a certificate in it and no private key") + exchanged));
    check(
        &cert,
        &other,
        &(at_key("the private key does not fit the certificate")
            + "    = name the key that the certificate was asked for with; the server's certificate comes first in its file"),
    );
    check(
        &cert,
        "nothing",
        &(at_key("there is no private key in it")
            + "    = write the path of a PEM file: -----BEGIN PRIVATE KEY-----"),
    );
    Given::fresh().toml("server.tls = { cert = \"c.pem\" }").check_problems(
        r#"
/etc/k.toml:1:23: there is a certificate and no private key for it
  1 | server.tls = { cert = "c.pem" }
    |                       ^^^^^^^
    = write key = "FILE" beside it
/etc/k.toml:1:23: `/etc/c.pem` cannot be read: there is no such file
  1 | server.tls = { cert = "c.pem" }
    |                       ^^^^^^^
"#,
    );
    Given::fresh().variable("KEYCHOIR_SERVER__TLS__KEY", "/latin1.toml").check_problems(
        "
KEYCHOIR_SERVER__TLS__KEY: there is a private key and no certificate for it
    = set KEYCHOIR_SERVER__TLS__CERT=FILE
KEYCHOIR_SERVER__TLS__KEY: `/latin1.toml` cannot be read: it is no UTF-8 text (line 3, column 7)
    = write the path of a PEM file; openssl x509 -inform der makes one of DER
",
    );
    // What was told once is not told as missing, too.
    Given::fresh()
        .file("/etc/c.pem", &cert)
        .toml("server.tls = { cert = \"c.pem\", key = 3 }")
        .check_problems(
            "
/etc/k.toml:1:38: this is a number and should be a text
  1 | server.tls = ***
    |                ^
    = write it in quotes
",
        );
}

#[test]
fn a_certificate_that_does_not_hold_is_warned_about() {
    let made = |from, until| {
        let mut params = rcgen::CertificateParams::new(["localhost".to_owned()]).unwrap();
        (params.not_before, params.not_after) = (from, until);
        let key = rcgen::KeyPair::generate().unwrap();
        (params.self_signed(&key).unwrap().pem(), key.serialize_pem())
    };
    let day = rcgen::date_time_ymd;
    for ((cert, key), expected) in [
        (made(day(2026, 1, 1), day(2028, 1, 1)), None),
        (
            made(day(2026, 1, 1), day(2027, 1, 1)),
            Some("/etc/k.toml:2:8: this certificate has expired at 2027-01-01T00:00:00Z: clients refuse it"),
        ),
        (
            made(day(2028, 1, 1), day(2029, 1, 1)),
            Some("/etc/k.toml:2:8: clients refuse this certificate before 2028-01-01T00:00:00Z"),
        ),
    ] {
        let given = Given::fresh()
            .file("/etc/c.pem", &cert)
            .file("/etc/k.pem", &key)
            .toml("[server.tls]\ncert = \"c.pem\"\nkey = \"k.pem\"\n");
        given.check_warnings(expected.as_slice());
        assert!(given.config().certificate.is_some());
    }
}

#[test]
fn the_authority_lives_beside_the_books() {
    let place = |given: &Given<'_>| given.config().authority_place();
    let folder = |path: &str| Place::Folder(path.into());
    let fresh = Given::fresh();
    assert_eq!(place(&fresh), folder("/home/me/.local/state/keychoir/tls"));
    assert_eq!(place(&fresh.clone().variable("KEYCHOIR_STORAGE__PATH", "/var/k.db")), folder("/var/tls"));
    let ephemeral = fresh.variable("KEYCHOIR_STORAGE__EPHEMERAL", "true");
    assert_eq!(place(&ephemeral), Place::Memory);
    assert_eq!(place(&ephemeral.toml("server.tls_directory = \"t\"")), folder("/etc/t"));
}

#[test]
fn one_body_fits_into_the_memory_for_all() {
    let given = Given::fresh().variable("KEYCHOIR_REPLAY__MEMORY_TOTAL_MAX", "16777216");
    assert_eq!(given.config().replay.memory_total_bytes_max, 16_777_216);
    Given::fresh().variable("KEYCHOIR_REPLAY__MEMORY_TOTAL_MAX", "16777215").check_problems(
        "
KEYCHOIR_REPLAY__MEMORY_TOTAL_MAX: one request may keep 16777216 bytes (`replay.memory_max`) but all together only 16777215
    = raise `replay.memory_total_max`
",
    );
}

#[test]
fn keys_in_clear_text_are_warned_about() {
    Given::fresh().variable("KEYCHOIR_UPSTREAM__BASE_URL", "http://127.0.0.1:9").check_warnings(&[]);
    Given::fresh().variable("KEYCHOIR_UPSTREAM__BASE_URL", "http://example.com").check_warnings(&[
        "KEYCHOIR_UPSTREAM__BASE_URL: the keys go over the network in clear text: write https:// if the host speaks it",
    ]);
}

#[test]
fn defaults_around_given_keys_leave_nothing_behind() {
    let key = crate::secret::ApiKey::new(KEY).unwrap();
    let config = Config::with_defaults(vec![key], "http://127.0.0.1:9".parse().unwrap());
    assert_eq!((config.keys.len(), config.storage.file(), config.upstream.base_url.port()), (1, None, 9));
    assert!(!format!("{config:?}").contains(KEY));
}

#[test]
fn the_process_has_an_environment() {
    let overrides = Overrides { config_file: Some("/nowhere/at/all.toml".into()), ..Overrides::default() };
    assert!(super::load(&overrides).unwrap_err().to_string().contains("there is no such file"));
}

const REFERENCE: &str = include_str!("../../config/keychoir.toml");

/// The reference with its settings in force: a setting is `#name`, prose is `# text`.
fn reference_in_force() -> String {
    let is_setting = |line: &&str| {
        line.strip_prefix('#')
            .is_some_and(|rest| rest.starts_with(|character: char| character.is_ascii_lowercase()))
    };
    REFERENCE
        .lines()
        .map(|line| if is_setting(&line) { &line[1..] } else { line }.to_owned() + "\n")
        .collect()
}

#[test]
fn the_reference_file_loads_and_changes_nothing() {
    let untouched = Given::fresh().toml(REFERENCE).resolve().unwrap();
    let in_force = reference_in_force();
    let in_force = Given::fresh().toml(&in_force).resolve().unwrap();
    assert!(untouched.warnings.is_empty() && in_force.warnings.is_empty());
    let (mut untouched, mut in_force, mut default) =
        (untouched.config, in_force.config, Given::fresh().config());
    for setting in setting::TABLE {
        assert_eq!(setting.show(&mut untouched), setting.show(&mut default), "{}", setting.path);
        assert_eq!(setting.show(&mut in_force), setting.show(&mut default), "{}", setting.path);
    }
}

#[test]
fn the_reference_file_has_every_setting_and_nothing_else() {
    let text = reference_in_force();
    let root = toml::de::DeTable::parse(&text).unwrap().into_inner();
    let mut paths = Vec::new();
    for (section, table) in &root {
        for (name, value) in table.get_ref().as_table().unwrap() {
            let path = format!("{}.{}", section.get_ref(), name.get_ref());
            let mut config = Config::default();
            let folders = Folders { home: Some(Path::new("/home/me")), base: None };
            setting::find(&path).unwrap().read(Raw::Toml(value.get_ref()), folders, &mut config).unwrap();
            // A number is written as the table shows it, without another spelling of the same.
            if !value.get_ref().is_str() {
                let written = &text[value.span()];
                assert_eq!(written, setting::find(&path).unwrap().show(&mut Config::default()));
            }
            paths.push(path);
        }
    }
    paths.sort();
    // What is below a setting that is a word here stands in the prose.
    let written = setting::TABLE.iter().filter(|setting| !setting.is_nested());
    let mut expected: Vec<_> = written.map(|setting| setting.path.to_owned()).collect();
    expected.sort();
    assert_eq!(paths, expected);
}

#[test]
fn the_examples_in_the_reference_file_work() {
    let example: String = REFERENCE
        .lines()
        .filter_map(|line| line.strip_prefix("# "))
        .filter(|line| {
            line.starts_with("[[") || line.split_once(" = ").is_some_and(|(name, _)| !name.contains(' '))
        })
        .map(|line| line.to_owned() + "\n")
        .collect();
    let config = Given::keyless().file("/run/secrets/elevenlabs_key", KEY).toml(&example).config();
    assert_eq!((config.keys.len(), config.clients.len()), (1, 1));
    assert_eq!(config.keys[0].workspace.as_deref(), Some("studio"));
}

const ANON: &str = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJyb2xlIjoiYW5vbiJ9.c2lnbmF0dXJl";
const SERVICE_ROLE: &str =
    "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJyb2xlIjoic2VydmljZV9yb2xlIn0.c2lnbmF0dXJl";
const SB_SECRET: &str = "sb_secret_0123456789abcdef";

#[track_caller]
fn check_target(given: &Given<'_>, expected: Option<(&str, &str, ServiceKeyForm)>) {
    let config = given.config();
    let target = config.supabase.target();
    assert_eq!(
        target.map(|(url, key)| (url.to_string(), key.expose(), key.form())),
        expected.map(|(url, key, form)| (url.to_owned(), key, form))
    );
}

#[test]
fn the_mirror_is_found_where_supabases_tools_look() {
    const URL: &str = "https://p.supabase.co";
    check_target(&Given::fresh(), None);
    let given = Given::fresh().variable("SUPABASE_URL", "https://p.supabase.co/rest/v1/");
    let secret = given.clone().variable("SUPABASE_SECRET_KEY", SB_SECRET);
    check_target(&secret, Some((URL, SB_SECRET, ServiceKeyForm::Secret)));
    let old = given.clone().variable("SUPABASE_SERVICE_ROLE_KEY", SERVICE_ROLE);
    check_target(&old, Some((URL, SERVICE_ROLE, ServiceKeyForm::Token)));
    let quoted = format!("\"{SB_SECRET}\"\n");
    let file = given.clone().variable("SUPABASE_SECRET_KEY_FILE", "/k").file("/k", &quoted);
    check_target(&file, Some((URL, SB_SECRET, ServiceKeyForm::Secret)));
    let credential =
        given.clone().variable("CREDENTIALS_DIRECTORY", "/c").file("/c/supabase_secret_key", SB_SECRET);
    check_target(&credential, Some((URL, SB_SECRET, ServiceKeyForm::Secret)));
    let toml = Given::fresh().toml("[supabase]\nurl = \"https://p.supabase.co\"\nsecret_key_file = \"s\"");
    check_target(&toml.file("/etc/s", SB_SECRET), Some((URL, SB_SECRET, ServiceKeyForm::Secret)));
    check_target(&secret.variable("KEYCHOIR_SUPABASE__ENABLED", "false"), None);
}

#[test]
fn a_variable_of_ours_wins_over_supabases_and_that_over_the_file() {
    let file =
        Given::fresh().variable("SUPABASE_SECRET_KEY", SB_SECRET).toml("supabase.url = \"https://file\"");
    check_target(&file, Some(("https://file", SB_SECRET, ServiceKeyForm::Secret)));
    let theirs = file.variable("SUPABASE_URL", "https://theirs");
    check_target(&theirs, Some(("https://theirs", SB_SECRET, ServiceKeyForm::Secret)));
    let ours = theirs.variable("KEYCHOIR_SUPABASE__URL", "https://ours");
    check_target(&ours, Some(("https://ours", SB_SECRET, ServiceKeyForm::Secret)));
}

#[test]
fn a_key_for_web_pages_is_refused_with_what_to_do() {
    const ADVICE: &str = "
    = set SUPABASE_SECRET_KEY to a secret key (sb_secret_…): in the project's settings, API keys
    = or SUPABASE_SERVICE_ROLE_KEY to the older service_role key, if the project still has one";
    let given = Given::fresh().variable("SUPABASE_URL", "https://p.supabase.co");
    given.clone().variable("SUPABASE_SERVICE_ROLE_KEY", ANON).check_problems(&format!(
        "SUPABASE_SERVICE_ROLE_KEY: this is the anon key: it is for web pages and may not write what the mirror writes{ADVICE}"
    ));
    given.variable("SUPABASE_SECRET_KEY", "sb_publishable_0123").check_problems(&format!(
        "SUPABASE_SECRET_KEY: this is a publishable key: it is for web pages and may not write what the mirror writes{ADVICE}"
    ));
}

#[test]
fn half_a_mirror_is_named_and_stops_nothing() {
    Given::fresh().variable("SUPABASE_URL", "https://p.supabase.co").check_warnings(&[
        "SUPABASE_URL: nothing is mirrored to Supabase: it has no key; set SUPABASE_SECRET_KEY, or supabase.enabled = false",
    ]);
    Given::fresh().variable("SUPABASE_SECRET_KEY", SB_SECRET).check_warnings(&[
        "SUPABASE_SECRET_KEY: nothing is mirrored to Supabase: it has no address; set SUPABASE_URL, or supabase.enabled = false",
    ]);
    Given::fresh().variable("SUPABASE_URL", "nonsense here").check_warnings(&[]);
    Given::fresh()
        .variable("SUPABASE_URL", "http://kong:8000")
        .variable("SUPABASE_SECRET_KEY", SB_SECRET)
        .check_warnings(&["SUPABASE_URL: Supabase's key goes over the network in clear text: write https:// if the host speaks it"]);
}

#[test]
fn an_address_that_is_no_project_is_answered_with_the_form() {
    const FORM: &str = "    = write the project's URL, as in https://abcdefgh.supabase.co";
    let given = Given::fresh().variable("SUPABASE_SECRET_KEY", SB_SECRET);
    for (text, what) in [
        (
            "postgresql://postgres:hunter2@db.p.supabase.co:5432/postgres",
            "this is the address of the database, not of its API",
        ),
        ("https://supabase.com/dashboard/project/p", "this is the page of the dashboard, not the project"),
    ] {
        given.clone().variable("SUPABASE_URL", text).check_problems(&format!("SUPABASE_URL: {what}\n{FORM}"));
    }
}

/// Every form in which what was resolved can be printed.
fn everything_printed(given: &Given<'_>) -> String {
    match given.resolve() {
        Ok(loaded) => {
            let warnings: String = loaded.warnings.iter().map(ToString::to_string).collect();
            format!("{loaded:?}{loaded:#?}{warnings}{}", loaded.config.key_source)
        }
        Err(problems) => format!("{problems}{problems:?}{problems:#?}"),
    }
}

#[test]
fn no_output_contains_a_key_or_a_token() {
    let legacy = "0123456789abcdef0123456789abcdef";
    let files = [
        "[[keys]]\nkey = KEY\n",
        "[[keys]]\nkey = \"KEY\n",
        "[[keys]]\nkey = \"KEY\"\nkey_file = \"KEY\"\n",
        "[[keys]]\nkey_file = \"KEY\"\n",
        "[[keys]]\nname = \"KEY\"\nworkspace = \"KEY\"\n",
        "[[keys]]\nKEY = \"KEY\"\n",
        "[[keys]]\nkey KEY\n",
        "[[keys]]\nkey = [\n\"KEY\",\n\"KEY\n]\n",
        "[[keys]]\nkey = \"\"\"\nKEY\nKEY\n",
        "[[keys]]\nkey = \"KEY KEY\"\n",
        "[[keys]]\nkey = \"KEY\"\n[[keys]]\nkey = \"KEY\"\n",
        "[keys]\nkey = \"KEY\"\n",
        "[[kyes]]\nkey = \"KEY\"\nfoo = = KEY\n",
        "[KEY]\n[\"KEY\"]\n[[KEY]]\nKEY = 3\n\"KEY\" = 3\nKEY\n",
        "keys = [\"KEY\", KEY]\n",
        "keys = \"KEY\"\nKEY = \"KEY\"\n",
        "elevenlabs = \"KEY\"\nelevenlabs = \"KEY\"\n",
        "[server]\nlisten = \"KEY\"\nlisten = KEY\nKEY = 3\n",
        "[pool]\nstrategy = \"KEY\"\nstrategi = \"KEY\"\nnear_limit_ratio = \"KEY\"\n",
        "[upstream]\nbase_url = \"https://KEY@host/?key=KEY\"\n",
        "[upstream]\nbase_url = \"https://host/KEY/../x\"\nbase_uri = 'https://KEY'\n",
        "[log]\nlevel = \"KEY=KEY\"\nformat = \"KEY\"\n[watch]\nenabled = \"KEY\"\n",
        "[storage]\npath = [\"KEY\"]\nqueue_max = \"KEY\"\n",
        "[server]\ntls = \"KEY\"\ntls_directory = [\"KEY\"]\n",
        "[server.tls]\ncert = \"KEY\"\nkey = \"KEY\"\n",
        "server.tls = { cert = \"KEY\", key = \"KEY\", kye = \"KEY\" }\n",
    ];
    for text in files {
        for secret in [KEY, legacy] {
            let text = text.replace("KEY", secret);
            let printed = everything_printed(&Given { keys: Need::Optional, ..Given::keyless() }.toml(&text));
            // A short key shows eleven and five characters, and nothing between them.
            assert!(!printed.contains(&secret[12..24]), "{text}\n{printed}");
        }
    }
    let clients = [
        "[[clients]]\ntoken = TOKEN\n",
        "[[clients]]\nname = \"a\"\ntoken = \"TOKEN\n",
        "[[clients]]\nname = \"a\"\ntoken = \"TOKEN TOKEN\"\n",
        "[[clients]]\nname = \"a\"\ntoken_sha256 = \"TOKEN\"\n",
        "[[clients]]\nname = \"a\"\ntoken_file = \"TOKEN\"\n",
        "[[clients]]\nname = \"TOKEN!\"\ntoken = \"TOKEN\"\n",
        "[[clients]]\nname = \"a\"\ntoken = \"TOKEN\"\n",
        "[[clinets]]\ntokn = \"TOKEN\ntoken = TOKEN\n",
        "clients = [ { name = \"a\", token = \"TOKEN\", token = 3 }, \"TOKEN\" ]\n",
        "[clients]\na = \"TOKEN\"\n",
    ];
    for text in clients {
        let text = text.replace("TOKEN", TOKEN);
        let printed = everything_printed(&Given::fresh().toml(&text));
        assert!(!printed.contains(&TOKEN[..10]) && !printed.contains(&TOKEN[10..]), "{text}\n{printed}");
    }
    for value in ["KEY\u{e9}", "KEY,KEY", "[KEY]", "KEY$x", "\"KEY\" OTHER", "KEY\nOTHER"] {
        let value = value.replace("KEY", KEY).replace("OTHER", OTHER_KEY);
        for name in [
            "ELEVENLABS_API_KEYS",
            "ELEVENLABS_API_KEYS_FILE",
            "ELEVENLABS_API_KEY",
            "KEYCHOIR_KEYS",
            "KEYCHOIR_CONFIG",
            "KEYCHOIR_SERVER__LISTEN",
            "KEYCHOIR_UPSTREAM__BASE_URL",
            "KEYCHOIR_POOL__STRATEGY",
            "KEYCHOIR_LOG__LEVEL",
            "KEYCHOIR_WATCH__ENABLED",
            "KEYCHOIR_WATCH__INTERVAL_MS",
            "KEYCHOIR_SUPABASE__URL",
            "KEYCHOIR_SUPABASE__SECRET_KEY_FILE",
            "SUPABASE_URL",
            "SUPABASE_SECRET_KEY",
            "SUPABASE_SECRET_KEY_FILE",
            "SUPABASE_SERVICE_ROLE_KEY",
        ] {
            let given = Given::fresh()
                .variable("SUPABASE_URL", "https://p")
                .variable("SUPABASE_SECRET_KEY_FILE", "/k");
            let both = everything_printed(&given.variable(name, &value));
            let printed = everything_printed(&Given::keyless().variable(name, &value)) + &both;
            assert!(
                !printed.contains(&KEY[12..24]) && !printed.contains(&OTHER_KEY[12..24]),
                "{name}\n{printed}"
            );
        }
    }
}

proptest::proptest! {
    #[test]
    fn no_input_panics(
        line in "\\PC{0,40}",
        text in "(\\[{0,2}(server|keys|clients|x)\\]{0,2}|listen|key|token|=|\"{1,3}|'|ä|\t|\r?\n|#|[{},.0-9 -]){0,30}",
    ) {
        let given = Given::fresh()
            .toml(&text)
            .variable("KEYCHOIR_SERVER__LISTEN", &line)
            .variable("KEYCHOIR_UPSTREAM__BASE_URL", &line)
            .variable("KEYCHOIR_LOG__LEVEL", &line)
            .variable("KEYCHOIR_REPLAY__MEMORY_MAX", &line)
            .variable("SUPABASE_URL", &line)
            .variable("SUPABASE_SECRET_KEY", &line)
            .variable("SUPABASE_SERVICE_ROLE_KEY", &text)
            .variable("ELEVENLABS_API_KEYS", &text);
        let _ = everything_printed(&given);
        let _ = everything_printed(&Given::keyless().toml(&line));
    }
}

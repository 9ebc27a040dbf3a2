//! Tests of the clients: their tokens, names and rules, the token file that the environment names, and the addresses
//! that require clients.

use super::{FakeMachine, KEY, TOKEN};

#[test]
fn a_client_is_identified_by_the_fingerprint_of_its_token() {
    let hex = crate::secret::TokenFingerprint::new("c").to_string();
    let text = format!(
        "[[clients]]\nname = \"a\"\ntoken = \"{TOKEN}\"\n[[clients]]\nname = \"b\"\ntoken_file = \"t\"\n[[clients]]\nname = \"c\"\ntoken_sha256 = \"{hex}\"\n"
    );
    let config = FakeMachine::with_key().file("/etc/t", "b\n").toml(&text).config();
    let expected = [("a", TOKEN), ("b", "b"), ("c", "c")];
    for (client, (name, token)) in config.clients.iter().zip(expected) {
        assert_eq!(client.name, name);
        assert_eq!(client.token, crate::secret::TokenFingerprint::new(token));
    }
    assert_eq!(config.clients.len(), 3);
}

#[test]
fn invalid_clients_are_reported_without_their_values() {
    FakeMachine::with_key()
        .toml(
            "[[clients]]\ntoken = \"a b\"\n[[clients]]\nname = \"B\"\ntoken_sha256 = \"12\"\n[[clients]]\nname = \"c\"\ntoken = \"t\"\n[[clients]]\nname = \"c\"\ntoken = \"t\"\n",
        )
        .check_problems(
            "
/etc/k.toml:1:1: this entry has no `name`
  1 | [[clients]]
    | ^^^^^^^^^^^
/etc/k.toml:2:9: the token contains a space, a control character or a character outside ASCII
  2 | token = ***
    |         ^^^
    = a header cannot contain it: use letters, digits and punctuation
/etc/k.toml:4:8: this name is invalid
  4 | name = ***
    |        ^^^
    = write 1 to 64 characters of `a`-`z`, `0`-`9`, `-` and `_`
/etc/k.toml:5:16: this has 2 characters, but a SHA-256 has 64
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
fn a_client_cannot_have_a_reserved_name() {
    for name in ["own", "local", "other"] {
        let text = format!("[[clients]]\nname = \"{name}\"\ntoken = \"0123456789abcdef\"\n");
        let problems = FakeMachine::with_key().toml(&text).resolve().unwrap_err().to_string();
        let message = format!("k.toml:2:8: the name `{name}` is reserved");
        assert!(problems.contains(&message), "{message:?} must be reported: {problems}");
    }
    let text = "[[clients]]\nname = \"owner\"\ntoken = \"0123456789abcdef\"\n";
    assert_eq!(FakeMachine::with_key().toml(text).config().clients[0].name, "owner");
}

#[test]
fn the_rules_of_a_client_are_parsed() {
    let text = "[[keys]]\nkey = \"sk_0123456789abcdef\"\nname = \"first\"\nworkspace = \"studio\"\n\
        [[clients]]\nname = \"a\"\ntoken = \"0123456789abcdef\"\nquota = \"3 requests\"\nrate_limit = \"5 per second\"\n\
        max_concurrent = 4\npaths = [\"/v1/voices/\"]\nkeys = [\"first\"]\nworkspaces = \"studio\"\n\
        bring_your_own_key = true\n[[clients]]\nname = \"b\"\ntoken = \"0123456789abcdeg\"\n";
    let config = FakeMachine::without_key().simulated().toml(text).config();
    let rules = &config.clients[0].rules;
    assert_eq!(rules.quota.unwrap().to_string(), "3 requests");
    assert_eq!(rules.rate_limit.unwrap().to_string(), "5 per second");
    assert_eq!((rules.max_concurrent, &*rules.paths), (Some(4), &["/v1/voices".to_owned()][..]));
    assert!(
        rules.allowed_keys.keys == ["first"]
            && rules.allowed_keys.workspaces == ["studio"]
            && rules.may_bring_key
    );
    assert_eq!(config.clients[1].rules, crate::policy::client::Rules::default());
}

#[test]
fn an_invalid_rule_is_an_error() {
    FakeMachine::with_key()
        .toml(
            "[[clients]]\nname = \"a\"\ntoken = \"0123456789abcdef\"\nquota = 3\nmax_concurrent = 0\npaths = []\nkeys = [\"first\"]\nrate_limmit = \"x\"\n",
        )
        .check_problems(
            "
/etc/k.toml:4:9: this is a number, but should be a string
  4 | quota = ***
    |         ^
    = write it in quotes
/etc/k.toml:5:18: 0 is out of range
  5 | max_concurrent = ***
    |                  ^
    = write a whole number from 1 to 1000000
/etc/k.toml:6:9: this list is empty
  6 | paths = ***
    |         ^^
    = remove it, or add a value
/etc/k.toml:7:8: the pool has no key named `first`
  7 | keys = ***
    |        ^^^
    = write the `name` of a [[keys]] entry
/etc/k.toml:8:1: unknown field `rate_limmit`
  8 | rate_limmit = ***
    | ^^^^^^^^^^^
    = did you mean `rate_limit`?
",
        );
}

#[test]
fn a_name_has_1_to_64_characters_and_does_not_look_like_a_key() {
    for name in ["a", &"a-".repeat(32), "a_1-z"] {
        assert!(crate::config::is_valid_name(name), "the name {name:?} must be valid");
    }
    for name in ["", &"a-".repeat(33), "A", "a b", KEY] {
        assert!(!crate::config::is_valid_name(name), "the name {name:?} must be invalid");
    }
}

/// Returns a machine whose environment names the file `/run/secrets/token` with the token of the client `default`.
fn machine_with_token_file() -> FakeMachine<'static> {
    FakeMachine::with_key().variable("KEYCHOIR_CLIENT_TOKEN_FILE", "/run/secrets/token")
}

#[test]
fn the_environment_can_name_the_token_file_of_one_client() {
    let machine = FakeMachine { listen: Some("0.0.0.0:80"), ..machine_with_token_file() };
    let config = machine.file("/run/secrets/token", "a-token-of-an-app\n").config();
    assert_eq!(config.clients.len(), 1);
    assert_eq!(config.clients[0].name, "default");
    assert_eq!(config.clients[0].token, crate::secret::TokenFingerprint::new("a-token-of-an-app"));
}

#[test]
fn a_mistake_in_the_token_file_of_the_environment_is_reported_once() {
    for (content, expected) in [
        (None, "the file cannot be read: it does not exist"),
        (Some("\n"), "the token is empty"),
        (
            Some("two words"),
            "the token contains a space, a control character or a character outside ASCII\n    = a header cannot \
             contain it: use letters, digits and punctuation",
        ),
    ] {
        let mut machine = FakeMachine { listen: Some("0.0.0.0:80"), ..machine_with_token_file() };
        if let Some(content) = content {
            machine = machine.file("/run/secrets/token", content);
        }
        machine.check_problems(&format!("KEYCHOIR_CLIENT_TOKEN_FILE: {expected}"));
    }
}

#[test]
fn the_client_of_the_environment_must_differ_from_those_of_the_file() {
    let machine = || machine_with_token_file().file("/run/secrets/token", TOKEN);
    let client = |name: &str, token: &str| format!("[[clients]]\nname = \"{name}\"\ntoken = \"{token}\"\n");
    machine().toml(&client("default", "another-token-0123456789")).check_problems(
        "KEYCHOIR_CLIENT_TOKEN_FILE: this variable and a [[clients]] entry both define the client `default`
    = remove the variable, or rename the entry",
    );
    machine().toml(&client("app", TOKEN)).check_problems(
        "KEYCHOIR_CLIENT_TOKEN_FILE: the client `default` has the same token as the client `app`
    = give each client its own token",
    );
    assert_eq!(machine().toml(&client("app", "another-token-0123456789")).config().clients.len(), 2);
}

#[test]
fn a_short_token_causes_a_warning() {
    let client_with = |token: &str| format!("[[clients]]\nname = \"a\"\ntoken = \"{token}\"\n");
    FakeMachine::with_key().toml(&client_with("0123456789-abcde")).check_warnings(&[]);
    FakeMachine::with_key().toml(&client_with("0123456789-abcd")).check_warnings(&[
        "/etc/k.toml:3:9: the token of client 1 is short: use at least 16 random characters",
    ]);
}

#[test]
fn a_listener_beyond_loopback_requires_a_client_token() {
    let exposed_machine = FakeMachine { listen: Some("0.0.0.0:80"), ..FakeMachine::with_key() };
    exposed_machine.check_problems(
        "
--listen: 0.0.0.0:80 is open to other machines, and no client token is required
    = add a client with `keychoir clients add NAME`, or write a [[clients]] entry with `name` and `token_sha256`
    = or put a token into a file and set KEYCHOIR_CLIENT_TOKEN_FILE to its path, for example to a secret of a container
    = or listen on 127.0.0.1:80, also in a container that shares the network of the app
    = or listen on a Unix socket in a directory that the app shares: unix:/run/keychoir/keychoir.sock
",
    );
    let text = format!("[[clients]]\nname = \"a\"\ntoken = \"{TOKEN}\"\n");
    assert!(exposed_machine.toml(&text).config().server.listen.exposed_address().is_some());
    for listen in ["localhost:0", "[::1]:0"] {
        assert!(
            FakeMachine { listen: Some(listen), ..FakeMachine::with_key() }
                .config()
                .server
                .listen
                .exposed_address()
                .is_none()
        );
    }
}

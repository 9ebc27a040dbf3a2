//! Tests of a configuration with an overlay (its keys, clients, paused keys and mistakes), of the sources of the admin
//! token, and of the address for operators.

use super::{FakeMachine, KEY, OTHER_KEY};
use crate::config::KeyListSource;
use crate::policy::client::ClientOrigin;
use crate::policy::key_state::KeyOrigin;
use crate::policy::units::UnixMs;
use crate::secret::{AdminTokenFingerprint, ApiKey, TokenFingerprint};

const STATE: &str = "/home/me/.local/state/keychoir";
const OVERLAY: &str = "/home/me/.local/state/keychoir/managed.toml";
const SPARE: &str = "/home/me/.local/state/keychoir/keys/spare";

/// Returns the fingerprint of a token as a file contains it.
fn token_sha256(token: &str) -> String {
    TokenFingerprint::new(token).to_string()
}

#[test]
fn keys_of_the_overlay_are_added_to_those_of_the_environment() {
    let overlay = "generation = 7\n[[keys]]\nname = \"spare\"\nkey_file = \"keys/spare\"\nweight = 3\n";
    let config = FakeMachine::with_key().file(OVERLAY, overlay).file(SPARE, OTHER_KEY).config();
    assert_eq!((config.generation, config.key_source), (7, KeyListSource::Variable));
    let origins: Vec<_> = config.keys.iter().map(|key| (key.name.as_deref(), key.origin)).collect();
    assert_eq!(origins, [(None, KeyOrigin::Environment), (Some("spare"), KeyOrigin::Managed)]);
    assert_eq!((config.keys[1].weight, config.keys[1].key.expose()), (3, OTHER_KEY));
    // The overlay can be the only source of keys.
    let config = FakeMachine::without_key().file(OVERLAY, overlay).file(SPARE, OTHER_KEY).config();
    assert_eq!((config.keys.len(), config.key_source.to_string()), (1, OVERLAY.to_owned()));
}

#[test]
fn a_key_that_is_configured_twice_is_used_once_with_a_warning() {
    let overlay = "[[keys]]\nname = \"spare\"\nkey_file = \"keys/spare\"\n";
    let machine = FakeMachine::with_key().file(OVERLAY, overlay).file(SPARE, KEY);
    assert_eq!(machine.config().keys.len(), 1);
    let short = ApiKey::new(KEY).unwrap().short().to_string();
    machine.check_warnings(&[&format!("{OVERLAY}:3:12: key 2 is the same as key 1 ({short})")]);
}

#[test]
fn a_missing_key_file_is_an_error_with_its_position() {
    FakeMachine::with_key()
        .file(OVERLAY, "[[keys]]\nname = \"spare\"\nkey_file = \"keys/spare\"\n")
        .check_problems(&format!(
            "
{OVERLAY}:3:12: the file cannot be read: it does not exist
  3 | key_file = ***
    |            ^^^
    = a relative path starts at the directory of the configuration file
    = restore the file, or delete this entry"
        ));
}

#[test]
fn a_mistake_in_the_overlay_is_reported_like_one_in_the_file() {
    for (overlay, expected) in [
        ("[server]\n", "unknown field `server`"),
        ("generation = \"x\"\n", ":1:14: "),
        ("[[clients]]\nname = \"app\"\nquota = \"many\"\n", "is not a quota"),
        ("[[clients]]\nname = \"app\"\ntoken_sha256 = \"12\"\n", "this has 2 characters"),
        ("[[clients]]\nname = \"own\"\n", "is reserved"),
        ("[[paused_keys]]\nfingerprint = \"12\"\n", "not a fingerprint"),
        ("[[keys]]\nname = \"a\"\nkey_fil = \"b\"\n", "did you mean `key_file`?"),
    ] {
        let problems = FakeMachine::with_key().file(OVERLAY, overlay).resolve().unwrap_err().to_string();
        assert!(
            problems.contains(OVERLAY) && problems.contains(expected),
            "{expected:?} must be reported with the path of the overlay: {problems}"
        );
    }
}

#[test]
fn the_overlay_changes_clients_of_the_file_by_their_names() {
    let file = format!(
        "[[clients]]\nname = \"app\"\ntoken_sha256 = \"{0}\"\nquota = \"3 requests\"\n\
         [[clients]]\nname = \"web\"\ntoken_sha256 = \"{1}\"\n\
         [[clients]]\nname = \"old\"\ntoken_sha256 = \"{2}\"\n",
        token_sha256("app-1"),
        token_sha256("web-1"),
        token_sha256("old-1")
    );
    let overlay = format!(
        "[[clients]]\nname = \"app\"\ntoken_sha256 = \"{}\"\nexpires_at = \"2027-01-15T08:00:00Z\"\n\
         previous_token_sha256 = \"{}\"\nprevious_token_expires_at = \"2027-01-15T09:00:00Z\"\n\
         [[clients]]\nname = \"web\"\nmax_concurrent = 2\n\
         [[clients]]\nname = \"old\"\nrevoked = true\n\
         [[clients]]\nname = \"new\"\ntoken_sha256 = \"{}\"\n",
        token_sha256("app-2"),
        token_sha256("app-1"),
        token_sha256("new-1")
    );
    let config = FakeMachine::with_key().toml(&file).file(OVERLAY, &overlay).config();
    let names: Vec<_> = config.clients.iter().map(|client| (client.name.as_str(), client.origin)).collect();
    let (changed, managed) = (ClientOrigin::Changed, ClientOrigin::Managed);
    assert_eq!(names, [("app", changed), ("web", changed), ("new", managed)]);
    let app = &config.clients[0];
    assert_eq!(app.token, TokenFingerprint::new("app-2"));
    assert_eq!(app.expires_at, Some(UnixMs(1_800_000_000_000)));
    assert_eq!(app.previous_token, Some((TokenFingerprint::new("app-1"), UnixMs(1_800_003_600_000))));
    assert!(app.rules.quota.is_some(), "an entry without rules must keep the rules of the file");
    let web = &config.clients[1];
    assert_eq!((web.token, web.rules.max_concurrent), (TokenFingerprint::new("web-1"), Some(2)));
}

#[test]
fn revoking_the_last_client_of_an_exposed_address_is_a_mistake() {
    let file = format!(
        "[server]\nlisten = \"0.0.0.0:1\"\n[[clients]]\nname = \"app\"\ntoken_sha256 = \"{}\"\n",
        token_sha256("app-1")
    );
    let machine = FakeMachine::with_key().toml(&file);
    assert!(machine.resolve().is_ok());
    let overlay = "[[clients]]\nname = \"app\"\nrevoked = true\n";
    let problems = machine.file(OVERLAY, overlay).resolve().unwrap_err().to_string();
    assert!(problems.contains("open to other machines"), "the exposed address must be reported: {problems}");
}

#[test]
fn a_change_of_a_client_that_is_not_in_the_file_causes_a_warning() {
    FakeMachine::with_key().file(OVERLAY, "[[clients]]\nname = \"app\"\nmax_concurrent = 2\n").check_warnings(
        &[&format!(
            "{OVERLAY}:2:8: the client `app` is no longer in the configuration file, so that this entry has no \
             effect"
        )],
    );
}

#[test]
fn paused_keys_are_read_with_their_end_and_reason() {
    let fingerprint = ApiKey::new(KEY).unwrap().fingerprint();
    let overlay = format!(
        "[[paused_keys]]\nfingerprint = \"{fingerprint}\"\nshort_key = \"sk_...\"\n\
         since = \"2027-01-15T08:00:00Z\"\nuntil = \"2027-01-15T09:00:00Z\"\nreason = \"billing\"\n"
    );
    let config = FakeMachine::with_key().file(OVERLAY, &overlay).config();
    let paused = &config.paused_keys[0];
    assert_eq!(paused.fingerprint, fingerprint);
    assert_eq!((paused.since, paused.until), (UnixMs(1_800_000_000_000), Some(UnixMs(1_800_003_600_000))));
    assert_eq!(paused.reason.as_deref(), Some("billing"));
}

#[test]
fn without_a_database_file_no_overlay_is_read() {
    let mut machine = FakeMachine::with_key().file(OVERLAY, "[server]\n");
    assert!(machine.resolve().is_err());
    machine.is_ephemeral = true;
    assert!(machine.config().state_directory().is_none());
}

#[test]
fn the_admin_token_comes_from_the_first_source_that_has_one() {
    let token = |text: &str| Some(AdminTokenFingerprint::new(text));
    let state = format!("{STATE}/admin_token");
    let machine = FakeMachine::with_key().file(&state, "kca_of_the_state_directory\n");
    assert_eq!(machine.config().admin_token, token("kca_of_the_state_directory"));
    let machine = machine
        .variable("CREDENTIALS_DIRECTORY", "/creds")
        .file("/creds/admin_token", "kca_of_the_service_manager");
    assert_eq!(machine.config().admin_token, token("kca_of_the_service_manager"));
    let machine = machine.toml("[admin]\ntoken_file = \"admin\"\n").file("/etc/admin", "kca_of_the_file____");
    assert_eq!(machine.config().admin_token, token("kca_of_the_file____"));
    let machine = machine.variable("KEYCHOIR_ADMIN_TOKEN", "kca_of_the_environment");
    assert_eq!(machine.config().admin_token, token("kca_of_the_environment"));
    assert_eq!(FakeMachine::with_key().config().admin_token, None);
}

#[test]
fn a_short_admin_token_and_a_missing_file_are_mistakes() {
    let problems = |machine: FakeMachine<'_>| machine.resolve().unwrap_err().to_string();
    let short = problems(FakeMachine::with_key().variable("KEYCHOIR_ADMIN_TOKEN", "hunter2"));
    assert!(
        short.contains("at least 16") && !short.contains("hunter2"),
        "the minimum length must be reported without the token: {short}"
    );
    let missing = problems(FakeMachine::with_key().toml("[admin]\ntoken_file = \"none\"\n"));
    assert!(
        missing.contains("the file of the admin token cannot be read"),
        "the missing file must be reported: {missing}"
    );
}

#[test]
fn the_address_for_operators_is_not_one_for_clients() {
    let advice = "    = give one of them another port or path\n";
    for (toml, marks, address, other) in [
        ("\"127.0.0.1:11011\"", "^^^^^^^^^^^^^^^^^", "127.0.0.1:11011", "127.0.0.1:11011"),
        ("\"localhost:11011\"", "^^^^^^^^^^^^^^^^^", "localhost:11011", "127.0.0.1:11011"),
        ("\"0.0.0.0:11011\"", "^^^^^^^^^^^^^^^", "0.0.0.0:11011", "127.0.0.1:11011"),
    ] {
        FakeMachine::with_key().toml(&format!("[admin]\nlisten = {toml}\n")).check_problems(&format!(
            "/etc/k.toml:2:10: {address} and {other} of server.listen are the same address\n  2 | listen = {toml}\n    |          {marks}\n{advice}"
        ));
    }
    let socket = "[server]\nlisten = \"unix:/s\"\n[admin]\nlisten = \"unix:/s\"\n";
    let error = FakeMachine::with_key().toml(socket).resolve().unwrap_err().to_string();
    assert!(error.contains("are the same address"), "two equal Unix sockets must be reported: {error}");
    for address in ["\"127.0.0.1:11012\"", "\"unix:/run/k.sock\"", "\"\""] {
        let config = FakeMachine::with_key().toml(&format!("[admin]\nlisten = {address}\n")).config();
        assert_eq!(format!("\"{}\"", config.admin.listen), address);
    }
}

#[test]
fn mistakes_in_the_address_for_operators_are_reported() {
    for (listen, expected) in [
        ("systemd", "write HOST:PORT or unix:/PATH"),
        ("127.0.0.1", "has no port"),
        ("unix:k", "no absolute path"),
    ] {
        let toml = format!("[admin]\nlisten = \"{listen}\"\n");
        let problems = FakeMachine::with_key().toml(&toml).resolve().unwrap_err().to_string();
        assert!(problems.contains(expected), "{expected:?} must be reported for {listen}: {problems}");
    }
    // Without a state directory, no admin token is generated.
    let mut exposed = FakeMachine::with_key().toml("[admin]\nlisten = \"0.0.0.0:9\"\n");
    assert!(exposed.resolve().is_ok(), "the first start must generate a token");
    exposed.is_ephemeral = true;
    let error = exposed.resolve().unwrap_err().to_string();
    assert!(
        error.contains("0.0.0.0:9 is open to other machines, and there is no admin token"),
        "an exposed address without a token must be reported: {error}"
    );
    assert!(exposed.variable("KEYCHOIR_ADMIN_TOKEN", "kca_0123456789abcdef").resolve().is_ok());
}

//! Tests reloads of the configuration after a signal or a change of a file: keys, clients, the log level and the admin
//! token change without a restart, settings that need a restart are reported, and an invalid or unsafe configuration is
//! not applied.

use std::fs;
use std::io::Write;
use std::net::{TcpListener, TcpStream};

use super::environment::{
    FIRST_KEY, KeepAliveConnection, ProgramEnvironment, SECOND_KEY, THIRD_KEY, Traffic, assert_head_contains,
    new_client, request_count, request_speech, start_simulator,
};
use crate::support::program::Program;

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_added_and_removed_under_traffic_without_a_failed_request() {
    let simulator = start_simulator(&[FIRST_KEY, SECOND_KEY, THIRD_KEY]).await;
    let environment = ProgramEnvironment::new(&simulator.base_url());
    environment.configure(&[FIRST_KEY, SECOND_KEY], "");
    let (mut program, address) = environment.start();
    let mut traffic = Traffic::start(4, &address, &new_client());
    traffic.wait_for_responses(10).await;
    for (keys, added, removed) in [
        (&[SECOND_KEY] as &[&str], 0, 1),
        (&[THIRD_KEY, SECOND_KEY], 1, 0),
        (&[SECOND_KEY, THIRD_KEY, FIRST_KEY], 1, 0),
        (&[FIRST_KEY, SECOND_KEY, THIRD_KEY], 0, 0),
        (&[THIRD_KEY], 0, 2),
    ] {
        environment.configure(keys, "");
        program.send_signal("HUP");
        let event = program.wait_for_event("reloaded");
        let key_counts = (event["keys"].as_u64(), event["added"].as_u64(), event["removed"].as_u64());
        assert_eq!(key_counts, (Some(keys.len() as u64), Some(added), Some(removed)));
        traffic.wait_for_responses(10).await;
    }
    traffic.stop().await;
    let counts_before = [FIRST_KEY, SECOND_KEY, THIRD_KEY].map(|key| request_count(&simulator, key));
    assert_eq!(request_speech(&new_client(), &address).await, 200);
    let counts_after = [FIRST_KEY, SECOND_KEY, THIRD_KEY].map(|key| request_count(&simulator, key));
    assert_eq!(
        counts_after,
        [counts_before[0], counts_before[1], counts_before[2] + 1],
        "a removed key must receive no further request"
    );
    assert!(
        counts_before.iter().all(|&request_count| request_count > 0),
        "each key must have served requests: {counts_before:?}"
    );
    assert_eq!(program.terminate().0, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_keeps_its_state_after_a_reload() {
    let simulator = start_simulator(&[FIRST_KEY, SECOND_KEY]).await;
    simulator.set_fault(FIRST_KEY, Some("invalid".parse().unwrap()));
    let environment = ProgramEnvironment::new(&simulator.base_url());
    environment.configure(&[FIRST_KEY, SECOND_KEY], "");
    let (mut program, address) = environment.start();
    assert_eq!(request_speech(&new_client(), &address).await, 200);
    assert_eq!(request_count(&simulator, FIRST_KEY), 1);
    for keys in [[SECOND_KEY, FIRST_KEY], [FIRST_KEY, SECOND_KEY]] {
        environment.configure(&keys, "");
        program.send_signal("HUP");
        program.wait_for_event("reloaded");
        assert_eq!(request_speech(&new_client(), &address).await, 200);
    }
    assert_eq!(
        request_count(&simulator, FIRST_KEY),
        1,
        "a refused key must not be used again after its position changed"
    );
    assert_eq!(program.terminate().0, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_invalid_file_is_reported_and_not_applied() {
    let simulator = start_simulator(&[FIRST_KEY]).await;
    let environment = ProgramEnvironment::new(&simulator.base_url());
    environment.configure(&[FIRST_KEY], "");
    let (mut program, address) = environment.start();
    environment.configure(&[SECOND_KEY], "[pool]\nstrateggy = \"fill-first\"\n[log]\nlevel = \"loud\"\n");
    program.send_signal("HUP");
    for expected in ["keychoir.toml:2:1: unknown setting `strateggy`", "did you mean `strategy`", "`loud`"] {
        program.wait_for_line(|line| line.contains(expected).then_some(()));
    }
    program.wait_for_event("reload_failed");
    assert_eq!(request_speech(&new_client(), &address).await, 200);
    assert_eq!((request_count(&simulator, FIRST_KEY), request_count(&simulator, SECOND_KEY)), (1, 0));
    // A valid configuration is applied.
    environment.configure(&[FIRST_KEY], "");
    program.send_signal("HUP");
    program.wait_for_event("reloaded");
    let (code, stderr) = program.terminate();
    assert_eq!(code, Some(0));
    assert!(
        !stderr.contains(FIRST_KEY) && !stderr.contains(SECOND_KEY),
        "the log must contain no key: {stderr}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_are_reloaded_and_settings_that_need_a_restart_are_reported() {
    let simulator = start_simulator(&[FIRST_KEY]).await;
    let environment = ProgramEnvironment::new(&simulator.base_url());
    environment.configure(&[FIRST_KEY], "");
    let (mut program, address) = environment.start();
    assert_eq!(request_speech(&new_client(), &address).await, 200);
    let clients = "[[clients]]\nname = \"app\"\ntoken = \"a-token-of-the-test\"\n";
    environment.configure(
        &[FIRST_KEY],
        &format!("[server]\nmax_request_headers_size = \"8KiB\"\n[log]\nlevel = \"debug\"\n{clients}"),
    );
    program.send_signal("HUP");
    assert_eq!(program.wait_for_event("reload_incomplete")["settings"], "server.max_request_headers_size");
    assert_eq!(program.wait_for_event("reloaded")["clients"], 1);
    assert_eq!(request_speech(&new_client(), &address).await, 401);
    // The new log level is active: malformed HTTP is logged at `debug`.
    TcpStream::connect(&address).unwrap().write_all(b"\x16\x03\x01 no HTTP\r\n\r\n").unwrap();
    program.wait_for_line(|line| line.contains("a connection ended").then_some(()));
    assert_eq!(program.terminate().0, Some(0));
}

/// Requests a document of the admin API with the given `token`. Returns the status and the document.
async fn read_admin_api(address: &str, token: &str, path: &str) -> (u16, serde_json::Value) {
    let url = format!("http://{address}/api/keychoir/v1/{path}");
    let response = new_client().get(url).bearer_auth(token).send().await.unwrap();
    (response.status().as_u16(), response.json().await.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_that_need_a_restart_stay_in_force_for_every_key_and_are_pending() {
    let simulator = start_simulator(&[FIRST_KEY]).await;
    let (token, url) = ("a-token-of-the-operator", simulator.base_url());
    let environment = ProgramEnvironment::new(&url);
    fs::write(environment.path("token"), token).unwrap();
    let write_config = |settings: &str| {
        let text = format!(
            "{settings}\n[admin]\ntoken_file = \"token\"\n[[keys]]\nkey = \"{FIRST_KEY}\"\nbase_url = \"{url}\"\n"
        );
        fs::write(environment.path("keychoir.toml"), text).unwrap();
    };
    write_config("");
    let (mut program, address) = environment.start();
    write_config("[upstream]\nproxy = \"http://alice:hunter2@127.0.0.1:9\"\n[pool]\nmax_queued = 7");
    program.send_signal("HUP");
    assert_eq!(program.wait_for_event("reload_incomplete")["settings"], "upstream.proxy");
    program.wait_for_event("reloaded");
    assert_eq!(request_speech(&new_client(), &address).await, 200, "the key must not use the new proxy");
    let (status, document) = read_admin_api(&address, token, "config").await;
    assert_eq!(status, 200);
    let settings = document["settings"].as_array().unwrap();
    let setting = |name: &str| settings.iter().find(|setting| setting["name"] == name).unwrap();
    let proxy = setting("upstream.proxy");
    assert_eq!((&proxy["value"], &proxy["source"]), (&"\"\"".into(), &"default".into()));
    assert_eq!(proxy["pending"], "\"http://...@127.0.0.1:9\"");
    let max_queued = setting("pool.max_queued");
    assert_eq!((&max_queued["value"], max_queued.get("pending")), (&"7".into(), None));
    assert_eq!(program.terminate().0, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_admin_token_applies_at_the_reload() {
    let simulator = start_simulator(&[FIRST_KEY]).await;
    let environment = ProgramEnvironment::new(&simulator.base_url());
    let (old_token, new_token) = ("the-leaked-token-0001", "the-changed-token-0002");
    fs::write(environment.path("token"), old_token).unwrap();
    environment.configure(&[FIRST_KEY], "[admin]\ntoken_file = \"token\"");
    let (mut program, address) = environment.start();
    let generation = read_admin_api(&address, old_token, "overview").await.1["generation"].as_u64().unwrap();
    fs::write(environment.path("token"), new_token).unwrap();
    program.send_signal("HUP");
    program.wait_for_event("reloaded");
    assert_eq!(read_admin_api(&address, old_token, "overview").await.0, 401, "the old token must be refused");
    let (status, document) = read_admin_api(&address, new_token, "overview").await;
    assert_eq!((status, document["generation"].as_u64()), (200, Some(generation + 1)));
    assert_eq!(program.terminate().0, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_file_is_reloaded_without_a_signal() {
    let simulator = start_simulator(&[FIRST_KEY, SECOND_KEY]).await;
    let environment = ProgramEnvironment::new(&simulator.base_url());
    fs::write(environment.path("list"), FIRST_KEY).unwrap();
    fs::write(environment.path("keychoir.toml"), "").unwrap();
    let mut command = environment.command(&["--listen", "127.0.0.1:0"]);
    command
        .env("KEYCHOIR_SERVER__RELOAD_INTERVAL", "20ms")
        .env("ELEVENLABS_API_KEYS_FILE", environment.path("list"));
    let mut program = Program::start(&mut command);
    let address = program.wait_for_address();
    fs::write(environment.path("list"), format!("{SECOND_KEY}\n{FIRST_KEY}\n")).unwrap();
    assert_eq!(program.wait_for_event("reloaded")["added"], 1);
    assert_eq!(request_speech(&new_client(), &address).await, 200);
    assert_eq!(request_count(&simulator, SECOND_KEY), 1);
    assert_eq!(program.terminate().0, Some(0));
}

#[test]
fn a_reload_does_not_open_the_pool_to_other_machines() {
    let environment = ProgramEnvironment::new("http://127.0.0.1:9");
    environment.configure(&[FIRST_KEY], "[[clients]]\nname = \"app\"\ntoken = \"a-token-of-the-test\"\n");
    let socket = TcpListener::bind("0.0.0.0:0").unwrap();
    let port = socket.local_addr().unwrap().port();
    let mut program = Program::start(&mut environment.command_with_passed_socket(socket.into()));
    program.wait_for_address();
    environment.configure(&[FIRST_KEY], "");
    program.send_signal("HUP");
    let failure_event = program.wait_for_event("reload_failed");
    assert!(
        failure_event["message"].as_str().unwrap().contains("is open to other machines"),
        "the message of the event must contain `is open to other machines`: {failure_event}"
    );
    let (response, _) = KeepAliveConnection::open(&format!("127.0.0.1:{port}")).request("/v1/voices");
    assert_head_contains(&response, &["http/1.1 401", "x-keychoir-error: client_token_missing"]);
    assert_eq!(program.terminate().0, Some(0));
}

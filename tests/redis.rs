//! Tests connections to Redis and `keychoir check --online` with real Redis servers, sentinels and clusters. The tests
//! cover each kind of URL, TLS, the errors of unusable servers, the ACL permissions that Keychoir prints, published
//! messages, the response timeout, and the end of a connection.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test panics if an expectation fails"
)]

mod support;

use std::path::{Path, PathBuf};
use std::time::Duration;

use keychoir::app::AppConfig;
use keychoir::config::Config;
use keychoir::shared::{
    LinkSettings, Push, RedisConnectError, RedisEndpoint, RedisProbe, RedisProbeError, RedisRefusal,
    acl_setuser_command, probe,
};
use keychoir::tasks::Tasks;
use support::program::{keychoir_command, run, stderr};
use support::redis::{PASSWORD, RedisAuth, RedisCluster, RedisOptions, RedisServer, Sentinels, USER};
use tokio::net::TcpListener;

/// The connect and response timeouts for Redis. They are long, so that a busy machine does not exceed them.
const TEST_TIMEOUT: Duration = Duration::from_secs(20);

/// Returns the settings with which Keychoir connects to `url`.
fn settings(url: &str) -> LinkSettings {
    let mut config = Config::default();
    config.redis.url = url.parse().unwrap();
    config.redis.connect_timeout = TEST_TIMEOUT;
    config.redis.response_timeout = TEST_TIMEOUT;
    AppConfig::from_config(config).unwrap().redis.unwrap()
}

/// Returns the settings with which Keychoir connects to `url` and trusts the certificate authorities in `ca_file`.
fn settings_trusting(url: &str, ca_file: PathBuf) -> LinkSettings {
    LinkSettings { ca_file: Some(ca_file), ..settings(url) }
}

async fn start_with(auth: RedisAuth) -> RedisServer {
    RedisServer::start_with(RedisOptions { auth, ..RedisOptions::default() }).await
}

/// Opens a connection to `url` and closes it.
async fn open(url: &str) -> Result<(), RedisConnectError> {
    RedisEndpoint::new(&settings(url)).unwrap().open(&Tasks::new()).await.map(drop)
}

/// Checks that a probe succeeded, so that a replica can use the server. Returns its result.
#[track_caller]
fn check_usable(outcome: Result<RedisProbe, RedisProbeError>) -> RedisProbe {
    let probe = outcome.unwrap_or_else(|error| panic!("a replica must be able to use the server: {error}"));
    assert!(!probe.server.version.is_empty(), "the version must be known: {probe:?}");
    probe
}

/// Checks that a probe failed with the refusal `expected`, and that the error contains no password.
#[track_caller]
fn check_refused(outcome: Result<RedisProbe, RedisProbeError>, expected: RedisRefusal) {
    let error = outcome.expect_err("the probe must fail");
    let error_texts = format!("{error} {error:?}");
    assert!(
        !error_texts.contains(PASSWORD) && !error_texts.contains("wrong-canary"),
        "the error must contain no password: {error_texts}"
    );
    assert_eq!(error.refusal(), Some(&expected), "the error must contain the refusal: {error_texts}");
}

#[tokio::test]
async fn a_server_is_reached_by_tcp_and_by_its_unix_socket() {
    let server = RedisServer::start().await;
    check_usable(probe(&settings(&server.url())).await);
    check_usable(probe(&settings(&server.unix_url())).await);
    let url_with_name = server.url().replace("127.0.0.1", "localhost");
    let redis_probe = check_usable(probe(&settings(&url_with_name)).await);
    assert_eq!(redis_probe.server.address, format!("localhost:{}", server.port()));
    assert_eq!(redis_probe.server.product, "redis");
    let keys: Vec<String> = server.command(&["KEYS", "*"]);
    for key in keys {
        assert!(key.starts_with("{keychoir:default}:1:"), "{key} must belong to the pool");
        assert!(server.command::<i64>(&["PTTL", &key]) > 0, "{key} must expire");
    }
}

#[tokio::test]
async fn the_database_of_the_url_is_selected() {
    let server = RedisServer::start().await;
    for url in [format!("{}/3", server.url()), format!("{}?db=3", server.unix_url())] {
        let endpoint = RedisEndpoint::new(&settings(&url)).unwrap();
        let mut connection = endpoint.open(&Tasks::new()).await.unwrap();
        redis::cmd("SET").arg("a").arg(1).exec_async(&mut connection.commands).await.unwrap();
        let keyspace: String = server.command(&["INFO", "keyspace"]);
        assert!(
            keyspace.contains("db3:keys=1") && !keyspace.contains("db0"),
            "only database 3 must have keys: {keyspace}"
        );
    }
    check_refused(probe(&settings(&format!("{}/99", server.url()))).await, RedisRefusal::Database);
}

#[tokio::test]
async fn a_password_is_required_and_checked() {
    let server = start_with(RedisAuth::Password).await;
    check_usable(probe(&settings(&server.url())).await);
    check_usable(probe(&settings(&server.unix_url())).await);
    let address = format!("127.0.0.1:{}", server.port());
    check_refused(probe(&settings(&format!("redis://{address}"))).await, RedisRefusal::PasswordRequired);
    let wrong = format!("redis://:wrong-canary@{address}");
    check_refused(probe(&settings(&wrong)).await, RedisRefusal::WrongPassword);
    let wrong = format!("redis://unknown-user:{PASSWORD}@{address}");
    check_refused(probe(&settings(&wrong)).await, RedisRefusal::WrongPassword);
}

/// Returns the permissions in the command that Keychoir prints for `settings`.
fn printed_rules(settings: &LinkSettings) -> String {
    let command = acl_setuser_command(settings);
    command.strip_prefix("ACL SETUSER keychoir on >PASSWORD ").unwrap().to_owned()
}

#[tokio::test]
async fn the_printed_permissions_are_sufficient_and_none_is_superfluous() {
    let server = start_with(RedisAuth::AclUser("-@all".to_owned())).await;
    let settings = settings(&format!("{}/1", server.url()));
    let rules = printed_rules(&settings);
    let set_rules = |rules: &str| {
        let command = format!("ACL SETUSER {USER} reset on >{PASSWORD} {rules}");
        server.command::<()>(&command.split(' ').collect::<Vec<_>>());
    };
    set_rules(&rules);
    check_usable(probe(&settings).await);
    let permissions: Vec<&str> = rules.split(' ').filter(|rule| rule.starts_with(['+', '~', '&'])).collect();
    assert_eq!(permissions.len(), 20, "the command must contain 20 permissions: {rules}");
    for permission in permissions {
        set_rules(&rules.replacen(&format!(" {permission}"), "", 1));
        check_refused(probe(&settings).await, RedisRefusal::PermissionDenied);
    }
    set_rules(&rules);
    let other_settings = LinkSettings { pool: "other".parse().unwrap(), ..settings };
    check_refused(probe(&other_settings).await, RedisRefusal::PermissionDenied);
}

#[tokio::test]
async fn tls_requires_the_configured_certificate_authority() {
    let auth = RedisAuth::Password;
    let server =
        RedisServer::start_with(RedisOptions { auth, requires_tls: true, ..RedisOptions::default() }).await;
    let url = server.url();
    check_usable(probe(&settings_trusting(&url, server.ca_file())).await);
    let other_certificate = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let other_ca = directory.path().join("ca.pem");
    std::fs::write(&other_ca, other_certificate.cert.pem()).unwrap();
    let wrong_name = url.replace("localhost", "127.0.0.1");
    for settings in
        [settings(&url), settings_trusting(&url, other_ca), settings_trusting(&wrong_name, server.ca_file())]
    {
        let error = probe(&settings).await.expect_err("the certificate must be refused");
        assert!(
            matches!(error, RedisProbeError::Connect(RedisConnectError::Tls { .. })),
            "the TLS handshake must fail: {error}"
        );
    }
    // One side uses TLS and the other side does not. The error must suggest the right scheme of the URL.
    let plain = url.replace("rediss://", "redis://");
    let error = probe(&settings_trusting(&plain, server.ca_file())).await.unwrap_err();
    assert!(error.to_string().contains("write rediss://"), "the error must suggest TLS: {error}");
    let plain_server = RedisServer::start().await;
    let tls = plain_server.url().replace("redis://", "rediss://");
    // A server without TLS does not respond to the start of TLS, because it waits for the end of a command.
    let unanswered = LinkSettings { connect_timeout: Duration::from_millis(50), ..settings(&tls) };
    let error = probe(&unanswered).await.unwrap_err();
    assert!(
        error.to_string().contains("rediss:// for TLS only"),
        "the error must suggest a connection without TLS: {error}"
    );
    let error = probe(&settings_trusting(&url, directory.path().join("none"))).await.unwrap_err();
    assert!(matches!(error, RedisProbeError::Tls(_)), "the missing CA file must be reported: {error}");
}

#[tokio::test]
async fn an_error_names_the_server_that_cannot_be_reached() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let silent = LinkSettings {
        connect_timeout: Duration::from_millis(50),
        ..settings(&format!("redis://:wrong-canary@{address}"))
    };
    let error = probe(&silent).await.unwrap_err().to_string();
    assert!(
        error.contains(&format!("redis://{address} does not respond within 50 ms")),
        "the error must name the server: {error}"
    );
    assert!(!error.contains("canary"), "the error must not contain the password: {error}");
    // No program listens on this privileged port.
    let error = open("redis://127.0.0.1:1").await.unwrap_err();
    assert!(matches!(error, RedisConnectError::Unreachable { .. }), "no server must be reached: {error}");
    let error = open("unix:/nonexistent/redis.sock").await.unwrap_err();
    assert!(matches!(error, RedisConnectError::Unreachable { .. }), "no server must be reached: {error}");
    let error = open("redis://name.invalid").await.unwrap_err();
    assert!(matches!(error, RedisConnectError::Name { .. }), "the name must be unknown: {error}");
}

#[tokio::test]
async fn published_messages_are_received_until_the_server_ends() {
    let mut server = RedisServer::start().await;
    let endpoint = RedisEndpoint::new(&settings(&server.url())).unwrap();
    let tasks = Tasks::new();
    let mut connection = endpoint.open(&tasks).await.unwrap();
    connection.commands.subscribe("changes").await.unwrap();
    // Responses to commands and published messages use the same connection.
    server.command::<i64>(&["PUBLISH", "changes", "first"]);
    let pong: String = redis::cmd("PING").query_async(&mut connection.commands).await.unwrap();
    assert_eq!(pong, "PONG");
    server.command::<i64>(&["PUBLISH", "other", "not subscribed"]);
    server.command::<i64>(&["PUBLISH", "changes", "second"]);
    assert_eq!(connection.pushes.next().await, Some(Push::Message(b"first".to_vec())));
    assert_eq!(connection.pushes.next().await, Some(Push::Message(b"second".to_vec())));
    server.kill();
    assert_eq!(connection.pushes.next().await, None, "the end of the connection must be reported");
    let error = redis::cmd("PING").exec_async(&mut connection.commands).await.unwrap_err();
    assert_eq!(
        RedisRefusal::from_error(&error),
        None,
        "a closed connection must not be classified as a refusal: {error}"
    );
}

#[tokio::test]
async fn a_dropped_connection_is_closed_with_its_clones() {
    let server = RedisServer::start().await;
    let endpoint = RedisEndpoint::new(&settings(&server.url())).unwrap();
    let tasks = Tasks::new();
    let connection = endpoint.open(&tasks).await.unwrap();
    let mut clone = connection.commands.clone();
    drop(connection);
    let tasks_ended = tokio::time::timeout(TEST_TIMEOUT, tasks.wait_until_ended()).await;
    assert!(tasks_ended.is_ok(), "the task of the connection must end");
    assert!(
        redis::cmd("PING").exec_async(&mut clone).await.is_err(),
        "a clone must not keep the connection open"
    );
}

#[tokio::test]
async fn a_command_fails_after_its_timeout_if_the_server_does_not_respond() {
    let server = RedisServer::start().await;
    let settings = LinkSettings { response_timeout: Duration::from_millis(30), ..settings(&server.url()) };
    let mut connection = RedisEndpoint::new(&settings).unwrap().open(&Tasks::new()).await.unwrap();
    server.pause();
    let ping = redis::cmd("PING");
    let response = tokio::time::timeout(TEST_TIMEOUT, ping.exec_async(&mut connection.commands)).await;
    server.resume();
    let error = response.expect("the configured timeout must apply").unwrap_err();
    assert!(error.is_timeout(), "the error must be a timeout: {error}");
}

#[tokio::test]
async fn sentinels_name_the_master_before_and_after_a_failover() {
    let mut sentinels = Sentinels::start().await;
    let mut addresses = sentinels.addresses();
    let master = addresses[0].clone();
    // The first of the addresses belongs to a sentinel that is down.
    addresses.insert(0, "127.0.0.1:1".to_owned());
    let url = format!("redis+sentinel://{}/keychoir", addresses.join(","));
    let redis_probe = check_usable(probe(&settings(&url)).await);
    assert_eq!(redis_probe.server.address, format!("127.0.0.1:{}", sentinels.master().port()));
    let old_port = sentinels.master().port();
    sentinels.fail_over().await;
    let redis_probe = check_usable(probe(&settings(&url)).await);
    assert_ne!(sentinels.master().port(), old_port);
    assert_eq!(redis_probe.server.address, format!("127.0.0.1:{}", sentinels.master().port()));
    let replica_url = format!("redis://127.0.0.1:{old_port}");
    sentinels.restart_replica().await;
    check_refused(probe(&settings(&replica_url)).await, RedisRefusal::ReadOnly);
    check_refused(probe(&settings(&format!("redis://{master}"))).await, RedisRefusal::Sentinel);
    let error = open(&format!("redis+sentinel://{}/other", addresses.join(","))).await.unwrap_err();
    assert!(matches!(error, RedisConnectError::UnknownMaster { .. }), "the master must be unknown: {error}");
    let error = open("redis+sentinel://127.0.0.1:1/keychoir").await.unwrap_err();
    assert!(matches!(error, RedisConnectError::NoSentinel(_)), "no sentinel must be reached: {error}");
    let server = sentinels.master().url();
    let error =
        open(&format!("{}/keychoir", server.replace("redis://", "redis+sentinel://"))).await.unwrap_err();
    assert!(error.to_string().contains("is not a sentinel"), "the wrong server must be reported: {error}");
    for address in sentinels.addresses() {
        let client = redis::Client::open(format!("redis://{address}")).unwrap();
        let mut rule = redis::cmd("ACL");
        rule.arg(&["SETUSER", "default", "resetpass", ">sentinel-canary"]);
        rule.exec(&mut client.get_connection().unwrap()).unwrap();
    }
    let error = open(&url).await.unwrap_err().to_string();
    assert!(
        error.contains("is a sentinel that requires a password"),
        "the password of the sentinel must be reported: {error}"
    );
}

#[tokio::test]
async fn every_node_of_a_cluster_redirects_to_the_node_of_the_pool() {
    let cluster = RedisCluster::start(3).await;
    let owner = &cluster.nodes[cluster.owner_of("{keychoir:default}:1:check")];
    for node in &cluster.nodes {
        let redis_probe = check_usable(probe(&settings(&node.url())).await);
        assert_eq!(redis_probe.server.address, format!("127.0.0.1:{}", owner.port()));
    }
    check_refused(probe(&settings(&format!("{}/1", owner.url()))).await, RedisRefusal::Database);
}

/// Runs `keychoir check --online` with the Redis URL `url` and a provider that cannot be reached.
fn run_online_check(home: &Path, url: &str) -> std::process::Output {
    let mut command = keychoir_command(&["check", "--online"]);
    command
        .env("HOME", home)
        .env("ELEVENLABS_API_KEYS", "sk_key_of_the_redis_tests_0000000000001")
        .env("KEYCHOIR_SERVER__LISTEN", "127.0.0.1:0")
        .env("KEYCHOIR_UPSTREAM__BASE_URL", "http://127.0.0.1:9")
        .env("KEYCHOIR_REDIS__RESPONSE_TIMEOUT", "10s")
        .env("KEYCHOIR_REDIS__URL", url);
    run(&mut command)
}

#[tokio::test]
async fn an_online_check_tries_redis_and_prints_the_permissions() {
    let home = tempfile::tempdir().unwrap();
    let server = start_with(RedisAuth::AclUser("~* &* +@all -hset".to_owned())).await;
    let redis_findings = |url: &str| {
        let output = run_online_check(home.path(), url);
        let printed = String::from_utf8(output.stdout.clone()).unwrap() + &stderr(&output);
        assert!(
            !printed.contains(PASSWORD) && !printed.contains("wrong-canary"),
            "the output must contain no password: {printed}"
        );
        printed
            .lines()
            .filter(|line| line.contains("  redis     "))
            .map(|line| line.to_owned() + "\n")
            .collect::<String>()
    };
    let denied_output = redis_findings(&server.url());
    assert!(
        denied_output.starts_with("problem") && denied_output.contains("ACL SETUSER keychoir on >PASSWORD"),
        "the check must report the missing permission: {denied_output}"
    );
    server.command::<()>(&["ACL", "SETUSER", USER, "+hset"]);
    let allowed_output = redis_findings(&server.url());
    assert!(
        allowed_output.contains("accepts the pool default"),
        "the check must accept the user: {allowed_output}"
    );
    assert!(
        allowed_output.contains("ok       redis     a user with these permissions suffices: ACL SETUSER"),
        "the check must print sufficient permissions: {allowed_output}"
    );
    let wrong_output = redis_findings(&format!("redis://:wrong-canary@127.0.0.1:{}", server.port()));
    assert!(
        wrong_output.starts_with("problem") && wrong_output.contains("refuses the user or the password"),
        "the check must report the wrong password: {wrong_output}"
    );
    let absent_output = redis_findings("");
    assert!(
        absent_output.starts_with("ok") && absent_output.contains("no Redis is configured"),
        "the check must succeed without Redis: {absent_output}"
    );
}

//! Tests the modules of `tests/support` with which other tests run replicas: real Redis servers, which can be killed,
//! paused and monitored, clusters and sentinels, a forwarder that delays bytes, and several programs whose usage
//! records are compared with the provider's ledger.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::disallowed_methods,
    reason = "a test panics if an expectation fails"
)]

mod support;

use std::time::Duration;

use keychoir::clock;
use keychoir::simulator::Plan;
use support::redis::{PASSWORD, RedisAuth, RedisCluster, RedisOptions, RedisServer, Sentinels, USER};
use support::replicas::TestReplicas;
use support::slow_forwarder::SlowForwarder;
use support::{FIRST_KEY, SECOND_KEY};

/// Opens a connection to Redis. A paused server accepts it and does not respond, so opening has a timeout.
fn connect(url: &str) -> redis::RedisResult<redis::Connection> {
    redis::Client::open(url).unwrap().get_connection_with_timeout(Duration::from_secs(10))
}

fn get(url: &str, key: &str) -> redis::RedisResult<Option<String>> {
    redis::cmd("GET").arg(key).query(&mut connect(url)?)
}

#[tokio::test]
async fn a_restarted_server_has_the_same_port_and_no_data() {
    let mut server = RedisServer::start().await;
    let url = server.url();
    server.command::<()>(&["SET", "a", "1"]);
    assert_eq!(get(&url, "a").unwrap().as_deref(), Some("1"), "the port must belong to the server");
    server.kill();
    assert!(connect(&url).is_err(), "a killed server must refuse connections");
    server.restart().await;
    assert_eq!(get(&url, "a").unwrap(), None, "a restart must lose the data");
    server.command::<()>(&["SET", "a", "2"]);
    server.flush();
    assert_eq!(get(&url, "a").unwrap(), None, "a flush must delete the data");
}

#[tokio::test]
async fn a_paused_server_responds_after_it_is_resumed() {
    let server = RedisServer::start().await;
    server.pause();
    let client = redis::Client::open(server.url()).unwrap();
    let timeout = Duration::from_millis(50);
    assert!(client.get_connection_with_timeout(timeout).is_err(), "a paused server must not respond");
    server.resume();
    assert_eq!(get(&server.url(), "a").unwrap(), None, "a resumed server must respond");
}

#[tokio::test]
async fn a_server_requires_the_credentials_of_its_url() {
    let server =
        RedisServer::start_with(RedisOptions { auth: RedisAuth::Password, ..RedisOptions::default() }).await;
    assert!(get(&server.url(), "a").is_ok(), "the password of the URL must be accepted");
    let open_url = format!("redis://127.0.0.1:{}", server.port());
    assert!(get(&open_url, "a").is_err(), "a client without the password must be refused");

    let auth = RedisAuth::AclUser("~{keychoir:* +get".to_owned());
    let server = RedisServer::start_with(RedisOptions { auth, ..RedisOptions::default() }).await;
    assert!(server.url().starts_with(&format!("redis://{USER}:{PASSWORD}@")));
    assert!(get(&server.url(), "{keychoir:default}").is_ok(), "the permitted key must be readable");
    assert!(get(&server.url(), "other").is_err(), "other keys must be refused");
}

#[tokio::test]
async fn a_server_with_tls_refuses_plain_connections() {
    let options = RedisOptions { requires_tls: true, ..RedisOptions::default() };
    let server = RedisServer::start_with(options).await;
    let plain_url = server.url().replace("rediss://", "redis://");
    assert!(get(&plain_url, "a").is_err(), "a plain connection must be refused");
    let output = std::process::Command::new("redis-cli")
        .args(["--tls", "--cacert"])
        .arg(server.ca_file())
        .args(["-h", "localhost", "-p", &server.port().to_string(), "PING"])
        .output()
        .unwrap();
    assert_eq!(output.stdout, b"PONG\n", "a client with TLS must get a response: {output:?}");
}

#[tokio::test]
async fn the_monitor_receives_the_commands_of_clients_and_scripts() {
    let server = RedisServer::start().await;
    let mut monitor = server.monitor();
    let commands_before = server.commands_processed();
    let script = "return redis.call('SET', KEYS[1], ARGV[1])";
    server.command::<()>(&["EVAL", script, "1", "a-key", "a-value"]);
    let commands = monitor.read_commands();
    assert!(
        commands.contains("a-value") && commands.contains("lua] \"SET\" \"a-key\""),
        "the monitor must receive both commands: {commands}"
    );
    assert!(!monitor.read_commands().contains("a-value"), "each command must be returned once");
    assert!(server.commands_processed() > commands_before, "the commands must be counted");
    assert_eq!((server.calls("eval"), server.calls("hset")), (1, 0));
}

#[tokio::test]
async fn a_cluster_redirects_to_the_owner_of_a_key() {
    let cluster = RedisCluster::start(3).await;
    let key = "{keychoir:default}:1:replicas";
    let owner = cluster.owner_of(key);
    for (index, node) in cluster.nodes.iter().enumerate() {
        match get(&node.url(), key) {
            Ok(content) => {
                assert_eq!((index, content), (owner, None), "only the owner may execute the command")
            }
            Err(error) => {
                let is_redirection = error.kind() == redis::ServerErrorKind::Moved.into();
                assert!(
                    index != owner && is_redirection,
                    "the other nodes must redirect the command: {error}"
                );
            }
        }
    }
}

#[tokio::test]
async fn the_sentinels_name_the_new_master_after_each_failover() {
    let mut sentinels = Sentinels::start().await;
    let first_port = sentinels.master().port();
    sentinels.fail_over().await;
    assert_ne!(sentinels.master().port(), first_port);
    sentinels.master().command::<()>(&["SET", "a", "1"]);
    sentinels.restart_replica().await;
    sentinels.fail_over().await;
    assert_eq!(sentinels.master().port(), first_port);
    assert_eq!(sentinels.url().matches("127.0.0.1:").count(), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_forwarder_delays_both_directions() {
    let server = RedisServer::start().await;
    let delay = Duration::from_millis(100);
    let forwarder = SlowForwarder::start(server.port(), delay).await;
    let url = format!("redis://{}", forwarder.address());
    let ping = move || {
        let started_at = clock::instant();
        redis::cmd("PING").exec(&mut connect(&url).unwrap()).unwrap();
        clock::elapsed_since(started_at)
    };
    let duration = keychoir::tasks::spawn_blocking(ping.clone()).await.unwrap();
    assert!(duration >= 2 * delay, "a command must take at least twice the delay: {duration:?}");
    forwarder.set_delay(Duration::ZERO);
    keychoir::tasks::spawn_blocking(ping).await.unwrap();
}

#[tokio::test]
async fn the_usage_records_of_all_replicas_have_the_credits_of_the_ledger() {
    let plan = Plan::with_keys([(FIRST_KEY, 10_000), (SECOND_KEY, 10_000)]);
    let mut replicas = TestReplicas::start(2, plan, None).await;
    for _ in 0..4 {
        assert_eq!(replicas.request_speech(10).await.status(), 200);
    }
    replicas.kill(1);
    for _ in 0..2 {
        assert_eq!(
            replicas.request_speech(10).await.status(),
            200,
            "a running replica must serve the request"
        );
    }
    replicas.restart(1);
    let mut statuses = Vec::new();
    for replica in 0..2 {
        statuses.push(replicas.document(replica, "/readyz").await["status"].clone());
    }
    assert_eq!(statuses, ["ready", "ready"]);
    let results = replicas.close_unchecked().await;
    assert_eq!(results.ledger.totals.charged, 60);
    assert_eq!(
        results.records[0].len(),
        4,
        "the first replica must serve 2 of the first 4 requests, and both later ones"
    );

    let replicas = TestReplicas::start(2, Plan::with_keys([(FIRST_KEY, 10_000)]), None).await;
    for _ in 0..4 {
        assert_eq!(replicas.request_speech(10).await.status(), 200);
    }
    let results = replicas.close().await;
    assert_eq!(
        (results.credits_of(FIRST_KEY), results.records[0].len(), results.records[1].len()),
        (40, 2, 2)
    );
}

//! Tests that the proxy disconnects clients that read their responses too slowly or not at all, so that they do not
//! hold the concurrency slots of an account. A session whose client does not read ends as well, and a client that reads
//! fast enough receives its whole response.

use std::time::Duration;

use keychoir::app::{self, AppConfig, DrainOutcome, RunningApp};
use keychoir::config::{BaseUrl, Config};
use keychoir::policy::min_rate::MinRate;
use keychoir::secret::ApiKey;
use keychoir::simulator::{KeyPlan, Plan, Simulator, WorkspacePlan};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::websocket::{STREAM_INPUT, handshake_at, within_timeout};
use crate::support::{FIRST_KEY, SPEECH_PATH, bind_loopback, join_all};

/// The length of a text whose speech is ten minutes of audio, far more than the socket buffers hold.
const CHARACTERS: usize = 9_000;

/// Starts a proxy for one account with a concurrency limit of three. It disconnects clients that read less
/// than `min_rate` bytes per second.
async fn start_proxy_with_min_rate(min_rate: u32) -> (Simulator, RunningApp) {
    let workspace = WorkspacePlan { max_concurrent: Some(3), ..WorkspacePlan::new("ws", 10_000_000) };
    let key = KeyPlan { workspace: Some("ws".to_owned()), ..KeyPlan::new(FIRST_KEY, 10_000_000) };
    let plan = Plan::with_keys([]).with_workspace(workspace).with_key(key);
    let simulator = Simulator::start(bind_loopback().await, plan).await.unwrap();
    let base_url = simulator.base_url().parse::<BaseUrl>().unwrap();
    let mut config = Config::with_defaults(vec![ApiKey::new(FIRST_KEY).unwrap()], base_url);
    config.server.drain_idle_timeout = Duration::ZERO;
    let mut app_config = AppConfig::from_config(config).unwrap();
    app_config.server.min_response_rate = MinRate { bytes_per_second: min_rate };
    app_config.server.response_grace = Duration::from_millis(200);
    let mut app = app::start(app_config, vec![bind_loopback().await.into()]).unwrap();
    assert!(app.wait_for_first_poll(Duration::from_secs(30)).await, "the first quota poll must end");
    (simulator, app)
}

/// Requests a long speech and reads only the first bytes of the response.
async fn start_long_speech(app: &RunningApp) -> TcpStream {
    let mut stream = TcpStream::connect(app.address()).await.unwrap();
    let body = json!({"text": "a".repeat(CHARACTERS), "model_id": "eleven_multilingual_v2"}).to_string();
    let head =
        format!("POST {SPEECH_PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n", body.len());
    stream.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
    let mut status = [0; 12];
    within_timeout(stream.read_exact(&mut status)).await.unwrap();
    assert_eq!(&status, b"HTTP/1.1 200");
    stream
}

/// Requests a short speech. Returns the status of the response.
async fn request_short_speech(app: &RunningApp) -> u16 {
    let url = format!("http://{}{SPEECH_PATH}", app.address());
    let client = keychoir::upstream::http_client().unwrap().build().unwrap();
    let body = json!({"text": "Hello", "model_id": "eleven_multilingual_v2"});
    within_timeout(client.post(url).json(&body).send()).await.unwrap().status().as_u16()
}

#[tokio::test]
async fn clients_that_read_slowly_or_never_release_their_slots() {
    let (simulator, app) = start_proxy_with_min_rate(1024 * 1024).await;
    let mut slow_clients =
        [start_long_speech(&app).await, start_long_speech(&app).await, start_long_speech(&app).await];
    let [_, _, slow_reader] = &mut slow_clients;
    let read_slowly = async {
        // Data that is already buffered is readable after the disconnect.
        while slow_reader.read_u8().await.is_ok() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let other_clients = join_all((0..6).map(|_| request_short_speech(&app)));
    let statuses = tokio::select! {
        statuses = other_clients => statuses,
        () = read_slowly => panic!("the other clients must be served before the slow reader is disconnected"),
    };
    assert_eq!(statuses, [200; 6]);
    drop(slow_clients);
    assert_eq!(app.drain(Duration::from_secs(10)).await, DrainOutcome::Completed);
    simulator.stop().await;
}

#[tokio::test]
async fn a_client_that_reads_fast_enough_receives_the_whole_response() {
    // Even a client on a busy machine reads far faster than this rate.
    let (simulator, app) = start_proxy_with_min_rate(16 * 1024).await;
    let mut stream = start_long_speech(&app).await;
    let mut received_bytes = 0;
    let mut buffer = vec![0; 64 * 1024];
    while received_bytes < 8_000_000 {
        let read_bytes = within_timeout(stream.read(&mut buffer)).await.unwrap();
        assert_ne!(read_bytes, 0, "the client must not be disconnected after {received_bytes} bytes");
        received_bytes += read_bytes;
    }
    drop(stream);
    assert_eq!(app.drain(Duration::from_secs(10)).await, DrainOutcome::Completed);
    simulator.stop().await;
}

#[tokio::test]
async fn a_session_ends_if_its_client_does_not_read() {
    let (simulator, app) = start_proxy_with_min_rate(1024 * 1024).await;
    let mut session =
        handshake_at(app.address(), STREAM_INPUT, &[]).await.expect("the handshake must be accepted");
    for _ in 0..20 {
        session.send_json(&json!({"text": "a".repeat(500), "try_trigger_generation": true})).await;
    }
    let url = format!("http://{}/metrics", app.address());
    let client = keychoir::upstream::http_client().unwrap().build().unwrap();
    let session_ended = async {
        loop {
            let page = client.get(&url).send().await.unwrap().text().await.unwrap();
            let sessions = page.lines().filter(|line| line.starts_with("keychoir_websocket_sessions{"));
            if sessions.filter_map(|line| line.rsplit_once(' ')).all(|(_, sessions)| sessions == "0") {
                break;
            }
        }
    };
    within_timeout(session_ended).await;
    drop(session);
    assert_eq!(app.drain(Duration::from_secs(10)).await, DrainOutcome::Completed);
    simulator.stop().await;
}

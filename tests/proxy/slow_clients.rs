//! Clients that do not read their responses hold the slots of an account for a bounded time only.

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

/// Ten minutes of audio: far more than the system buffers of a response.
const CHARACTERS: usize = 9_000;

/// One account with a concurrency limit of three. A client that reads less than a mebibyte per
/// second is cut soon.
async fn three_places(rate: u32) -> (Simulator, RunningApp) {
    let workspace = WorkspacePlan { concurrency_max: Some(3), ..WorkspacePlan::new("narrow", 10_000_000) };
    let key = KeyPlan { workspace: Some("narrow".to_owned()), ..KeyPlan::new(FIRST_KEY, 10_000_000) };
    let plan = Plan::of([]).with_workspace(workspace).with_key(key);
    let simulator = Simulator::start(bind_loopback().await, plan).await.unwrap();
    let base_url = simulator.base_url().parse::<BaseUrl>().unwrap();
    let mut config = Config::with_defaults(vec![ApiKey::new(FIRST_KEY).unwrap()], base_url);
    config.server.drain_idle_timeout = Duration::ZERO;
    let mut parts = AppConfig::from_config(config).unwrap();
    parts.server.min_response_rate = MinRate { bytes_per_second: rate };
    parts.server.response_grace = Duration::from_millis(200);
    let mut running = app::start(parts, vec![bind_loopback().await.into()]).unwrap();
    assert!(running.wait_for_first_poll(Duration::from_secs(30)).await);
    (simulator, running)
}

/// A client that has requested a long speech, and has received the head.
async fn asked(running: &RunningApp) -> TcpStream {
    let mut stream = TcpStream::connect(running.address()).await.unwrap();
    let body = json!({"text": "a".repeat(CHARACTERS), "model_id": "eleven_multilingual_v2"}).to_string();
    let head =
        format!("POST {SPEECH_PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n", body.len());
    stream.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
    let mut status = [0; 12];
    within_timeout(stream.read_exact(&mut status)).await.unwrap();
    assert_eq!(&status, b"HTTP/1.1 200");
    stream
}

/// The status of a short speech request.
async fn spoken(running: &RunningApp) -> u16 {
    let url = format!("http://{}{SPEECH_PATH}", running.address());
    let client = keychoir::upstream::http_client().unwrap().build().unwrap();
    let body = json!({"text": "Hello", "model_id": "eleven_multilingual_v2"});
    within_timeout(client.post(url).json(&body).send()).await.unwrap().status().as_u16()
}

#[tokio::test]
async fn clients_that_do_not_read_or_trickle_hold_no_permit_for_long() {
    let (simulator, running) = three_places(1024 * 1024).await;
    let mut slow = [asked(&running).await, asked(&running).await, asked(&running).await];
    let [_, _, trickling] = &mut slow;
    let trickle = async {
        // Reads until it is cut: data on its way may come first.
        while trickling.read_u8().await.is_ok() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let good = join_all((0..6).map(|_| spoken(&running)));
    let served = tokio::select! {
        served = good => served,
        () = trickle => panic!("it was cut and nobody else was served"),
    };
    assert_eq!(served, [200; 6]);
    drop(slow);
    assert_eq!(running.drain(Duration::from_secs(10)).await, DrainOutcome::Completed);
    simulator.stop().await;
}

#[tokio::test]
async fn a_client_that_reads_is_served_to_its_end() {
    let (simulator, running) = three_places(1024 * 1024).await;
    let mut slow = asked(&running).await;
    let mut bytes = 0;
    let mut piece = vec![0; 64 * 1024];
    while bytes < 8_000_000 {
        let read = within_timeout(slow.read(&mut piece)).await.unwrap();
        assert_ne!(read, 0, "it was cut after {bytes} bytes");
        bytes += read;
    }
    drop(slow);
    assert_eq!(running.drain(Duration::from_secs(10)).await, DrainOutcome::Completed);
    simulator.stop().await;
}

#[tokio::test]
async fn a_session_whose_client_does_not_read_ends() {
    let (simulator, running) = three_places(1024 * 1024).await;
    let mut session = handshake_at(running.address(), STREAM_INPUT, &[]).await.expect("an open socket");
    for _ in 0..20 {
        session.send_json(&json!({"text": "a".repeat(500), "try_trigger_generation": true})).await;
    }
    let url = format!("http://{}/metrics", running.address());
    let client = keychoir::upstream::http_client().unwrap().build().unwrap();
    let ended = async {
        loop {
            let page = client.get(&url).send().await.unwrap().text().await.unwrap();
            let open = page.lines().filter(|line| line.starts_with("keychoir_websocket_sessions{"));
            if open.filter_map(|line| line.rsplit_once(' ')).all(|(_, open)| open == "0") {
                break;
            }
        }
    };
    within_timeout(ended).await;
    drop(session);
    assert_eq!(running.drain(Duration::from_secs(10)).await, DrainOutcome::Completed);
    simulator.stop().await;
}

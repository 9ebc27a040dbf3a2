//! Tests scripted faults on WebSockets: refused handshakes, delays, refusals, messages and breaks in sessions. Also
//! tests that another process can set such a fault.

use std::io::Read;

use super::sockets::*;
use super::*;
use crate::simulator::{Fault, RefusalKind};
use serde_json::json;
use tokio_tungstenite::tungstenite::{Error, Message};

/// Opens an echo session with the given fault.
async fn connect_with_fault(simulator: &Simulator, fault: &str) -> SocketClient {
    simulator.queue_faults("sk", vec![fault.parse().unwrap()]);
    connect(simulator, ECHO, "sk").await
}

/// Checks that a message is echoed.
async fn check_echo(client: &mut SocketClient, text: &str) {
    client.send(Message::text(text)).await;
    assert_eq!(client.receive_text().await, text);
}

#[tokio::test]
async fn a_handshake_can_be_refused_over_http() {
    let simulator = start_with_keys("sk=100").await;
    simulator.queue_faults(
        "sk",
        vec![
            Fault::EarlyRefuse(RefusalKind::Quota),
            Fault::Gzip(RefusalKind::Maintenance),
            Fault::EarlyRefuse(RefusalKind::Page(403)),
        ],
    );
    let refusal = try_connect(&simulator, SPEECH, &[("xi-api-key", "sk")]).await.err().unwrap();
    assert_eq!(
        (refusal.status, refusal.headers["content-type"].to_str().unwrap()),
        (401, "application/json")
    );
    let compressed_response = try_connect(&simulator, SPEECH, &[("xi-api-key", "sk")]).await.err().unwrap();
    assert_eq!(
        (compressed_response.status, compressed_response.headers["content-encoding"].to_str().unwrap()),
        (503, "gzip")
    );
    let mut text = String::new();
    let _partly = flate2::read::GzDecoder::new(compressed_response.body.as_slice()).read_to_string(&mut text);
    let page = try_connect(&simulator, SPEECH, &[("xi-api-key", "sk")]).await.err().unwrap();
    assert_eq!((page.status, page.headers["content-type"].to_str().unwrap()), (403, "text/html"));
    let ledger = simulator.ledger();
    assert_eq!((ledger.totals.refused, ledger.totals.sockets_open), (3, 0));
    assert!(ledger.requests.iter().all(|request| request.socket.is_none()));
}

#[tokio::test]
async fn a_handshake_can_have_no_response() {
    let simulator = start_with_keys("sk=100").await;
    simulator.queue_faults("sk", vec![Fault::CloseUnread, Fault::CloseBeforeHead, Fault::SlowHead { ms: 5 }]);
    for _ in 0..2 {
        assert_eq!(try_connect(&simulator, ECHO, &[("xi-api-key", "sk")]).await.err().unwrap().status, 0);
    }
    assert_eq!(wait_until(&simulator, |ledger| ledger.totals.in_flight == 0).await.totals.unanswered, 2);
    check_echo(&mut connect(&simulator, ECHO, "sk").await, "a").await;
}

#[tokio::test]
async fn a_session_can_close_after_a_number_of_messages() {
    let simulator = start_with_keys("sk=100").await;
    let mut client = connect_with_fault(&simulator, "after=2:close=1011/an inner error").await;
    check_echo(&mut client, "a").await;
    check_echo(&mut client, "b").await;
    assert_eq!(client.receive_close().await, (1_011, "an inner error".to_owned()));
    let (_, socket) = ended_session(&simulator).await;
    assert_eq!((socket.messages_sent, socket.close_sent.unwrap().code), (2, 1_011));
    let mut client = connect_with_fault(&simulator, "close=4000").await;
    assert_eq!(client.receive_close().await, (4_000, String::new()));
    let mut client = connect_with_fault(&simulator, r#"last=1008/{"error":"x"}"#).await;
    assert_eq!(client.receive_json().await["error"], "x");
    assert_eq!(client.receive_close().await, (1_008, String::new()));
}

#[tokio::test]
async fn a_session_can_be_refused_in_the_middle() {
    let simulator = start_with_keys("sk=1000").await;
    simulator.queue_faults("sk", vec!["after=2:quota".parse().unwrap()]);
    let mut client = connect(&simulator, &format!("{SPEECH}?output_format=ulaw_8000"), "sk").await;
    client.send_json(json!({ "text": "x".repeat(500), "flush": true })).await;
    let (messages, close) = client.receive_all().await;
    assert_eq!((messages.len(), close.0), (3, 1_008));
    assert!(messages[1]["audio"].is_string());
    assert_eq!(messages[2]["error"], "quota_exceeded");
    let (request, socket) = ended_session(&simulator).await;
    assert_eq!(
        (request.charged, socket.messages_sent, simulator.ledger().workspaces[0].running),
        (100, 2, 0)
    );
}

#[tokio::test]
async fn a_session_can_be_refused_after_bytes_of_the_client() {
    let simulator = start_with_keys("sk=100").await;
    let mut client = connect_with_fault(&simulator, "mid=10:rate_limit").await;
    check_echo(&mut client, "123456789").await;
    client.send(Message::text("0")).await;
    assert_eq!(client.receive_json().await["error"], "rate_limit_exceeded");
    assert_eq!(client.receive_close().await.0, 1_008);
}

#[tokio::test]
async fn a_session_can_break_without_a_close_frame() {
    let simulator = start_with_keys("sk=100").await;
    let mut client = connect_with_fault(&simulator, "after=1:cut").await;
    check_echo(&mut client, "a").await;
    let error = client.receive_break().await;
    assert!(matches!(error, Error::Protocol(_)), "no close frame must arrive: {error:?}");
    drop(client);
    assert_eq!(ended_session(&simulator).await.1.close_sent, None);
    let mut client = connect_with_fault(&simulator, "after=1:reset").await;
    client.send(Message::text("a")).await;
    // A reset may overtake data that was sent before it.
    let error = match client.next().await {
        Some(Ok(Message::Text(_))) => client.receive_break().await,
        Some(Err(error)) => error,
        other => panic!("a text message or an error must arrive: {other:?}"),
    };
    assert!(matches!(error, Error::Io(_)), "the connection must be reset: {error:?}");
    let mut client = connect_with_fault(&simulator, "after=0:cut").await;
    client.receive_break().await;
}

#[tokio::test]
async fn a_session_can_break_after_a_number_of_bytes() {
    let simulator = start_with_keys("sk=100").await;
    // The frame of a message with ten bytes has a head of two bytes.
    for (bytes, whole_messages) in [(0, 0), (1, 0), (11, 0), (12, 1), (13, 1), (23, 1), (24, 2)] {
        let mut client = connect_with_fault(&simulator, &format!("cut={bytes}")).await;
        for _ in 0..whole_messages {
            check_echo(&mut client, "0123456789").await;
        }
        if bytes > 12 * whole_messages && bytes > 0 {
            client.send(Message::text("0123456789")).await;
        }
        client.receive_break().await;
        drop(client);
        ended_session(&simulator).await;
    }
}

#[tokio::test]
async fn a_session_can_send_another_message_or_stall() {
    let simulator = start_with_keys("sk=100").await;
    let mut client = connect_with_fault(&simulator, r#"after=1:say={"message_type":"queue_overflow"}"#).await;
    check_echo(&mut client, "a").await;
    assert_eq!(client.receive_text().await, r#"{"message_type":"queue_overflow"}"#);
    check_echo(&mut client, "b").await;
    drop(client);
    ended_session(&simulator).await;

    let mut client = connect_with_fault(&simulator, "after=1:stall").await;
    check_echo(&mut client, "a").await;
    client.send(Message::text("b")).await;
    // The message is read and has no reply.
    let ledger = wait_until(&simulator, |ledger| {
        ledger.requests.last().unwrap().socket.as_ref().unwrap().text_messages == 2
    })
    .await;
    assert_eq!(ledger.requests.last().unwrap().socket.as_ref().unwrap().messages_sent, 1);
    drop(client);
    ended_session(&simulator).await;
}

#[tokio::test]
async fn a_delayed_session_equals_a_session_without_delay() {
    let simulator = start_with_keys("sk=100").await;
    for fault in ["stall=5ms", "slow_body=5ms", "slow_head=5ms", "pass"] {
        let mut client = connect_with_fault(&simulator, fault).await;
        check_echo(&mut client, "a").await;
        check_echo(&mut client, "b").await;
    }
    // A client that disconnects from a stalled session is detected immediately.
    let client = connect_with_fault(&simulator, "stall=600s").await;
    drop(client);
    ended_session(&simulator).await;
}

#[tokio::test]
async fn a_fault_of_sessions_does_not_affect_requests() {
    let simulator = start_with_keys("sk=100").await;
    simulator.queue_faults("sk", vec!["after=1:cut".parse().unwrap(), "close=1011".parse().unwrap()]);
    for _ in 0..2 {
        assert_eq!(speech_call("a").key("sk").send_to(&simulator).await.status, 200);
    }
}

#[tokio::test]
async fn another_process_can_set_faults_and_read_the_ledger() {
    let simulator = start_with_keys("sk=100").await;
    let request = json!({ "key": "sk", "next": ["after=1:close=1011/gone"] });
    assert_eq!(post("/_simulator/faults", request.to_string()).send_to(&simulator).await.status, 200);
    let mut client = connect(&simulator, ECHO, "sk").await;
    check_echo(&mut client, "a").await;
    assert_eq!(client.receive_close().await.0, 1_011);
    ended_session(&simulator).await;
    let ledger = get("/_simulator/ledger").send_to(&simulator).await.json();
    let socket = &ledger["requests"][0]["socket"];
    assert_eq!((&socket["close_sent"]["code"], &socket["is_open"]), (&json!(1_011), &json!(false)));
    assert_eq!(serde_json::from_value::<crate::simulator::Ledger>(ledger).unwrap(), simulator.ledger());
}

/// The test reads the bytes of the TCP connection, because a WebSocket client does not report a part of a frame.
#[tokio::test]
async fn exactly_the_given_bytes_arrive_before_the_break() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let simulator = start_with_keys("sk=100").await;
    for bytes in [0_usize, 1, 2, 100] {
        simulator.queue_faults("sk", vec![Fault::CutAfter { bytes: bytes.try_into().unwrap() }]);
        let mut stream = TcpStream::connect(simulator.address()).await.unwrap();
        let head = "GET /v1/speech-to-text/realtime HTTP/1.1\r\nhost: simulator\r\nxi-api-key: sk\r\n\
            connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n\
            sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut response = Vec::new();
        tokio::time::timeout(RESPONSE_TIMEOUT, stream.read_to_end(&mut response))
            .await
            .expect("the connection must end in time")
            .unwrap();
        let head_end = response.windows(4).position(|window| window == b"\r\n\r\n").unwrap() + 4;
        let head = String::from_utf8_lossy(&response[..head_end]).to_lowercase();
        // The key and its reply are the example of RFC 6455.
        assert!(
            head.contains("sec-websocket-accept: s3pplmbitxaq9kygzzhzrbk+xoo="),
            "the handshake must be accepted: {head}"
        );
        assert_eq!(response.len() - head_end, bytes);
    }
}

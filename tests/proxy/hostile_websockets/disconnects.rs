//! Tests that the proxy detects a client that disconnects or closes its session while the proxy connects it to an
//! account: during the handshake, after the first message, in the queue for a key, and during a failover.

use super::*;

/// The end of a session by the client.
#[derive(Clone, Copy, Debug)]
enum ClientEnd {
    /// Closes the connection without a close frame.
    Drop,
    /// Sends a close frame and waits for the reply.
    Close,
    /// Sends a close frame after a message that exceeds the read buffer of the proxy.
    CloseAfterData(usize),
}

const CLIENT_ENDS: [ClientEnd; 3] = [ClientEnd::Drop, ClientEnd::Close, ClientEnd::CloseAfterData(40_000)];

async fn end_session(mut session: WebSocketClient, client_end: ClientEnd) {
    if let ClientEnd::CloseAfterData(bytes) = client_end {
        session.send_json(&json!({"text": "x".repeat(bytes)})).await;
    }
    match client_end {
        ClientEnd::Drop => drop(session),
        ClientEnd::Close | ClientEnd::CloseAfterData(_) => {
            session.send_raw(&encode_frame(CLOSE, b"\x03\xe8", Some(MASK))).await;
            assert_close_code(
                &session.receive_to_end().await.1,
                1000,
                "the proxy must reply to the close frame",
            );
        }
    }
}

#[tokio::test]
async fn a_client_disconnect_during_failover_is_detected() {
    for client_end in CLIENT_ENDS {
        let mut provider = Provider::start().await;
        let proxy = provider.start_proxy(|_| {}).await;
        let (mut session, mut first) = provider.open_session(&proxy, STREAM_INPUT).await;
        session.send_json(&json!({"text": "Hello. "})).await;
        let refusal = encode_frame(CLOSE, b"\x03\xf0This request exceeds your quota.", None);
        first.write_all(&refusal).await.unwrap();
        // The provider never responds to the handshake with the second key.
        let (second, _) = provider.next_handshake().await;
        end_session(session, client_end).await;
        read_until_end(second).await;
        let verdicts = recorded_verdicts(proxy).await;
        assert_eq!(
            verdicts,
            ["workspace_quota", "client_closed"],
            "{client_end:?}: the provider must refuse the first attempt, and the client must close the second one"
        );
    }
}

#[tokio::test]
async fn a_client_disconnect_in_the_queue_is_detected() {
    for is_failing_over in [false, true] {
        for client_end in CLIENT_ENDS {
            let plan = if is_failing_over {
                plan_with_one_slot_per_key(&[FIRST_KEY, SECOND_KEY])
            } else {
                plan_with_one_slot_per_key(&[SECOND_KEY])
            };
            let proxy =
                start_proxy_with(plan, |config| config.pool.queue_timeout = Duration::from_secs(3_600)).await;
            // Another request holds the only slot of the second key.
            if is_failing_over {
                proxy.set_fault(FIRST_KEY, "forbidden");
            }
            proxy.set_fault(SECOND_KEY, "slow_body=600000");
            let _response = proxy.request_speech(200).await;
            proxy.set_fault(FIRST_KEY, "quota");
            let mut session = open_session(&proxy, STREAM_INPUT).await;
            session.send_json(&json!({"text": "Hello. "})).await;
            crate::support::wait_until(|| proxy.app.queued_requests() == 1).await;
            end_session(session, client_end).await;
            crate::support::wait_until(|| proxy.app.queued_requests() == 0).await;
        }
    }
}

#[tokio::test]
async fn a_client_disconnect_after_the_first_message_is_detected() {
    for client_end in CLIENT_ENDS {
        let mut provider = Provider::start().await;
        let proxy = provider.start_proxy(|config| configure_client(config, Rules::default())).await;
        let mut session = handshake(&proxy, STREAM_INPUT, &[]).await.unwrap();
        session.send_json(&json!({"text": " ", "xi_api_key": CLIENT_TOKEN})).await;
        let (stream, _) = provider.next_handshake().await;
        end_session(session, client_end).await;
        read_until_end(stream).await;
        let verdicts = recorded_verdicts(proxy).await;
        assert_eq!(verdicts, ["client_closed"], "{client_end:?}: the attempt must end with the client");
    }
}

#[tokio::test]
async fn a_client_disconnect_during_the_handshake_is_detected() {
    let mut provider = Provider::start().await;
    let proxy = provider.start_proxy(|_| {}).await;
    let stream = tokio::select! {
        biased;
        _ = open_session(&proxy, STREAM_INPUT) => panic!("the session must not open before its handshake is accepted"),
        (stream, _) = provider.next_handshake() => stream,
    };
    read_until_end(stream).await;
    assert_eq!(proxy.into_records().await[0].verdict, "client_closed");
}

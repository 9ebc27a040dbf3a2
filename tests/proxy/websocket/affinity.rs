//! Tests account affinity of sessions: a session that uses a token or a signed URL of the provider is sent to the
//! account that issued it, and a request for a conversation is sent to the account that served its session. With
//! `websocket.signed_url_base`, signed URLs refer to the proxy.

use keychoir::simulator::Plan;
use serde_json::{Value, json};

use super::{has_audio, normal_close, sessions, three_keys};
use crate::support::websocket::{AGENT, DIALOGUE, STREAM_INPUT, handshake, open_session};
use crate::support::{FIRST_KEY, SECOND_KEY, VOICE_ID, start_proxy, start_proxy_with};

#[tokio::test]
async fn a_token_of_the_provider_is_used_with_the_account_that_issued_it() {
    let proxy = start_proxy(Plan::with_keys([(FIRST_KEY, 100_000), (SECOND_KEY, 100_000)])).await;
    // The second key issues the token, because the first key is refused.
    proxy.set_fault(FIRST_KEY, "forbidden");
    let token_response = proxy.post("/v1/single-use-token/tts_websocket", &json!({})).await;
    let token: Value = token_response.json().await.unwrap();
    let token = token["token"].as_str().unwrap().to_owned();
    proxy.simulator.set_fault(FIRST_KEY, None);
    let mut session = open_session(&proxy, &format!("{STREAM_INPUT}?single_use_token={token}")).await;
    let (messages, end) = session.synthesize(&["Hello. "]).await;
    assert!(has_audio(&messages), "the messages must contain audio: {messages:?} {end:?}");
    let (request, socket) = sessions(&proxy).pop().unwrap();
    assert!(request.path_and_query.contains("single_use_token="));
    assert_eq!((request.key.as_deref(), socket.payer.as_deref()), (Some(SECOND_KEY), Some(SECOND_KEY)));
    proxy.close_unchecked().await;
}

#[tokio::test]
async fn a_conversation_belongs_to_the_account_that_served_it() {
    let proxy = start_proxy(three_keys()).await;
    proxy.set_fault(FIRST_KEY, "quota");
    let mut session = open_session(&proxy, AGENT).await;
    let start = session.receive_json().await;
    let id = start["conversation_initiation_metadata_event"]["conversation_id"].as_str().unwrap().to_owned();
    session.close().await;
    drop(session);
    proxy.simulator.set_fault(FIRST_KEY, None);
    let conversation = proxy.get(&format!("/v1/convai/conversations/{id}")).await;
    assert_eq!(conversation.status(), 200);
    proxy.close_unchecked().await;
}

#[tokio::test]
async fn a_signed_url_refers_to_the_proxy_if_a_base_is_configured() {
    for base in [None, Some("wss://localhost:11011")] {
        let proxy =
            start_proxy_with(Plan::with_keys([(FIRST_KEY, 100_000), (SECOND_KEY, 100_000)]), |config| {
                config.websocket.signed_url_base = base.unwrap_or_default().parse().unwrap();
            })
            .await;
        // The second key signs the URL, because the first key is refused.
        proxy.set_fault(FIRST_KEY, "forbidden");
        let response = proxy.get("/v1/convai/conversation/get-signed-url?agent_id=agent_public").await;
        let response: Value = response.json().await.unwrap();
        let url = response["signed_url"].as_str().unwrap();
        assert_eq!(
            url.starts_with("wss://localhost:11011/v1/convai/conversation?"),
            base.is_some(),
            "the URL must refer to the proxy only if a base is configured: {url}"
        );
        proxy.simulator.set_fault(FIRST_KEY, None);
        // A session with the signed URL is sent to the account that signed it.
        let path = &url[url.find("/v1/").unwrap()..];
        let mut session = handshake(&proxy, path, &[]).await.unwrap();
        assert_eq!(session.receive_json().await["type"], "conversation_initiation_metadata");
        let (request, _) = sessions(&proxy).pop().unwrap();
        assert_eq!(request.key.as_deref(), Some(SECOND_KEY));
        drop(session);
        proxy.close_unchecked().await;
    }
}

#[tokio::test]
async fn a_resource_in_the_first_message_pins_the_session_to_its_account() {
    let proxy = start_proxy(Plan::with_keys([(FIRST_KEY, 100_000), (SECOND_KEY, 100_000)])).await;
    // The second key issues the token, because the first key is refused.
    proxy.set_fault(FIRST_KEY, "forbidden");
    let token_response = proxy.post("/v1/single-use-token/tts_websocket", &json!({})).await;
    let token: Value = token_response.json().await.unwrap();
    proxy.simulator.set_fault(FIRST_KEY, None);
    let mut session = open_session(&proxy, &format!("{DIALOGUE}?model_id=eleven_v3")).await;
    session.send_json(&json!({"voices": [VOICE_ID], "single_use_token": token["token"]})).await;
    session.send_json(&json!({"inputs": [{"text": "Hello.", "voice_id": VOICE_ID}]})).await;
    session.send_json(&json!({"close_socket": true})).await;
    let (messages, end) = session.receive_to_end().await;
    assert!(has_audio(&messages), "the messages must contain audio: {messages:?}");
    assert_eq!(end, normal_close());
    drop(session);
    let keys: Vec<_> =
        sessions(&proxy).into_iter().map(|(request, socket)| (request.key, socket.messages.len())).collect();
    assert_eq!(keys, [(Some(FIRST_KEY.to_owned()), 0), (Some(SECOND_KEY.to_owned()), 3)]);
    proxy.close_unchecked().await;
}

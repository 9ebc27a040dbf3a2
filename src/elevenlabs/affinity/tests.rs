//! Tests each row of the table of resources: its identifiers must be found in a response, and in a later request that
//! names them. The other tests cover resources without an owner, literals, spellings, values that are not identifiers,
//! and the ownership of responses. A property test checks that no input panics.

use serde_json::{Value, json};

use super::super::endpoint::lookup;
use super::*;

/// The identifier in every example. It must be found with the kind of the row.
const ID: &str = "Xb7hH8MSUJpSbSDYk0k2";

#[track_caller]
fn check_path(path: &str, kind: ResourceKind) {
    let identifiers = RequestIdentifiers::parse(path, None);
    assert!(
        identifiers.path.contains(&Identifier::new(kind, ID)),
        "{path} must contain an identifier of a {}",
        kind.as_str()
    );
}

#[track_caller]
fn check_query(path: &str, query: &str, kind: ResourceKind) {
    assert_eq!(
        RequestIdentifiers::parse(path, Some(query)).others,
        [Identifier::new(kind, ID)],
        "{path}?{query} must contain one identifier"
    );
}

#[track_caller]
fn check_body(body: Value, kind: ResourceKind) {
    let identifiers = identifiers_in_document(body.to_string().as_bytes());
    assert!(
        identifiers.contains(&Identifier::new(kind, ID)),
        "{body} must contain an identifier of a {}",
        kind.as_str()
    );
}

#[track_caller]
fn check_response(method: &str, path: &str, response: Value, kind: ResourceKind) {
    let method = Method::from_bytes(method.as_bytes()).unwrap();
    let route = lookup(&method, path).unwrap().route;
    let ownership = response_ownership(&method, &route);
    assert_ne!(ownership, ResponseOwnership::None, "{method} {path} must have an owner");
    let identifiers = identifiers_in_response(&method, &route, path, response.to_string().as_bytes());
    assert!(
        identifiers.contains(&Identifier::new(kind, ID)),
        "the response to {method} {path} must contain an identifier of a {}: {identifiers:?}",
        kind.as_str()
    );
}

#[track_caller]
fn check_header(name: &'static str, kind: ResourceKind) {
    let mut headers = HeaderMap::new();
    headers.insert(name, ID.parse().unwrap());
    assert_eq!(identifiers_in_headers(&headers), [Identifier::new(kind, ID)]);
}

/// Returns the check of each row with the name of its resource.
fn row_checks() -> Vec<(&'static str, fn())> {
    vec![
        ("voice", check_voice_row),
        ("voice sample", check_sample_row),
        ("voice preview", check_preview_row),
        ("voice collection", check_collection_row),
        ("history item", check_history_item_row),
        ("request (stitching)", check_request_row),
        ("pronunciation dictionary", check_dictionary_row),
        ("dubbing", check_dubbing_row),
        ("studio project", check_studio_row),
        ("audio native", check_audio_native_row),
        ("transcript", check_transcript_row),
        ("asset / flow", check_asset_and_flow_row),
        ("music", check_music_row),
        ("agent", check_agent_row),
        ("conversation", check_conversation_row),
        ("phone number", check_phone_number_row),
        ("knowledge base", check_knowledge_base_row),
        ("tool / MCP server / secret / env var / test", check_tools_row),
        ("batch call", check_batch_row),
        ("speech engine", check_speech_engine_row),
        ("productions", check_productions_row),
        ("workspace webhook / service account / key / group", check_webhook_row),
        ("single-use token", check_token_row),
        ("signed URL", check_signed_url_row),
        ("list cursor", check_cursor_row),
    ]
}

#[test]
fn every_row_of_the_table_is_checked() {
    let row_checks = row_checks();
    let rows: Vec<&str> = rows().map(|row| row.resource).collect();
    assert_eq!(row_checks.iter().map(|(row, _)| *row).collect::<Vec<_>>(), rows);
    for (_, check_row) in row_checks {
        check_row();
    }
}

fn check_voice_row() {
    let voice = ResourceKind::Voice;
    for path in ["/v1/voices/add", "/v1/voices/pvc", "/v1/text-to-voice", "/v1/voices/add/someone/something"]
    {
        check_response("POST", path, json!({ "voice_id": ID, "requires_verification": false }), voice);
    }
    for list in ["/v1/voices", "/v2/voices"] {
        check_response("GET", list, json!({ "voices": [{ "voice_id": ID, "category": "cloned" }] }), voice);
    }
    for path in ["voices", "voices/pvc", "text-to-speech", "speech-to-speech", "voice-changer"] {
        for suffix in
            ["", "/stream", "/stream/with-timestamps", "/settings", "/stream-input", "/multi-stream-input"]
        {
            check_path(&format!("/v1/{path}/{ID}{suffix}"), voice);
        }
    }
    check_path(&format!("/v1/text-to-voice/{ID}/remix"), voice);
    check_query("/v2/voices", &format!("voice_ids={ID}"), voice);
    check_query("/v1/history", &format!("page_size=3&voice_id={ID}"), voice);
    check_body(json!({ "inputs": [{ "text": "a", "voice_id": ID }] }), voice);
    for field in ["default_title_voice_id", "default_paragraph_voice_id", "host_voice_id", "voice_id"] {
        check_body(json!({ field: ID }), voice);
    }
    check_body(json!({ "mode": { "conversation": { "host_voice_id": "x", "guest_voice_id": ID } } }), voice);
    check_body(json!({ "conversation_config": { "tts": { "voice_id": ID } } }), voice);
    check_body(
        json!({ "conversation_config": { "tts": { "supported_voices": [{ "voice_id": ID }] } } }),
        voice,
    );
    check_body(json!({ "voices": ["x", ID] }), voice);
}

fn check_sample_row() {
    let sample = ResourceKind::Sample;
    check_response("POST", "/v1/voices/pvc/x1/samples", json!([{ "sample_id": ID }]), sample);
    check_response("GET", "/v1/voices", json!({ "voices": [{ "samples": [{ "sample_id": ID }] }] }), sample);
    check_path(&format!("/v1/voices/x1/samples/{ID}/audio"), sample);
    check_path(&format!("/v1/voices/pvc/x1/samples/{ID}/speakers"), sample);
}

fn check_preview_row() {
    let preview = ResourceKind::Preview;
    for path in ["design", "create-previews", "x1/remix"] {
        let response = json!({ "previews": [{ "audio_base_64": "", "generated_voice_id": ID }], "text": "" });
        check_response("POST", &format!("/v1/text-to-voice/{path}"), response, preview);
    }
    check_path(&format!("/v1/text-to-voice/{ID}/stream"), preview);
    check_body(json!({ "generated_voice_id": ID, "voice_name": "x" }), preview);
    check_body(json!({ "played_not_selected_voice_ids": ["x", ID] }), preview);
    check_body(json!({ "remixing_session_id": ID }), preview);
}

fn check_collection_row() {
    let collection = ResourceKind::Collection;
    check_response("POST", "/v1/voices/collections", json!({ "collection_id": ID }), collection);
    check_path(&format!("/v1/voices/collections/{ID}"), collection);
    check_query("/v2/voices", &format!("collection_id={ID}"), collection);
}

fn check_history_item_row() {
    let item = ResourceKind::HistoryItem;
    check_header("history-item-id", item);
    check_response("GET", "/v1/history", json!({ "history": [{ "history_item_id": ID }] }), item);
    check_response("GET", "/v1/history", json!({ "history": [], "last_history_item_id": ID }), item);
    check_path(&format!("/v1/history/{ID}"), item);
    check_path(&format!("/v1/history/{ID}/audio"), item);
    check_body(json!({ "history_item_ids": ["x", ID] }), item);
    check_query("/v1/history", &format!("start_after_history_item_id={ID}"), item);
}

fn check_request_row() {
    check_header("request-id", ResourceKind::Request);
    check_body(json!({ "text": "a", "previous_request_ids": ["x", "y", ID] }), ResourceKind::Request);
    check_body(json!({ "text": "a", "next_request_ids": [ID] }), ResourceKind::Request);
}

fn check_dictionary_row() {
    let dictionary = ResourceKind::Dictionary;
    for path in ["add-from-file", "add-from-rules", "x1/add-rules", "x1/remove-rules", "x1/set-rules"] {
        let path = format!("/v1/pronunciation-dictionaries/{path}");
        check_response("POST", &path, json!({ "id": ID, "name": "x" }), dictionary);
        check_response("POST", &path, json!({ "id": "x", "version_id": ID }), dictionary);
    }
    let list = json!({ "pronunciation_dictionaries": [{ "id": ID, "latest_version_id": "x" }] });
    check_response("GET", "/v1/pronunciation-dictionaries", list, dictionary);
    check_path(&format!("/v1/pronunciation-dictionaries/{ID}"), dictionary);
    check_path(&format!("/v1/pronunciation-dictionaries/{ID}/set-rules"), dictionary);
    check_path(&format!("/v1/pronunciation-dictionaries/x1/{ID}/download"), dictionary);
    for field in ["pronunciation_dictionary_id", "version_id"] {
        check_body(json!({ "pronunciation_dictionary_locators": [{ field: ID }] }), dictionary);
    }
}

fn check_dubbing_row() {
    check_response(
        "POST",
        "/v1/dubbing",
        json!({ "dubbing_id": ID, "expected_duration_sec": 1.0 }),
        ResourceKind::Dubbing,
    );
    check_response("POST", "/v1/dubbing/project", json!({ "project_id": ID }), ResourceKind::Project);
    check_response("GET", "/v1/dubbing", json!({ "dubs": [{ "dubbing_id": ID }] }), ResourceKind::Dubbing);
    for suffix in ["", "/audio/de", "/transcripts/de/format/srt"] {
        check_path(&format!("/v1/dubbing/{ID}{suffix}"), ResourceKind::Dubbing);
    }
    check_path(&format!("/v1/dubbing/resource/{ID}/speaker/x1/segment"), ResourceKind::Dubbing);
    check_path(&format!("/v1/dubbing/project/{ID}/language/x1"), ResourceKind::Project);
}

fn check_studio_row() {
    for path in ["projects", "podcasts"] {
        let response = json!({ "project": { "project_id": ID, "state": "creating" } });
        check_response("POST", &format!("/v1/studio/{path}"), response, ResourceKind::Project);
    }
    let chapter = json!({ "chapter": { "chapter_id": ID } });
    check_response("POST", "/v1/studio/projects/x1/chapters", chapter, ResourceKind::Chapter);
    let snapshots = json!({ "snapshots": [{ "project_snapshot_id": ID }] });
    check_response("GET", "/v1/studio/projects/x1/snapshots", snapshots, ResourceKind::Snapshot);
    let snapshots = json!({ "snapshots": [{ "chapter_snapshot_id": ID }] });
    check_response("GET", "/v1/studio/projects/x1/chapters/x2/snapshots", snapshots, ResourceKind::Snapshot);
    check_response(
        "GET",
        "/v1/studio/projects",
        json!({ "projects": [{ "project_id": ID }] }),
        ResourceKind::Project,
    );
    check_path(&format!("/v1/studio/projects/{ID}/content"), ResourceKind::Project);
    check_path(&format!("/v1/studio/projects/x1/chapters/{ID}/convert"), ResourceKind::Chapter);
    check_path(&format!("/v1/studio/projects/x1/snapshots/{ID}/archive"), ResourceKind::Snapshot);
    check_path(&format!("/v1/studio/projects/x1/chapters/x2/snapshots/{ID}/stream"), ResourceKind::Snapshot);
}

fn check_audio_native_row() {
    check_response(
        "POST",
        "/v1/audio-native",
        json!({ "project_id": ID, "converting": false }),
        ResourceKind::Project,
    );
    check_path(&format!("/v1/audio-native/{ID}/settings"), ResourceKind::Project);
}

fn check_transcript_row() {
    let response = json!({ "text": "a", "words": [], "transcription_id": ID });
    check_response("POST", "/v1/speech-to-text", response, ResourceKind::Transcript);
    let response = json!({ "message": "a", "request_id": "x", "transcription_id": ID });
    check_response("POST", "/v1/speech-to-text", response, ResourceKind::Transcript);
    check_path(&format!("/v1/speech-to-text/transcripts/{ID}"), ResourceKind::Transcript);
    check_body(json!({ "webhook_id": ID }), ResourceKind::Webhook);
}

fn check_asset_and_flow_row() {
    check_response("POST", "/v1/assets", json!({ "asset_id": ID }), ResourceKind::Asset);
    check_path(&format!("/v1/assets/{ID}"), ResourceKind::Asset);
    check_body(json!({ "images": [{ "asset_id": ID }] }), ResourceKind::Asset);
    for flow in ["image", "video", "text-to-speech"] {
        check_response("POST", &format!("/v1/flows/{flow}"), json!({ "id": ID }), ResourceKind::Flow);
        check_path(&format!("/v1/flows/{flow}/{ID}"), ResourceKind::Flow);
    }
    check_body(json!({ "start_frame": { "generation_id": ID } }), ResourceKind::Flow);
}

fn check_music_row() {
    check_header("song-id", ResourceKind::Song);
    check_response("POST", "/v1/music/upload", json!({ "song_id": ID }), ResourceKind::Song);
    check_response("POST", "/v1/music/finetunes", json!({ "id": ID }), ResourceKind::Finetune);
    check_body(
        json!({ "composition_plan": { "sections": [{ "source_from": { "song_id": ID } }] } }),
        ResourceKind::Song,
    );
    check_body(json!({ "finetune_id": ID }), ResourceKind::Finetune);
    check_body(json!({ "stem_variation_id": ID }), ResourceKind::Song);
    check_path(&format!("/v1/music/finetunes/{ID}"), ResourceKind::Finetune);
}

fn check_agent_row() {
    for path in ["create", "x1/duplicate"] {
        check_response(
            "POST",
            &format!("/v1/convai/agents/{path}"),
            json!({ "agent_id": ID }),
            ResourceKind::Agent,
        );
    }
    check_response(
        "POST",
        "/v1/convai/agents/x1/branches",
        json!({ "created_branch_id": ID }),
        ResourceKind::Branch,
    );
    check_response(
        "GET",
        "/v1/convai/agents",
        json!({ "agents": [{ "agent_id": ID }] }),
        ResourceKind::Agent,
    );
    check_path(&format!("/v1/convai/agents/{ID}/link"), ResourceKind::Agent);
    check_path(&format!("/v1/convai/agents/x1/branches/{ID}"), ResourceKind::Branch);
    check_path(&format!("/v1/convai/agents/x1/versions/{ID}"), ResourceKind::Branch);
    for path in ["get-signed-url", "get_signed_url", "token", ""] {
        check_query(
            &format!("/v1/convai/conversation/{path}"),
            &format!("agent_id={ID}"),
            ResourceKind::Agent,
        );
    }
    check_body(json!({ "agent_id": ID, "to_number": "x" }), ResourceKind::Agent);
}

fn check_conversation_row() {
    let conversation = ResourceKind::Conversation;
    for carrier in ["twilio", "sip-trunk", "exotel", "whatsapp"] {
        let path = format!("/v1/convai/{carrier}/outbound-call");
        check_response("POST", &path, json!({ "success": true, "conversation_id": ID }), conversation);
    }
    check_response(
        "GET",
        "/v1/convai/conversation/token",
        json!({ "token": "x", "conversation_id": ID }),
        conversation,
    );
    check_response(
        "GET",
        "/v1/convai/conversations",
        json!({ "conversations": [{ "conversation_id": ID }] }),
        conversation,
    );
    for suffix in ["", "/audio", "/monitor", "/files/x1"] {
        check_path(&format!("/v1/convai/conversations/{ID}{suffix}"), conversation);
    }
}

fn check_phone_number_row() {
    check_response(
        "POST",
        "/v1/convai/phone-numbers",
        json!({ "phone_number_id": ID }),
        ResourceKind::PhoneNumber,
    );
    check_response(
        "GET",
        "/v1/convai/phone-numbers",
        json!([{ "phone_number_id": ID }]),
        ResourceKind::PhoneNumber,
    );
    check_path(&format!("/v1/convai/phone-numbers/{ID}"), ResourceKind::PhoneNumber);
    check_body(json!({ "agent_phone_number_id": ID }), ResourceKind::PhoneNumber);
}

fn check_knowledge_base_row() {
    for path in ["", "/file", "/url", "/text", "/folder"] {
        check_response(
            "POST",
            &format!("/v1/convai/knowledge-base{path}"),
            json!({ "id": ID }),
            ResourceKind::Document,
        );
    }
    check_response(
        "GET",
        "/v1/convai/knowledge-base",
        json!({ "documents": [{ "id": ID }] }),
        ResourceKind::Document,
    );
    check_path(&format!("/v1/convai/knowledge-base/{ID}/content"), ResourceKind::Document);
    let prompt = json!({ "knowledge_base": [{ "type": "file", "id": ID }] });
    check_body(json!({ "conversation_config": { "agent": { "prompt": prompt } } }), ResourceKind::Document);
}

fn check_tools_row() {
    for (root, field, kind) in [
        ("tools", "id", ResourceKind::Tool),
        ("mcp-servers", "id", ResourceKind::McpServer),
        ("secrets", "secret_id", ResourceKind::Secret),
        ("environment-variables", "id", ResourceKind::Variable),
        ("agent-testing/create", "id", ResourceKind::Test),
    ] {
        check_response("POST", &format!("/v1/convai/{root}"), json!({ field: ID }), kind);
        check_path(&format!("/v1/convai/{}/{ID}", root.trim_end_matches("/create")), kind);
    }
    check_path(&format!("/v1/convai/test-invocations/{ID}"), ResourceKind::Test);
    check_body(json!({ "prompt": { "tool_ids": [ID] } }), ResourceKind::Tool);
    check_body(json!({ "prompt": { "mcp_server_ids": ["x", ID] } }), ResourceKind::McpServer);
    check_body(json!({ "request_headers": { "Authorization": { "secret_id": ID } } }), ResourceKind::Secret);
    check_body(json!({ "tests": [{ "test_id": ID }] }), ResourceKind::Test);
    check_body(json!({ "test_invocation_id": ID }), ResourceKind::Test);
}

fn check_batch_row() {
    check_response(
        "POST",
        "/v1/convai/batch-calling/submit",
        json!({ "id": ID, "agent_id": "x" }),
        ResourceKind::Batch,
    );
    check_path(&format!("/v1/convai/batch-calling/{ID}/cancel"), ResourceKind::Batch);
}

fn check_speech_engine_row() {
    check_response(
        "POST",
        "/v1/speech-engine",
        json!({ "speech_engine_id": ID }),
        ResourceKind::SpeechEngine,
    );
    check_path(&format!("/v1/speech-engine/{ID}"), ResourceKind::SpeechEngine);
}

fn check_productions_row() {
    check_response("POST", "/v1/productions/orders", json!({ "order_id": ID }), ResourceKind::Order);
    check_response("POST", "/v1/productions/orders/x1/media", json!({ "media_id": ID }), ResourceKind::Media);
    check_response("POST", "/v1/productions/orders/x1/items", json!({ "item_id": ID }), ResourceKind::Item);
    check_path(&format!("/v1/productions/orders/{ID}/submit"), ResourceKind::Order);
    check_path(&format!("/v1/productions/orders/x1/media/{ID}"), ResourceKind::Media);
    check_path(&format!("/v1/productions/orders/x1/items/{ID}"), ResourceKind::Item);
}

fn check_webhook_row() {
    check_response("POST", "/v1/workspace/webhooks", json!({ "webhook_id": ID }), ResourceKind::Webhook);
    check_path(&format!("/v1/workspace/webhooks/{ID}"), ResourceKind::Webhook);
}

fn check_token_row() {
    for token_type in ["realtime_scribe", "batch_scribe", "tts_websocket"] {
        check_response(
            "POST",
            &format!("/v1/single-use-token/{token_type}"),
            json!({ "token": ID }),
            ResourceKind::Token,
        );
    }
    check_query("/v1/speech-to-text", &format!("token={ID}"), ResourceKind::Token);
    check_query("/v1/speech-to-text/realtime", &format!("model_id=x&token={ID}"), ResourceKind::Token);
    let socket = "/v1/text-to-dialogue/stream-input";
    check_query(socket, &format!("single_use_token={ID}"), ResourceKind::Token);
    check_body(json!({ "text": " ", "single_use_token": ID }), ResourceKind::Token);
}

fn check_signed_url_row() {
    let url = format!("wss://host/v1/convai/conversation?agent_id=x&conversation_signature={ID}");
    for path in ["get-signed-url", "get_signed_url"] {
        let path = format!("/v1/convai/conversation/{path}");
        check_response("GET", &path, json!({ "signed_url": url }), ResourceKind::Signature);
    }
    let query = format!("agent_id=x&conversation_signature={ID}");
    let identifiers = RequestIdentifiers::parse("/v1/convai/conversation", Some(&query));
    assert!(identifiers.others.contains(&Identifier::new(ResourceKind::Signature, ID)));
}

fn check_cursor_row() {
    for (path, field, parameter) in [
        ("/v2/voices", "next_page_token", "next_page_token"),
        ("/v1/convai/agents", "next_cursor", "cursor"),
        ("/v1/convai/conversations", "next_cursor", "cursor"),
        ("/v1/convai/knowledge-base", "next_cursor", "cursor"),
        ("/v1/pronunciation-dictionaries", "next_cursor", "cursor"),
        ("/v1/dubbing", "next_cursor", "cursor"),
        ("/v1/assets", "next_cursor", "cursor"),
        ("/v1/voices", "last_sort_id", "last_sort_id"),
        ("/v1/convai/agents/x1/topics", "next_cursor", "cursor"),
    ] {
        let route = lookup(&Method::GET, path).unwrap().route;
        let ownership = response_ownership(&Method::GET, &route);
        assert_eq!(ownership, ResponseOwnership::Account, "{path} must be a list");
        let identifiers = identifiers_in_response(
            &Method::GET,
            &route,
            path,
            json!({ field: "=a/b" }).to_string().as_bytes(),
        );
        let requested = RequestIdentifiers::parse(path, Some(&format!("{parameter}=%3Da%2Fb"))).others;
        assert_eq!((identifiers.len(), identifiers), (1, requested), "{path} must have one cursor");
    }
    let cursor_in = |path| RequestIdentifiers::parse(path, Some("cursor=2")).others;
    assert_ne!(
        cursor_in("/v1/convai/agents"),
        cursor_in("/v1/convai/tools"),
        "a cursor must belong to its list"
    );
    assert_eq!(cursor_in("/v1/convai/agents"), cursor_in("/v1/convai/agents/"));
}

#[test]
fn a_resource_of_every_account_has_no_owner() {
    let voices = json!({ "voices": [
        { "voice_id": "premade1", "category": "premade", "samples": [{ "sample_id": "s1" }] },
        { "category": "cloned", "voice_id": ID, "samples": null },
    ]});
    let identifiers = identifiers_in_response(
        &Method::GET,
        &Route::parse("/v1/voices"),
        "/v1/voices",
        voices.to_string().as_bytes(),
    );
    assert_eq!(identifiers, [Identifier::new(ResourceKind::Voice, ID)]);
}

#[test]
fn the_voices_in_a_list_of_generated_speech_are_not_found() {
    let history = json!({ "history": [{ "history_item_id": ID, "request_id": "r", "voice_id": "v" }] });
    let identifiers = identifiers_in_response(
        &Method::GET,
        &Route::parse("/v1/history"),
        "/v1/history",
        history.to_string().as_bytes(),
    );
    assert_eq!(
        identifiers,
        [Identifier::new(ResourceKind::HistoryItem, ID), Identifier::new(ResourceKind::Request, "r")]
    );
}

#[test]
fn literals_of_the_api_are_not_identifiers() {
    for path in [
        "/v1/voices/add",
        "/v1/voices/settings/default",
        "/v1/voices/pvc",
        "/v1/convai/agents/create",
        "/v1/convai/knowledge-base/Search",
        "/v1/dubbing/resource",
        "/v1/voices",
        "/docs",
        "/",
    ] {
        assert!(RequestIdentifiers::parse(path, None).is_empty(), "{path} must contain no identifier");
    }
    // A voice of the library has no owner until it is copied.
    assert!(RequestIdentifiers::parse("/v1/voices/add/someone/something", None).is_empty());
}

#[test]
fn an_identifier_is_found_in_every_spelling() {
    for path in [
        format!("/v1/voices/{ID}"),
        format!("/voices/{ID}"),
        format!("/v1/voices/{ID}/"),
        "/v1/voices/%58b7hH8MSUJpSbSDYk0k2".to_owned(),
        format!("/v1/Voices/{ID}"),
    ] {
        assert_eq!(
            RequestIdentifiers::parse(&path, None).path,
            [Identifier::new(ResourceKind::Voice, ID)],
            "{path} must contain the identifier"
        );
    }
    let query = format!("voice%5Fids=a%2C{ID}&voice_ids=&voice_ids=b&voice_ids[]=c");
    let other_identifiers = ["a", ID, "b", "c"].map(|id| Identifier::new(ResourceKind::Voice, id));
    assert_eq!(RequestIdentifiers::parse("/v2/voices", Some(&query)).others, other_identifiers);
}

#[test]
fn a_value_that_is_not_an_identifier_is_skipped() {
    for body in ["", "x", "{", "[1,2", r#"{"voice_id":7}"#, r#"{"voice_id":""}"#, r#"{"voice_id":{"a":"b"}}"#]
    {
        assert_eq!(identifiers_in_document(body.as_bytes()), [], "{body} must contain no identifier");
    }
    let too_long = json!({ "voice_id": "x".repeat(5_000) });
    assert_eq!(identifiers_in_document(too_long.to_string().as_bytes()), []);
    // The identifiers before the end of a truncated document are found.
    assert_eq!(
        identifiers_in_document(br#"{"voice_id":"v","text":"br"#),
        [Identifier::new(ResourceKind::Voice, "v")]
    );
}

#[test]
fn only_responses_with_resources_or_account_data_have_an_owner() {
    for (method, path) in [
        (Method::GET, "/v1/models"),
        (Method::GET, "/v1/shared-voices"),
        (Method::GET, "/v1/voices/x1"),
        (Method::POST, "/v1/text-to-speech/x1"),
        (Method::DELETE, "/v1/voices/x1"),
        (Method::DELETE, "/v1/dubbing"),
    ] {
        let route = lookup(&method, path).unwrap().route;
        let ownership = response_ownership(&method, &route);
        assert_eq!(ownership, ResponseOwnership::None, "{method} {path} must have no owner");
    }
    assert_eq!(
        response_ownership(&Method::GET, &Route::parse("/v1/user/subscription")),
        ResponseOwnership::Account
    );
}

proptest::proptest! {
    #[test]
    fn no_input_panics(path: String, query: Option<String>, body: Vec<u8>) {
        let mut identifiers = RequestIdentifiers::parse(&path, query.as_deref());
        identifiers.add_body(&body);
        let _ = identifiers_in_response(&Method::GET, &Route::parse("/v1/voices"), &path, &body);
    }
}

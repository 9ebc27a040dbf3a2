//! Tests scripted faults over HTTP: delays, breaks, early, encoded, huge and custom responses, their order and their
//! routes. Delays also show when an operation is charged and when its slot of the concurrency limit is released.

use std::io::Read;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::simulator::{Fault, KeyPlan, Ledger, RefusalKind, WorkspacePlan};

async fn wait_until(simulator: &Simulator, condition: impl FnMut(&Ledger) -> bool) -> Ledger {
    tokio::time::timeout(RESPONSE_TIMEOUT, simulator.wait_for_ledger(condition))
        .await
        .expect("the ledger must fulfil the condition in time")
}

#[tokio::test]
async fn a_cut_response_breaks_after_exactly_the_given_bytes() {
    let simulator = start_with_keys("sk=10000").await;
    let whole_response = speech_call("hello, choir").key("sk").send_to(&simulator).await;
    for bytes in [0, 1, 417, 1_000, whole_response.body.len()] {
        simulator.queue_faults("sk", vec![Fault::CutAfter { bytes: bytes.try_into().unwrap() }]);
        let reply = speech_call("hello, choir").key("sk").send_to(&simulator).await;
        assert!(reply.is_broken, "the response must break after {bytes} bytes");
        assert_eq!(reply.status, 200);
        assert_eq!(reply.body, whole_response.body[..bytes], "{bytes} bytes must arrive");
        assert_eq!(reply.header("character-cost"), "12");
    }
    assert_eq!(simulator.ledger().totals.charged, 6 * 12, "a broken response must be charged");
}

#[tokio::test]
async fn a_large_response_is_cut_at_the_exact_byte() {
    let simulator = start_with_keys("sk=10000").await;
    simulator.queue_faults("sk", vec![Fault::CutAfter { bytes: 3_000_000 }]);
    let text = "la ".repeat(1_000);
    let call = post(&format!("{SPEECH_PATH}?output_format=pcm_48000"), format!(r#"{{"text":"{text}"}}"#));
    let reply = call.key("sk").send_to(&simulator).await;
    assert!(reply.is_broken, "the response must break");
    assert_eq!(reply.body.len(), 3_000_000);
}

#[tokio::test]
async fn a_connection_can_close_without_a_response() {
    let simulator = start_with_keys("sk=100").await;
    simulator.queue_faults("sk", vec![Fault::CloseBeforeHead, Fault::CloseUnread]);
    for is_body_complete in [true, false] {
        let error = speech_call("hello").key("sk").try_send(&simulator).await.unwrap_err();
        assert!(
            error.is_incomplete_message() || error.to_string().contains("connection"),
            "no response must arrive: {error}"
        );
        let ledger = wait_until(&simulator, |ledger| ledger.totals.in_flight == 0).await;
        let last = ledger.requests.last().unwrap();
        assert_eq!((last.status, last.is_body_complete, last.charged), (None, is_body_complete, 0));
    }
    let ledger = simulator.ledger();
    assert_eq!((ledger.totals.unanswered, ledger.key("sk").unwrap().unanswered), (2, 2));
    assert_eq!(speech_call("hello").key("sk").send_to(&simulator).await.status, 200);
}

#[tokio::test]
async fn an_early_refusal_does_not_wait_for_the_body() {
    let simulator = start_with_keys("sk=100").await;
    simulator.queue_faults("sk", vec![Fault::EarlyRefuse(RefusalKind::InvalidKey)]);
    let mut stream = TcpStream::connect(simulator.address()).await.unwrap();
    let head = format!(
        "POST {SPEECH_PATH} HTTP/1.1\r\nhost: simulator\r\nxi-api-key: sk\r\ncontent-length: 100000\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut status_line_start = [0; 12];
    let read_result = stream.read_exact(&mut status_line_start);
    tokio::time::timeout(RESPONSE_TIMEOUT, read_result)
        .await
        .expect("the response must arrive before the body")
        .unwrap();
    assert_eq!(&status_line_start, b"HTTP/1.1 401");
    // The body may arrive later, and the connection then serves another request.
    stream.write_all(&[b'x'; 100_000]).await.unwrap();
    stream
        .write_all(b"GET /v1/nothing HTTP/1.1\r\nhost: simulator\r\nconnection: close\r\n\r\n")
        .await
        .unwrap();
    let mut remaining_response = String::new();
    let read_result = stream.read_to_string(&mut remaining_response);
    tokio::time::timeout(RESPONSE_TIMEOUT, read_result)
        .await
        .expect("the second response must arrive in time")
        .unwrap();
    assert!(
        remaining_response.contains("HTTP/1.1 404"),
        "the second response must be a 404: {remaining_response}"
    );
}

#[tokio::test]
async fn a_refusal_can_be_gzipped_or_falsely_declared_as_gzip() {
    let simulator = start_with_keys("sk=100").await;
    simulator.queue_faults("sk", vec![Fault::Gzip(RefusalKind::SystemBusy), Fault::GarbledError]);
    let compressed_response = speech_call("hello").key("sk").send_to(&simulator).await;
    assert_eq!((compressed_response.status, compressed_response.header("content-encoding")), (429, "gzip"));
    assert_eq!(compressed_response.header("content-length"), compressed_response.body.len().to_string());
    let mut text = String::new();
    flate2::read::GzDecoder::new(compressed_response.body.as_ref()).read_to_string(&mut text).unwrap();
    assert!(text.contains(r#""code":"system_busy""#));

    let garbled_response = speech_call("hello").key("sk").send_to(&simulator).await;
    assert_eq!((garbled_response.status, garbled_response.header("content-encoding")), (401, "gzip"));
    flate2::read::GzDecoder::new(garbled_response.body.as_ref()).read_to_string(&mut text).unwrap_err();
}

#[tokio::test]
async fn a_refusal_can_have_several_encodings() {
    let simulator = start_with_keys("sk=100").await;
    let plain_text = r#"{"detail":"Forbidden"}"#;
    for (encodings, header) in
        [("br", "br"), ("zstd", "zstd"), ("deflate", "deflate"), ("gzip,br", "gzip, br")]
    {
        simulator.queue_faults("sk", vec![format!("encoded={encodings}:forbidden").parse().unwrap()]);
        let reply = speech_call("hello").key("sk").send_to(&simulator).await;
        assert_eq!((reply.status, reply.header("content-encoding")), (403, header));
        let mut text = String::new();
        match encodings {
            "deflate" => {
                flate2::read::ZlibDecoder::new(reply.body.as_ref()).read_to_string(&mut text).unwrap();
            }
            // A body in one uncompressed block begins and ends with a fixed number of bytes.
            "br" => text = String::from_utf8(reply.body[3..reply.body.len() - 1].to_vec()).unwrap(),
            "zstd" => text = String::from_utf8(reply.body[12..].to_vec()).unwrap(),
            _ => {
                let gzip_body = &reply.body[3..reply.body.len() - 1];
                flate2::read::GzDecoder::new(gzip_body).read_to_string(&mut text).unwrap();
            }
        }
        assert_eq!(text, plain_text, "the body must be decoded from {encodings}");
    }
}

#[tokio::test]
async fn an_error_can_be_huge_or_endless() {
    let simulator = start_with_keys("sk=100").await;
    simulator.queue_faults("sk", vec![Fault::HugeError, Fault::EndlessError]);
    let huge_reply = speech_call("hello").key("sk").send_to(&simulator).await;
    assert_eq!((huge_reply.status, huge_reply.body.len()), (401, 100_000));
    assert_eq!(huge_reply.json()["detail"]["code"], "quota_exceeded");

    let mut stream = TcpStream::connect(simulator.address()).await.unwrap();
    let head = "GET /v1/user HTTP/1.1\r\nhost: simulator\r\nxi-api-key: sk\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut first_bytes = vec![0; 2_000_000];
    let read_result = stream.read_exact(&mut first_bytes);
    tokio::time::timeout(RESPONSE_TIMEOUT, read_result)
        .await
        .expect("two megabytes of the error must arrive in time")
        .unwrap();
    assert!(String::from_utf8_lossy(&first_bytes).contains("quota_exceeded"));
    drop(stream);
    tokio::time::timeout(RESPONSE_TIMEOUT, simulator.stop())
        .await
        .expect("the simulator must stop although the body never ends");
}

#[tokio::test]
async fn a_disconnected_client_is_charged_only_for_an_executed_request() {
    let simulator = start_with_keys("sk=100").await;
    for (fault, charged) in [(Fault::Stall { ms: 600_000 }, 0), (Fault::SlowHead { ms: 600_000 }, 5)] {
        simulator.queue_faults("sk", vec![fault]);
        let request_count = simulator.ledger().totals.requests + 1;
        {
            let call = speech_call("hello").key("sk");
            let attempt = call.try_send(&simulator);
            let arrival = wait_until(&simulator, |ledger| {
                let is_request_pending =
                    ledger.totals.requests == request_count && ledger.totals.in_flight == 1;
                is_request_pending && ledger.totals.charged == charged
            });
            tokio::select! {
                reply = attempt => panic!("the response must be delayed: {reply:?}"),
                _ = arrival => {}
            }
        }
        let ledger = wait_until(&simulator, |ledger| ledger.totals.in_flight == 0).await;
        assert_eq!(ledger.totals.charged, charged);
        assert_eq!(ledger.requests.last().unwrap().charged, charged);
        assert_eq!(ledger.workspaces[0].running, 0, "the slot must be released");
    }
}

#[tokio::test]
async fn a_delayed_response_equals_a_response_without_delay() {
    let simulator = start_with_keys("sk=100").await;
    let whole_body = speech_call("hello").key("sk").send_to(&simulator).await.body;
    simulator.queue_faults(
        "sk",
        vec![Fault::Stall { ms: 5 }, Fault::SlowHead { ms: 5 }, Fault::SlowBody { ms: 5 }],
    );
    for _ in 0..3 {
        assert_eq!(speech_call("hello").key("sk").send_to(&simulator).await.body, whole_body);
    }
    // The chunks of a slow body arrive separately, because the first is sent before the last is generated.
    simulator.queue_faults("sk", vec![Fault::SlowBody { ms: 20 }]);
    let stream =
        post(&format!("{SPEECH_PATH}/stream"), r#"{"text":"hello"}"#).key("sk").send_to(&simulator).await;
    assert_eq!((stream.body, stream.chunk_count), (whole_body, 3));
}

#[tokio::test]
async fn a_busy_workspace_reports_its_maximum_and_no_time_to_retry() {
    let plan = Plan::parse("a=100@w b=100@w c=100")
        .unwrap()
        .with_workspace(WorkspacePlan { max_concurrent: Some(1), ..WorkspacePlan::new("w", 100) });
    let simulator = start(plan).await;
    simulator.queue_faults("a", vec![Fault::SlowHead { ms: 600_000 }]);
    {
        let call = speech_call("hello").key("a");
        let attempt = call.try_send(&simulator);
        let concurrent_replies = async {
            wait_until(&simulator, |ledger| ledger.workspace("w").unwrap().running == 1).await;
            let other_status = speech_call("hello").key("c").send_to(&simulator).await.status;
            (speech_call("hello").key("b").send_to(&simulator).await, other_status)
        };
        tokio::select! {
            reply = attempt => panic!("the response must be delayed: {reply:?}"),
            (reply, other_status) = concurrent_replies => {
                assert_eq!(other_status, 200, "another workspace must not be limited");
                assert_eq!((reply.status, reply.header("retry-after")), (429, ""));
                assert_eq!(reply.json()["detail"]["status"], "too_many_concurrent_requests");
                assert!(reply.text().contains("a maximum of 1 concurrent requests (running in parallel)"));
            }
        }
    }
    let ledger = wait_until(&simulator, |ledger| ledger.workspace("w").unwrap().running == 0).await;
    assert_eq!(ledger.workspace("w").unwrap().used, 5, "a refusal must not be charged");
    let reply = speech_call("hello").key("b").send_to(&simulator).await;
    assert_eq!((reply.status, reply.header("maximum-concurrent-requests")), (200, "1"));
}

/// The slot must be released with the last byte of the response and not later. Otherwise sequential requests would be
/// refused at random.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sequential_requests_never_exceed_the_limit() {
    let limited_workspace = WorkspacePlan { max_concurrent: Some(1), ..WorkspacePlan::new("w", 1_000_000) };
    let simulator = start(Plan::parse("a=0@w").unwrap().with_workspace(limited_workspace)).await;
    for _ in 0..100 {
        let stream = post(&format!("{SPEECH_PATH}/stream"), r#"{"text":"hello"}"#);
        assert_eq!(stream.key("a").send_to(&simulator).await.status, 200);
    }
    assert_eq!(simulator.ledger().workspaces[0].peak_running, 1);
}

#[tokio::test]
async fn queued_faults_precede_the_permanent_fault_in_their_order() {
    let plan = KeyPlan { faults: vec![Fault::ServerError, Fault::Pass], ..KeyPlan::new("sk", 100) };
    let simulator = start(Plan { keys: vec![plan], ..Plan::default() }).await;
    simulator.set_fault("sk", Some(Fault::Refuse(RefusalKind::Maintenance)));
    let mut statuses = Vec::new();
    for _ in 0..4 {
        statuses.push(speech_call("a").key("sk").send_to(&simulator).await.status);
    }
    simulator.set_fault("sk", None);
    statuses.push(speech_call("a").key("sk").send_to(&simulator).await.status);
    assert_eq!(statuses, [500, 200, 503, 503, 200]);
}

#[tokio::test]
async fn a_script_of_an_unknown_key_is_a_violation() {
    let simulator = start_with_keys("sk=100").await;
    simulator.queue_faults("ks", vec![Fault::ServerError]);
    simulator.set_fault("ks", None);
    assert_eq!(simulator.ledger().violations.len(), 2);
}

#[tokio::test]
async fn a_scripted_response_is_sent_exactly_as_specified() {
    let simulator = start_with_keys("sk=100").await;
    let brotli_body: &[u8] = &[0x8b, 0x01, 0x80, 0x7b, 0x7d, 0x03];
    let parse_fault = |text: &str| text.parse::<Fault>().unwrap();
    let encoded_fault = Fault::Respond {
        status: 401,
        headers: vec![
            ("content-encoding".into(), "br".into()),
            ("content-type".into(), "application/json".into()),
        ],
        body: Bytes::from_static(brotli_body),
    };
    for (fault, status, content_type, has_trace_id, body) in [
        (
            parse_fault(r#"answer=402/{"detail":{"code":"x"}}"#),
            402,
            "application/json",
            true,
            &br#"{"detail":{"code":"x"}}"#[..],
        ),
        (parse_fault("answer=403/<html>no"), 403, "text/html", true, b"<html>no"),
        (
            parse_fault("answer=429[x-trace-id: ]/error code: 1015"),
            429,
            "text/plain",
            false,
            b"error code: 1015",
        ),
        (parse_fault("answer=429/"), 429, "", true, b""),
        (parse_fault("answer=204"), 204, "", true, b""),
        (encoded_fault, 401, "application/json", true, brotli_body),
    ] {
        simulator.queue_faults("sk", vec![fault.clone()]);
        let reply = speech_call("hello").key("sk").send_to(&simulator).await;
        assert_eq!(
            (reply.status, reply.header("content-type")),
            (status, content_type),
            "{fault} must decide the head"
        );
        assert_eq!(
            (&reply.body[..], !reply.header("x-trace-id").is_empty()),
            (body, has_trace_id),
            "{fault} must decide the body and the presence of a trace ID"
        );
    }
    simulator.queue_faults(
        "sk",
        vec![parse_fault("answer=429[retry-after: 86400][set-cookie: a=1][set-cookie: b=2][server: edge]/x")],
    );
    let reply = speech_call("hello").key("sk").send_to(&simulator).await;
    assert_eq!((reply.header("retry-after"), reply.header("server")), ("86400", "edge"));
    assert_eq!(reply.headers.get_all("set-cookie").iter().count(), 2);
    let ledger = simulator.ledger();
    assert_eq!((ledger.totals.charged, ledger.requests[0].is_body_complete), (0, true));
}

#[tokio::test]
async fn a_fault_of_a_route_applies_to_that_route_only() {
    let simulator = start_with_keys("a=100 b=100").await;
    let status = async |call: SimulatorCall, key: &str| call.key(key).send_to(&simulator).await.status;
    simulator.set_route_fault("a", "/v1/text-to-speech", Some("quota_words".parse().unwrap()));
    assert_eq!(status(speech_call("x"), "a").await, 401);
    assert_eq!(status(speech_call("x"), "b").await, 200);
    for path in ["/v1/user/subscription", "/v1/user", "/v1/models"] {
        assert_eq!(status(get(path), "a").await, 200, "{path} must be served");
    }
    // A fault of all routes does not apply to a route with a fault of its own, and stays in the queue.
    simulator.queue_faults("a", vec![Fault::ServerError]);
    assert_eq!(status(speech_call("x"), "a").await, 401);
    assert_eq!(status(get("/v1/user"), "a").await, 500);
    simulator.queue_route_faults("a", "POST /v1/text-to-speech", vec![Fault::Pass]);
    assert_eq!((status(speech_call("x"), "a").await, status(speech_call("x"), "a").await), (200, 401));

    simulator.set_route_fault_for_all("/v1/text-to-speech", Some(Fault::Refuse(RefusalKind::Maintenance)));
    assert_eq!((status(speech_call("x"), "a").await, status(speech_call("x"), "b").await), (401, 503));
    assert_eq!(
        (status(speech_call("x"), "unknown").await, speech_call("x").send_to(&simulator).await.status),
        (503, 503)
    );
    simulator.set_route_fault("a", "/v1/text-to-speech", None);
    simulator.set_route_fault_for_all("/v1/text-to-speech", None);
    assert_eq!((status(speech_call("x"), "a").await, status(speech_call("x"), "b").await), (200, 200));

    simulator.set_route_fault("c", "/v1", None);
    assert_eq!(simulator.ledger().violations.len(), 1, "a fault of an unknown key must be a violation");
}

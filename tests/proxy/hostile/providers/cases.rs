//! The cases of hostile providers, by subject: heads, framings, the timing of a response, content codings, plain and
//! encoded keys in responses, refusals, retry delays, and costs. [`account_responses`] contains the responses to polls
//! of the subscription.

use std::io::Write;

use flate2::Compression;
use flate2::write::GzEncoder;

use super::{ConnectionEnd, ProviderCase, RequestKind, ResponseOutcome, ScriptedResponse};

fn gzip(text: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(text).unwrap();
    encoder.finish().unwrap()
}

/// Returns a response with the content length of `body`. `head` is the rest of the status line and the other headers.
fn response_with_length(head: &str, body: &[u8]) -> Vec<u8> {
    let head = format!("HTTP/1.1 {head}\r\ncontent-length: {}\r\n\r\n", body.len());
    [head.as_bytes(), body].concat()
}

/// Returns a response with the encoded `chunks`. `head` is the rest of the status line and the other headers.
fn chunked_response(head: &str, chunks: &str) -> Vec<u8> {
    format!("HTTP/1.1 {head}\r\ntransfer-encoding: chunked\r\n\r\n{chunks}").into_bytes()
}

/// The cases that were added so far.
#[derive(Default)]
struct CaseTable(Vec<ProviderCase>);

impl CaseTable {
    /// Adds a GET whose response consists of `bytes` and the end of the connection. Returns the case, so that the
    /// caller can change it.
    fn add(
        &mut self,
        name: &'static str,
        bytes: impl AsRef<[u8]>,
        outcome: ResponseOutcome,
    ) -> &mut ProviderCase {
        let script = ScriptedResponse {
            chunks: vec![bytes.as_ref().to_vec()],
            end: ConnectionEnd::Close,
            ..ScriptedResponse::default()
        };
        self.0.push(ProviderCase {
            name,
            request_kind: RequestKind::Voices,
            script,
            outcome,
            max_unusable_keys: 0,
            changes_key_state: false,
        });
        self.0.last_mut().unwrap()
    }
}

/// Returns the cases for a pool of two keys. `key` is one of them.
pub fn cases(key: &str) -> Vec<ProviderCase> {
    let mut table = CaseTable::default();
    add_heads(&mut table);
    add_framings(&mut table);
    add_timings(&mut table);
    add_encodings(&mut table);
    add_keys_in_responses(&mut table, key);
    add_encoded_keys(&mut table, key);
    add_refusals(&mut table);
    add_retry_delays(&mut table);
    add_costs(&mut table);
    table.0
}

fn add_heads(table: &mut CaseTable) {
    let ok = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n";
    for (name, bytes) in [
        ("no bytes", ""),
        ("an incomplete status line", "HTTP/1.1 2"),
        ("an SSH banner", "SSH-2.0-OpenSSH_9.2\r\n\r\n"),
        ("a status of two digits", "HTTP/1.1 99 X\r\ncontent-length: 2\r\n\r\nok"),
        ("a status of four digits", "HTTP/1.1 2000 X\r\ncontent-length: 2\r\n\r\nok"),
        ("a status that is not a number", "HTTP/1.1 2x0 OK\r\ncontent-length: 2\r\n\r\nok"),
        ("an unknown version", "HTTP/2.0 200 OK\r\ncontent-length: 2\r\n\r\nok"),
        ("an Icecast response", "ICY 200 OK\r\n\r\nok"),
        ("a header without a colon", "HTTP/1.1 200 OK\r\nbad header\r\n\r\n"),
        ("a header without a name", "HTTP/1.1 200 OK\r\n: bad\r\n\r\n"),
        ("a NUL in a header", "HTTP/1.1 200 OK\r\nx-a: b\0c\r\ncontent-length: 2\r\n\r\nok"),
        ("a folded header", "HTTP/1.1 200 OK\r\nx-a: b\r\n c\r\ncontent-length: 2\r\n\r\nok"),
        ("a page without a head", "<html>Bad Gateway</html>"),
    ] {
        table.add(name, bytes, ResponseOutcome::ProxyError(502));
    }
    table.add(
        "a long header",
        format!("{ok}x-a: {}\r\n\r\nok", "a".repeat(1 << 20)),
        ResponseOutcome::ProxyError(502),
    );
    table.add(
        "many headers",
        format!("{ok}{}\r\nok", "x-a: b\r\n".repeat(10_000)),
        ResponseOutcome::ProxyError(502),
    );
    table.add("an endless header", ok, ResponseOutcome::ProxyError(502)).script.end =
        ConnectionEnd::Flood(b"x-a: b\r\n");
    table.add("an endless status line", "HTTP/1.1 200 ", ResponseOutcome::ProxyError(502)).script.end =
        ConnectionEnd::Flood(b"a");
    table.add("an undefined status", response_with_length("999 X", b"ok"), ResponseOutcome::Body(999, "ok"));
    table.add(
        "a status without a reason",
        response_with_length("200", b"ok"),
        ResponseOutcome::Body(200, "ok"),
    );
    table.add(
        "a reason that is not ASCII",
        response_with_length("200 \u{e4}", b"ok"),
        ResponseOutcome::Body(200, "ok"),
    );
    table.add(
        "lines that end with a bare LF",
        "HTTP/1.1 200 OK\ncontent-length: 2\n\nok",
        ResponseOutcome::Body(200, "ok"),
    );
    table.add("a response of HTTP/1.0", "HTTP/1.0 200 OK\r\n\r\nok", ResponseOutcome::Body(200, "ok"));
    let origin_headers = "200 OK\r\nset-cookie: a=b; domain=localhost\r\nstrict-transport-security: max-age=9\r\nalt-svc: h3=\":1\"\r\n\
        clear-site-data: \"*\"\r\nnel: {}\r\nreport-to: {}\r\nconnection: x-mine\r\nx-mine: 1\r\nkeep-alive: timeout=9\r\nproxy-authenticate: Basic";
    table.add(
        "headers that apply to the origin of the provider",
        response_with_length(origin_headers, b"ok"),
        ResponseOutcome::Body(200, "ok"),
    );
    table.add(
        "a redirect",
        response_with_length("302 Found\r\nlocation: http://127.0.0.1:1/", b""),
        ResponseOutcome::Complete(302),
    );
    table.add(
        "a proxy authentication challenge",
        response_with_length("407 X\r\nproxy-authenticate: Basic", b""),
        ResponseOutcome::Complete(407),
    );
}

fn add_framings(table: &mut CaseTable) {
    let ok = |headers: &str| format!("HTTP/1.1 200 OK\r\n{headers}\r\n\r\nok");
    for (name, headers) in [
        ("two content-lengths", "content-length: 2\r\ncontent-length: 3"),
        ("two content-lengths in a list", "content-length: 2, 3"),
        ("a negative content-length", "content-length: -2"),
        ("a signed content-length", "content-length: +2"),
        ("a content-length above 2^64", "content-length: 99999999999999999999"),
        ("an empty content-length", "content-length:"),
        ("another transfer coding before chunked", "transfer-encoding: gzip, chunked"),
        ("an unknown transfer coding", "transfer-encoding: something"),
        ("two chunked transfer codings", "transfer-encoding: chunked\r\ntransfer-encoding: chunked"),
    ] {
        table.add(name, ok(headers), ResponseOutcome::ProxyError(502));
    }
    table.add(
        "chunked with HTTP/1.0",
        "HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        ResponseOutcome::ProxyError(502),
    );
    table.add(
        "two equal content-lengths",
        ok("content-length: 2\r\ncontent-length: 2"),
        ResponseOutcome::Body(200, "ok"),
    );
    table.add(
        "chunked with a content-length",
        chunked_response("200 OK\r\ncontent-length: 9", "2\r\nok\r\n0\r\n\r\n"),
        ResponseOutcome::Body(200, "ok"),
    );
    table.add(
        "chunk extensions and trailers",
        chunked_response("200 OK", "2;a=b\r\nok\r\n0\r\nx-a: b\r\n\r\n"),
        ResponseOutcome::Body(200, "ok"),
    );
    for (name, chunks) in [
        ("a chunk size that is not a number", "2\r\nok\r\nzz\r\n"),
        ("a chunk size above 2^64", "2\r\nok\r\nfffffffffffffffff\r\nmore"),
        ("a negative chunk size", "2\r\nok\r\n-2\r\nok\r\n0\r\n\r\n"),
        ("a chunk longer than its size", "2\r\nokok\r\n0\r\n\r\n"),
        ("an incomplete chunk", "2\r\nok\r\n7fffffffffffffff\r\nmore"),
        ("chunks without the last chunk", "2\r\nok\r\n"),
        ("malformed trailers", "2\r\nok\r\n0\r\nbad\r\n\r\n"),
        ("an incomplete trailer", "2\r\nok\r\n0\r\nx-a"),
    ] {
        table.add(name, chunked_response("200 OK", chunks), ResponseOutcome::Truncated(200));
    }
    table
        .add(
            "endless trailers",
            chunked_response("200 OK", "2\r\nok\r\n0\r\n"),
            ResponseOutcome::Truncated(200),
        )
        .script
        .end = ConnectionEnd::Flood(b"x-a: b\r\n");
    table
        .add(
            "an endless chunk extension",
            chunked_response("200 OK", "2\r\nok\r\n2;"),
            ResponseOutcome::Truncated(200),
        )
        .script
        .end = ConnectionEnd::Flood(b"a");
    table.add(
        "an incomplete body",
        "HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf",
        ResponseOutcome::Truncated(200),
    );
    table.add(
        "a content-length of 2^63 - 1",
        "HTTP/1.1 200 OK\r\ncontent-length: 9223372036854775807\r\n\r\nhalf",
        ResponseOutcome::Truncated(200),
    );
    let reset = table.add(
        "a reset in a body",
        "HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf",
        ResponseOutcome::Truncated(200),
    );
    reset.script.end = ConnectionEnd::Reset;
    table.add("a reset without a response", "", ResponseOutcome::ProxyError(502)).script.end =
        ConnectionEnd::Reset;
    table.add(
        "a body of a 204",
        "HTTP/1.1 204 X\r\ncontent-length: 2\r\n\r\nok",
        ResponseOutcome::Complete(204),
    );
}

fn add_timings(table: &mut CaseTable) {
    let ok = response_with_length("200 OK", b"ok");
    let second_response = response_with_length("200 OK", b"poison");
    let interim_responses =
        b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n".repeat(1_000);
    table.add(
        "many interim responses",
        [interim_responses, ok.clone()].concat(),
        ResponseOutcome::Body(200, "ok"),
    );
    table.add("endless interim responses", "", ResponseOutcome::ProxyError(502)).script.end =
        ConnectionEnd::Flood(b"HTTP/1.1 100 X\r\n\r\n");
    table.add("endless empty lines", "", ResponseOutcome::ProxyError(502)).script.end =
        ConnectionEnd::Flood(b"\r\n");
    for (name, status) in
        [("a protocol switch without an upgrade request", 101), ("an interim response alone", 102)]
    {
        table.add(
            name,
            format!("HTTP/1.1 {status} X\r\nupgrade: x\r\nconnection: upgrade\r\n\r\nx"),
            ResponseOutcome::ProxyError(502),
        );
    }
    table.add("a response before its request", &ok, ResponseOutcome::Body(200, "ok")).script.is_early = true;
    table
        .add(
            "two responses before a request",
            [&*ok, &second_response].concat(),
            ResponseOutcome::Body(200, "ok"),
        )
        .script
        .is_early = true;
    let early_refusal = table.add(
        "a refusal before an upload",
        response_with_length("413 X\r\nconnection: close", b"no"),
        ResponseOutcome::Body(413, "no"),
    );
    (early_refusal.script.is_early, early_refusal.request_kind) = (true, RequestKind::Speech);
    let extra_response = table.add(
        "two responses to one request",
        [&*ok, &second_response].concat(),
        ResponseOutcome::Body(200, "ok"),
    );
    extra_response.script.end = ConnectionEnd::KeepOpen;
    let after_response = table.add("a response without a request", &ok, ResponseOutcome::Body(200, "ok"));
    (after_response.script.end, after_response.script.after_response) =
        (ConnectionEnd::KeepOpen, second_response);
    let byte_by_byte = table.add("a response byte by byte", "", ResponseOutcome::Body(200, "ok"));
    byte_by_byte.script.chunks = ok.iter().map(|byte| vec![*byte]).collect();
    let switching_protocols =
        "HTTP/1.1 101 X\r\nupgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-accept: AAAA\r\n\r\n";
    table
        .add(
            "a WebSocket with a wrong sec-websocket-accept",
            switching_protocols,
            ResponseOutcome::ProxyError(502),
        )
        .request_kind = RequestKind::Socket;
    table
        .add(
            "an upgrade to another protocol",
            switching_protocols.replace("websocket\r\n", "x\r\n"),
            ResponseOutcome::ProxyError(502),
        )
        .request_kind = RequestKind::Socket;
    table.add("a response instead of a WebSocket", &ok, ResponseOutcome::Body(200, "ok")).request_kind =
        RequestKind::Socket;
}

fn add_encodings(table: &mut CaseTable) {
    let json = "200 OK\r\ncontent-type: application/json\r\ncontent-encoding:";
    let bomb = gzip(&vec![b' '; 16 << 20]);
    table.add(
        "a gzip bomb",
        response_with_length(&format!("{json} gzip"), &bomb),
        ResponseOutcome::Complete(200),
    );
    table.add(
        "a gzip bomb in a gzip bomb",
        response_with_length(&format!("{json} gzip, gzip"), &gzip(&bomb)),
        ResponseOutcome::Complete(200),
    );
    table.add(
        "a refusal with a gzip bomb",
        response_with_length("400 X\r\ncontent-encoding: gzip", &bomb),
        ResponseOutcome::Complete(400),
    );
    table.add(
        "a truncated gzip body",
        response_with_length(&format!("{json} gzip"), &gzip(b"{}")[..12]),
        ResponseOutcome::Complete(200),
    );
    for (name, encoding) in [
        ("plain text labelled gzip", "gzip"),
        ("plain text labelled deflate", "deflate"),
        ("plain text labelled br", "br"),
        ("plain text labelled with an unknown coding", "utf-8"),
        (
            "plain text labelled with ten codings",
            "gzip, gzip, gzip, gzip, gzip, gzip, gzip, gzip, gzip, gzip",
        ),
    ] {
        table.add(
            name,
            response_with_length(&format!("{json} {encoding}"), b"{}"),
            ResponseOutcome::Body(200, "{}"),
        );
    }
}

/// Returns a JSON document that contains `key`.
fn json_with_key(key: &str) -> String {
    format!("{{\"key\":\"{key}\"}}")
}

fn add_keys_in_responses(table: &mut CaseTable, key: &str) {
    let text = json_with_key(key);
    table.add(
        "a key in headers",
        response_with_length(
            &format!("200 OK\r\nx-a: {key}\r\nx-b: Bearer {key}, {key}\r\nlocation: /?k={key}"),
            b"ok",
        ),
        ResponseOutcome::Body(200, "ok"),
    );
    table.add(
        "a key as the reason phrase",
        response_with_length(&format!("200 {key}"), b"ok"),
        ResponseOutcome::Body(200, "ok"),
    );
    table.add(
        "a key as a header name",
        response_with_length(&format!("200 OK\r\n{key}: a"), b"ok"),
        ResponseOutcome::Body(200, "ok"),
    );
    table.add(
        "a key in JSON",
        response_with_length("200 OK\r\ncontent-type: application/json", text.as_bytes()),
        ResponseOutcome::Complete(200),
    );
    table.add(
        "a key in a body without a content-type",
        response_with_length("200 OK", text.as_bytes()),
        ResponseOutcome::Complete(200),
    );
    table
        .add(
            "a key in an HTML page",
            response_with_length("500 X\r\ncontent-type: text/html", text.as_bytes()),
            ResponseOutcome::Complete(500),
        )
        .request_kind = RequestKind::Speech;
    table.add(
        "a key in a refusal",
        response_with_length("422 X\r\ncontent-type: application/json", text.as_bytes()),
        ResponseOutcome::Complete(422),
    );
    let (start, end) = text.split_at(20);
    let chunks = format!("{:x}\r\n{start}\r\n{:x}\r\n{end}\r\n0\r\n\r\n", start.len(), end.len());
    table.add("a key across two chunks", chunked_response("200 OK", &chunks), ResponseOutcome::Complete(200));
    let byte_by_byte = table.add("a key byte by byte", "", ResponseOutcome::Complete(200));
    byte_by_byte.script.chunks =
        response_with_length("200 OK", text.as_bytes()).iter().map(|byte| vec![*byte]).collect();
    let trailers = format!("2\r\nok\r\n0\r\nx-a: {key}\r\n\r\n");
    table.add(
        "a key in a trailer",
        chunked_response("200 OK\r\ntrailer: x-a", &trailers),
        ResponseOutcome::Body(200, "ok"),
    );
}

fn add_encoded_keys(table: &mut CaseTable, key: &str) {
    let text = json_with_key(key);
    let escaped: String = key.bytes().map(|byte| format!("\\u{byte:04x}")).collect();
    table.add(
        "a key in JSON escapes",
        response_with_length(
            "200 OK\r\ncontent-type: application/json",
            format!("{{\"k\":\"{escaped}\"}}").as_bytes(),
        ),
        ResponseOutcome::Complete(200),
    );
    let utf16: Vec<u8> = key.encode_utf16().flat_map(u16::to_le_bytes).collect();
    table.add(
        "a key in UTF-16",
        response_with_length("200 OK\r\ncontent-type: text/plain; charset=utf-16", &utf16),
        ResponseOutcome::Complete(200),
    );
    let gzip_head = "200 OK\r\ncontent-type: application/json\r\ncontent-encoding: gzip";
    table.add(
        "a compressed key",
        response_with_length(gzip_head, &gzip(text.as_bytes())),
        ResponseOutcome::Complete(200),
    );
    table.add(
        "a key that is compressed twice",
        response_with_length(&gzip_head.replace("gzip", "gzip, gzip"), &gzip(&gzip(text.as_bytes()))),
        ResponseOutcome::Complete(200),
    );
    let body = gzip(text.as_bytes());
    let gzip_until_close = [format!("HTTP/1.1 {gzip_head}\r\n\r\n").as_bytes(), &body].concat();
    table.add(
        "a compressed key in a body that ends with the connection",
        gzip_until_close,
        ResponseOutcome::Truncated(200),
    );
    table.add(
        "a key in an unknown content coding",
        response_with_length(&gzip_head.replace("gzip", "utf-8"), text.as_bytes()),
        ResponseOutcome::Complete(200),
    );
    table.add(
        "a key in plain text labelled gzip",
        response_with_length(gzip_head, text.as_bytes()),
        ResponseOutcome::Truncated(200),
    );
    let json_and_key = [&gzip(b"{}")[..], text.as_bytes()].concat();
    table.add(
        "a key after a gzip body",
        response_with_length(gzip_head, &json_and_key),
        ResponseOutcome::Truncated(200),
    );
}

/// Returns the name of a case that is described in two parts.
fn case_name(subject: &str, description: &str) -> &'static str {
    format!("a {subject} {description}").leak()
}

fn add_refusals(table: &mut CaseTable) {
    let refusal = |status: u16, body: &[u8]| {
        response_with_length(&format!("{status} X\r\ncontent-type: application/json"), body)
    };
    let brackets = b"[".repeat(60_000);
    let nested = [b"{\"detail\":".repeat(5_000), b"1".to_vec(), b"}".repeat(5_000)].concat();
    let large =
        [&b"{\"detail\":{\"status\":\"quota_exceeded\",\"message\":\"a\"}}"[..], &vec![b' '; 300_000]]
            .concat();
    for status in [400, 401, 402, 403, 429, 500, 503] {
        for (description, body) in [
            ("of nested brackets", &*brackets),
            ("of nested objects", &nested),
            ("with a large body", &large),
            ("with a body that is not UTF-8", &[0xff; 300]),
            ("with an empty body", b""),
            ("with unexpected JSON types", b"{\"detail\":[{\"msg\":{\"msg\":[1e999,null]}}],\"error\":1}"),
        ] {
            let name = case_name(&status.to_string(), description);
            let case = table.add(name, refusal(status, body), ResponseOutcome::Complete(status));
            (case.request_kind, case.script.end, case.changes_key_state) =
                (RequestKind::Speech, ConnectionEnd::KeepOpen, true);
        }
    }
}

fn add_retry_delays(table: &mut CaseTable) {
    for (description, headers, outcome) in [
        (
            "with a retry-after above 2^64",
            "retry-after: 99999999999999999999",
            ResponseOutcome::ProxyError(429),
        ),
        (
            "with the largest retry-after",
            "retry-after: 18446744073709551615",
            ResponseOutcome::ProxyError(429),
        ),
        ("with a negative retry-after", "retry-after: -1", ResponseOutcome::ProxyError(429)),
        (
            "with a retry-after in the year 9999",
            "retry-after: Fri, 31 Dec 9999 23:59:59 GMT",
            ResponseOutcome::ProxyError(429),
        ),
        (
            "with a retry-after in the past",
            "retry-after: Thu, 01 Jan 1970 00:00:00 GMT",
            ResponseOutcome::Complete(429),
        ),
        ("with a retry-after that is not a number", "retry-after: soon", ResponseOutcome::ProxyError(429)),
        (
            "with the largest x-ratelimit-reset",
            "x-ratelimit-reset: 18446744073709551615",
            ResponseOutcome::ProxyError(429),
        ),
    ] {
        let body = br#"{"detail":{"status":"rate_limit_exceeded","message":"Too many requests"}}"#;
        let case = table.add(
            case_name("429", description),
            response_with_length(&format!("429 X\r\n{headers}"), body),
            outcome,
        );
        (case.request_kind, case.max_unusable_keys, case.script.end, case.changes_key_state) =
            (RequestKind::Speech, 2, ConnectionEnd::KeepOpen, true);
    }
}

fn add_costs(table: &mut CaseTable) {
    for (description, headers) in [
        ("that is negative", "character-cost: -1"),
        ("above 2^64", "character-cost: 99999999999999999999999"),
        ("of 2^64 - 1", "character-cost: 18446744073709551615"),
        ("of 2^63", "character-cost: 9223372036854775808"),
        ("with an exponent", "character-cost: 1e18"),
        ("that is not a number", "character-cost: NaN"),
        ("with many decimals", "character-cost: 1.00000000000000000000000000000000000001"),
        ("in two headers", "character-cost: 1\r\ncharacter-cost: 18446744073709551615"),
        ("of 2^64 - 1, as x-character-count", "x-character-count: 18446744073709551615"),
        (
            "and a huge concurrency limit",
            "maximum-concurrent-requests: 4294967295\r\ncurrent-concurrent-requests: -1",
        ),
        ("and a concurrency limit of zero", "maximum-concurrent-requests: 0"),
    ] {
        let case = table.add(
            case_name("cost", description),
            response_with_length(&format!("200 OK\r\n{headers}"), b"ok"),
            ResponseOutcome::Body(200, "ok"),
        );
        (case.request_kind, case.script.end) = (RequestKind::Speech, ConnectionEnd::KeepOpen);
    }
}

/// Returns responses to polls of the subscription, by name. None of them makes the key unusable.
pub fn account_responses() -> Vec<(&'static str, Vec<u8>)> {
    let subscription =
        |body: &str| response_with_length("200 OK\r\ncontent-type: application/json", body.as_bytes());
    let largest = "18446744073709551615";
    vec![
        ("an empty object", subscription("{}")),
        ("HTML instead of JSON", subscription("<html>")),
        ("no bytes", Vec::new()),
        ("a negative count", subscription(r#"{"character_count":-5,"character_limit":-5}"#)),
        ("counts as text", subscription(r#"{"character_count":"many","character_limit":"more"}"#)),
        ("counts above all numbers", subscription(r#"{"character_count":1e400,"character_limit":1e400}"#)),
        (
            "a limit of 2^64 - 1",
            subscription(&format!(r#"{{"character_count":1,"character_limit":{largest}}}"#)),
        ),
        (
            "a reset at the largest timestamp",
            subscription(&format!(
                r#"{{"character_count":1,"character_limit":100000,"next_character_count_reset_unix":9223372036854775807,"max_credit_limit_extension":{largest}}}"#
            )),
        ),
        (
            "a reset at the smallest timestamp",
            subscription(
                r#"{"character_count":1,"character_limit":100000,"next_character_count_reset_unix":-9223372036854775808}"#,
            ),
        ),
        (
            "a long tier",
            subscription(&format!(
                r#"{{"character_count":1,"character_limit":100000,"tier":"{}"}}"#,
                "a".repeat(500_000)
            )),
        ),
        (
            "a tier with control characters",
            subscription(r#"{"character_count":1,"character_limit":100000,"tier":"a\n\u0000\u001b[2Jb"}"#),
        ),
        ("nested brackets", subscription(&"[".repeat(500_000))),
        (
            "a gzip bomb",
            response_with_length("200 OK\r\ncontent-encoding: gzip", &gzip(&vec![b' '; 16 << 20])),
        ),
    ]
}

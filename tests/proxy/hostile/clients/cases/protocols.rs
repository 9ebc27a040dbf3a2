//! The cases of clients that use other protocols on the HTTP port: HTTP/2, TLS, WebSocket handshakes, and protocols
//! that are not related to HTTP.

use super::{AfterSending, CaseTable, ClientOutcome, Forwarded, TOKEN, get_with, valid_request};

pub(super) fn add_protocols(table: &mut CaseTable) {
    add_http_2(table);
    add_tls(table);
    add_unrelated_protocols(table);
    add_websocket_handshakes(table);
}

fn add_http_2(table: &mut CaseTable) {
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    table.add_chunks(
        "HTTP/2 with prior knowledge",
        vec![preface.to_vec()],
        AfterSending::ReadToEnd,
        ClientOutcome::GoAway,
        Forwarded::Nothing,
    );
    let byte_by_byte = preface.iter().map(|byte| vec![*byte]).collect();
    table.add_chunks(
        "HTTP/2 byte by byte",
        byte_by_byte,
        AfterSending::ReadToEnd,
        ClientOutcome::GoAwayOr400,
        Forwarded::Nothing,
    );
    table.add(
        "HTTP/2 with an upgrade",
        get_with(
            "connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAAP__\r\n",
        ),
        AfterSending::SendAnotherRequest,
        &[200, 200],
        Forwarded::Complete(2),
    );
}

fn add_tls(table: &mut CaseTable) {
    // A TLS handshake record with invalid content.
    let client_hello = [&b"\x16\x03\x01\x00\x20"[..], &[0xab; 32]].concat();
    table.add_chunks(
        "a TLS handshake of random bytes",
        vec![client_hello.clone()],
        AfterSending::ReadToEnd,
        ClientOutcome::Closed,
        Forwarded::Nothing,
    );
    let empty = b"\x16\x03\x01\x00\x04\x01\x00\x00\x00".to_vec();
    table.add_chunks(
        "an empty TLS ClientHello",
        vec![empty],
        AfterSending::ReadToEnd,
        ClientOutcome::TlsAlert,
        Forwarded::Nothing,
    );
    table.add_chunks(
        "an incomplete TLS handshake",
        vec![client_hello[..20].to_vec()],
        AfterSending::HalfClose,
        ClientOutcome::Closed,
        Forwarded::Nothing,
    );
    table.add_chunks(
        "TLS data without a handshake",
        vec![b"\x17\x03\x03\x00\x05hello".to_vec()],
        AfterSending::ReadToEnd,
        ClientOutcome::Responses(&[400]),
        Forwarded::Nothing,
    );
}

fn add_unrelated_protocols(table: &mut CaseTable) {
    for (name, bytes) in [
        ("an SSH banner", &b"SSH-2.0-OpenSSH_9.2\r\n"[..]),
        ("SMTP commands", b"EHLO evil.example\r\nMAIL FROM:<a@b>\r\n"),
        ("a PROXY protocol header", b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n"),
        ("NUL bytes", &[0; 512]),
        ("bytes of 0xff", &[0xff; 512]),
    ] {
        table.add_refused(name, bytes, &[400]);
    }
}

fn add_websocket_handshakes(table: &mut CaseTable) {
    let upgrade = |headers: &str| {
        valid_request(
            "/v1/text-to-speech/21m00Tcm4TlvDq8ikWAM/stream-input",
            &format!("connection: upgrade\r\nupgrade: websocket\r\n{headers}"),
        )
    };
    let key_headers = "sec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n";
    table.add(
        "a WebSocket handshake with a body",
        format!("{}hello", upgrade(&format!("{key_headers}content-length: 5\r\n"))),
        AfterSending::HalfClose,
        &[400],
        Forwarded::Nothing,
    );
    table.add(
        "a chunked WebSocket handshake",
        format!("{}0\r\n\r\n", upgrade(&format!("{key_headers}transfer-encoding: chunked\r\n"))),
        AfterSending::ReadToEnd,
        &[400],
        Forwarded::Nothing,
    );
    table.add(
        "a WebSocket handshake without a key",
        upgrade("sec-websocket-version: 13\r\n"),
        AfterSending::SendAnotherRequest,
        &[400, 200],
        Forwarded::Complete(2),
    );
    table.add(
        "a WebSocket handshake of an old version",
        upgrade("sec-websocket-version: 8\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"),
        AfterSending::SendAnotherRequest,
        &[426, 200],
        Forwarded::Complete(2),
    );
    table.add(
        "a WebSocket handshake as a POST",
        upgrade(key_headers).replacen("GET", "POST", 1),
        AfterSending::SendAnotherRequest,
        &[404, 200],
        Forwarded::Complete(2),
    );
    table.add(
        "a WebSocket handshake with HTTP/1.0",
        upgrade(key_headers).replacen("HTTP/1.1", "HTTP/1.0", 1),
        AfterSending::HalfClose,
        &[404],
        Forwarded::Complete(1),
    );
    table.add(
        "bytes before a WebSocket is open",
        format!("{}{}", upgrade(key_headers), get_with("")),
        AfterSending::ReadToEnd,
        &[101],
        Forwarded::Complete(1),
    );
    table.add(
        "a bearer token as a subprotocol",
        upgrade(&format!("{key_headers}sec-websocket-protocol: bearer.{TOKEN}\r\n")),
        AfterSending::HalfClose,
        &[101],
        Forwarded::Complete(1),
    );
}

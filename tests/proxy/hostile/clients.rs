//! Hostile clients: the bytes that they send, their behaviour, and the expected outcome.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::wire;
use super::{EXCHANGE_TIMEOUT, shown};

/// The token of the only client in these suites, which no other suite uses.
pub const TOKEN: &str = "hostile-token-canary-41c9";

/// A client, and the outcome that it must observe.
pub struct Row {
    pub name: &'static str,
    /// Written one after the other.
    pub pieces: Vec<Vec<u8>>,
    pub then: Then,
    pub outcome: Outcome,
    pub reach: Reach,
    /// Whether the program has no clients configured, so that local apps need no token.
    pub needs_no_token: bool,
}

/// The part that reaches the provider.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Nothing.
    Nothing,
    /// A number of whole requests; for a client that disconnects at once, perhaps fewer.
    Whole(usize),
    /// At most one request, without its end.
    Cut,
}

/// The behaviour of a client after sending.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// Reads to the end, which the program must cause.
    Read,
    /// Closes its write half, and reads to the end.
    HalfClose,
    /// Reads the responses, then sends a regular request on the same connection and reads to the
    /// end.
    AskAgain,
    /// Disconnects without reading, with a FIN.
    Leave,
    /// Disconnects with a reset.
    Reset,
}

/// The data that a client receives before the connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Whole responses with these statuses, in this order.
    Answers(&'static [u16]),
    /// An HTTP/2 GOAWAY.
    GoAway,
    /// A GOAWAY, or a 400: a preface in pieces is refused at its version, before it can be
    /// recognized.
    GoAwayOr400,
    /// A TLS alert.
    Alert,
    /// The end of the connection without a byte.
    Nothing,
    /// The client has not read.
    Unseen,
}

/// A complete request that would be served.
pub fn honest(path: &str, rest: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nxi-api-key: {TOKEN}\r\n{rest}\r\n")
}

/// The head of a POST that would be served, with these headers and without its end.
fn post(headers: &str) -> String {
    format!("POST /v1/simulator/echo HTTP/1.1\r\nhost: localhost\r\nxi-api-key: {TOKEN}\r\n{headers}")
}

fn with(headers: &str) -> String {
    honest("/v1/voices", headers)
}

#[derive(Default)]
struct Table(Vec<Row>);

impl Table {
    fn add(
        &mut self,
        name: &'static str,
        bytes: impl AsRef<[u8]>,
        then: Then,
        statuses: &'static [u16],
        reach: Reach,
    ) {
        self.pieces(name, vec![bytes.as_ref().to_vec()], then, Outcome::Answers(statuses), reach);
    }

    fn pieces(
        &mut self,
        name: &'static str,
        pieces: Vec<Vec<u8>>,
        then: Then,
        outcome: Outcome,
        reach: Reach,
    ) {
        self.0.push(Row { name, pieces, then, outcome, reach, needs_no_token: false });
    }

    /// Refused with this status, and the connection is closed: the following bytes are not parsed
    /// as a request.
    fn refused(&mut self, name: &'static str, bytes: impl AsRef<[u8]>, status: &'static [u16; 1]) {
        let smuggled = honest("/v1/voices?smuggled=1", "");
        self.add(name, [bytes.as_ref(), smuggled.as_bytes()].concat(), Then::Read, status, Reach::Nothing);
    }

    /// Refused, and the next request of the connection is served.
    fn declined(&mut self, name: &'static str, bytes: impl AsRef<[u8]>, statuses: &'static [u16; 2]) {
        self.add(name, bytes, Then::AskAgain, statuses, Reach::Whole(1));
    }

    /// Served once, and so is the next request of the connection.
    fn served(&mut self, name: &'static str, bytes: impl AsRef<[u8]>) {
        self.add(name, bytes, Then::AskAgain, &[200, 200], Reach::Whole(2));
    }
}

pub fn table() -> Vec<Row> {
    let mut table = Table::default();
    framings(&mut table);
    heads(&mut table);
    paths(&mut table);
    identities(&mut table);
    protocols(&mut table);
    behaviours(&mut table);
    table.0
}

fn framings(table: &mut Table) {
    let smuggled = honest("/v1/voices?smuggled=1", "");
    let chunked = |chunks: &str| format!("{}{chunks}", post("transfer-encoding: chunked\r\n\r\n"));
    for (name, headers) in [
        ("a length before chunks", "content-length: 4\r\ntransfer-encoding: chunked\r\n"),
        ("chunks before a length", "transfer-encoding: chunked\r\ncontent-length: 4\r\n"),
        ("two lengths", "content-length: 0\r\ncontent-length: 5\r\n"),
        ("two lengths in a list", "content-length: 0, 5\r\n"),
        ("a signed length", "content-length: +5\r\n"),
        ("a length beyond numbers", "content-length: 99999999999999999999\r\n"),
        ("a length with a space in its name", "content-length : 0\r\n"),
        ("another coding", "transfer-encoding: xchunked\r\n"),
        ("chunks that are not the last coding", "transfer-encoding: chunked, identity\r\n"),
        ("chunks twice", "transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n"),
        ("chunks after a vertical tab", "transfer-encoding: \x0bchunked\r\n"),
        ("a coding with a space in its name", "transfer-encoding : chunked\r\n"),
        ("a folded coding", "transfer-encoding:\r\n chunked\r\n"),
        ("a folded header", "x-folded: a\r\n b\r\n"),
        ("a length behind a bare CR", "x-a: b\rcontent-length: 5\r\n"),
        ("a NUL in a value", "x-a: b\0content-length: 5\r\n"),
    ] {
        table.refused(name, post(&format!("{headers}\r\n")), &[400]);
    }
    table.refused("chunks of HTTP/1.0", chunked("0\r\n\r\n").replace("HTTP/1.1", "HTTP/1.0"), &[400]);
    for (name, chunks) in [
        ("a size beyond numbers", "fffffffffffffffff\r\nhello\r\n0\r\n\r\n"),
        ("a size of 2^64", "10000000000000000\r\n\r\n"),
        ("a signed size", "+5\r\nhello\r\n0\r\n\r\n"),
        ("a size with a prefix", "0x5\r\nhello\r\n0\r\n\r\n"),
        ("no size", "\r\nhello\r\n0\r\n\r\n"),
        ("a chunk longer than its size", "2\r\nhello\r\n0\r\n\r\n"),
        ("a chunk with a bare LF behind it", "5\r\nhello\n0\r\n\r\n"),
        ("a size with a bare CR behind it", "5\rhello\r\n0\r\n\r\n"),
    ] {
        // The request may have been forwarded up to that point.
        let bytes = format!("{}{smuggled}", chunked(chunks));
        table.add(name, bytes, Then::Read, &[400], Reach::Cut);
    }
    let long = format!("5;{}\r\nhello\r\n0\r\n\r\n", "a".repeat(100_000));
    table.add("a chunk extension without end", chunked(&long), Then::Read, &[400], Reach::Cut);
    let many = format!("{}0\r\n\r\n", "1;aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\r\nx\r\n".repeat(2_000));
    table.add("many chunk extensions", chunked(&many), Then::Read, &[400], Reach::Cut);
    let trailers = format!("0\r\n{}\r\n", "x-a: b\r\n".repeat(10_000));
    table.add("trailers without end", chunked(&trailers), Then::Read, &[400], Reach::Cut);
    table.served("a NUL in a chunk extension, which goes no further", chunked("5;\0\r\nhello\r\n0\r\n\r\n"));
    table.served("a chunk extension", chunked("5;a=b\r\nhello\r\n0\r\n\r\n"));
    table.served("sizes with zeros", chunked("00005\r\nhello\r\n0000\r\n\r\n"));
    table.served("small chunks", chunked(&format!("{}0\r\n\r\n", "1\r\nx\r\n".repeat(3_000))));
    table.served(
        "trailers",
        chunked(&format!("5\r\nhello\r\n0\r\nxi-api-key: {TOKEN}\r\ncontent-length: 9\r\n\r\n")),
    );
    table.served(
        "a request as a body",
        format!("{}{smuggled}", post(&format!("content-length: {}\r\n\r\n", smuggled.len()))),
    );
    table.served(
        "a request as the body of a GET",
        format!("{}{smuggled}", with(&format!("content-length: {}\r\n", smuggled.len()))),
    );
    table.served(
        "a length twice the same",
        format!("{}hello", post("content-length: 5\r\ncontent-length: 5\r\n\r\n")),
    );
    table.served(
        "chunks in capitals",
        format!("{}5\r\nhello\r\n0\r\n\r\n", post("Transfer-Encoding: CHUNKED\r\n\r\n")),
    );
    table.served("lines that end in LF alone", with("x-a: b\r\n").replace("\r\n", "\n"));
    table.served(
        "a length that Connection lists",
        format!("{}hello", post("connection: content-length\r\ncontent-length: 5\r\n\r\n")),
    );
    table.served("a key that Connection lists", with("connection: xi-api-key, host\r\n"));
}

fn heads(table: &mut Table) {
    let line = |line: &str| format!("{line}\r\nhost: localhost\r\nxi-api-key: {TOKEN}\r\n\r\n");
    for (name, first) in [
        ("no version", "GET /v1/voices"),
        ("another version", "GET /v1/voices HTTP/3.0"),
        ("a version of one digit", "GET /v1/voices HTTP/1"),
        ("a lower-case version", "GET /v1/voices http/1.1"),
        ("a space in the target", "GET /v1/voi ces HTTP/1.1"),
        ("a tab for a space", "GET\t/v1/voices\tHTTP/1.1"),
        ("a relative target", "GET v1/voices HTTP/1.1"),
        ("another host in the target", "GET http://elsewhere.example/v1/voices HTTP/1.1"),
        ("a user in the target", "GET http://localhost@elsewhere.example/v1/voices HTTP/1.1"),
        ("a control character in the target", "GET /v1/\x01voices HTTP/1.1"),
        ("a method with a colon", "G:T /v1/voices HTTP/1.1"),
        ("no method", " /v1/voices HTTP/1.1"),
    ] {
        table.refused(name, line(first), &[400]);
    }
    table.declined("the form of OPTIONS", line("GET * HTTP/1.1"), &[400, 200]);
    table.add("TRACE", with("").replacen("GET", "TRACE", 1), Then::HalfClose, &[405], Reach::Nothing);
    table.add("CONNECT", line("CONNECT localhost:443 HTTP/1.1"), Then::HalfClose, &[405], Reach::Nothing);
    table.add(
        "a long method",
        with("").replacen("GET", &"A".repeat(10_000), 1),
        Then::HalfClose,
        &[501],
        Reach::Nothing,
    );
    table.add(
        "a lower-case method",
        with("").replacen("GET", "get", 1),
        Then::HalfClose,
        &[405],
        Reach::Whole(1),
    );
    table.refused(
        "a long target",
        with("").replacen("/v1/voices", &format!("/{}", "a".repeat(70_000)), 1),
        &[414],
    );
    table.refused("a long header", with(&format!("x-a: {}\r\n", "a".repeat(200_000))), &[431]);
    table.refused("many headers", with(&"x-a: b\r\n".repeat(5_000)), &[431]);
    table.refused("a header without a name", with(": b\r\n"), &[400]);
    table.refused("a header without a colon", with("x-a\r\n"), &[400]);
    table.refused("a space in a name", with("x a: b\r\n"), &[400]);
    table.refused("a name that is not ASCII", with("x-\u{e4}: b\r\n"), &[400]);
    table.refused("no host", with("").replacen("host: localhost\r\n", "", 1), &[400]);
    table.refused("two hosts", with("host: localhost\r\n"), &[400]);
    table.refused("two different hosts", with("Host: elsewhere.example\r\n"), &[400]);
    table.served("empty lines before a request", format!("\r\n\r\n{}", with("")));
    table.served("a value that is not ASCII", with("x-a: \u{e4}\r\n"));
    table.served("a value of blanks", with("x-a: \t \r\n"));
    table.served("a head of 40 KB", with(&format!("x-a: {}\r\n", "a".repeat(40_000))));
}

fn paths(table: &mut Table) {
    for (name, path) in [
        ("dots behind a semicolon", "/v1/voices/..;/service-accounts"),
        ("encoded dots", "/v1/voices/%2e%2e/service-accounts"),
        ("plain dots", "/v1/voices/../service-accounts"),
        ("encoded slashes", "/v1/voices%2f..%2fservice-accounts"),
        ("dots that are encoded twice", "/v1/voices/%252e%252e/service-accounts"),
        ("backslashes", "/v1/voices\\..\\service-accounts"),
        ("an encoded NUL", "/v1/service-accounts%00"),
        ("overlong dots", "/v1/voices/%c0%ae%c0%ae/service-accounts"),
        ("a parameter of a segment", "/v1/service-accounts;x"),
        ("an encoded question mark", "/v1/service-accounts%3fx"),
        ("an encoded number sign", "/v1/service-accounts%23x"),
        ("an encoded blank at the end", "/v1/service-accounts%20"),
        ("half an escape", "/v1/service-accounts%2"),
        ("an escape of Microsoft's", "/v1/voices/%u002e%u002e/service-accounts"),
        ("a wide dot", "/v1/voices/%ef%bc%8e%ef%bc%8e/service-accounts"),
        ("an encoded line feed", "/v1/voices%0d%0axi-api-key:%20x"),
    ] {
        table.declined(name, honest(path, ""), &[400, 200]);
    }
    for (name, path) in [
        ("a denied path", "/v1/service-accounts"),
        ("a denied path in capitals", "/V1/SERVICE-ACCOUNTS"),
        ("a denied path, encoded", "/v1/%73ervice-accounts"),
        ("a denied path with a slash", "/v1/service-accounts/"),
        ("a denied path with two slashes, which are mended", "/v1//service-accounts"),
        ("a denied path with two versions", "/v1/v1/service-accounts"),
        ("a denied path without a version", "/service-accounts"),
    ] {
        table.declined(name, honest(path, ""), &[403, 200]);
    }
}

fn identities(table: &mut Table) {
    let forged = [
        "forwarded: for=1.2.3.4;host=evil.example",
        "x-forwarded-for: 1.2.3.4",
        "x-forwarded-host: evil.example",
        "x-forwarded-proto: https",
        "x-real-ip: 1.2.3.4",
        "true-client-ip: 1.2.3.4",
        "cf-connecting-ip: 1.2.3.4",
        "CF-Ray: 1",
        "cdn-loop: cloudflare",
        "via: 1.1 evil",
        "x-original-url: /v1/service-accounts",
        "x-rewrite-url: /v1/service-accounts",
        "X-HTTP-Method-Override: DELETE",
        "keep-alive: timeout=1",
        "te: trailers",
        "trailer: xi-api-key",
        "proxy-connection: keep-alive",
    ];
    table.served("what proxies say", with(&forged.map(|line| format!("{line}\r\n")).concat()));
    for (name, host) in [
        ("another host", "elsewhere.example"),
        ("a host with a user", "localhost@elsewhere.example"),
        ("two hosts in one", "localhost, elsewhere.example"),
        ("no name of a host", ""),
        ("a host that is not ASCII", "localh\u{f6}st"),
    ] {
        let request = with("").replacen("localhost", host, 1);
        table.add(name, request, Then::HalfClose, &[421], Reach::Nothing);
        table.0.last_mut().unwrap().needs_no_token = true;
    }
    for (name, headers) in [
        ("a page of another origin", "origin: https://evil.example\r\n"),
        ("a page without an origin", "origin: null\r\n"),
        ("a page of another site", "sec-fetch-site: cross-site\r\n"),
        ("two origins", "origin: http://localhost\r\norigin: https://evil.example\r\n"),
    ] {
        for needs_no_token in [false, true] {
            table.add(name, with(headers), Then::HalfClose, &[403], Reach::Nothing);
            table.0.last_mut().unwrap().needs_no_token = needs_no_token;
        }
    }
    let without = with("").replacen(&format!("xi-api-key: {TOKEN}\r\n"), "", 1);
    let presenting = |headers: &str| without.replacen("\r\n\r\n", &format!("\r\n{headers}\r\n"), 1);
    for (name, headers) in [
        ("no token", String::new()),
        ("a wrong token", "xi-api-key: wrong\r\n".to_owned()),
        ("an empty token", "xi-api-key:\r\n".to_owned()),
        ("half a token", format!("xi-api-key: {}\r\n", &TOKEN[..10])),
        ("a token and more", format!("xi-api-key: {TOKEN}x\r\n")),
        ("a token in capitals", format!("xi-api-key: {}\r\n", TOKEN.to_uppercase())),
        ("a long token", format!("xi-api-key: {}\r\n", "a".repeat(30_000))),
        (
            "a key for a token",
            "xi-api-key: sk_key_number_one_000000000000000000000000000000001\r\n".to_owned(),
        ),
    ] {
        table.add(name, presenting(&headers), Then::HalfClose, &[401], Reach::Nothing);
    }
    for (name, headers) in [
        ("a token twice", format!("xi-api-key: {TOKEN}\r\nxi-api-key: {TOKEN}\r\n")),
        (
            "a token in all places",
            format!(
                "x-keychoir-token: {TOKEN}\r\nxi-api-key: {TOKEN}\r\nxi_api_key: {TOKEN}\r\nauthorization: Bearer {TOKEN}\r\n\
             proxy-authorization: Bearer {TOKEN}\r\ncookie: a={TOKEN}\r\n"
            ),
        ),
        ("a token between blanks", format!("xi-api-key: \t {TOKEN} \t\r\n")),
        ("a token as a bearer", format!("authorization: bEaReR {TOKEN}\r\n")),
    ] {
        table.served(name, presenting(&headers));
    }
    let query = format!("/v1/voices?a=1&XI-API-KEY={TOKEN}&b=2&authorization={TOKEN}&xi%5Fapi_key={TOKEN}");
    table.served("a token in the query", honest(&query, ""));
}

fn protocols(table: &mut Table) {
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    table.pieces(
        "HTTP/2 with prior knowledge",
        vec![preface.to_vec()],
        Then::Read,
        Outcome::GoAway,
        Reach::Nothing,
    );
    let trickled = preface.iter().map(|byte| vec![*byte]).collect();
    table.pieces("HTTP/2 byte by byte", trickled, Then::Read, Outcome::GoAwayOr400, Reach::Nothing);
    table.add(
        "HTTP/2 by an upgrade",
        with("connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAAP__\r\n"),
        Then::AskAgain,
        &[200, 200],
        Reach::Whole(2),
    );
    // A TLS handshake record with invalid content.
    let hello = [&b"\x16\x03\x01\x00\x20"[..], &[0xab; 32]].concat();
    table.pieces(
        "a TLS handshake of noise",
        vec![hello.clone()],
        Then::Read,
        Outcome::Nothing,
        Reach::Nothing,
    );
    let empty = b"\x16\x03\x01\x00\x04\x01\x00\x00\x00".to_vec();
    table.pieces("a TLS handshake without a word", vec![empty], Then::Read, Outcome::Alert, Reach::Nothing);
    table.pieces(
        "half a TLS handshake",
        vec![hello[..20].to_vec()],
        Then::HalfClose,
        Outcome::Nothing,
        Reach::Nothing,
    );
    table.pieces(
        "TLS data without a handshake",
        vec![b"\x17\x03\x03\x00\x05hello".to_vec()],
        Then::Read,
        Outcome::Answers(&[400]),
        Reach::Nothing,
    );
    for (name, bytes) in [
        ("a banner of SSH", &b"SSH-2.0-OpenSSH_9.2\r\n"[..]),
        ("mail", b"EHLO evil.example\r\nMAIL FROM:<a@b>\r\n"),
        ("a proxy's preamble", b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n"),
        ("NULs", &[0; 512]),
        ("bytes beyond ASCII", &[0xff; 512]),
    ] {
        table.refused(name, bytes, &[400]);
    }
    let upgrade = |headers: &str| {
        honest(
            "/v1/text-to-speech/21m00Tcm4TlvDq8ikWAM/stream-input",
            &format!("connection: upgrade\r\nupgrade: websocket\r\n{headers}"),
        )
    };
    let key = "sec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n";
    table.add(
        "a handshake with a body",
        format!("{}hello", upgrade(&format!("{key}content-length: 5\r\n"))),
        Then::HalfClose,
        &[400],
        Reach::Nothing,
    );
    table.add(
        "a handshake with chunks",
        format!("{}0\r\n\r\n", upgrade(&format!("{key}transfer-encoding: chunked\r\n"))),
        Then::Read,
        &[400],
        Reach::Nothing,
    );
    table.add(
        "a handshake without a key",
        upgrade("sec-websocket-version: 13\r\n"),
        Then::AskAgain,
        &[400, 200],
        Reach::Whole(2),
    );
    table.add(
        "a handshake of an old version",
        upgrade("sec-websocket-version: 8\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"),
        Then::AskAgain,
        &[426, 200],
        Reach::Whole(2),
    );
    table.add(
        "a handshake that is posted",
        upgrade(key).replacen("GET", "POST", 1),
        Then::AskAgain,
        &[404, 200],
        Reach::Whole(2),
    );
    table.add(
        "a handshake of HTTP/1.0",
        upgrade(key).replacen("HTTP/1.1", "HTTP/1.0", 1),
        Then::HalfClose,
        &[404],
        Reach::Whole(1),
    );
    table.add(
        "words before a socket is open",
        format!("{}{}", upgrade(key), with("")),
        Then::Read,
        &[101],
        Reach::Whole(1),
    );
    table.add(
        "a bearer among the protocols",
        upgrade(&format!("{key}sec-websocket-protocol: bearer.{TOKEN}\r\n")),
        Then::HalfClose,
        &[101],
        Reach::Whole(1),
    );
}

fn behaviours(table: &mut Table) {
    let piece = |text: String| vec![text.into_bytes()];
    let trickled = |text: String| -> Vec<Vec<u8>> { text.bytes().map(|byte| vec![byte]).collect() };
    table.add(
        "three requests at once",
        with("").repeat(3),
        Then::HalfClose,
        &[200, 200, 200],
        Reach::Whole(3),
    );
    table.add(
        "a good request before a bad one",
        format!("{}nonsense\r\n\r\n{}", with(""), with("")),
        Then::Read,
        &[200, 400],
        Reach::Whole(1),
    );
    table.add(
        "a request behind a close",
        format!("{}{}", with("connection: close\r\n"), with("")),
        Then::Read,
        &[200],
        Reach::Whole(1),
    );
    let body = format!("{}hello{}", post("content-length: 5\r\n\r\n"), with(""));
    table.add("a request behind a body", body, Then::HalfClose, &[200, 200], Reach::Whole(2));
    table.pieces(
        "a request byte by byte",
        trickled(with("")),
        Then::AskAgain,
        Outcome::Answers(&[200, 200]),
        Reach::Whole(2),
    );
    let chunked = format!("{}5\r\nhello\r\n0\r\n\r\n", post("transfer-encoding: chunked\r\n\r\n"));
    table.pieces(
        "chunks byte by byte",
        trickled(chunked),
        Then::AskAgain,
        Outcome::Answers(&[200, 200]),
        Reach::Whole(2),
    );
    let expecting = post("expect: 100-continue\r\ncontent-length: 5\r\n\r\n");
    table.pieces(
        "a body that waits to be wanted",
        vec![expecting.clone().into_bytes(), b"hello".to_vec()],
        Then::AskAgain,
        Outcome::Answers(&[100, 200, 200]),
        Reach::Whole(2),
    );
    table.add(
        "an expectation that nobody knows",
        with("expect: 200-ok\r\n"),
        Then::AskAgain,
        &[200, 200],
        Reach::Whole(2),
    );
    let refused = expecting.replacen(TOKEN, "wrong", 1);
    table.add("a body that waits to be wanted and is not", refused, Then::HalfClose, &[401], Reach::Nothing);
    for (name, half) in [
        ("half a head", with("")[..40].to_owned()),
        ("half a body", format!("{}he", post("content-length: 5\r\n\r\n"))),
        ("half a chunk", format!("{}5\r\nhe", post("transfer-encoding: chunked\r\n\r\n"))),
        ("chunks without an end", format!("{}5\r\nhello\r\n", post("transfer-encoding: chunked\r\n\r\n"))),
    ] {
        let (outcome, reach) = match name {
            "half a head" => (Outcome::Nothing, Reach::Nothing),
            _ => (Outcome::Answers(&[400]), Reach::Cut),
        };
        table.pieces(name, piece(half.clone()), Then::HalfClose, outcome, reach);
        for then in [Then::Leave, Then::Reset] {
            table.pieces(name, piece(half.clone()), then, Outcome::Unseen, reach);
        }
    }
    // Whether a request of a client that disconnects at once gets through is a race.
    table.pieces("no word", Vec::new(), Then::HalfClose, Outcome::Nothing, Reach::Nothing);
    table.pieces("no word and a reset", Vec::new(), Then::Reset, Outcome::Unseen, Reach::Nothing);
    for then in [Then::Leave, Then::Reset] {
        table.pieces(
            "answers that are not read",
            piece(with("").repeat(50)),
            then,
            Outcome::Unseen,
            Reach::Whole(50),
        );
        table.pieces(
            "a whole body",
            piece(format!("{}hello", post("content-length: 5\r\n\r\n"))),
            then,
            Outcome::Unseen,
            Reach::Whole(1),
        );
    }
    table.pieces(
        "half a head, and nothing more",
        piece(with("")[..40].to_owned()),
        Then::Read,
        Outcome::Nothing,
        Reach::Nothing,
    );
    let silent = format!("{}he", post("content-length: 5\r\n\r\n"));
    table.pieces(
        "half a body, and nothing more",
        piece(silent),
        Then::Read,
        Outcome::Answers(&[408]),
        Reach::Cut,
    );
}

/// Sends the pieces and executes the behaviour; returns the received bytes.
///
/// # Errors
///
/// When the program does not end the connection.
pub async fn exchange(address: SocketAddr, pieces: &[Vec<u8>], then: Then) -> Result<Vec<u8>, String> {
    let mut got = Vec::new();
    let exchanged = timeout(EXCHANGE_TIMEOUT, converse(address, pieces, then, &mut got)).await;
    exchanged.map_err(|_| format!("the connection was not ended after {}", shown(&got)))?;
    Ok(got)
}

async fn converse(address: SocketAddr, pieces: &[Vec<u8>], then: Then, got: &mut Vec<u8>) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.set_nodelay(true).unwrap();
    let (mut from, mut to) = stream.split();
    let sending = async {
        for piece in pieces {
            // A server that has refused a request need not read on.
            if to.write_all(piece).await.is_err() {
                return;
            }
            tokio::task::yield_now().await;
        }
        if then == Then::HalfClose {
            let _ = to.shutdown().await;
        }
    };
    // A reset is an end, too.
    let reading = async {
        match then {
            Then::Read | Then::HalfClose => drop(from.read_to_end(got).await),
            Then::AskAgain | Then::Leave | Then::Reset => {}
        }
    };
    tokio::join!(sending, reading);
    if then == Then::AskAgain {
        first_answer(&mut from, got).await;
        let _ = to.write_all(honest("/v1/voices", "connection: close\r\n").as_bytes()).await;
        let _ = from.read_to_end(got).await;
    }
    if then == Then::Reset {
        stream.set_zero_linger().unwrap();
    }
}

/// Reads until there is a whole final response, or the connection has ended.
async fn first_answer(from: &mut (impl AsyncReadExt + Unpin), got: &mut Vec<u8>) {
    let is_there = |got: &[u8]| {
        wire::answers(got)
            .is_ok_and(|answers| answers.last().is_some_and(|last| last.status >= 200 && last.is_whole))
    };
    while !is_there(got) && from.read_buf(got).await.is_ok_and(|count| count > 0) {}
}

/// Compares the data that a client received with the expected outcome.
pub fn check(got: &[u8], outcome: Outcome, then: Then) -> Result<(), String> {
    let is_so = match outcome {
        Outcome::Answers(statuses) => {
            let mut answers = wire::answers(got)?;
            // An interim 100 checks whether a client that has closed its write half is still
            // connected.
            answers.retain(|answer| answer.status != 100 || then != Then::HalfClose);
            let found: Vec<u16> = answers.iter().map(|answer| answer.status).collect();
            if found != statuses {
                return Err(format!("{found:?} instead of {statuses:?}: {}", shown(got)));
            }
            answers.iter().all(|answer| answer.is_whole)
        }
        // SETTINGS, and GOAWAY with HTTP_1_1_REQUIRED.
        Outcome::GoAway => got.len() == 26 && got[3] == 4 && got[12] == 7 && got[25] == 0xd,
        Outcome::GoAwayOr400 => [Outcome::GoAway, Outcome::Answers(&[400])]
            .into_iter()
            .any(|outcome| check(got, outcome, then).is_ok()),
        Outcome::Alert => got.starts_with(b"\x15\x03"),
        Outcome::Nothing | Outcome::Unseen => got.is_empty(),
    };
    if is_so { Ok(()) } else { Err(format!("not {outcome:?}: {}", shown(got))) }
}

/// Whether a client may receive these bytes, whatever it has sent: HTTP, refused HTTP/2, or a TLS
/// alert. The response may be to a HEAD, so its body is not checked.
pub fn is_plausible(got: &[u8]) -> bool {
    let starts = [&b"HTTP/1.1 "[..], b"HTTP/1.0 ", b"\0\0\0\x04", b"\x15\x03", b"\x16\x03"];
    got.is_empty() || starts.iter().any(|start| got.starts_with(start))
}

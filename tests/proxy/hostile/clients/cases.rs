//! The table of hostile clients. This file contains the cases about request heads, paths, hosts, origins and
//! credentials, and the submodules contain those about framings, other protocols and timings. Some cases are unusual
//! but valid requests, which must be served.

mod framings;
mod protocols;
mod timings;

use super::{AfterSending, ClientCase, ClientOutcome, Forwarded, TOKEN};

/// Returns a complete request that is served.
pub fn valid_request(path: &str, more_headers: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nxi-api-key: {TOKEN}\r\n{more_headers}\r\n")
}

/// Returns the head of a POST that is served, with the given `headers` and without the empty line.
fn post_head(headers: &str) -> String {
    format!("POST /v1/simulator/echo HTTP/1.1\r\nhost: localhost\r\nxi-api-key: {TOKEN}\r\n{headers}")
}

/// Returns a GET that is served, with the given further headers.
fn get_with(headers: &str) -> String {
    valid_request("/v1/voices", headers)
}

/// The cases that were added so far.
#[derive(Default)]
struct CaseTable(Vec<ClientCase>);

impl CaseTable {
    fn add(
        &mut self,
        name: &'static str,
        bytes: impl AsRef<[u8]>,
        after_sending: AfterSending,
        statuses: &'static [u16],
        forwarded: Forwarded,
    ) {
        self.add_chunks(
            name,
            vec![bytes.as_ref().to_vec()],
            after_sending,
            ClientOutcome::Responses(statuses),
            forwarded,
        );
    }

    fn add_chunks(
        &mut self,
        name: &'static str,
        chunks: Vec<Vec<u8>>,
        after_sending: AfterSending,
        outcome: ClientOutcome,
        forwarded: Forwarded,
    ) {
        self.0.push(ClientCase { name, chunks, after_sending, outcome, forwarded, needs_no_token: false });
    }

    /// Adds a request that is refused with the given `status`. The proxy closes the connection and does not parse the
    /// following bytes as a request.
    fn add_refused(&mut self, name: &'static str, bytes: impl AsRef<[u8]>, status: &'static [u16; 1]) {
        let smuggled = valid_request("/v1/voices?smuggled=1", "");
        self.add(
            name,
            [bytes.as_ref(), smuggled.as_bytes()].concat(),
            AfterSending::ReadToEnd,
            status,
            Forwarded::Nothing,
        );
    }

    /// Adds a request that is refused on a connection that stays open, so that its next request is served.
    fn add_refused_keep_alive(
        &mut self,
        name: &'static str,
        bytes: impl AsRef<[u8]>,
        statuses: &'static [u16; 2],
    ) {
        self.add(name, bytes, AfterSending::SendAnotherRequest, statuses, Forwarded::Complete(1));
    }

    /// Adds a request that is served. The next request of the connection must be served as well.
    fn add_served(&mut self, name: &'static str, bytes: impl AsRef<[u8]>) {
        self.add(name, bytes, AfterSending::SendAnotherRequest, &[200, 200], Forwarded::Complete(2));
    }
}

/// Returns all cases.
pub fn cases() -> Vec<ClientCase> {
    let mut table = CaseTable::default();
    framings::add_framings(&mut table);
    add_heads(&mut table);
    add_paths(&mut table);
    add_credentials_and_origins(&mut table);
    protocols::add_protocols(&mut table);
    timings::add_timings(&mut table);
    table.0
}

fn add_heads(table: &mut CaseTable) {
    let request_with_line = |line: &str| format!("{line}\r\nhost: localhost\r\nxi-api-key: {TOKEN}\r\n\r\n");
    for (name, first_line) in [
        ("a request line without a version", "GET /v1/voices"),
        ("an unknown version", "GET /v1/voices HTTP/3.0"),
        ("a version without a minor number", "GET /v1/voices HTTP/1"),
        ("a lower-case version", "GET /v1/voices http/1.1"),
        ("a space in the target", "GET /v1/voi ces HTTP/1.1"),
        ("a tab instead of a space", "GET\t/v1/voices\tHTTP/1.1"),
        ("a relative target", "GET v1/voices HTTP/1.1"),
        ("another host in the target", "GET http://elsewhere.example/v1/voices HTTP/1.1"),
        ("a user in the target", "GET http://localhost@elsewhere.example/v1/voices HTTP/1.1"),
        ("a control character in the target", "GET /v1/\x01voices HTTP/1.1"),
        ("a method with a colon", "G:T /v1/voices HTTP/1.1"),
        ("a request line without a method", " /v1/voices HTTP/1.1"),
    ] {
        table.add_refused(name, request_with_line(first_line), &[400]);
    }
    table.add_refused_keep_alive(
        "the asterisk form with another method than OPTIONS",
        request_with_line("GET * HTTP/1.1"),
        &[400, 200],
    );
    table.add(
        "TRACE",
        get_with("").replacen("GET", "TRACE", 1),
        AfterSending::HalfClose,
        &[405],
        Forwarded::Nothing,
    );
    table.add(
        "CONNECT",
        request_with_line("CONNECT localhost:443 HTTP/1.1"),
        AfterSending::HalfClose,
        &[405],
        Forwarded::Nothing,
    );
    table.add(
        "a long method",
        get_with("").replacen("GET", &"A".repeat(10_000), 1),
        AfterSending::HalfClose,
        &[501],
        Forwarded::Nothing,
    );
    table.add(
        "a lower-case method",
        get_with("").replacen("GET", "get", 1),
        AfterSending::HalfClose,
        &[405],
        Forwarded::Complete(1),
    );
    table.add_refused(
        "a long target",
        get_with("").replacen("/v1/voices", &format!("/{}", "a".repeat(70_000)), 1),
        &[414],
    );
    table.add_refused("a long header", get_with(&format!("x-a: {}\r\n", "a".repeat(200_000))), &[431]);
    table.add_refused("many headers", get_with(&"x-a: b\r\n".repeat(5_000)), &[431]);
    table.add_refused("a header without a name", get_with(": b\r\n"), &[400]);
    table.add_refused("a header without a colon", get_with("x-a\r\n"), &[400]);
    table.add_refused("a space in a header name", get_with("x a: b\r\n"), &[400]);
    table.add_refused("a header name that is not ASCII", get_with("x-\u{e4}: b\r\n"), &[400]);
    table.add_refused(
        "a request without a host",
        get_with("").replacen("host: localhost\r\n", "", 1),
        &[400],
    );
    table.add_refused("two equal hosts", get_with("host: localhost\r\n"), &[400]);
    table.add_refused("two different hosts", get_with("Host: elsewhere.example\r\n"), &[400]);
    table.add_served("empty lines before a request", format!("\r\n\r\n{}", get_with("")));
    table.add_served("a header value that is not ASCII", get_with("x-a: \u{e4}\r\n"));
    table.add_served("a header value of spaces and tabs", get_with("x-a: \t \r\n"));
    table.add_served("a head of 40 KB", get_with(&format!("x-a: {}\r\n", "a".repeat(40_000))));
}

fn add_paths(table: &mut CaseTable) {
    for (name, path) in [
        ("dots before a semicolon", "/v1/voices/..;/service-accounts"),
        ("encoded dots", "/v1/voices/%2e%2e/service-accounts"),
        ("plain dots", "/v1/voices/../service-accounts"),
        ("encoded slashes", "/v1/voices%2f..%2fservice-accounts"),
        ("dots that are percent-encoded twice", "/v1/voices/%252e%252e/service-accounts"),
        ("backslashes", "/v1/voices\\..\\service-accounts"),
        ("an encoded NUL", "/v1/service-accounts%00"),
        ("dots as overlong UTF-8", "/v1/voices/%c0%ae%c0%ae/service-accounts"),
        ("a path segment with a parameter", "/v1/service-accounts;x"),
        ("an encoded question mark", "/v1/service-accounts%3fx"),
        ("an encoded number sign", "/v1/service-accounts%23x"),
        ("an encoded space at the end", "/v1/service-accounts%20"),
        ("an incomplete percent-escape", "/v1/service-accounts%2"),
        ("a %u escape", "/v1/voices/%u002e%u002e/service-accounts"),
        ("a fullwidth dot", "/v1/voices/%ef%bc%8e%ef%bc%8e/service-accounts"),
        ("an encoded line feed", "/v1/voices%0d%0axi-api-key:%20x"),
    ] {
        table.add_refused_keep_alive(name, valid_request(path, ""), &[400, 200]);
    }
    for (name, path) in [
        ("a blocked path", "/v1/service-accounts"),
        ("a blocked path in upper case", "/V1/SERVICE-ACCOUNTS"),
        ("a blocked path with a percent-escape", "/v1/%73ervice-accounts"),
        ("a blocked path with a trailing slash", "/v1/service-accounts/"),
        ("a blocked path with two slashes, which are normalized", "/v1//service-accounts"),
        ("a blocked path with two version segments", "/v1/v1/service-accounts"),
        ("a blocked path without a version segment", "/service-accounts"),
    ] {
        table.add_refused_keep_alive(name, valid_request(path, ""), &[403, 200]);
    }
}

fn add_credentials_and_origins(table: &mut CaseTable) {
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
    table
        .add_served("headers that proxies add", get_with(&forged.map(|line| format!("{line}\r\n")).concat()));
    for (name, host) in [
        ("a foreign host", "elsewhere.example"),
        ("a host with a user", "localhost@elsewhere.example"),
        ("two hosts in one header", "localhost, elsewhere.example"),
        ("an empty host", ""),
        ("a host that is not ASCII", "localh\u{f6}st"),
    ] {
        let request = get_with("").replacen("localhost", host, 1);
        table.add(name, request, AfterSending::HalfClose, &[421], Forwarded::Nothing);
        table.0.last_mut().unwrap().needs_no_token = true;
    }
    for (name, headers) in [
        ("a page of a foreign origin", "origin: https://evil.example\r\n"),
        ("a page with an opaque origin", "origin: null\r\n"),
        ("a page of another site", "sec-fetch-site: cross-site\r\n"),
        ("two origins", "origin: http://localhost\r\norigin: https://evil.example\r\n"),
    ] {
        for needs_no_token in [false, true] {
            table.add(name, get_with(headers), AfterSending::HalfClose, &[403], Forwarded::Nothing);
            table.0.last_mut().unwrap().needs_no_token = needs_no_token;
        }
    }
    let get_without_token = get_with("").replacen(&format!("xi-api-key: {TOKEN}\r\n"), "", 1);
    let get_with_credential =
        |headers: &str| get_without_token.replacen("\r\n\r\n", &format!("\r\n{headers}\r\n"), 1);
    for (name, headers) in [
        ("a request without a token", String::new()),
        ("a wrong token", "xi-api-key: wrong\r\n".to_owned()),
        ("an empty token", "xi-api-key:\r\n".to_owned()),
        ("the first half of a token", format!("xi-api-key: {}\r\n", &TOKEN[..10])),
        ("a token with a suffix", format!("xi-api-key: {TOKEN}x\r\n")),
        ("a token in upper case", format!("xi-api-key: {}\r\n", TOKEN.to_uppercase())),
        ("a long token", format!("xi-api-key: {}\r\n", "a".repeat(30_000))),
        (
            "a key of the pool instead of a token",
            "xi-api-key: sk_key_number_one_000000000000000000000000000000001\r\n".to_owned(),
        ),
    ] {
        table.add(name, get_with_credential(&headers), AfterSending::HalfClose, &[401], Forwarded::Nothing);
    }
    for (name, headers) in [
        ("two equal tokens", format!("xi-api-key: {TOKEN}\r\nxi-api-key: {TOKEN}\r\n")),
        (
            "a token in every credential header",
            format!(
                "x-keychoir-token: {TOKEN}\r\nxi-api-key: {TOKEN}\r\nxi_api_key: {TOKEN}\r\nauthorization: Bearer {TOKEN}\r\n\
             proxy-authorization: Bearer {TOKEN}\r\ncookie: a={TOKEN}\r\n"
            ),
        ),
        ("a token between spaces and tabs", format!("xi-api-key: \t {TOKEN} \t\r\n")),
        ("a token as a bearer", format!("authorization: bEaReR {TOKEN}\r\n")),
    ] {
        table.add_served(name, get_with_credential(&headers));
    }
    let query = format!("/v1/voices?a=1&XI-API-KEY={TOKEN}&b=2&authorization={TOKEN}&xi%5Fapi_key={TOKEN}");
    table.add_served("a token in the query", valid_request(&query, ""));
}

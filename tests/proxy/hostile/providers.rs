//! Hostile providers: their responses, the timing, the end of the connection, and the expected
//! outcome.

use std::io::{Read, Write};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use flate2::Compression;
use flate2::read::{MultiGzDecoder, ZlibDecoder};
use flate2::write::GzEncoder;
use keychoir::tasks::Tasks;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::OwnedWriteHalf;
use tokio::net::{TcpListener, TcpStream};

use super::wire::{self, Answer, Head, Requests};
use super::{contains, shown};
use crate::support::SPEECH_PATH;

/// A provider, and the outcome that the client must observe.
pub struct Row {
    pub name: &'static str,
    pub ask: Ask,
    pub says: Says,
    pub outcome: Outcome,
    /// Maximum number of keys that may be unusable afterwards.
    pub rests: usize,
    /// Whether the response may change the state of keys, and so affect the next requests.
    pub teaches: bool,
}

/// The request of the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Retried when there is no response.
    Voices,
    /// Sent once.
    Speech,
    /// A WebSocket handshake.
    Socket,
}

/// The bytes that the provider sends, whatever the request.
#[derive(Clone, Debug, Default)]
pub struct Says {
    pub pieces: Vec<Vec<u8>>,
    pub end: End,
    /// Sent as soon as the connection is open, before a request.
    pub is_early: bool,
    /// Sent after the client has its response.
    pub late: Vec<u8>,
}

/// The behaviour of the provider after its response.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum End {
    /// It waits for the next request.
    #[default]
    Open,
    Close,
    Reset,
    /// It sends these bytes again and again.
    Flood(&'static [u8]),
}

/// The response that a client receives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A response with this status and a clean end.
    Whole(u16),
    /// The same, with this body.
    Body(u16, &'static str),
    /// A response with this status that is recognizably truncated; or no response at all, if the
    /// break came before its head was sent.
    Cut(u16),
    /// A response of the program's own with this status.
    Ours(u16),
}

pub const GOOD_VOICES: &str = "{\"voices\":[]}";
pub const GOOD_SPEECH: &str = "sound";

/// The mark of regular requests: they always get good responses.
pub const HONEST: &str = "honest=1";

/// A request of a client that reads one response, as bytes.
pub fn request(ask: Ask, query: &str) -> Vec<u8> {
    let body = r#"{"text":"Hello.","model_id":"eleven_multilingual_v2"}"#;
    let rest = match ask {
        Ask::Voices => "connection: close\r\n\r\n".to_owned(),
        Ask::Speech => {
            format!(
                "connection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
                body.len()
            )
        }
        Ask::Socket => "connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n\
            sec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
            .to_owned(),
    };
    let (method, path) = match ask {
        Ask::Voices => ("GET", "/v1/voices".to_owned()),
        Ask::Speech => ("POST", SPEECH_PATH.to_owned()),
        Ask::Socket => ("GET", format!("{SPEECH_PATH}/stream-input")),
    };
    format!("{method} {path}?{query} HTTP/1.1\r\nhost: localhost\r\n{rest}").into_bytes()
}

/// A provider with scripted responses.
pub struct Provider {
    pub url: String,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    says: Mutex<Says>,
    /// Its response when it is polled.
    subscription: Mutex<Option<Says>>,
    open: Mutex<Vec<Arc<tokio::sync::Mutex<OwnedWriteHalf>>>>,
    faults: Mutex<Vec<String>>,
    /// Responses that are being sent.
    saying: AtomicUsize,
}

impl Provider {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::new(State::default());
        let serving = Arc::clone(&state);
        Tasks::new().spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                Tasks::new().spawn(serve(stream, Arc::clone(&serving)));
            }
        });
        Self { url, state }
    }

    pub fn says(&self, says: Says) {
        *self.state.says.lock().unwrap() = says;
    }

    /// Sets the response to polls of an account's credits.
    pub fn says_of_accounts(&self, says: Says) {
        *self.state.subscription.lock().unwrap() = Some(says);
    }

    /// Sends bytes on every open connection.
    pub async fn shout(&self, bytes: &[u8]) {
        let open = self.state.open.lock().unwrap().clone();
        for stream in open {
            let _ = stream.lock().await.write_all(bytes).await;
        }
    }

    /// Whether it has sent everything, and closed the connections to be closed.
    pub fn is_silent(&self) -> bool {
        self.state.saying.load(Ordering::SeqCst) == 0
    }

    /// Malformed requests.
    pub fn faults(&self) -> Vec<String> {
        std::mem::take(&mut *self.state.faults.lock().unwrap())
    }
}

async fn serve(stream: TcpStream, state: Arc<State>) {
    stream.set_nodelay(true).unwrap();
    let (mut from, to) = stream.into_split();
    let to = Arc::new(tokio::sync::Mutex::new(to));
    state.open.lock().unwrap().push(Arc::clone(&to));
    session(&mut from, &to, &state).await;
    state.open.lock().unwrap().retain(|open| !Arc::ptr_eq(open, &to));
}

async fn session(
    from: &mut (impl AsyncReadExt + Unpin + AsRef<TcpStream>),
    to: &tokio::sync::Mutex<OwnedWriteHalf>,
    state: &State,
) {
    let early = Some(state.says.lock().unwrap().clone()).filter(|says| says.is_early);
    let mut is_answered = early.is_some();
    if let Some(early) = early
        && !say(from, to, &early, state).await
    {
        return;
    }
    let (mut requests, mut bytes) = (Requests::default(), vec![0; 64 * 1024]);
    let mut heads: Vec<Head> = Vec::new();
    while let Ok(count @ 1..) = from.read(&mut bytes).await {
        match requests.feed(&bytes[..count]) {
            Ok(more) => heads.extend(more),
            Err(fault) => return state.faults.lock().unwrap().push(fault),
        }
        for _ in 0..std::mem::take(&mut requests.whole) {
            let head = heads.remove(0);
            requests.answered(false);
            if std::mem::take(&mut is_answered) {
                continue;
            }
            if !say(from, to, &answer(&head, state), state).await {
                return;
            }
        }
    }
}

/// The response to a request.
fn answer(head: &Head, state: &State) -> Says {
    let path = head.target.split('?').next().unwrap();
    let key = head.values("xi-api-key").next().unwrap_or_default();
    let account = String::from_utf8_lossy(key).chars().last().unwrap_or_default();
    let polled = state.subscription.lock().unwrap().clone();
    let is_honest = head.target.contains(HONEST);
    let (kind, body) = match path {
        "/v1/user/subscription" if polled.is_some() => return polled.unwrap(),
        "/v1/user/subscription" => {
            let body = json!({"tier": "creator", "status": "active", "character_count": 0, "character_limit": 100_000});
            ("application/json", body.to_string())
        }
        "/v1/user" => ("application/json", json!({"workspace_id": format!("ws_{account}")}).to_string()),
        "/v1/models" => ("application/json", "[]".to_owned()),
        "/v1/voices" if is_honest => ("application/json", GOOD_VOICES.to_owned()),
        _ if is_honest => ("audio/mpeg\r\ncharacter-cost: 5", GOOD_SPEECH.to_owned()),
        _ => return state.says.lock().unwrap().clone(),
    };
    let text =
        format!("HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    Says { pieces: vec![text.into_bytes()], ..Says::default() }
}

/// Sends the response; returns whether the connection goes on.
async fn say(
    from: &impl AsRef<TcpStream>,
    to: &tokio::sync::Mutex<OwnedWriteHalf>,
    says: &Says,
    state: &State,
) -> bool {
    state.saying.fetch_add(1, Ordering::SeqCst);
    let goes_on = send(from, to, says).await;
    state.saying.fetch_sub(1, Ordering::SeqCst);
    goes_on
}

async fn send(from: &impl AsRef<TcpStream>, to: &tokio::sync::Mutex<OwnedWriteHalf>, says: &Says) -> bool {
    let mut stream = to.lock().await;
    for piece in &says.pieces {
        // The proxy may close before it has read all.
        if stream.write_all(piece).await.is_err() {
            return false;
        }
        tokio::task::yield_now().await;
    }
    match says.end {
        End::Open => return true,
        End::Close => {}
        End::Reset => from.as_ref().set_zero_linger().unwrap(),
        End::Flood(bytes) => {
            let flood = bytes.repeat((32 * 1024 / bytes.len()).max(1));
            while stream.write_all(&flood).await.is_ok() {}
        }
    }
    let _ = stream.shutdown().await;
    false
}

pub fn gzip(text: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(text).unwrap();
    encoder.finish().unwrap()
}

/// A head and a body with its length.
fn message(head: &str, body: &[u8]) -> Vec<u8> {
    let head = format!("HTTP/1.1 {head}\r\ncontent-length: {}\r\n\r\n", body.len());
    [head.as_bytes(), body].concat()
}

/// A head and raw chunks.
fn chunked(head: &str, chunks: &str) -> Vec<u8> {
    format!("HTTP/1.1 {head}\r\ntransfer-encoding: chunked\r\n\r\n{chunks}").into_bytes()
}

#[derive(Default)]
struct Table(Vec<Row>);

impl Table {
    fn add(&mut self, name: &'static str, bytes: impl AsRef<[u8]>, outcome: Outcome) -> &mut Row {
        let says = Says { pieces: vec![bytes.as_ref().to_vec()], end: End::Close, ..Says::default() };
        self.0.push(Row { name, ask: Ask::Voices, says, outcome, rests: 0, teaches: false });
        self.0.last_mut().unwrap()
    }
}

/// The table for a pool of two keys, of which `key` is one.
pub fn table(key: &str) -> Vec<Row> {
    let mut table = Table::default();
    heads(&mut table);
    framings(&mut table);
    moments(&mut table);
    encodings(&mut table);
    secrets(&mut table, key);
    refusals(&mut table);
    table.0
}

fn heads(table: &mut Table) {
    let ok = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n";
    for (name, bytes) in [
        ("nothing", ""),
        ("half a status line", "HTTP/1.1 2"),
        ("a banner of SSH", "SSH-2.0-OpenSSH_9.2\r\n\r\n"),
        ("a status of two digits", "HTTP/1.1 99 X\r\ncontent-length: 2\r\n\r\nok"),
        ("a status of four digits", "HTTP/1.1 2000 X\r\ncontent-length: 2\r\n\r\nok"),
        ("a status that is no number", "HTTP/1.1 2x0 OK\r\ncontent-length: 2\r\n\r\nok"),
        ("another version", "HTTP/2.0 200 OK\r\ncontent-length: 2\r\n\r\nok"),
        ("another protocol", "ICY 200 OK\r\n\r\nok"),
        ("a header without a colon", "HTTP/1.1 200 OK\r\nbad header\r\n\r\n"),
        ("a header without a name", "HTTP/1.1 200 OK\r\n: bad\r\n\r\n"),
        ("a NUL in a header", "HTTP/1.1 200 OK\r\nx-a: b\0c\r\ncontent-length: 2\r\n\r\nok"),
        ("a folded header", "HTTP/1.1 200 OK\r\nx-a: b\r\n c\r\ncontent-length: 2\r\n\r\nok"),
        ("a page without a head", "<html>Bad Gateway</html>"),
    ] {
        table.add(name, bytes, Outcome::Ours(502));
    }
    table.add("a long header", format!("{ok}x-a: {}\r\n\r\nok", "a".repeat(1 << 20)), Outcome::Ours(502));
    table.add("many headers", format!("{ok}{}\r\nok", "x-a: b\r\n".repeat(10_000)), Outcome::Ours(502));
    table.add("a header without end", ok, Outcome::Ours(502)).says.end = End::Flood(b"x-a: b\r\n");
    table.add("a status line without end", "HTTP/1.1 200 ", Outcome::Ours(502)).says.end = End::Flood(b"a");
    table.add("a status of no meaning", message("999 X", b"ok"), Outcome::Body(999, "ok"));
    table.add("no reason", message("200", b"ok"), Outcome::Body(200, "ok"));
    table.add("a reason that is not ASCII", message("200 \u{e4}", b"ok"), Outcome::Body(200, "ok"));
    table.add(
        "lines that end in LF alone",
        "HTTP/1.1 200 OK\ncontent-length: 2\n\nok",
        Outcome::Body(200, "ok"),
    );
    table.add("an old version", "HTTP/1.0 200 OK\r\n\r\nok", Outcome::Body(200, "ok"));
    let origin = "200 OK\r\nset-cookie: a=b; domain=localhost\r\nstrict-transport-security: max-age=9\r\nalt-svc: h3=\":1\"\r\n\
        clear-site-data: \"*\"\r\nnel: {}\r\nreport-to: {}\r\nconnection: x-mine\r\nx-mine: 1\r\nkeep-alive: timeout=9\r\nproxy-authenticate: Basic";
    table.add("words about its origin", message(origin, b"ok"), Outcome::Body(200, "ok"));
    table.add("a redirect", message("302 Found\r\nlocation: http://127.0.0.1:1/", b""), Outcome::Whole(302));
    table.add(
        "an authentication of its own",
        message("407 X\r\nproxy-authenticate: Basic", b""),
        Outcome::Whole(407),
    );
}

fn framings(table: &mut Table) {
    let ok = |headers: &str| format!("HTTP/1.1 200 OK\r\n{headers}\r\n\r\nok");
    for (name, headers) in [
        ("two lengths", "content-length: 2\r\ncontent-length: 3"),
        ("two lengths in a list", "content-length: 2, 3"),
        ("a negative length", "content-length: -2"),
        ("a signed length", "content-length: +2"),
        ("a length beyond numbers", "content-length: 99999999999999999999"),
        ("no length", "content-length:"),
        ("another coding", "transfer-encoding: gzip, chunked"),
        ("an unknown coding", "transfer-encoding: something"),
        ("chunks twice", "transfer-encoding: chunked\r\ntransfer-encoding: chunked"),
    ] {
        table.add(name, ok(headers), Outcome::Ours(502));
    }
    table.add(
        "chunks of HTTP/1.0",
        "HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        Outcome::Ours(502),
    );
    table.add(
        "a length twice the same",
        ok("content-length: 2\r\ncontent-length: 2"),
        Outcome::Body(200, "ok"),
    );
    table.add(
        "chunks and a length",
        chunked("200 OK\r\ncontent-length: 9", "2\r\nok\r\n0\r\n\r\n"),
        Outcome::Body(200, "ok"),
    );
    table.add(
        "chunk extensions and trailers",
        chunked("200 OK", "2;a=b\r\nok\r\n0\r\nx-a: b\r\n\r\n"),
        Outcome::Body(200, "ok"),
    );
    for (name, chunks) in [
        ("no size of a chunk", "2\r\nok\r\nzz\r\n"),
        ("a size beyond numbers", "2\r\nok\r\nfffffffffffffffff\r\nmore"),
        ("a negative size", "2\r\nok\r\n-2\r\nok\r\n0\r\n\r\n"),
        ("a chunk longer than its size", "2\r\nokok\r\n0\r\n\r\n"),
        ("half a chunk", "2\r\nok\r\n7fffffffffffffff\r\nmore"),
        ("chunks without an end", "2\r\nok\r\n"),
        ("trailers that are none", "2\r\nok\r\n0\r\nbad\r\n\r\n"),
        ("half a trailer", "2\r\nok\r\n0\r\nx-a"),
    ] {
        table.add(name, chunked("200 OK", chunks), Outcome::Cut(200));
    }
    table.add("trailers without end", chunked("200 OK", "2\r\nok\r\n0\r\n"), Outcome::Cut(200)).says.end =
        End::Flood(b"x-a: b\r\n");
    table
        .add("a chunk extension without end", chunked("200 OK", "2\r\nok\r\n2;"), Outcome::Cut(200))
        .says
        .end = End::Flood(b"a");
    table.add("half a body", "HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf", Outcome::Cut(200));
    table.add(
        "a length of 2^63",
        "HTTP/1.1 200 OK\r\ncontent-length: 9223372036854775807\r\n\r\nhalf",
        Outcome::Cut(200),
    );
    let reset =
        table.add("a reset in a body", "HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf", Outcome::Cut(200));
    reset.says.end = End::Reset;
    table.add("a reset for an answer", "", Outcome::Ours(502)).says.end = End::Reset;
    table.add(
        "a body where none may be",
        "HTTP/1.1 204 X\r\ncontent-length: 2\r\n\r\nok",
        Outcome::Whole(204),
    );
}

fn moments(table: &mut Table) {
    let ok = message("200 OK", b"ok");
    let poison = message("200 OK", b"poison");
    let interim =
        b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n".repeat(1_000);
    table.add("many interim answers", [interim, ok.clone()].concat(), Outcome::Body(200, "ok"));
    table.add("interim answers without end", "", Outcome::Ours(502)).says.end =
        End::Flood(b"HTTP/1.1 100 X\r\n\r\n");
    table.add("empty lines without end", "", Outcome::Ours(502)).says.end = End::Flood(b"\r\n");
    for (name, status) in [("a switch without being asked", 101), ("a processing answer alone", 102)] {
        table.add(
            name,
            format!("HTTP/1.1 {status} X\r\nupgrade: x\r\nconnection: upgrade\r\n\r\nx"),
            Outcome::Ours(502),
        );
    }
    table.add("an answer before its request", &ok, Outcome::Body(200, "ok")).says.is_early = true;
    table
        .add("two answers before a request", [&*ok, &poison].concat(), Outcome::Body(200, "ok"))
        .says
        .is_early = true;
    let early = table.add(
        "a refusal before an upload",
        message("413 X\r\nconnection: close", b"no"),
        Outcome::Body(413, "no"),
    );
    (early.says.is_early, early.ask) = (true, Ask::Speech);
    let two = table.add("two answers for one request", [&*ok, &poison].concat(), Outcome::Body(200, "ok"));
    two.says.end = End::Open;
    let late = table.add("an answer that nobody asked for", &ok, Outcome::Body(200, "ok"));
    (late.says.end, late.says.late) = (End::Open, poison);
    let trickled = table.add("an answer byte by byte", "", Outcome::Body(200, "ok"));
    trickled.says.pieces = ok.iter().map(|byte| vec![*byte]).collect();
    let switched =
        "HTTP/1.1 101 X\r\nupgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-accept: AAAA\r\n\r\n";
    table.add("a socket with a wrong accept", switched, Outcome::Ours(502)).ask = Ask::Socket;
    table
        .add("a socket of another protocol", switched.replace("websocket\r\n", "x\r\n"), Outcome::Ours(502))
        .ask = Ask::Socket;
    table.add("no socket, but an answer", &ok, Outcome::Body(200, "ok")).ask = Ask::Socket;
}

fn encodings(table: &mut Table) {
    let json = "200 OK\r\ncontent-type: application/json\r\ncontent-encoding:";
    let bomb = gzip(&vec![b' '; 16 << 20]);
    table.add("a bomb", message(&format!("{json} gzip"), &bomb), Outcome::Whole(200));
    table.add("a bomb in a bomb", message(&format!("{json} gzip, gzip"), &gzip(&bomb)), Outcome::Whole(200));
    table.add("a bomb that refuses", message("400 X\r\ncontent-encoding: gzip", &bomb), Outcome::Whole(400));
    table.add(
        "half of what is compressed",
        message(&format!("{json} gzip"), &gzip(b"{}")[..12]),
        Outcome::Whole(200),
    );
    for (name, encoding) in [
        ("text that is called gzip", "gzip"),
        ("text that is called deflate", "deflate"),
        ("text that is called br", "br"),
        ("text in no encoding that there is", "utf-8"),
        ("text in ten encodings", "gzip, gzip, gzip, gzip, gzip, gzip, gzip, gzip, gzip, gzip"),
    ] {
        table.add(name, message(&format!("{json} {encoding}"), b"{}"), Outcome::Body(200, "{}"));
    }
}

fn secrets(table: &mut Table, key: &str) {
    let text = format!("{{\"key\":\"{key}\"}}");
    table.add(
        "a key in headers",
        message(&format!("200 OK\r\nx-a: {key}\r\nx-b: Bearer {key}, {key}\r\nlocation: /?k={key}"), b"ok"),
        Outcome::Body(200, "ok"),
    );
    table.add("a key as a reason", message(&format!("200 {key}"), b"ok"), Outcome::Body(200, "ok"));
    table.add(
        "a key as the name of a header",
        message(&format!("200 OK\r\n{key}: a"), b"ok"),
        Outcome::Body(200, "ok"),
    );
    table.add(
        "a key in a document",
        message("200 OK\r\ncontent-type: application/json", text.as_bytes()),
        Outcome::Whole(200),
    );
    table.add("a key in a text without a type", message("200 OK", text.as_bytes()), Outcome::Whole(200));
    table
        .add(
            "a key in a page",
            message("500 X\r\ncontent-type: text/html", text.as_bytes()),
            Outcome::Whole(500),
        )
        .ask = Ask::Speech;
    table.add(
        "a key in a refusal",
        message("422 X\r\ncontent-type: application/json", text.as_bytes()),
        Outcome::Whole(422),
    );
    let (start, end) = text.split_at(20);
    let chunks = format!("{:x}\r\n{start}\r\n{:x}\r\n{end}\r\n0\r\n\r\n", start.len(), end.len());
    table.add("a key in two chunks", chunked("200 OK", &chunks), Outcome::Whole(200));
    let pieces = table.add("a key byte by byte", "", Outcome::Whole(200));
    pieces.says.pieces = message("200 OK", text.as_bytes()).iter().map(|byte| vec![*byte]).collect();
    let trailers = format!("2\r\nok\r\n0\r\nx-a: {key}\r\n\r\n");
    table.add("a key in a trailer", chunked("200 OK\r\ntrailer: x-a", &trailers), Outcome::Body(200, "ok"));
    let escaped: String = key.bytes().map(|byte| format!("\\u{byte:04x}")).collect();
    table.add(
        "a key in escapes",
        message("200 OK\r\ncontent-type: application/json", format!("{{\"k\":\"{escaped}\"}}").as_bytes()),
        Outcome::Whole(200),
    );
    let wide: Vec<u8> = key.encode_utf16().flat_map(u16::to_le_bytes).collect();
    table.add(
        "a key in UTF-16",
        message("200 OK\r\ncontent-type: text/plain; charset=utf-16", &wide),
        Outcome::Whole(200),
    );
    let packed = "200 OK\r\ncontent-type: application/json\r\ncontent-encoding: gzip";
    table.add("a compressed key", message(packed, &gzip(text.as_bytes())), Outcome::Whole(200));
    table.add(
        "a key that is compressed twice",
        message(&packed.replace("gzip", "gzip, gzip"), &gzip(&gzip(text.as_bytes()))),
        Outcome::Whole(200),
    );
    let body = gzip(text.as_bytes());
    let streamed = [format!("HTTP/1.1 {packed}\r\n\r\n").as_bytes(), &body].concat();
    table.add("a compressed key in a stream", streamed, Outcome::Cut(200));
    table.add(
        "a key in an encoding that is none",
        message(&packed.replace("gzip", "utf-8"), text.as_bytes()),
        Outcome::Whole(200),
    );
    table.add("a key in a body that is not compressed", message(packed, text.as_bytes()), Outcome::Cut(200));
    let both = [&gzip(b"{}")[..], text.as_bytes()].concat();
    table.add("a key behind what is compressed", message(packed, &both), Outcome::Cut(200));
}

fn refusals(table: &mut Table) {
    let refused =
        |status: &str, body: &[u8]| message(&format!("{status} X\r\ncontent-type: application/json"), body);
    let deep = b"[".repeat(60_000);
    let nested = [b"{\"detail\":".repeat(5_000), b"1".to_vec(), b"}".repeat(5_000)].concat();
    let large =
        [&b"{\"detail\":{\"status\":\"quota_exceeded\",\"message\":\"a\"}}"[..], &vec![b' '; 300_000]]
            .concat();
    let name = |status: &str, form: &str| -> &'static str { format!("a {status} {form}").leak() };
    for (status, outcome, rests) in [
        ("400", Outcome::Whole(400), 0),
        ("401", Outcome::Whole(401), 0),
        ("402", Outcome::Whole(402), 0),
        ("403", Outcome::Whole(403), 0),
        ("429", Outcome::Whole(429), 0),
        ("500", Outcome::Whole(500), 0),
        ("503", Outcome::Whole(503), 0),
    ] {
        for (form, body) in [
            ("of brackets", &*deep),
            ("that is nested", &nested),
            ("that is large", &large),
            ("that is not UTF-8", &[0xff; 300]),
            ("without a word", b""),
            ("of another kind", b"{\"detail\":[{\"msg\":{\"msg\":[1e999,null]}}],\"error\":1}"),
        ] {
            let row = table.add(name(status, form), refused(status, body), outcome);
            (row.ask, row.rests, row.says.end, row.teaches) = (Ask::Speech, rests, End::Open, true);
        }
    }
    for (form, headers, outcome) in [
        ("to wait beyond numbers", "retry-after: 99999999999999999999", Outcome::Ours(429)),
        ("to wait for ages", "retry-after: 18446744073709551615", Outcome::Ours(429)),
        ("to wait for less than nothing", "retry-after: -1", Outcome::Ours(429)),
        ("to wait until the end of time", "retry-after: Fri, 31 Dec 9999 23:59:59 GMT", Outcome::Ours(429)),
        ("to wait until yesterday", "retry-after: Thu, 01 Jan 1970 00:00:00 GMT", Outcome::Whole(429)),
        ("to wait for a word", "retry-after: soon", Outcome::Ours(429)),
        ("to wait until a far number", "x-ratelimit-reset: 18446744073709551615", Outcome::Ours(429)),
    ] {
        let body = br#"{"detail":{"status":"rate_limit_exceeded","message":"Too many requests"}}"#;
        let row = table.add(name("429", form), message(&format!("429 X\r\n{headers}"), body), outcome);
        (row.ask, row.rests, row.says.end, row.teaches) = (Ask::Speech, 2, End::Open, true);
    }
    for (form, headers) in [
        ("of less than nothing", "character-cost: -1"),
        ("beyond numbers", "character-cost: 99999999999999999999999"),
        ("of the largest number", "character-cost: 18446744073709551615"),
        ("of half the largest number", "character-cost: 9223372036854775808"),
        ("of a power", "character-cost: 1e18"),
        ("of no number", "character-cost: NaN"),
        ("of a long fraction", "character-cost: 1.00000000000000000000000000000000000001"),
        ("said twice", "character-cost: 1\r\ncharacter-cost: 18446744073709551615"),
        ("of the largest number, in another word", "x-character-count: 18446744073709551615"),
        ("and room for all", "maximum-concurrent-requests: 4294967295\r\ncurrent-concurrent-requests: -1"),
        ("and room for none", "maximum-concurrent-requests: 0"),
    ] {
        let row = table.add(
            name("cost", form),
            message(&format!("200 OK\r\n{headers}"), b"ok"),
            Outcome::Body(200, "ok"),
        );
        (row.ask, row.says.end) = (Ask::Speech, End::Open);
    }
}

/// Poll responses about an account, none of which is a reason not to use its key.
pub fn accounts() -> Vec<(&'static str, Vec<u8>)> {
    let polled = |body: &str| message("200 OK\r\ncontent-type: application/json", body.as_bytes());
    let most = "18446744073709551615";
    vec![
        ("no account", polled("{}")),
        ("no document", polled("<html>")),
        ("nothing", Vec::new()),
        ("a negative count", polled(r#"{"character_count":-5,"character_limit":-5}"#)),
        ("counts in words", polled(r#"{"character_count":"many","character_limit":"more"}"#)),
        ("counts beyond numbers", polled(r#"{"character_count":1e400,"character_limit":1e400}"#)),
        (
            "a limit of the largest number",
            polled(&format!(r#"{{"character_count":1,"character_limit":{most}}}"#)),
        ),
        (
            "a reset at the end of time",
            polled(&format!(
                r#"{{"character_count":1,"character_limit":100000,"next_character_count_reset_unix":9223372036854775807,"max_credit_limit_extension":{most}}}"#
            )),
        ),
        (
            "a reset before all time",
            polled(
                r#"{"character_count":1,"character_limit":100000,"next_character_count_reset_unix":-9223372036854775808}"#,
            ),
        ),
        (
            "a long tier",
            polled(&format!(
                r#"{{"character_count":1,"character_limit":100000,"tier":"{}"}}"#,
                "a".repeat(500_000)
            )),
        ),
        (
            "a tier of line feeds",
            polled(r#"{"character_count":1,"character_limit":100000,"tier":"a\n\u0000\u001b[2Jb"}"#),
        ),
        ("brackets", polled(&"[".repeat(500_000))),
        ("a bomb", message("200 OK\r\ncontent-encoding: gzip", &gzip(&vec![b' '; 16 << 20]))),
    ]
}

/// Compares the data that a client received with the expected outcome.
pub fn check(got: &[u8], outcome: Outcome) -> Result<(), String> {
    let wrong = || Err(format!("not {outcome:?}: {}", shown(got)));
    let is_cut = matches!(outcome, Outcome::Cut(_));
    if got.is_empty() && is_cut {
        return Ok(());
    }
    let mut answers = wire::answers(got)?;
    // An interim 100 checks whether a client that has closed its write half is still connected.
    answers.retain(|answer| answer.status != 100);
    let [answer] = &*answers else { return wrong() };
    let is_ours = answer.value("x-keychoir-error").is_some();
    let is_so = match outcome {
        Outcome::Whole(status) => answer.status == status && answer.is_whole && !is_ours,
        Outcome::Body(status, body) => {
            answer.status == status && answer.is_whole && !is_ours && answer.body == body.as_bytes()
        }
        Outcome::Cut(status) => answer.status == status && !answer.is_whole && !is_ours,
        Outcome::Ours(status) => answer.status == status && answer.is_whole && is_ours,
    };
    if is_so { Ok(()) } else { wrong() }
}

/// Headers of a provider that the program's clients must not receive.
const KEPT_BACK: [&str; 8] = [
    "set-cookie",
    "strict-transport-security",
    "alt-svc",
    "clear-site-data",
    "nel",
    "report-to",
    "keep-alive",
    "proxy-authenticate",
];

/// Data that no client may receive, whatever its provider sends.
pub fn leaks(got: &[u8], keys: &[&str]) -> Vec<String> {
    let mut leaks = Vec::new();
    let answers = wire::answers(got).unwrap_or_default();
    for answer in &answers {
        let named = |name: &&&str| answer.value(name).is_some();
        leaks.extend(KEPT_BACK.iter().filter(named).map(|name| format!("the header {name}")));
    }
    for key in keys {
        let is_in = |bytes: &[u8]| {
            contains(bytes, key) || contains(&narrow(bytes), key) || contains(&unescaped(bytes), key)
        };
        if is_in(got) || answers.iter().any(|answer| is_in(&answer.body) || is_in(&unpacked(answer))) {
            leaks.push(format!("a key: {}", shown(got)));
        }
    }
    leaks
}

/// UTF-16 of ASCII as ASCII.
fn narrow(bytes: &[u8]) -> Vec<u8> {
    bytes.iter().copied().filter(|byte| *byte != 0).collect()
}

/// JSON's escapes of ASCII as ASCII.
fn unescaped(bytes: &[u8]) -> Vec<u8> {
    let text = String::from_utf8_lossy(bytes);
    let mut parts = text.split("\\u00");
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let code = part.get(..2).and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match code {
            Some(code) => plain.extend([&*char::from(code).to_string(), &part[2..]]),
            None => plain.extend(["\\u00", part]),
        }
    }
    plain.into_bytes()
}

/// A body without its encodings, as far as they can be undone.
fn unpacked(answer: &Answer) -> Vec<u8> {
    let named = answer.value("content-encoding").unwrap_or_default().to_ascii_lowercase();
    let mut body = answer.body.clone();
    for coding in named.rsplit(',').map(str::trim) {
        let mut plain = Vec::new();
        // The data before the end or an error is still usable.
        let _ = match coding {
            "gzip" | "x-gzip" => MultiGzDecoder::new(&*body).take(1 << 20).read_to_end(&mut plain),
            "deflate" => ZlibDecoder::new(&*body).take(1 << 20).read_to_end(&mut plain),
            _ => continue,
        };
        body = plain;
    }
    body
}

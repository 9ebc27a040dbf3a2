//! Compares this HTTP client with hyper's client. From the same response bytes, split anywhere, both clients must
//! return the same status, version, reason, headers, body and trailers, and both must complete or both must fail. If
//! two parsers disagree about the end of a response, an attacker can make one of them take the rest for another
//! response. [`strictness_reason`] lists the responses that only this client rejects. Hyper's client must accept them.

use std::sync::Mutex;

use http_body_util::Empty;
use hyper::ext::ReasonPhrase;
use hyper_util::rt::TokioIo;
use proptest::prelude::*;
use proptest::sample::{Index, select};

use super::*;

/// The result that an HTTP client returns for the bytes of a provider.
#[derive(Debug, PartialEq, Eq)]
enum DecodeOutcome {
    /// The client returned an error before a complete response head.
    Rejected,
    Response(ReceivedResponse),
}

#[derive(Debug, PartialEq, Eq)]
struct ReceivedResponse {
    status: u16,
    version: http::Version,
    /// The reason phrase, if it is not the canonical phrase of the status.
    reason: Option<Vec<u8>>,
    headers: Fields,
    /// The body up to its end or an error.
    body: Vec<u8>,
    trailers: Fields,
    /// Whether the body ended without an error.
    is_complete: bool,
}

/// The names and values of headers or trailers, in their order.
type Fields = Vec<(String, Vec<u8>)>;

fn header_fields(headers: &HeaderMap) -> Fields {
    headers.iter().map(|(name, value)| (name.to_string(), value.as_bytes().to_vec())).collect()
}

/// Reads a request, sends `text` in segments that end at `cuts`, and closes the connection.
async fn serve(mut server: DuplexStream, text: &[u8], cuts: &[usize]) {
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        match server.read_u8().await {
            Ok(byte) => request.push(byte),
            Err(_) => return,
        }
    }
    let mut sent_bytes = 0;
    for end in cuts.iter().map(|cut| (*cut).min(text.len())).chain([text.len()]) {
        // The client may close the connection before it has received all segments.
        let _ = server.write_all(&text[sent_bytes.min(end)..end]).await;
        tokio::task::yield_now().await;
        sent_bytes = sent_bytes.max(end);
    }
}

/// Reads the response of a client to its end or an error.
async fn read_outcome<B, E>(response: Result<Response<B>, E>) -> DecodeOutcome
where
    B: Body<Data = Bytes> + Unpin,
{
    let Ok(response) = response else { return DecodeOutcome::Rejected };
    let (head, mut body) = response.into_parts();
    let reason = head.extensions.get::<ReasonPhrase>().map(|reason| reason.as_bytes().to_vec());
    let mut received_response = ReceivedResponse {
        status: head.status.as_u16(),
        version: head.version,
        reason,
        headers: header_fields(&head.headers),
        body: Vec::new(),
        trailers: Vec::new(),
        is_complete: true,
    };
    while let Some(frame) = body.frame().await {
        match frame.map(http_body::Frame::into_data) {
            Ok(Ok(data)) => received_response.body.extend_from_slice(&data),
            Ok(Err(frame)) => {
                received_response.trailers = frame.trailers_ref().map(header_fields).unwrap_or_default()
            }
            Err(_) => {
                received_response.is_complete = false;
                break;
            }
        }
    }
    DecodeOutcome::Response(received_response)
}

/// Returns the outcome of hyper's client for a provider that sends `text`.
async fn hyper_outcome(text: &[u8], cuts: &[usize], method: &Method) -> DecodeOutcome {
    let (client, server) = tokio::io::duplex(1 << 20);
    let (mut sender, driver) = hyper::client::conn::http1::handshake(TokioIo::new(client)).await.unwrap();
    let request = http::Request::builder().method(method).uri("/").header("host", "a");
    let exchange = async {
        let response = sender.send_request(request.body(Empty::<Bytes>::new()).unwrap()).await;
        read_outcome(response).await
    };
    let (outcome, (), _) = tokio::join!(exchange, serve(server, text, cuts), driver);
    outcome
}

/// A connector that returns one connection, and then an error.
struct SingleConnector(Mutex<Option<DuplexStream>>);

impl Connect for SingleConnector {
    type Io = DuplexStream;

    async fn connect(&self, _: &Authority) -> Result<DuplexStream, ConnectError> {
        self.0.lock().unwrap().take().ok_or(ConnectError::ClosedBeforeRequest)
    }
}

/// Returns the outcome of this HTTP client for a provider that sends `text`.
async fn own_outcome(text: &[u8], cuts: &[usize], method: &Method) -> DecodeOutcome {
    let (client, server) = tokio::io::duplex(1 << 20);
    let authority = Authority::new(Scheme::Http, "a", 80, "").unwrap();
    let settings = Settings { max_idle_connections: 0, ..SETTINGS };
    let upstream =
        Upstream::new(authority, SingleConnector(Mutex::new(Some(client))), settings, Tasks::new(), None);
    let head = UpstreamRequestHead {
        method: method.clone(),
        target: Uri::from_static("/"),
        headers: HeaderMap::new(),
    };
    let key = key();
    let exchange = async { read_outcome(upstream.send(None, &key, &head, empty_body()).await).await };
    tokio::join!(exchange, serve(server, text, cuts)).0
}

/// The reason why this client rejects a response that hyper's client accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum StrictnessReason {
    /// Hyper does not decode codings other than chunked. Keychoir's client would receive such a body without the header
    /// that declares its coding.
    UnsupportedCoding,
    /// A 101 response to a request that is not an upgrade would give Keychoir's client control of the connection.
    UnexpectedUpgrade,
    /// Hyper accepts heads of 400 KiB. The heads of the provider have a few kilobytes.
    LargeHead,
}

/// Returns the reason why only this client rejects `text`, or `None` if both clients must agree.
fn strictness_reason(text: &[u8]) -> Option<StrictnessReason> {
    if text.len() > 128 * 1024 {
        Some(StrictnessReason::LargeHead)
    } else if memchr::memmem::find(text, b"HTTP/1.1 101").is_some() {
        Some(StrictnessReason::UnexpectedUpgrade)
    } else {
        has_unsupported_coding(text).then_some(StrictnessReason::UnsupportedCoding)
    }
}

/// Returns whether a response has a transfer coding other than `chunked`, or more than one.
fn has_unsupported_coding(text: &[u8]) -> bool {
    let name = b"transfer-encoding:";
    let lines = text.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
    let codings: Vec<&[u8]> = lines
        .filter_map(|line| line.split_at_checked(name.len()))
        .filter(|(start, _)| start.eq_ignore_ascii_case(name))
        .map(|(_, coding)| coding.trim_ascii())
        .collect();
    codings.len() > 1 || codings.iter().any(|coding| !coding.eq_ignore_ascii_case(b"chunked"))
}

/// Compares the outcomes of both clients. Returns the outcome of this client.
async fn check_same_outcome(text: &[u8], cuts: &[usize], method: &Method) -> DecodeOutcome {
    let (hyper, own) = (hyper_outcome(text, cuts, method).await, own_outcome(text, cuts, method).await);
    if own != DecodeOutcome::Rejected || strictness_reason(text).is_none() {
        let text = String::from_utf8_lossy(&text[..text.len().min(1_000)]);
        assert_eq!(
            own, hyper,
            "the clients must agree about the response to {method}, cut at {cuts:?}: {text:?}"
        );
    }
    own
}

const STATUS_LINES: [&str; 10] = [
    "HTTP/1.1 200 OK",
    "HTTP/1.1 200 Fine",
    "HTTP/1.0 200 OK",
    "HTTP/1.1 204 No Content",
    "HTTP/1.1 304 X",
    "HTTP/1.1 500 ",
    "HTTP/1.1 99 X",
    "HTTP/2.0 200 OK",
    "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK",
    "HTTP/1.1 101 Switching Protocols",
];
const HEADERS: [&str; 16] = [
    "content-length: 5",
    "Content-Length: 3",
    "content-length: 5, 5",
    "content-length: +5",
    "content-length: 0",
    "transfer-encoding: chunked",
    "Transfer-Encoding: Chunked",
    "transfer-encoding: gzip, chunked",
    "connection: close",
    "connection: keep-alive",
    "x-a:  b  ",
    "x-empty:",
    "bad header",
    "x\u{1}y: 1",
    " folded: 1",
    "x-ä: ü",
];
const BODIES: [&str; 19] = [
    "",
    "hello",
    "hello and more",
    "hel",
    "5\r\nhello\r\n0\r\n\r\n",
    "2\r\nhe\r\n3;x=y\r\nllo\r\n0\r\nx-t: 1\r\n\r\n",
    "5\r\nhello\r\n",
    "5\nhello\n0\n\n",
    "5 \r\nhello\r\n0\r\n\r\nHTTP/1.1 200 OK",
    "05\r\nhello\r\n00\r\n\r\n",
    "fffffffffffffffff\r\nhello",
    "5\r\nhelloX\r\n0\r\n\r\n",
    "5\r\nhelloXY0\r\n\r\n",
    "5\r\nhello\rX0\r\n\r\n",
    "5\rXhello\r\n0\r\n\r\n",
    "0\r\nbad\r\n\r\n",
    ";\r\n\r\n",
    "2;a\nb\r\nhe\r\n0\r\n\r\n",
    "2\r\nhe\r\n0\r\nx: 1\nx: 2\r\n\r\n",
];

/// Generates responses from these parts. Half of the responses contain one random byte.
fn any_responses() -> impl Strategy<Value = Vec<u8>> {
    let line_ends = select(&["\r\n", "\r\n", "\r\n", "\n"][..]);
    let headers = prop::collection::vec(select(&HEADERS[..]), 0..4);
    let random_byte = prop::option::weighted(0.5, (any::<Index>(), any::<u8>()));
    (select(&STATUS_LINES[..]), headers, select(&BODIES[..]), line_ends, random_byte).prop_map(
        |(status_line, headers, body, line_end, random_byte)| {
            let header_lines: String =
                headers.into_iter().map(|header| format!("{line_end}{header}")).collect();
            let mut text = format!("{status_line}{header_lines}{line_end}{line_end}{body}").into_bytes();
            if let Some((index, byte)) = random_byte {
                let index = index.index(text.len());
                text[index] = byte;
            }
            text
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn both_clients_parse_a_response_equally(
        text in any_responses(),
        mut cuts in prop::collection::vec(0..200usize, 0..4),
        method in select(&[Method::GET, Method::HEAD][..]),
    ) {
        cuts.sort_unstable();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
        runtime.unwrap().block_on(check_same_outcome(&text, &cuts, &method));
    }
}

#[tokio::test(start_paused = true)]
async fn both_clients_parse_a_response_equally_at_any_cut() {
    for framing in ["content-length: 5", "transfer-encoding: chunked", "x: 1"] {
        for body in BODIES {
            let text = format!("HTTP/1.1 200 Fine\r\nx-a: b\r\n{framing}\r\n\r\n{body}").into_bytes();
            let whole_outcome = check_same_outcome(&text, &[], &Method::GET).await;
            for cut in 1..text.len() {
                let cut_outcome = check_same_outcome(&text, &[cut], &Method::GET).await;
                let printed_text = String::from_utf8_lossy(&text);
                assert_eq!(
                    cut_outcome, whole_outcome,
                    "a cut at {cut} must not change the outcome of {printed_text:?}"
                );
            }
            let every_byte: Vec<usize> = (1..text.len()).collect();
            assert_eq!(check_same_outcome(&text, &every_byte, &Method::GET).await, whole_outcome);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn hyper_accepts_the_listed_responses_that_this_client_rejects() {
    let large_head = format!("HTTP/1.1 200 OK\r\nx: {}\r\ncontent-length: 0\r\n\r\n", "a".repeat(130 * 1024));
    for (text, reason) in [
        (
            "HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
            StrictnessReason::UnsupportedCoding,
        ),
        ("HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\nhello", StrictnessReason::UnsupportedCoding),
        (
            "HTTP/1.1 500 \r\ntransfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
            StrictnessReason::UnsupportedCoding,
        ),
        (
            "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n",
            StrictnessReason::UnexpectedUpgrade,
        ),
        (&large_head, StrictnessReason::LargeHead),
    ] {
        assert_eq!(strictness_reason(text.as_bytes()), Some(reason));
        assert_eq!(
            own_outcome(text.as_bytes(), &[], &Method::GET).await,
            DecodeOutcome::Rejected,
            "this client must reject the response because of {reason:?}"
        );
        let hyper = hyper_outcome(text.as_bytes(), &[], &Method::GET).await;
        assert!(
            matches!(hyper, DecodeOutcome::Response(_)),
            "hyper must accept the response in spite of {reason:?}"
        );
    }
}

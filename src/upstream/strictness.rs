//! Compares this parser with hyper's client: for any bytes of a server, both refuse the same responses and
//! find the same end. Two parsers that differ allow response smuggling. One difference is intended: hyper's
//! client passes on a body with a transfer coding that it does not decode, and this parser refuses it.

use std::sync::Mutex;

use http::Uri;
use http_body_util::{BodyExt, Empty, Full};
use hyper_util::rt::TokioIo;
use proptest::prelude::*;
use proptest::sample::select;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

use super::*;
use crate::body::replay::Replay;
use crate::policy::authority::Scheme;

/// The result of parsing a response.
#[derive(Debug, PartialEq, Eq)]
enum Made {
    /// No response.
    Nothing,
    /// This head, and the body if it is complete.
    Of { status: u16, headers: Vec<(String, Vec<u8>)>, body: Option<Vec<u8>> },
}

/// Sends `text` in two pieces after a request, and closes.
async fn say(mut server: DuplexStream, text: Vec<u8>, cut: usize) {
    let mut asked = Vec::new();
    while !asked.ends_with(b"\r\n\r\n") {
        match server.read_u8().await {
            Ok(byte) => asked.push(byte),
            Err(_) => return,
        }
    }
    let (first, second) = text.split_at(cut.min(text.len()));
    // The client may already have closed the connection.
    let _ = server.write_all(first).await;
    tokio::task::yield_now().await;
    let _ = server.write_all(second).await;
}

async fn made<B, E>(answer: Result<Response<B>, E>) -> Made
where
    B: Body<Data = Bytes> + Unpin,
{
    let Ok(answer) = answer else { return Made::Nothing };
    let (head, body) = answer.into_parts();
    let headers = head.headers.iter().map(|(name, value)| (name.to_string(), value.as_bytes().to_vec()));
    let body = body.collect().await.ok().map(|body| body.to_bytes().to_vec());
    Made::Of { status: head.status.as_u16(), headers: headers.collect(), body }
}

async fn by_hyper(text: Vec<u8>, cut: usize, method: &Method) -> Made {
    let (client, server) = tokio::io::duplex(1 << 20);
    let (mut sender, driver) = hyper::client::conn::http1::handshake(TokioIo::new(client)).await.unwrap();
    let request = http::Request::builder().method(method).uri("/").header("host", "a");
    let asked = async {
        let answer = sender.send_request(request.body(Empty::<Bytes>::new()).unwrap()).await;
        made(answer).await
    };
    let (made, (), _) = tokio::join!(asked, say(server, text, cut), driver);
    made
}

struct Once(Mutex<Option<DuplexStream>>);

impl Connect for Once {
    type Io = DuplexStream;

    async fn connect(&self, _: &Authority) -> Result<DuplexStream, ConnectError> {
        self.0.lock().unwrap().take().ok_or(ConnectError::ClosedAtOnce)
    }
}

async fn by_us(text: Vec<u8>, cut: usize, method: &Method) -> Made {
    let (client, server) = tokio::io::duplex(1 << 20);
    let authority = Authority::new(Scheme::Http, "a", 80, "").unwrap();
    let settings = Settings { max_idle_connections: 0, ..tests::SETTINGS };
    let upstream = Upstream::new(authority, Once(Mutex::new(Some(client))), settings, Tasks::new(), None);
    let outbound = UpstreamRequestHead {
        method: method.clone(),
        target: Uri::from_static("/"),
        headers: HeaderMap::new(),
    };
    let key = ApiKey::new("sk_the_key_of_the_test").unwrap();
    let asked = async {
        let nothing = Replay::<Full<Bytes>>::empty();
        made(upstream.send(None, &key, &outbound, nothing.attempt()).await).await
    };
    tokio::join!(asked, say(server, text, cut)).0
}

const LINES: [&str; 9] = [
    "HTTP/1.1 200 OK",
    "HTTP/1.1 200 Fine",
    "HTTP/1.0 200 OK",
    "HTTP/1.1 204 No Content",
    "HTTP/1.1 304 X",
    "HTTP/1.1 500 ",
    "HTTP/1.1 99 X",
    "HTTP/2.0 200 OK",
    "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK",
];
const HEADERS: [&str; 15] = [
    "content-length: 5",
    "Content-Length: 3",
    "content-length: 5, 5",
    "content-length: +5",
    "content-length: 0",
    "transfer-encoding: chunked",
    "Transfer-Encoding: Chunked",
    "connection: close",
    "connection: keep-alive",
    "x-a:  b  ",
    "x-empty:",
    "bad header",
    "x\u{1}y: 1",
    " folded: 1",
    "x-ä: ü",
];
const BODIES: [&str; 14] = [
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
    "0\r\nbad\r\n\r\n",
    ";\r\n\r\n",
];

fn answers() -> impl Strategy<Value = Vec<u8>> {
    let ends = select(&["\r\n", "\r\n", "\r\n", "\n"][..]);
    let headers = prop::collection::vec(select(&HEADERS[..]), 0..4);
    let spoilt = prop::option::weighted(0.2, (any::<prop::sample::Index>(), any::<u8>()));
    (select(&LINES[..]), headers, select(&BODIES[..]), ends, spoilt).prop_map(
        |(line, headers, body, end, spoilt)| {
            let head: String = headers.into_iter().map(|header| format!("{end}{header}")).collect();
            let mut text = format!("{line}{head}{end}{end}{body}").into_bytes();
            if let Some((at, byte)) = spoilt {
                let at = at.index(text.len());
                text[at] = byte;
            }
            text
        },
    )
}

/// Whether a response has a transfer coding other than `chunked`, or more than one.
fn is_coded(text: &[u8]) -> bool {
    let name = b"transfer-encoding:";
    let lines = text.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
    let codings: Vec<&[u8]> = lines
        .filter_map(|line| line.split_at_checked(name.len()))
        .filter(|(start, _)| start.eq_ignore_ascii_case(name))
        .map(|(_, coding)| coding.trim_ascii())
        .collect();
    codings.len() > 1 || codings.iter().any(|coding| !coding.eq_ignore_ascii_case(b"chunked"))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn hyper_makes_the_same_of_an_answer(
        text in answers(),
        cut in 0..200usize,
        method in select(&[Method::GET, Method::HEAD][..]),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        let (hyper, ours) = runtime.block_on(async {
            (by_hyper(text.clone(), cut, &method).await, by_us(text.clone(), cut, &method).await)
        });
        if ours == Made::Nothing && is_coded(&text) {
            return Ok(());
        }
        prop_assert_eq!(ours, hyper, "{:?}", String::from_utf8_lossy(&text));
    }
}

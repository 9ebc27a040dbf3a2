//! A tap on the connections between the proxy and its provider. It forwards all bytes, parses the requests of the proxy
//! strictly, and records a violation for each ambiguous or forbidden request, even if the provider accepts it.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use http::Method;
use keychoir::elevenlabs::endpoint::{self, Access};
use keychoir::tasks::Tasks;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};

use super::escape_bytes;
use super::http_parser::{RequestHead, RequestParser};

/// Headers of a client that a provider must not receive: credentials, hop-by-hop headers, `expect`, and headers that
/// proxies add or that override the path or the method.
const FORBIDDEN_HEADERS: [&str; 23] = [
    "x-keychoir-token",
    "xi_api_key",
    "authorization",
    "proxy-authorization",
    "cookie",
    "keep-alive",
    "te",
    "trailer",
    "proxy-connection",
    "expect",
    "forwarded",
    "x-forwarded-for",
    "x-forwarded-host",
    "x-forwarded-proto",
    "x-real-ip",
    "true-client-ip",
    "cf-connecting-ip",
    "cf-ray",
    "cdn-loop",
    "via",
    "x-original-url",
    "x-http-method-override",
    "x-rewrite-url",
];

/// Query parameters that SDKs use for credentials.
const CREDENTIAL_PARAMETERS: [&str; 3] = ["xi_api_key", "xi-api-key", "authorization"];

/// The requests that a tap has forwarded.
#[derive(Debug, Default)]
pub struct ForwardedRequests {
    pub heads: Vec<RequestHead>,
    /// The number of requests that were forwarded completely.
    pub complete_count: usize,
}

#[derive(Debug, Default)]
struct TapState {
    forwarded: ForwardedRequests,
    violations: Vec<String>,
}

/// A tap that does not accept connections before [`start_forwarding`](Self::start_forwarding). A connection to the
/// provider ends when the proxy's connection ends.
pub struct Tap {
    listener: TcpListener,
    keys: Vec<String>,
}

/// The forwarded requests and the violations, which the connections of a tap record.
#[derive(Clone)]
pub struct TapRecord(Arc<Mutex<TapState>>);

impl Tap {
    pub async fn new(keys: &[&str]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Self { listener, keys: keys.iter().map(|key| (*key).to_owned()).collect() }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.listener.local_addr().unwrap())
    }

    /// Starts to forward connections to the provider.
    pub fn start_forwarding(self, provider: SocketAddr) -> TapRecord {
        let Self { listener, keys } = self;
        let record = TapRecord(Arc::default());
        let (forwarded, keys) = (record.clone(), Arc::<[String]>::from(keys));
        Tasks::new().spawn(async move {
            while let Ok((proxy, _)) = listener.accept().await {
                let Ok(provider) = TcpStream::connect(provider).await else { continue };
                let parser = Arc::new(Mutex::new(RequestParser::default()));
                let (from_proxy, to_proxy) = proxy.into_split();
                let (from_provider, to_provider) = provider.into_split();
                let tasks = Tasks::new();
                tasks.spawn(forward_requests(
                    from_proxy,
                    to_provider,
                    forwarded.clone(),
                    Arc::clone(&parser),
                    Arc::clone(&keys),
                ));
                tasks.spawn(forward_responses(from_provider, to_proxy, parser));
            }
        });
        record
    }
}

async fn forward_requests(
    mut reader: OwnedReadHalf,
    mut writer: OwnedWriteHalf,
    record: TapRecord,
    parser: Arc<Mutex<RequestParser>>,
    keys: Arc<[String]>,
) {
    let mut bytes = vec![0; 64 * 1024];
    while let Ok(count @ 1..) = reader.read(&mut bytes).await {
        let (parsed, complete_count) = {
            let mut parser = parser.lock().unwrap();
            let parse_result = parser.parse(&bytes[..count]);
            (parse_result, std::mem::take(&mut parser.complete_count))
        };
        record.add(parsed, complete_count, &keys);
        if writer.write_all(&bytes[..count]).await.is_err() {
            break;
        }
    }
    // The provider may have closed the connection.
    let _ = writer.shutdown().await;
}

async fn forward_responses(
    mut reader: OwnedReadHalf,
    mut writer: OwnedWriteHalf,
    parser: Arc<Mutex<RequestParser>>,
) {
    let mut bytes = vec![0; 64 * 1024];
    while let Ok(count @ 1..) = reader.read(&mut bytes).await {
        parser.lock().unwrap().record_response(bytes.starts_with(b"HTTP/1.1 101 "));
        if writer.write_all(&bytes[..count]).await.is_err() {
            break;
        }
    }
    let _ = writer.shutdown().await;
}

impl TapRecord {
    fn add(&self, parsed: Result<Vec<RequestHead>, String>, complete_count: usize, keys: &[String]) {
        let TapState { forwarded, violations } = &mut *self.0.lock().unwrap();
        forwarded.complete_count += complete_count;
        match parsed {
            Err(violation) => violations.push(violation),
            Ok(heads) => {
                for head in heads {
                    violations.extend(
                        check_request(&head, keys)
                            .err()
                            .map(|violation| format!("{violation}: {}", escape_bytes(&head.bytes))),
                    );
                    forwarded.heads.push(head);
                }
            }
        }
    }

    /// Returns the requests since the last call.
    ///
    /// # Errors
    ///
    /// Returns the violations if a request was malformed or not permitted.
    pub fn take(&self) -> Result<ForwardedRequests, String> {
        let TapState { forwarded, violations } = std::mem::take(&mut *self.0.lock().unwrap());
        if violations.is_empty() { Ok(forwarded) } else { Err(violations.join("\n")) }
    }
}

/// Checks that a request has one key of the pool, one host, no forbidden header, no credential in its query and a
/// permitted path.
fn check_request(head: &RequestHead, keys: &[String]) -> Result<(), String> {
    let credentials: Vec<_> = head.header_values("xi-api-key").collect();
    let [key] = credentials[..] else { return Err(format!("the request has {} keys", credentials.len())) };
    if !keys.iter().any(|expected| expected.as_bytes() == key) {
        return Err("the key is not in the pool".to_owned());
    }
    if head.header_values("host").count() != 1 {
        return Err("the request does not have exactly one host".to_owned());
    }
    if let Some((name, _)) = head
        .headers
        .iter()
        .find(|(name, _)| FORBIDDEN_HEADERS.iter().any(|forbidden| name.eq_ignore_ascii_case(forbidden)))
    {
        return Err(format!("the request has the header {name}"));
    }
    let is_upgrade = head.header_values("upgrade").next().is_some();
    if head.header_values("connection").any(|value| !is_upgrade || !value.eq_ignore_ascii_case(b"upgrade")) {
        return Err("the connection header is forwarded".to_owned());
    }
    let (path, query) = head.target.split_once('?').unwrap_or((&head.target, ""));
    let names = query.split('&').map(|pair| pair.split('=').next().unwrap_or_default());
    if let Some(name) = names
        .into_iter()
        .find(|name| CREDENTIAL_PARAMETERS.iter().any(|expected| name.eq_ignore_ascii_case(expected)))
    {
        return Err(format!("the query has the parameter {name}"));
    }
    let method: Method = head.method.parse().map_err(|_| "the method is malformed")?;
    match endpoint::lookup(&method, path) {
        Ok(endpoint) if endpoint.access == Access::Open => Ok(()),
        Ok(_) => Err("the path is blocked".to_owned()),
        Err(ambiguous) => Err(format!("the path is ambiguous: {ambiguous}")),
    }
}

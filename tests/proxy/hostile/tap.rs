//! A tap between the program and its provider: the program's requests are parsed strictly, so that
//! an ambiguous request is a fault, however the provider parses it.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use http::Method;
use keychoir::elevenlabs::endpoint::{self, Access};
use keychoir::tasks::Tasks;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};

use super::shown;
use super::wire::{Head, Requests};

/// Headers of a client that a provider must not receive: credentials, and headers of proxies.
const KEPT_BACK: [&str; 23] = [
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

const CREDENTIAL_PARAMETERS: [&str; 3] = ["xi_api_key", "xi-api-key", "authorization"];

/// The data that has passed a tap.
#[derive(Debug, Default)]
pub struct Seen {
    pub heads: Vec<Head>,
    /// Requests that have passed completely.
    pub whole: usize,
}

#[derive(Debug, Default)]
struct Noted {
    seen: Seen,
    faults: Vec<String>,
}

/// The tap. Its connections end with those of the program.
pub struct Tap {
    listener: TcpListener,
    keys: Vec<String>,
}

/// The record of the passed data.
#[derive(Clone)]
pub struct Record(Arc<Mutex<Noted>>);

impl Tap {
    pub async fn new(keys: &[&str]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Self { listener, keys: keys.iter().map(|key| (*key).to_owned()).collect() }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.listener.local_addr().unwrap())
    }

    /// Forwards everything to the provider from now on.
    pub fn open(self, provider: SocketAddr) -> Record {
        let Self { listener, keys } = self;
        let record = Record(Arc::default());
        let (seen, keys) = (record.clone(), Arc::<[String]>::from(keys));
        Tasks::new().spawn(async move {
            while let Ok((proxy, _)) = listener.accept().await {
                let Ok(provider) = TcpStream::connect(provider).await else { continue };
                let requests = Arc::new(Mutex::new(Requests::default()));
                let (from_proxy, to_proxy) = proxy.into_split();
                let (from_provider, to_provider) = provider.into_split();
                let tasks = Tasks::new();
                tasks.spawn(up(
                    from_proxy,
                    to_provider,
                    seen.clone(),
                    Arc::clone(&requests),
                    Arc::clone(&keys),
                ));
                tasks.spawn(down(from_provider, to_proxy, requests));
            }
        });
        record
    }
}

async fn up(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    record: Record,
    requests: Arc<Mutex<Requests>>,
    keys: Arc<[String]>,
) {
    let mut bytes = vec![0; 64 * 1024];
    while let Ok(count @ 1..) = from.read(&mut bytes).await {
        let (read, whole) = {
            let mut requests = requests.lock().unwrap();
            let read = requests.feed(&bytes[..count]);
            (read, std::mem::take(&mut requests.whole))
        };
        record.note(read, whole, &keys);
        if to.write_all(&bytes[..count]).await.is_err() {
            break;
        }
    }
    // The other end may be closed.
    let _ = to.shutdown().await;
}

async fn down(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, requests: Arc<Mutex<Requests>>) {
    let mut bytes = vec![0; 64 * 1024];
    while let Ok(count @ 1..) = from.read(&mut bytes).await {
        requests.lock().unwrap().answered(bytes.starts_with(b"HTTP/1.1 101 "));
        if to.write_all(&bytes[..count]).await.is_err() {
            break;
        }
    }
    let _ = to.shutdown().await;
}

impl Record {
    fn note(&self, read: Result<Vec<Head>, String>, whole: usize, keys: &[String]) {
        let Noted { seen, faults } = &mut *self.0.lock().unwrap();
        seen.whole += whole;
        match read {
            Err(fault) => faults.push(fault),
            Ok(heads) => {
                for head in heads {
                    faults.extend(
                        judge(&head, keys).err().map(|fault| format!("{fault}: {}", shown(&head.bytes))),
                    );
                    seen.heads.push(head);
                }
            }
        }
    }

    /// The data that has passed since the last call.
    ///
    /// # Errors
    ///
    /// When forbidden data passed.
    pub fn take(&self) -> Result<Seen, String> {
        let Noted { seen, faults } = std::mem::take(&mut *self.0.lock().unwrap());
        if faults.is_empty() { Ok(seen) } else { Err(faults.join("\n")) }
    }
}

/// Checks a request to the provider.
fn judge(head: &Head, keys: &[String]) -> Result<(), String> {
    let presented: Vec<_> = head.values("xi-api-key").collect();
    let [key] = presented[..] else { return Err(format!("{} keys", presented.len())) };
    if !keys.iter().any(|known| known.as_bytes() == key) {
        return Err("a key that is not the pool's".to_owned());
    }
    if head.values("host").count() != 1 {
        return Err("more or less than one host".to_owned());
    }
    if let Some((name, _)) =
        head.headers.iter().find(|(name, _)| KEPT_BACK.iter().any(|kept| name.eq_ignore_ascii_case(kept)))
    {
        return Err(format!("the header {name}"));
    }
    let is_upgrade = head.values("upgrade").next().is_some();
    if head.values("connection").any(|value| !is_upgrade || !value.eq_ignore_ascii_case(b"upgrade")) {
        return Err("a header of another connection".to_owned());
    }
    let (path, query) = head.target.split_once('?').unwrap_or((&head.target, ""));
    let names = query.split('&').map(|pair| pair.split('=').next().unwrap_or_default());
    if let Some(name) = names
        .into_iter()
        .find(|name| CREDENTIAL_PARAMETERS.iter().any(|known| name.eq_ignore_ascii_case(known)))
    {
        return Err(format!("the parameter {name}"));
    }
    let method: Method = head.method.parse().map_err(|_| "no method")?;
    match endpoint::lookup(&method, path) {
        Ok(endpoint) if endpoint.access == Access::Open => Ok(()),
        Ok(_) => Err("a denied path".to_owned()),
        Err(ambiguous) => Err(format!("an ambiguous path: {ambiguous}")),
    }
}

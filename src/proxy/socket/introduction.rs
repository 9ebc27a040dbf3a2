//! A client that says who it is in its first message, because it has no other place for that. Its
//! socket is opened by us, and what would have been said to a request is said on it.

use std::future::poll_fn;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use http::header::{HeaderValue, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY};
use http::{Request, Response, StatusCode};
use http_body::Body;
use http_body_util::Full;
use hyper::body::Incoming;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use super::ending::put_refusal;
use super::leg::Leg;
use super::session::Session;
use super::up::Upwards;
use super::{Socket, Speaker};
use crate::clock;
use crate::policy::client::Unidentified;
use crate::policy::endpoint::socket_at;
use crate::policy::headers;
use crate::policy::socket::{Dialect, presented};
use crate::proxy::error::ProxyError;
use crate::proxy::exchange::{Exchanged, Found};
use crate::proxy::journal::RequestLog;
use crate::proxy::relay::ResponseBody;
use crate::proxy::{Proxy, Terms};
use crate::upstream::Connect;

/// What is read of somebody unknown: a token and the settings of a voice fit.
const INTRODUCTION_BYTES_MAX: usize = 16 * 1024;

/// A socket whose client has not said who it is, and may still.
pub(in crate::proxy) struct Introduction<C> {
    proxy: Arc<Proxy<C>>,
    terms: Arc<Terms>,
    dialect: Dialect,
    accept: HeaderValue,
}

/// The same, when its client has been told that it may speak.
pub(super) struct Unknown<C> {
    introduction: Introduction<C>,
    request: Request<Incoming>,
    log: RequestLog,
}

impl<C> Introduction<C> {
    /// The introduction that a request asks for: when tokens are asked for, it presents none, and the
    /// provider would take one in a message.
    pub(in crate::proxy) fn of(proxy: &Arc<Proxy<C>>, request: &Request<Incoming>) -> Option<Self> {
        let is_asked = headers::asks_for_socket(request.method(), request.version(), request.headers());
        // One with a body is refused on the usual way.
        if !is_asked || !request.body().is_end_stream() {
            return None;
        }
        let terms = proxy.terms.load_full();
        let dialect = socket_at(request.uri().path());
        let says_nothing = headers::presented(request.headers(), request.uri().query()).next().is_none();
        let may = terms.clients.are_known() && says_nothing && dialect.takes_key_in_messages();
        let key = request.headers().get(SEC_WEBSOCKET_KEY).filter(|_| may)?;
        let accept = HeaderValue::try_from(derive_accept_key(key.as_bytes())).ok()?;
        Some(Self { proxy: Arc::clone(proxy), terms, dialect, accept })
    }

    /// Opens the socket, and waits for the client's first message.
    pub(in crate::proxy) fn begin(self, request: Request<Incoming>, log: RequestLog) -> Exchanged<C> {
        let mut answer = Response::new(ResponseBody::Ours(Full::default()));
        *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        headers::strip_switched(answer.headers_mut());
        answer.headers_mut().insert(SEC_WEBSOCKET_ACCEPT, self.accept.clone());
        let unknown = Box::new(Unknown { introduction: self, request, log });
        Exchanged { answer, socket: Some(Socket(Speaker::Unknown(unknown))) }
    }
}

impl<C: Connect> Unknown<C> {
    /// Hears who it is; the session that begins, with what has been said on it. `None` when there is
    /// none, and the client has heard why.
    pub(super) async fn introduced<S>(
        self,
        mut client: S,
        early: Bytes,
    ) -> Option<(Box<Session<C>>, S, Bytes)>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let Self { introduction: Introduction { proxy, terms, dialect, .. }, mut request, mut log } = self;
        let bounds = terms.limits.sockets;
        let mut heard = BytesMut::new();
        let finding = async {
            let hearing = hear_token(&mut client, early, dialect, bounds.frame_bytes_max);
            let token = match timeout(bounds.introduction_max, hearing).await {
                Ok(Some((token, said))) => {
                    heard = said;
                    token
                }
                // It has left, or says nothing.
                Ok(None) | Err(_) => None,
            };
            let token = token.and_then(|token| HeaderValue::try_from(token).ok());
            request.headers_mut().insert(headers::TOKEN_HEADER, token.ok_or(Unidentified::Missing)?);
            proxy.find_answer(request, &mut log).await
        };
        let found = tokio::select! {
            biased;
            () = proxy.cut.cancelled() => Err(ProxyError::Draining),
            found = finding => found,
        };
        match found {
            Ok(Found::Socket(opened)) => return Some((opened.into_session(log), client, heard.freeze())),
            Ok(Found::Answer(answer, _)) => {
                log.unserved();
                let status = answer.head.status.as_u16();
                let message = format!("ElevenLabs answered with status {status}.");
                refuse(client, "handshake_refused", &message).await;
            }
            Err(error) => {
                log.unserved();
                let (code, message) = told(&error, &mut log);
                refuse(client, code, &message).await;
            }
        }
        None
    }
}

/// What a client would have been told by an answer.
fn told(error: &ProxyError, log: &mut RequestLog) -> (&'static str, String) {
    let (status, message) = error.message(clock::now());
    log.failed(error, status);
    (error.code(), message)
}

/// The token in a client's first message, and all that was read; `None` when there is no message.
async fn hear_token<S: AsyncRead + Unpin>(
    client: &mut S,
    early: Bytes,
    dialect: Dialect,
    slice_bytes_max: usize,
) -> Option<(Option<String>, BytesMut)> {
    let mut leg = Leg::default();
    let mut heard = BytesMut::from(&early[..]);
    leg.inbox.extend_from_slice(&early);
    let mut upwards = Upwards::new(dialect, slice_bytes_max);
    loop {
        if upwards.take(&mut leg.inbox, &mut leg.outbox) {
            return Some((presented(upwards.said()), heard));
        }
        leg.outbox.clear();
        if heard.len() > INTRODUCTION_BYTES_MAX {
            return Some((None, heard));
        }
        let before = leg.inbox.len();
        match poll_fn(|cx| leg.poll_fetch(cx, client)).await {
            Ok(1..) => heard.extend_from_slice(leg.inbox.get(before..).unwrap_or_default()),
            Ok(0) | Err(_) => return None,
        }
    }
}

/// Says why not, as the provider would on such a socket.
async fn refuse<S: AsyncWrite + Unpin>(mut client: S, code: &str, message: &str) {
    let mut leg = Leg::default();
    put_refusal(&mut leg.outbox, code, message);
    // Whoever does not want to hear it need not.
    let _ = timeout(super::ending::LAST_WORDS_MAX, poll_fn(|cx| leg.poll_close(cx, &mut client))).await;
}

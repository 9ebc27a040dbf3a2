//! Completes a WebSocket handshake that the provider has accepted: builds the 101 response for the client, and starts
//! the session.

use std::sync::Arc;

use bytes::Bytes;
use http::header::HeaderValue;
use http::response::Parts;
use http::{Extensions, Response};
use http_body_util::Full;

use super::session::{PooledSession, Session, SessionStart};
use crate::body::redacted_body::redact_headers;
use crate::elevenlabs::socket::Dialect;
use crate::policy::headers;
use crate::policy::replay::Progress;
use crate::proxy::access_log::AccessLog;
use crate::proxy::attempt::Attempt;
use crate::proxy::config::RuntimeConfig;
use crate::proxy::error::ProxyError;
use crate::proxy::relay::{REQUEST_ID, ResponseBody};
use crate::proxy::request_context::RequestContext;
use crate::proxy::request_meta::RequestMeta;
use crate::proxy::response_redaction::ResponseRedaction;
use crate::proxy::state::Proxy;
use crate::proxy::upstream_response::UpstreamResponse;
use crate::proxy::usage::UsagePermit;
use crate::upstream::{SendError, SendErrorKind, UpgradedConnection};

/// The provider's 101 response, and the data for the session.
pub(in crate::proxy) struct Handshake<C> {
    head: Parts,
    start: SessionStart<C>,
}

impl<C> Handshake<C> {
    /// Creates a handshake with a key of the pool, whose session can fail over.
    ///
    /// # Errors
    ///
    /// Fails when the connection broke after the response head.
    pub(in crate::proxy) fn with_pool_key(
        proxy: &Arc<Proxy<C>>,
        mut context: RequestContext,
        response: UpstreamResponse,
        attempt: Box<Attempt>,
        redaction: Option<ResponseRedaction>,
        ownership_permit: Option<UsagePermit>,
    ) -> Result<Box<Self>, ProxyError> {
        let (mut head, upstream) = into_upgraded(response)?;
        let redactor = redaction.and_then(|redaction| redaction.redactor);
        if let Some(redactor) = &redactor {
            redact_headers(&mut head.headers, redactor);
        }
        context.head.compact();
        let config = Arc::clone(&context.config);
        let dialect = context.meta.socket.unwrap_or(Dialect::Foreign);
        let query = context.head.target.query();
        let has_token = TOKEN_PARAMETERS.iter().any(|name| headers::query_parameter(query, name).is_some());
        let audio_format = headers::query_parameter(query, "audio_format");
        let pooled = Some(PooledSession { context, ownership_permit });
        let start = SessionStart {
            proxy: Arc::clone(proxy),
            config,
            dialect,
            has_token,
            audio_format,
            redactor,
            pooled,
            attempt,
            upstream,
        };
        Ok(Box::new(Self { head, start }))
    }

    /// Creates a handshake with the client's own key, whose session cannot fail over.
    ///
    /// # Errors
    ///
    /// Fails when the connection broke after the response head.
    pub(in crate::proxy) fn with_own_key(
        proxy: &Arc<Proxy<C>>,
        config: &Arc<RuntimeConfig>,
        meta: &RequestMeta,
        response: UpstreamResponse,
        attempt: Box<Attempt>,
    ) -> Result<Box<Self>, ProxyError> {
        let (head, upstream) = into_upgraded(response)?;
        let start = SessionStart {
            proxy: Arc::clone(proxy),
            config: Arc::clone(config),
            dialect: meta.socket.unwrap_or(Dialect::Foreign),
            has_token: false,
            audio_format: None,
            redactor: None,
            pooled: None,
            attempt,
            upstream,
        };
        Ok(Box::new(Self { head, start }))
    }

    /// Returns the 101 response for the client and the session that follows it.
    pub(in crate::proxy) fn accept(self, log: AccessLog) -> (Response<ResponseBody>, Box<Session<C>>) {
        let Self { mut head, start } = self;
        headers::prepare_upgrade_response(&mut head.headers);
        head.extensions = Extensions::new();
        if let Ok(id) = HeaderValue::from_str(&log.summary.request_id()) {
            head.headers.entry(REQUEST_ID).or_insert(id);
        }
        let response = Response::from_parts(head, ResponseBody::Generated(Full::new(Bytes::new())));
        (response, Box::new(Session::new(start, log)))
    }

    /// Returns the session for a client that has already received its 101 response.
    pub(super) fn into_session(self, log: AccessLog) -> Box<Session<C>> {
        Box::new(Session::new(self.start, log))
    }
}

/// Query parameters with the provider's own tokens, which replace an API key. Source: the provider's AsyncAPI
/// documents.
const TOKEN_PARAMETERS: [&str; 3] = ["token", "single_use_token", "conversation_signature"];

/// Splits a 101 response into its head and its upgraded stream. Fails when the connection broke after the head.
pub(super) fn into_upgraded(response: UpstreamResponse) -> Result<(Parts, UpgradedConnection), ProxyError> {
    let broken = |error| SendError { progress: Progress::NoResponse, kind: SendErrorKind::Broken(error) };
    let upgraded = response.body.into_inner().into_upgraded().map_err(broken)?;
    Ok((response.head, upgraded))
}

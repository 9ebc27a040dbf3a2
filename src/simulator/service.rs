//! Serves one request to the simulated provider. The module checks the head, takes the scripted fault, and reads the
//! body unless the fault precedes it. It then executes the operation or the fault, and records the request. Tests rely
//! on this order. Requests to the control endpoints and WebSocket handshakes are passed to `control` and `socket`.

use std::time::Duration;

use http::request::Parts;
use http::{Request, Response};
use hyper::body::Incoming;
use serde_json::json;
use tokio::sync::watch;

use crate::tasks::Tasks;

use super::accounts::Refusal;
use super::context::OperationContext;
use super::control;
use super::conversations;
use super::credentials;
use super::fault::Fault;
use super::fault_response::{refuse_by_fault, replace_response};
use super::ledger::RequestSummary;
use super::provider::{PendingRequest, PresentedKey, Provider};
use super::refusal::{RefusalKind, violation};
use super::request::{
    EMPTY_SHA256, ReceivedBody, discard_body, find_presented_key, find_violations, receive_body, skip_body,
};
use super::response::{ProviderResponse, new_trace_id};
use super::response_body::ResponseBody;
use super::route::Route;
use super::socket;
use super::tracked_stream::Flushes;

/// The error that closes a connection without a response.
#[derive(Debug, thiserror::Error)]
#[error("the simulator closed this connection without a response")]
pub(super) struct ConnectionClosed;

/// The state of one connection: the provider and the tasks, which all connections share, and the connection's flushes.
/// It is cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Service {
    pub(super) provider: Provider,
    pub(super) tasks: Tasks,
    pub(super) flushes: Flushes,
    /// Notifies tasks of the end of the simulator, including tasks that outlive their connection.
    pub(super) shutdown: watch::Receiver<()>,
}

impl Service {
    /// Responds to one request.
    ///
    /// # Errors
    ///
    /// Fails if the client disconnected, or a fault requires that there is no response.
    ///
    /// # Cancel safety
    ///
    /// The future is dropped when the client disconnects. The request is then recorded as
    /// unanswered, its charge stays, and its slot is released.
    pub(super) async fn respond(
        self,
        mut request: Request<Incoming>,
    ) -> Result<Response<ResponseBody>, ConnectionClosed> {
        let upgrade = socket::is_handshake(&request).then(|| hyper::upgrade::on(&mut request));
        let (parts, body) = request.into_parts();
        if parts.uri.path().starts_with(control::PREFIX) {
            let received_body = receive_body(body).await.map_err(|_| ConnectionClosed)?;
            return Ok(control::respond(&self.provider, &parts, &received_body).into_response());
        }
        let presented_key = find_presented_key(&parts, &self.provider);
        let mut pending =
            self.provider.record_request(presented_key, self.new_summary(&parts, presented_key));
        let violations = find_violations(&parts, &self.provider.plan.forbidden_texts);
        let mut response = if violations.is_empty() {
            if let Some(upgrade) = upgrade {
                return socket::open_session(self, parts, upgrade, presented_key, pending).await;
            }
            self.serve(&parts, body, presented_key, &mut pending).await?
        } else {
            self.discard_body(body);
            pending.summary.path_and_query = "withheld".to_owned();
            self.refuse_violations(&parts, &violations)
        };
        response.set_region(&self.provider.plan.region);
        pending.summary.status = Some(response.status.as_u16());
        pending.summary.charged = response.charged;
        Ok(response.into_response())
    }

    /// Creates the record of a request before it is served.
    fn new_summary(&self, parts: &Parts, presented_key: PresentedKey) -> RequestSummary {
        let key = match presented_key {
            PresentedKey::Absent => None,
            PresentedKey::Unknown => Some("unknown".to_owned()),
            PresentedKey::OtherRegion => Some("elsewhere".to_owned()),
            PresentedKey::Known(index) => self.provider.plan.keys.get(index).map(|plan| plan.key.clone()),
        };
        RequestSummary {
            method: parts.method.to_string(),
            path_and_query: parts.uri.path_and_query().map(ToString::to_string).unwrap_or_default(),
            key,
            body_sha256: EMPTY_SHA256.to_owned(),
            ..RequestSummary::default()
        }
    }

    /// Records violations and refuses the request. The path is not recorded, because it may contain
    /// the forbidden text.
    fn refuse_violations(&self, parts: &Parts, violations: &[String]) -> ProviderResponse {
        for violation in violations {
            self.provider.record_violation(format!("{}: {violation}", parts.method));
        }
        ProviderResponse::refusal(violation(&violations.join("; ")), &new_trace_id())
    }

    /// Executes the requested operation and its scripted fault. A fault takes effect before the body is read, instead
    /// of the operation, or on the response of the operation.
    async fn serve(
        &self,
        parts: &Parts,
        mut body: Incoming,
        presented_key: PresentedKey,
        pending: &mut PendingRequest,
    ) -> Result<ProviderResponse, ConnectionClosed> {
        let fault = self.provider.take_fault(presented_key, &parts.method, parts.uri.path());
        let refuse =
            |kind: &RefusalKind, cost| refuse_by_fault(&self.provider, parts, presented_key, kind, cost);
        if fault == Fault::CloseUnread {
            return Err(ConnectionClosed);
        }
        if let Fault::EarlyRefuse(kind) = &fault {
            self.discard_body(body);
            return Ok(refuse(kind, 1));
        }
        if let Fault::MidRefuse { bytes, refusal } = &fault {
            skip_body(&mut body, *bytes).await.map_err(|_| ConnectionClosed)?;
            self.discard_body(body);
            return Ok(refuse(refusal, 1));
        }
        let received_body = receive_body(body).await.map_err(|_| ConnectionClosed)?;
        pending.summary.body_bytes = received_body.length;
        pending.summary.body_sha256.clone_from(&received_body.sha256);
        pending.summary.is_body_complete = true;
        if fault == Fault::CloseBeforeHead {
            return Err(ConnectionClosed);
        }

        let query = parts.uri.query().unwrap_or_default();
        let context =
            OperationContext { provider: &self.provider, presented_key, received: &received_body, query };
        let route = Route::find(&parts.method, parts.uri.path());
        let refuse = |kind: &RefusalKind| {
            let cost = match &route {
                Ok(Route::Operation(operation, _)) => operation.cost(context).max(1),
                Ok(_) | Err(_) => context.estimate_cost(),
            };
            refuse(kind, cost)
        };
        if let Fault::Refuse(kind) = &fault {
            return Ok(refuse(kind));
        }
        if fault == Fault::ServerError {
            return Ok(refuse(&RefusalKind::ServerError));
        }
        if let Some(response) = replace_response(&fault, refuse) {
            return Ok(response);
        }
        if let Fault::Stall { ms } = fault {
            tokio::time::sleep(Duration::from_millis(ms)).await;
        }
        let mut response = route
            .map_err(Refusal::from)
            .and_then(|route| execute_operation(context, parts, route))
            .unwrap_or_else(ProviderResponse::from);
        if let Fault::SlowHead { ms } = fault {
            // The charge is recorded before the delay, because the client may disconnect during it.
            pending.summary.charged = response.charged;
            tokio::time::sleep(Duration::from_millis(ms)).await;
        }
        if let Fault::SlowBody { ms } = fault {
            response.body.delay_chunks(Duration::from_millis(ms));
        }
        if let Fault::CutAfter { bytes } = fault {
            response.body.cut_after(bytes, self.flushes.clone());
        }
        Ok(response)
    }

    /// Reads and drops the rest of a body in a separate task. When the simulator stops, it closes the connection, which
    /// ends the body and the task.
    fn discard_body(&self, body: Incoming) {
        self.tasks.spawn(discard_body(body));
    }
}

/// Executes an operation, or refuses it.
fn execute_operation(
    context: OperationContext<'_>,
    parts: &Parts,
    route: Route,
) -> Result<ProviderResponse, Refusal> {
    match route {
        Route::Speech { voice, output } => context.serve_speech(&voice, output),
        Route::Dialogue(output) => context.serve_dialogue(output),
        Route::SoundEffect => context.serve_sound_effect(),
        Route::Transcription => context.serve_transcription(),
        Route::SingleUseToken(token_type) => credentials::issue_token(context, &token_type),
        Route::SignedUrl => credentials::issue_signed_url(context),
        Route::ConversationToken => credentials::issue_conversation_token(context),
        Route::Conversation(id) => conversations::respond(context, &id),
        Route::Operation(operation, ids) => operation.execute(context, &ids),
        Route::Free(operation) => operation.execute(context),
        Route::Echo => Ok(echo_request(context, parts)),
    }
}

/// Returns the received request. The name of the key replaces the key.
fn echo_request(context: OperationContext<'_>, parts: &Parts) -> ProviderResponse {
    let ReceivedBody { length, sha256, .. } = context.received;
    let state = context.provider.state();
    let key = match context.presented_key {
        PresentedKey::Known(key_index) => state.accounts.keys.get(key_index).map_or("", |key| &key.name),
        PresentedKey::Unknown => "unknown",
        PresentedKey::OtherRegion => "elsewhere",
        PresentedKey::Absent => "",
    };
    let headers = parts.headers.iter().map(|(name, value)| {
        let is_key = name.as_str() == "xi-api-key";
        // Bytes beyond ASCII are mapped to the characters with the same number, so that no byte is lost.
        let decode_value = || value.as_bytes().iter().map(|byte| char::from(*byte)).collect();
        (name.as_str(), if is_key { key.to_owned() } else { decode_value() })
    });
    ProviderResponse::document(&json!({
        "method": parts.method.as_str(),
        "path_and_query": parts.uri.path_and_query().map(ToString::to_string),
        "headers": headers.collect::<Vec<(&str, String)>>(),
        "body_bytes": length,
        "body_sha256": sha256,
    }))
}

//! Handles one request to the simulated provider: checks the head, picks the scripted fault, reads the
//! body unless the fault comes first, responds and records. Tests rely on this order.

use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use http::request::Parts;
use http::{Request, Response};
use hyper::body::Incoming;
use serde_json::json;
use tokio::sync::watch;

use crate::tasks::Tasks;

use super::accounts::Refused;
use super::answer::{Answer, AnswerBody, set, trace_id};
use super::control;
use super::conversations;
use super::credentials;
use super::encoding::Encoding;
use super::fault::Fault;
use super::job::Job;
use super::ledger::RequestSummary;
use super::read;
use super::request::{EMPTY_SHA256, ReceivedBody, drain, presented, receive, skip, violations};
use super::route::{Route, query};
use super::shape::{Facts, Shape, violation};
use super::socket;
use super::tracked_stream::Flushes;
use super::world::{PendingRequest, Presented, World};

/// The size of a huge error body. A proxy should not buffer this many bytes.
const HUGE_BYTES: usize = 100_000;
/// Placeholders for values of a scripted refusal that are not in the request: the limit of custom voices, a
/// model, a format.
const VOICES: u64 = 10;
const MODEL: &str = "eleven_v3";
const FORMAT: &str = "pcm_44100";
/// A piece of the endless error body.
const ENDLESS_PIECE: &[u8] = &[b' '; 8_192];

/// The error that closes a connection without a response.
#[derive(Debug)]
pub(super) struct Closed;

impl fmt::Display for Closed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the simulator closed this connection without an answer")
    }
}

impl std::error::Error for Closed {}

/// The state that all connections share. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Service {
    pub(super) world: World,
    pub(super) tasks: Tasks,
    pub(super) flushes: Flushes,
    /// Notifies tasks of the simulator's shutdown, including tasks that outlive their connection.
    pub(super) shutdown: watch::Receiver<()>,
}

impl Service {
    /// Responds to one request.
    ///
    /// # Errors
    ///
    /// When the client disconnected, or a fault requires that there is no response.
    ///
    /// # Cancel safety
    ///
    /// The future is dropped when the client disconnects. The request is then recorded as
    /// unanswered, its charge stays, and its slot is released.
    pub(super) async fn answer(self, mut request: Request<Incoming>) -> Result<Response<AnswerBody>, Closed> {
        let upgrade = socket::is_handshake(&request).then(|| hyper::upgrade::on(&mut request));
        let (parts, body) = request.into_parts();
        if parts.uri.path().starts_with(control::PREFIX) {
            let received = receive(body).await.map_err(|_| Closed)?;
            return Ok(control::answer(&self.world, &parts, &received).into_response());
        }
        let presented = presented(&parts, &self.world);
        let mut pending = self.world.request_received(presented, self.summary(&parts, presented));
        let found_violations = violations(&parts, self.world.forbidden());
        let mut answer = if found_violations.is_empty() {
            if let Some(upgrade) = upgrade {
                return socket::open(self, parts, upgrade, presented, pending).await;
            }
            self.serve(&parts, body, presented, &mut pending).await?
        } else {
            self.finish_reading(body);
            pending.summary.path_and_query = "withheld".to_owned();
            self.refuse_violation(&parts, &found_violations)
        };
        answer.set_region(self.world.region());
        pending.summary.status = Some(answer.status.as_u16());
        pending.summary.charged = answer.charged;
        Ok(answer.into_response())
    }

    fn summary(&self, parts: &Parts, presented: Presented) -> RequestSummary {
        let key = match presented {
            Presented::Nothing => None,
            Presented::Unknown => Some("unknown".to_owned()),
            Presented::OtherRegion => Some("elsewhere".to_owned()),
            Presented::Known(key) => {
                self.world.state().accounts.keys.get(key).map(|key| key.plan.key.clone())
            }
        };
        RequestSummary {
            method: parts.method.to_string(),
            path_and_query: parts.uri.path_and_query().map(ToString::to_string).unwrap_or_default(),
            key,
            body_sha256: EMPTY_SHA256.to_owned(),
            ..RequestSummary::default()
        }
    }

    /// Records and refuses a violation. The path is not recorded, because it may contain the
    /// forbidden text.
    fn refuse_violation(&self, parts: &Parts, found_violations: &[String]) -> Answer {
        for violation in found_violations {
            self.world.record_violation(format!("{}: {violation}", parts.method));
        }
        Answer::refusal(violation(&found_violations.join("; ")), &trace_id())
    }

    async fn serve(
        &self,
        parts: &Parts,
        body: Incoming,
        presented: Presented,
        pending: &mut PendingRequest,
    ) -> Result<Answer, Closed> {
        let fault = self.world.take_fault(presented, &parts.method, parts.uri.path());
        match &fault {
            Fault::CloseUnread => return Err(Closed),
            Fault::EarlyRefuse(shape) => {
                self.finish_reading(body);
                return Ok(self.refuse_by_fault(shape, presented, 1, parts));
            }
            Fault::MidRefuse { bytes, shape } => {
                let mut body = body;
                skip(&mut body, *bytes).await.map_err(|_| Closed)?;
                self.finish_reading(body);
                return Ok(self.refuse_by_fault(shape, presented, 1, parts));
            }
            Fault::Pass
            | Fault::Refuse(_)
            | Fault::Gzip(_)
            | Fault::Encoded { .. }
            | Fault::Answer { .. }
            | Fault::Stall { .. }
            | Fault::SlowHead { .. }
            | Fault::SlowBody { .. }
            | Fault::CutAfter { .. }
            | Fault::CloseBeforeHead
            | Fault::ServerError
            | Fault::HugeError
            | Fault::EndlessError
            | Fault::GarbledError
            | Fault::After { .. } => {}
        }
        let received = receive(body).await.map_err(|_| Closed)?;
        pending.summary.body_bytes = received.bytes;
        pending.summary.body_sha256.clone_from(&received.sha256);
        pending.summary.body_complete = true;

        let query = parts.uri.query().unwrap_or_default();
        let job = Job { world: &self.world, presented, received: &received, query };
        let needed = || match Route::of(&parts.method, parts.uri.path()) {
            Ok(Route::Operation(operation, _)) => operation.cost(job).max(1),
            _ => job.estimate(),
        };
        let refusal_of = |shape: &Shape| self.refuse_by_fault(shape, presented, needed(), parts);
        let execute = || perform(job, parts).unwrap_or_else(refused);
        Ok(match fault {
            Fault::Pass
            | Fault::After { .. }
            | Fault::CloseUnread
            | Fault::EarlyRefuse(_)
            | Fault::MidRefuse { .. } => execute(),
            Fault::Refuse(shape) => refusal_of(&shape),
            Fault::Gzip(shape) => refusal_of(&shape).encoded(&[Encoding::Gzip]),
            Fault::Encoded { encodings, shape } => refusal_of(&shape).encoded(&encodings),
            Fault::Answer { status, headers, body } => Answer::custom(status, &headers, body),
            Fault::ServerError => refusal_of(&Shape::ServerError),
            Fault::HugeError => huge(refusal_of(&Shape::Quota)),
            Fault::EndlessError => endless(refusal_of(&Shape::Quota)),
            Fault::GarbledError => garbled(refusal_of(&Shape::Quota)),
            Fault::CloseBeforeHead => return Err(Closed),
            Fault::Stall { ms } => {
                tokio::time::sleep(Duration::from_millis(ms)).await;
                execute()
            }
            Fault::SlowHead { ms } => {
                let answer = execute();
                pending.summary.charged = answer.charged;
                tokio::time::sleep(Duration::from_millis(ms)).await;
                answer
            }
            Fault::SlowBody { ms } => {
                let mut answer = execute();
                answer.body.slow(Duration::from_millis(ms));
                answer
            }
            Fault::CutAfter { bytes } => {
                let mut answer = execute();
                answer.body.cut_after(bytes, self.flushes.clone());
                answer
            }
        })
    }

    /// Creates the refusal of a fault.
    fn refuse_by_fault(&self, shape: &Shape, presented: Presented, needed: u64, parts: &Parts) -> Answer {
        let mut facts = facts_of_fault(&self.world, presented, needed);
        let parameter_named =
            |parameter| query(parts.uri.query().unwrap_or_default()).find(|(name, _)| name == parameter);
        if let Some((_, format)) = parameter_named("output_format") {
            facts.format = format;
        }
        match Route::of(&parts.method, parts.uri.path()) {
            Ok(Route::Speech { voice, .. } | Route::Voice(voice)) => facts.subject = voice,
            Ok(Route::Operation(_, ids)) => facts.subject = ids.into_iter().next().unwrap_or_default(),
            Ok(_) | Err(_) => {}
        }
        refused(Refused { shape: shape.clone(), facts: Box::new(facts) })
    }

    fn finish_reading(&self, body: Incoming) {
        // The task belongs to the group of connections. When the simulator stops, it closes the
        // connection, which ends the body and this task.
        self.tasks.spawn(drain(body));
    }
}

/// The numbers for a scripted refusal. They are consistent: when credits are exhausted, none remain,
/// and a concurrency limit is at least 1.
pub(super) fn facts_of_fault(world: &World, presented: Presented, needed: u64) -> Facts {
    let state = world.state();
    let mut facts = match presented {
        Presented::Known(key) => state.accounts.facts(key, needed),
        Presented::Unknown | Presented::OtherRegion | Presented::Nothing => {
            Facts { needed, ..Facts::default() }
        }
    };
    drop(state);
    facts.remaining = 0;
    facts.cap_remaining = 0;
    facts.concurrency_max = facts.concurrency_max.max(1);
    Facts { bound: VOICES, model: MODEL.to_owned(), format: FORMAT.to_owned(), ..facts }
}

/// The response to a WebSocket handshake that a fault refuses as HTTP; `None` for other faults.
pub(super) fn handshake_refused(fault: &Fault, facts: Facts) -> Option<Answer> {
    let answer = |shape: &Shape| refused(Refused { shape: shape.clone(), facts: Box::new(facts.clone()) });
    match fault {
        Fault::EarlyRefuse(shape) => Some(answer(shape)),
        Fault::Gzip(shape) => Some(answer(shape).encoded(&[Encoding::Gzip])),
        Fault::Encoded { encodings, shape } => Some(answer(shape).encoded(encodings)),
        Fault::Answer { status, headers, body } => Some(Answer::custom(*status, headers, body.clone())),
        Fault::HugeError => Some(huge(answer(&Shape::Quota))),
        Fault::EndlessError => Some(endless(answer(&Shape::Quota))),
        Fault::GarbledError => Some(garbled(answer(&Shape::Quota))),
        Fault::Pass
        | Fault::Refuse(_)
        | Fault::MidRefuse { .. }
        | Fault::Stall { .. }
        | Fault::SlowHead { .. }
        | Fault::SlowBody { .. }
        | Fault::CutAfter { .. }
        | Fault::CloseBeforeHead
        | Fault::CloseUnread
        | Fault::ServerError
        | Fault::After { .. } => None,
    }
}

fn refused(refused: Refused) -> Answer {
    let trace_id = trace_id();
    Answer::refusal(refused.shape.render(&refused.facts, &trace_id), &trace_id)
}

/// Executes the requested operation, if it is allowed.
fn perform(job: Job<'_>, parts: &Parts) -> Result<Answer, Refused> {
    match Route::of(&parts.method, parts.uri.path())? {
        Route::Speech { voice, form } => job.speech(&voice, form),
        Route::Dialogue(form) => job.dialogue(form),
        Route::SoundEffect => job.sound_effect(),
        Route::Transcription => job.transcription(),
        Route::SingleUseToken(kind) => credentials::token(job, &kind),
        Route::SignedUrl => credentials::signed_url(job),
        Route::ConversationToken => credentials::conversation_token(job),
        Route::Conversation(id) => conversations::answer(job, &id),
        Route::Operation(operation, ids) => operation.answer(job, &ids),
        Route::Echo => Ok(echo(job, parts)),
        route @ (Route::User
        | Route::Subscription
        | Route::Models
        | Route::Voices
        | Route::VoicesV2
        | Route::Voice(_)
        | Route::VoiceAddition
        | Route::ProfessionalVoiceAddition
        | Route::LibraryVoiceAddition(_)
        | Route::Library
        | Route::VoiceDeletion(_)
        | Route::HistoryPage
        | Route::HistoryItem(_)
        | Route::HistoryAudio(_)
        | Route::HistoryDeletion(_)) => read::answer(job, &route),
    }
}

/// Returns the received request. The name of the key replaces the key.
fn echo(job: Job<'_>, parts: &Parts) -> Answer {
    let ReceivedBody { bytes, sha256, .. } = job.received;
    let state = job.world.state();
    let key = match job.presented {
        Presented::Known(key) => state.accounts.keys.get(key).map_or("", |key| &key.name),
        Presented::Unknown => "unknown",
        Presented::OtherRegion => "elsewhere",
        Presented::Nothing => "",
    };
    let headers = parts.headers.iter().map(|(name, value)| {
        let is_key = name.as_str() == "xi-api-key";
        // Bytes beyond ASCII are mapped to the characters with the same number, so that no byte is
        // lost.
        let text = || value.as_bytes().iter().map(|byte| char::from(*byte)).collect();
        (name.as_str(), if is_key { key.to_owned() } else { text() })
    });
    Answer::document(&json!({
        "method": parts.method.as_str(),
        "path_and_query": parts.uri.path_and_query().map(ToString::to_string),
        "headers": headers.collect::<Vec<(&str, String)>>(),
        "body_bytes": bytes,
        "body_sha256": sha256,
    }))
}

/// Takes the body of a refusal to replace it.
fn text_of(answer: &mut Answer) -> Vec<u8> {
    answer.body.take_ready().into_iter().flatten().collect()
}

fn huge(mut answer: Answer) -> Answer {
    let mut text = text_of(&mut answer);
    // JSON allows white space after the document.
    text.resize(HUGE_BYTES, b' ');
    answer.body = AnswerBody::whole(text.into());
    answer
}

fn endless(mut answer: Answer) -> Answer {
    let text = text_of(&mut answer);
    let forever = std::iter::repeat_with(|| Bytes::from_static(ENDLESS_PIECE));
    answer.body = AnswerBody::pieces(None, std::iter::once(text.into()).chain(forever));
    answer
}

fn garbled(mut answer: Answer) -> Answer {
    set(&mut answer.headers, "content-encoding", "gzip");
    answer
}

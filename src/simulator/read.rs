//! Executes free operations: reads the account, models, voices and the history, and adds and
//! deletes voices.

use serde_json::json;

use super::accounts::Refused;
use super::answer::{Answer, trace_id};
use super::job::{Job, require_key, string};
use super::models;
use super::route::{Form, Route, query};
use super::shape::Shape;
use super::speech::speech_body;
use super::subscription;
use super::world::Presented;

/// Items of a history page when the query sets none (OpenAPI document).
const PAGE_ITEMS: usize = 100;
/// The maximum of this parameter.
const MAX_PAGE_ITEMS: usize = 1_000;

/// Responds to a reading route. An unpaid bill does not prevent reading.
pub(super) fn answer(job: Job<'_>, route: &Route) -> Result<Answer, Refused> {
    if job.presented == Presented::Nothing {
        return anonymous(route);
    }
    let key = require_key(job.presented)?;
    let mut state = job.world.state();
    if let Some(permission) = route.permission() {
        state.accounts.permit(key, permission)?;
    }
    let Some(owner) = state.accounts.keys.get(key) else { return Err(Shape::InvalidKey.into()) };
    let Some(workspace) = state.accounts.workspace(key) else { return Err(Shape::InvalidKey.into()) };
    let own = workspace.plan.voices.as_slice();
    let item = |id: &str| {
        let item = workspace.history.find(id);
        item.ok_or_else(|| Refused::with_subject(Shape::HistoryItemNotFound, id))
    };
    Ok(match route {
        Route::User => Answer::document(&subscription::user(owner, workspace)),
        Route::Subscription => Answer::document(&subscription::extended(workspace)),
        Route::Models => Answer::document(&models::models(&workspace.plan.denied_models)),
        Route::Voices => Answer::document(&json!({ "voices": models::voices(own) })),
        Route::VoicesV2 => Answer::document(&voices_v2(own, &workspace.plan.name, job.query)?),
        Route::Voice(id) => {
            let voice = models::voice_document(id, own);
            Answer::document(&voice.ok_or_else(|| Refused::with_subject(Shape::VoiceNotFound, id))?)
        }
        Route::VoiceAddition => {
            if !job.received.has_part("name") {
                return Err(Shape::FieldMissing("name".into()).into());
            }
            let id = new_voice_id();
            let workspace = state.accounts.workspace_mut(key).ok_or(Shape::InvalidKey)?;
            workspace.add_clone(&id)?;
            Answer::document(&json!({ "voice_id": id, "requires_verification": false }))
        }
        Route::ProfessionalVoiceAddition => {
            let body = job.object()?;
            for field in ["name", "language"] {
                string(&body, field)?.ok_or(Shape::FieldMissing(field.into()))?;
            }
            let id = new_voice_id();
            let workspace = state.accounts.workspace_mut(key).ok_or(Shape::InvalidKey)?;
            workspace.add_professional(&id)?;
            Answer::document(&json!({ "voice_id": id }))
        }
        Route::LibraryVoiceAddition(id) => {
            string(&job.object()?, "new_name")?.ok_or(Shape::FieldMissing("new_name".into()))?;
            if !state.accounts.library.contains(id) {
                return Err(Refused::with_subject(Shape::VoiceNotFound, id));
            }
            state.accounts.workspace_mut(key).ok_or(Shape::InvalidKey)?.add_copy(id)?;
            Answer::document(&json!({ "voice_id": id }))
        }
        Route::Library => Answer::document(&models::library(&state.accounts.library)),
        Route::VoiceDeletion(id) => {
            let is_removed =
                state.accounts.workspace_mut(key).is_some_and(|workspace| workspace.remove_voice(id));
            if !is_removed {
                return Err(Refused::with_subject(Shape::VoiceNotFound, id));
            }
            Answer::document(&json!({ "status": "ok" }))
        }
        Route::HistoryPage => {
            let size =
                query_value(job.query, "page_size").and_then(|text| text.parse().ok()).unwrap_or(PAGE_ITEMS);
            let after = query_value(job.query, "start_after_history_item_id");
            let is_own = |id: &String| workspace.history.find(id).is_some();
            let others = || state.accounts.workspaces.iter().map(|other| &other.history);
            if after.as_ref().is_some_and(|id| !is_own(id) && others().any(|other| other.find(id).is_some()))
            {
                return Err(Shape::InvalidCursor.into());
            }
            Answer::document(&workspace.history.page(size.min(MAX_PAGE_ITEMS), after.as_deref()))
        }
        Route::HistoryItem(id) => Answer::document(&item(id)?.document()),
        Route::HistoryAudio(id) => {
            let item = item(id)?;
            let mut answer = Answer::empty(&trace_id(), item.format.content_type());
            answer.body = speech_body(&item.text, item.format, Form::Whole);
            answer
        }
        Route::HistoryDeletion(id) => {
            let is_removed =
                state.accounts.workspace_mut(key).is_some_and(|workspace| workspace.history.delete(id));
            if !is_removed {
                return Err(Refused::with_subject(Shape::HistoryItemNotFound, id));
            }
            Answer::document(&json!({ "status": "ok" }))
        }
        Route::Speech { .. }
        | Route::Dialogue(_)
        | Route::Transcription
        | Route::SoundEffect
        | Route::SingleUseToken(_)
        | Route::SignedUrl
        | Route::ConversationToken
        | Route::Conversation(_)
        | Route::Operation(..)
        | Route::Echo => {
            return Err(Shape::NotFound.into());
        }
    })
}

/// Responds to requests without a key. On two routes the provider does not refuse them with 401
/// (captured responses of September 2026): the list of voices contains the public ones, and the
/// list of models is refused with a 404 about a missing workspace.
fn anonymous(route: &Route) -> Result<Answer, Refused> {
    match route {
        Route::Voices => Ok(Answer::document(&json!({ "voices": models::voices(&[]) }))),
        Route::VoicesV2 => Ok(Answer::document(&voices_v2(&[], "", "")?)),
        Route::Models => Err(Shape::AnonymousWorkspace.into()),
        Route::User
        | Route::Subscription
        | Route::Voice(_)
        | Route::VoiceAddition
        | Route::ProfessionalVoiceAddition
        | Route::LibraryVoiceAddition(_)
        | Route::Library
        | Route::VoiceDeletion(_)
        | Route::Speech { .. }
        | Route::Dialogue(_)
        | Route::Transcription
        | Route::SoundEffect
        | Route::HistoryPage
        | Route::HistoryItem(_)
        | Route::HistoryAudio(_)
        | Route::HistoryDeletion(_)
        | Route::SingleUseToken(_)
        | Route::SignedUrl
        | Route::ConversationToken
        | Route::Conversation(_)
        | Route::Operation(..)
        | Route::Echo => Err(Shape::NeedsAuthorization.into()),
    }
}

/// The value of a query parameter.
fn query_value(text: &str, parameter: &str) -> Option<String> {
    query(text).find(|(name, _)| name == parameter).map(|(_, value)| value)
}

/// Creates a voice identifier with the length of the provider's. Its last characters are random.
fn new_voice_id() -> String {
    let id = trace_id();
    id.get(id.len() - 20..).unwrap_or(&id).to_owned()
}

/// `GetVoicesV2ResponseModel` of the OpenAPI document. A page token is valid in one workspace only.
fn voices_v2(own: &[String], workspace: &str, text: &str) -> Result<serde_json::Value, Refused> {
    let voices = models::voices(own);
    let size = query_value(text, "page_size").and_then(|size| size.parse().ok()).unwrap_or(PAGE_ITEMS).max(1);
    let start = match query_value(text, "next_page_token") {
        None => 0,
        Some(token) => token
            .split_once('/')
            .filter(|(of, _)| *of == workspace)
            .and_then(|(_, start)| start.parse().ok())
            .ok_or(Shape::InvalidCursor)?,
    };
    let page: Vec<_> = voices.iter().skip(start).take(size).collect();
    let end = start.saturating_add(page.len());
    let next = (end < voices.len()).then(|| format!("{workspace}/{end}"));
    Ok(json!({
        "total_count": voices.len(),
        "voices": page,
        "has_more": next.is_some(),
        "next_page_token": next,
    }))
}

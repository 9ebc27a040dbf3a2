//! What can be read for free: the account, models, voices and the history.

use serde_json::json;

use super::accounts::Refused;
use super::answer::{Answer, trace_id};
use super::models;
use super::route::{Form, Route, query};
use super::shape::Shape;
use super::speech::spoken;
use super::subscription;
use super::work::{Job, known};
use super::world::Presented;

/// Items of a page of the history when the query does not say (OpenAPI document).
const PAGE_ITEMS: usize = 100;
/// The most it may say.
const PAGE_ITEMS_MAX: usize = 1_000;

/// Answers a route that reads. Reading works in a workspace whose bill is unpaid.
pub(super) fn answer(job: Job<'_>, route: &Route) -> Result<Answer, Refused> {
    if job.presented == Presented::Nothing {
        return anonymous(route);
    }
    let key = known(job.presented)?;
    let mut state = job.world.state();
    if let Some(permission) = route.permission() {
        state.accounts.permit(key, permission)?;
    }
    let Some(holder) = state.accounts.keys.get(key) else { return Err(Shape::InvalidKey.into()) };
    let Some(workspace) = state.accounts.workspace(key) else { return Err(Shape::InvalidKey.into()) };
    let own = workspace.plan.voices.as_slice();
    let item = |id: &str| {
        let item = workspace.history.find(id);
        item.ok_or_else(|| Refused::naming(Shape::HistoryItemNotFound, id))
    };
    Ok(match route {
        Route::User => Answer::document(&subscription::user(holder, workspace)),
        Route::Subscription => Answer::document(&subscription::extended(workspace)),
        Route::Models => Answer::document(&models::models()),
        Route::Voices => Answer::document(&json!({ "voices": models::voices(own) })),
        Route::VoicesV2 => Answer::document(&voices_v2(own)),
        Route::Voice(id) => {
            let voice = models::voice_document(id, own);
            Answer::document(&voice.ok_or_else(|| Refused::naming(Shape::VoiceNotFound, id))?)
        }
        Route::HistoryPage => {
            let asked =
                |wanted: &str| query(job.query).find(|(name, _)| name == wanted).map(|(_, value)| value);
            let size = asked("page_size").and_then(|text| text.parse().ok()).unwrap_or(PAGE_ITEMS);
            let after = asked("start_after_history_item_id");
            Answer::document(&workspace.history.page(size.min(PAGE_ITEMS_MAX), after.as_deref()))
        }
        Route::HistoryItem(id) => Answer::document(&item(id)?.document()),
        Route::HistoryAudio(id) => {
            let item = item(id)?;
            let mut answer = Answer::with(&trace_id(), item.format.content_type());
            answer.body = spoken(&item.text, item.format, Form::Whole);
            answer
        }
        Route::HistoryDeletion(id) => {
            let is_gone =
                state.accounts.workspace_mut(key).is_some_and(|workspace| workspace.history.delete(id));
            if !is_gone {
                return Err(Refused::naming(Shape::HistoryItemNotFound, id));
            }
            Answer::document(&json!({ "status": "ok" }))
        }
        Route::Speech { .. }
        | Route::Dialogue(_)
        | Route::Transcription
        | Route::SoundEffect
        | Route::Echo => {
            return Err(Shape::NotFound.into());
        }
    })
}

/// Without a key the provider is silently wrong in two places (captured answers of September
/// 2026): the voices are those of everyone, and the models belong to a workspace that is not there.
fn anonymous(route: &Route) -> Result<Answer, Refused> {
    match route {
        Route::Voices => Ok(Answer::document(&json!({ "voices": models::voices(&[]) }))),
        Route::VoicesV2 => Ok(Answer::document(&voices_v2(&[]))),
        Route::Models => Err(Shape::AnonymousWorkspace.into()),
        Route::User
        | Route::Subscription
        | Route::Voice(_)
        | Route::Speech { .. }
        | Route::Dialogue(_)
        | Route::Transcription
        | Route::SoundEffect
        | Route::HistoryPage
        | Route::HistoryItem(_)
        | Route::HistoryAudio(_)
        | Route::HistoryDeletion(_)
        | Route::Echo => Err(Shape::NeedsAuthorization.into()),
    }
}

/// `GetVoicesV2ResponseModel` of the OpenAPI document: one page holds all.
fn voices_v2(own: &[String]) -> serde_json::Value {
    let voices = models::voices(own);
    json!({ "total_count": voices.len(), "voices": voices, "has_more": false, "next_page_token": null })
}

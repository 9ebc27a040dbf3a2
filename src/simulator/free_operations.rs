//! Executes operations that cost no credits: they read the account, models, voices and the history, add and delete
//! voices, and delete items of the history. The table in `operations` contains other free operations.

use serde_json::{Value, json};

use super::accounts::{Accounts, Refusal, Workspace};
use super::context::{OperationContext, require_key, string_field};
use super::models;
use super::provider::PresentedKey;
use super::query::query_value;
use super::refusal::RefusalKind;
use super::response::{ProviderResponse, new_trace_id};
use super::route::SpeechOutput;
use super::speech::speech_body;
use super::subscription;

/// The page size if the query does not contain one (OpenAPI document).
const DEFAULT_PAGE_ITEMS: usize = 100;
/// The maximum page size of the history.
const MAX_PAGE_ITEMS: usize = 1_000;

/// An operation that costs no credits, with the identifier in its path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum FreeOperation {
    User,
    Subscription,
    Models,
    Voices,
    VoicesV2,
    Voice(String),
    AddVoice,
    AddProfessionalVoice,
    /// Adds a copy of a voice of the library.
    AddLibraryVoice(String),
    Library,
    DeleteVoice(String),
    HistoryPage,
    HistoryItem(String),
    HistoryAudio(String),
    DeleteHistoryItem(String),
}

impl FreeOperation {
    /// Returns the provider's name of the required permission.
    fn permission(&self) -> &'static str {
        match self {
            FreeOperation::User | FreeOperation::Subscription => "user_read",
            FreeOperation::Models => "models_read",
            FreeOperation::Voices
            | FreeOperation::VoicesV2
            | FreeOperation::Voice(_)
            | FreeOperation::Library => "voices_read",
            FreeOperation::AddVoice => "create_instant_voice_clone",
            FreeOperation::AddProfessionalVoice => "create_professional_voice_clone",
            FreeOperation::AddLibraryVoice(_) => "add_voice_from_voice_library",
            FreeOperation::DeleteVoice(_) => "voices_write",
            FreeOperation::HistoryPage | FreeOperation::HistoryItem(_) | FreeOperation::HistoryAudio(_) => {
                "speech_history_read"
            }
            FreeOperation::DeleteHistoryItem(_) => "speech_history_write",
        }
    }

    /// Executes the operation. An unpaid bill does not prevent it.
    pub(super) fn execute(&self, context: OperationContext<'_>) -> Result<ProviderResponse, Refusal> {
        if context.presented_key == PresentedKey::Absent {
            return self.execute_without_key();
        }
        let key_index = require_key(context.presented_key)?;
        let mut state = context.provider.state();
        state.accounts.check_permission(key_index, self.permission())?;
        let workspace = state.accounts.workspace(key_index)?;
        let own_voices = workspace.plan.voices.as_slice();
        let document = match self {
            FreeOperation::User => {
                let key = state.accounts.keys.get(key_index).ok_or(RefusalKind::InvalidKey)?;
                subscription::user_document(key, workspace)
            }
            FreeOperation::Subscription => subscription::subscription_with_invoices(workspace),
            FreeOperation::Models => models::models(&workspace.plan.denied_models),
            FreeOperation::Voices => json!({ "voices": models::voices(own_voices) }),
            FreeOperation::VoicesV2 => voices_v2(own_voices, &workspace.plan.name, context.query)?,
            FreeOperation::Voice(id) => models::voice_document(id, own_voices)
                .ok_or_else(|| Refusal::with_subject(RefusalKind::VoiceNotFound, id))?,
            FreeOperation::AddVoice => {
                if !context.received.has_form_part("name") {
                    return Err(RefusalKind::FieldMissing("name".into()).into());
                }
                let id = new_voice_id();
                state.accounts.workspace_mut(key_index)?.add_clone(&id)?;
                json!({ "voice_id": id, "requires_verification": false })
            }
            FreeOperation::AddProfessionalVoice => {
                let body = context.json_object()?;
                for field in ["name", "language"] {
                    string_field(&body, field)?.ok_or(RefusalKind::FieldMissing(field.into()))?;
                }
                let id = new_voice_id();
                state.accounts.workspace_mut(key_index)?.add_professional(&id)?;
                json!({ "voice_id": id })
            }
            FreeOperation::AddLibraryVoice(id) => {
                string_field(&context.json_object()?, "new_name")?
                    .ok_or(RefusalKind::FieldMissing("new_name".into()))?;
                if !state.accounts.library.contains(id) {
                    return Err(Refusal::with_subject(RefusalKind::VoiceNotFound, id));
                }
                state.accounts.workspace_mut(key_index)?.add_copy(id)?;
                json!({ "voice_id": id })
            }
            FreeOperation::Library => models::library(&state.accounts.library),
            FreeOperation::DeleteVoice(id) => {
                if !state.accounts.workspace_mut(key_index)?.remove_voice(id) {
                    return Err(Refusal::with_subject(RefusalKind::VoiceNotFound, id));
                }
                json!({ "status": "ok" })
            }
            FreeOperation::HistoryPage => history_page(&state.accounts, workspace, context.query)?,
            FreeOperation::HistoryItem(id) => workspace.history.find(id)?.document(),
            FreeOperation::HistoryAudio(id) => {
                let item = workspace.history.find(id)?;
                let body = speech_body(&item.text, item.format, SpeechOutput::Whole);
                return Ok(ProviderResponse::empty(item.format.content_type()).with_body(body));
            }
            FreeOperation::DeleteHistoryItem(id) => {
                if !state.accounts.workspace_mut(key_index)?.history.delete(id) {
                    return Err(Refusal::with_subject(RefusalKind::HistoryItemNotFound, id));
                }
                json!({ "status": "ok" })
            }
        };
        Ok(ProviderResponse::document(&document))
    }

    /// Responds to a request without a key. Two routes do not refuse such a request with 401 (captured
    /// responses of September 2026): the list of voices contains the public voices, and the list of
    /// models is refused with a 404 response about a missing workspace.
    fn execute_without_key(&self) -> Result<ProviderResponse, Refusal> {
        match self {
            FreeOperation::Voices => {
                Ok(ProviderResponse::document(&json!({ "voices": models::voices(&[]) })))
            }
            FreeOperation::VoicesV2 => Ok(ProviderResponse::document(&voices_v2(&[], "", "")?)),
            FreeOperation::Models => Err(RefusalKind::AnonymousWorkspace.into()),
            FreeOperation::User
            | FreeOperation::Subscription
            | FreeOperation::Voice(_)
            | FreeOperation::AddVoice
            | FreeOperation::AddProfessionalVoice
            | FreeOperation::AddLibraryVoice(_)
            | FreeOperation::Library
            | FreeOperation::DeleteVoice(_)
            | FreeOperation::HistoryPage
            | FreeOperation::HistoryItem(_)
            | FreeOperation::HistoryAudio(_)
            | FreeOperation::DeleteHistoryItem(_) => Err(RefusalKind::NeedsAuthorization.into()),
        }
    }
}

/// Creates the requested page of a workspace's history. An item of another workspace is refused as a cursor.
fn history_page(accounts: &Accounts, workspace: &Workspace, query: &str) -> Result<Value, Refusal> {
    let cursor = query_value(query, "start_after_history_item_id");
    let belongs_to_other_workspace = |id: &String| {
        let mut workspaces = accounts.workspaces.iter();
        workspace.history.find(id).is_err()
            && workspaces.any(|other_workspace| other_workspace.history.find(id).is_ok())
    };
    if cursor.as_ref().is_some_and(belongs_to_other_workspace) {
        return Err(RefusalKind::InvalidCursor.into());
    }
    Ok(workspace.history.page(page_size(query).min(MAX_PAGE_ITEMS), cursor.as_deref()))
}

/// Returns the requested page size.
fn page_size(query: &str) -> usize {
    query_value(query, "page_size").and_then(|size| size.parse().ok()).unwrap_or(DEFAULT_PAGE_ITEMS)
}

/// Creates a voice ID with the length of the provider's IDs, 20 characters. Its last characters are random.
fn new_voice_id() -> String {
    let id = new_trace_id();
    id.get(id.len() - 20..).unwrap_or(&id).to_owned()
}

/// Creates the `GetVoicesV2ResponseModel` of the OpenAPI document. A page token is valid in one workspace only.
fn voices_v2(own_voices: &[String], workspace: &str, query: &str) -> Result<Value, Refusal> {
    let voices = models::voices(own_voices);
    let start = match query_value(query, "next_page_token") {
        None => 0,
        Some(token) => token
            .split_once('/')
            .filter(|(token_workspace, _)| *token_workspace == workspace)
            .and_then(|(_, start)| start.parse().ok())
            .ok_or(RefusalKind::InvalidCursor)?,
    };
    let page: Vec<_> = voices.iter().skip(start).take(page_size(query).max(1)).collect();
    let end = start.saturating_add(page.len());
    let next_page_token = (end < voices.len()).then(|| format!("{workspace}/{end}"));
    Ok(json!({
        "total_count": voices.len(),
        "voices": page,
        "has_more": next_page_token.is_some(),
        "next_page_token": next_page_token,
    }))
}

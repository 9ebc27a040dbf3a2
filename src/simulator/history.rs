//! Stores the history of a workspace's generated and changed speech, and renders its pages and items. Audio is not
//! stored, because it can be generated again from the text of an item. The text of changed speech is empty.

use std::collections::VecDeque;

use serde_json::{Value, json};

use super::accounts::Refusal;
use super::refusal::RefusalKind;
use super::sound::format::Format;

/// Maximum number of stored items, which bounds the memory of a long test.
const MAX_ITEMS: usize = 200;

/// The items, newest first.
#[derive(Debug, Default)]
pub(super) struct History(VecDeque<HistoryItem>);

/// One generated or changed speech.
#[derive(Clone, Debug)]
pub(super) struct HistoryItem {
    pub(super) id: String,
    pub(super) request_id: String,
    pub(super) voice_id: String,
    pub(super) voice_name: String,
    pub(super) model_id: String,
    /// The text, which is empty for changed speech.
    pub(super) text: String,
    pub(super) format: Format,
    /// The time of the creation, in seconds since 1970.
    pub(super) date_unix: u64,
    /// Used credits of the workspace before the speech.
    pub(super) used_before: u64,
    /// Used credits of the workspace after the speech.
    pub(super) used_after: u64,
}

impl History {
    /// Adds an item, and drops the oldest item if the history is full.
    pub(super) fn add(&mut self, item: HistoryItem) {
        self.0.truncate(MAX_ITEMS - 1);
        self.0.push_front(item);
    }

    pub(super) fn find(&self, id: &str) -> Result<&HistoryItem, Refusal> {
        let item = self.0.iter().find(|item| item.id == id);
        item.ok_or_else(|| Refusal::with_subject(RefusalKind::HistoryItemNotFound, id))
    }

    /// Returns whether the request with the ID `id` created an item.
    pub(super) fn has_request(&self, id: &str) -> bool {
        self.0.iter().any(|item| item.request_id == id)
    }

    /// Removes an item. Returns false if it does not exist.
    pub(super) fn delete(&mut self, id: &str) -> bool {
        let count_before = self.0.len();
        self.0.retain(|item| item.id != id);
        self.0.len() < count_before
    }

    /// Creates the `GetSpeechHistoryResponseModel` of the OpenAPI document with at most `size` items that follow the
    /// item `after`. If this item does not exist, the page begins with the newest item.
    pub(super) fn page(&self, size: usize, after: Option<&str>) -> Value {
        let start =
            after.and_then(|id| self.0.iter().position(|item| item.id == id)).map_or(0, |index| index + 1);
        let items: Vec<_> = self.0.iter().skip(start).take(size).collect();
        json!({
            "history": items.iter().map(|item| item.document()).collect::<Vec<_>>(),
            "last_history_item_id": items.last().map(|item| &item.id),
            "has_more": start + items.len() < self.0.len(),
            "scanned_until": null,
        })
    }
}

impl HistoryItem {
    /// Creates the `SpeechHistoryItemResponseModel` of the OpenAPI document.
    pub(super) fn document(&self) -> Value {
        json!({
            "history_item_id": self.id,
            "request_id": self.request_id,
            "voice_id": self.voice_id,
            "voice_name": self.voice_name,
            "voice_category": "premade",
            "model_id": self.model_id,
            "text": self.text,
            "date_unix": self.date_unix,
            "character_count_change_from": self.used_before,
            "character_count_change_to": self.used_after,
            "content_type": self.format.content_type(),
            "output_format": self.format.name,
            "state": "created",
            "source": "TTS",
            "settings": null,
            "share_link_id": null,
        })
    }
}

//! Stores the dubbings and studio projects of a workspace, and renders their documents. Clients request them later by
//! ID.

use std::collections::VecDeque;

use serde_json::{Value, json};

use super::accounts::Refusal;
use super::models::DEFAULT_VOICE;
use super::refusal::fixed_refusal;

/// Maximum number of stored resources, which bounds the memory of a long test.
const MAX_RESOURCES: usize = 200;
/// Number of status requests after which a dubbing is done.
const STATUS_REQUESTS_UNTIL_DUBBED: u32 = 2;

/// The resources of a workspace, oldest first.
#[derive(Debug, Default)]
pub(super) struct Resources(VecDeque<Resource>);

/// A dubbing or a studio project.
#[derive(Clone, Debug)]
pub(super) struct Resource {
    pub(super) kind: ResourceKind,
    pub(super) id: String,
    pub(super) name: String,
    /// The target language of a dubbing. A project does not use it.
    pub(super) language: String,
    /// The length of the uploaded audio.
    pub(super) upload_seconds: u64,
    /// The time of the creation, in seconds since 1970.
    pub(super) created_unix: u64,
    /// Number of status requests so far.
    pub(super) status_requests: u32,
}

/// The kind of a resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ResourceKind {
    Dubbing,
    Project,
}

impl Resources {
    /// Adds a resource, and drops the oldest one if the store is full.
    pub(super) fn add(&mut self, resource: Resource) {
        if self.0.len() == MAX_RESOURCES {
            self.0.pop_front();
        }
        self.0.push_back(resource);
    }

    pub(super) fn find(&mut self, kind: ResourceKind, id: &str) -> Result<&mut Resource, Refusal> {
        let resource = self.0.iter_mut().find(|resource| resource.kind == kind && resource.id == id);
        resource.ok_or_else(|| kind.not_found_refusal(id))
    }

    pub(super) fn delete(&mut self, kind: ResourceKind, id: &str) -> Result<(), Refusal> {
        let count_before = self.0.len();
        self.0.retain(|resource| resource.kind != kind || resource.id != id);
        if self.0.len() < count_before { Ok(()) } else { Err(kind.not_found_refusal(id)) }
    }

    /// Returns the documents of all resources of a kind, newest first.
    pub(super) fn documents(&self, kind: ResourceKind) -> Vec<Value> {
        self.0.iter().rev().filter(|resource| resource.kind == kind).map(Resource::document).collect()
    }
}

impl ResourceKind {
    fn not_found_refusal(self, id: &str) -> Refusal {
        let name = match self {
            ResourceKind::Dubbing => "dubbing_not_found",
            ResourceKind::Project => "project_not_found",
        };
        Refusal::with_subject(fixed_refusal(name), id)
    }
}

impl Resource {
    /// Returns whether a dubbing is done.
    pub(super) fn is_dubbed(&self) -> bool {
        self.status_requests >= STATUS_REQUESTS_UNTIL_DUBBED
    }

    /// Renders the resource as the provider's JSON document.
    pub(super) fn document(&self) -> Value {
        match self.kind {
            ResourceKind::Dubbing => self.dubbing_document(),
            ResourceKind::Project => self.project_document(),
        }
    }

    /// Creates the `DubbingMetadataResponse` of the OpenAPI document.
    fn dubbing_document(&self) -> Value {
        json!({
            "dubbing_id": self.id,
            "name": self.name,
            "status": if self.is_dubbed() { "dubbed" } else { "dubbing" },
            "source_language": "en",
            "target_languages": [self.language],
            "editable": false,
            "created_at": "2026-11-24T09:00:00Z",
            "media_metadata": { "content_type": "audio/mpeg", "duration": self.upload_seconds },
            "error": null,
        })
    }

    /// Creates the `ProjectResponseModel` of the OpenAPI document.
    fn project_document(&self) -> Value {
        json!({
            "project_id": self.id,
            "name": self.name,
            "create_date_unix": self.created_unix,
            "created_by_user_id": null,
            "default_title_voice_id": DEFAULT_VOICE,
            "default_title_voice_ref_id": DEFAULT_VOICE,
            "default_paragraph_voice_id": DEFAULT_VOICE,
            "default_paragraph_voice_ref_id": DEFAULT_VOICE,
            "default_model_id": "eleven_multilingual_v2",
            "last_conversion_date_unix": null,
            "can_be_downloaded": false,
            "volume_normalization": false,
            "state": "default",
            "access_level": "admin",
            "quality_check_on": false,
            "quality_check_on_when_bulk_convert": false,
            "creation_meta": null,
            "chapters": [],
            "pronunciation_dictionary_versions": [],
            "pronunciation_dictionary_locators": [],
        })
    }
}

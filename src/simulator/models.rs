//! Lists the models and the public voices, and renders their documents and those of custom voices and of the library.
//! Models and public voices have the provider's identifiers, so that the examples of its documentation work.

use serde_json::{Value, json};

/// A model for speech.
#[derive(Clone, Copy, Debug)]
pub(super) struct Model {
    pub(super) id: &'static str,
    name: &'static str,
    /// Credits per 1,000 characters, which is a thousand times the `character_cost_multiplier`.
    credits_per_1000_characters: u64,
    /// Maximum number of characters of a request on a paid plan.
    max_characters: u64,
    /// Maximum number of characters of a request on the free plan.
    max_free_characters: u64,
}

/// The models for speech. Their rates are from the model list of 2026, and their limits are from the documentation. The
/// older Turbo models are aliases of Flash models.
const MODELS: [Model; 8] = [
    model("eleven_multilingual_v2", "Eleven Multilingual v2", 1_000, 10_000),
    model("eleven_v3", "Eleven v3", 1_000, 5_000),
    model("eleven_v4", "Eleven v4", 1_000, 10_000),
    model("eleven_v4_turbo", "Eleven v4 Turbo", 500, 10_000),
    model("eleven_flash_v2_5", "Eleven Flash v2.5", 500, 40_000),
    model("eleven_flash_v2", "Eleven Flash v2", 500, 30_000),
    model("eleven_turbo_v2_5", "Eleven Turbo v2.5", 500, 40_000),
    model("eleven_turbo_v2", "Eleven Turbo v2", 500, 30_000),
];

const fn model(
    id: &'static str,
    name: &'static str,
    credits_per_1000_characters: u64,
    max_characters: u64,
) -> Model {
    Model { id, name, credits_per_1000_characters, max_characters, max_free_characters: 2_500 }
}

impl Model {
    /// Returns the model with the ID `id`.
    pub(super) fn find(id: &str) -> Option<Model> {
        MODELS.into_iter().find(|model| model.id == id)
    }

    /// Returns the cost of a number of characters in credits, rounded up.
    pub(super) fn cost(self, characters: u64) -> u64 {
        characters.saturating_mul(self.credits_per_1000_characters).div_ceil(1_000)
    }

    /// Returns the maximum number of characters of a request on a free or a paid plan.
    pub(super) fn max_characters(self, is_free_plan: bool) -> u64 {
        if is_free_plan { self.max_free_characters } else { self.max_characters }
    }

    /// Creates the `ModelResponseModel` of the OpenAPI document.
    fn document(&self, denied_models: &[String]) -> Value {
        json!({
            "model_id": self.id,
            "name": self.name,
            "can_be_finetuned": false,
            "can_do_text_to_speech": true,
            "can_do_voice_conversion": false,
            "can_use_style": true,
            "can_use_speaker_boost": true,
            "serves_pro_voices": false,
            "token_cost_factor": 1.0,
            "description": "A melody where the provider has a voice.",
            "requires_alpha_access": denied_models.iter().any(|denied_model| denied_model == self.id),
            "max_characters_request_free_user": self.max_free_characters,
            "max_characters_request_subscribed_user": self.max_characters,
            "maximum_text_length_per_request": self.max_characters,
            "languages": [{ "language_id": "en", "name": "English" }, { "language_id": "de", "name": "German" }],
            "model_rates": {
                "character_cost_multiplier": if self.credits_per_1000_characters == 500 { 0.5 } else { 1.0 },
                "cost_discount_multiplier": 1.0,
            },
            "concurrency_group": format!("standard_{}", self.id),
        })
    }
}

/// Returns the list of models as a JSON array. It includes models that a workspace may not use.
pub(super) fn models(denied_models: &[String]) -> Value {
    MODELS.iter().map(|model| model.document(denied_models)).collect()
}

/// The voice of a studio project whose request does not name one.
pub(super) const DEFAULT_VOICE: &str = PREMADE_VOICES[0].0;

/// The voices that every account has.
const PREMADE_VOICES: [(&str, &str); 3] = [
    ("21m00Tcm4TlvDq8ikWAM", "Rachel"),
    ("JBFqnCBsd6RMkjVDRZzb", "George"),
    ("EXAVITQu4vr4xnSDxMaL", "Sarah"),
];

/// Returns the name of a voice that a workspace with `own_voices` can use.
pub(super) fn voice_name(id: &str, own_voices: &[String]) -> Option<String> {
    let premade =
        PREMADE_VOICES.iter().find(|(premade_id, _)| *premade_id == id).map(|(_, name)| (*name).to_owned());
    premade.or_else(|| own_voices.iter().any(|voice| voice == id).then(|| "Own voice".to_owned()))
}

/// Returns the documents of all voices that a workspace with `own_voices` can use.
pub(super) fn voices(own_voices: &[String]) -> Vec<Value> {
    let premade = PREMADE_VOICES.iter().map(|(id, name)| render_voice(id, name, "premade"));
    premade.chain(own_voices.iter().map(|id| render_voice(id, "Own voice", "cloned"))).collect()
}

/// Returns the document of the voice with the ID `id`.
pub(super) fn voice_document(id: &str, own_voices: &[String]) -> Option<Value> {
    voices(own_voices).into_iter().find(|voice| voice["voice_id"] == id)
}

/// Creates the `GetLibraryVoicesResponseModel` of the OpenAPI document, with all voices of the library.
pub(super) fn library(ids: &[String]) -> Value {
    let voices = ids.iter().map(|id| {
        json!({
            "public_owner_id": "simulator",
            "voice_id": id,
            "date_unix": 1_753_999_199,
            "name": "Library voice",
            "accent": "none",
            "gender": "neutral",
            "age": "young",
            "descriptive": "humming",
            "use_case": "testing",
            "category": "professional",
            "usage_character_count_1y": 0,
            "usage_character_count_7d": 0,
            "play_api_usage_character_count_1y": 0,
            "cloned_by_count": 0,
            "free_users_allowed": false,
            "live_moderation_enabled": false,
            "featured": false,
        })
    });
    json!({ "voices": voices.collect::<Vec<_>>(), "has_more": false, "total_count": ids.len(), "last_sort_id": null })
}

/// Creates the `VoiceResponseModel` of the OpenAPI document.
fn render_voice(id: &str, name: &str, category: &str) -> Value {
    json!({
        "voice_id": id,
        "name": name,
        "category": category,
        "labels": { "accent": "none", "use_case": "testing" },
        "description": "A voice of the simulator: it hums.",
        "preview_url": null,
        "samples": null,
        "available_for_tiers": [],
        "settings": {
            "stability": 0.5,
            "similarity_boost": 0.75,
            "style": 0.0,
            "use_speaker_boost": true,
            "speed": 1.0,
        },
        "sharing": null,
        "high_quality_base_model_ids": ["eleven_multilingual_v2", "eleven_v3"],
        "verified_languages": [],
        "is_owner": category != "premade",
        "is_legacy": false,
        "is_mixed": false,
    })
}

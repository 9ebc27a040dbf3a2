//! Sends valid requests to routes that refusals affect differently: by price, effect and concurrency group.

use reqwest::Method;
use serde_json::json;

use super::{SPEECH_PATH, TestProxy};

/// A route of each kind that a refusal can affect separately.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    Speech,
    SpeechStream,
    SoundEffect,
    Transcription,
    /// A charged route in the default concurrency group.
    Dubbing,
    /// A free route without an effect.
    Voices,
    /// A free route that changes the account.
    VoiceAddition,
}

pub const ROUTES: [Route; 7] = [
    Route::Speech,
    Route::SpeechStream,
    Route::SoundEffect,
    Route::Transcription,
    Route::Dubbing,
    Route::Voices,
    Route::VoiceAddition,
];

const BOUNDARY: &str = "boundary-of-the-form";

impl Route {
    /// Returns the method and the path prefix that restrict a fault of the simulator to this route.
    pub fn fault_route(self) -> &'static str {
        match self {
            Self::Speech | Self::SpeechStream => "POST /v1/text-to-speech",
            Self::SoundEffect => "POST /v1/sound-generation",
            Self::Transcription => "POST /v1/speech-to-text",
            Self::Dubbing => "POST /v1/dubbing",
            Self::Voices => "GET /v1/voices",
            Self::VoiceAddition => "POST /v1/voices/add",
        }
    }

    /// Sends a valid request. For speech, `characters` is the length of the text.
    pub async fn send_request(self, proxy: &TestProxy, token: &str, characters: usize) -> reqwest::Response {
        let form_body = |fields: &[(&str, &str)]| {
            let part = |(name, value): &(&str, &str)| {
                format!("--{BOUNDARY}\r\ncontent-disposition: form-data; name=\"{name}\"\r\n\r\n{value}\r\n")
            };
            fields.iter().map(part).collect::<String>() + &format!("--{BOUNDARY}--\r\n")
        };
        let post = |path: &str| proxy.request(Method::POST, path, token);
        let post_form = |path: &str, fields: &[(&str, &str)]| {
            let media_type = format!("multipart/form-data; boundary={BOUNDARY}");
            post(path).header("content-type", media_type).body(form_body(fields))
        };
        let body = json!({"text": "a".repeat(characters), "model_id": "eleven_multilingual_v2"});
        let request = match self {
            Self::Speech => post(SPEECH_PATH).json(&body),
            Self::SpeechStream => post(&format!("{SPEECH_PATH}/stream")).json(&body),
            Self::SoundEffect => {
                post("/v1/sound-generation").json(&json!({"text": "rain", "duration_seconds": 0.5}))
            }
            Self::Transcription => {
                post_form("/v1/speech-to-text", &[("model_id", "scribe_v2"), ("file", "sound")])
            }
            Self::Dubbing => {
                post_form("/v1/dubbing", &[("name", "film"), ("target_lang", "de"), ("file", "sound")])
            }
            Self::Voices => proxy.request(Method::GET, "/v1/voices", token),
            Self::VoiceAddition => post_form("/v1/voices/add", &[("name", "mine"), ("files", "sound")]),
        };
        request.send().await.unwrap()
    }
}

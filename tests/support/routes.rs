//! A route of each kind, with a valid request for it.

use serde_json::json;

use super::{SPEECH_PATH, TestProxy};

/// A route for each scope that a refusal can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    Speech,
    SpeechStream,
    SoundEffect,
    Transcription,
    /// Charged, and in the concurrency group of all routes that have no separate group.
    Dubbing,
    /// Free, and only reads.
    Voices,
    /// Free, and changes the account.
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

    /// Sends a request whose text, if it has one, is of this number of characters.
    pub async fn send_request(self, proxy: &TestProxy, token: &str, characters: usize) -> reqwest::Response {
        let form_body = |fields: &[(&str, &str)]| {
            let part = |(name, value): &(&str, &str)| {
                format!("--{BOUNDARY}\r\ncontent-disposition: form-data; name=\"{name}\"\r\n\r\n{value}\r\n")
            };
            fields.iter().map(part).collect::<String>() + &format!("--{BOUNDARY}--\r\n")
        };
        let post = |path: &str| proxy.client.post(format!("{}{path}", proxy.url));
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
            Self::Voices => proxy.client.get(format!("{}/v1/voices", proxy.url)),
            Self::VoiceAddition => post_form("/v1/voices/add", &[("name", "mine"), ("files", "sound")]),
        };
        request.header("xi-api-key", token).send().await.unwrap()
    }
}

//! One route of each kind, with a regular request for it.

use serde_json::json;

use super::{SPEECH, TestProxy};

/// A kind of route, by the scope of its refusals.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    Speech,
    SpeechStream,
    SoundEffect,
    Transcription,
    /// Charged, and counted with all routes without a concurrency group of their own.
    Dubbing,
    /// Free, without an effect.
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
    /// The route of a fault: a method and the beginning of a path.
    pub fn bound(self) -> &'static str {
        match self {
            Self::Speech | Self::SpeechStream => "POST /v1/text-to-speech",
            Self::SoundEffect => "POST /v1/sound-generation",
            Self::Transcription => "POST /v1/speech-to-text",
            Self::Dubbing => "POST /v1/dubbing",
            Self::Voices => "GET /v1/voices",
            Self::VoiceAddition => "POST /v1/voices/add",
        }
    }

    pub async fn ask(self, proxy: &TestProxy, token: &str, characters: usize) -> reqwest::Response {
        let form = |fields: &[(&str, &str)]| {
            let part = |(name, value): &(&str, &str)| {
                format!("--{BOUNDARY}\r\ncontent-disposition: form-data; name=\"{name}\"\r\n\r\n{value}\r\n")
            };
            fields.iter().map(part).collect::<String>() + &format!("--{BOUNDARY}--\r\n")
        };
        let request = |path: &str| proxy.client.post(format!("{}{path}", proxy.url));
        let post = |path: &str, fields: &[(&str, &str)]| {
            let media_type = format!("multipart/form-data; boundary={BOUNDARY}");
            request(path).header("content-type", media_type).body(form(fields))
        };
        let body = json!({"text": "a".repeat(characters), "model_id": "eleven_multilingual_v2"});
        let request = match self {
            Self::Speech => request(SPEECH).json(&body),
            Self::SpeechStream => request(&format!("{SPEECH}/stream")).json(&body),
            Self::SoundEffect => {
                request("/v1/sound-generation").json(&json!({"text": "rain", "duration_seconds": 0.5}))
            }
            Self::Transcription => {
                post("/v1/speech-to-text", &[("model_id", "scribe_v2"), ("file", "sound")])
            }
            Self::Dubbing => {
                post("/v1/dubbing", &[("name", "film"), ("target_lang", "de"), ("file", "sound")])
            }
            Self::Voices => proxy.client.get(format!("{}/v1/voices", proxy.url)),
            Self::VoiceAddition => post("/v1/voices/add", &[("name", "mine"), ("files", "sound")]),
        };
        request.header("xi-api-key", token).send().await.unwrap()
    }
}

//! Maps a method and a path to an operation and its permission, and parses the query.

use http::Method;

use super::operations::Operation;
use super::shape::Shape;

/// A simulated operation of the provider.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Route {
    User,
    Subscription,
    Models,
    Voices,
    VoicesV2,
    Voice(String),
    VoiceAddition,
    ProfessionalVoiceAddition,
    /// Adds a copy of a voice of the library.
    LibraryVoiceAddition(String),
    Library,
    VoiceDeletion(String),
    Speech {
        voice: String,
        form: Form,
    },
    Dialogue(Form),
    Transcription,
    SoundEffect,
    HistoryPage,
    HistoryItem(String),
    HistoryAudio(String),
    HistoryDeletion(String),
    SingleUseToken(String),
    SignedUrl,
    ConversationToken,
    Conversation(String),
    /// An operation of the table in `operations`, with the identifiers in its path.
    Operation(&'static Operation, Vec<String>),
    /// The simulator's own endpoint that returns the received request.
    Echo,
}

/// The form of a response with audio.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// The audio with a content length.
    Whole,
    /// The audio in chunks.
    Stream,
    /// One JSON object with the audio and the times of the characters.
    TimedWhole,
    /// Newline-delimited JSON objects with audio and times.
    TimedStream,
}

impl Route {
    /// Parses a method and a raw path without the query.
    ///
    /// # Errors
    ///
    /// The provider's 404 for an unknown path, and its 405 for a wrong method.
    pub(super) fn of(method: &Method, path: &str) -> Result<Self, Shape> {
        let segments: Vec<&str> = path.split('/').skip(1).collect();
        let id = |text: &str| text.to_owned();
        let (allowed, route) = match segments.as_slice() {
            ["v1", "simulator", "echo"] => return Ok(Route::Echo),
            ["v1", "user"] => ("GET", Route::User),
            ["v1", "user", "subscription"] => ("GET", Route::Subscription),
            ["v1", "models"] => ("GET", Route::Models),
            ["v1", "voices"] => ("GET", Route::Voices),
            ["v2", "voices"] => ("GET", Route::VoicesV2),
            ["v1", "voices", "add"] => ("POST", Route::VoiceAddition),
            ["v1", "voices", "add", _owner, voice] => ("POST", Route::LibraryVoiceAddition(id(voice))),
            ["v1", "voices", "pvc"] => ("POST", Route::ProfessionalVoiceAddition),
            ["v1", "shared-voices"] => ("GET", Route::Library),
            ["v1", "voices", voice] if *method == Method::DELETE => {
                return Ok(Route::VoiceDeletion(id(voice)));
            }
            ["v1", "voices", voice] => ("GET", Route::Voice(id(voice))),
            ["v1", "text-to-speech", voice, form @ ..] => {
                let form = Form::of(form).ok_or(Shape::NotFound)?;
                ("POST", Route::Speech { voice: id(voice), form })
            }
            // The variants with timestamps, which also contain the voice of each segment, are not
            // simulated.
            ["v1", "text-to-dialogue"] => ("POST", Route::Dialogue(Form::Whole)),
            ["v1", "text-to-dialogue", "stream"] => ("POST", Route::Dialogue(Form::Stream)),
            ["v1", "speech-to-text"] => ("POST", Route::Transcription),
            ["v1", "sound-generation"] => ("POST", Route::SoundEffect),
            ["v1", "single-use-token", kind] => ("POST", Route::SingleUseToken(id(kind))),
            ["v1", "convai", "conversation", "get-signed-url" | "get_signed_url"] => {
                ("GET", Route::SignedUrl)
            }
            ["v1", "convai", "conversation", "token"] => ("GET", Route::ConversationToken),
            ["v1", "convai", "conversations", conversation] => ("GET", Route::Conversation(id(conversation))),
            ["v1", "history"] => ("GET", Route::HistoryPage),
            ["v1", "history", item] if *method == Method::DELETE => {
                return Ok(Route::HistoryDeletion(id(item)));
            }
            ["v1", "history", item] => ("GET", Route::HistoryItem(id(item))),
            ["v1", "history", item, "audio"] => ("GET", Route::HistoryAudio(id(item))),
            _ => {
                return Operation::find(method, &segments)
                    .map(|(operation, ids)| Route::Operation(operation, ids));
            }
        };
        if method.as_str() == allowed { Ok(route) } else { Err(Shape::MethodNotAllowed(allowed)) }
    }

    /// The required permission, with the provider's name.
    pub(super) fn permission(&self) -> Option<&'static str> {
        match self {
            Route::User | Route::Subscription => Some("user_read"),
            Route::Models => Some("models_read"),
            Route::Voices | Route::VoicesV2 | Route::Voice(_) => Some("voices_read"),
            Route::Library => Some("voices_read"),
            Route::VoiceAddition => Some("create_instant_voice_clone"),
            Route::ProfessionalVoiceAddition => Some("create_professional_voice_clone"),
            Route::LibraryVoiceAddition(_) => Some("add_voice_from_voice_library"),
            Route::VoiceDeletion(_) => Some("voices_write"),
            Route::Speech { .. } | Route::Dialogue(_) => Some("text_to_speech"),
            Route::Transcription => Some("speech_to_text"),
            Route::SoundEffect => Some("sound_generation"),
            Route::HistoryPage | Route::HistoryItem(_) | Route::HistoryAudio(_) => {
                Some("speech_history_read")
            }
            Route::HistoryDeletion(_) => Some("speech_history_write"),
            Route::SignedUrl | Route::ConversationToken => Some("convai_write"),
            Route::Conversation(_) => Some("convai_read"),
            Route::Operation(operation, _) => Some(operation.permission),
            // The operation that accepts the token requires its own permission.
            Route::SingleUseToken(_) | Route::Echo => None,
        }
    }
}

impl Form {
    fn of(segments: &[&str]) -> Option<Self> {
        match segments {
            [] => Some(Form::Whole),
            ["stream"] => Some(Form::Stream),
            ["with-timestamps"] => Some(Form::TimedWhole),
            ["stream", "with-timestamps"] => Some(Form::TimedStream),
            _ => None,
        }
    }
}

/// The names and values of a query, decoded.
pub(super) fn query(text: &str) -> impl Iterator<Item = (String, String)> {
    text.split('&').filter(|pair| !pair.is_empty()).map(|pair| {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        (decoded(name), decoded(value))
    })
}

/// Decodes percent signs and plus signs. An invalid escape stays unchanged.
pub(super) fn decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        rest = after;
        match (first, escape(after)) {
            (b'%', Some(byte)) => {
                bytes.push(byte);
                rest = &after[2..];
            }
            (b'+', _) => bytes.push(b' '),
            _ => bytes.push(*first),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn escape(text: &[u8]) -> Option<u8> {
    let high = char::from(*text.first()?).to_digit(16)?;
    let low = char::from(*text.get(1)?).to_digit(16)?;
    u8::try_from(high * 16 + low).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_methods_are_distinguished() {
        let voice = || "v".to_owned();
        let speech = |form| Ok(Route::Speech { voice: voice(), form });
        for (method, path, expected) in [
            (Method::POST, "/v1/text-to-speech/v", speech(Form::Whole)),
            (Method::POST, "/v1/text-to-speech/v/stream", speech(Form::Stream)),
            (Method::POST, "/v1/text-to-speech/v/with-timestamps", speech(Form::TimedWhole)),
            (Method::POST, "/v1/text-to-speech/v/stream/with-timestamps", speech(Form::TimedStream)),
            (Method::POST, "/v1/text-to-speech/v/steam", Err(Shape::NotFound)),
            (Method::GET, "/v1/text-to-speech/v", Err(Shape::MethodNotAllowed("POST"))),
            (Method::POST, "/v1/text-to-dialogue/stream", Ok(Route::Dialogue(Form::Stream))),
            (Method::POST, "/v1/text-to-dialogue/with-timestamps", Err(Shape::NotFound)),
            (Method::GET, "/v2/voices", Ok(Route::VoicesV2)),
            (Method::POST, "/v1/voices/add", Ok(Route::VoiceAddition)),
            (Method::POST, "/v1/voices/pvc", Ok(Route::ProfessionalVoiceAddition)),
            (Method::POST, "/v1/voices/add/owner/v", Ok(Route::LibraryVoiceAddition(voice()))),
            (Method::DELETE, "/v1/voices/v", Ok(Route::VoiceDeletion(voice()))),
            (Method::DELETE, "/v1/history/v", Ok(Route::HistoryDeletion(voice()))),
            (Method::PUT, "/v1/history/v", Err(Shape::MethodNotAllowed("GET"))),
            (Method::PUT, "/v1/simulator/echo", Ok(Route::Echo)),
            (Method::GET, "/v1/user/", Err(Shape::NotFound)),
            (Method::GET, "", Err(Shape::NotFound)),
        ] {
            assert_eq!(Route::of(&method, path), expected, "{method} {path}");
        }
    }

    #[test]
    fn queries_are_decoded_and_invalid_escapes_are_kept() {
        let pairs: Vec<_> = query("a=1&%78i%5Fapi_key=s+p&b&c=%zz&d=%4&e=100%").collect();
        let expected =
            [("a", "1"), ("xi_api_key", "s p"), ("b", ""), ("c", "%zz"), ("d", "%4"), ("e", "100%")];
        assert_eq!(pairs, expected.map(|(name, value)| (name.to_owned(), value.to_owned())));
    }
}

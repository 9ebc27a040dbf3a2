//! Maps a method and a path to an operation of the provider or to the simulator's echo, or to the provider's refusal of
//! an unknown path or a wrong method.

use http::Method;

use super::free_operations::FreeOperation;
use super::operations::OperationRow;
use super::refusal::RefusalKind;

/// A simulated operation of the provider, or the echo.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Route {
    Speech {
        voice: String,
        output: SpeechOutput,
    },
    Dialogue(SpeechOutput),
    Transcription,
    SoundEffect,
    SingleUseToken(String),
    SignedUrl,
    ConversationToken,
    Conversation(String),
    /// An operation that costs no credits.
    Free(FreeOperation),
    /// An operation of the table in `operations`, with the identifiers in its path.
    Operation(&'static OperationRow, Vec<String>),
    /// The simulator's own endpoint `/v1/simulator/echo`, which returns the received request.
    Echo,
}

/// The form of the audio in a speech or dialogue response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SpeechOutput {
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
    /// Returns the provider's 404 refusal for an unknown path, or its 405 refusal for a wrong method.
    pub(super) fn find(method: &Method, path: &str) -> Result<Self, RefusalKind> {
        let segments: Vec<&str> = path.split('/').skip(1).collect();
        let id = |segment: &str| segment.to_owned();
        let free_route = |operation| ("GET", Route::Free(operation));
        let (allowed_method, route) = match segments.as_slice() {
            ["v1", "simulator", "echo"] => return Ok(Route::Echo),
            ["v1", "user"] => free_route(FreeOperation::User),
            ["v1", "user", "subscription"] => free_route(FreeOperation::Subscription),
            ["v1", "models"] => free_route(FreeOperation::Models),
            ["v1", "voices"] => free_route(FreeOperation::Voices),
            ["v2", "voices"] => free_route(FreeOperation::VoicesV2),
            ["v1", "voices", "add"] => ("POST", Route::Free(FreeOperation::AddVoice)),
            ["v1", "voices", "add", _owner, voice] => {
                ("POST", Route::Free(FreeOperation::AddLibraryVoice(id(voice))))
            }
            ["v1", "voices", "pvc"] => ("POST", Route::Free(FreeOperation::AddProfessionalVoice)),
            ["v1", "shared-voices"] => free_route(FreeOperation::Library),
            ["v1", "voices", voice] if *method == Method::DELETE => {
                return Ok(Route::Free(FreeOperation::DeleteVoice(id(voice))));
            }
            ["v1", "voices", voice] => free_route(FreeOperation::Voice(id(voice))),
            ["v1", "text-to-speech", voice, output @ ..] => {
                let output = SpeechOutput::parse(output).ok_or(RefusalKind::NotFound)?;
                ("POST", Route::Speech { voice: id(voice), output })
            }
            // The variants with timestamps are not simulated.
            ["v1", "text-to-dialogue"] => ("POST", Route::Dialogue(SpeechOutput::Whole)),
            ["v1", "text-to-dialogue", "stream"] => ("POST", Route::Dialogue(SpeechOutput::Stream)),
            ["v1", "speech-to-text"] => ("POST", Route::Transcription),
            ["v1", "sound-generation"] => ("POST", Route::SoundEffect),
            ["v1", "single-use-token", token_type] => ("POST", Route::SingleUseToken(id(token_type))),
            ["v1", "convai", "conversation", "get-signed-url" | "get_signed_url"] => {
                ("GET", Route::SignedUrl)
            }
            ["v1", "convai", "conversation", "token"] => ("GET", Route::ConversationToken),
            ["v1", "convai", "conversations", conversation] => ("GET", Route::Conversation(id(conversation))),
            ["v1", "history"] => free_route(FreeOperation::HistoryPage),
            ["v1", "history", item] if *method == Method::DELETE => {
                return Ok(Route::Free(FreeOperation::DeleteHistoryItem(id(item))));
            }
            ["v1", "history", item] => free_route(FreeOperation::HistoryItem(id(item))),
            ["v1", "history", item, "audio"] => free_route(FreeOperation::HistoryAudio(id(item))),
            _ => {
                return OperationRow::find(method, &segments)
                    .map(|(operation, ids)| Route::Operation(operation, ids));
            }
        };
        if method.as_str() == allowed_method {
            Ok(route)
        } else {
            Err(RefusalKind::MethodNotAllowed(allowed_method))
        }
    }
}

impl SpeechOutput {
    /// Parses the segments after the voice.
    fn parse(segments: &[&str]) -> Option<Self> {
        match segments {
            [] => Some(SpeechOutput::Whole),
            ["stream"] => Some(SpeechOutput::Stream),
            ["with-timestamps"] => Some(SpeechOutput::TimedWhole),
            ["stream", "with-timestamps"] => Some(SpeechOutput::TimedStream),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_methods_are_distinguished() {
        let voice = || "v".to_owned();
        let speech = |output| Ok(Route::Speech { voice: voice(), output });
        let free_route = |operation| Ok(Route::Free(operation));
        for (method, path, expected) in [
            (Method::POST, "/v1/text-to-speech/v", speech(SpeechOutput::Whole)),
            (Method::POST, "/v1/text-to-speech/v/stream", speech(SpeechOutput::Stream)),
            (Method::POST, "/v1/text-to-speech/v/with-timestamps", speech(SpeechOutput::TimedWhole)),
            (Method::POST, "/v1/text-to-speech/v/stream/with-timestamps", speech(SpeechOutput::TimedStream)),
            (Method::POST, "/v1/text-to-speech/v/steam", Err(RefusalKind::NotFound)),
            (Method::GET, "/v1/text-to-speech/v", Err(RefusalKind::MethodNotAllowed("POST"))),
            (Method::POST, "/v1/text-to-dialogue/stream", Ok(Route::Dialogue(SpeechOutput::Stream))),
            (Method::POST, "/v1/text-to-dialogue/with-timestamps", Err(RefusalKind::NotFound)),
            (Method::GET, "/v2/voices", free_route(FreeOperation::VoicesV2)),
            (Method::POST, "/v1/voices/add", free_route(FreeOperation::AddVoice)),
            (Method::POST, "/v1/voices/pvc", free_route(FreeOperation::AddProfessionalVoice)),
            (Method::POST, "/v1/voices/add/owner/v", free_route(FreeOperation::AddLibraryVoice(voice()))),
            (Method::DELETE, "/v1/voices/v", free_route(FreeOperation::DeleteVoice(voice()))),
            (Method::DELETE, "/v1/history/v", free_route(FreeOperation::DeleteHistoryItem(voice()))),
            (Method::PUT, "/v1/history/v", Err(RefusalKind::MethodNotAllowed("GET"))),
            (Method::PUT, "/v1/simulator/echo", Ok(Route::Echo)),
            (Method::GET, "/v1/user/", Err(RefusalKind::NotFound)),
            (Method::GET, "", Err(RefusalKind::NotFound)),
        ] {
            assert_eq!(Route::find(&method, path), expected, "{method} {path} must have the expected route");
        }
    }
}

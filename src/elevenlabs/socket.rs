//! Describes the provider's WebSocket protocols: their messages, credentials, signed URLs, audio formats and default
//! models, the content for which the provider charges, and when a session counts towards a concurrency limit.
//!
//! The provider accepts an upgrade with a 101 response even for a bad key, and sends the refusal in a message or a
//! close frame (captured, September 2026).

mod audio_format;
mod content_counter;
mod conversation;
mod credentials;
mod message_kind;
mod signed_url;

pub use audio_format::audio_bytes_per_second;
pub use content_counter::{ChargedContent, ContentCounter, MessageCount};
pub use conversation::{conversation_cost, conversation_id};
pub use credentials::{CredentialBlanker, credential_in_message, has_single_use_token};
pub use message_kind::{MAX_REFUSAL_BYTES, MessageKind, SessionStage, classify_close, classify_message};
pub use signed_url::replace_signed_url_host;

use super::endpoint::Operation;

/// A WebSocket protocol of the provider.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// Text to speech of one text.
    Speech,
    /// Text to speech of several concurrent contexts.
    SpeechContexts,
    /// Text to dialogue.
    Dialogue,
    /// Text to dialogue of several concurrent contexts.
    DialogueContexts,
    /// Live speech to text.
    Transcription,
    /// A conversation with an agent.
    Agent,
    /// An unknown protocol of the provider's API. Its messages are parsed like messages of the known protocols.
    Unknown,
    /// A WebSocket outside the provider's API. Its messages are not parsed.
    Foreign,
}

/// The time in which a session counts as one request of its concurrency group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConcurrencyCounting {
    /// The session counts from its start to its end.
    WholeSession,
    /// The session counts while the provider generates speech. An idle session does not count. Source: the
    /// provider's page on models.
    WhileSpeaking,
    /// The session never counts, because no limit is known.
    Never,
}

impl Dialect {
    /// All protocols.
    pub const ALL: [Self; 8] = [
        Self::Speech,
        Self::SpeechContexts,
        Self::Dialogue,
        Self::DialogueContexts,
        Self::Transcription,
        Self::Agent,
        Self::Unknown,
        Self::Foreign,
    ];

    /// Returns the name of the protocol in metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Speech => "speech",
            Self::SpeechContexts => "speech_contexts",
            Self::Dialogue => "dialogue",
            Self::DialogueContexts => "dialogue_contexts",
            Self::Transcription => "transcription",
            Self::Agent => "agent",
            Self::Unknown => "unknown",
            Self::Foreign => "foreign",
        }
    }

    /// Returns the work of a session, which determines its price and concurrency group. The work of an unknown protocol
    /// has neither.
    #[must_use]
    pub fn operation(self) -> Operation {
        match self {
            Self::Speech | Self::SpeechContexts => Operation::Speech,
            Self::Dialogue | Self::DialogueContexts => Operation::Dialogue,
            Self::Transcription => Operation::LiveTranscription,
            Self::Agent => Operation::Conversation,
            Self::Unknown | Self::Foreign => Operation::Reading,
        }
    }

    /// Returns the time in which a session counts as one request of its concurrency group.
    #[must_use]
    pub fn concurrency_counting(self) -> ConcurrencyCounting {
        match self {
            Self::Speech | Self::SpeechContexts | Self::Dialogue | Self::DialogueContexts => {
                ConcurrencyCounting::WhileSpeaking
            }
            Self::Transcription | Self::Agent => ConcurrencyCounting::WholeSession,
            Self::Unknown | Self::Foreign => ConcurrencyCounting::Never,
        }
    }

    /// Whether the provider speaks the text that a client sends, and charges its characters.
    #[must_use]
    pub fn generates_speech(self) -> bool {
        self.concurrency_counting() == ConcurrencyCounting::WhileSpeaking
    }

    /// Whether Keychoir parses the messages of a session. For such a session, Keychoir must not offer compression.
    #[must_use]
    pub fn is_inspected(self) -> bool {
        self != Self::Foreign
    }

    /// Whether a client that presents no credential in the handshake may authenticate in a message.
    #[must_use]
    pub fn accepts_key_in_messages(self) -> bool {
        self.generates_speech()
    }

    /// Returns the model of a session that names no model, or `None` if the session has no model. Source for speech:
    /// the OpenAPI document of speech over HTTP.
    #[must_use]
    pub fn default_model(self) -> Option<&'static str> {
        match self {
            Self::Speech | Self::SpeechContexts => Some(super::request_body::DEFAULT_MODEL),
            Self::Dialogue | Self::DialogueContexts => Some("eleven_v3"),
            Self::Transcription => Some("scribe_v2_realtime"),
            Self::Agent | Self::Unknown | Self::Foreign => None,
        }
    }
}

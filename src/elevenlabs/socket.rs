//! The provider's WebSocket protocols: their purpose, price and concurrency group. The provider accepts
//! the upgrade with 101 even for a bad key, and reports the refusal in a message or close frame
//! (captured, September 2026).

mod conversation;
mod credentials;
mod message_facts;
mod message_kind;
mod signed;
mod text_count;

pub use conversation::{conversation_cost, conversation_id};
pub use credentials::{CredentialBlanker, presented};
pub use message_facts::{NAMING_BYTES_MAX, audio_bytes_per_second, brings_token};
pub use message_kind::{MessageKind, REFUSAL_BYTES_MAX, SessionStage, classify_close, classify_message};
pub use signed::readdressed;
pub use text_count::{ContentCounter, MessageCount, SpokenText};

use super::endpoint::Operation;

/// A WebSocket protocol of the provider.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// Text to speech, one text.
    Speech,
    /// Text to speech, several concurrent contexts.
    SpeechContexts,
    /// Text to dialogue.
    Dialogue,
    /// Text to dialogue, several concurrent contexts.
    DialogueContexts,
    /// Live speech to text.
    Transcription,
    /// A conversation with an agent.
    Agent,
    /// An unknown protocol of the provider's API: its messages are parsed like the known ones.
    Unknown,
    /// A WebSocket outside the provider's API: nothing is known about its messages.
    Foreign,
}

/// When a session counts towards the concurrency limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CountedWhile {
    /// From its start to its end.
    Open,
    /// While speech is generated: an idle session does not count. Source: the provider's page on models.
    Speaking,
    /// Never: no limit is known.
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

    /// The word in metrics.
    #[must_use]
    pub const fn word(self) -> &'static str {
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

    /// The work of its sessions, which determines price and concurrency group.
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

    /// When a session counts towards the concurrency limit.
    #[must_use]
    pub fn counted(self) -> CountedWhile {
        match self {
            Self::Speech | Self::SpeechContexts | Self::Dialogue | Self::DialogueContexts => {
                CountedWhile::Speaking
            }
            Self::Transcription | Self::Agent => CountedWhile::Open,
            Self::Unknown | Self::Foreign => CountedWhile::Never,
        }
    }

    /// Whether text sent on it is charged by its characters.
    #[must_use]
    pub fn is_spoken(self) -> bool {
        self.counted() == CountedWhile::Speaking
    }

    /// Whether the proxy parses its messages, so that no compression may be negotiated.
    #[must_use]
    pub fn is_read(self) -> bool {
        self != Self::Foreign
    }

    /// Whether a client that presents no credential in the handshake may authenticate in a message.
    #[must_use]
    pub fn takes_key_in_messages(self) -> bool {
        self.is_spoken()
    }

    /// The model of a session that names none. Source: the OpenAPI document, for speech over HTTP.
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

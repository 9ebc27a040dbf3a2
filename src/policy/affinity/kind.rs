//! What an identifier can be of, and the hash that stands for it: an identifier may be a token, and
//! nothing that is kept or printed shall open anything.

use std::fmt;
use std::time::Duration;

use sha2::{Digest, Sha256};

macro_rules! kinds {
    ($($(#[$doc:meta])* $kind:ident = $word:literal,)*) => {
        /// What an identifier is of.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Kind { $($(#[$doc])* $kind,)* }

        impl Kind {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$kind,)*];

            /// The word for it in the books, and in what a client is told.
            #[must_use]
            pub fn word(self) -> &'static str {
                match self { $(Self::$kind => $word,)* }
            }
        }
    };
}

kinds! {
    /// A voice: cloned, designed, or copied from the library. Every account has the premade ones.
    Voice = "voice",
    /// A recording that a voice was made of.
    Sample = "sample",
    /// A designed voice that is not yet one, or a session of remixing.
    Preview = "voice preview",
    /// A group of voices.
    Collection = "voice collection",
    /// Something that was spoken.
    HistoryItem = "history item",
    /// A request for speech, that others continue.
    Request = "earlier request",
    /// A pronunciation dictionary, or one of its versions.
    Dictionary = "pronunciation dictionary",
    /// A dubbing.
    Dubbing = "dubbing",
    /// A project of the studio, of audio native or of dubbing.
    Project = "project",
    /// A chapter of a project.
    Chapter = "chapter",
    /// A state of a project or chapter.
    Snapshot = "snapshot",
    /// A transcript.
    Transcript = "transcript",
    /// An uploaded file.
    Asset = "asset",
    /// A generation of a flow: an image, a video or speech.
    Flow = "flow",
    /// A song, or a variation of one.
    Song = "song",
    /// A model of music that was tuned.
    Finetune = "finetune",
    /// An agent.
    Agent = "agent",
    /// A branch or version of an agent.
    Branch = "agent branch",
    /// A conversation with an agent.
    Conversation = "conversation",
    /// A phone or WhatsApp number.
    PhoneNumber = "phone number",
    /// A document or folder of a knowledge base.
    Document = "document",
    /// A tool of agents.
    Tool = "tool",
    /// A server of tools.
    McpServer = "tool server",
    /// A stored secret.
    Secret = "secret",
    /// A variable of an environment.
    Variable = "variable",
    /// A test of agents, or a run of it.
    Test = "test",
    /// A batch of calls.
    Batch = "batch call",
    /// A speech engine.
    SpeechEngine = "speech engine",
    /// An order of a production.
    Order = "order",
    /// A file of an order.
    Media = "order media",
    /// An item of an order.
    Item = "order item",
    /// A webhook.
    Webhook = "webhook",
    /// A token for one use.
    Token = "token",
    /// The signature of a signed URL.
    Signature = "signed URL",
    /// Where a list goes on.
    Cursor = "list cursor",
}

const HOUR: Duration = Duration::from_secs(3_600);

impl Kind {
    /// The kind that the books call so.
    #[must_use]
    pub fn of_word(word: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|kind| kind.word() == word)
    }

    /// Whether different accounts may have the same one: a 200 then says nothing of its owner.
    #[must_use]
    pub fn is_shared(self) -> bool {
        self == Self::Voice
    }

    /// How long the provider honours it, if not for good: requests can be continued for two hours,
    /// tokens and signed URLs last 15 minutes.
    #[must_use]
    pub fn span(self) -> Option<Duration> {
        if self == Self::Request {
            return Some(2 * HOUR);
        }
        if [Self::Token, Self::Signature].contains(&self) {
            return Some(HOUR);
        }
        (self == Self::Cursor).then_some(24 * HOUR)
    }

    /// Whether traffic makes them by itself, one or more a request. They must not push out what was
    /// made with care.
    #[must_use]
    pub fn is_plentiful(self) -> bool {
        self == Self::HistoryItem || self.span().is_some()
    }
}

/// An identifier by its hash: SHA-256 of kind and identifier, cut to 16 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tag([u8; 16]);

impl Tag {
    /// The tag of an identifier.
    #[must_use]
    pub fn of(kind: Kind, identifier: &str) -> Self {
        let mut hash = Sha256::new();
        hash.update(kind.word());
        hash.update([0]);
        hash.update(identifier);
        let digest: [u8; 32] = hash.finalize().into();
        let mut cut = [0; 16];
        cut.copy_from_slice(&digest[..16]);
        Self(cut)
    }

    /// A tag as the books have it.
    #[must_use]
    pub fn of_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// Its bytes, as evenly spread as a hash.
    #[must_use]
    pub fn bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Debug for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().take(4).try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// An identifier that a request names or an answer gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Named {
    /// What it is of.
    pub kind: Kind,
    /// Which.
    pub tag: Tag,
}

impl Named {
    /// `identifier`, which is of `kind`.
    #[must_use]
    pub fn new(kind: Kind, identifier: &str) -> Self {
        Self { kind, tag: Tag::of(kind, identifier) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_a_word_of_its_own() {
        for kind in Kind::ALL {
            assert_eq!(Kind::of_word(kind.word()), Some(*kind));
        }
    }

    #[test]
    fn a_tag_is_of_its_kind_and_shows_no_identifier() {
        assert_eq!(Tag::of(Kind::Voice, "v1"), Tag::of(Kind::Voice, "v1"));
        assert_ne!(Tag::of(Kind::Voice, "v1"), Tag::of(Kind::Voice, "v2"));
        assert_ne!(Tag::of(Kind::Voice, "v1"), Tag::of(Kind::Agent, "v1"));
        assert!(!format!("{:?}", Named::new(Kind::Token, "sutkn_1")).contains("sutkn"));
    }
}

//! The kinds of identifiers, and the hash that replaces an identifier: an identifier may be a token, and
//! a stored or printed value must not grant access.

use std::fmt;
use std::time::Duration;

use sha2::{Digest, Sha256};

use crate::policy::units::UnixMs;

macro_rules! kinds {
    ($($(#[$doc:meta])* $kind:ident = $word:literal,)*) => {
        /// The kind of an identifier.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Kind { $($(#[$doc])* $kind,)* }

        impl Kind {
            /// All kinds.
            pub const ALL: &'static [Self] = &[$(Self::$kind,)*];

            /// The word in the database and in messages to clients.
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
    /// A recording that a voice was cloned from.
    Sample = "sample",
    /// A preview of a designed voice, or a session of remixing.
    Preview = "voice preview",
    /// A collection of voices.
    Collection = "voice collection",
    /// A generated speech in the history.
    HistoryItem = "history item",
    /// A request for speech that later requests continue.
    Request = "earlier request",
    /// A pronunciation dictionary, or one of its versions.
    Dictionary = "pronunciation dictionary",
    /// A dubbing.
    Dubbing = "dubbing",
    /// A project of the studio, of audio native or of dubbing.
    Project = "project",
    /// A chapter of a project.
    Chapter = "chapter",
    /// A snapshot of a project or chapter.
    Snapshot = "snapshot",
    /// A transcript.
    Transcript = "transcript",
    /// An uploaded file.
    Asset = "asset",
    /// A generation of a flow: an image, a video or speech.
    Flow = "flow",
    /// A song, or a variation of one.
    Song = "song",
    /// A fine-tuned model of music.
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
    /// An MCP server.
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
    /// A single-use token.
    Token = "token",
    /// The signature of a signed URL.
    Signature = "signed URL",
    /// The cursor of a list.
    Cursor = "list cursor",
}

const HOUR: Duration = Duration::from_secs(3_600);

impl Kind {
    /// The kind with this word in the database.
    #[must_use]
    pub fn of_word(word: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|kind| kind.word() == word)
    }

    /// Whether different accounts may have the same identifier: a response with status 200 then does not
    /// prove that the account owns it.
    #[must_use]
    pub fn is_shared(self) -> bool {
        self == Self::Voice
    }

    /// How long the provider accepts an identifier of this kind; `None` for no limit. Requests can be
    /// continued for two hours; tokens and signed URLs are valid for 15 minutes.
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

    /// The storage class of its identifiers.
    #[must_use]
    pub fn class(self) -> Class {
        if self.span().is_some() {
            return Class::Passing;
        }
        if self == Self::HistoryItem { Class::Plentiful } else { Class::Lasting }
    }
}

/// The storage class of identifiers: each has its own bound, so that identifiers of automatic traffic
/// never evict those of resources created by hand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Identifiers of resources that are created by hand and used for years: voices, agents.
    Lasting,
    /// Identifiers of which each request creates one, valid for a long time.
    Plentiful,
    /// Identifiers that are valid for hours.
    Passing,
}

impl Class {
    /// All classes.
    pub const ALL: [Self; 3] = [Self::Lasting, Self::Plentiful, Self::Passing];

    /// Its number in the database.
    #[must_use]
    pub fn number(self) -> u8 {
        match self {
            Self::Lasting => 0,
            Self::Plentiful => 1,
            Self::Passing => 2,
        }
    }
}

/// The maximum number and age of the recorded identifiers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keeping {
    /// Maximum number of all classes together: half of them of the class [`Lasting`](Class::Lasting).
    pub identifiers_max: usize,
    /// Maximum time since the last use; `None` for no limit.
    pub kept: Option<Duration>,
}

impl Keeping {
    /// Maximum number of identifiers of a class.
    #[must_use]
    pub fn count_max(&self, class: Class) -> usize {
        match class {
            Class::Lasting => self.identifiers_max / 2,
            Class::Plentiful | Class::Passing => self.identifiers_max / 4,
        }
    }

    /// Maximum time since the last use of an identifier of a class; `None` for no limit.
    #[must_use]
    pub fn kept(&self, class: Class) -> Option<Duration> {
        match class {
            Class::Lasting | Class::Plentiful => self.kept,
            Class::Passing => {
                let longest = Kind::ALL.iter().filter_map(|kind| kind.span()).max();
                [self.kept, longest].into_iter().flatten().min()
            }
        }
    }

    /// Whether an identifier that was recorded and last used at these times still counts.
    #[must_use]
    pub fn counts(&self, kind: Kind, recorded_at: UnixMs, used_at: UnixMs, now: UnixMs) -> bool {
        let is_young =
            |since: UnixMs, span: Option<Duration>| span.is_none_or(|span| now.since(since) < span);
        is_young(recorded_at, kind.span()) && is_young(used_at, self.kept)
    }
}

/// An identifier as a hash: SHA-256 of kind and identifier, cut to 16 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tag([u8; 16]);

impl Tag {
    /// The hash of an identifier.
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

    /// A hash as it is stored.
    #[must_use]
    pub fn of_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// Its bytes, uniformly distributed.
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

/// An identifier that a request or a response names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Named {
    /// The kind of resource.
    pub kind: Kind,
    /// The hash of the identifier.
    pub tag: Tag,
}

impl Named {
    /// Hashes `identifier`, which is of `kind`.
    #[must_use]
    pub fn new(kind: Kind, identifier: &str) -> Self {
        Self { kind, tag: Tag::of(kind, identifier) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_its_own_word() {
        for kind in Kind::ALL {
            assert_eq!(Kind::of_word(kind.word()), Some(*kind));
        }
    }

    #[test]
    fn an_identifier_of_each_kind_expires_after_its_time() {
        let keeping = Keeping { identifiers_max: 100, kept: Some(30 * 24 * HOUR) };
        let at = |hours: u32| UnixMs(1).plus(HOUR * hours);
        let check = |kind, recorded, used, now, expected| {
            assert_eq!(keeping.counts(kind, at(recorded), at(used), at(now)), expected, "{kind:?} {now}");
        };
        check(Kind::Voice, 0, 0, 719, true);
        check(Kind::Voice, 0, 0, 720, false);
        check(Kind::Voice, 0, 100, 819, true);
        // The provider deletes it after its time, even if it is used.
        check(Kind::Request, 0, 1, 1, true);
        check(Kind::Request, 0, 1, 2, false);
        check(Kind::Cursor, 0, 0, 23, true);
        assert!(Keeping { kept: None, ..keeping }.counts(Kind::Voice, at(0), at(0), at(9_999_999)));
        // An entry does not expire when the clock is set back.
        check(Kind::Voice, 5, 5, 0, true);
        assert_eq!(Class::ALL.map(|class| keeping.count_max(class)), [50, 25, 25]);
        assert_eq!(keeping.kept(Class::Passing), Some(24 * HOUR));
    }

    #[test]
    fn a_tag_depends_on_its_kind_and_contains_no_identifier() {
        assert_eq!(Tag::of(Kind::Voice, "v1"), Tag::of(Kind::Voice, "v1"));
        assert_ne!(Tag::of(Kind::Voice, "v1"), Tag::of(Kind::Voice, "v2"));
        assert_ne!(Tag::of(Kind::Voice, "v1"), Tag::of(Kind::Agent, "v1"));
        assert!(!format!("{:?}", Named::new(Kind::Token, "sutkn_1")).contains("sutkn"));
    }
}

//! Defines the kinds of identifiers and their storage classes, limits how many identifiers of each class are recorded
//! and for how long, and defines the hash that replaces an identifier. Only the hash is stored or printed, because an
//! identifier may be a token that grants access.

use std::fmt;
use std::time::Duration;

use sha2::{Digest, Sha256};

use crate::policy::units::UnixMs;

macro_rules! kinds {
    ($($(#[$doc:meta])* $kind:ident = $name:literal,)*) => {
        /// The kind of resource that an identifier names.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum ResourceKind { $($(#[$doc])* $kind,)* }

        impl ResourceKind {
            /// All kinds.
            pub const ALL: &'static [Self] = &[$(Self::$kind,)*];

            /// Returns the name of the kind in the database and in messages to clients.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$kind => $name,)* }
            }
        }
    };
}

kinds! {
    /// A voice: cloned, designed, or copied from the library. Every account has the premade voices.
    Voice = "voice",
    /// A recording from which a voice was cloned.
    Sample = "sample",
    /// A preview of a designed voice, or a remixing session.
    Preview = "voice preview",
    /// A collection of voices.
    Collection = "voice collection",
    /// Generated speech in the history.
    HistoryItem = "history item",
    /// A request for speech that later requests continue.
    Request = "earlier request",
    /// A pronunciation dictionary, or one of its versions.
    Dictionary = "pronunciation dictionary",
    /// A dubbing: a video or audio with speech in another language.
    Dubbing = "dubbing",
    /// A project of the studio, audio native or dubbing.
    Project = "project",
    /// A chapter of a project.
    Chapter = "chapter",
    /// A snapshot of a project or chapter.
    Snapshot = "snapshot",
    /// A transcript of uploaded speech.
    Transcript = "transcript",
    /// An uploaded file.
    Asset = "asset",
    /// A generation of a flow: an image, a video or speech.
    Flow = "flow",
    /// A song, or a variation of one.
    Song = "song",
    /// A fine-tuned model of music.
    Finetune = "finetune",
    /// An agent, which has conversations with users.
    Agent = "agent",
    /// A branch or version of an agent.
    Branch = "agent branch",
    /// A conversation with an agent.
    Conversation = "conversation",
    /// A phone or WhatsApp number.
    PhoneNumber = "phone number",
    /// A document or folder of a knowledge base, or a folder of tests.
    Document = "document",
    /// A tool of agents.
    Tool = "tool",
    /// An MCP server.
    McpServer = "tool server",
    /// A secret that tools of agents use.
    Secret = "secret",
    /// A variable of an environment.
    Variable = "variable",
    /// A test of agents, or a run of a test.
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
    /// A webhook of the workspace.
    Webhook = "webhook",
    /// A single-use token.
    Token = "token",
    /// The signature of a signed URL.
    Signature = "signed URL",
    /// The cursor of a list.
    Cursor = "list cursor",
}

const HOUR: Duration = Duration::from_secs(3_600);

impl ResourceKind {
    /// Parses a name that [`as_str`](Self::as_str) returns.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|kind| kind.as_str() == name)
    }

    /// Whether several accounts may have the same identifier of this kind. For such a kind, a response with status 200
    /// does not prove that the account owns the resource.
    #[must_use]
    pub fn is_shared(self) -> bool {
        self == Self::Voice
    }

    /// Returns an upper bound of the time for which the provider accepts an identifier of this kind, or `None` if the
    /// time is not limited. The provider accepts earlier requests for two hours, and tokens and signed URLs for 15
    /// minutes. For cursors, 24 hours are assumed.
    #[must_use]
    pub fn lifetime(self) -> Option<Duration> {
        if self == Self::Request {
            return Some(2 * HOUR);
        }
        if [Self::Token, Self::Signature].contains(&self) {
            return Some(HOUR);
        }
        (self == Self::Cursor).then_some(24 * HOUR)
    }

    /// Returns the storage class of identifiers of this kind.
    #[must_use]
    pub fn storage_class(self) -> StorageClass {
        if self.lifetime().is_some() {
            StorageClass::ShortLived
        } else if self == Self::HistoryItem {
            StorageClass::PerRequest
        } else {
            StorageClass::LongLived
        }
    }
}

/// The storage class of identifiers. Each class has a separate limit, so that identifiers of automatic
/// traffic never evict identifiers of resources that were created by hand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StorageClass {
    /// Identifiers of resources that are created by hand and used for years, such as voices and agents.
    LongLived,
    /// Identifiers of history items, which each request creates, and which are valid for a long time.
    PerRequest,
    /// Identifiers of earlier requests, tokens, signed URLs and cursors, which are valid for at most 24 hours.
    ShortLived,
}

impl StorageClass {
    /// All classes.
    pub const ALL: [Self; 3] = [Self::LongLived, Self::PerRequest, Self::ShortLived];

    /// Returns the number of the class in the database.
    #[must_use]
    pub fn number(self) -> u8 {
        match self {
            Self::LongLived => 0,
            Self::PerRequest => 1,
            Self::ShortLived => 2,
        }
    }
}

/// The maximum number and age of recorded identifiers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetentionLimits {
    /// Maximum number of identifiers in all classes. Half of them are for [`LongLived`](StorageClass::LongLived), and a
    /// quarter for each of the other classes.
    pub max_identifiers: usize,
    /// Maximum time since the last use of an identifier, or `None` if the time is not limited.
    pub max_idle: Option<Duration>,
}

impl RetentionLimits {
    /// Returns the maximum number of identifiers of a class.
    #[must_use]
    pub fn max_count(&self, class: StorageClass) -> usize {
        match class {
            StorageClass::LongLived => self.max_identifiers / 2,
            StorageClass::PerRequest | StorageClass::ShortLived => self.max_identifiers / 4,
        }
    }

    /// Returns the maximum time since the last use of an identifier of a class, or `None` if the time is not limited.
    #[must_use]
    pub fn max_idle(&self, class: StorageClass) -> Option<Duration> {
        match class {
            StorageClass::LongLived | StorageClass::PerRequest => self.max_idle,
            StorageClass::ShortLived => {
                let longest = ResourceKind::ALL.iter().filter_map(|kind| kind.lifetime()).max();
                self.max_idle.into_iter().chain(longest).min()
            }
        }
    }

    /// Whether an identifier that was recorded at `recorded_at` and last used at `used_at` has not expired at `now`.
    #[must_use]
    pub fn is_current(&self, kind: ResourceKind, recorded_at: UnixMs, used_at: UnixMs, now: UnixMs) -> bool {
        let is_within =
            |start: UnixMs, limit: Option<Duration>| limit.is_none_or(|limit| now.since(start) < limit);
        is_within(recorded_at, kind.lifetime()) && is_within(used_at, self.max_idle)
    }
}

/// The hash of an identifier: the SHA-256 digest of the kind and the identifier, truncated to 16 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct IdentifierHash([u8; 16]);

impl IdentifierHash {
    /// Hashes an identifier.
    #[must_use]
    pub fn new(kind: ResourceKind, identifier: &str) -> Self {
        let mut hasher = Sha256::new();
        hasher.update(kind.as_str());
        hasher.update([0]);
        hasher.update(identifier);
        let digest: [u8; 32] = hasher.finalize().into();
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&digest[..16]);
        Self(bytes)
    }

    /// Wraps the bytes of a stored hash.
    #[must_use]
    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// Returns the bytes of the hash. All their values are equally probable, so a shard can be chosen by one byte.
    #[must_use]
    pub fn bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Debug for IdentifierHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().take(4).try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// An identifier in a request or a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Identifier {
    /// The kind of resource that the identifier names.
    pub kind: ResourceKind,
    /// The hash of the identifier.
    pub hash: IdentifierHash,
}

impl Identifier {
    /// Creates an identifier from its text, which is hashed.
    #[must_use]
    pub fn new(kind: ResourceKind, text: &str) -> Self {
        Self { kind, hash: IdentifierHash::new(kind, text) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_a_distinct_name() {
        for kind in ResourceKind::ALL {
            assert_eq!(ResourceKind::parse(kind.as_str()), Some(*kind));
        }
    }

    #[test]
    fn an_identifier_expires_after_its_lifetime_or_the_maximum_idle_time() {
        let limits = RetentionLimits { max_identifiers: 100, max_idle: Some(30 * 24 * HOUR) };
        let hour = |number: u32| UnixMs(1).plus(HOUR * number);
        let check_current = |kind, recorded_hour, used_hour, now_hour, expected| {
            let is_current = limits.is_current(kind, hour(recorded_hour), hour(used_hour), hour(now_hour));
            assert_eq!(
                is_current, expected,
                "whether {kind:?} is current at hour {now_hour} must be as expected"
            );
        };
        check_current(ResourceKind::Voice, 0, 0, 719, true);
        check_current(ResourceKind::Voice, 0, 0, 720, false);
        check_current(ResourceKind::Voice, 0, 100, 819, true);
        // The provider forgets an earlier request after its lifetime, even if the request was continued.
        check_current(ResourceKind::Request, 0, 1, 1, true);
        check_current(ResourceKind::Request, 0, 1, 2, false);
        check_current(ResourceKind::Cursor, 0, 0, 23, true);
        let unlimited = RetentionLimits { max_idle: None, ..limits };
        assert!(unlimited.is_current(ResourceKind::Voice, hour(0), hour(0), hour(9_999_999)));
        // An identifier does not expire when the clock is set back.
        check_current(ResourceKind::Voice, 5, 5, 0, true);
        assert_eq!(StorageClass::ALL.map(|class| limits.max_count(class)), [50, 25, 25]);
        assert_eq!(limits.max_idle(StorageClass::ShortLived), Some(24 * HOUR));
    }

    #[test]
    fn a_hash_depends_on_the_kind_and_reveals_no_identifier() {
        let hash = IdentifierHash::new(ResourceKind::Voice, "v1");
        assert_eq!(IdentifierHash::new(ResourceKind::Voice, "v1"), hash);
        assert_ne!(IdentifierHash::new(ResourceKind::Voice, "v2"), hash);
        assert_ne!(IdentifierHash::new(ResourceKind::Agent, "v1"), hash);
        assert!(!format!("{:?}", Identifier::new(ResourceKind::Token, "sutkn_1")).contains("sutkn"));
    }
}

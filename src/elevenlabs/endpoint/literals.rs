//! Lists the literal segments of the API's paths, and finds them in a hash table that is built at compile time. All
//! other segments of a path are identifiers.
//!
//! Sources: the provider's OpenAPI document (300 paths, August 2026), its Python SDK 2.78 and its WebSocket paths.

/// A literal path segment of the API, as its index in [`LITERALS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(in crate::elevenlabs) struct Literal(u8);

impl Literal {
    /// The number of literals.
    pub(in crate::elevenlabs) const COUNT: usize = LITERALS.len();

    /// Finds the literal that equals `segment`, ignoring case.
    pub(in crate::elevenlabs) fn find(segment: &str) -> Option<Self> {
        if segment.is_ascii() { find_ascii(segment) } else { find_ascii(&segment.to_lowercase()) }
    }

    /// Returns the literal in lower case.
    pub(in crate::elevenlabs) fn text(self) -> &'static str {
        LITERALS[usize::from(self.0)]
    }

    /// Returns the index of the literal, below [`COUNT`](Self::COUNT) and 255.
    pub(in crate::elevenlabs) fn number(self) -> u8 {
        self.0
    }

    /// Returns the literal with a number, or `None` if the number is too large.
    pub(in crate::elevenlabs) fn from_number(number: u8) -> Option<Self> {
        (usize::from(number) < Self::COUNT).then_some(Self(number))
    }
}

/// Finds a literal in the hash table. Most lookups examine one slot, which is empty or contains the only possible
/// literal.
fn find_ascii(segment: &str) -> Option<Literal> {
    let bytes = segment.as_bytes();
    if !(MIN_BYTES..=MAX_BYTES).contains(&bytes.len()) {
        return None;
    }
    let mut slot = slot_of(bytes);
    while HASH_SLOTS[slot] != EMPTY {
        let literal = Literal(HASH_SLOTS[slot]);
        if literal.text().eq_ignore_ascii_case(segment) {
            return Some(literal);
        }
        slot = (slot + 1) % HASH_SLOTS.len();
    }
    None
}

/// Length of the shortest literal.
const MIN_BYTES: usize = 2;
/// Length of the longest literal.
const MAX_BYTES: usize = 33;

/// A slot without a literal.
const EMPTY: u8 = u8::MAX;

/// A hash table of the numbers of the literals. A literal whose slot is taken is in the next free slot.
const HASH_SLOTS: [u8; 1024] = {
    let mut slots = [EMPTY; 1024];
    let mut number = 0;
    while number < LITERALS.len() {
        let mut slot = slot_of(LITERALS[number].as_bytes());
        while slots[slot] != EMPTY {
            slot = (slot + 1) % slots.len();
        }
        #[expect(clippy::cast_possible_truncation, reason = "LITERALS has fewer than 255 entries")]
        let literal_number = number as u8;
        slots[slot] = literal_number;
        number += 1;
    }
    slots
};

/// Returns the first slot of a segment: a hash of its length and of four of its bytes, ignoring case.
const fn slot_of(segment: &[u8]) -> usize {
    const fn mix(hash: u32, byte: u8) -> u32 {
        (hash ^ (byte | 0x20) as u32).wrapping_mul(0x0100_0193)
    }
    let length = segment.len();
    #[expect(clippy::cast_possible_truncation, reason = "the length is at most that of the longest literal")]
    let mut hash = (length as u32).wrapping_mul(0x9e37_79b1);
    hash = mix(hash, segment[0]);
    hash = mix(hash, segment[length / 3]);
    hash = mix(hash, segment[length / 2]);
    hash = mix(hash, segment[length - 1]);
    (hash.wrapping_mul(0x9e37_79b1) >> 22) as usize
}

/// The literals in lower case, sorted.
#[rustfmt::skip] // Each line has several literals.
const LITERALS: [&str; 229] = [
    "accents", "add", "add-bulk", "add-from-file", "add-from-rules", "add-rules", "agent", "agent-testing",
    "agents", "analysis", "analysis-items", "analytics", "api-keys", "approval-policy", "archive", "assets",
    "assignable-users", "audio", "audio-effects", "audio-isolation", "audio-native", "audit-logs",
    "auth-connections", "avatar", "batch-calling", "branches", "bulk-delete", "bulk-move", "calculate",
    "cancel", "captcha", "catalog", "chapters", "character-stats", "chunk", "chunks", "client_secrets",
    "collections", "comments", "compile", "content", "convai", "conversation", "conversations", "convert",
    "crawl", "create", "create-previews", "dashboard", "default", "deliverables", "dependencies",
    "dependent-agents", "deployments", "design", "detailed", "disable", "docs", "download", "draft",
    "drafts", "dub", "dubbing", "duplicate", "edit", "environment-variables", "environments", "evaluations",
    "executions", "exotel", "export", "feedback", "file", "files", "finetunes", "flows", "folder",
    "folders", "forced-alignment", "format", "get-signed-url", "get_signed_url", "groups", "history",
    "hold-audio", "image", "invites", "items", "knowledge-base", "language", "languages", "link", "list",
    "live", "live-count", "llm", "llm-usage", "mcp-servers", "media", "members", "merge", "merge-preview",
    "merge-proposals", "messages", "migrate-segments", "models", "monitor", "move", "multi-stream-input",
    "music", "muted-tracks", "orders", "outbound-call", "outbound-campaigns", "outbound-message",
    "phone-numbers", "plan", "podcasts", "procedures", "productions", "project", "projects",
    "pronunciation-dictionaries", "pvc", "query", "rag-index", "rag-query", "realtime", "rebase",
    "rebase-preview", "refresh", "regenerate", "register-call", "remix", "remove", "remove-rules", "render",
    "replicate-to-isolated-environment", "requests", "resolve", "resource", "resources", "resubmit",
    "retry", "run", "run-tests", "samples", "search", "secrets", "segment", "segments", "separate-speakers",
    "service-accounts", "set-rules", "settings", "share", "shared-voices", "similar-voices",
    "simulate-conversation", "single-use-token", "sip-messages", "sip-trunk", "size", "smart-search",
    "snapshots", "sound-generation", "source-file-url", "speaker", "speakers", "speech-engine",
    "speech-to-speech", "speech-to-text", "stem-separation", "stream", "stream-input", "studio", "submit",
    "subscription", "summaries", "summary", "tags", "templates", "test-invocations", "text", "text-search",
    "text-to-dialogue", "text-to-speech", "text-to-voice", "third-party-disabling", "token",
    "tool-approvals", "tool-configs", "tools", "topics", "train", "transcribe", "transcript", "transcripts",
    "translate", "translation", "triage-tickets", "turn-comments", "twilio", "unshare", "update-file",
    "upload", "url", "usage", "usage-by-product-over-time", "usage-limit", "user", "users", "v1", "v2",
    "v3", "verification", "versions", "video", "video-to-music", "voice-changer", "voices", "waveform",
    "webhooks", "whatsapp", "whatsapp-accounts", "widget", "with-timestamps", "workspace", "workspaces",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_literals_are_found_in_upper_and_lower_case() {
        for (number, text) in LITERALS.iter().enumerate() {
            let literal = Literal::find(text).unwrap();
            assert_eq!((usize::from(literal.number()), literal.text()), (number, *text));
            assert_eq!(Literal::find(&text.to_uppercase()), Some(literal));
            assert_eq!(Literal::from_number(literal.number()), Some(literal));
            assert!(
                (MIN_BYTES..=MAX_BYTES).contains(&text.len()),
                "the length of {text} must be within the limits"
            );
            assert_eq!(Literal::find(&format!("{text}x")).filter(|longer| *longer == literal), None);
        }
        // The lower case of the Kelvin sign is `k`.
        assert_eq!(Literal::find("lin\u{212a}").map(Literal::text), Some("link"));
        for text in ["", "v", "v4", "21m00Tcm4TlvDq8ikWAM", "voicea", "l\u{ef}nk", &"a".repeat(9_000)] {
            assert_eq!(Literal::find(text), None, "{text:?} must not be a literal");
        }
    }

    #[test]
    fn few_literals_share_a_slot() {
        let displaced_literals = LITERALS
            .iter()
            .filter(|text| LITERALS[usize::from(HASH_SLOTS[slot_of(text.as_bytes())])] != **text);
        assert!(displaced_literals.count() < 40, "fewer than 40 literals may be outside their own slot");
    }

    #[test]
    fn the_literals_are_sorted() {
        assert!(LITERALS.is_sorted_by(|left, right| left < right));
    }
}

//! Names the concurrency groups, and determines the group of a model or an operation, and the limit of a group on a
//! plan. The provider limits the concurrent requests of a workspace separately for each family of models.
//!
//! The limit of the plan is only the initial limit. A limit that the provider reports in a header or a refusal replaces
//! it.

use super::endpoint::Operation;
use crate::policy::concurrency_group::ConcurrencyGroup;

/// The number of the first group without a constant below.
const FIRST_UNNAMED: u8 = 9;

impl ConcurrencyGroup {
    /// Speech and dialogue of the full models.
    pub const SPEECH: Self = Self::from_number(0);
    /// Speech of the fast models: Flash and Turbo.
    pub const FAST_SPEECH: Self = Self::from_number(1);
    /// Speech to speech.
    pub const CONVERSION: Self = Self::from_number(2);
    /// Speech to text, and alignment.
    pub const TRANSCRIPTION: Self = Self::from_number(3);
    /// Sound effects.
    pub const SOUND_EFFECTS: Self = Self::from_number(4);
    /// Music.
    pub const MUSIC: Self = Self::from_number(5);
    /// Audio isolation, any other charged work, and listed models of an unknown family.
    pub const OTHER: Self = Self::from_number(6);
    /// Live speech to text on a WebSocket.
    pub const LIVE_TRANSCRIPTION: Self = Self::from_number(7);
    /// Conversations with agents.
    pub const CONVERSATION: Self = Self::from_number(8);

    /// Returns one of the groups without a constant, by its index among them, or `None` if the index is too large.
    #[must_use]
    pub fn unnamed(index: usize) -> Option<Self> {
        let number = u8::try_from(index).ok()?.checked_add(FIRST_UNNAMED)?;
        (usize::from(number) < Self::COUNT).then(|| Self::from_number(number))
    }

    /// Returns the group of a model by its name, or `None` for an unknown family of models.
    #[must_use]
    pub fn for_model(id: &str) -> Option<Self> {
        // The parts of the names in a family, the most specific family first.
        const FAMILIES: [(&[&str], ConcurrencyGroup); 7] = [
            (&["scribe", "realtime"], ConcurrencyGroup::LIVE_TRANSCRIPTION),
            (&["scribe"], ConcurrencyGroup::TRANSCRIPTION),
            (&["music"], ConcurrencyGroup::MUSIC),
            (&["_sts_"], ConcurrencyGroup::CONVERSION),
            (&["text_to_sound"], ConcurrencyGroup::SOUND_EFFECTS),
            (&["flash"], ConcurrencyGroup::FAST_SPEECH),
            (&["turbo"], ConcurrencyGroup::FAST_SPEECH),
        ];
        let family = FAMILIES.iter().find(|(parts, _)| parts.iter().all(|part| id.contains(part)));
        family.map(|(_, group)| *group).or_else(|| id.starts_with("eleven_").then_some(Self::SPEECH))
    }

    /// Returns the group of an operation whose request names no model, or `None` if the concurrency of the
    /// operation is not limited.
    #[must_use]
    pub fn for_operation(operation: Operation) -> Option<Self> {
        match operation {
            Operation::Reading => None,
            Operation::Speech | Operation::Dialogue => Some(Self::SPEECH),
            Operation::Conversion => Some(Self::CONVERSION),
            Operation::Transcription => Some(Self::TRANSCRIPTION),
            Operation::LiveTranscription => Some(Self::LIVE_TRANSCRIPTION),
            Operation::Conversation => Some(Self::CONVERSATION),
            Operation::SoundEffects => Some(Self::SOUND_EFFECTS),
            Operation::Music => Some(Self::MUSIC),
            Operation::Isolation | Operation::Other => Some(Self::OTHER),
        }
    }

    /// Returns the maximum number of concurrent requests of this group on a plan, or `None` if it is unknown.
    ///
    /// Source: the provider's blog of June 2026. The provider sometimes changes these numbers.
    #[must_use]
    pub fn max_on_plan(self, tier: &str) -> Option<u32> {
        let speech_requests = match tier {
            "free" => 2,
            "starter" => 3,
            "creator" => 5,
            "pro" => 10,
            "scale" | "business" => 15,
            _ => return None,
        };
        match self {
            Self::SPEECH => Some(speech_requests),
            Self::FAST_SPEECH => Some(speech_requests * 2),
            Self::TRANSCRIPTION => Some(speech_requests * 4),
            Self::LIVE_TRANSCRIPTION => Some(speech_requests * 3),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_of_a_family_share_a_concurrency_group() {
        for (id, group) in [
            ("eleven_multilingual_v2", Some(ConcurrencyGroup::SPEECH)),
            ("eleven_v3", Some(ConcurrencyGroup::SPEECH)),
            ("eleven_v4_turbo", Some(ConcurrencyGroup::FAST_SPEECH)),
            ("eleven_flash_v2_5", Some(ConcurrencyGroup::FAST_SPEECH)),
            ("scribe_v2", Some(ConcurrencyGroup::TRANSCRIPTION)),
            ("scribe_v2_realtime", Some(ConcurrencyGroup::LIVE_TRANSCRIPTION)),
            ("music_v1", Some(ConcurrencyGroup::MUSIC)),
            ("eleven_multilingual_sts_v2", Some(ConcurrencyGroup::CONVERSION)),
            ("eleven_text_to_sound_v2", Some(ConcurrencyGroup::SOUND_EFFECTS)),
            ("gpt", None),
        ] {
            assert_eq!(ConcurrencyGroup::for_model(id), group, "{id} must have the expected group");
        }
    }

    #[test]
    fn each_plan_has_its_published_limit() {
        for (tier, speech, fast, transcription) in [
            ("free", 2, 4, 8),
            ("starter", 3, 6, 12),
            ("creator", 5, 10, 20),
            ("pro", 10, 20, 40),
            ("business", 15, 30, 60),
        ] {
            assert_eq!(ConcurrencyGroup::SPEECH.max_on_plan(tier), Some(speech));
            assert_eq!(ConcurrencyGroup::FAST_SPEECH.max_on_plan(tier), Some(fast));
            assert_eq!(ConcurrencyGroup::TRANSCRIPTION.max_on_plan(tier), Some(transcription));
            assert_eq!(ConcurrencyGroup::LIVE_TRANSCRIPTION.max_on_plan(tier), Some(speech * 3));
            assert_eq!(ConcurrencyGroup::MUSIC.max_on_plan(tier), None);
        }
        assert_eq!(ConcurrencyGroup::SPEECH.max_on_plan("grant_tier_1"), None);
    }

    #[test]
    fn every_unnamed_group_has_a_number_below_the_maximum() {
        let unnamed_groups: Vec<ConcurrencyGroup> = (0..100).map_while(ConcurrencyGroup::unnamed).collect();
        assert_eq!(unnamed_groups.len(), 7);
        for group in unnamed_groups {
            assert!(group.index() < ConcurrencyGroup::COUNT && group > ConcurrencyGroup::CONVERSATION);
        }
    }
}

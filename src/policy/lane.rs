//! Lanes: what the provider counts together when it counts requests that run at once.
//!
//! It keeps a budget for each family of models in each workspace, so speech of a slow model does
//! not take the place of a transcription. A plan's numbers are where we begin; what the provider
//! says itself, in a header or a refusal, wins.

use super::endpoint::Work;

/// One budget of a workspace. Lanes are numbered, so that a workspace can count them in an array.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Lane(u8);

impl Lane {
    /// Speech of the full models.
    pub const SPEECH: Self = Self(0);
    /// Speech of the fast ones: Flash and Turbo.
    pub const FAST_SPEECH: Self = Self(1);
    /// Speech to speech.
    pub const CONVERSION: Self = Self(2);
    /// Speech to text, and alignment.
    pub const TRANSCRIPTION: Self = Self(3);
    /// Sound effects.
    pub const EFFECTS: Self = Self(4);
    /// Music.
    pub const MUSIC: Self = Self(5);
    /// Everything else that is charged.
    pub const OTHER: Self = Self(6);
    /// Speech to text while it is spoken.
    pub const LIVE_TRANSCRIPTION: Self = Self(7);
    /// Conversations with agents.
    pub const CONVERSATION: Self = Self(8);
    /// The first of those that groups get which have none of the names above.
    const FIRST_EXTRA: u8 = 9;
    /// How many there are at the most.
    pub const COUNT: usize = 16;

    /// Its number, below [`COUNT`](Self::COUNT).
    #[must_use]
    pub fn index(self) -> usize {
        usize::from(self.0)
    }

    /// All of them, in the order of their numbers.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..).take(Self::COUNT).map(Self)
    }

    /// The `n`th lane without a name, from 0; `None` when there are no more.
    #[must_use]
    pub fn extra(n: usize) -> Option<Self> {
        let number = u8::try_from(n).ok()?.checked_add(Self::FIRST_EXTRA)?;
        (usize::from(number) < Self::COUNT).then_some(Self(number))
    }

    /// The lane of a model by its name.
    #[must_use]
    pub fn of_model(id: &str) -> Option<Self> {
        let has = |word| id.contains(word);
        if has("scribe") && has("realtime") {
            Some(Self::LIVE_TRANSCRIPTION)
        } else if has("scribe") {
            Some(Self::TRANSCRIPTION)
        } else if has("music") {
            Some(Self::MUSIC)
        } else if has("_sts_") {
            Some(Self::CONVERSION)
        } else if has("text_to_sound") {
            Some(Self::EFFECTS)
        } else if has("flash") || has("turbo") {
            Some(Self::FAST_SPEECH)
        } else if id.starts_with("eleven_") {
            Some(Self::SPEECH)
        } else {
            None
        }
    }

    /// The lane of a kind of work, when no model is named. `None` for what is not counted.
    #[must_use]
    pub fn of_work(work: Work) -> Option<Self> {
        match work {
            Work::Reading => None,
            Work::Speech | Work::Dialogue => Some(Self::SPEECH),
            Work::Conversion => Some(Self::CONVERSION),
            Work::Transcription => Some(Self::TRANSCRIPTION),
            Work::LiveTranscription => Some(Self::LIVE_TRANSCRIPTION),
            Work::Conversation => Some(Self::CONVERSATION),
            Work::Effects => Some(Self::EFFECTS),
            Work::Music => Some(Self::MUSIC),
            Work::Isolation | Work::Other => Some(Self::OTHER),
        }
    }

    /// How many requests of this lane may run at once on a plan. `None` when no one says.
    ///
    /// Source: the provider's blog of June 2026. The numbers move, so they hold only until an
    /// answer names another.
    #[must_use]
    pub fn plan_max(self, tier: &str) -> Option<u32> {
        let speech = match tier {
            "free" => 2,
            "starter" => 3,
            "creator" => 5,
            "pro" => 10,
            "scale" | "business" => 15,
            _ => return None,
        };
        match self {
            Self::SPEECH => Some(speech),
            Self::FAST_SPEECH => Some(speech * 2),
            Self::TRANSCRIPTION => Some(speech * 4),
            Self::LIVE_TRANSCRIPTION => Some(speech * 3),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_of_a_family_share_a_lane() {
        for (id, lane) in [
            ("eleven_multilingual_v2", Some(Lane::SPEECH)),
            ("eleven_v3", Some(Lane::SPEECH)),
            ("eleven_v4_turbo", Some(Lane::FAST_SPEECH)),
            ("eleven_flash_v2_5", Some(Lane::FAST_SPEECH)),
            ("scribe_v2", Some(Lane::TRANSCRIPTION)),
            ("scribe_v2_realtime", Some(Lane::LIVE_TRANSCRIPTION)),
            ("music_v1", Some(Lane::MUSIC)),
            ("eleven_multilingual_sts_v2", Some(Lane::CONVERSION)),
            ("eleven_text_to_sound_v2", Some(Lane::EFFECTS)),
            ("gpt", None),
        ] {
            assert_eq!(Lane::of_model(id), lane, "{id}");
        }
    }

    #[test]
    fn plans_have_what_the_provider_published() {
        for (tier, speech, fast, transcription) in [
            ("free", 2, 4, 8),
            ("starter", 3, 6, 12),
            ("creator", 5, 10, 20),
            ("pro", 10, 20, 40),
            ("business", 15, 30, 60),
        ] {
            assert_eq!(Lane::SPEECH.plan_max(tier), Some(speech));
            assert_eq!(Lane::FAST_SPEECH.plan_max(tier), Some(fast));
            assert_eq!(Lane::TRANSCRIPTION.plan_max(tier), Some(transcription));
            assert_eq!(Lane::LIVE_TRANSCRIPTION.plan_max(tier), Some(speech * 3));
            assert_eq!(Lane::MUSIC.plan_max(tier), None);
        }
        assert_eq!(Lane::SPEECH.plan_max("grant_tier_1"), None);
    }

    #[test]
    fn every_lane_fits_its_array() {
        let extras: Vec<Lane> = (0..100).map_while(Lane::extra).collect();
        assert_eq!(extras.len(), 7);
        assert!(extras.iter().all(|lane| lane.index() < Lane::COUNT && *lane > Lane::CONVERSATION));
    }
}

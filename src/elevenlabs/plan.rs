//! Decides whether a workspace's plan can serve a request, before the request is sent. The name of the plan (`tier`)
//! and the subscription determine the decision. Also ranks plans by their price, because cheaper workspaces are tried
//! first, and corrects the verdict of a refused text length by the plan of the account.
//!
//! The provider can introduce a plan under any name, so an unknown plan counts as unrestricted until a refusal proves a
//! restriction.

use super::features::RequestFeatures;
use super::models::Models;
use crate::policy::verdict::{Subject, Verdict};

/// The features of a workspace that its subscription contains. A feature is `None` if the subscription omits it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// Whether voices may be cloned from recordings (`can_use_instant_voice_cloning`).
    pub can_clone: Option<bool>,
    /// The number of voices that may still be added (`voice_limit` minus `voice_slots_used`).
    pub voices_left: Option<u64>,
}

/// The names of the known plans in the order of their price, the cheapest first. Source: the provider's price lists of
/// 2025 and 2026.
const TIERS: [&[&str]; 7] = [
    &["free"],
    &["starter", "go"],
    &["creator"],
    &["pro"],
    &["scale"],
    &["business", "growing_business"],
    &["enterprise"],
];

/// The index of the plan "creator" in [`TIERS`].
const CREATOR: usize = 2;
/// The index of the plan "pro" in [`TIERS`].
const PRO: usize = 3;

/// Returns the index of a plan in [`TIERS`], or `None` for an unknown plan.
fn tier_index(tier: &str) -> Option<usize> {
    TIERS.iter().position(|names| names.contains(&tier))
}

/// Returns the rank of a plan by its price, because cheaper plans are tried first. An unknown plan ranks
/// between creator and pro.
#[must_use]
pub fn price_rank(tier: Option<&str>) -> usize {
    match tier.and_then(tier_index) {
        Some(index) if index <= CREATOR => index,
        Some(index) => index + 1,
        None => CREATOR + 1,
    }
}

/// Corrects a verdict by the plan of the refused account. All paid plans have the same maximum text length, so a text
/// that is too long for one of them is an error of the request.
#[must_use]
pub fn correct_verdict_by_plan(verdict: Verdict, tier: Option<&str>) -> Verdict {
    let is_paid = tier.and_then(tier_index).is_some_and(|index| index > 0);
    let is_about_text_length = verdict == Verdict::PlanFeature(Subject::TextLength);
    if is_about_text_length && is_paid { Verdict::RequestError } else { verdict }
}

/// Returns the feature that a request needs and the workspace is known to lack, or `None` if the workspace
/// may serve the request.
#[must_use]
pub fn missing_feature(
    tier: Option<&str>,
    capabilities: Capabilities,
    features: &RequestFeatures,
    models: &Models,
) -> Option<Subject> {
    let plan_index = tier.and_then(tier_index);
    let required_index = features.output_format.as_deref().and_then(tier_index_for_format);
    if plan_index.zip(required_index).is_some_and(|(plan, required)| plan < required) {
        return Some(Subject::OutputFormat);
    }
    let is_free = plan_index == Some(0);
    if is_free && features.exceeds_free_text_length(models) {
        return Some(Subject::TextLength);
    }
    let cannot_add_voice = capabilities.can_clone == Some(false) || capabilities.voices_left == Some(0);
    (cannot_add_voice && features.adds_voice).then_some(Subject::Cloning)
}

/// Returns the index in [`TIERS`] of the cheapest plan with an output format, or `None` if every plan has the format.
/// MP3 of 192 kbit/s needs creator, and PCM and WAV of 44.1 kHz need pro. Source: `output_format` in the provider's
/// OpenAPI document.
fn tier_index_for_format(format: &str) -> Option<usize> {
    if format.starts_with("mp3_") && format.ends_with("_192") {
        return Some(CREATOR);
    }
    ["pcm_44100", "wav_44100"].iter().any(|prefix| format.starts_with(prefix)).then_some(PRO)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::elevenlabs::endpoint::Route;
    use crate::policy::replay::Effect;

    /// Returns the features of a request with the model `eleven_v3`.
    fn features(path: &str, format: Option<&str>, characters: Option<u64>) -> RequestFeatures {
        RequestFeatures {
            route: Route::parse(path),
            effect: Effect::Some,
            voice: None,
            model: Some("eleven_v3".into()),
            output_format: format.map(Into::into),
            characters,
            permission: None,
            adds_voice: path == ADD_VOICE,
        }
    }

    const SPEECH: &str = "/v1/text-to-speech/x";
    const ADD_VOICE: &str = "/v1/voices/add";

    /// Compares the feature that a plan lacks for a request for speech with the expected one. A free plan allows 2,500
    /// characters.
    #[track_caller]
    fn check_speech(tier: &str, format: Option<&str>, characters: u64, expected: Option<Subject>) {
        let document = br#"[{"model_id":"eleven_v3","max_characters_request_free_user":2500}]"#;
        let models = Models::parse(document).unwrap();
        let features = features(SPEECH, format, Some(characters));
        assert_eq!(
            missing_feature(Some(tier), Capabilities::default(), &features, &models),
            expected,
            "the missing feature of the plan {tier} must be the expected one"
        );
    }

    #[test]
    fn an_output_format_needs_its_plan() {
        let refused = Some(Subject::OutputFormat);
        for (format, tier, expected) in [
            ("mp3_44100_192", "free", refused),
            ("mp3_44100_192", "starter", refused),
            ("mp3_44100_192", "creator", None),
            ("pcm_44100", "creator", refused),
            ("wav_44100", "creator", refused),
            ("pcm_44100", "pro", None),
            ("pcm_44100", "an unknown plan", None),
            ("mp3_44100_128", "free", None),
            ("opus_48000_192", "free", None),
        ] {
            check_speech(tier, Some(format), 10, expected);
        }
    }

    #[test]
    fn a_free_plan_lacks_long_texts() {
        check_speech("free", None, 2_500, None);
        check_speech("free", None, 2_501, Some(Subject::TextLength));
        check_speech("creator", None, 2_501, None);
    }

    #[test]
    fn a_text_that_is_too_long_for_one_paid_plan_is_too_long_for_all() {
        let too_long = Verdict::PlanFeature(Subject::TextLength);
        for (tier, expected) in [
            (Some("free"), too_long),
            (None, too_long),
            (Some("an unknown plan"), too_long),
            (Some("starter"), Verdict::RequestError),
            (Some("pro"), Verdict::RequestError),
        ] {
            assert_eq!(
                correct_verdict_by_plan(too_long, tier),
                expected,
                "the verdict about the plan {tier:?} must be the expected one"
            );
        }
        let about_voice = Verdict::PlanFeature(Subject::Voice);
        assert_eq!(correct_verdict_by_plan(about_voice, Some("starter")), about_voice);
    }

    #[test]
    fn a_voice_needs_a_slot_and_a_plan_that_clones() {
        let check_capabilities = |can_clone, voices_left, path: &str, expected| {
            let features = features(path, None, None);
            let capabilities = Capabilities { can_clone, voices_left };
            let feature = missing_feature(Some("creator"), capabilities, &features, &Models::default());
            assert_eq!(
                feature, expected,
                "the missing feature of {capabilities:?} for {path} must be the expected one"
            );
        };
        check_capabilities(Some(true), Some(1), ADD_VOICE, None);
        check_capabilities(None, None, ADD_VOICE, None);
        check_capabilities(Some(false), Some(1), ADD_VOICE, Some(Subject::Cloning));
        check_capabilities(Some(true), Some(0), ADD_VOICE, Some(Subject::Cloning));
        check_capabilities(Some(false), Some(0), SPEECH, None);
    }

    #[test]
    fn the_cheapest_plan_has_the_lowest_rank() {
        let tiers = [Some("free"), Some("starter"), Some("creator"), None, Some("pro"), Some("enterprise")];
        assert!(
            tiers.map(price_rank).is_sorted_by(|left, right| left < right),
            "an unknown plan must rank between creator and pro"
        );
        assert_eq!(price_rank(Some("grant_tier_1")), price_rank(None));
    }
}

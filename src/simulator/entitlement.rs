//! Decides which features the plan of a workspace includes: voices of the library, formats, models, text lengths,
//! clones and their slots. Each check returns the provider's refusal. Adds and removes the voices of a workspace within
//! these limits.
//!
//! Sources: the OpenAPI document (formats, the fields of the subscription), captured refusals (see the table of
//! refusals), the price page of 2026 (slots).

use super::accounts::{Accounts, Refusal, Workspace};
use super::models::{Model, voice_name};
use super::plan::{RefusalWording, WorkspacePlan};
use super::refusal::{RefusalKind, RefusalValues, fixed_refusal};
use super::sound::format::Format;

/// The plans that differ in their features, in ascending order. A later plan includes all features of the
/// earlier plans.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Tier {
    Free,
    Starter,
    Creator,
    Pro,
    /// The plans Scale, Business and Enterprise, and plans with unknown names.
    Scale,
}

impl Tier {
    /// Parses the name of a plan. An unknown name counts as a large plan, because the provider has more plans than
    /// this list.
    fn parse(name: &str) -> Self {
        match name {
            "free" => Tier::Free,
            "starter" | "go" | "trial" => Tier::Starter,
            // No source lists the limits of pay-as-you-go, so it counts as the smallest plan with
            // an overage.
            "creator" | "payg" => Tier::Creator,
            "pro" => Tier::Pro,
            _ => Tier::Scale,
        }
    }
}

impl WorkspacePlan {
    pub(super) fn tier(&self) -> Tier {
        Tier::parse(&self.tier)
    }

    /// Returns the maximum number of custom voices.
    pub(super) fn max_voices(&self) -> u64 {
        self.voice_limit.unwrap_or(match self.tier() {
            Tier::Free => 3,
            Tier::Starter => 10,
            Tier::Creator => 30,
            Tier::Pro => 160,
            Tier::Scale => 660,
        })
    }

    /// Returns the maximum number of professional voices.
    pub(super) fn max_professional_voices(&self) -> u64 {
        match self.tier() {
            Tier::Free | Tier::Starter => 0,
            Tier::Creator | Tier::Pro => 1,
            Tier::Scale => 3,
        }
    }

    /// Returns whether the plan includes instant clones.
    pub(super) fn can_clone(&self) -> bool {
        self.tier() > Tier::Free
    }

    /// Creates the refusal of a feature. The array contains the name of a refusal for each wording, and the wording of
    /// the workspace selects the name.
    fn refuse_feature(&self, [current, old_400, old_402]: [&'static str; 3]) -> Refusal {
        let name = match self.wording {
            RefusalWording::Current => current,
            RefusalWording::Old400 => old_400,
            RefusalWording::Old402 => old_402,
        };
        fixed_refusal(name).into()
    }

    /// Refuses voices of the library on the free plan.
    fn check_library(&self) -> Result<(), Refusal> {
        if self.tier() > Tier::Free {
            return Ok(());
        }
        Err(self.refuse_feature(["library_voice", "free_users_not_allowed", "payment_required_plan"]))
    }

    /// Refuses an audio format that the plan does not include.
    pub(super) fn check_format(&self, format: Format) -> Result<(), Refusal> {
        let required_tier = match format.name {
            "mp3_44100_192" => Tier::Creator,
            "pcm_44100" | "wav_44100" => Tier::Pro,
            _ => Tier::Free,
        };
        if self.tier() >= required_tier {
            return Ok(());
        }
        let values = RefusalValues { format: format.name.to_owned(), ..RefusalValues::default() };
        Err(Refusal::new(fixed_refusal("output_format_not_allowed"), values))
    }

    /// Refuses a model that the workspace may not use.
    pub(super) fn check_model(&self, model: Model) -> Result<(), Refusal> {
        if !self.denied_models.iter().any(|denied_model| denied_model == model.id) {
            return Ok(());
        }
        let values = RefusalValues { model: model.id.to_owned(), ..RefusalValues::default() };
        Err(Refusal::new(fixed_refusal("model_access_denied"), values))
    }

    /// Refuses a text that is longer than the maximum of `model` on the workspace's plan.
    pub(super) fn check_length(&self, model: Model, characters: u64) -> Result<(), Refusal> {
        let max_characters = model.max_characters(self.tier() == Tier::Free);
        if characters <= max_characters {
            return Ok(());
        }
        let kind = match self.wording {
            RefusalWording::Current => RefusalKind::TextTooLong,
            RefusalWording::Old400 | RefusalWording::Old402 => fixed_refusal("max_character_limit_exceeded"),
        };
        let values = RefusalValues {
            requested_amount: characters,
            max_count: max_characters,
            subject: model.id.to_owned(),
            ..RefusalValues::default()
        };
        Err(Refusal::new(kind, values))
    }
}

/// Refuses another voice if all of `max_slots` voice slots are used.
fn check_voice_slots(used: u64, max_slots: u64) -> Result<(), Refusal> {
    if used < max_slots {
        return Ok(());
    }
    let values = RefusalValues { max_count: max_slots, ..RefusalValues::default() };
    Err(Refusal::new(fixed_refusal("voice_limit_reached"), values))
}

impl Workspace {
    /// Returns the number of used voice slots. Professional voices do not count.
    pub(super) fn voice_slots_used(&self) -> u64 {
        let slots = self.plan.voices.len().saturating_sub(self.professional_voices.len());
        u64::try_from(slots).unwrap_or(u64::MAX)
    }

    /// Adds an instant clone.
    ///
    /// # Errors
    ///
    /// Fails if the plan includes no clones, or no slot is available.
    pub(super) fn add_clone(&mut self, id: &str) -> Result<(), Refusal> {
        if !self.plan.can_clone() {
            let names = ["cloning_not_allowed", "cloning_not_allowed_old", "cloning_not_allowed_402"];
            return Err(self.plan.refuse_feature(names));
        }
        self.add_voice(id)
    }

    /// Adds a copy of a voice of the library.
    ///
    /// # Errors
    ///
    /// Fails if the plan does not include the library, or no slot is available.
    pub(super) fn add_copy(&mut self, id: &str) -> Result<(), Refusal> {
        self.plan.check_library()?;
        if self.plan.voices.iter().any(|voice| voice == id) {
            return Ok(());
        }
        self.add_voice(id)
    }

    /// Adds a voice if a slot is available.
    fn add_voice(&mut self, id: &str) -> Result<(), Refusal> {
        check_voice_slots(self.voice_slots_used(), self.plan.max_voices())?;
        self.added_voices += 1;
        self.plan.voices.push(id.to_owned());
        Ok(())
    }

    /// Adds a professional clone.
    ///
    /// # Errors
    ///
    /// Fails if the plan includes no professional clones, or no slot is available.
    pub(super) fn add_professional(&mut self, id: &str) -> Result<(), Refusal> {
        let max_slots = self.plan.max_professional_voices();
        if max_slots == 0 {
            return Err(fixed_refusal("professional_cloning_not_allowed").into());
        }
        let used_slots = u64::try_from(self.professional_voices.len()).unwrap_or(u64::MAX);
        check_voice_slots(used_slots, max_slots)?;
        self.plan.voices.push(id.to_owned());
        self.professional_voices.push(id.to_owned());
        Ok(())
    }

    /// Removes a voice. Returns false if it does not exist.
    pub(super) fn remove_voice(&mut self, id: &str) -> bool {
        let count_before = self.plan.voices.len();
        self.plan.voices.retain(|voice| voice != id);
        self.professional_voices.retain(|voice| voice != id);
        self.plan.voices.len() < count_before
    }
}

impl Accounts {
    /// Returns the name of a voice that the key's workspace may use.
    ///
    /// # Errors
    ///
    /// Fails if the voice does not exist in the workspace, or its plan does not include it.
    pub(super) fn find_voice(&self, key_index: usize, id: &str) -> Result<String, Refusal> {
        let workspace = self.workspace(key_index)?;
        if let Some(name) = voice_name(id, &workspace.plan.voices) {
            return Ok(name);
        }
        if !self.library.iter().any(|voice| voice == id) {
            return Err(Refusal::with_subject(RefusalKind::VoiceNotFound, id));
        }
        workspace.plan.check_library()?;
        Ok("Library voice".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_are_in_order_and_an_unknown_plan_has_all_features() {
        let order = ["free", "starter", "creator", "pro", "scale"].map(Tier::parse);
        assert!(order.is_sorted_by(|earlier, later| earlier < later));
        for name in ["scale_2024_08_10", "growing_business", "enterprise", "grant_tier_2", ""] {
            assert_eq!(Tier::parse(name), Tier::Scale, "{name:?} must have all features");
        }
        assert_eq!(["go", "trial", "payg"].map(Tier::parse), [Tier::Starter, Tier::Starter, Tier::Creator]);
    }

    #[test]
    fn each_wording_has_a_refusal() {
        for wording in [RefusalWording::Current, RefusalWording::Old400, RefusalWording::Old402] {
            let plan = WorkspacePlan { tier: "free".into(), wording, ..WorkspacePlan::default() };
            let refusals = [
                plan.check_library().unwrap_err(),
                plan.check_format(Format::find("pcm_44100").unwrap()).unwrap_err(),
            ];
            for refusal in refusals {
                let is_fixed = matches!(refusal.kind, RefusalKind::Fixed(_));
                assert!(is_fixed, "the refusal must be in the table: {refusal:?}");
            }
        }
    }
}

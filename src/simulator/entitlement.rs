//! Checks what the plan of a workspace includes: voices of the library, formats, models, clones and
//! their slots. Each check returns the provider's refusal.
//!
//! Sources: the OpenAPI document (formats, the fields of the subscription), captured refusals (see
//! the table of refusals), the price page of 2026 (slots).

use super::accounts::{Accounts, Refused, Workspace};
use super::models::{Model, voice_name};
use super::plan::{PlanWording, WorkspacePlan};
use super::shape::{Facts, Shape, fixed_refusal};
use super::sound::format::Format;

/// The plans that differ in their features. They are ordered: a later plan includes the features of
/// the earlier ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Tier {
    Free,
    Starter,
    Creator,
    Pro,
    /// Scale, business, enterprise, and unknown names.
    Scale,
}

impl Tier {
    /// Parses the name of a plan. The provider has plans that are not listed here.
    fn of(name: &str) -> Self {
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
    pub(super) fn rank(&self) -> Tier {
        Tier::of(&self.tier)
    }

    /// Maximum custom voices.
    pub(super) fn max_voices(&self) -> u64 {
        self.voice_limit.unwrap_or(match self.rank() {
            Tier::Free => 3,
            Tier::Starter => 10,
            Tier::Creator => 30,
            Tier::Pro => 160,
            Tier::Scale => 660,
        })
    }

    /// Maximum professional voices.
    pub(super) fn max_professional_voices(&self) -> u64 {
        match self.rank() {
            Tier::Free | Tier::Starter => 0,
            Tier::Creator | Tier::Pro => 1,
            Tier::Scale => 3,
        }
    }

    pub(super) fn can_clone(&self) -> bool {
        self.rank() > Tier::Free
    }

    /// The refusal in the wording of this workspace, which may be an older one.
    fn in_plan_wording(&self, names: [&'static str; 3]) -> Shape {
        let [current, old_400, old_402] = names;
        fixed_refusal(match self.wording {
            PlanWording::Current => current,
            PlanWording::Old400 => old_400,
            PlanWording::Old402 => old_402,
        })
    }

    /// Checks whether the plan allows voices of the library without a copy.
    ///
    /// # Errors
    ///
    /// On the free plan.
    fn library(&self) -> Result<(), Refused> {
        if self.rank() > Tier::Free {
            return Ok(());
        }
        Err(self.in_plan_wording(["library_voice", "free_users_not_allowed", "payment_required_plan"]).into())
    }

    fn format(&self, format: Format) -> Result<(), Refused> {
        let needed = match format.name {
            "mp3_44100_192" => Tier::Creator,
            "pcm_44100" | "wav_44100" => Tier::Pro,
            _ => Tier::Free,
        };
        if self.rank() >= needed {
            return Ok(());
        }
        let facts = Facts { format: format.name.to_owned(), ..Facts::default() };
        Err(Refused { shape: fixed_refusal("output_format_not_allowed"), facts: Box::new(facts) })
    }

    fn model(&self, model: Model) -> Result<(), Refused> {
        if !self.denied_models.iter().any(|denied| denied == model.id) {
            return Ok(());
        }
        let facts = Facts { model: model.id.to_owned(), ..Facts::default() };
        Err(Refused { shape: fixed_refusal("model_access_denied"), facts: Box::new(facts) })
    }

    /// Checks the number of characters against the limit of the model on this plan.
    fn length(&self, model: Model, characters: u64) -> Result<(), Refused> {
        let limit = model.max_characters(self.rank() == Tier::Free);
        if characters <= limit {
            return Ok(());
        }
        let shape = match self.wording {
            PlanWording::Current => Shape::TextTooLong,
            PlanWording::Old400 | PlanWording::Old402 => fixed_refusal("max_character_limit_exceeded"),
        };
        let facts =
            Facts { needed: characters, bound: limit, subject: model.id.to_owned(), ..Facts::default() };
        Err(Refused { shape, facts: Box::new(facts) })
    }
}

impl Workspace {
    /// The number of used slots. Professional voices do not count.
    pub(super) fn voice_slots_used(&self) -> u64 {
        let count = |list: &[String]| u64::try_from(list.len()).unwrap_or(u64::MAX);
        count(&self.plan.voices).saturating_sub(count(&self.professional))
    }

    fn has_slot(&self, used: u64, limit: u64) -> Result<(), Refused> {
        if used < limit {
            return Ok(());
        }
        let facts = Facts { bound: limit, ..Facts::default() };
        Err(Refused { shape: fixed_refusal("voice_limit_reached"), facts: Box::new(facts) })
    }

    /// Adds an instant clone.
    ///
    /// # Errors
    ///
    /// When the plan includes no clones, or no slot is free.
    pub(super) fn add_clone(&mut self, id: &str) -> Result<(), Refused> {
        if !self.plan.can_clone() {
            let names = ["cloning_not_allowed", "cloning_not_allowed_old", "cloning_not_allowed_402"];
            return Err(self.plan.in_plan_wording(names).into());
        }
        self.add_voice(id)
    }

    /// Adds a copy of a voice of the library.
    ///
    /// # Errors
    ///
    /// When the plan does not include the library, or no slot is free.
    pub(super) fn add_copy(&mut self, id: &str) -> Result<(), Refused> {
        self.plan.library()?;
        if self.plan.voices.iter().any(|own| own == id) {
            return Ok(());
        }
        self.add_voice(id)
    }

    fn add_voice(&mut self, id: &str) -> Result<(), Refused> {
        self.has_slot(self.voice_slots_used(), self.plan.max_voices())?;
        self.voice_edits += 1;
        self.plan.voices.push(id.to_owned());
        Ok(())
    }

    /// Adds a professional clone.
    ///
    /// # Errors
    ///
    /// When the plan includes no professional clones, or no slot is free.
    pub(super) fn add_professional(&mut self, id: &str) -> Result<(), Refused> {
        let limit = self.plan.max_professional_voices();
        if limit == 0 {
            return Err(fixed_refusal("professional_cloning_not_allowed").into());
        }
        let used = u64::try_from(self.professional.len()).unwrap_or(u64::MAX);
        self.has_slot(used, limit)?;
        self.plan.voices.push(id.to_owned());
        self.professional.push(id.to_owned());
        Ok(())
    }

    /// Removes a voice. Returns false if it does not exist.
    pub(super) fn remove_voice(&mut self, id: &str) -> bool {
        let before = self.plan.voices.len();
        self.plan.voices.retain(|voice| voice != id);
        self.professional.retain(|voice| voice != id);
        self.plan.voices.len() < before
    }
}

impl Accounts {
    /// The name of a voice that the key's workspace may use.
    ///
    /// # Errors
    ///
    /// When the voice does not exist in the workspace, or its plan does not include it.
    pub(super) fn voice(&self, key: usize, id: &str) -> Result<String, Refused> {
        let workspace = self.workspace(key).ok_or(Shape::InvalidKey)?;
        if let Some(name) = voice_name(id, &workspace.plan.voices) {
            return Ok(name);
        }
        if !self.library.iter().any(|voice| voice == id) {
            return Err(Refused::with_subject(Shape::VoiceNotFound, id));
        }
        workspace.plan.library()?;
        Ok("Library voice".to_owned())
    }

    /// Checks whether the plan of the key's workspace includes a format.
    ///
    /// # Errors
    ///
    /// When the plan does not include it.
    pub(super) fn format(&self, key: usize, format: Format) -> Result<(), Refused> {
        self.workspace(key).ok_or(Shape::InvalidKey)?.plan.format(format)
    }

    /// Checks whether the plan of the key's workspace includes a model.
    ///
    /// # Errors
    ///
    /// When the plan does not include it.
    pub(super) fn model(&self, key: usize, model: Model) -> Result<(), Refused> {
        self.workspace(key).ok_or(Shape::InvalidKey)?.plan.model(model)
    }

    /// Checks the number of characters against the limit of the model on this plan.
    ///
    /// # Errors
    ///
    /// When the text is too long.
    pub(super) fn length(&self, key: usize, model: Model, characters: u64) -> Result<(), Refused> {
        self.workspace(key).ok_or(Shape::InvalidKey)?.plan.length(model, characters)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_are_in_order_and_an_unknown_plan_has_all_features() {
        let order = ["free", "starter", "creator", "pro", "scale"].map(Tier::of);
        assert!(order.is_sorted_by(|earlier, later| earlier < later));
        for name in ["scale_2024_08_10", "growing_business", "enterprise", "grant_tier_2", ""] {
            assert_eq!(Tier::of(name), Tier::Scale, "{name}");
        }
        assert_eq!(["go", "trial", "payg"].map(Tier::of), [Tier::Starter, Tier::Starter, Tier::Creator]);
    }

    #[test]
    fn each_wording_has_a_refusal() {
        for wording in [PlanWording::Current, PlanWording::Old400, PlanWording::Old402] {
            let plan = WorkspacePlan { tier: "free".into(), wording, ..WorkspacePlan::default() };
            let refused =
                [plan.library().unwrap_err(), plan.format(Format::named("pcm_44100").unwrap()).unwrap_err()];
            for refused in refused {
                assert!(matches!(refused.shape, Shape::Fixed(_)), "{refused:?}");
            }
        }
    }
}
